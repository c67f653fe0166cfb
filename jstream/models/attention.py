"""Grouped-query attention, of packed rows and of the cache: the reference, and the doors to what is faster.

Masks go by position and segment, never by slot order. Scores and softmax are f32. Key-value heads are never repeated in
memory: query heads are grouped by the key-value head they read.
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from jstream.models import kernels
from jstream.models.cache import EMPTY, LIVE, Cache, Int8, Stored, View, compare, group, mix, of_rows, read
from jstream.models.tiled_attention import attend_live, attend_tiled
from jstream.sharding import over_rows_and_heads


def attend(
    q_BTNH: jax.Array,
    k_BKSH: Stored,
    v_BKSH: Stored,
    mask_BTS: jax.Array,
    of_sinks_BTNH: jax.Array | None = None,
    sinks: int = 0,
) -> jax.Array:
    """softmax(q kᵀ / √H) v under a mask.

    Args:
        q_BTNH: queries; N is a multiple of K.
        k_BKSH, v_BKSH: keys and values, as the cache holds them.
        mask_BTS: bool: whether query t may see key s. A row that sees nothing (padding) gives a finite, meaningless
            output.
        of_sinks_BTNH: the queries that the first `sinks` keys are compared with instead, or None.

    Returns:
        [B, T, N, H], in the dtype of the queries.
    """
    q = group(q_BTNH, k_BKSH)
    if of_sinks_BTNH is None:
        scores = compare(q, k_BKSH)
    else:
        first, rest = (
            jax.tree.map(lambda k, part=part: k[:, :, part], k_BKSH) for part in (slice(sinks), slice(sinks, None))
        )
        scores = jnp.concatenate([compare(group(of_sinks_BTNH, first), first), compare(q, rest)], axis=-1)
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    out = mix(jax.nn.softmax(scores, axis=-1), v_BKSH, q_BTNH.dtype)
    return rearrange(out, "b k g t h -> b t (k g) h").astype(q_BTNH.dtype)


def attend_cache(
    q_BTNH: jax.Array,
    positions_BT: jax.Array,
    cache: Cache,
    view: View,
    layer: int,
    of_sinks_BTNH: jax.Array | None,
    implementation: str = "xla",
) -> jax.Array:
    """What the new tokens of a step see of a layer of the cache, themselves included: [B, T, N, H].

    Args:
        positions_BT: int32: where in its stream a token stands, EMPTY for padding.
        of_sinks_BTNH: as in `attend`, for the view's sinks.
        implementation: `xla`, or where `implementation_for_cache` allows it `cudnn` (GPU) or `splash` (TPU).
    """
    count = view.reads if view.reads > 0 else cache.slots
    known_BS = of_rows(cache.positions[:, :count], view.rows)
    kept_BS = (known_BS >= view.oldest[:, None]) | (known_BS < view.sinks)
    mask_BTS = position_mask(positions_BT, known_BS) & kept_BS[:, None]
    keys, values = cache.keys[layer], cache.values[layer]
    if view.reads == LIVE:
        return attend_live(q_BTNH, keys, values, mask_BTS, of_sinks_BTNH, view.sinks, view.rows)
    keys, values = read(keys, view.rows, 0, count), read(values, view.rows, 0, count)
    if implementation == "xla":
        return attend(q_BTNH, keys, values, mask_BTS, of_sinks_BTNH, view.sinks)
    assert of_sinks_BTNH is None and not isinstance(keys, Int8) and not isinstance(values, Int8)
    if implementation == "cudnn":
        return kernels.cudnn_cache(q_BTNH, keys, values, mask_BTS)
    return kernels.splash_cache(q_BTNH, keys, values, mask_BTS, view.start)


def position_mask(
    query_positions_BT: jax.Array,
    key_positions_BS: jax.Array,
    query_segments_BT: jax.Array | None = None,
    key_segments_BS: jax.Array | None = None,
) -> jax.Array:
    """bool [B, T, S]: the key holds a token, is not later than the query, and belongs to the same segment."""
    keys = key_positions_BS[:, None, :]
    mask = (keys != EMPTY) & (keys <= query_positions_BT[:, :, None])
    if query_segments_BT is not None and key_segments_BS is not None:
        mask &= query_segments_BT[:, :, None] == key_segments_BS[:, None, :]
    return mask


def implementation_for(platform: str, head_dim: int, dtype: Any) -> str:
    """The implementation of `attend_packed` for the devices of a platform: its kernel, where that takes such heads."""
    if platform == "tpu" and head_dim % 128 == 0:
        return "splash"
    if platform in ("gpu", "cuda") and jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    return "xla"


FEW = 64  # queries, below which a kernel leaves most of a device idle and the scores are small


def implementation_for_cache(platform: str, head_dim: int, dtype: Any, tokens: int, slots: int) -> str:
    """The same for `attend_cache`, for chunks of so many tokens that read so many slots; on one device."""
    kernel = implementation_for(platform, head_dim, dtype)
    if tokens < FEW or (kernel == "splash" and slots % kernels.LANES):
        return "xla"
    return kernel


def attend_packed(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    implementation: str = "xla",
) -> jax.Array:
    """Self-attention of whole packed rows: a token sees those of its segment up to itself.

    Within a row, tokens of a segment stand in order of position.

    Args:
        positions_BT: int32: position inside the segment, EMPTY for padding.
        segments_BT: int32: which dialogue of the row a token belongs to.
        implementation: `xla`, `cudnn` (GPU) or `splash` (TPU).

    Returns:
        [B, T, N, H]; what stands at padding has no meaning.
    """
    if implementation == "splash":
        return over_rows_and_heads(kernels.splash_packed, q_BTNH, k_BTKH, v_BTKH, segments_BT)
    if implementation == "cudnn":
        mask_BTS = position_mask(positions_BT, positions_BT, segments_BT, segments_BT)
        mask_BTS |= (positions_BT == EMPTY)[:, :, None]  # a row that sees nothing would be 0 / 0
        return kernels.cudnn_packed(q_BTNH, k_BTKH, v_BTKH, mask_BTS)
    if implementation != "xla":
        raise ValueError(f"implementation: expected xla, cudnn or splash, found {implementation!r}")
    segments_BT = jnp.where(positions_BT == EMPTY, EMPTY, segments_BT)
    return over_rows_and_heads(attend_tiled, q_BTNH, k_BTKH, v_BTKH, segments_BT)
