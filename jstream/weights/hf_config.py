"""What a published checkpoint says of itself: where its folder is, and `config.json` as our frozen configs.

Both layouts in use are read: the decoder's numbers at the top (as first published) and in `text_config` (transformers
5). What our modules do not compute is an error here, never passed over. Nothing read here can run code.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from jstream.config import ConfigError, DecoderConfig, ModelConfig, QwenVisionConfig, SiglipConfig, from_dict
from jstream.weights.checkpoint import CheckpointError

_LARGEST_JSON = 64 << 20  # bytes; the index of a large checkpoint has a few hundred kilobytes
_NEEDED_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]  # of a hub repository

# `architectures` of a config.json, or its `model_type` where it names none → our name of the family
ARCHITECTURES = {
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "LlamaForCausalLM": "llama",
    "SiglipModel": "siglip",
    "SiglipVisionModel": "siglip",
}
_MODEL_TYPES = {family: family for family in ARCHITECTURES.values()} | {"siglip_vision_model": "siglip"}

# What the modules compute, where a config.json could ask for something else. None is "not mentioned".
_DECODER_COMPUTES = {
    "hidden_act": ("silu",),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "use_sliding_window": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "quantization_config": (None,),
}
_VISION_COMPUTES = {
    "qwen2_5_vl": {"hidden_act": ("silu",), "in_channels": (None, 3), "in_chans": (None, 3)},
    "qwen3_vl": {"hidden_act": ("gelu_pytorch_tanh",), "in_channels": (None, 3), "in_chans": (None, 3)},
    "siglip": {
        "hidden_act": (None, "gelu_pytorch_tanh"),
        "num_channels": (None, 3),
        "vision_use_head": (None, True),
    },
}

# ours → theirs
_DECODER_KEYS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
_QWEN_VISION_KEYS = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
    "width": "hidden_size",
    "num_layers": "depth",
    "num_heads": "num_heads",
    "mlp_dim": "intermediate_size",
    "out_width": "out_hidden_size",
}
_SIGLIP_KEYS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "norm_eps": "layer_norm_eps",
}
_SIGLIP_DEFAULTS = {  # a SigLIP config.json leaves out what is as in the base model
    "image_size": 224,
    "patch_size": 16,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-6,
}
_DEFAULT_FRAME = (224, 420)  # pixels: 16:9 within the smallest budget in use; `Model.for_frames` fits a stream's own


def resolve(source: str | pathlib.Path) -> pathlib.Path:
    """The folder of a checkpoint: itself, or a hub repository's snapshot, downloaded where it is not cached.

    Only JSON, safetensors and tokenizer files are fetched, and no code of a repository is ever run.

    Args:
        source: a folder, or a hub id such as `Qwen/Qwen2.5-VL-3B-Instruct`.

    Raises:
        CheckpointError: no such folder and no hub id, no `huggingface_hub`, no network, or no such repository.
    """
    path, name = pathlib.Path(source), str(source)
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1 or not all(name.split("/")):
        found = "a file" if path.exists() else "nothing"
        raise CheckpointError(f"{source}: expected a folder or a hub id like org/name, found {found}")
    elsewhere = "or download its files elsewhere and pass their folder"
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"{source}: expected a folder, found none; to fetch it from the hub pip install 'jstream[hub]', {elsewhere}"
        ) from None
    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=_NEEDED_FILES, ignore_patterns=["*/*"])
    except Exception as error:  # the hub client raises its own, its transport's and the system's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{source}: expected a folder or a hub repository that can be fetched, found: {reason.rstrip('.')}; "
            f"check the id, the network and the login, {elsewhere}"
        ) from None
    return pathlib.Path(folder)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object of bounded size.

    Raises:
        CheckpointError: where there is none.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"more than {_LARGEST_JSON >> 20} MB")
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: expected a JSON file, found none that can be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, found: {str(error).splitlines()[0]}") from None
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(record).__name__}")
    return record


def family_of(record: Mapping[str, Any], where: Any) -> str:
    """`qwen2_5_vl`, `qwen3_vl`, `llama` or `siglip`: whose weights a config.json describes.

    Args:
        record: the content of the config.json.
        where: named in the error.

    Raises:
        CheckpointError: for any other architecture.
    """
    names = record.get("architectures")
    name = names[0] if isinstance(names, list) and names else record.get("model_type")
    known = ARCHITECTURES if isinstance(names, list) and names else _MODEL_TYPES
    if not isinstance(name, str) or name not in known:
        raise CheckpointError(f"{where}: expected one of {', '.join(ARCHITECTURES)}, found {name!r}")
    return known[name]


def read_config(folder: str | pathlib.Path, max_pixels: int | None = None) -> ModelConfig:
    """The model that a Qwen2.5-VL or Qwen3-VL folder holds, from its `config.json` and `preprocessor_config.json`.

    The frame size is a 16:9 one; `jstream.Model.for_frames` fits it to a stream.

    Args:
        folder: of the checkpoint.
        max_pixels: the budget of a frame in place of the preprocessor's, which is for single images (Streamo was
            trained with 100352).

    Raises:
        CheckpointError: another family, a missing or malformed file, or anything that our modules do not compute.
    """
    folder = pathlib.Path(folder)
    where, record = folder / "config.json", read_json(folder / "config.json")
    family = family_of(record, where)
    if family not in ("qwen2_5_vl", "qwen3_vl"):
        raise CheckpointError(
            f"{where}: expected a video language model, found {family}, a part of one; "
            "VideoLLM-online opens by its adapter (configs/videollm_online.py)"
        )
    values = _qwen_vision(record, family, where)
    values |= _preprocessor(folder, values)
    if max_pixels is not None:
        least = values.get("min_pixels", QwenVisionConfig.min_pixels)
        values |= {"max_pixels": max_pixels, "min_pixels": min(max_pixels, least)}
    try:
        vision = from_dict(QwenVisionConfig, values, "vision").for_frames(*_DEFAULT_FRAME)
        return ModelConfig(vision, decoder_config(record, where))
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from None


def decoder_config(record: Mapping[str, Any], where: Any) -> DecoderConfig:
    """The decoder that a config.json of Qwen2.5-VL, Qwen3-VL or Llama describes.

    Raises:
        CheckpointError: as `read_config`.
    """
    family = family_of(record, where)
    inner = record.get("text_config") or {}
    text = {**record, **_object(inner, f"{where}: text_config")}  # some flat files carry a copy; transformers reads it
    _require(text, _DECODER_COMPUTES, where)
    if any(kind != "full_attention" for kind in text.get("layer_types") or ()):
        raise CheckpointError(f"{where}: layer_types: expected full_attention in every layer, found another")
    values = {ours: _need(text, theirs, where) for ours, theirs in _DECODER_KEYS.items()} | _rope(text, family, where)
    heads, width = values["num_heads"], values["width"]
    values["num_kv_heads"] = text.get("num_key_value_heads") or heads
    if text.get("head_dim") is not None:
        values["head_dim"] = text["head_dim"]
    elif family == "qwen3_vl":
        values["head_dim"] = 128
    elif isinstance(heads, int) and isinstance(width, int) and heads:
        values["head_dim"] = width // heads
    if family == "qwen3_vl":
        vision = _object(record.get("vision_config"), f"{where}: vision_config")
        deep = _need(vision, "deepstack_visual_indexes", where)
        values["deep_layers"] = len(deep) if isinstance(deep, (list, tuple)) else deep
    tied = any(part.get("tie_word_embeddings") for part in (record, inner))  # some files say it in one place alone
    values |= {"qkv_bias": family == "qwen2_5_vl", "qk_norm": family == "qwen3_vl", "tie_embeddings": bool(tied)}
    try:
        return from_dict(DecoderConfig, values, "decoder")
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from None


def _rope(text: Mapping[str, Any], family: str, where: Any) -> dict[str, Any]:
    """The rotary positions of a decoder, under `rope_scaling` as first published or under `rope_parameters`."""
    rope = _object(text.get("rope_parameters") or text.get("rope_scaling") or {}, f"{where}: rope_scaling")
    known = ("default",) if family == "llama" else ("default", "mrope")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in known or rope.get("partial_rotary_factor", 1) != 1:
        raise CheckpointError(
            f"{where}: rope_scaling: expected {' or '.join(known)} rotary positions in all dimensions, found {rope}, "
            "which is not supported"
        )
    values = {"rope_theta": _need({**text, **rope}, "rope_theta", where)}
    if family == "llama":
        return values
    interleaved = family == "qwen3_vl"
    if rope.get("mrope_interleaved", interleaved) is not interleaved:
        raise CheckpointError(f"{where}: mrope_interleaved: expected {interleaved} for {family}, found another")
    section = _need(({"mrope_section": (24, 20, 20)} if interleaved else {}) | rope, "mrope_section", where)
    return values | {"mrope_section": section, "mrope_interleaved": interleaved}


def siglip_config(record: Mapping[str, Any], where: Any, grid: int) -> SiglipConfig:
    """The vision tower that a SigLIP config.json describes, with its pooled token and grid × grid averages.

    Raises:
        CheckpointError: as `read_config`.
    """
    vision = _SIGLIP_DEFAULTS | _object(record.get("vision_config") or record, f"{where}: vision_config")
    _require(vision, _VISION_COMPUTES["siglip"], where)
    values = {ours: vision[theirs] for ours, theirs in _SIGLIP_KEYS.items()}
    try:
        return from_dict(SiglipConfig, values | {"grid": grid, "pooled_token": True}, "vision")
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from None


def _qwen_vision(record: Mapping[str, Any], family: str, where: Any) -> dict[str, Any]:
    vision = _object(record.get("vision_config"), f"{where}: vision_config")
    _require(vision, _VISION_COMPUTES[family], where)
    values = {ours: _need(vision, theirs, where) for ours, theirs in _QWEN_VISION_KEYS.items()}
    if not all(isinstance(values[key], int) for key in ("patch_size", "merge_size")):
        raise CheckpointError(f"{where}: expected whole numbers for patch_size and spatial_merge_size")
    values["frame_height"] = values["frame_width"] = values["patch_size"] * values["merge_size"]
    if family == "qwen2_5_vl":
        layers, window = _need(vision, "fullatt_block_indexes", where), _need(vision, "window_size", where)
        return values | {"tower": "qwen2_5", "window_size": window, "full_attention_layers": layers}
    deep, positions = _need(vision, "deepstack_visual_indexes", where), _need(vision, "num_position_embeddings", where)
    values |= {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, "full_attention_layers": (), "window_size": 0}
    return values | {"tower": "qwen3", "num_positions": positions, "deep_layers": deep}


def _preprocessor(folder: pathlib.Path, vision: Mapping[str, Any]) -> dict[str, Any]:
    """How frames are normalised and how many pixels they may have, where the folder says it."""
    path, record = folder / "preprocessor_config.json", {}
    if path.exists():
        record = read_json(path)
    elif (path := folder / "processor_config.json").exists():  # where transformers 5 keeps it
        record = _object(read_json(path).get("image_processor") or {}, f"{path}: image_processor")
    for key, expected in {**vision, "rescale_factor": 1 / 255}.items():
        found = record.get(key)
        if key in ("patch_size", "merge_size", "temporal_patch_size", "rescale_factor") and found is not None:
            if not isinstance(found, (int, float)) or not math.isclose(found, expected, rel_tol=1e-6):
                raise CheckpointError(f"{path}: {key}: expected {expected:.6g}, found {found!r}")
    values = {key: record[key] for key in ("image_mean", "image_std") if record.get(key) is not None}
    size = _object(record.get("size") or {}, f"{path}: size")
    for ours, theirs in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        value = record[ours] if record.get(ours) is not None else size.get(theirs)
        if value is not None:
            values[ours] = value
    return values


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where}: expected an object, found {type(value).__name__}")
    return dict(value)


def _need(record: Mapping[str, Any], key: str, where: Any) -> Any:
    if record.get(key) is None:
        raise CheckpointError(f"{where}: expected {key}, found none")
    return record[key]


def _require(record: Mapping[str, Any], computed: Mapping[str, tuple], where: Any) -> None:
    for key, values in computed.items():
        if record.get(key) not in values:
            expected = " or ".join(repr(value) for value in values if value is not None) or "none"
            raise CheckpointError(
                f"{where}: {key}: expected {expected}, found {record.get(key)!r}, which is not supported"
            )
