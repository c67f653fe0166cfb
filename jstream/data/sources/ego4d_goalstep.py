"""Ego4D GoalStep: steps and the steps within them (Song et al. 2023), `goalstep_train.json` and its like.

    {"videos": [{"video_uid": "c2d06df7-…", "segments": [{"start_time": 2.9, "end_time": 40.2,
        "step_description": "Kneads the dough", "segments": [{…}, …]}, …]}, …]}

Steps of every depth are events. Durations are apart, in Ego4D's `ego4d.json`.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from jstream.data.sources.clip import Clip, Event
from jstream.data.sources.files import expected, field, read_json, seconds, text


def read(path: pathlib.Path) -> Iterator[Clip]:
    for number, video in enumerate(field(read_json(path, dict), "videos", list, str(path))):
        place = f"{path}, video {number}"
        uid = field(expected(video, dict, place), "video_uid", str, place)
        yield Clip(uid, None, tuple(_steps(video, place)))


def _steps(parent: dict[str, Any], place: str) -> Iterator[Event]:
    for step in expected(parent.get("segments", []), list, place):
        step = expected(step, dict, place)
        yield Event(text(step.get("step_description")), seconds(step.get("start_time")), seconds(step.get("end_time")))
        yield from _steps(step, place)
