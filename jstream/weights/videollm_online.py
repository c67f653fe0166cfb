"""VideoLLM-online from its published parts: Llama 3, SigLIP's vision tower, and the adapter that joins them.

The adapter is PEFT's (low-rank updates of Llama's linear layers, and the connector whole). The updates are merged while
the weights are read, so what comes out is a plain model.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jstream.config import ModelConfig
from jstream.models.video_lm import abstract_params
from jstream.weights import hf
from jstream.weights.checkpoint import CheckpointError
from jstream.weights.hf_config import decoder_config, family_of, read_json, siglip_config

# What an adapter_config.json can ask for beside plain low-rank updates of one rank.
_UNSUPPORTED = (
    "use_dora",
    "use_rslora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
)
_BLOCK_ROWS = 1024  # of a weight, merged at a time


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A linear layer's weight [out, in] with its update merged in f32: W + scale · B A (Hu et al., 2021).

    Attributes:
        a, b: [r, in] and [out, r].
        dtype: of the merged weight.
    """

    weight: hf.Stored
    a: hf.Stored
    b: hf.Stored
    scale: float
    dtype: Any

    def read(self) -> np.ndarray:
        merged = np.empty(self.weight.shape, self.dtype)
        a = self.a.read().astype(np.float32) * np.float32(self.scale)
        for start in range(0, len(merged), _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, len(merged))
            update = self.b.rows(start, stop).astype(np.float32) @ a
            merged[start:stop] = self.weight.rows(start, stop).astype(np.float32) + update
        return merged


def parts_config(llm_folder: pathlib.Path, vision_folder: pathlib.Path, grid: int = 3) -> ModelConfig:
    """The model that the two parts make; see `load_videollm_online`."""
    records = {folder: read_json(folder / "config.json") for folder in (llm_folder, vision_folder)}
    for folder, expected in ((llm_folder, "llama"), (vision_folder, "siglip")):
        if (family := family_of(records[folder], folder / "config.json")) != expected:
            raise CheckpointError(f"{folder}: expected a {expected} model, found {family}")
    return ModelConfig(
        siglip_config(records[vision_folder], vision_folder / "config.json", grid),
        decoder_config(records[llm_folder], llm_folder / "config.json"),
    )


