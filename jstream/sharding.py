"""The mesh and its rules: the only place that names mesh axes.

    data     streams, or the rows of a batch
    fsdp     params are cut over it, and gathered where they are used
    tensor   heads and hidden widths are cut over it: one model on several chips

A rule says over which axis each dimension of a param is cut. An axis that a dimension is not divisible by is left out:
that param is whole on each device of the axis, which is always right and only costs memory.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jstream.config import ConfigError, DecoderConfig, MeshConfig

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the rows of a training batch are spread over both

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
    (r"auxiliary/.*", ()),
)
_ADAPTER = re.compile(r"lora/(.+)/([ab])")


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


def training_mesh(sizes: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a training run.

    Args:
        sizes: devices to each axis, one of them perhaps −1.
        devices: all of them are used; by default those of all processes.

    Raises:
        ConfigError: they cannot be.
    """
    devices = jax.devices() if devices is None else devices
    given = [getattr(sizes, axis) for axis in AXES]
    rest, odd = divmod(len(devices), math.prod(size for size in given if size > 0))
    if odd or (-1 not in given and rest != 1):
        raise ConfigError(
            f"mesh: expected data × fsdp × tensor to be the {len(devices)} devices here, "
            f"found {' × '.join(map(str, given))}"
        )
    return make_mesh(*(rest if size == -1 else size for size in given), devices=devices)


def rules_for(path: str) -> list[tuple[str | None, ...]]:
    """Every rule that fits a param; one, or the table is wrong.

    The two matrices of an adapter lie as the rows and the columns of the kernel they stand beside.
    """
    adapter = _ADAPTER.fullmatch(path)
    fitting = [axes for pattern, axes in RULES if re.fullmatch(pattern, f"{adapter[1]}/kernel" if adapter else path)]
    if adapter:
        return [(axes[0], None) if adapter[2] == "a" else (None, axes[1]) for axes in fitting]
    return fitting


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
    """Where keys and values [B, K, S, H] lie."""
    return NamedSharding(mesh, _spec(("data", "kv"), (batch, config.num_kv_heads), config, mesh))


def placed(tree: Any, places: Any) -> Any:
    """The shapes of a tree of arrays or shapes, each with its sharding from a tree of them."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def optimizer_shardings(opt_state: Any, trained: Mapping[str, Any], config: DecoderConfig, mesh: Mesh) -> Any:
    """Where an optimizer's state lies: what belongs to a param lies as it does, the rest on every device.

    Args:
        opt_state: tree of arrays or shapes, in which dicts of the params' paths occur.
        trained: path → array or shape.
    """

    def place(key: tuple, leaf: Any) -> NamedSharding:
        for part in reversed(key):
            path = str(getattr(part, "key", ""))
            if path in trained and leaf.ndim == trained[path].ndim:
                (axes,) = rules_for(path)
                return NamedSharding(mesh, _spec(axes, leaf.shape, config, mesh))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, opt_state)


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Where the rows of a batch lie."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def own_rows(mesh: Mesh, rows: int) -> list[int]:
    """Which rows of a batch lie on devices of this process."""
    places = rows_sharding(mesh).addressable_devices_indices_map((rows,))
    return sorted({row for (piece,) in places.values() for row in range(*piece.indices(rows))})  # type: ignore[misc]


def keep_rows(x: jax.Array) -> jax.Array:
    """Keeps the rows of an activation [B, …] where those of the batch lie; does nothing where no mesh is set.

    Without it the partitioner may cut hidden states as the kernels are cut, and add up partial products instead of
    gathering params.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS))


def gather_rows(table: jax.Array) -> jax.Array:
    """An embedding table [V, D] as rows are looked up in it: D whole on every device, as other params are used."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return table
    tensor = "tensor" if table.shape[0] % mesh.shape["tensor"] == 0 else None
    return jax.lax.with_sharding_constraint(table, PartitionSpec(tensor, None))


def over_rows_and_heads(
    attend: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array
) -> jax.Array:
    """Attention by a kernel that the partitioner cannot look into: on each device, its rows and its heads.

    Args:
        attend: of q [B, T, N, H], k and v [B, S, K, H] and segments [B, T].
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return attend(q, k, v, segments)
    rows = ROWS if q.shape[0] % math.prod(mesh.shape[axis] for axis in ROWS) == 0 else None
    heads = "tensor" if k.shape[2] % mesh.shape["tensor"] == 0 else None  # whole groups of query heads only
    cut = PartitionSpec(rows, None, heads)
    mapped = jax.shard_map(attend, in_specs=(cut, cut, cut, PartitionSpec(rows)), out_specs=cut, check_vma=False)
    return mapped(q, k, v, segments)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())
