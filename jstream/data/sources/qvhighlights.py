"""QVHighlights: queries with all windows of a video that they fit (Lei et al. 2021), one query a line.

    {"qid": 2579, "query": "A girl and …", "duration": 150, "vid": "NUsG9BgSes0_210.0_360.0",
     "relevant_windows": [[82, 150]], …}

A window is a record: each is an event with the query as its text. The test split has no windows. `vid` names the clip
that was cut from a video of YouTube, and so its file.
"""

import pathlib
from collections.abc import Iterator

from jstream.data.sources.clip import Clip, Event, by_video
from jstream.data.sources.files import field, read_jsonl, seconds, span, text


def read(path: pathlib.Path) -> Iterator[Clip]:
    return by_video(
        (
            field(record, "vid", str, place),
            seconds(record.get("duration")),
            Event(text(record.get("query")), *span(times)),
        )
        for place, record in read_jsonl(path)
        for times in field(record, "relevant_windows", list, place)
    )
