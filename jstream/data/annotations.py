"""Annotation files as sequences with random access: what training reads, however many records there are.

A record says what is asked and answered over one video, in one of three forms, told apart by what they hold:

    {"video_path", "question": […], "response": […]}   Streamo's raw schema (`data.dialogue`)
    {"videos": [path], "messages": […]}                Streamo's training format (`protocols.streamo`)
    {"video": path, "conversation": […]}               a chat of VideoLLM-online's (`protocols.live.turns_of_chat`)

`"fps": 2.0` in a record is the rate its frames are sampled at; else the run decides, and for a chat it is 2, as
published. `"start": 12.5` in a chat is the second of the video that its first frame shows (`load_ranges` of the
published loader). Messages of a chat:

    {"role": "stream", "num_frames": 8, "learn": 7}, {"role": "user", "content": "…"},
    {"role": "assistant", "content": "…", "learn": true}

Records come as a `.json` list (or one alone), as `.jsonl`, or in ArrayRecord files, where a record is the JSON itself
or a tf.train.Example with the JSON under `annotations` and JPEG frames under `frames`, or their features under
`features`. A folder that `jstream.data.streamo_instruct` or `jstream.features` prepared has a video in each record, and
the annotations of all videos in an `annotations.jsonl` beside them, so that planning reads no frames. All of it is
untrusted input: sizes are bounded and nothing is executed.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import grain
import numpy as np

from jstream.data.dialogue import Dialogue, DialogueError, dialogue_from_raw
from jstream.protocols.live import PUBLISHED_FPS, turns_of_chat
from jstream.protocols.protocol import Turn
from jstream.protocols.streamo import turns_of, turns_of_stream_format

MAX_RECORD = 16 * 2**20  # bytes of JSON
MAX_LIST = 4 * 2**30  # bytes of a .json list, which is read as a whole once to find its records
INDEX = "annotations.jsonl"  # of a prepared folder
SETTINGS = "metadata.json"  # of the same: how it was prepared


@dataclasses.dataclass(frozen=True)
class Annotation:
    """What is said over one video.

    Attributes:
        video: path of the file, found from the folder of the annotations.
        said: a dialogue, whose times are in seconds, or the turns of all frames, one a second.
        duration: seconds of the video, where known.
        fps: sampled frames a second, or None: the run's.
        start: seconds into the video of the first frame.
        num_frames: F, where known.
    """

    video: str
    said: Dialogue | tuple[Turn, ...]
    duration: float | None = None
    fps: float | None = None
    start: float = 0.0
    num_frames: int | None = None


def turns_of_annotation(annotation: Annotation, num_frames: int, fps: float) -> list[Turn]:
    """Lays an annotation over frames.

    Args:
        num_frames: F; turns that have no frame are left out.
        fps: sampled frames a second, where the annotation does not say.

    Returns:
        F turns, or as many as the annotation has.
    """
    fps = annotation.fps or fps
    if isinstance(annotation.said, Dialogue):
        return turns_of(annotation.said, num_frames, fps)
    turns = enumerate(annotation.said[:num_frames])
    return [dataclasses.replace(turn, start=i / fps, end=(i + 1) / fps) for i, turn in turns]


class Annotations(Sequence[Annotation]):
    """The records of a file or folder. It holds where they lie, not what they say, and travels to worker processes as
    that; each opens the files for itself.

    Args:
        path: a `.json`, `.jsonl` or `.array_record` file, or a folder of ArrayRecord files, such as a prepared one.

    Raises:
        DialogueError: where there is nothing to read; also on access, for a malformed record. Names file and record.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        self._frames: _Shards | None = None
        if self.path.is_dir():
            folder = prepared_folder(self.path)
            self._frames = _Shards(folder, sorted(folder.glob("*.array_record*")))
            self._texts = _Texts(folder / INDEX) if (folder / INDEX).exists() else self._frames
        elif ".array_record" in self.path.name:
            self._texts = self._frames = _Shards(self.path, [self.path])
        else:
            self._texts = _Texts(self.path)

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Annotation:  # type: ignore[override]
        with self._naming(index):
            record = self._record(index)
            annotation = read_annotation(record)
            if isinstance(self._texts, _Texts) and self._frames is not None:
                return _with_prepared(annotation, _prepared(record))
        folder = self.path if self.path.is_dir() else self.path.parent
        return dataclasses.replace(annotation, video=str(folder / annotation.video))

    def __iter__(self) -> Iterator[Annotation]:
        return map(self.__getitem__, range(len(self)))

    def record(self, index: int) -> dict[str, Any]:
        """The JSON object of a record, as it stands."""
        with self._naming(index):
            return self._record(index)

    def frames(self, index: int) -> tuple[bytes, ...] | None:
        """The sampled frames of a record as JPEG, for `data.frames.from_jpeg`; None where the file holds none."""
        return self._kept(index, "frames")

    def features(self, index: int) -> tuple[bytes, ...] | None:
        """What a vision tower made of them, for `data.features.from_bytes`; None where the file holds none."""
        return self._kept(index, "features")

    def _kept(self, index: int, column: str) -> tuple[bytes, ...] | None:
        if self._frames is None:
            return None
        index = range(len(self))[index]
        with self._naming(index):
            if isinstance(self._texts, _Texts):
                index = _within(_prepared(self._record(index)), "record", len(self._frames) - 1)
            return self._frames.column(index, column) or None

    def _record(self, index: int) -> dict[str, Any]:
        record = json.loads(self._texts[range(len(self))[index]])  # IndexError outside, as of any sequence
        if not isinstance(record, dict):
            raise DialogueError(f"expected an object, found {type(record).__name__}")
        return record

    @contextlib.contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        try:
            yield
        except (ValueError, RecursionError, OSError) as error:  # also of JSON, Unicode and protocol buffers
            reason = " ".join(str(error).split())
            raise DialogueError(f"{self.path}, {self._texts.where(index)}: {reason}") from None


