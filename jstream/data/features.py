"""What a vision tower made of frames, as it is kept in files, and whether it is what a run would make of them.

A frame's features are [M, feature_width] numbers, one after the other. A dataset of them (`data.vision_features` writes
it) says which tower they come from, and how the frames were sampled.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from jstream.config import ConfigError, VisionConfig, to_dict
from jstream.data.annotations import prepared_settings
from jstream.data.dialogue import DialogueError

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
# The frames of one video in order, each uint8 [H, W, 3], to their features [F, M, feature_width].
Encode = Callable[[Iterator[np.ndarray]], np.ndarray]

_NOT_OF_THE_TOWER = ("token_positions", "min_pixels", "max_pixels")  # what features do not depend on


def tower_settings(vision: VisionConfig) -> dict[str, Any]:
    """What features depend on in the config of a model, as JSON gives it back."""
    settings = json.loads(json.dumps(to_dict(vision)))
    return {name: value for name, value in settings.items() if name not in _NOT_OF_THE_TOWER}


@dataclasses.dataclass(frozen=True)
class StoredFeatures:
    """What a dataset says of the features in it.

    Attributes:
        path: as it was given.
        fps: sampled frames a second, where the annotations do not say.
        dtype: of the numbers.
        vision: the tower's config (`tower_settings`).
        tower: what tells its params from others (`weights.fingerprint`).
    """

    path: str
    fps: float
    dtype: np.dtype
    vision: dict[str, Any]
    tower: str

    def check(self, vision: VisionConfig, fps: float) -> None:
        """Checks that a run would sample the same frames, and show them to a tower of the same shape.

        Raises:
            ConfigError: names the first setting that differs.
        """
        if self.fps != fps:
            raise ConfigError(
                f"{self.path}: expected features at {fps:g} frames a second, found {self.fps:g}; set "
                f"--config.fps={self.fps:g}, or compute them anew"
            )
        wanted = tower_settings(vision)
        for name in {**wanted, **self.vision}:
            if wanted.get(name) != self.vision.get(name):
                raise ConfigError(
                    f"{self.path}: expected features of a tower with vision.{name} = {wanted.get(name)}, found "
                    f"{self.vision.get(name)}; compute them anew, with the config of the run"
                )


def stored_features(path: str | pathlib.Path) -> StoredFeatures | None:
    """What a dataset says of the features in it; None for annotations without.

    Raises:
        DialogueError: what it says cannot be read.
    """
    settings = prepared_settings(path)
    if "tower" not in settings:
        return None
    try:
        dtype, vision = DTYPES[settings["dtype"]], dict(settings["vision"])
        return StoredFeatures(str(path), float(settings["fps"]), dtype, vision, str(settings["tower"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DialogueError(f"{path}: expected what says of which tower the features are, found: {error!r}") from None


def to_bytes(features: np.ndarray) -> list[bytes]:
    """[F, M, feature_width] as it is kept, frame by frame."""
    return [frame.tobytes() for frame in features]


def from_bytes(frames: Sequence[bytes], vision: VisionConfig, dtype: np.dtype) -> np.ndarray:
    """The inverse.

    Raises:
        ValueError: where there is none, or one has another size; one line.
    """
    if not frames:
        raise ValueError("expected features of frames, found none")
    shape = (vision.tokens_per_frame, vision.feature_width)
    wanted = shape[0] * shape[1] * dtype.itemsize
    for frame in frames:
        if len(frame) != wanted:
            raise ValueError(f"expected features of {wanted} bytes a frame, found {len(frame)}")
    return np.frombuffer(b"".join(frames), dtype).reshape(-1, *shape)
