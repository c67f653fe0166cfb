"""All records of an annotation file, made into data: by threads here, or by Beam; resumable to the record.

What is made of a record is a line of `OUT.progress`, under a hash of the record and of all that its result depends on.
A job that was killed makes the records whose hash is not there yet; of what it had asked for others, the cache has the
answers. When no record is left, the lines are put in the order of the input: OUT and `*.skipped.jsonl` appear whole.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from jstream.config import ConfigError
from jstream.data.annotations import Annotations, read_annotation
from jstream.data.dialogue import DialogueError, dialogue_to_raw
from jstream.data.synthesis import streamo_tasks as streamo
from jstream.data.synthesis.asking import Ask, Dropped
from jstream.data.synthesis.live_chats import MAX_FRAMES, live_chats
from jstream.data.synthesis.llm import Client, Endpoint, Spent
from jstream.data.synthesis.source import Looks, annotated_video

# (source, ask, rng, job) to records, and why parts were left out
_MAKE = {
    "live_chats": lambda s, ask, rng, job: ([live_chats(s, ask, rng, job.faults, job.max_frames)], []),
    "narration": lambda s, ask, rng, job: streamo.narration(s, ask, rng, job.looks),
    "captions": lambda s, ask, rng, job: streamo.captions(s, ask, rng, job.looks, job.iou),
    "grounding": lambda s, ask, rng, job: streamo.grounding(s, ask, rng),
    "time_sensitive_qa": lambda s, ask, rng, job: streamo.time_sensitive_qa(s, ask, rng),
}
KINDS = tuple(_MAKE)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be made.

    Attributes:
        kind: of KINDS.
        annotations: what `data.annotations.Annotations` opens.
        out: a `.jsonl` file.
        endpoint: who answers.
        seed: of what is drawn, and of the requests.
        looks: how pictures are shown to a model that sees.
        iou: of captions, see `streamo_tasks`.
        faults, max_frames: of chats, see `live_chats`.

    Raises:
        ConfigError: for a value out of range.
    """

    kind: str
    annotations: str
    out: str
    endpoint: Endpoint
    seed: int = 0
    looks: Looks = Looks()
    iou: float = streamo.IOU
    faults: float = 0.3
    max_frames: int = MAX_FRAMES

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ConfigError(f"kind: expected one of {', '.join(KINDS)}, found {self.kind!r}")
        if not self.out.endswith(".jsonl") or os.path.realpath(self.out) == os.path.realpath(self.annotations):
            raise ConfigError(f"out: expected a .jsonl file that is not the annotations, found {self.out!r}")
        limits = {"seed": (0, 2**31 - 2), "iou": (0, 1), "faults": (0, 1), "max_frames": (120, 10**5)}
        limits |= {"max_seconds": (2, 36_000), "max_pixels": (1, 2**24), "quality": (1, 95)}
        for name, (least, most) in limits.items():
            value = getattr(self if hasattr(self, name) else self.looks, name)
            if not least <= value <= most:
                raise ConfigError(f"{name}: expected {least} to {most}, found {value}")

    def made_by(self) -> list[Any]:
        """All that a result depends on, but for the record."""
        chosen = self.seed, dataclasses.astuple(self.looks), self.iou, self.faults, self.max_frames
        return [self.kind, self.endpoint.model, self.endpoint.parameters, chosen]


