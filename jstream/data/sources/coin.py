"""COIN: the steps of instructional videos, as published (Tang et al. 2019), or one a line as ProcedureVRL has them.

    {"database": {"eD6NEcqcCyc": {"duration": 158.89, "annotation": [{"segment": [17.5, 30.5], "label": "…"}, …]}, …}}

    eD6NEcqcCyc.mkv 74 158.894144 17.5 30.5         video, step, duration, start, end

The words of step k are line k, from 0, of a file `step_coin_text.txt` in the same folder (repository
facebookresearch/ProcedureVRL, `data/`).
"""

import pathlib
from collections.abc import Iterator

from jstream.data.sources.clip import Clip, Event, by_video
from jstream.data.sources.files import read_json, read_text, seconds
from jstream.data.sources.youcook2 import database

STEPS = "step_coin_text.txt"


def read(path: pathlib.Path) -> Iterator[Clip]:
    if path.suffix == ".json":
        return database(read_json(path, dict), path, "annotation", "label")
    steps = read_text(path.with_name(STEPS)).splitlines()
    return by_video(_row(line, steps) for line in read_text(path).splitlines() if line.strip())


def _row(line: str, steps: list[str]) -> tuple[str, float, Event]:
    fields = line.split()
    video, step, duration, start, end = fields if len(fields) == 5 else [fields[0], "", "", "", ""]
    fault = "" if len(fields) == 5 else "expected video, step, duration, start and end"
    known = step.isdecimal() and int(step) < len(steps)
    event = Event(steps[int(step)] if known else "", seconds(start), seconds(end), fault=fault)
    return video, seconds(duration), event
