"""EPIC-KITCHENS-100: narrated actions with their spans (Damen et al. 2022), `EPIC_100_train.csv` and its like.

Columns `video_id`, `start_timestamp`, `stop_timestamp` and `narration`. The time of the narration itself is not used:
narrators speak before the action they name as well as after it, and it is missing at times. Durations are apart, in
`EPIC_100_video_info.csv`.
"""

import pathlib
from collections.abc import Iterator

from jstream.data.sources.clip import Clip, Event, by_video
from jstream.data.sources.files import read_csv, seconds

COLUMNS = "video_id", "start_timestamp", "stop_timestamp", "narration"


def read(path: pathlib.Path) -> Iterator[Clip]:
    rows = (tuple(row[column] for column in COLUMNS) for row in read_csv(path, *COLUMNS))
    return by_video((video, None, Event(what, seconds(start), seconds(stop))) for video, start, stop, what in rows)