class Maker:
    """Makes records; a process has one, whose threads share it."""

    def __init__(self, job: Job):
        self.job, self.annotations, self.client = job, Annotations(job.annotations), Client(job.endpoint)

    def key(self, index: int) -> str:
        """Of the result of a record, wherever it stands in the file."""
        parts = [self.job.made_by(), self.annotations.record(index)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def line(self, index: int) -> str:
        """What is made of a record, as a line of the progress.

        Raises:
            LLMError: the endpoint does not work.
        """
        record, annotation = self.annotations.record(index), self.annotations[index]
        name = read_annotation(record).video
        if not os.path.isabs(name):  # it is relative to the annotations; what is made may lie elsewhere
            name = os.path.relpath(annotation.video, os.path.dirname(self.job.out) or ".")
        ask = Ask(self.client, self.job.seed)
        rng = random.Random(json.dumps([self.job.kind, self.job.seed, record], sort_keys=True))
        try:
            made, why = _MAKE[self.job.kind](annotated_video(annotation, name), ask, rng, self.job)
        except Dropped as reason:
            made, why = [], [str(reason)]
        made = [one if isinstance(one, dict) else dialogue_to_raw(one) for one in made]
        line = {"key": self.key(index), "video": name, "made": made, "skipped": why, "spent": vars(ask.spent)}
        return json.dumps(line) + "\n"


class Progress:
    """The lines of a job so far, in a file that only one job may have open.

    Attributes:
        offsets: where the line of a key begins.
        spent: what all lines took.
    """

    def __init__(self, path: pathlib.Path):
        self.path, self.offsets, self.spent = path, dict[str, int](), Spent()
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise DialogueError(f"{path}: expected no other job here, found one; wait for it") from None
        end = 0
        self._file.seek(0)
        for line in self._file:
            if line.endswith(b"\n"):
                self._know(line, end)
                end += len(line)
        self._file.truncate(end)  # the line that a killed job had begun to write

    def append(self, line: str) -> None:
        """Keeps a line; what was kept before stays whatever happens."""
        data, offset = line.encode(), self._file.seek(0, os.SEEK_END)
        self._file.write(data)
        self._file.flush()
        self._know(data, offset)

    def _know(self, line: bytes, offset: int) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged line is made again
            made = json.loads(line)
            self.spent += Spent(**made["spent"])
            self.offsets[made["key"]] = offset

    def __getitem__(self, key: str) -> dict[str, Any]:
        self._file.seek(self.offsets[key])
        return json.loads(self._file.readline())

    def close(self) -> None:
        self._file.close()


@dataclasses.dataclass
class Outcome:
    """The numbers of records read, of those made of them, and of reasons why something was left out; what it took."""

    records: int
    made: int
    skipped: int
    spent: Spent


def run(job: Job, workers: int = 4, beam_options: str | None = None) -> Outcome:
    """Does a job, or goes on with it.

    Args:
        workers: threads, each with a record of its own.
        beam_options: of a pipeline in place of the threads, such as `--runner=FlinkRunner`.

    Raises:
        DialogueError: for annotations that cannot be read, or where nothing could be made of any.
        LLMError: the endpoint does not work; what is done is kept.
        OSError: where files cannot be written.
    """
    maker, out = Maker(job), pathlib.Path(job.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    indices = tqdm(range(len(maker.annotations)), desc="reading", unit="record", delay=2, dynamic_ncols=True)
    keys = [maker.key(index) for index in indices]
    with contextlib.closing(Progress(out.with_name(out.name + ".progress"))) as progress:
        missing = list({key: index for index, key in enumerate(keys) if key not in progress.offsets}.values())
        with tqdm(total=len(keys), initial=len(keys) - len(missing), unit="record", dynamic_ncols=True) as bar:
            by = _by_threads(maker, missing, workers) if beam_options is None else _by_beam(job, missing, beam_options)
            for line in by:
                progress.append(line)
                bar.set_postfix_str(f"{progress.spent.paid} answers paid for", refresh=False)
                bar.update()
        return _finish(out, keys, progress)


def _by_threads(maker: Maker, indices: Iterable[int], workers: int) -> Iterator[str]:
    """Lines as they come. Whatever ends this ends the threads as well, at their next request."""
    waiting = collections.deque(indices)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        under_way: set[concurrent.futures.Future[str]] = set()
        try:
            while waiting or under_way:
                while waiting and len(under_way) < workers:
                    under_way.add(pool.submit(maker.line, waiting.popleft()))
                done, under_way = concurrent.futures.wait(under_way, return_when=concurrent.futures.FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            maker.client.close()


def _by_beam(job: Job, indices: list[int], options: str) -> Iterator[str]:
    try:
        from jstream.data.synthesis import beam
    except ModuleNotFoundError as error:
        raise ConfigError(f"beam: expected Apache Beam, found no {error.name}; pip install 'jstream[beam]'") from None
    return beam.lines(job, indices, options)


def _finish(out: pathlib.Path, keys: list[str], progress: Progress) -> Outcome:
    """Writes the lines of all keys as the files they are for, and removes the progress."""
    outcome, reason = Outcome(len(keys), 0, 0, progress.spent), "an empty file"
    names = [out, out.with_suffix(".skipped.jsonl")]
    partials = [path.with_name(path.name + ".partial") for path in names]
    with contextlib.ExitStack() as files:
        made, skipped = (
            files.enter_context(p.open("w", encoding="utf-8", errors="backslashreplace")) for p in partials
        )
        for index, key in enumerate(keys):
            line = progress[key]
            for record in line["made"]:
                made.write(json.dumps(record, ensure_ascii=False) + "\n")
                outcome.made += 1
            for reason in line["skipped"]:
                record = {"record": index, "video": line["video"], "why": reason}
                skipped.write(json.dumps(record, ensure_ascii=False) + "\n")
                outcome.skipped += 1
    if not outcome.made:
        partials.pop(0).unlink()
        names.pop(0)
    for partial, path in zip(partials, names, strict=True):
        partial.replace(path)
    progress.path.unlink(missing_ok=True)
    if not outcome.made:
        raise DialogueError(f"{out}: expected a record that something can be made of, found none: {reason}")
    return outcome
