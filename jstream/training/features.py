"""Vision features that are computed once: the tower as a function of a video, and what a run may use them for.

What no stage trains gives the same for a frame at every step. `jstream.features` keeps it, and a run that reads it has
to have the same tower, frozen in every stage.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jstream.config import ConfigError, TrainConfig, VisionConfig
from jstream.data.features import Encode, stored_features
from jstream.data.frames import clip_of
from jstream.models.video_lm import param_dtype, run
from jstream.sharding import make_mesh, replicated, rows_sharding
from jstream.training.step import frozen_in
from jstream.weights.fingerprint import fingerprint
from jstream.weights.hf import flat


def make_encoder(config: TrainConfig, tower: Mapping[str, Any], batch: int, dtype: Any = jnp.bfloat16) -> Encode:
    """The vision tower as training runs it, over the frames of one video after the other, on all devices here.

    Args:
        tower: its params, nested.
        batch: frames that it sees at a time; more where they could not be dealt out to the devices.
        dtype: of the features.
    """
    mesh = make_mesh(data=jax.local_device_count())
    at_once = -(-batch // mesh.size) * mesh.size
    computed = jax.tree.map(lambda x: x.astype(param_dtype(x, config.compute_dtype)), tower)
    params = jax.device_put({"vision": computed}, replicated(mesh))
    see = jax.jit(lambda params, images: run(config.model, params, images, method="encode").astype(dtype))

    def encode(frames: Iterator[np.ndarray]) -> np.ndarray:
        made, under_way = [], None  # what the device is at while the next batch is read
        images = _clips(frames, config.model.vision)
        while taken := list(itertools.islice(images, at_once)):
            whole = np.zeros((at_once, *taken[0].shape), np.uint8)
            whole[: len(taken)] = taken
            features = see(params, jax.device_put(whole, rows_sharding(mesh)))
            if under_way is not None:
                made.append(np.asarray(under_way))
            under_way, used = features, len(taken)
        return np.concatenate([*made, np.asarray(under_way)[:used]])

    return encode


def _clips(frames: Iterator[np.ndarray], vision: VisionConfig) -> Iterator[np.ndarray]:
    """The clip of every frame of a video."""
    before = None
    for frame in frames:
        yield clip_of(frame, before, vision)
        before = frame


def check_stored_features(config: TrainConfig, params: Any) -> None:
    """Checks that what a run reads in place of frames is what it would make of them.

    Args:
        params: of the model that it starts from, nested; None where it starts from fresh ones.

    Raises:
        ConfigError: its tower is another one, or is trained; or frames would be sampled at another rate.
    """
    paths = [path for path in (config.dialogues, config.validation_dialogues) if path]
    found = [stored for stored in map(stored_features, paths) if stored is not None]
    if not found:
        return
    if params is None:
        raise ConfigError(
            f"{found[0].path}: expected features of the run's tower, found that it starts from a fresh one; set "
            "--config.weights.checkpoint to the model that made them"
        )
    tower = {f"vision/{path}": x for path, x in flat(params["vision"]).items()}
    own = fingerprint(tower)
    for stored in found:
        stored.check(config.model.vision, config.fps)
        if stored.tower != own:
            raise ConfigError(
                f"{stored.path}: expected features of the run's tower {own[:12]}, found those of {stored.tower[:12]}; "
                "compute them anew, or start from the model that made them"
            )
    for number, stage in enumerate(config.stages):
        trained = [path for path in tower if not frozen_in(stage, path)]
        if trained:
            raise ConfigError(
                f"stages[{number}].freeze: expected vision/.* to be frozen, as {found[0].path} holds what it gave, "
                f"found that {trained[0]} is trained; freeze it, or train from frames"
            )
