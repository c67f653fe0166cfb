"""Charades-STA: sentences with their spans (Gao et al. 2017), one a line.

    AO8RW 0.0 6.9##a person is putting a book on a shelf.

Durations are apart, in `Charades_v1_train.csv` and `Charades_v1_test.csv` (columns `id` and `length`).
"""

import pathlib
from collections.abc import Iterator

from jstream.data.sources.clip import Clip, Event, by_video
from jstream.data.sources.files import read_text, seconds


def read(path: pathlib.Path) -> Iterator[Clip]:
    return by_video(_row(line) for line in read_text(path).splitlines() if line.strip())


def _row(line: str) -> tuple[str, None, Event]:
    head, marks, sentence = line.partition("##")
    video, *times = head.split() or [""]
    if not marks or len(times) != 2:
        return video, None, Event(sentence, None, 0.0, fault="expected video, start, end, ## and a sentence")
    return video, None, Event(sentence, seconds(times[0]), seconds(times[1]))
