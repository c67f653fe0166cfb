"""The KV cache: an explicit pytree that a step takes, donates and returns.

Keys and values are tuples with one array a layer: a stacked cache that is scanned over gets copied (docs/design.md).
Keys are stored rotated at their absolute positions. A slot holds a token only if its `position` is not `EMPTY`, and
masks compare positions, never slots. Where tokens go is said by whoever calls (`View`): the host keeps count of the
slots of every stream, and checks the room first (`require_room`), as `dynamic_update_slice` clamps silently.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jstream.config import DecoderConfig
from jstream.models import rope

EMPTY = -1
LIVE = -1  # for `View.reads`


class CacheFullError(RuntimeError):
    """The stream has outgrown its cache; nothing was overwritten."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What the decoder has seen of B streams.

    Attributes:
        keys, values: a layer each [B, S, K, H]; keys are rotated.
        positions: int32 [B, S]: index in its stream of the token in a slot, or EMPTY.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
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
        oldest: int32 [B]: what stands before is forgotten as well, but for the sinks.
        sink_rope: int32 [3, B, T]: rotary positions of the new tokens as the sinks see them; None where nothing has
            been left out between them and the rest.
        sinks: the first tokens of every stream, which are never forgotten and stand in the first slots.
        reads: slots that are read, from the first one on; 0 for all. Those behind hold nothing that is seen. LIVE finds
            the number while running and goes through it in a loop, which suits CPUs.
    """

    start: jax.Array
    position: jax.Array
    oldest: jax.Array
    sink_rope: jax.Array | None = None
    sinks: int = dataclasses.field(default=0, metadata={"static": True})
    reads: int = dataclasses.field(default=0, metadata={"static": True})


def empty_cache(config: DecoderConfig, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
    """A cache of so many slots for each of `batch` streams."""
    shape = (batch, slots, config.num_kv_heads, config.head_dim)
    return Cache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
        values=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
        positions=jnp.full((batch, slots), EMPTY, jnp.int32),
    )


def require_room(length: int, tokens: int, capacity: int) -> None:
    """Raises CacheFullError unless `tokens` more fit behind `length` used slots."""
    if length + tokens > capacity:
        raise CacheFullError(
            f"the cache holds {capacity} tokens and {length} are used: {tokens} more do not fit; open the stream with "
            "a larger capacity, or with a memory that forgets ('sinks', 'hop', 'reprefill'), or end it here"
        )


def _update(of_streams: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Writes [B, T, …] into [B, S, …] at slot start [B], in place."""
    new = new.astype(of_streams.dtype)
    if len(of_streams) == 1:  # one slice; a batch of them is a scatter
        return jax.lax.dynamic_update_slice(of_streams, new, (0, start[0], *(0,) * (new.ndim - 2)))
    return jax.vmap(lambda x, y, at: jax.lax.dynamic_update_slice_in_dim(x, y, at, axis=0))(of_streams, new, start)


def write(cache: Cache, view: View, layer: int, k_BTKH: jax.Array, v_BTKH: jax.Array) -> Cache:
    """Writes T tokens of one layer into their slots."""
    put = lambda old, new: (*old[:layer], _update(old[layer], new, view.start), *old[layer + 1 :])
    return dataclasses.replace(cache, keys=put(cache.keys, k_BTKH), values=put(cache.values, v_BTKH))


def write_positions(cache: Cache, view: View, positions_BT: jax.Array) -> Cache:
    """Forgets what the view says, and marks the slots of the T new tokens with their positions (EMPTY for padding)."""
    known = cache.positions
    stays = (known < view.position[:, None]) & ((known >= view.oldest[:, None]) | (known < view.sinks))
    return dataclasses.replace(cache, positions=_update(jnp.where(stays, known, EMPTY), positions_BT, view.start))


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
    turn = lambda keys: jnp.concatenate([keys[:, :sinks], rope.rotate(keys[:, sinks:], angles)], axis=1)
    return dataclasses.replace(cache, keys=tuple(map(turn, cache.keys)))
