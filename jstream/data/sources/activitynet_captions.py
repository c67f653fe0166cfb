"""ActivityNet Captions: `train.json`, `val_1.json` and `val_2.json` of Krishna et al. (2017), or files in their manner.

    {"v_QOlSCBRmfWY": {"duration": 82.73, "timestamps": [[0.83, 19.86], …], "sentences": ["A young woman …", …]}, …}

Sentences tell the whole video in order; their spans overlap in most videos, and nest.
"""

import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

from jstream.data.sources.clip import Clip, Event
from jstream.data.sources.files import expected, field, read_json, seconds, span, text


def read(path: pathlib.Path) -> Iterator[Clip]:
    yield from clips(read_json(path, dict), path)


def clips(videos: dict[str, Any], path: pathlib.Path) -> Iterator[Clip]:
    for video, record in videos.items():
        place = f"{path}, {video}"
        spans, sentences = (
            field(expected(record, dict, place), key, list, place) for key in ("timestamps", "sentences")
        )
        pairs = itertools.zip_longest(spans, sentences)
        events = tuple(Event(text(sentence), *span(times)) for times, sentence in pairs)
        yield Clip(video, seconds(record.get("duration")), events)
