"""Grouped-query attention: the reference in plain XLA, and kernels of the accelerators for whole packed rows.

Masks go by position and segment, never by slot order. Scores and softmax are f32. Key-value heads are never repeated in
memory: query heads are grouped by the key-value head they read.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from jstream.models.cache import EMPTY
from jstream.sharding import over_rows_and_heads


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    of_sinks_BTNH: jax.Array | None = None,
    sinks: int = 0,
) -> jax.Array:
    """softmax(q kᵀ / √H) v under a mask.

    Args:
        q_BTNH: queries; N is a multiple of K.
        k_BSKH, v_BSKH: keys and values.
        mask_BTS: bool: whether query t may see key s. A row that sees nothing (padding) gives a finite, meaningless
            output.
        of_sinks_BTNH: the queries that the first `sinks` keys are compared with instead, or None.

    Returns:
        [B, T, N, H], in the dtype of the queries.
    """
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    group = lambda q: rearrange(q * q.shape[-1] ** -0.5, "b t (k g) h -> b k g t h", g=groups)
    compare = lambda q, k: jnp.einsum("bkgth,bskh->bkgts", group(q), k, preferred_element_type=jnp.float32)
    if of_sinks_BTNH is None:
        scores = compare(q_BTNH, k_BSKH)
    else:
        near, far = compare(q_BTNH, k_BSKH[:, sinks:]), compare(of_sinks_BTNH, k_BSKH[:, :sinks])
        scores = jnp.concatenate([far, near], axis=-1)
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", probs, v_BSKH)
    return rearrange(out, "b t k g h -> b t (k g) h").astype(q_BTNH.dtype)


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
    return attend_causal(q_BTNH, k_BTKH, v_BTKH, positions_BT, segments_BT)


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


UNROLLED = 16  # blocks of queries that are laid out one by one, so that each reads no more keys than it needs


def attend_causal(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    block: int = 256,
) -> jax.Array:
    """`attend_packed` in plain XLA: the result of `attend` under the full mask, with no [T, T] array ever whole.

    Up to UNROLLED blocks of queries each read the keys up to their own end, which is half the work; in longer rows each
    block reads all keys, in a loop, so that the program stays small.

    Args:
        block: queries a block.
    """

    @jax.checkpoint  # the scores of a block are recomputed in the backward pass, not kept
    def one_block(q, k, v, q_pos, k_pos, q_seg, k_seg):
        return attend(q, k, v, position_mask(q_pos, k_pos, q_seg, k_seg))

    length = q_BTNH.shape[1]
    if length > UNROLLED * block:
        blocks = -(-length // block)
        pad = lambda x, value=0: jnp.pad(
            x, ((0, 0), (0, blocks * block - length)) + ((0, 0),) * (x.ndim - 2), constant_values=value
        )
        split = lambda x: rearrange(x, "b (n t) ... -> n b t ...", n=blocks)
        queries = split(pad(q_BTNH)), split(pad(positions_BT, EMPTY)), split(pad(segments_BT, EMPTY))
        over = lambda part: one_block(part[0], k_BTKH, v_BTKH, part[1], positions_BT, part[2], segments_BT)
        return rearrange(jax.lax.map(over, queries), "n b t ... -> b (n t) ...")[:, :length]
    outs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        outs.append(
            one_block(
                q_BTNH[:, start:end], k_BTKH[:, :end], v_BTKH[:, :end],
                positions_BT[:, start:end], positions_BT[:, :end],
                segments_BT[:, start:end], segments_BT[:, :end],
            )
        )  # fmt: skip
    return jnp.concatenate(outs, axis=1)
