"""Published weights in and out: the only file that knows the tensor names of Hugging Face checkpoints.

One table a family says how each tensor is called there and where it stands in our params, and is read both ways.
Loading opens every header first and makes four checks (unexpected, missing, duplicate, mis-shaped), then reads one
tensor at a time. Only safetensors files are read: nothing in them can run code.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import re
import shutil
import struct
from collections.abc import Mapping
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util

from jstream.config import ModelConfig
from jstream.models.video_lm import abstract_params
from jstream.weights.checkpoint import CheckpointError
from jstream.weights.hf_config import decoder_config, family_of, read_config, read_json, resolve

__all__ = ["load_params", "read_config", "resolve", "save_hf", "stored_dtype"]

# ------------------------------------------------------------------------------------------------------------ tables


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of tensor: what it is called in a checkpoint, and where it stands in the params.

    Attributes:
        key: in a checkpoint, after `Family.prefixes`; {} is a number.
        paths: in the params; several where the checkpoint fuses what we keep apart.
        pattern: of einops, from the checkpoint's axes to ours, "" where they are the same; with several paths our first
            axis runs over them.
    """

    key: str
    paths: tuple[str, ...]
    pattern: str = ""


LINEAR = "rows columns -> columns rows"


def _copy(key: str, path: str) -> tuple[Row, ...]:
    return (Row(key, (path,)),)


def _norm(key: str, path: str) -> tuple[Row, ...]:
    return (Row(f"{key}.weight", (f"{path}/scale",)), Row(f"{key}.bias", (f"{path}/bias",)))


def _linear(key: str, path: str) -> tuple[Row, ...]:
    return (Row(f"{key}.weight", (f"{path}/kernel",), LINEAR), Row(f"{key}.bias", (f"{path}/bias",)))


def _each(kind: Any, key: str, path: str, *names: str) -> tuple[Row, ...]:
    """Rows of `kind` for modules with the same name in both."""
    return tuple(row for name in names for row in kind(key + name, path + name.replace(".", "/")))


_HEAD, _EMBEDDING = "lm_head.weight", "text.embed_tokens.weight"
_LAYER, _BLOCK = ("text.layers.{}.", "decoder/layers_{}/"), ("visual.blocks.{}.", "vision/blocks_{}/")
_SIGLIP_LAYER, _SIGLIP_HEAD = ("visual.encoder.layers.{}.", "vision/layers_{}/"), ("visual.head.", "vision/head/")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")

