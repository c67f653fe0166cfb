"""Attention tile by tile, in plain XLA (FlashAttention, arXiv 2205.14135): of packed rows, and of live streams.

A tile is a block of queries against a block of keys. Only tiles in which a query may see a key are visited, so work
grows with what there is to see and not with the length of a row or a cache. The scores of a tile fit into the cache of
a CPU core, and no array of all scores is ever whole.

G query heads read one key-value head: queries are [.., K, G, t, H] here, keys and values [.., K, s, H].
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from jstream.models.cache import EMPTY, Stored, compare, group, mix, read

BLOCK = 256  # tokens: of 128, 256 and 512 the fastest on a CPU with 2 MiB of second-level cache a core
HIDDEN = -1e30  # the score of a key that may not be seen

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def attend_live(
    q_BTNH: jax.Array,
    k_BKSH: Stored,
    v_BKSH: Stored,
    mask_BTS: jax.Array,
    of_sinks_BTNH: jax.Array | None = None,
    sinks: int = 0,
    rows: jax.Array | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """`attention.attend`, which reads only those blocks of the cache in which some query sees something. It has no
    gradient.

    Args:
        rows: int32 [B]: whose keys and values these queries see, of more streams; None where there are no others.
        block: slots that are read at a time.
    """
    *_, slots = mask_BTS.shape
    block, q = min(block, slots), group(q_BTNH, k_BKSH)
    seen = _nothing_seen(q)

    def look(seen, q, start, count, mask):
        at = lambda stored: read(stored, rows, start, count)
        mask &= jax.lax.dynamic_slice_in_dim(mask_BTS, start, count, 2)
        # the G queries of a key in one matrix: small products are the faster for it
        together = lambda x: rearrange(x, "b k g t x -> b k 1 (g t) x")
        apart = lambda x: rearrange(x, "b k 1 (g t) x -> b k g t x", t=q.shape[3])
        scores = apart(compare(together(q), at(k_BKSH), queries_first=True))
        scores = jnp.where(mask[:, None, None], scores, HIDDEN)
        return take_in(seen, scores, lambda probs: apart(mix(together(probs), at(v_BKSH), q.dtype)))

    if of_sinks_BTNH is not None:
        seen = look(seen, group(of_sinks_BTNH, k_BKSH), 0, sinks, jnp.ones((1, 1, sinks), bool))
        mask_BTS &= jnp.arange(slots) >= sinks

    blocks = -(-slots // block)
    live = jnp.pad(mask_BTS.any((0, 1)), (0, blocks * block - slots)).reshape(blocks, block).any(-1)
    (places,) = jnp.nonzero(live, size=blocks, fill_value=0)

    def visit(n, seen):
        first = places[n] * block
        start = jnp.minimum(first, slots - block)  # the last block may begin earlier: what was seen is hidden
        return look(seen, q, start, block, (start + jnp.arange(block) >= first)[None, None])

    out, _ = finished(jax.lax.fori_loop(0, live.sum(), visit, seen))
    return rearrange(out, "b k g t h -> b t (k g) h").astype(q_BTNH.dtype)


def attend_tiled(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, block: int = BLOCK
) -> jax.Array:
    """A token sees those of its segment up to itself, in order of their places in the row.

    Args:
        q_BTNH: queries; N is a multiple of K.
        k_BTKH, v_BTKH: keys and values.
        segments_BT: int32: which dialogue of the row a token belongs to, EMPTY for padding.
        block: tokens of a block.

    Returns:
        [B, T, N, H] in the dtype of the queries; zeros at padding.
    """
    length = q_BTNH.shape[1]
    block = min(block, length)
    pad = lambda x, value=0: jnp.pad(
        x, ((0, 0), (0, -length % block)) + ((0, 0),) * (x.ndim - 2), constant_values=value
    )
    q = rearrange(pad(q_BTNH * q_BTNH.shape[-1] ** -0.5), "b (n t) (k g) h -> n b k g t h", t=block, k=k_BTKH.shape[2])
    k, v = (rearrange(pad(x), "b (n t) k h -> n b k t h", t=block) for x in (k_BTKH, v_BTKH))
    segments = rearrange(pad(segments_BT, EMPTY), "b (n t) -> n b t", t=block)
    out = _tiled(q, k, v, segments)
    return rearrange(out, "n b k g t h -> b (n t) (k g) h")[:, :length]


@jax.custom_vjp
def _tiled(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """Blocks come first: queries [n, B, K, G, t, H], keys and values [n, B, K, t, H], segments [n, B, t]."""
    return _forward(q, k, v, segments)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> tuple[jax.Array, Any]:
    """The output, and what the backward pass needs: of the scores only the log of their sum, by query."""

    def visit(i, j, state):
        scores = jnp.where(_sees(segments, i, j), _dot("bkgth,bksh->bkgts", _at(q, i), _at(k, j)), HIDDEN)
        of_values = lambda probs: _dot("bkgts,bksh->bkgth", probs.astype(v.dtype), _at(v, j))
        total, largest, out = state
        seen = take_in((_at(total, i), _at(largest, i), _at(out, i)), scores, of_values)
        return tuple(_put(x, i, block) for x, block in zip(state, seen))

    out, log_sum = finished(_over_tiles(segments, visit, _nothing_seen(q)))
    out = out.astype(q.dtype)
    return out, (q, k, v, segments, out, log_sum)


def _backward(kept: Any, d_out: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, segments, out, log_sum = kept
    by_query = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)

    def visit(i, j, state):
        dq, dk, dv = state
        # keys before queries, as two of the three products at the end sum over queries, which then lie side by side
        scores = _dot("bkgth,bksh->bkgst", _at(q, i), _at(k, j))
        sees = _sees(segments, i, j).swapaxes(-1, -2)
        probs = jnp.where(sees, jnp.exp(scores - _at(log_sum, i)[..., None, :]), 0)
        d_probs = _dot("bkgth,bksh->bkgst", _at(d_out, i), _at(v, j))
        d_scores = (probs * (d_probs - _at(by_query, i)[..., None, :])).astype(q.dtype)
        return (
            _add(dq, i, _dot("bkgst,bksh->bkgth", d_scores, _at(k, j))),
            _add(dk, j, _dot("bkgst,bkgth->bksh", d_scores, _at(q, i))),
            _add(dv, j, _dot("bkgst,bkgth->bksh", probs.astype(v.dtype), _at(d_out, i))),
        )

    grads = _over_tiles(segments, visit, tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)))
    dq, dk, dv = (grad.astype(x.dtype) for grad, x in zip(grads, (q, k, v)))
    return dq, dk, dv, None


_tiled.defvjp(_forward, _backward)


# ---------------------------------------------------------------------------- softmax, keys coming in block after block

Seen = tuple[jax.Array, jax.Array, jax.Array]  # by query: sum of exp(score - largest), largest, sum of these · values


def _nothing_seen(q: jax.Array) -> Seen:
    by_query = jnp.zeros(q.shape[:-1], jnp.float32)
    # above HIDDEN, so that what may not be seen counts as nothing from the start
    return by_query, by_query + HIDDEN / 2, jnp.zeros(q.shape, jnp.float32)


def take_in(seen: Seen, scores: jax.Array, of_values: Callable[[jax.Array], jax.Array]) -> Seen:
    """With the keys of one more block: f32 scores [.., K, G, t, s].

    Args:
        of_values: the sums of its values by probabilities like `scores`.
    """
    total, largest, out = seen
    now = jnp.maximum(largest, scores.max(-1))
    probs, shrink = jnp.exp(scores - now[..., None]), jnp.exp(largest - now)
    return total * shrink + probs.sum(-1), now, out * shrink[..., None] + of_values(probs)


def finished(seen: Seen) -> tuple[jax.Array, jax.Array]:
    """The output, and the log of the sum of exp(score); zeros where a query has seen nothing."""
    total, largest, out = seen
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    return out / total[..., None], largest + jnp.log(total)


# ------------------------------------------------------------------------------------------------ tiles of packed rows


def _over_tiles(segments: jax.Array, visit: Any, state: Any) -> Any:
    """`visit(i, j, state)` for every tile of queries i and keys j that share a segment in some row, keys not behind."""
    blocks = segments.shape[0]
    first = jnp.where(segments == EMPTY, jnp.iinfo(jnp.int32).max, segments).min(-1)
    last = segments.max(-1)  # EMPTY is below every segment
    shared = (first[:, None] <= last) & (first <= last[:, None])  # [n, n, B]: as far as the ends of a range can tell
    wanted = shared.any(-1) & jnp.tri(blocks, dtype=bool)
    queries, keys = jnp.nonzero(wanted, size=blocks * (blocks + 1) // 2, fill_value=0)
    return jax.lax.fori_loop(0, wanted.sum(), lambda n, state: visit(queries[n], keys[n], state), state)


def _sees(segments: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
    """bool [B, 1, 1, t, t]: whether a query of block i may see a key of block j."""
    places = jnp.arange(segments.shape[-1])
    of_queries, of_keys = _at(segments, i)[:, :, None], _at(segments, j)[:, None]
    # a later block of keys is never visited, and an earlier one has no later keys
    sees = (of_queries == of_keys) & (of_keys != EMPTY) & ((places[:, None] >= places) | (j < i))
    return sees[:, None, None]


def _at(blocks: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(blocks, i, 0, keepdims=False)


def _put(blocks: jax.Array, i: jax.Array, block: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(blocks, block, i, 0)


def _add(blocks: jax.Array, i: jax.Array, block: jax.Array) -> jax.Array:
    return _put(blocks, i, _at(blocks, i) + block)
