"""Annotations and predictions as JSON: read within bounds, joined by id, and what did not fit said in one line each.

All of it is untrusted input: nothing is executed, files are bounded, and what cannot be read names its file and line.
A record that reads well but fits no question is left out and told of in the report, as is a question without one.
"""

import json
import pathlib
import sys
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import Any

from jstream.data.dialogue import DialogueError

MAX_FILE = 256 * 2**20  # bytes; the largest official file of predictions has about 5 MB
MAX_LINE = 16 * 2**20  # bytes of a record in a .jsonl file
MAX_FILES = 1000  # of a folder
_SHOWN = 3  # examples in a note


def read_json(path: pathlib.Path) -> Any:
    """What a JSON file holds.

    Raises:
        DialogueError: where it is no JSON or too large.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DialogueError(f"{path}: expected JSON, found: {error}") from None


def read_text(path: pathlib.Path) -> str:
    """What a UTF-8 file holds.

    Raises:
        DialogueError: where it is no text or too large.
    """
    _check_size(path)
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DialogueError(f"{path}: expected text in UTF-8, found: {error}") from None


def read_lines(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The objects of a JSONL file by where they stand (`FILE, line 3`); blank lines do not matter.

    Raises:
        DialogueError: where a line is no JSON object or too long; names file and line.
    """
    _check_size(path)
    found = {}
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            where = f"{path}, line {number}"
            if len(line) > MAX_LINE:
                raise DialogueError(f"{where}: expected at most {MAX_LINE} bytes, found more")
            if line.strip():
                try:
                    record = json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError) as error:
                    raise DialogueError(f"{where}: expected a JSON object, found: {error}") from None
                found[where] = object_of(record, where)
    return found


def json_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The file itself, or the `.json` files of a folder in order of their names.

    Raises:
        DialogueError: for a folder without any, or with too many.
    """
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.json"))
    if not 0 < len(files) <= MAX_FILES:
        raise DialogueError(f"{path}: expected 1 to {MAX_FILES} .json files, found {len(files)}")
    return files


def _check_size(path: pathlib.Path) -> None:
    if path.is_dir():
        raise DialogueError(f"{path}: expected a file, found a folder")
    if path.stat().st_size > MAX_FILE:
        raise DialogueError(f"{path}: expected at most {MAX_FILE >> 20} MiB, found {path.stat().st_size >> 20}")


# ------------------------------------------------------------------------------------------------------- checked values


def object_of(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DialogueError(f"{where}: expected an object, found {value!r:.80}")
    return value


def list_of(record: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = record.get(key)
    if not isinstance(value, list):
        raise DialogueError(f"{where}: expected a list under {key!r}, found {value!r:.80}")
    return value


def text_of(record: Mapping[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise DialogueError(f"{where}: expected text under {key!r}, found {value!r:.80}")
    return value


def number(value: Any, where: str) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise DialogueError(f"{where}: expected a number, found {value!r:.80}")
    return float(value)


def numbers(value: Any, size: int | None, where: str) -> list[float]:
    """A list of finite numbers, of a given size or any."""
    if not isinstance(value, list) or size not in (None, len(value)):
        raise DialogueError(f"{where}: expected a list of {size or 'any'} numbers, found {value!r:.80}")
    return [number(item, where) for item in value]


def id_of(record: Mapping[str, Any], key: str, where: str) -> int | str:
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DialogueError(f"{where}: expected an id (a whole number or text) under {key!r}, found {value!r:.80}")
    return value


def reply_of(response: Any, which: Any, faults: dict[str, list[Any]]) -> str | None:
    """The text of a model's reply, or None; what is odd about it is noted in `faults` (a defaultdict)."""
    if isinstance(response, list) and response:
        faults["replies that came as a list, of which the first item counts"].append(which)
        response = response[0]
    if isinstance(response, int | float) and not isinstance(response, bool):
        response = str(response)
    if not isinstance(response, str):
        faults["records or probes without a reply"].append(which)
        return None
    return response


# -------------------------------------------------------------------------------------------------------------- joining


def by_id(records: Mapping[str, dict[str, Any]], key: str) -> dict[int | str, tuple[str, dict[str, Any]]]:
    """Annotations by id, each with where it stands.

    Raises:
        DialogueError: for an id that is missing, or there twice.
    """
    found: dict[int | str, tuple[str, dict[str, Any]]] = {}
    for where, record in records.items():
        if (name := id_of(record, key, where)) in found:
            raise DialogueError(f"{where}: expected an id of its own, found {name!r} a second time")
        found[name] = where, record
    return found


def join(
    records: Mapping[str, dict[str, Any]], key: str, known: Collection[Hashable]
) -> tuple[dict[Any, tuple[str, dict[str, Any]]], list[str]]:
    """Predictions by the ids of the annotations.

    Returns:
        The first record of each known id with where it stands, and notes: on unknown, repeated and missing ids.
    """
    found, unknown, repeated = {}, [], []
    for where, record in records.items():
        name = id_of(record, key, where)
        if name not in known:
            unknown.append(name)
        elif name in found:
            repeated.append(name)
        else:
            found[name] = where, record
    missing = [name for name in known if name not in found]
    return found, [
        *note("records left out, as the annotations lack their id", unknown),
        *note("records left out, as not the first with their id", repeated),
        *note("questions without a record", missing),
    ]


def note(what: str, which: Iterable[Any]) -> list[str]:
    """[`records left out …: 2 (7, 9)`], or nothing where there are none."""
    which = list(which)
    shown = ", ".join(f"{item!s:.60}" for item in which[:_SHOWN])
    return [f"{what}: {len(which)} ({shown}{', …' if len(which) > _SHOWN else ''})"] if which else []
