"""The vision towers of Qwen2.5-VL and Qwen3-VL (transformers' `modeling_qwen2_5_vl.py`, `modeling_qwen3_vl.py`).

A frame of any aspect, resized to whole cells, becomes one token a cell of merge_size × merge_size patches. All frames
of a call have one size, so windows, positions and masks are constants of the compiled program. Patches are kept window
by window, padded to whole windows, from the first layer to the merger: attention inside windows is one batched
attention, and only the tokens that come out are put back row by row.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jstream.config import QwenVisionConfig
from jstream.models.layers import MLP, RMSNorm, SwiGLU
from jstream.models.rope import rotate

THETA = 10_000.0  # base of the rotary frequencies, in both towers


def cell_windows(rows: int, columns: int, window: int) -> np.ndarray:
    """Which cells lie in which window.

    Args:
        rows, columns: cells of a frame.
        window: cells to a side of a window; 0 takes the whole frame as one.

    Returns:
        int32 [W, L]: cells, numbered row by row, in the windows, row by row; −1 where a window reaches past the frame.
    """
    tall, wide = (window, window) if window else (rows, columns)
    cells = np.full((-(-rows // tall) * tall, -(-columns // wide) * wide), -1, np.int32)
    cells[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    return rearrange(cells, "(y tall) (x wide) -> (y x) (tall wide)", tall=tall, wide=wide)


def patch_places(rows: int, columns: int, merge: int) -> np.ndarray:
    """int32 [cells, merge², 2]: row and column of the patches of each cell."""
    places = np.stack(np.meshgrid(np.arange(rows * merge), np.arange(columns * merge), indexing="ij"), -1)
    return rearrange(places, "(r a) (c b) two -> (r c) (a b) two", a=merge, b=merge).astype(np.int32)


def resampling(size: int, grid: int) -> np.ndarray:
    """f32 [grid, size]: linear interpolation of `size` points to `grid` ones, first and last kept in place."""
    matrix = np.zeros((grid, size), np.float32)
    at = np.linspace(0, size - 1, grid, dtype=np.float32)
    low = np.minimum(at.astype(np.int32), size - 1)
    high = np.minimum(low + 1, size - 1)
    part = at - low
    np.add.at(matrix, (np.arange(grid), low), 1 - part)
    np.add.at(matrix, (np.arange(grid), high), part)
    return matrix


class VisionAttention(nn.Module):
    """Attention among the patches of each window."""

    num_heads: int

    @nn.compact
    def __call__(self, x_NPD: jax.Array, angles: jax.Array, valid: jax.Array | None) -> jax.Array:
        """x [N, P, D]; angles f32 [N or 1, P, H/2]; valid bool [N or 1, P], the patches that may be read, or None."""
        width = x_NPD.shape[-1]
        qkv = nn.Dense(3 * width, name="qkv")(x_NPD)
        q, k, v = rearrange(qkv, "n p (three h d) -> three n p h d", three=3, h=self.num_heads)
        mask = None if valid is None else valid[:, None, None, :]
        out = jax.nn.dot_product_attention(rotate(q, angles), rotate(k, angles), v, mask=mask)
        return nn.Dense(width, name="proj")(rearrange(out, "n p h d -> n p (h d)"))


def _norm(config: QwenVisionConfig, name: str) -> nn.Module:
    if config.tower == "qwen2_5":
        return RMSNorm(config.norm_eps, name=name)
    return nn.LayerNorm(config.norm_eps, use_fast_variance=False, name=name)


class VisionBlock(nn.Module):
    config: QwenVisionConfig

    @nn.compact
    def __call__(self, x_NPD: jax.Array, angles: jax.Array, valid: jax.Array | None) -> jax.Array:
        c = self.config
        x_NPD += VisionAttention(c.num_heads, name="attn")(_norm(c, "norm1")(x_NPD), angles, valid)
        h = _norm(c, "norm2")(x_NPD)
        if c.tower == "qwen2_5":
            return x_NPD + SwiGLU(c.mlp_dim, use_bias=True, name="mlp")(h)
        return x_NPD + MLP(c.mlp_dim, c.width, name="mlp")(h)


class PatchMerger(nn.Module):
    """The patches of a cell to one token: norm, then a two-layer perceptron over all of them.

    Attributes:
        norm_merged: whether the norm goes over the whole cell (the deep features of Qwen3-VL) or each patch.
    """

    config: QwenVisionConfig
    norm_merged: bool = False

    @nn.compact
    def __call__(self, x_NPD: jax.Array) -> jax.Array:
        c = self.config
        merge = lambda x: rearrange(x, "n (cells patches) d -> n cells (patches d)", patches=c.merge_size**2)
        norm = _norm(c, "norm")
        x = norm(merge(x_NPD)) if self.norm_merged else merge(norm(x_NPD))
        return MLP(x.shape[-1], c.out_width, approximate=False, name="mlp")(x)


class QwenVision(nn.Module):
    """Frames to frame tokens."""

    config: QwenVisionConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Encodes frames.

        Args:
            images: uint8 [N, frame_height, frame_width, 3].

        Returns:
            [N, M, (1 + deep_layers) · out_width], row by row: the token, then the deep features of its cell.
        """
        c = self.config
        rows, columns = c.token_grid
        cells = cell_windows(rows, columns, c.window_size // c.cell)  # [W, L]
        num_windows = len(cells)
        places = patch_places(rows, columns, c.merge_size)[np.maximum(cells, 0)]  # [W, L, merge², 2]
        windows = rearrange(places, "w l patches two -> w (l patches) two")
        valid = None
        if (cells < 0).any():
            valid = jnp.asarray(np.repeat(cells >= 0, c.merge_size**2, axis=1))  # [W, P]
        half = c.width // c.num_heads // 2  # of a head's dimensions: one for the rows, one for the columns
        frequencies = THETA ** (-np.arange(0, half, 2, dtype=np.float32) / half)
        angles = jnp.asarray(rearrange(windows[..., None] * frequencies, "w p two f -> w p (two f)"))

        x = self._patches(images)[:, windows[..., 0], windows[..., 1]]  # [N, W, P, D]
        if c.num_positions:
            side = math.isqrt(c.num_positions)
            table = self.param("pos_embed", nn.initializers.normal(0.02), (c.num_positions, c.width))
            table = rearrange(table, "(h w) d -> h w d", h=side)
            tall, wide = (resampling(side, n * c.merge_size) for n in (rows, columns))
            positions = jnp.einsum("yh,xw,hwd->yxd", tall, wide, table.astype(jnp.float32))
            x += positions[windows[..., 0], windows[..., 1]].astype(x.dtype)

        # A layer sees windows, or the whole frame as one: [N · W, P, D] or [N, W · P, D].
        inside = jnp.tile(angles, (len(images), 1, 1)), None if valid is None else jnp.tile(valid, (len(images), 1))
        whole = angles.reshape(1, -1, angles.shape[-1]), None if valid is None else valid.reshape(1, -1)
        shape, deep = x.shape, []
        for layer in range(c.num_layers):
            everywhere = num_windows == 1 or layer in c.full_attention_layers
            x = x.reshape((len(images), -1, c.width) if everywhere else (-1, *shape[2:]))
            x = VisionBlock(c, name=f"blocks_{layer}")(x, *(whole if everywhere else inside))
            if layer in c.deep_layers:
                merger = PatchMerger(c, norm_merged=True, name=f"deepstack_{c.deep_layers.index(layer)}")
                deep.append(merger(x.reshape(len(images), -1, c.width)))
        x = PatchMerger(c, name="merger")(x.reshape(len(images), -1, c.width))
        order = np.argsort(cells.ravel(), kind="stable")[np.sum(cells < 0) :]  # where the cells stand, row by row
        return jnp.concatenate([x, *deep], axis=-1)[:, order]

    def _patches(self, images: jax.Array) -> jax.Array:
        """uint8 [N, H, W, 3] → [N, rows, columns, D]: normalised patches through the patch embedding.

        A frame stands for all images that a patch sees, so their kernels act as their sum.
        """
        c = self.config
        shape = (3, c.temporal_patch_size, c.patch_size**2, c.width)
        kernel = self.param("patch_embed_kernel", nn.initializers.lecun_normal(), (math.prod(shape[:3]), c.width))
        mean, std = (np.asarray(values, np.float32) for values in (c.image_mean, c.image_std))
        x = (images.astype(jnp.float32) / 255.0 - mean) / std
        x = rearrange(x, "n (h p) (w q) c -> n h w (c p q)", p=c.patch_size, q=c.patch_size).astype(kernel.dtype)
        x = x @ kernel.reshape(shape).sum(1).reshape(-1, c.width)
        if c.tower == "qwen3":
            x += self.param("patch_embed_bias", nn.initializers.zeros, (c.width,))
        return x
