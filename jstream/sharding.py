"""The mesh and its rules: the only place that names mesh axes.

    data     streams, or the rows of a batch
    fsdp     params are cut over it, and gathered where they are used
    tensor   heads and hidden widths are cut over it: one model on several chips

A rule says over which axis each dimension of a param is cut. An axis that a dimension is not divisible by is left out:
that param is whole on each device of the axis, which is always right and only costs memory.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jstream.config import ConfigError, DecoderConfig

AXES = ("data", "fsdp", "tensor")

# Paths in the params → the axis of each dimension. Exactly one rule fits each param. `kv` is `tensor` where whole
# key-value heads lie on a device: half a head on each would have to be put together again at every step.
_LAYER = r"decoder/layers_\d+"
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"decoder/embed_tokens/embedding", ("tensor", "fsdp")),
    (r"decoder/lm_head/kernel", ("fsdp", "tensor")),
    (r"decoder/lm_head/kernel_scale", ("tensor",)),
    (rf"{_LAYER}/self_attn/q_proj/kernel", ("fsdp", "tensor")),
    (rf"{_LAYER}/self_attn/[kv]_proj/kernel", ("fsdp", "kv")),
    (rf"{_LAYER}/self_attn/q_proj/(bias|kernel_scale)", ("tensor",)),
    (rf"{_LAYER}/self_attn/[kv]_proj/(bias|kernel_scale)", ("kv",)),
    (rf"{_LAYER}/mlp/(gate|up)_proj/kernel", ("fsdp", "tensor")),
    (rf"{_LAYER}/mlp/(gate|up)_proj/kernel_scale", ("tensor",)),
    (rf"{_LAYER}/(self_attn/o_proj|mlp/down_proj)/kernel", ("tensor", "fsdp")),
    (rf"{_LAYER}/(self_attn/o_proj|mlp/down_proj)/kernel_scale", ()),
    (r"decoder/(.+/)?\w*norm/scale", ()),
    (r"(vision|projector)/.*kernel", ("fsdp",)),
    (r"(vision|projector)/(?!.*kernel).*", ()),
)


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of so many devices to an axis.

    Args:
        devices: the first of them are taken; by default those of this process.

    Raises:
        ConfigError: there are fewer.
    """
    devices = jax.local_devices() if devices is None else devices
    count = data * fsdp * tensor
    if min(data, fsdp, tensor) < 1 or count > len(devices):
        raise ConfigError(
            f"mesh: expected data × fsdp × tensor between 1 and the {len(devices)} devices here, "
            f"found {data} × {fsdp} × {tensor}"
        )
    return jax.make_mesh((data, fsdp, tensor), AXES, devices=devices[:count], axis_types=(AxisType.Auto,) * len(AXES))


def rules_for(path: str) -> list[tuple[str | None, ...]]:
    """Every rule that fits a param; one, or the table is wrong."""
    return [axes for pattern, axes in RULES if re.fullmatch(pattern, path)]


def param_shardings(config: DecoderConfig, params: Any, mesh: Mesh) -> Any:
    """Where each param lies.

    Args:
        config: of the decoder; says how many key-value heads there are.
        params: tree of arrays or shapes.

    Returns:
        A tree of NamedShardings.

    Raises:
        ConfigError: `tensor` does not divide the heads.
    """

    tensor = mesh.shape["tensor"]
    if config.num_heads % tensor:
        raise ConfigError(f"mesh: expected tensor to divide the {config.num_heads} heads of the model, found {tensor}")

    def place(key: tuple, leaf: Any) -> NamedSharding:
        path = jax.tree_util.keystr(key, simple=True, separator="/")
        (axes,) = rules_for(path)
        return NamedSharding(mesh, _spec(axes, leaf.shape, config, mesh))

    return jax.tree_util.tree_map_with_path(place, params)


def _spec(axes: Sequence[str | None], shape: Sequence[int], config: DecoderConfig, mesh: Mesh) -> PartitionSpec:
    def usable(axis: str | None, size: int) -> str | None:
        if axis == "kv":
            axis = "tensor" if config.num_kv_heads % mesh.shape["tensor"] == 0 else None
        return axis if axis is not None and size % mesh.shape[axis] == 0 else None

    return PartitionSpec(*(usable(axis, size) for axis, size in zip(axes, shape)))


def cache_sharding(config: DecoderConfig, batch: int, mesh: Mesh) -> NamedSharding:
    """Where keys and values [B, S, K, H] lie."""
    return NamedSharding(mesh, _spec(("data", None, "kv"), (batch, 1, config.num_kv_heads), config, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())
