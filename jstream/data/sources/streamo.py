"""Streamo's annotations: its raw schema (`data.dialogue`) or its training format (`protocols.streamo`).

    [{"video_path": "a.mp4", "question": [{"content", "time"}], "response": [{"content", "st_time", …}], …}, …]
    [{"videos": ["a.mp4"], "messages": [{"role": "user", "content": "What …?\\n<0s-1s>\\n<stream>"}, …], …}, …]

As a `.json` list, or one record a line in `.jsonl`. Records are dialogues already, and their times stay as they are.
The training format was made of the raw one by a converter that also puts the first question into the first turn.
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

from jstream.data.dialogue import Dialogue, DialogueError, dialogue_from_raw
from jstream.data.sources.clip import Clip, Whole
from jstream.data.sources.files import read_json, read_jsonl
from jstream.protocols.streamo import from_stream_format

UNREADABLE = "does not fit the schema"
LEAKED = "a question that its converter repeats in the first turn: asked at its time alone"


def read(path: pathlib.Path) -> Iterator[Clip]:
    records = (record for _, record in read_jsonl(path)) if path.suffix == ".jsonl" else read_json(path, list)
    for record in records:
        try:
            dialogue, duration, repairs = _dialogue(record)
            yield Clip(dialogue.video, duration, (Whole(dialogue, repairs),))
        except DialogueError:
            yield Clip("", None, (Whole(Dialogue("", (), ()), fault=UNREADABLE),))


def _dialogue(record: Any) -> tuple[Dialogue, float | None, tuple[str, ...]]:
    if not isinstance(record, dict) or "messages" not in record:
        dialogue = dialogue_from_raw(record)
        return dialogue, dialogue.duration, ()
    dialogue, turns = from_stream_format(record)
    first, *later = dialogue.queries or (None,)
    if first is None or first.time > 1 or all(query.text != first.text for query in later):
        return dialogue, float(turns), ()
    return dataclasses.replace(dialogue, queries=tuple(later)), float(turns), (LEAKED,)
