"""Makes dialogues to train on of the annotations that others made of videos.

    python -m jstream.data.prepare --source=youcook2 --annotations=FILE \\
        --task=narration --task=grounding --videos=FOLDER --out=train.jsonl
    python -m jstream.data.world --out=runs/world --num_videos=4   # to try it
    python -m jstream.data.prepare --source=streamo --out=runs/train.jsonl \\
        --annotations=runs/world/dialogues.jsonl --videos=runs/world

`--config.dialogues=train.jsonl` then trains on them. With --format=array_record the videos are decoded as well, into a
dataset under the folder --out that takes the place of the file. Stopped, it goes on where it was. docs/data.md lists
the sources.
"""

import os

from absl import flags

from jstream import command
from jstream.config import ConfigError
from jstream.data import prepare
from jstream.data.sources import SOURCES

_SOURCE = flags.DEFINE_string("source", None, f"One of {', '.join(SOURCES)}.")
_ANNOTATIONS = flags.DEFINE_string("annotations", None, "Its file.")
_DURATIONS = flags.DEFINE_string("durations", None, "A table of durations, where the source keeps them apart.")
_VIDEOS = flags.DEFINE_string("videos", None, "Folder with the videos, in folders of any depth.")
_TASKS = flags.DEFINE_multi_string("task", [], "What to make of it, such as narration.")
_OUT = flags.DEFINE_string("out", None, "FILE.jsonl, or a folder, made if missing.")
_FORMAT = flags.DEFINE_enum("format", "jsonl", ["jsonl", "array_record"], "Dialogues alone, or with decoded frames.")
_FPS = flags.DEFINE_float("fps", 1.0, "Of array_record: sampled frames a second.")
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "Videos opened or decoded at once.", lower_bound=1)


def main() -> None:
    source, annotations, out = _SOURCE.value, _ANNOTATIONS.value, _OUT.value
    if not source or not annotations or not out:
        raise ConfigError("expected --source=NAME, --annotations=FILE, --task=NAME and --out=FILE.jsonl or a folder")
    fps = _FPS.value if _FORMAT.value == "array_record" else None
    if fps is not None and not _VIDEOS.value:
        raise ConfigError("--format=array_record: expected --videos=FOLDER, found none")
    made, counts = prepare.prepare(
        source, annotations, _TASKS.value, out, _DURATIONS.value, _VIDEOS.value, fps, _WORKERS.value
    )  # fmt: skip
    print(f"{source}: {counts}\n{made}")


if __name__ == "__main__":
    command.run(main)
