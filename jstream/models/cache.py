"""The KV cache: an explicit pytree that a step takes, donates and returns.

Keys and values are tuples with one array a layer: a stacked cache that is scanned over gets copied (docs/design.md).
Keys are stored rotated at their absolute positions, in the dtype of the params or in int8 (`Int8`), which only `write`,
`compare`, `mix` and `rebase` know of. A slot holds a token only if its `position` is not `EMPTY`, and masks compare
positions, never slots. Where tokens go is said by whoever calls (`View`): the host keeps count of the
slots of every stream, and checks the room first (`require_room`), as `dynamic_update_slice` clamps silently.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from jstream.config import DecoderConfig
from jstream.errors import UserError
from jstream.models import rope

EMPTY = -1
LIVE = -1  # for `View.reads`
_TURNED = 512  # slots that `rebase` turns at a time


class CacheFullError(UserError, RuntimeError):
    """The stream has outgrown its cache; nothing was overwritten."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """Keys or values in about half the bytes of bfloat16: whole numbers, with a scale for each token and head.

    Attributes:
        values: int8 [B, K, S, H].
        scales: f32 [B, K, S].
    """

    values: jax.Array
    scales: jax.Array


Stored = jax.Array | Int8


def to_int8(x: jax.Array) -> Int8:
    """Rounds to whole numbers from −127 to 127, of which the largest magnitude of each token and head becomes one."""
    x = x.astype(jnp.float32)
    scales = jnp.maximum(jnp.abs(x).max(-1), jnp.finfo(jnp.float32).tiny) / 127
    return Int8(jnp.round(x / scales[..., None]).astype(jnp.int8), scales)


def group(q_BTNH: jax.Array, keys: Stored) -> jax.Array:
    """Queries, scaled by 1 / √H, by the key-value head that they read: [B, K, G, T, H]."""
    kv_heads = jax.tree.leaves(keys)[0].shape[1]
    return rearrange(q_BTNH * q_BTNH.shape[-1] ** -0.5, "b t (k g) h -> b k g t h", k=kv_heads)


def compare(q_BKGTH: jax.Array, keys: Stored, queries_first: bool = False) -> jax.Array:
    """The products of queries, as `group` makes them, with keys [B, K, S, H]: f32 [B, K, G, T, S].

    Args:
        queries_first: whether queries stand on the left, which suits CPUs. A GPU would turn keys on the right around
            first, all of them.
    """

    def dot(k: jax.Array) -> jax.Array:
        if queries_first:
            return jnp.einsum("bkgth,bksh->bkgts", q_BKGTH, k, preferred_element_type=jnp.float32)
        products = jnp.einsum("bksh,bkgth->bksgt", k, q_BKGTH, preferred_element_type=jnp.float32)
        return jnp.moveaxis(products, 2, -1)

    if not isinstance(keys, Int8):
        return dot(keys)
    return dot(keys.values.astype(q_BKGTH.dtype)) * keys.scales[:, :, None, None]


def mix(probs_BKGTS: jax.Array, values: Stored, dtype: Any) -> jax.Array:
    """The sums of values [B, K, S, H] by their probabilities: f32 [B, K, G, T, H].

    Args:
        dtype: in which they are multiplied.
    """
    if isinstance(values, Int8):
        probs_BKGTS = probs_BKGTS * values.scales[:, :, None, None]
        values = values.values
    return jnp.einsum(
        "bkgts,bksh->bkgth", probs_BKGTS.astype(dtype), values.astype(dtype), preferred_element_type=jnp.float32
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What the decoder has seen of B streams.

    Attributes:
        keys, values: a layer each [B, K, S, H]; keys are rotated. Heads come first, as products over them would make
            a GPU turn the whole cache around at every step otherwise.
        positions: int32 [B, S]: index in its stream of the token in a slot, or EMPTY.
    """

    keys: tuple[Stored, ...]
    values: tuple[Stored, ...]
    positions: jax.Array

    @property
    def slots(self) -> int:
        return self.positions.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """Where the T new tokens of a step go, and what they see, for each of B streams.

    Attributes:
        start: int32 [B]: the slot of the first one. The T slots from there on, padding included, hold nothing that is
            still needed.
        position: int32 [B]: its index in the stream. What stood there or behind is forgotten, so that a stream goes
            back by saying so.
        oldest: int32 [B]: what stands before is not seen, but for the sinks.
        rows: int32 [B]: which streams of the cache these are, each at most once; None where they are all, in order.
        sink_rope: int32 [3, B, T]: rotary positions of the new tokens as the sinks see them; None where nothing has
            been left out between them and the rest.
        sinks: the first tokens of every stream, which are never forgotten and stand in the first slots.
        reads: slots that are read, from the first one on; 0 for all. Those behind hold nothing that is seen. LIVE finds
            the number while running and goes through it in a loop, which suits CPUs.
    """

    start: jax.Array
    position: jax.Array
    oldest: jax.Array
    rows: jax.Array | None = None
    sink_rope: jax.Array | None = None
    sinks: int = dataclasses.field(default=0, metadata={"static": True})
    reads: int = dataclasses.field(default=0, metadata={"static": True})


