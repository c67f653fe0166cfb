"""HiREST: the steps of how-to videos (Zala et al. 2023), `all_data_train.json` and its like.

    {"Make Oatmeal Pancake Mix": {"5V3dI2zp1xA.mp4": {"v_duration": 207.08, "bounds": [50, 121],
        "steps": [{"heading": "take oats flour", "absolute_bounds": [50, 58]}, …]}, …}, …}

Videos without steps are passed over.
"""

import pathlib
from collections.abc import Iterator

from jstream.data.sources.clip import Clip, Event
from jstream.data.sources.files import expected, field, read_json, seconds, span, text


def read(path: pathlib.Path) -> Iterator[Clip]:
    for prompt, videos in read_json(path, dict).items():
        for video, record in expected(videos, dict, f"{path}, {prompt}").items():
            place = f"{path}, {video}"
            steps = field(expected(record, dict, place), "steps", list, place)
            steps = [expected(step, dict, place) for step in steps]
            events = tuple(Event(text(step.get("heading")), *span(step.get("absolute_bounds"))) for step in steps)
            if events:
                yield Clip(video, seconds(record.get("v_duration")), events)