def load_videollm_online(
    llm_folder: str | pathlib.Path,
    vision_folder: str | pathlib.Path,
    adapter_folder: str | pathlib.Path | None,
    dtype: Any = jnp.bfloat16,
    shardings: Any = None,
    grid: int = 3,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Loads the three parts as one model.

    The added `<v>` token has no row in the embedding and needs none: frame tokens stand in its places.

    Args:
        llm_folder: Llama 3, with `config.json` and safetensors.
        vision_folder: SigLIP; of a whole model the text tower is passed over.
        adapter_folder: `adapter_config.json` and `adapter_model.safetensors`; None leaves the connector out, to be
            trained.
        dtype, shardings: as in `hf.load_params`.
        grid: beside its pooled token a frame has grid × grid averages: 3 for v1+, 0 for v1.

    Returns:
        The config and the params.

    Raises:
        CheckpointError: as `hf.load_params`; no adapter, one of another kind or of another base, half a low-rank pair.
    """
    llm_folder, vision_folder = map(pathlib.Path, (llm_folder, vision_folder))
    config = parts_config(llm_folder, vision_folder, grid)
    leaves = hf.flat(abstract_params(config))
    llama, siglip = hf.FAMILIES["llama"], hf.FAMILIES["siglip"]
    llm_plan, vision_plan, connector_plan = (
        hf.plan_of(family, config, leaves) for family in (llama, siglip, hf.CONNECTOR)
    )
    vision = hf.match(vision_folder, siglip, vision_plan, hf.open_stored(vision_folder, "model"))
    llm = hf.match(llm_folder, llama, llm_plan, hf.open_stored(llm_folder, "model"))
    params: dict[str, jax.Array] = {}
    hf.fill(params, vision_plan, vision, dtype, shardings)
    if adapter_folder is None:
        hf.fill(params, llm_plan, llm, dtype, shardings)
        return config, hf.unflat(params)
    adapter = _open_adapter(pathlib.Path(adapter_folder))
    # PEFT also saves a head that it adapts: then that one is adapted, in place of the base's
    saved = {key: llm_plan[key] for key in map(llama.row_key, adapter.whole) if key in llm_plan}
    whole = hf.match(adapter.folder, hf.CONNECTOR, connector_plan | saved, adapter.whole)
    llm |= {key: whole[key] for key in saved}
    adapted = adapter.adapt(llm_plan, llm, dtype)

    hf.fill(params, llm_plan, {**llm, **adapted}, dtype, shardings)
    hf.fill(params, connector_plan, {key: whole[key] for key in connector_plan}, dtype, shardings)
    return config, hf.unflat(params)


def load_siglip(
    folder: pathlib.Path, config: ModelConfig, dtype: Any = jnp.bfloat16, grid: int = 3
) -> tuple[ModelConfig, dict[str, Any]]:
    """SigLIP's vision tower alone.

    Args:
        folder: with `config.json` and safetensors; of a whole model the text tower is passed over.
        config: of a model, whose vision tower it takes the place of.
        dtype: as in `hf.load_params`.

    Returns:
        The config with this tower, and the params `{"vision": …}`.

    Raises:
        CheckpointError: as `hf.load_params`.
    """
    record = read_json(folder / "config.json")
    if (family := family_of(record, folder / "config.json")) != "siglip":
        raise CheckpointError(f"{folder}: expected a siglip model, found {family}")
    config = dataclasses.replace(config, vision=siglip_config(record, folder / "config.json", grid))
    plan = hf.plan_of(hf.FAMILIES["siglip"], config)
    params: dict[str, jax.Array] = {}
    found = hf.match(folder, hf.FAMILIES["siglip"], plan, hf.open_stored(folder, "model"))
    hf.fill(params, plan, found, dtype, None)
    return config, hf.unflat(params)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An open adapter.

    Attributes:
        base: the name of the model it was trained on, as it gives it.
        rank: r.
        scale: alpha / r.
        updates: Llama's key of a linear layer's weight → {"A": …, "B": …}.
        whole: tensors that replace or add one, by Llama's key or the connector's.
    """

    folder: pathlib.Path
    base: str
    rank: int
    scale: float
    updates: Mapping[str, Mapping[str, hf.Stored]]
    whole: Mapping[str, hf.Stored]

    def adapt(self, plan: Mapping[str, hf.Tensor], base: Mapping[str, hf.Stored], dtype: Any) -> dict[str, Adapted]:
        """Pairs the updates with the weights that they are for.

        Raises:
            CheckpointError: half a pair, an update of another shape, or one for what is no linear layer of the base.
        """
        adapted = {}
        for name, pair in self.updates.items():
            key = hf.FAMILIES["llama"].row_key(name)
            if key not in plan or plan[key].pattern != hf.LINEAR:
                raise CheckpointError(f"{self.folder}: expected updates of the base's linear layers, found {name}")
            if len(pair) < 2:
                raise CheckpointError(f"{self.folder}: {name}: expected lora_A and lora_B, found lora_{''.join(pair)}")
            out, width = plan[key].shape
            for half, expected in (("A", (self.rank, width)), ("B", (out, self.rank))):
                if pair[half].shape != expected:
                    raise CheckpointError(
                        f"{self.folder}: {name}: expected lora_{half} {list(expected)} for this base, found "
                        f"{list(pair[half].shape)}; the adapter was trained on {self.base}"
                    )
            adapted[key] = Adapted(base[key], pair["A"], pair["B"], self.scale, dtype)
        return adapted


def _open_adapter(folder: pathlib.Path) -> Adapter:
    path = folder / "adapter_config.json"
    record = read_json(path)
    if record.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type: expected LORA, found {record.get('peft_type')!r}")
    asked = [f"{key} = {record[key]!r}" for key in _UNSUPPORTED if record.get(key)]
    asked += [f"bias = {record['bias']!r}"] if record.get("bias", "none") != "none" else []
    if asked:
        raise CheckpointError(f"{path}: expected plain low-rank updates, found {', '.join(asked)}: not supported")
    rank, alpha = record.get("r"), record.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"{path}: expected r ≥ 1 and lora_alpha, found {rank!r} and {alpha!r}")
    updates: dict[str, dict[str, hf.Stored]] = {}
    whole: dict[str, hf.Stored] = {}
    for key, tensor in hf.open_stored(folder, "adapter_model").items():
        # PEFT's wrappers stand between the names of the base
        name = re.sub(r"\.(base_layer|modules_to_save|default)(?=\.)", "", key.removeprefix("base_model.model."))
        if half := re.fullmatch(r"(.*)\.lora_([AB])\.weight", name):
            updates.setdefault(f"{half[1]}.weight", {})[half[2]] = tensor
        elif name in whole:
            raise CheckpointError(f"{folder}: {key} and {whole[name].key} are the same tensor, expected one of them")
        else:
            whole[name] = tensor
    return Adapter(folder, str(record.get("base_model_name_or_path")), rank, alpha / rank, updates, whole)