def prepared_folder(path: pathlib.Path) -> pathlib.Path:
    """The newest version of a dataset that TFDS prepared under a folder (`name/version/`), else the folder itself."""
    versions = [info.parent for info in path.glob("*/[0-9]*/dataset_info.json")]
    return max(versions, key=lambda folder: [int(part) for part in folder.name.split(".")], default=path)


def prepared_settings(path: str | pathlib.Path) -> dict[str, Any]:
    """How a folder was prepared; {} where it is none that says so.

    Raises:
        DialogueError: what it says cannot be read.
    """
    file = prepared_folder(pathlib.Path(path)) / SETTINGS
    if not file.is_file():
        return {}
    try:
        with file.open("rb") as opened:
            settings = json.loads(opened.read(MAX_RECORD))
    except (ValueError, RecursionError, OSError) as error:
        raise DialogueError(f"{file}: expected the settings of a dataset, found: {error}") from None
    return settings if isinstance(settings, dict) else {}


# ------------------------------------------------------------------------------------------------- records and kinds


def read_annotation(record: dict[str, Any]) -> Annotation:
    """Reads a record of any of the three forms; the path of its video as it stands there.

    Raises:
        DialogueError: names what does not fit.
    """
    fps = None if record.get("fps") is None else _within(record, "fps", 1000.0)
    if fps == 0:
        raise DialogueError("'fps': expected a number above 0, found 0")
    if "messages" in record:
        turns = tuple(turns_of_stream_format(record))
        return Annotation(_path(record["videos"][0]), turns, fps=fps, num_frames=len(turns))
    if "conversation" in record:
        if not isinstance(record["conversation"], list):
            raise DialogueError(f"'conversation': expected a list, found {record['conversation']!r:.80}")
        turns = tuple(turns_of_chat(record["conversation"], fps=1.0))
        start = _within(record, "start", 1e6) if "start" in record else 0.0
        return Annotation(_path(record.get("video")), turns, None, fps or PUBLISHED_FPS, start, len(turns))
    if "question" not in record and "response" not in record:
        raise DialogueError(
            "expected 'question' and 'response' (raw schema), 'messages' (stream format) or 'conversation' (chat), "
            f"found {', '.join(map(repr, record)) or 'nothing'!s:.80}"
        )
    dialogue = dialogue_from_raw(record)
    return Annotation(dialogue.video, dialogue, dialogue.duration, fps)


