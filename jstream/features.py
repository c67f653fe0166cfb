"""Computes what a frozen vision tower makes of videos, once: training then runs no tower and decodes no video.

    python -m jstream.features --config=configs/videollm_online.py \\
        --annotations=FILE --out=FOLDER
    python -m jstream.data.world --out=runs/world --num_videos=4   # to try it
    python -m jstream.features --config=configs/tiny.py \\
        --config.weights.checkpoint=jstream/assets/tiny \\
        --annotations=runs/world/dialogues.jsonl --out=runs/features

This makes FOLDER/vision_features/1.0.0, which `--config.dialogues` takes in place of the annotations, with the same
config. FILE may also be a folder of `jstream.data.streamo_instruct`. Stopped, it goes on where it was; videos that
cannot be read are listed in `skipped.jsonl` there.
"""

import os

import jax.numpy as jnp
from absl import flags

from jstream import command
from jstream.config import ConfigError
from jstream.data import vision_features
from jstream.data.features import DTYPES
from jstream.data.prepared import MAX_FRAMES
from jstream.data.vision_features import VisionFeatures
from jstream.training.features import make_encoder
from jstream.weights.fingerprint import fingerprint
from jstream.weights.hf import flat
from jstream.weights.published import starting_tower

_ANNOTATIONS = flags.DEFINE_string("annotations", None, "A file, its videos beside it, or a prepared folder.")
_OUT = flags.DEFINE_string("out", None, "Folder to write to, made if missing.")
_BATCH = flags.DEFINE_integer("batch", 32, "Frames that the tower sees at a time.", lower_bound=1)
_MAX_FRAMES = flags.DEFINE_integer("max_frames", MAX_FRAMES, "Frames of a video, from the first on.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", list(DTYPES), "Of the features.")
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "Threads that decode.", lower_bound=1)


def main() -> None:
    config = command.given_config()
    if config is None or not _ANNOTATIONS.value or not _OUT.value:
        raise ConfigError("expected --config=FILE, --annotations=FILE and --out=FOLDER")
    tower = starting_tower(config)
    if tower is None:
        raise ConfigError("weights: expected a model whose tower runs, found none; set --config.weights.checkpoint")
    builder = VisionFeatures(
        _ANNOTATIONS.value,
        _OUT.value,
        config.model.vision,
        make_encoder(config, tower, _BATCH.value, jnp.dtype(_DTYPE.value)),
        fingerprint({f"vision/{path}": x for path, x in flat(tower).items()}),
        config.fps,
        _MAX_FRAMES.value,
        _DTYPE.value,
        _WORKERS.value,
    )
    made = vision_features.prepare(builder)
    print("{folder}: {videos} videos, {annotations} annotations; {skipped} videos skipped".format(**made))


if __name__ == "__main__":
    command.run(main)
