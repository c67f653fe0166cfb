"""The video language model: vision tower, projector and decoder joined, as pure functions of params.

A frame's tokens take the places of the placeholder tokens that the protocol rendered for it. Training calls
`embed_frames`, `embed_tokens` and the decoder over packed rows; the live stream calls the same three over one chunk and
a cache. `embed_frames` is `encode` (the vision tower) and `project` (what is trained behind it): where the tower stays
as it is, what `encode` gives can be kept and the rest called alone.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jstream.config import ModelConfig, QwenVisionConfig
from jstream.models.cache import Cache, View
from jstream.models.decoder import Decoder
from jstream.models.projector import Projector
from jstream.models.qwen_vision import QwenVision
from jstream.models.siglip import Siglip


class VideoLM(nn.Module):
    """The joined model; `remat` and `attention` as in `Decoder`."""

    config: ModelConfig
    remat: str = "none"
    attention: str = "xla"

    def setup(self):
        vision = self.config.vision
        if isinstance(vision, QwenVisionConfig):
            self.vision = QwenVision(vision)
            self.projector = lambda x: x  # its merger is one
        else:
            self.vision = Siglip(vision)
            num_positions = vision.tokens_per_frame if vision.token_positions else 0
            self.projector = Projector(self.config.decoder.width, num_positions)
        self.decoder = Decoder(self.config.decoder, self.remat, self.attention)

    def embed_frames(self, images: jax.Array) -> jax.Array:
        """uint8 [N, H, W, 3 · num_images] → frame tokens [N, M, E].

        E is D, or with deep layers (1 + deep_layers) · D: the token, then what is added to it behind the first layers.
        """
        return self.project(self.encode(images))

    def encode(self, images: jax.Array) -> jax.Array:
        """uint8 [N, H, W, 3 · num_images] → features [N, M, feature_width]: all that is under `vision/` in the params.

        That is SigLIP's output before the projector, and Qwen's behind its mergers.
        """
        return self.vision(images)

    def project(self, features: jax.Array) -> jax.Array:
        """Features [N, M, feature_width] → frame tokens [N, M, E]."""
        return self.projector(features)

    def embed_text(self, tokens_BT: jax.Array) -> jax.Array:
        """int32 [B, T] → [B, T, E]; nothing is added to text behind the first layers."""
        embeds = self.decoder.embed(tokens_BT)
        return jnp.pad(embeds, ((0, 0), (0, 0), (0, self.config.decoder.deep_layers * embeds.shape[-1])))

    def embed_tokens(self, tokens_BT: jax.Array, is_frame_BT: jax.Array, frame_tokens: jax.Array) -> jax.Array:
        """Embeds text and puts frame tokens in their places.

        Args:
            tokens_BT: int32; the id at a placeholder does not matter.
            is_frame_BT: bool: the placeholders; the i-th one of a row takes the i-th frame token of that row.
            frame_tokens: [B, I, E].

        Returns:
            [B, T, E].
        """
        index_BT = jnp.clip(jnp.cumsum(is_frame_BT, axis=1) - 1, 0, frame_tokens.shape[1] - 1)
        placed = jnp.take_along_axis(frame_tokens, index_BT[..., None], axis=1)
        embeds = self.embed_text(jnp.where(is_frame_BT, 0, tokens_BT))  # a placeholder may lie past the vocabulary
        return jnp.where(is_frame_BT[..., None], placed, embeds)

    def hidden(
        self,
        embeds_BTD: jax.Array,
        positions_BT: jax.Array,
        rope_positions: jax.Array,
        segments_BT: jax.Array | None = None,
        cache: Cache | None = None,
        view: View | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """See `Decoder.__call__`."""
        return self.decoder(embeds_BTD, positions_BT, rope_positions, segments_BT, cache, view)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return self.decoder.logits(hidden)

    def __call__(self, images: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        """Logits of one whole text with no cache; used to make params, which need every module to run once."""
        frame_tokens = self.embed_frames(images)
        frame_tokens = frame_tokens.reshape(1, -1, frame_tokens.shape[-1])
        is_frame = jnp.zeros(tokens_BT.shape, bool)
        positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        embeds = self.embed_tokens(tokens_BT, is_frame, frame_tokens)
        return self.logits(self.hidden(embeds, positions, jnp.broadcast_to(positions, (3, *positions.shape)))[0])


def run(
    config: ModelConfig, params: Any, *arguments: Any, method: str, remat: str = "none", attention: str = "xla"
) -> Any:
    """A method of `VideoLM` as a pure function of params; see there for arguments and results."""
    return VideoLM(config, remat, attention).apply({"params": params}, *arguments, method=method)


def init_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh params: a nested dict of f32 arrays."""
    images = jnp.zeros((1, *config.vision.frame_size, 3 * config.vision.num_images), jnp.uint8)
    return dict(VideoLM(config).init(key, images, jnp.zeros((1, 1), jnp.int32))["params"])


def abstract_params(config: ModelConfig, dtype: jnp.dtype = jnp.float32) -> dict[str, Any]:
    """The shapes and dtypes of the params, without making them."""
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, param_dtype(leaf, dtype)), params)


def param_dtype(leaf: Any, dtype: Any) -> Any:
    """The dtype of a param in a model of this dtype: int8 kernels stay what they are."""
    return leaf.dtype if jnp.issubdtype(leaf.dtype, jnp.integer) else jnp.dtype(dtype)


def stack_frames(frames: jax.Array, first: jax.Array, num_images: int) -> jax.Array:
    """Gives every frame the one before it, where patches see two.

    Args:
        frames: uint8 [B, F, H, W, 3].
        first: bool [B, F]: frames that open a stream; they are their own predecessor.

    Returns:
        uint8 [B, F, H, W, 3 · num_images].
    """
    if num_images == 1:
        return frames
    before = jnp.roll(frames, 1, axis=1)
    before = jnp.where(first[:, :, None, None, None], frames, before)
    return jnp.concatenate([before, frames], axis=-1)
