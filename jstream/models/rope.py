"""Rotary positions: plain (Su et al., 2021) and multimodal (Qwen2-VL: time, height and width turn separate pairs).

Angles and rotations are f32 whatever the model's dtype. `rope_positions` is the one rule by which tokens, text and
frame tokens alike, get their positions; training and the live stream both call it.
"""

import jax
import jax.numpy as jnp
import numpy as np


def rotary_angles(
    rope_positions: jax.Array, head_dim: int, theta: float, mrope_section: tuple[int, ...] = ()
) -> jax.Array:
    """Angles of every pair of head dimensions.

    Args:
        rope_positions: int32 [3, B, T]: time, height and width; all three equal for text and for plain rotary
        positions.
        head_dim: H.
        theta: base of the frequencies.
        mrope_section: pairs turned by each of the three; () uses the first row for all.

    Returns:
        f32 [B, T, H/2].
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if not mrope_section:
        return rope_positions[0].astype(jnp.float32)[..., None] * frequencies
    axis = np.repeat(np.arange(3), mrope_section)  # which of the three turns this pair
    return jnp.moveaxis(rope_positions, 0, -1).astype(jnp.float32)[..., axis] * frequencies


def rotate(x_BTNH: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + H/2) of x [B, T, N, H] by angles [B, T, H/2], the layout of Hugging Face."""
    sin, cos = jnp.sin(angles)[:, :, None, :], jnp.cos(angles)[:, :, None, :]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)


def rope_positions(
    is_frame: np.ndarray, grid: tuple[int, int], multimodal: bool, start: int = 0
) -> tuple[np.ndarray, int]:
    """Positions of a stretch of tokens, on the host.

    Text advances by one. With multimodal positions a frame stands at one time, its tokens at their row and column, and
    what follows starts one past the largest of them (Qwen2-VL, section 2.1); otherwise frame tokens advance like text.

    Args:
        is_frame: bool [T]: whether the token is a frame token; frames come whole, one after another or with text
        between.
        grid: rows and columns of frame tokens of a frame.
        multimodal: Qwen2-VL's rule.
        start: position of the first token.

    Returns:
        int32 [3, T], and the position of the token that comes next.
    """
    if not multimodal:
        row = np.arange(start, start + len(is_frame), dtype=np.int32)
        return np.broadcast_to(row, (3, len(row))), start + len(is_frame)
    rows, columns = grid
    cell = np.stack(np.meshgrid([0], np.arange(rows), np.arange(columns), indexing="ij")).reshape(3, -1)
    positions = np.empty((3, len(is_frame)), np.int32)
    index, position = 0, start
    while index < len(is_frame):
        count = rows * columns if is_frame[index] else 1
        positions[:, index : index + count] = position + (cell if count > 1 else 0)
        position += max(rows, columns) if count > 1 else 1
        index += count
    return positions, position
