"""How much arithmetic a training step is, and how much a device can do: the two sides of MFU.

Counted are the products of matrices that the model needs, once: what is computed again to save memory, and slots of a
row that hold nothing, do not count (model FLOPs utilisation, arXiv 2204.02311, appendix B).
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
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
    total = 0.0
    for path, products in _products(config, {**trained, **frozen}, tokens, frames):
        if stored_features and path.startswith("vision/"):
            continue
        backward = 1 + (path in trained) if path.startswith(("decoder/", "lora/")) else 2 * (path in trained)
        total += products * (1 + backward)
    return total + 3 * _attention(config, pairs)  # its backward pass is twice the forward one


def forward_flops(
    config: ModelConfig, params: Mapping[str, Any], tokens: float, frames: float, pairs: float, decided: float
) -> float:
    """FLOPs of reading tokens and frames in a live stream.

    Args:
        params: path → array or shape, of what takes part.
        pairs: of a token and one that it sees.
        decided: tokens behind which there are logits.
    """
    total = _attention(config, pairs)
    for path, products in _products(config, params, tokens, frames):
        head = path.startswith(("decoder/lm_head", "decoder/embed_tokens"))
        total += products * (decided / tokens if head else 1)
    return total


def _products(
    config: ModelConfig, params: Mapping[str, Any], tokens: float, frames: float
) -> Iterator[tuple[str, float]]:
    """The kernels, with the FLOPs of what they are multiplied with: 2 a param and position."""
    vision = config.vision
    patches = math.prod(vision.frame_size) / vision.patch_size**2
    merged = patches / vision.merge_size**2 if isinstance(vision, QwenVisionConfig) else vision.tokens_per_frame
    for path, x in params.items():
        size = math.prod(x.shape)
        if path == "decoder/embed_tokens/embedding":  # a product where it is the head as well
            yield path, 2 * tokens * size * config.decoder.tie_embeddings
        elif path.startswith(("decoder/", "lora/")) and path.endswith(("/kernel", "/a", "/b")):
            yield path, 2 * tokens * size
        elif path.startswith(("vision/", "projector/")) and path.endswith("kernel"):
            behind = path.startswith("projector/") or "/merger/" in path or "/deepstack_" in path
            yield path, 2 * frames * (merged if behind else patches) * size


def _attention(config: ModelConfig, pairs: float) -> float:
    return 4 * pairs * config.decoder.num_layers * config.decoder.num_heads * config.decoder.head_dim
