"""Rotary positions: plain (Su et al., 2021) and multimodal (Qwen2-VL: time, height and width turn separate pairs).

Angles and rotations are f32 whatever the model's dtype. `rope_positions` is the one rule by which tokens, text and
frame tokens alike, get their positions; training and the live stream both call it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def rotary_angles(
    rope_positions: jax.Array,
    head_dim: int,
    theta: float,
    mrope_section: tuple[int, ...] = (),
    interleaved: bool = False,
) -> jax.Array:
    """Angles of every pair of head dimensions.

    Args:
        rope_positions: int32 [3, B, T]: time, height and width; all three equal for text and for plain rotary
            positions.
        head_dim: H.
        theta: base of the frequencies.
        mrope_section: pairs turned by each of the three; () uses the first row for all.
        interleaved: height and width take every third pair from the fastest on, until each has its number
            (Qwen3-VL); else time, height and width have a stretch each (Qwen2-VL).

    Returns:
        f32 [B, T, H/2].
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if not mrope_section:
        return rope_positions[0].astype(jnp.float32)[..., None] * frequencies
    axis = np.repeat(np.arange(3), mrope_section)  # which of the three turns this pair
    if interleaved:
        axis = np.zeros(head_dim // 2, np.int32)
        for spatial in (1, 2):
            axis[spatial : 3 * mrope_section[spatial] : 3] = spatial
    return jnp.moveaxis(rope_positions, 0, -1).astype(jnp.float32)[..., axis] * frequencies


def rotate(x_BTNH: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + H/2) of x [B, T, N, H] by angles [B, T, H/2], the layout of Hugging Face."""
    sin, cos = jnp.sin(angles)[:, :, None, :], jnp.cos(angles)[:, :, None, :]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)


def rope_positions(
    is_frame: Any, grid: tuple[int, int], multimodal: bool, start: int = 0, xp: Any = np
) -> tuple[Any, Any]:
    """Positions of a stretch of tokens: the one rule for training and for the live stream.

    Text advances by one. With multimodal positions a frame stands at one time, its tokens at their row and column, and
    what follows starts one past the largest of them (Qwen2-VL, section 2.1); otherwise frame tokens advance like text.

    Args:
        is_frame: bool [..., T]: whether the token is a frame token; frames come whole, in a row or with text between.
        grid: rows and columns of frame tokens of a frame.
        multimodal: Qwen2-VL's rule.
        start: position of the first token.
        xp: numpy, or jax.numpy inside a compiled function.

    Returns:
        int32 [3, ..., T], and the position of the token that comes next, int32 [...].
    """
    rows, columns = grid
    is_frame = xp.asarray(is_frame)
    cell = (xp.cumsum(is_frame, axis=-1) - 1) % (rows * columns)  # which token of its frame it is
    if multimodal:
        advance = xp.where(is_frame, xp.where(cell == rows * columns - 1, max(grid), 0), 1)
    else:
        advance = xp.ones(is_frame.shape, np.int32)
    after = start + xp.cumsum(advance, axis=-1)
    time = after - advance
    inside = is_frame if multimodal else xp.zeros_like(is_frame)
    positions = xp.stack([time, time + inside * (cell // columns), time + inside * (cell % columns)])
    return positions.astype(np.int32), after[..., -1] if is_frame.shape[-1] else xp.asarray(start)


def packed_rope_positions(
    is_frame_BT: jax.Array, positions_BT: jax.Array, grid: tuple[int, int], multimodal: bool
) -> jax.Array:
    """`rope_positions` of packed rows: int32 [3, B, T], starting at 0 with every dialogue of a row.

    Args:
        positions_BT: int32: index inside the dialogue.
    """
    if not multimodal:
        return jnp.broadcast_to(positions_BT, (3, *positions_BT.shape))
    through, _ = rope_positions(is_frame_BT, grid, multimodal, xp=jnp)
    starts = jnp.where(positions_BT == 0, through[0], 0)  # times never fall, so the largest start is the latest
    return through - jax.lax.cummax(starts, axis=1)
