"""Writes worlds as videos with dialogues.

    python -m jstream.data.world --out=runs/world --num_videos=4 --seed=0

This makes runs/world/videos/000000.mp4 …, runs/world/dialogues.jsonl and runs/world/world.json. Stopped, it goes on
where it was.
"""

import os

from absl import flags

from jstream import command
from jstream.config import ConfigError
from jstream.data.world import write
from jstream.data.world.scene import WorldConfig

_OUT = flags.DEFINE_string("out", None, "Folder to write to, made if missing.")
_NUM_VIDEOS = flags.DEFINE_integer("num_videos", None, "How many videos.")
_SEED = flags.DEFINE_integer("seed", 0, "Names the series of videos.")
_SIZE = flags.DEFINE_integer("size", 96, "Side of the frames in pixels, even.")
_VIDEO_FPS = flags.DEFINE_integer("video_fps", 8, "Frames a second.")
_CRF = flags.DEFINE_integer("crf", 16, "Constant rate factor of x264: 0 is lossless, 51 the worst.")
_MIN_SECONDS = flags.DEFINE_integer("min_seconds", WorldConfig.min_seconds, "Shortest video.")
_MAX_SECONDS = flags.DEFINE_integer("max_seconds", WorldConfig.max_seconds, "Longest video.")
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes.")


def main() -> None:
    if not _OUT.value or _NUM_VIDEOS.value is None:
        raise ConfigError("expected --out=FOLDER and --num_videos=NUMBER, e.g. --out=runs/world --num_videos=100")
    try:
        summary = write.write_worlds(
            _OUT.value,
            _NUM_VIDEOS.value,
            seed=_SEED.value,
            config=WorldConfig(min_seconds=_MIN_SECONDS.value, max_seconds=_MAX_SECONDS.value),
            size=_SIZE.value,
            fps=_VIDEO_FPS.value,
            crf=_CRF.value,
            workers=_WORKERS.value,
            progress=True,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    dialogues = sum(summary["dialogues"].values())
    print(f"{_OUT.value}: {summary['num_videos']} videos, {summary['seconds']} s, {dialogues} dialogues")


if __name__ == "__main__":
    command.run(main)
