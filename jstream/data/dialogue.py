"""Dialogues: what was asked and what should be said about a video, and when.

A `Dialogue` is the one sample that sources, the world, training and evaluation exchange. This file holds it and the
raw JSON schema that Streamo publishes its annotations in (repository maifoundations/Streamo,
`dataset/example/raw_data.json`). How a dialogue becomes tokens is a protocol's business (`jstream.protocols`).

Times follow the raw schema everywhere in a dialogue: they are in seconds and name the *end* of a one-second turn, so
that time 5 belongs to the turn `<4s-5s>`, which is frame 4 at one frame a second.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from jstream.errors import UserError


class DialogueError(UserError, ValueError):
    """A record that cannot be read as a dialogue; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Query:
    """What the user says.

    Attributes:
        text: the words, not empty.
        time: seconds; the query belongs to the turn that ends at `time`.
    """

    text: str
    time: float


@dataclasses.dataclass(frozen=True)
class Response:
    """What the assistant says, either at a moment (`time`) or about a span that has just ended (`start`, `end`).

    Attributes:
        text: the words, not empty.
        time: seconds, for a reply without a span: it is given in the turn that ends at `time`.
        start: seconds; the event is in progress from the turn that ends at `start` …
        end: … up to the turn that ends at `end`; the reply is given in the turn after.
    """

    text: str
    time: float | None = None
    start: float | None = None
    end: float | None = None

    def __post_init__(self):
        has_span = self.start is not None and self.end is not None
        if not has_span and (self.time is None or self.start is not None or self.end is not None):
            raise DialogueError(
                f"response {self.text!r}: expected a time, or a start and an end, found "
                f"time={self.time}, start={self.start}, end={self.end}"
            )

    @property
    def given(self) -> float:
        """Seconds: the end of the turn that it is given in."""
        return self.time if self.end is None else self.end + 1  # type: ignore[return-value]


def interval_iou(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Intersection over union of two intervals [start, end) on a line; 0 where either is empty or reversed."""
    if a[1] <= a[0] or b[1] <= b[0]:
        return 0.0
    intersection = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return intersection / (a[1] - a[0] + b[1] - b[0] - intersection)


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A video with its queries and responses.

    Attributes:
        video: path of the video file, absolute or relative to the folder of the annotations.
        queries: in order of time.
        responses: in order of the turn they are given in.
        task: `narration`, `event_caption`, `action_caption`, `forward_grounding`, `backward_grounding`, `tsqa`, …
        source: the dataset the sample comes from.
        duration: seconds, where known.
    """

    video: str
    queries: tuple[Query, ...]
    responses: tuple[Response, ...]
    task: str = ""
    source: str = ""
    duration: float | None = None


# ------------------------------------------------------------------------------------------------- the raw schema


def _seconds(value: Any, what: str) -> float | None:
    """A time of the raw schema: a number, a string that holds one, or nothing ("" or null)."""
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if isinstance(value, bool) or not math.isfinite(seconds) or seconds < 0:
        raise DialogueError(f"{what}: expected seconds (a number ≥ 0), found {value!r}")
    return seconds


def dialogue_from_raw(record: dict[str, Any]) -> Dialogue:
    """Reads one record of Streamo's raw schema.

    Args:
        record: keys `video_path` (or `video_name`), `question` and `response`: lists of `{"content", "time"}` and
            `{"content", "st_time", "end_time", "time"}`; optional `task_type`, `source`, `duration`.

    Raises:
        DialogueError: where a field is missing or of another type; names the field.
    """
    if not isinstance(record, dict):
        raise DialogueError(f"a record: expected an object, found {type(record).__name__}")
    for key in ("question", "response"):
        if not isinstance(record.get(key), list):
            raise DialogueError(f"a record: expected a list under {key!r}, found {type(record.get(key)).__name__}")
    video = record.get("video_path") or record.get("video_name")
    if not isinstance(video, str):
        raise DialogueError(f"a record: expected a path under 'video_path', found {video!r}")

    def text(item: Any, what: str) -> str:
        content = item.get("content") if isinstance(item, dict) else None
        if not isinstance(content, str) or not content.strip():
            raise DialogueError(f"{what} of {video}: expected text under 'content', found {content!r}")
        return content

    queries = []
    for item in record["question"]:
        content = text(item, "a question")
        queries.append(Query(content, _seconds(item.get("time"), f"question {content!r}") or 0.0))
    responses = []
    for item in record["response"]:
        content = text(item, "a response")
        time, start, end = (_seconds(item.get(k), f"response {content!r}") for k in ("time", "st_time", "end_time"))
        responses.append(Response(content, time if start is None else None, start, end))
    return Dialogue(
        video=video,
        queries=tuple(sorted(queries, key=lambda q: q.time)),
        responses=tuple(sorted(responses, key=lambda response: response.given)),
        task=str(record.get("task_type") or ""),
        source=str(record.get("source") or ""),
        duration=_seconds(record.get("duration"), f"duration of {video}"),
    )


def dialogue_to_raw(dialogue: Dialogue) -> dict[str, Any]:
    """Writes a dialogue in Streamo's raw schema; the inverse of `dialogue_from_raw`."""
    blank = lambda seconds: "" if seconds is None else seconds
    record = {
        "video_name": pathlib.PurePath(dialogue.video).name,
        "video_path": dialogue.video,
        "task_type": dialogue.task,
        "source": dialogue.source,
        "question": [{"content": q.text, "time": f"{q.time:.12g}"} for q in dialogue.queries],
        "response": [
            {"content": r.text, "st_time": blank(r.start), "end_time": blank(r.end), "time": blank(r.time)}
            for r in dialogue.responses
        ],
    }
    if dialogue.duration is not None:
        record["duration"] = dialogue.duration
    return record


def read_raw(path: str | pathlib.Path) -> Iterator[Dialogue]:
    """Yields the dialogues of a raw-schema file: `.json` (a list) or `.jsonl` (one record a line).

    Raises:
        DialogueError: names the file and the record (or line) that cannot be read.
    """
    path = pathlib.Path(path)
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield _named(path, f"line {number}", lambda text=line: dialogue_from_raw(json.loads(text)))
            return
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DialogueError(f"{path}: expected a JSON list of dialogues, found: {error}") from None
    if not isinstance(records, list):
        raise DialogueError(f"{path}: expected a JSON list of dialogues, found {type(records).__name__}")
    for number, record in enumerate(records):
        yield _named(path, f"record {number}", lambda record=record: dialogue_from_raw(record))


def _named(path: pathlib.Path, where: str, read):
    try:
        return read()
    except (DialogueError, json.JSONDecodeError) as error:
        raise DialogueError(f"{path}, {where}: {error}") from None


def write_raw(path: str | pathlib.Path, dialogues: Iterable[Dialogue]) -> None:
    """Writes dialogues as `.jsonl` (one record a line) or `.json` (a list); the file appears whole or not at all."""
    path = pathlib.Path(path)
    records = map(dialogue_to_raw, dialogues)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as out:
            if path.suffix == ".jsonl":
                out.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            else:
                json.dump(list(records), out, ensure_ascii=False, indent=1)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