def empty_cache(config: DecoderConfig, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
    """A cache of so many slots for each of `batch` streams; in int8 where that is the dtype."""
    shape = (batch, config.num_kv_heads, slots, config.head_dim)
    nothing = lambda: to_int8(jnp.zeros(shape)) if dtype == jnp.int8 else jnp.zeros(shape, dtype)
    return Cache(
        keys=tuple(nothing() for _ in range(config.num_layers)),
        values=tuple(nothing() for _ in range(config.num_layers)),
        positions=jnp.full((batch, slots), EMPTY, jnp.int32),
    )


def require_room(length: int, tokens: int, capacity: int) -> None:
    """Raises CacheFullError unless `tokens` more fit behind `length` used slots."""
    if length + tokens > capacity:
        raise CacheFullError(
            f"the cache holds {capacity} tokens and {length} are used: {tokens} more do not fit; open the stream with "
            "a larger capacity, or with a memory that forgets ('sinks', 'hop', 'reprefill'), or end it here"
        )


def _update(of_streams: jax.Array, new: jax.Array, view: View, axis: int) -> jax.Array:
    """Writes T tokens of the view's streams over their slots, which lie along an axis, in place."""
    new = new.astype(of_streams.dtype)
    if view.rows is None and len(new) > 1:  # one scatter
        put = lambda x, y, at: jax.lax.dynamic_update_slice_in_dim(x, y, at, axis - 1)
        return jax.vmap(put)(of_streams, new, view.start)
    for index in range(len(new)):
        at: list[Any] = [0] * of_streams.ndim
        at[0] = 0 if view.rows is None else view.rows[index]
        at[axis] = view.start[index]
        of_streams = jax.lax.dynamic_update_slice(of_streams, new[index : index + 1], at)
    return of_streams


def write(cache: Cache, view: View, layer: int, k_BTKH: jax.Array, v_BTKH: jax.Array) -> Cache:
    """Writes T tokens of one layer into their slots."""

    def put(old: tuple[Stored, ...], new: jax.Array) -> tuple[Stored, ...]:
        update = lambda whole, part: _update(whole, part, view, axis=2)
        new = new.swapaxes(1, 2)  # [B, K, T, H]
        stored = to_int8(new) if isinstance(old[layer], Int8) else new
        return *old[:layer], jax.tree.map(update, old[layer], stored), *old[layer + 1 :]

    return dataclasses.replace(cache, keys=put(cache.keys, k_BTKH), values=put(cache.values, v_BTKH))


def write_positions(cache: Cache, view: View, positions_BT: jax.Array) -> Cache:
    """Forgets what the view goes back behind, and marks the slots of the T new tokens with their positions (EMPTY for
    padding)."""
    known = of_rows(cache.positions, view.rows)
    known = jnp.where(known < view.position[:, None], known, EMPTY)
    if view.rows is not None:
        known = cache.positions.at[view.rows].set(known, unique_indices=True)
    return dataclasses.replace(cache, positions=_update(known, positions_BT, view, axis=1))


def of_rows(of_streams: jax.Array, rows: jax.Array | None) -> jax.Array:
    """Those of some streams, [rows, …]."""
    return of_streams if rows is None else of_streams[rows]


def read(stored: Stored, rows: jax.Array | None, start: Any, count: int) -> Stored:
    """Keys or values [rows, K, count, H] of a stretch of slots, of some streams or of all."""

    def part(x: jax.Array) -> jax.Array:
        if rows is None:
            return jax.lax.dynamic_slice_in_dim(x, start, count, 2)
        size = (1, x.shape[1], count, *x.shape[3:])
        place = lambda row: (row, 0, start, *[0] * (x.ndim - 3))
        return jnp.concatenate([jax.lax.dynamic_slice(x, place(rows[i]), size) for i in range(len(rows))])

    return jax.tree.map(part, stored)


def rebase(config: DecoderConfig, cache: Cache, sinks: int, distance: jax.Array) -> Cache:
    """Turns keys back, so that rotary positions stay small: f32 angles err by 1e-3 at 64k and 0.04 at a million.

    Done once in tens of thousands of positions; keys that are turned at every eviction would wear out.

    Args:
        sinks: the first slots, which stay as they are.
        distance: int32 [B]: rotary positions that each stream goes back by.
    """
    steps = jnp.broadcast_to(-distance[:, None], (3, len(distance), 1))
    angles = rope.rotary_angles(
        steps, config.head_dim, config.rope_theta, config.mrope_section, config.mrope_interleaved
    )

    block = math.gcd(cache.slots, _TURNED)

    def turn(n: jax.Array, keys: Stored) -> Stored:
        old = read(keys, None, n * block, block)
        if isinstance(old, Int8):
            new = to_int8(rope.rotate(old.values * old.scales[..., None], angles))
        else:
            new = rope.rotate(old, angles)
        moves = n * block + jnp.arange(block) >= sinks
        put = lambda whole, old, new: jax.lax.dynamic_update_slice_in_dim(
            whole, jnp.where(moves.reshape(-1, *[1] * (old.ndim - 3)), new, old), n * block, 2
        )
        return jax.tree.map(put, keys, old, new)

    # a stretch at a time, or there would be room for all keys twice
    over = lambda keys: jax.lax.fori_loop(0, cache.slots // block, turn, keys)
    return dataclasses.replace(cache, keys=tuple(map(over, cache.keys)))
