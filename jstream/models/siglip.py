"""The SigLIP vision transformer (Zhai et al., 2023; big_vision's `models/vit.py`) and its frame tokens.

As in VideoLLM-online, a frame is the attention-pooled token (where wanted) followed by the patch tokens averaged to a
small grid, row by row. Two choices serve models trained from scratch: convolutions before the patches, and patches that
see the frame before as well.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jstream.config import SiglipConfig
from jstream.models.layers import MLP


class EncoderAttention(nn.Module):
    """Full multi-head attention with biases. `queries` [B, T, D] read `x` [B, S, D]."""

    num_heads: int

    @nn.compact
    def __call__(self, queries: jax.Array, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        heads = lambda y: rearrange(y, "b t (n h) -> b t n h", n=self.num_heads)
        q = heads(nn.Dense(width, name="q_proj")(queries))
        k = heads(nn.Dense(width, name="k_proj")(x))
        v = heads(nn.Dense(width, name="v_proj")(x))
        out = jax.nn.dot_product_attention(q, k, v)
        return nn.Dense(width, name="out_proj")(rearrange(out, "b t n h -> b t (n h)"))


class EncoderLayer(nn.Module):
    config: SiglipConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        h = nn.LayerNorm(c.norm_eps, name="layer_norm1")(x)
        x = x + EncoderAttention(c.num_heads, name="self_attn")(h, h)
        h = nn.LayerNorm(c.norm_eps, name="layer_norm2")(x)
        return x + MLP(c.mlp_dim, c.width, name="mlp")(h)


class PoolingHead(nn.Module):
    """SigLIP's multi-head attention pooling: a learned probe reads all patches."""

    config: SiglipConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, c.width))
        probe = jnp.broadcast_to(probe, (x.shape[0], 1, c.width)).astype(x.dtype)
        h = EncoderAttention(c.num_heads, name="attention")(probe, x)
        return h + MLP(c.mlp_dim, c.width, name="mlp")(nn.LayerNorm(c.norm_eps, name="layernorm")(h))


STEM_CELL = 4  # pixels


def _cells(x: jax.Array, size: int) -> jax.Array:
    """Gathers size × size neighbours into channels: a convolution without overlap is a product of these."""
    return rearrange(x, "n (h p) (w q) c -> n h w (p q c)", p=size, q=size)


def pooling_matrix(size: int, grid: int) -> np.ndarray:
    """f32 [grid, size]: adaptive average pooling of `size` cells to `grid`, with torch's windows.

    Window i covers the cells from floor(i · size / grid) up to ceil((i + 1) · size / grid).
    """
    matrix = np.zeros((grid, size), np.float32)
    for i in range(grid):
        start, end = i * size // grid, -(-(i + 1) * size // grid)
        matrix[i, start:end] = 1.0 / (end - start)
    return matrix


class Siglip(nn.Module):
    """Frames to frame features."""

    config: SiglipConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Encodes frames.

        Args:
            images: uint8 [N, image_size, image_size, 3 · temporal_patch_size]; the newest frame's channels come last.

        Returns:
            [N, M, width].
        """
        c = self.config
        side = c.image_size // c.patch_size
        positions = self.param("position_embedding", nn.initializers.normal(0.02), (side * side, c.width))
        x = (images.astype(jnp.float32) / 127.5 - 1.0).astype(positions.dtype)  # SigLIP: mean = std = 0.5
        if c.stem_width:
            x = nn.gelu(nn.Dense(c.stem_width, name="stem_cells")(_cells(x, STEM_CELL)))
            x = nn.gelu(nn.Conv(c.stem_width, (3, 3), name="stem_conv")(x))
        x = nn.Dense(c.width, name="patch_embedding")(_cells(x, c.patch_size // (STEM_CELL if c.stem_width else 1)))
        x = rearrange(x, "n h w d -> n (h w) d") + positions
        for i in range(c.num_layers):
            x = EncoderLayer(c, name=f"layers_{i}")(x)
        x = nn.LayerNorm(c.norm_eps, name="post_layernorm")(x)
        pool = pooling_matrix(side, c.grid).astype(x.dtype)
        patches = rearrange(x, "n (h w) d -> n h w d", h=side)
        tokens = rearrange(jnp.einsum("gh,kw,nhwd->ngkd", pool, pool, patches), "n g k d -> n (g k) d")
        if c.pooled_token:
            tokens = jnp.concatenate([PoolingHead(c, name="head")(x), tokens], axis=1)
        return tokens
