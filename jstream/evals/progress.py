"""Progress of a long run: an append-only file with a line for each question that is done, behind one of settings.

Killed at any instant, a run goes on from its lines: one that was cut is dropped, and a question that failed is tried
again. The file of a run with other settings is refused.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jstream.config import ConfigError
from jstream.evals.records import object_of, read_lines


class Progress:
    """The file, open for more lines.

    Args:
        path: of the file, made if missing.
        settings: JSON values that an answer depends on.

    Attributes:
        done: what is known of each question: `answer`, and `failure` where it has one.

    Raises:
        ConfigError: the file is of a run with other settings.
        DialogueError: a line of it is no JSON object.
    """

    def __init__(self, path: pathlib.Path, settings: Mapping[str, Any]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.done: dict[str, dict[str, Any]] = {}
        self._file = path.open("ab+")
        size = _whole_lines(self._file)
        self._file.truncate(size)
        lines = read_lines(path) if size else {}
        for number, (where, record) in enumerate(lines.items()):
            if number == 0:
                _check_settings(path, object_of(record.get("settings"), where), settings)
            else:
                self.done[str(record.get("question"))] = record
        if not lines:
            self._write({"settings": dict(settings)})

    def add(self, question: str, record: Mapping[str, Any]) -> None:
        """Writes down a question that is done; it stays so whatever happens next."""
        self.done[question] = {"question": question, **record}
        self._write(self.done[question])

    def failures(self) -> dict[str, str]:
        """Why the questions failed that did."""
        return {name: str(record["failure"]) for name, record in self.done.items() if record.get("failure")}

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=True).encode() + b"\n")
        self._file.flush()


def _whole_lines(file: Any) -> int:
    """Bytes up to the end of the last whole line."""
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        step = min(position, 1 << 16)
        file.seek(position - step)
        end = file.read(step).rfind(b"\n")
        if end >= 0:
            return position - step + end + 1
        position -= step
    return 0


def _check_settings(path: pathlib.Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in {**found, **wanted}:
        if found.get(name) != wanted.get(name):
            raise ConfigError(
                f"{path}: expected a run with {name} {wanted.get(name)!r:.80}, found one with {found.get(name)!r:.80}; "
                "take another --out"
            )
