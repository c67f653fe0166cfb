"""Annotated videos of others, as clips and as streaming dialogues: the table of sources.

A source reads the files of one dataset into clips (`clip.py`), and tasks make dialogues of them (`tasks.py`). What a
dataset's files look like stands at the top of its file here. `jstream.data.prepare` is the command over all this.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

from jstream.data.sources import (
    activitynet_captions,
    charades_sta,
    coin,
    didemo,
    ego4d_goalstep,
    ego4d_narration,
    epic_kitchens,
    hirest,
    ovo_bench,
    qvhighlights,
    streamingbench,
    streamo,
    subtitles,
    youcook2,
)
from jstream.data.sources.clip import Clip


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset.

    Attributes:
        read: the clips of an annotation file; raises `DialogueError` for one of another format.
        tasks: keys of `tasks.TASKS`: what its annotations are good for.
    """

    read: Callable[[pathlib.Path], Iterator[Clip]]
    tasks: tuple[str, ...]


_EVENTS = "narration", "event_caption", "grounding"
_STEPS = "narration", "event_caption", "action_caption", "grounding"

SOURCES: dict[str, Source] = {
    "activitynet_captions": Source(activitynet_captions.read, _EVENTS),
    "charades_sta": Source(charades_sta.read, ("grounding",)),
    "coin": Source(coin.read, _STEPS),
    "didemo": Source(didemo.read, ("grounding",)),
    "ego4d_goalstep": Source(ego4d_goalstep.read, _STEPS),
    "ego4d_narration": Source(ego4d_narration.read, ("narration",)),
    "epic_kitchens": Source(epic_kitchens.read, _STEPS),
    "hirest": Source(hirest.read, _STEPS),
    "ovo_bench": Source(ovo_bench.read, ("qa", "time_sensitive_qa", "grounding")),
    "qvhighlights": Source(qvhighlights.read, ("grounding",)),
    "streamingbench": Source(streamingbench.read, ("qa", "time_sensitive_qa")),
    "streamo": Source(streamo.read, ("as_published",)),
    "subtitles": Source(subtitles.read, _EVENTS),
    "youcook2": Source(youcook2.read, _STEPS),
}
