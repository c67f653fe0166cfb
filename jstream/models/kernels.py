"""Attention by the kernels of accelerators: cuDNN's on GPUs, splash on TPUs. `attention` is the door to them.

They never write the scores to memory, which plain XLA does. Of packed rows they also have a backward pass.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from jstream.models.cache import EMPTY, compare, group, mix
from jstream.models.tiled_attention import HIDDEN, finished, take_in

SPLASH_BLOCK = 512  # queries and keys of a tile
LANES = 128  # of a TPU: blocks of queries and keys are multiples of it


def cudnn_packed(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Causal attention of packed rows under a mask that shows every query something."""
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=mask_BTS[:, None], is_causal=True, implementation="cudnn"
    )


def cudnn_cache(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """`attention.attend`, for queries, keys and values in 16 bits."""
    # JAX's public function has heads behind slots only, and would turn the whole cache around at every step
    from jax._src.cudnn.fused_attention_stablehlo import dot_product_attention

    out: Any = dot_product_attention(
        q_BTNH.swapaxes(1, 2),
        k_BKSH,
        v_BKSH,
        mask=mask_BTS[:, None],
        scale=q_BTNH.shape[-1] ** -0.5,
        qkv_layout="BNTH",
    )
    return out.swapaxes(1, 2)


def splash_packed(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, interpret: bool = False
) -> jax.Array:
    """Causal attention within segments, on the rows and heads of one device."""
    # here, as whoever only streams should not wait for Pallas
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    _, length, heads, head_dim = q_BTNH.shape
    whole = -(-length // LANES) * LANES
    pad = lambda x, value=0: jnp.pad(x, ((0, 0), (0, whole - length)) + ((0, 0),) * (x.ndim - 2), constant_values=value)
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


def splash_cache(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    mask_BTS: jax.Array,
    start_B: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """`attention.attend` of chunks that lie in the cache already, each in T slots from `start` on.

    Keys before a chunk are seen by all its queries or by none, which the kernel can tell apart by segments; those of
    the chunk itself are few, and come on top.

    Args:
        k_BKSH, v_BKSH: S is a multiple of LANES.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    _, length, _, _ = q_BTNH.shape
    slots, whole = k_BKSH.shape[2], -(-length // LANES) * LANES
    q = group(q_BTNH, k_BKSH)  # [B, K, G, T, H]
    in_chunk = (jnp.arange(slots) >= start_B[:, None]) & (jnp.arange(slots) < start_B[:, None] + length)
    before = (mask_BTS.any(1) & ~in_chunk).astype(jnp.int32)
    kernel: Any = splash_attention_kernel.make_splash_mqa(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((whole, slots))] * q.shape[2]),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=True,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=math.gcd(whole, SPLASH_BLOCK), block_kv=math.gcd(slots, SPLASH_BLOCK)
        ),
        interpret=interpret,
    )
    ids = lambda seen: splash_attention_kernel.SegmentIds(jnp.ones(whole, jnp.int32), seen)
    of_head = jax.vmap(lambda q, k, v, seen: kernel(q, k, v, ids(seen)), (0, 0, 0, None))
    padded = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, whole - length), (0, 0)))
    out, (log_sum,) = jax.vmap(of_head)(padded, k_BKSH, v_BKSH, before)
    seen = jnp.ones(q.shape[:-1]), jnp.maximum(log_sum[..., :length], HIDDEN), out[..., :length, :].astype(jnp.float32)

    of_chunk = jax.vmap(lambda x, at, axis: jax.lax.dynamic_slice_in_dim(x, at, length, axis), (0, 0, None))
    scores = compare(q, of_chunk(k_BKSH, start_B, 1))
    scores = jnp.where(of_chunk(mask_BTS, start_B, 1)[:, None, None], scores, HIDDEN)
    values = of_chunk(v_BKSH, start_B, 1)
    out, _ = finished(take_in(seen, scores, lambda probs: mix(probs, values, q.dtype)))
    return rearrange(out, "b k g t h -> b t (k g) h").astype(q_BTNH.dtype)
