"""Grouped-query attention, the reference implementation in plain XLA.

Masks go by position and segment, never by slot order. Scores and softmax are f32. Key-value heads are never repeated in
memory: query heads are grouped by the key-value head they read.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from jstream.models.cache import EMPTY


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
) -> jax.Array:
    """softmax(q kᵀ / √H) v under a mask.

    Args:
        q_BTNH: queries; N is a multiple of K.
        k_BSKH, v_BSKH: keys and values.
        mask_BTS: bool: whether query t may see key s. A row that sees nothing (padding) gives a finite, meaningless
            output.

    Returns:
        [B, T, N, H], in the dtype of the queries.
    """
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    q = rearrange(q_BTNH * q_BTNH.shape[-1] ** -0.5, "b t (k g) h -> b k g t h", g=groups)
    scores = jnp.einsum("bkgth,bskh->bkgts", q, k_BSKH, preferred_element_type=jnp.float32)
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


def attend_causal(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    block: int = 256,
) -> jax.Array:
    """Self-attention of whole packed rows: each block of queries reads only the keys up to its own end.

    Within a row, tokens of a segment stand in order of position, so later blocks hold nothing a query may see: the
    result is that of `attend` under the full mask, for half the work, and no [T, T] array is ever whole.

    Args:
        positions_BT: int32: position inside the segment, EMPTY for padding.
        segments_BT: int32: which dialogue of the row a token belongs to.
        block: queries a block.
    """

    @jax.checkpoint  # the scores of a block are recomputed in the backward pass, not kept
    def one_block(q, k, v, q_pos, k_pos, q_seg, k_seg):
        return attend(q, k, v, position_mask(q_pos, k_pos, q_seg, k_seg))

    length = q_BTNH.shape[1]
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
