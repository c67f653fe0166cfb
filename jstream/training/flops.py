"""How much arithmetic a training step is, and how much a device can do: the two sides of MFU.

Counted are the products of matrices that the model needs, once: what is computed again to save memory, and slots of a
row that hold nothing, do not count (model FLOPs utilisation, arXiv 2204.02311, appendix B).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jstream.config import ModelConfig, QwenVisionConfig


@dataclasses.dataclass(frozen=True)
class Work:
    """What a batch holds, without its empty slots.

    Attributes:
        tokens, frames: that are learned from.
        pairs: of a token and itself or one before it in the same dialogue: what attention is about.
    """

    tokens: int
    frames: int
    pairs: int

    @classmethod
    def of(cls, batch: Mapping[str, np.ndarray]) -> "Work":
        """Counts rows as `data.rows` lays them; padding stands at position −1."""
        positions = np.asarray(batch["positions"], np.int64)
        return cls(int(np.sum(positions >= 0)), int(np.sum(batch["decisions"] >= 0)), int(np.sum(positions + 1)))


def step_flops(
    config: ModelConfig,
    trained: Mapping[str, Any],
    frozen: Mapping[str, Any],
    tokens: float,
    frames: float,
    pairs: float,
    stored_features: bool = False,
) -> float:
    """FLOPs of a training step.

    A product with a kernel costs 2 FLOPs a param and position forward, 2 for the gradient of its input, and 2 for that
    of the kernel where it is trained. What is frozen in the vision tower has no backward pass: nothing before it does.

    Args:
        trained, frozen: path → array or shape.
        tokens, frames: that the step learns from, without empty slots.
        pairs: of a token and itself or one before it in the same dialogue: what attention is about.
        stored_features: the vision tower does not run, as what it makes of the frames is read.
    """
    decoder, vision = config.decoder, config.vision
    patches = math.prod(vision.frame_size) / vision.patch_size**2
    merged = patches / vision.merge_size**2 if isinstance(vision, QwenVisionConfig) else vision.tokens_per_frame
    total = 0.0
    for path, x in {**trained, **frozen}.items():
        if stored_features and path.startswith("vision/"):
            continue
        size, learned = math.prod(x.shape), path in trained
        if path == "decoder/embed_tokens/embedding":  # a product where it is the head as well
            total += tokens * size * (4 + 2 * learned) * decoder.tie_embeddings
        elif path.startswith(("decoder/", "lora/")) and path.endswith(("/kernel", "/a", "/b")):
            total += tokens * size * (4 + 2 * learned)
        elif path.startswith(("vision/", "projector/")) and path.endswith("kernel"):
            behind = path.startswith("projector/") or "/merger/" in path or "/deepstack_" in path
            total += frames * (merged if behind else patches) * size * (6 if learned else 2)
    attention = 4 * pairs * decoder.num_layers * decoder.num_heads * decoder.head_dim
    return total + 3 * attention  # its backward pass is twice the forward one
