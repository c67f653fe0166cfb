"""Writes worlds as videos with dialogues.

    python -m jstream.data.world --out=DIR --num_videos=100 --seed=0

makes DIR/videos/000000.mp4 …, DIR/dialogues.jsonl and DIR/world.json. Stopped, it goes on where it was.
"""

import os
import sys

from absl import app, flags

from jstream.data.world import write
from jstream.data.world.scene import WorldConfig

FLAGS = flags.FLAGS
flags.DEFINE_string("out", None, "Folder to write to, made if missing.", required=True)
flags.DEFINE_integer("num_videos", None, "How many videos.", required=True)
flags.DEFINE_integer("seed", 0, "Names the series of videos.")
flags.DEFINE_integer("size", 96, "Side of the frames in pixels, even.")
flags.DEFINE_integer("video_fps", 8, "Frames a second.")
flags.DEFINE_integer("crf", 16, "Constant rate factor of x264: 0 is lossless, 51 the worst.")
flags.DEFINE_integer("min_seconds", WorldConfig.min_seconds, "Shortest video.")
flags.DEFINE_integer("max_seconds", WorldConfig.max_seconds, "Longest video.")
flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes.")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        print(f"error: expected only flags, found {argv[1]!r}", file=sys.stderr)
        return 1
    try:
        summary = write.write_worlds(
            FLAGS.out,
            FLAGS.num_videos,
            seed=FLAGS.seed,
            config=WorldConfig(min_seconds=FLAGS.min_seconds, max_seconds=FLAGS.max_seconds),
            size=FLAGS.size,
            fps=FLAGS.video_fps,
            crf=FLAGS.crf,
            workers=FLAGS.workers,
            progress=True,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    dialogues = sum(summary["dialogues"].values())
    print(f"{FLAGS.out}: {summary['num_videos']} videos, {summary['seconds']} s, {dialogues} dialogues")
    return 0


if __name__ == "__main__":
    app.run(main)