_DECODER = (
    *_copy(_EMBEDDING, "decoder/embed_tokens/embedding"),
    *_each(_norm, *_LAYER, "input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"),
    *_each(_linear, *_LAYER, *(f"self_attn.{name}" for name in (*_PROJECTIONS, "o_proj"))),
    *_each(_linear, *_LAYER, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    *_norm("text.norm", "decoder/norm"),
    *_linear("lm_head", "decoder/lm_head"),
)
_QWEN_VISION = (
    Row("visual.patch_embed.proj.weight", ("vision/patch_embed_kernel",), "out c t p q -> (c t p q) out"),
    *_copy("visual.patch_embed.proj.bias", "vision/patch_embed_bias"),
    *_copy("visual.pos_embed.weight", "vision/pos_embed"),
    *_each(_norm, *_BLOCK, "norm1", "norm2"),
    *_each(_linear, *_BLOCK, "attn.qkv", "attn.proj"),
)
_QWEN2_5_VISION = (
    *_QWEN_VISION,
    *_each(_linear, *_BLOCK, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    *_norm("visual.merger.ln_q", "vision/merger/norm"),
    *_linear("visual.merger.mlp.0", "vision/merger/mlp/fc1"),
    *_linear("visual.merger.mlp.2", "vision/merger/mlp/fc2"),
)
_QWEN3_VISION = (
    *_QWEN_VISION,
    *_linear("visual.blocks.{}.mlp.linear_fc1", "vision/blocks_{}/mlp/fc1"),
    *_linear("visual.blocks.{}.mlp.linear_fc2", "vision/blocks_{}/mlp/fc2"),
    *_norm("visual.merger.norm", "vision/merger/norm"),
    *_linear("visual.merger.linear_fc1", "vision/merger/mlp/fc1"),
    *_linear("visual.merger.linear_fc2", "vision/merger/mlp/fc2"),
    *_norm("visual.deepstack_merger_list.{}.norm", "vision/deepstack_{}/norm"),
    *_linear("visual.deepstack_merger_list.{}.linear_fc1", "vision/deepstack_{}/mlp/fc1"),
    *_linear("visual.deepstack_merger_list.{}.linear_fc2", "vision/deepstack_{}/mlp/fc2"),
)
_SIGLIP_VISION = (
    Row("visual.embeddings.patch_embedding.weight", ("vision/patch_embedding/kernel",), "out c p q -> (p q c) out"),
    *_copy("visual.embeddings.patch_embedding.bias", "vision/patch_embedding/bias"),
    *_copy("visual.embeddings.position_embedding.weight", "vision/position_embedding"),
    *_each(_norm, *_SIGLIP_LAYER, "layer_norm1", "layer_norm2"),
    *_each(_linear, *_SIGLIP_LAYER, *(f"self_attn.{name}" for name in (*_PROJECTIONS, "out_proj"))),
    *_each(_linear, *_SIGLIP_LAYER, "mlp.fc1", "mlp.fc2"),
    *_norm("visual.post_layernorm", "vision/post_layernorm"),
    *_each(_copy, *_SIGLIP_HEAD, "probe"),
    Row(
        "visual.head.attention.in_proj_weight",
        tuple(f"vision/head/attention/{name}/kernel" for name in _PROJECTIONS),
        "(three rows) columns -> three columns rows",
    ),
    Row(
        "visual.head.attention.in_proj_bias",
        tuple(f"vision/head/attention/{name}/bias" for name in _PROJECTIONS),
        "(three rows) -> three rows",
    ),
    *_each(_linear, *_SIGLIP_HEAD, "attention.out_proj", "mlp.fc1", "mlp.fc2"),
    *_each(_norm, *_SIGLIP_HEAD, "layernorm"),
)
_CONNECTOR_ROWS = (*_linear("connector.0", "projector/mlp/fc1"), *_linear("connector.2", "projector/mlp/fc2"))


@dataclasses.dataclass(frozen=True)
class Family:
    """How checkpoints of one architecture name their tensors.

    Attributes:
        rooms: beginnings of the paths in the params that such a checkpoint fills.
        rows: the table.
        prefixes: how a key may begin → how it begins in the table; the first that fits counts.
        published: how a key begins in the table → how it is written.
        passed_over: regular expression of keys that may be there and are not read.
    """

    rooms: tuple[str, ...]
    rows: tuple[Row, ...]
    prefixes: Mapping[str, str]
    published: Mapping[str, str]
    passed_over: str = r".*\.rotary_emb\.inv_freq$"

    def row_key(self, key: str) -> str:
        """The table's name of a checkpoint's key."""
        return next((row + key[len(there) :] for there, row in self.prefixes.items() if key.startswith(there)), key)

    def checkpoint_key(self, key: str) -> str:
        """The published name of the table's key."""
        return next((there + key[len(row) :] for row, there in self.published.items() if key.startswith(row)), key)


_QWEN_PREFIXES = {"model.language_model.": "text.", "model.visual.": "visual.", "visual.": "visual.", "model.": "text."}
FAMILIES = {
    "qwen2_5_vl": Family(
        ("vision/", "decoder/"), _DECODER + _QWEN2_5_VISION, _QWEN_PREFIXES, {"text.": "model.", "visual.": "visual."}
    ),
    "qwen3_vl": Family(
        ("vision/", "decoder/"),
        _DECODER + _QWEN3_VISION,
        _QWEN_PREFIXES,
        {"text.": "model.language_model.", "visual.": "model.visual."},
    ),
    "llama": Family(("decoder/",), _DECODER, {"model.": "text."}, {"text.": "model."}),
    "siglip": Family(
        ("vision/",),
        _SIGLIP_VISION,
        {"vision_model.": "visual.", "": "visual."},
        {"visual.": "vision_model."},
        passed_over=r"text_model\.|logit_scale$|logit_bias$|(vision_model\.)?embeddings\.position_ids$",
    ),
}
CONNECTOR = Family(("projector/",), _CONNECTOR_ROWS, {"model.": "text."}, {"text.": "model."})


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A row filled in for one model: a tensor that its checkpoint has to hold.

    Attributes:
        key: its published name.
        shape: in the checkpoint.
        sizes: of axes that `pattern` folds.
    """

    key: str
    paths: tuple[str, ...]
    pattern: str
    shape: tuple[int, ...]
    sizes: Mapping[str, int]

    def to_ours(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """The leaves that the checkpoint's tensor fills, by path."""
        if self.pattern:
            array = einops.rearrange(array, self.pattern, **self.sizes)
        return dict(zip(self.paths, array if len(self.paths) > 1 else (array,), strict=True))


def to_theirs(leaves: list, pattern: str, sizes: Mapping[str, int]) -> Any:
    """The inverse of `Tensor.to_ours`: the checkpoint's tensor from the leaves that it fills."""
    array = leaves if len(leaves) > 1 else leaves[0]
    return einops.rearrange(array, " -> ".join(reversed(pattern.split(" -> "))), **sizes) if pattern else array


def plan_of(family: Family, config: ModelConfig, leaves: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """What a checkpoint of the family has to hold for this model, by the table's key, in the table's order."""
    leaves = flat(abstract_params(config)) if leaves is None else leaves
    patch = {"c": 3, "t": config.vision.temporal_patch_size, "p": config.vision.patch_size, "three": 3}
    patch["q"] = patch["p"]
    plan, planned = {}, set()
    for row in family.rows:
        named = re.compile(re.escape(row.paths[0]).replace(r"\{\}", r"(\d+)"))
        sizes = {axis: size for axis, size in patch.items() if axis in re.findall(r"\w+", row.pattern)}
        for number in [hit.groups() for hit in map(named.fullmatch, leaves) if hit]:
            paths = tuple(path.format(*number) for path in row.paths)
            key = row.key.format(*number)
            shapes = [jax.ShapeDtypeStruct(leaves[path].shape, jnp.float32) for path in paths]
            theirs = jax.eval_shape(lambda *x, row=row, sizes=sizes: to_theirs(list(x), row.pattern, sizes), *shapes)
            plan[key] = Tensor(family.checkpoint_key(key), paths, row.pattern, theirs.shape, sizes)
            planned.update(paths)
    unnamed = [path for path in leaves if path.startswith(family.rooms) and path not in planned]
    if unnamed:
        raise CheckpointError(f"expected a model of the family, found params that it has no name for: {some(unnamed)}")
    return plan


def flat(tree: Any) -> dict[str, Any]:
    """The leaves of a tree of params by path, such as `decoder/norm/scale`."""
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in named}


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


# ----------------------------------------------------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in an open file: shape and dtype are known, the values are read when asked for."""

    file: Any
    key: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> np.ndarray:
        return self.file.get_tensor(self.key)

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.file.get_slice(self.key)[start:stop]


BLOCK_ROWS = 1024  # of a matrix, where one is worked through in pieces


def open_stored(folder: pathlib.Path, name: str) -> dict[str, Stored]:
    """Every tensor of `name.safetensors`, or of the shards that `name.safetensors.index.json` lists; none is read.

    Raises:
        CheckpointError: a missing, truncated or damaged file, a shard outside the folder, a key in two shards.
    """
    single, index = folder / f"{name}.safetensors", folder / f"{name}.safetensors.index.json"
    if single.exists():
        files = [single]
    elif index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{index}: expected a weight_map from keys to files, found none")
        for shard in shards.values():
            if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
                raise CheckpointError(f"{index}: expected safetensors files of this folder, found {shard!r}")
        files = [folder / shard for shard in sorted(set(shards.values()))]
    else:
        others = [path.name for suffix in ("bin", "pt", "pth") for path in sorted(folder.glob(f"*.{suffix}"))]
        advice = "; convert them to safetensors, other formats can run code and are not read" if others else ""
        raise CheckpointError(f"{folder}: expected {single.name} or its index, found {some(others) or 'none'}{advice}")
    stored: dict[str, Stored] = {}
    for path in files:
        try:
            file = safetensors.safe_open(path, "np")
            for key in file.offset_keys():
                if key in stored:
                    raise CheckpointError(f"{folder}: {key} is in two shards, the second is {path.name}")
                tensor = file.get_slice(key)
                stored[key] = Stored(file, key, tuple(tensor.get_shape()), tensor.get_dtype())
        except FileNotFoundError:
            raise CheckpointError(f"{path}: the index names this shard and it is missing; download it again") from None
        except (safetensors.SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{path}: truncated or damaged, download it again ({reason})") from None
    return stored


def match(folder: Any, family: Family, plan: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The four checks, before any value is read; table's key → tensor, in the order of the files.

    Raises:
        CheckpointError: one line that counts and names what is unexpected, missing, twice there or of another shape.
    """
    found: dict[str, Stored] = {}
    unexpected, twice, wrong, head = [], [], [], None
    for name, tensor in stored.items():
        key = family.row_key(name)
        if key == _HEAD and key not in plan and _EMBEDDING in plan and head is None:
            head = tensor  # the transposed embedding once more
        elif key not in plan:
            unexpected += [] if re.match(family.passed_over, name) else [name]
        elif key in found:
            twice.append(f"{name} = {found[key].key}")
        elif tensor.shape != plan[key].shape or tensor.dtype not in ("F64", "F32", "F16", "BF16"):
            wrong.append(f"{name} should be {list(plan[key].shape)}, is {tensor.dtype} {list(tensor.shape)}")
            found[key] = tensor
        else:
            found[key] = tensor
    missing = [tensor.key for key, tensor in plan.items() if key not in found]
    checks = {"unexpected": unexpected, "missing": missing, "twice there": twice, "of another shape or type": wrong}
    problems = [f"{len(names)} {check}: {some(names)}" for check, names in checks.items() if names]
    if _EMBEDDING in found and (rows := found[_EMBEDDING].shape[:1]) != (vocabulary := plan[_EMBEDDING].shape[:1]):
        problems.append(f"vocab_size is {vocabulary[0]}, the embedding has {rows[0] if rows else 'no'} rows")
    if problems:
        raise CheckpointError(f"{folder}: expected the tensors that its config describes; {'; '.join(problems)}")
    if head is not None and not _equal(head, found[_EMBEDDING]):
        raise CheckpointError(
            f"{folder}: {head.key} should equal the embedding, which config.json ties to it, and does not; "
            "set tie_word_embeddings to false if the head is its own"
        )
    return found


def _equal(one: Stored, other: Stored) -> bool:
    blocks = range(0, one.shape[0], BLOCK_ROWS) if one.shape == other.shape else ()
    rows = lambda tensor, start: tensor.rows(start, min(start + BLOCK_ROWS, one.shape[0]))
    return one.shape == other.shape and all(np.array_equal(rows(one, i), rows(other, i)) for i in blocks)


def fill(
    params: dict[str, jax.Array],
    plan: Mapping[str, Tensor],
    found: Mapping[str, Any],
    dtype: Any,
    shardings: Any,
) -> None:
    """Reads one tensor after the other into `params`, by path; no more than one of them is in flight."""
    one = shardings is None or isinstance(shardings, jax.sharding.Sharding)
    place = dict.fromkeys((p for tensor in plan.values() for p in tensor.paths), shardings) if one else flat(shardings)
    for key, tensor in found.items():
        for path, array in plan[key].to_ours(tensor.read()).items():
            params[path] = _put(np.asarray(array, dtype, order="C"), place[path])


def _put(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Copies to the devices and waits, so that the host array can be let go of (and the copy be donated)."""
    if sharding is not None and not sharding.is_fully_addressable:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    return jax.block_until_ready(jax.device_put(array, sharding, may_alias=False))


def unflat(params: Mapping[str, jax.Array]) -> dict[str, Any]:
    """The inverse of `flat`."""
    return traverse_util.unflatten_dict(params, sep="/")


def load_params(
    folder: str | pathlib.Path, config: ModelConfig, dtype: jnp.dtype = jnp.bfloat16, shardings: Any = None
) -> dict[str, Any]:
    """The params of a Qwen2.5-VL or Qwen3-VL folder, in either published layout of keys, in one file or in shards.

    Beside the params the host holds at most three times the largest tensor.

    Args:
        folder: with `config.json` and `model.safetensors` or its shards (`resolve` finds one).
        config: `read_config` of the folder; the frame size does not matter.
        dtype: of the params.
        shardings: one for all, a tree like the params, or None for the default device.

    Raises:
        CheckpointError: a missing or damaged file; keys that are unexpected, missing or there twice; another shape.
    """
    folder = pathlib.Path(folder)
    family = FAMILIES[family_of(read_json(folder / "config.json"), folder / "config.json")]
    plan = plan_of(family, config)
    params: dict[str, jax.Array] = {}
    fill(params, plan, match(folder, family, plan, open_stored(folder, "model")), dtype, shardings)
    return unflat(params)


def stored_dtype(folder: str | pathlib.Path) -> np.dtype:
    """The dtype that all tensors of a published folder have.

    Raises:
        CheckpointError: there are several.
    """
    names = sorted({tensor.dtype for tensor in open_stored(pathlib.Path(folder), "model").values()})
    known = {name: jnp.dtype(dtype) for dtype, name in _DTYPE_NAMES.items() if dtype != "float64"}
    if len(names) != 1 or names[0] not in known:
        raise CheckpointError(
            f"{folder}: expected tensors of one type among {', '.join(known)}, found {some(names)}; say --dtype"
        )
    return known[names[0]]


# ----------------------------------------------------------------------------------------------------------- writing

_DTYPE_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def save_hf(
    folder: str | pathlib.Path,
    family: str,
    config: ModelConfig,
    params: Any,
    hf_config: dict[str, Any],
    max_shard_bytes: int = 5 << 30,
    others: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a folder in the published layout, which appears whole or not at all; the inverse of `load_params`.

    Args:
        folder: a new one.
        family: `qwen2_5_vl` or `qwen3_vl`; `llama` and `siglip` write that part of a model alone.
        config: of the model.
        params: in the dtype to be written.
        hf_config: the content of `config.json`, as the checkpoint had it that the model comes from.
        max_shard_bytes: larger models are cut into shards with an index.
        others: name → content of further files of the folder, such as the tokenizer's.

    Raises:
        CheckpointError: the folder is there already; `hf_config` or the params are not of this family and config.
    """
    folder = pathlib.Path(folder).absolute()
    if folder.exists():
        raise CheckpointError(f"{folder}: expected a new folder, found one; choose another name or move it away")
    if family not in FAMILIES or family_of(hf_config, "hf_config") != family:
        raise CheckpointError(f"hf_config: expected one of {' or '.join(FAMILIES)} as given, found {family!r}")
    rooms = FAMILIES[family].rooms
    if "decoder/" in rooms and decoder_config(hf_config, "hf_config") != config.decoder:
        raise CheckpointError(
            f"hf_config: expected the decoder of the model, {config.decoder}, found "
            f"{decoder_config(hf_config, 'hf_config')}; where tokens were added set its vocab_size"
        )
    leaves = {path: leaf for path, leaf in flat(params).items() if path.startswith(rooms)}
    wanted = {path: leaf for path, leaf in flat(abstract_params(config)).items() if path.startswith(rooms)}
    wrong = [
        p for p in {**wanted, **leaves} if p not in wanted or p not in leaves or leaves[p].shape != wanted[p].shape
    ]
    if wrong:
        raise CheckpointError(f"params: expected those of the config, found others or another shape at {some(wrong)}")

    bytes_of = lambda tensor: math.prod(tensor.shape) * leaves[tensor.paths[0]].dtype.itemsize
    shards: list[list[Tensor]] = [[]]
    for tensor in plan_of(FAMILIES[family], config, wanted).values():
        if shards[-1] and sum(map(bytes_of, shards[-1])) + bytes_of(tensor) > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, shard in zip(names, shards, strict=True):
            _write_safetensors(partial / name, shard, leaves)
        if len(shards) > 1:
            total = sum(bytes_of(tensor) for tensor in itertools.chain(*shards))
            weight_map = {tensor.key: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
            (partial / "model.safetensors.index.json").write_text(index + "\n")
        (partial / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
        for name, content in (others or {}).items():
            (partial / name).write_bytes(content)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_safetensors(path: pathlib.Path, tensors: list[Tensor], leaves: Mapping[str, jax.Array]) -> None:
    """One file, a tensor at a time: the length of the header, the header, the values (the format of safetensors)."""
    dtype = lambda tensor: leaves[tensor.paths[0]].dtype
    tensors = sorted(tensors, key=lambda tensor: -dtype(tensor).itemsize)  # so that every value lies aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + math.prod(tensor.shape) * dtype(tensor).itemsize
        entry = {"dtype": _DTYPE_NAMES[dtype(tensor).name], "shape": tensor.shape, "data_offsets": [start, end]}
        header[tensor.key] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            array = to_theirs([np.asarray(leaves[path]) for path in tensor.paths], tensor.pattern, tensor.sizes)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
