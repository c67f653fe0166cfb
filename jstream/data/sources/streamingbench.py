"""StreamingBench: questions at their times (Lin et al. 2024), `questions_real.json`, `_omni`, `_sqa` and `_proactive`.

    [{"video_path": "./videos/sample_2_real.mp4", "questions": [{"question": "What …?", "time_stamp": "00:00:50",
        "options": ["A. …", …], "answer": "B", …}], …}, …]

Sequential questions (`_sqa`) come in a list for each video. Proactive ones have `ground_truth_time_stamp` and
`ground_truth_output`: what to say when it can be seen. All questions about a video are one clip, so that one that
refers to the answer before is asked after it.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from jstream.data.sources.choices import choice
from jstream.data.sources.clip import Clip, Event, Question, by_video
from jstream.data.sources.files import expected, field, read_json, seconds, text


def read(path: pathlib.Path) -> Iterator[Clip]:
    return by_video(_rows(read_json(path, list), str(path)))


def _rows(records: list[Any], place: str) -> Iterator[tuple[str, None, Question]]:
    for number, record in enumerate(records):
        where = f"{place}, record {number}"
        if isinstance(record, list):
            yield from _rows(record, where)
            continue
        video = field(expected(record, dict, where), "video_path", str, where)
        for question in field(record, "questions", list, where):
            yield video, None, _question(expected(question, dict, where), where)


def _question(record: dict[str, Any], place: str) -> Question:
    asked, time = text(record.get("question")), seconds(record.get("time_stamp"))
    if "options" not in record:
        answer = Event(text(record.get("ground_truth_output")), None, seconds(record.get("ground_truth_time_stamp")))
        return Question(asked, time, (answer,))
    return choice(
        asked, [text(option) for option in field(record, "options", list, place)], text(record.get("answer")), time
    )
