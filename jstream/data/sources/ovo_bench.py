"""OVO-Bench: questions about the past, the present and what is yet to come (Niu et al. 2025), `ovo_bench_new.json`.

    {"task": "EPM", "video": "…", "realtime": 215, "question": "…", "options": [four texts], "gt": 2, "answer": "…"}
    {"task": "CRR", "video": "…", "ask_time": 297, "clue_time": 308, "question": "…", "answer": "…"}
    {"task": "REC", "video": "…", "activity": "…", "start_times": [6], "end_times": [17]}
    {"task": "SSR", "video": "…", "all_steps": [texts], "start_time": [25, …], "end_time": [30, …]}

Nine tasks are multiple choice, asked at `realtime`. CRR is answered when the clue appears, and REC counts each time a
repetition is over. Each step of SSR is an event.
"""

import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

from jstream.data.sources.choices import LETTERS, choice
from jstream.data.sources.clip import Clip, Event, Question, by_video
from jstream.data.sources.files import expected, field, read_json, seconds, text

COUNT = "How many times has this happened so far: {}? Say the new number each time it has happened again."
OTHER_WORDS = "an answer in other words than its option: the option counts"


def read(path: pathlib.Path) -> Iterator[Clip]:
    return by_video(
        (field(expected(record, dict, place), "video", str, place), None, made)
        for place, record in ((f"{path}, record {i}", record) for i, record in enumerate(read_json(path, list)))
        for made in _records(expected(record, dict, place), place)
    )


def _records(item: dict[str, Any], place: str) -> Iterator[Event | Question]:
    match field(item, "task", str, place):
        case "SSR":
            steps, starts, ends = (field(item, key, list, place) for key in ("all_steps", "start_time", "end_time"))
            for step, start, end in itertools.zip_longest(steps, starts, ends):
                yield Event(text(step), seconds(start), seconds(end))
        case "REC":
            ends = sorted(map(seconds, field(item, "end_times", list, place)))
            counts = {end: str(count) for count, end in enumerate(ends, start=1)}  # of one moment the last
            answers = tuple(Event(count, None, end) for end, count in counts.items())
            yield Question(COUNT.format(text(item.get("activity"))), 0.0, answers)
        case "CRR":
            answer = Event(text(item.get("answer")), None, seconds(item.get("clue_time")))
            yield Question(text(item.get("question")), seconds(item.get("ask_time")), (answer,))
        case _:
            options = [text(option) for option in field(item, "options", list, place)]
            right = field(item, "gt", int, place)
            letter = LETTERS[right] if 0 <= right < len(LETTERS) else ""
            differs = 0 <= right < len(options) and options[right] != item.get("answer")
            lettered = [f"{letter}. {option}" for letter, option in zip(LETTERS, options)]
            asked, time = text(item.get("question")), seconds(item.get("realtime"))
            yield choice(asked, lettered, letter, time, [OTHER_WORDS] * differs)
