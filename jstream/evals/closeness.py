"""How far a changed model is from the one it was made of, on a stream."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jstream.data.frames import fit
from jstream.model import Model
from jstream.models.rope import rope_positions
from jstream.models.video_lm import run, stack_frames
from jstream.protocols.protocol import Turn


@dataclasses.dataclass(frozen=True)
class Closeness:
    """Of the logits of two models at the same positions.

    Attributes:
        error: ‖difference‖ / ‖logits of the first‖.
        same: share of positions with the same most probable token.
        divergence: mean KL divergence of the second from the first, in nats.
        positions: how many.
    """

    error: float
    same: float
    divergence: float
    positions: int

    def __str__(self) -> str:
        return (
            f"logits {100 * self.error:.2f} % off, the same most probable token at {100 * self.same:.1f} % of "
            f"{self.positions} positions, divergence {self.divergence:.2g} nats"
        )


def logits_of(model: Model, images: Sequence[np.ndarray], query: str) -> jax.Array:
    """f32 [T, V]: the logits of a silent stream of images [H, W, 3] with a question at its start, in one forward."""
    turns = [Turn(float(i), i + 1.0, query if i == 0 else None) for i in range(len(images))]
    tokens = model.protocol.render(turns).tokens
    is_frame = tokens == model.protocol.frame_id
    config = model.config
    rope, _ = rope_positions(is_frame, config.vision.token_grid, bool(config.decoder.mrope_section))
    clip = jnp.asarray(np.stack([fit(image, config.vision) for image in images]))[None]
    first = jnp.arange(len(images))[None] == 0

    @jax.jit
    def forward(params):
        pairs = stack_frames(clip, first, config.vision.num_images)
        frame_tokens = run(config, params, pairs[0], method="embed_frames")
        frame_tokens = frame_tokens.reshape(1, -1, frame_tokens.shape[-1])
        embeds = run(config, params, tokens[None], is_frame[None], frame_tokens, method="embed_tokens")
        hidden, _ = run(config, params, embeds, jnp.arange(len(tokens))[None], rope[:, None], method="hidden")
        return run(config, params, hidden, method="logits")[0]

    return forward(model.params)


def compare(model: Model, other: Model, images: Sequence[np.ndarray], query: str) -> Closeness:
    """Compares the logits of a changed model with those of the model it was made of (`logits_of`)."""
    logits, others = (logits_of(m.for_frames(*images[0].shape[:2]), images, query) for m in (model, other))
    error = jnp.linalg.norm(others - logits) / jnp.linalg.norm(logits)
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(others)
    divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1).mean()
    same = jnp.mean(logits.argmax(-1) == others.argmax(-1))
    return Closeness(float(error), float(same), float(divergence), len(logits))
