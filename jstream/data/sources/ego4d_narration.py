"""Ego4D narrations: what the wearer of the camera does, told at moments (Grauman et al. 2022).

    {"videos": {uid: {"narration_pass_1": {"narrations": [{"timestamp_sec": 3.3,
        "narration_text": "#C C picks a bag", "annotation_uid": "…"}, …]}, "narration_pass_2": …}}}

`narration.json`, with or without "videos" around it. `all_narrations_redacted.json` has all narrations of a video in a
list, with keys `time`, `text` and `_annotation_uid`. Two annotators narrate most videos, and each pass is a clip of its
own: in the second file, parts of a video that one annotator narrated make a pass with others that they do not overlap.

"#C C picks a bag" becomes "C picks a bag": C wears the camera, other letters are other people. Durations are apart, in
`ego4d.json`.
"""

import collections
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from jstream.data.sources.clip import Clip, Event
from jstream.data.sources.files import expected, field, read_json, seconds, text
from jstream.data.sources.tasks import lanes

PASSES = "narration_pass_1", "narration_pass_2"
UNSURE = "the narrator is unsure"


def read(path: pathlib.Path) -> Iterator[Clip]:
    content = read_json(path, dict)
    for uid, video in expected(content.get("videos", content), dict, str(path)).items():
        place = f"{path}, {uid}"
        video = expected(video, dict, place)
        if "narrations" in video:
            passes = _passes(field(video, "narrations", list, place), place)
        else:
            given = [expected(video[name], dict, place) for name in PASSES if name in video]
            passes = [field(one, "narrations", list, place) for one in given]
        for narrations in passes:
            events = tuple(_event(expected(narration, dict, place)) for narration in narrations)
            if events:
                yield Clip(uid, None, events)


def _passes(narrations: list[Any], place: str) -> list[list[Any]]:
    parts: dict[str, list[Any]] = collections.defaultdict(list)
    for narration in narrations:
        parts[text(expected(narration, dict, place).get("_annotation_uid"))].append(narration)
    times = lambda part: [seconds(narration.get("time")) for narration in part]
    return [sum(lane, []) for lane in lanes(parts.values(), lambda part: (min(times(part)), max(times(part))))]


def _event(narration: dict[str, Any]) -> Event:
    said = text(narration.get("narration_text", narration.get("text")))
    time = seconds(narration.get("timestamp_sec", narration.get("time")))
    fault = UNSURE if "#unsure" in said.lower() else ""
    return Event(re.sub(r"#\w*\s*", "", said).strip(), None, time, fault=fault)
