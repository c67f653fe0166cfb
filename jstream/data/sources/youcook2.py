"""YouCook2: the steps of recipes, as published (Zhou et al. 2018) or in the manner of ActivityNet Captions.

{"database": {"GLd3aX16zBg": {"duration": 241.62, "annotations": [{"segment": [90, 102], "sentence": "…"}, …]}, …}}
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from jstream.data.sources import activitynet_captions
from jstream.data.sources.clip import Clip, Event
from jstream.data.sources.files import expected, field, read_json, seconds, span, text


def read(path: pathlib.Path) -> Iterator[Clip]:
    content = read_json(path, dict)
    if "database" in content:
        yield from database(content, path, "annotations", "sentence")
    else:
        yield from activitynet_captions.clips(content, path)


def database(content: dict[str, Any], path: pathlib.Path, annotations: str, label: str) -> Iterator[Clip]:
    """The clips of a `database`, which other sets publish as well, by the names of its keys."""
    for video, record in field(content, "database", dict, str(path)).items():
        place = f"{path}, {video}"
        steps = field(expected(record, dict, place), annotations, list, place)
        steps = [expected(step, dict, place) for step in steps]
        events = tuple(Event(text(step.get(label)), *span(step.get("segment"))) for step in steps)
        yield Clip(video, seconds(record.get("duration")), events)
