"""The KV cache: an explicit pytree that a step takes, donates and returns.

Keys and values are tuples with one array a layer: a stacked cache that is scanned over gets copied (docs/design.md).
Keys are stored rotated at their absolute positions. A slot holds a token only if its `position` is not `EMPTY`, and
masks compare positions, never slots. `dynamic_update_slice` clamps silently at the end, so whoever advances a cache
checks `capacity` on the host first (`require_room`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jstream.config import DecoderConfig

EMPTY = -1


class CacheFullError(RuntimeError):
    """The stream has outgrown its cache; nothing was overwritten."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What the decoder has seen.

    Attributes:
        keys, values: a layer each [B, S, K, H]; keys are rotated.
        positions: int32 [B, S]: index in the stream of the token in a slot, or EMPTY.
        length: int32 []: slots in use; the next token goes there.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    positions: jax.Array
    length: jax.Array

    @property
    def capacity(self) -> int:
        return self.positions.shape[1]


def empty_cache(config: DecoderConfig, batch: int, capacity: int, dtype: jnp.dtype = jnp.float32) -> Cache:
    """A cache of `capacity` slots for each of `batch` streams."""
    shape = (batch, capacity, config.num_kv_heads, config.head_dim)
    return Cache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
        values=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
        positions=jnp.full((batch, capacity), EMPTY, jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def require_room(length: int, tokens: int, capacity: int) -> None:
    """Raises CacheFullError unless `tokens` more slots (padding included) fit behind `length` used ones."""
    if length + tokens > capacity:
        raise CacheFullError(
            f"the cache holds {capacity} tokens and {length} are used: {tokens} more do not fit; "
            "open the stream with a larger capacity, or with a memory that forgets ('reprefill'), or end it here"
        )


@functools.partial(jax.jit, donate_argnums=0)
def rewind(cache: Cache, length: jax.Array) -> Cache:
    """Forgets the tokens behind the first `length` (int32 []); nothing is copied. The cache is donated."""
    slots = jnp.arange(cache.capacity, dtype=jnp.int32)
    return dataclasses.replace(cache, positions=jnp.where(slots < length, cache.positions, EMPTY), length=length)


def write(cache: Cache, layer: int, k_BTKH: jax.Array, v_BTKH: jax.Array) -> Cache:
    """Writes T tokens of one layer into the slots from `length` on; does not advance."""
    start = (0, cache.length, 0, 0)
    keys = jax.lax.dynamic_update_slice(cache.keys[layer], k_BTKH.astype(cache.keys[layer].dtype), start)
    values = jax.lax.dynamic_update_slice(cache.values[layer], v_BTKH.astype(cache.values[layer].dtype), start)
    return dataclasses.replace(
        cache,
        keys=cache.keys[:layer] + (keys,) + cache.keys[layer + 1 :],
        values=cache.values[:layer] + (values,) + cache.values[layer + 1 :],
    )


def write_positions(cache: Cache, positions_BT: jax.Array) -> Cache:
    """Marks the T slots from `length` on with their positions (EMPTY for padding); does not advance."""
    positions = jax.lax.dynamic_update_slice(cache.positions, positions_BT, (0, cache.length))
    return dataclasses.replace(cache, positions=positions)


def advance(cache: Cache, tokens: jax.Array) -> Cache:
    """Counts `tokens` (int32 []) slots as used; the padding written behind them will be overwritten."""
    return dataclasses.replace(cache, length=cache.length + tokens)
