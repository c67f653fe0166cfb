"""Grouped-query attention: the reference under any mask, and whole packed rows by tiles or by kernels of accelerators.

Masks go by position and segment, never by slot order. Scores and softmax are f32. Key-value heads are never repeated in
memory: query heads are grouped by the key-value head they read.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from jstream.models.cache import EMPTY, LIVE, Cache, Stored, View, compare, group, mix, of_rows, read
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
    q_BTNH: jax.Array, positions_BT: jax.Array, cache: Cache, view: View, layer: int, of_sinks_BTNH: jax.Array | None
) -> jax.Array:
    """What the new tokens of a step see of a layer of the cache, themselves included: [B, T, N, H].

    Args:
        positions_BT: int32: where in its stream a token stands, EMPTY for padding.
        of_sinks_BTNH: as in `attend`, for the view's sinks.
    """
    count = view.reads if view.reads > 0 else cache.slots
    known_BS = of_rows(cache.positions[:, :count], view.rows)
    kept_BS = (known_BS >= view.oldest[:, None]) | (known_BS < view.sinks)
    mask_BTS = position_mask(positions_BT, known_BS) & kept_BS[:, None]
    keys, values = cache.keys[layer], cache.values[layer]
    if view.reads == LIVE:
        return attend_live(q_BTNH, keys, values, mask_BTS, of_sinks_BTNH, view.sinks, view.rows)
    keys, values = read(keys, view.rows, 0, count), read(values, view.rows, 0, count)
    return attend(q_BTNH, keys, values, mask_BTS, of_sinks_BTNH, view.sinks)


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
        return over_rows_and_heads(_splash, q_BTNH, k_BTKH, v_BTKH, segments_BT)
    if implementation == "cudnn":
        mask = position_mask(positions_BT, positions_BT, segments_BT, segments_BT)
        mask |= (positions_BT == EMPTY)[:, :, None]  # a row that sees nothing would be 0 / 0
        return jax.nn.dot_product_attention(
            q_BTNH, k_BTKH, v_BTKH, mask=mask[:, None], is_causal=True, implementation="cudnn"
        )
    if implementation != "xla":
        raise ValueError(f"implementation: expected xla, cudnn or splash, found {implementation!r}")
    segments_BT = jnp.where(positions_BT == EMPTY, EMPTY, segments_BT)
    return over_rows_and_heads(attend_tiled, q_BTNH, k_BTKH, v_BTKH, segments_BT)


SPLASH_BLOCK = 512  # queries and keys of a tile


def _splash(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, interpret: bool = False
) -> jax.Array:
    """The splash attention kernel that comes with JAX, on the rows and heads of one device."""
    # here, as whoever only streams should not wait for Pallas
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    _, length, heads, head_dim = q_BTNH.shape
    padding = -length % 128
    whole = length + padding
    pad = lambda x, value=0: jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2), constant_values=value)
    first = lambda x: rearrange(pad(x), "b t n h -> b n t h")
    block = math.gcd(whole, SPLASH_BLOCK)
    kernel: Any = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((whole, whole))] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        interpret=interpret,
    )
    of_row = lambda q, k, v, s: kernel(q, k, v, splash_attention_kernel.SegmentIds(s, s))
    out: jax.Array = jax.vmap(of_row)(
        first(q_BTNH * head_dim**-0.5), first(k_BTKH), first(v_BTKH), pad(segments_BT, EMPTY)
    )
    return rearrange(out, "b n t h -> b t n h")[:, :length].astype(q_BTNH.dtype)
