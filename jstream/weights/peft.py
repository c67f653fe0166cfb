"""Writes what a run with adapters has learned in the format of PEFT: `adapter_config.json` and
`adapter_model.safetensors`, which PEFT and `jstream.load` open beside the base model."""

import json
import pathlib
import shutil
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from jstream.config import LoraConfig, ModelConfig, QwenVisionConfig
from jstream.models.video_lm import abstract_params
from jstream.weights import hf

_ADAPTER = "lora/"  # of low-rank pairs among what was trained: lora/decoder/layers_0/self_attn/q_proj/a


def write_adapter(
    folder: str | pathlib.Path, config: ModelConfig, trained: Mapping[str, jax.Array], lora: LoraConfig, base: str
) -> None:
    """Writes an adapter's folder, which appears whole or not at all and takes the place of an earlier one.

    Where several processes hold the params, all of them call it.

    Args:
        trained: path → param: low-rank pairs, and params of the model that were trained whole, such as the connector's.
        base: name of the model that the adapter is for.

    Raises:
        CheckpointError: the format has no name for a part of the model that is in it.
    """
    if isinstance(config.vision, QwenVisionConfig):
        families = [hf.FAMILIES["qwen2_5_vl" if config.vision.tower == "qwen2_5" else "qwen3_vl"]]
    else:
        parts = {"vision": hf.FAMILIES["siglip"], "projector": hf.CONNECTOR}
        of = {path.partition("/")[0] for path in trained}  # a part that was not trained may have no published form
        families = [hf.FAMILIES["llama"], *(family for part, family in parts.items() if part in of)]
    leaves = hf.flat(abstract_params(config))
    planned = [tensor for family in families for tensor in hf.plan_of(family, config, leaves).values()]

    tensors: dict[str, np.ndarray] = {}
    whole_modules: dict[str, None] = {}
    for tensor in planned:
        pair = [f"{_ADAPTER}{path.removesuffix('/kernel')}" for path in tensor.paths]
        name = f"base_model.model.{tensor.key}"
        if len(pair) == 1 and f"{pair[0]}/a" in trained:
            for half in "ab":
                matrix = multihost_utils.process_allgather(trained[f"{pair[0]}/{half}"], tiled=True)
                key = name.removesuffix(".weight") + f".lora_{half.upper()}.weight"
                tensors[key] = np.ascontiguousarray(np.asarray(matrix, np.float32).T)
        elif all(path in trained for path in tensor.paths):
            arrays = [np.asarray(multihost_utils.process_allgather(trained[p], tiled=True)) for p in tensor.paths]
            tensors[name] = np.ascontiguousarray(hf.to_theirs(arrays, tensor.pattern, tensor.sizes))
            whole_modules[_module_of(tensor.key)] = None
    if jax.process_index():
        return
    record = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.modules),
        "modules_to_save": list(whole_modules) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder = pathlib.Path(folder).absolute()
    partial, earlier = (folder.with_name(f"{folder.name}.{state}") for state in ("partial", "earlier"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / "adapter_model.safetensors", {"format": "pt"})
    (partial / "adapter_config.json").write_text(json.dumps(record, indent=2) + "\n")
    shutil.rmtree(earlier, ignore_errors=True)
    if folder.exists():
        folder.rename(earlier)
    partial.rename(folder)
    shutil.rmtree(earlier, ignore_errors=True)


def _module_of(key: str) -> str:
    """What `modules_to_save` names for a tensor that was trained whole: `connector`, `merger`, or its own module."""
    parts = key.removesuffix(".weight").removesuffix(".bias").split(".")
    named = [part for part in parts if part in ("connector", "merger")]
    return named[0] if named else ".".join(parts)
