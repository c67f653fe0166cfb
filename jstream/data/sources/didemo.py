"""DiDeMo: descriptions of moments (Hendricks et al. 2017), `train_data.json`, `val_data.json`, `test_data.json`.

    [{"video": "54322086@N00_2408598493_274c77d26a.avi", "description": "…", "times": [[5, 5], [4, 5], …], …}, …]

Each annotator gives the first and the last of the 5-second chunks that show the moment, [1, 4] for seconds 5 to 25; a
video has six at most. Taken is the pair that most of them gave, the first such one.
"""

import collections
import pathlib
from collections.abc import Iterator
from typing import Any

from jstream.data.sources.clip import Clip, Event, by_video
from jstream.data.sources.files import expected, field, read_json, span, text

CHUNK = 5.0  # seconds


def read(path: pathlib.Path) -> Iterator[Clip]:
    return by_video(_row(record, f"{path}, record {i}") for i, record in enumerate(read_json(path, list)))


def _row(record: Any, place: str) -> tuple[str, None, Event]:
    video = field(expected(record, dict, place), "video", str, place)
    pairs = collections.Counter(map(span, field(record, "times", list, place)))
    if not pairs:
        return video, None, Event("", None, 0.0, fault="no annotator gave a time")
    [((first, last), _)] = pairs.most_common(1)  # the first of equals
    return video, None, Event(text(record.get("description")), first * CHUNK, (last + 1) * CHUNK)
