"""Annotation files of others, read with care: what is no JSON or CSV is a one-line error, what is no number is NaN."""

import csv
import io
import json
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any, TypeVar

from jstream.data.dialogue import DialogueError

MAX_FILE = 4 * 2**30  # bytes; a file is read as a whole
_CLOCK = re.compile(r"\s*(?:(\d{1,6}):)?(\d{1,6}):(\d{1,6}(?:[.,]\d{1,9})?)\s*")

_Kind = TypeVar("_Kind")


def read_text(path: pathlib.Path) -> str:
    """The text of a file, in UTF-8.

    Raises:
        DialogueError: where there is none.
    """
    try:
        if path.stat().st_size > MAX_FILE:
            raise DialogueError(f"{path}: expected at most {MAX_FILE >> 30} GiB, found more; cut it into several files")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DialogueError(f"{path}: expected annotations, found: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DialogueError(f"{path}: expected text in UTF-8, found: {error}") from None


def read_json(path: pathlib.Path, kind: type[_Kind]) -> _Kind:
    """What a JSON file holds.

    Raises:
        DialogueError: where it is no JSON (names line and column), or not of that kind.
    """
    return _parse(read_text(path), str(path), kind)


def read_jsonl(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file with one a line, each with its place for messages.

    Raises:
        DialogueError: names the line that holds none.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, _parse(line, place, dict)


def _parse(text: str, place: str, kind: type[_Kind]) -> _Kind:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DialogueError(f"{place}: expected JSON, found: {error}") from None
    return expected(value, kind, place)


def read_csv(path: pathlib.Path, *columns: str) -> Iterator[dict[str, str]]:
    """The rows of a CSV file with a header; what a short row lacks is "".

    Raises:
        DialogueError: where a column is missing, or a line cannot be read.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), restval="")
    try:
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            found = ", ".join(reader.fieldnames or ()) or "nothing"
            raise DialogueError(f"{path}: expected a column {missing[0]!r}, found {found:.200}")
        yield from reader
    except csv.Error as error:
        raise DialogueError(f"{path}, line {reader.line_num}: expected CSV, found: {error}") from None


_NAMES = {dict: "an object", list: "a list", str: "text", int: "a whole number"}


def expected(value: Any, kind: type[_Kind], place: str) -> _Kind:
    """The value, where it is of a kind.

    Raises:
        DialogueError: where it is not; begins with the place.
    """
    if not isinstance(value, kind):
        found = _NAMES[type(value)] if isinstance(value, dict | list) else repr(value)
        raise DialogueError(f"{place}: expected {_NAMES[kind]}, found {found:.80}")
    return value


def field(record: dict[str, Any], key: str, kind: type[_Kind], place: str) -> _Kind:
    """What a record has under a key, where it is of a kind.

    Raises:
        DialogueError: where it is not; names the key.
    """
    return expected(record.get(key), kind, f"{place}, {key!r}")


def seconds(value: Any) -> float:
    """A time: a number, text that holds one, or a clock such as "1:02:03.5"; NaN for all else."""
    clock = _CLOCK.fullmatch(value) if isinstance(value, str) else None
    if clock:
        hours, minutes, rest = clock.groups(default="0")
        return 3600.0 * int(hours) + 60 * int(minutes) + float(rest.replace(",", "."))
    try:
        return math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def text(value: Any) -> str:
    """A text, or "" for all else."""
    return value if isinstance(value, str) else ""


def span(value: Any) -> tuple[float, float]:
    """The two times of a list; NaN for all else."""
    if not isinstance(value, list) or len(value) != 2:
        return math.nan, math.nan
    return seconds(value[0]), seconds(value[1])