def _path(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise DialogueError(f"expected the path of a video, found {value!r:.80}")
    return value


def _within(record: dict[str, Any], key: str, most: float) -> Any:
    """A number from 0 to `most`: whole where that is."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int if isinstance(most, int) else int | float):
        raise DialogueError(f"{key!r}: expected a number, found {value!r:.80}")
    if not 0 <= value <= most:
        raise DialogueError(f"{key!r}: expected 0 to {most:g}, found {value!r:.80}")
    return value


def _prepared(record: dict[str, Any]) -> dict[str, Any]:
    prepared = record.get("prepared")
    if not isinstance(prepared, dict):
        raise DialogueError(f"'prepared': expected where the frames lie, found {prepared!r:.80}")
    return prepared


def _with_prepared(annotation: Annotation, prepared: dict[str, Any]) -> Annotation:
    """The annotation over frames that are there already: sampled at their rate, from their first on."""
    num_frames = _within(prepared, "num_frames", MAX_RECORD)
    if not isinstance(annotation.said, Dialogue):
        num_frames = min(num_frames, len(annotation.said))
    fps, video = _within(prepared, "fps", 1000.0) or None, _path(prepared.get("video"))
    return dataclasses.replace(annotation, video=video, fps=fps, num_frames=num_frames)


# ------------------------------------------------------------------------------------------------------------- files


class _Texts:
    """The JSON texts of a `.json` list or a `.jsonl` file, by where they begin and end.

    Attributes:
        spans: int64 [N, 2]: bytes.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._file: tuple[int, BinaryIO] | None = None  # with the process that opened it
        if path.suffix not in (".json", ".jsonl"):
            raise DialogueError(f"{path}: expected .json, .jsonl or .array_record, or a folder, found neither")
        try:
            spans = list(_lines(path) if path.suffix == ".jsonl" else _items(path))
        except OSError as error:
            raise DialogueError(f"{path}: expected annotations, found: {error.strerror or error}") from None
        self.spans = np.asarray(spans, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> bytes:
        if self._file is None or self._file[0] != os.getpid():
            self._file = os.getpid(), self.path.open("rb")
        begin, end = self.spans[index].tolist()
        return os.pread(
            self._file[1].fileno(), end - begin, begin
        )  # at a position of its own: threads may share the file

    def where(self, index: int) -> str:
        if self.path.suffix == ".json":
            return f"record {index}"
        left, line = int(self.spans[index, 0]), 1  # counted only to name it: blank lines are not in the spans
        with self.path.open("rb") as file:
            while left and (block := file.read(min(left, MAX_RECORD))):
                left, line = left - len(block), line + block.count(b"\n")
        return f"line {line}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}


def _lines(path: pathlib.Path) -> Iterator[tuple[int, int]]:
    with path.open("rb") as file:
        number, begin = 1, 0
        while line := file.readline(MAX_RECORD + 1):
            if len(line) > MAX_RECORD:
                raise DialogueError(f"{path}, line {number}: expected at most {MAX_RECORD} bytes, found more")
            if line.strip():
                yield begin, begin + len(line)
            number, begin = number + 1, begin + len(line)


def _items(path: pathlib.Path) -> Iterator[tuple[int, int]]:
    if path.stat().st_size > MAX_LIST:
        raise DialogueError(
            f"{path}: expected a list of at most {MAX_LIST >> 30} GiB, found {path.stat().st_size / 2**30:.1f}; "
            "write it as .jsonl, one record a line"
        )
    text = path.read_bytes().decode("latin-1")  # a character a byte; what strings say is decoded when they are read
    blank, decoder = re.compile(r"[ \t\n\r]*"), json.JSONDecoder()
    skip = lambda at: blank.match(text, at).end()  # type: ignore[union-attr]
    number, at = 0, skip(0)
    alone = text[at : at + 1] == "{"  # one record and no list
    try:
        if not alone and text[at : at + 1] != "[":
            raise ValueError(f"{text[at : at + 20]!r}")
        at = at if alone else skip(at + 1)
        more = text[at : at + 1] != "]"
        while more:
            _, end = decoder.raw_decode(text, at)
            if end - at > MAX_RECORD:
                raise ValueError(f"more than {MAX_RECORD} bytes")
            yield at, end
            number, at = number + 1, skip(end)
            more = not alone and text[at : at + 1] == ","
            at = skip(at + 1) if more else at
        if (text[at:] if alone else text[at:].rstrip()) != ("" if alone else "]"):
            raise ValueError(f"{text[at : at + 20]!r} behind it")
    except (ValueError, RecursionError) as error:
        raise DialogueError(f"{path}, record {number}: expected a JSON list of annotations, found: {error}") from None


class _Shards:
    """ArrayRecord files as one sequence; each process opens them when it first reads."""

    def __init__(self, path: pathlib.Path, files: Sequence[pathlib.Path]):
        if not files:
            raise DialogueError(f"{path}: expected .array_record files, found none")
        try:
            self._source: Any = grain.sources.ArrayRecordDataSource([str(file) for file in files])
        except Exception as error:  # what the library raises is not documented
            raise DialogueError(f"{path}: expected ArrayRecord files, found: {' '.join(str(error).split())}") from None

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> bytes:
        texts = self.column(index, "annotations")
        if len(texts) != 1 or len(texts[0]) > MAX_RECORD:
            raise DialogueError(
                f"expected one annotation of at most {MAX_RECORD} bytes, found {len(texts)} annotations"
            )
        return texts[0]

    def column(self, index: int, name: str) -> tuple[bytes, ...]:
        """The annotations of a record, or what else it holds under a name."""
        from tensorflow_datasets.proto import tf_example_pb2  # half a second, for those who read such files

        try:
            data = self._source[index]
            if data.startswith(b"{"):
                return (data,) if name == "annotations" else ()
            features = tf_example_pb2.Example.FromString(data).features.feature  # type: ignore[attr-defined]
            return tuple(features[name].bytes_list.value)
        except Exception as error:  # the same
            raise DialogueError(f"expected JSON or a tf.train.Example, found: {error}") from None

    def where(self, index: int) -> str:
        return f"record {index}"
