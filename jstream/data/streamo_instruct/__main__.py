"""Prepares annotations and their videos for training: every video is decoded once.

    python -m jstream.data.streamo_instruct --annotations=FILE --out=FOLDER
    python -m jstream.data.world --out=runs/world --num_videos=4   # to try it
    python -m jstream.data.streamo_instruct --out=runs/prepared \\
        --annotations=runs/world/dialogues.jsonl

This makes FOLDER/streamo_instruct/1.0.0, which `--config.dialogues` takes in place of the annotations. Stopped, it
goes on where it was; videos that cannot be read are listed in `skipped.jsonl` there.
"""

import os

from absl import flags

from jstream import command
from jstream.config import ConfigError
from jstream.data import streamo_instruct

_DEFAULTS = streamo_instruct.Sampling()

_ANNOTATIONS = flags.DEFINE_string("annotations", None, "A .json, .jsonl or .array_record, its videos beside it.")
_OUT = flags.DEFINE_string("out", None, "Folder to write to, made if missing.")
_FPS = flags.DEFINE_float("fps", _DEFAULTS.fps, "Frames a second, where the annotations do not say.")
_MAX_PIXELS = flags.DEFINE_integer("max_pixels", _DEFAULTS.max_pixels, "Of a frame; larger ones are scaled down.")
_QUALITY = flags.DEFINE_integer("quality", _DEFAULTS.quality, "Quality of the JPEG, 1 to 95.")
_MAX_FRAMES = flags.DEFINE_integer("max_frames", _DEFAULTS.max_frames, "Frames of a video, from the first on.")
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes that decode.", lower_bound=1)


def main() -> None:
    if not _ANNOTATIONS.value or not _OUT.value:
        raise ConfigError("expected --annotations=FILE and --out=FOLDER")
    sampling = streamo_instruct.Sampling(_FPS.value, _MAX_PIXELS.value, _QUALITY.value, _MAX_FRAMES.value)
    made = streamo_instruct.prepare(_ANNOTATIONS.value, _OUT.value, sampling, _WORKERS.value)
    print("{folder}: {videos} videos, {annotations} annotations; {skipped} videos skipped".format(**made))


if __name__ == "__main__":
    command.run(main)
