"""What all annotated videos come down to: clips with events and questions, and how faulty ones are mended or left out.

A source (one file beside this one) reads its format into `Clip`s and judges nothing. `repair` does, by the same rules
for all of them, and `Counts` holds what became of every record; `tasks.py` then makes dialogues of what is left.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jstream.data.dialogue import Dialogue

_ROUNDING = 1e-6  # seconds: a time that is a sum of fractions is not past the end of its video
_SLACK = 1.0  # seconds: moments are stamped in whole seconds, and may lie so far past the end of their video


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happens.

    Attributes:
        text: what; "" where the file has none.
        start: seconds since the start of the video; None for something told of a moment.
        end: seconds; the moment, where there is no start. NaN where the file has no number.
        repairs: what the source had to mend in it.
        fault: why it is of no use, where the source knows already.
    """

    text: str
    start: float | None
    end: float
    repairs: tuple[str, ...] = ()
    fault: str = ""

    @property
    def begin(self) -> float:
        """Seconds."""
        return self.end if self.start is None else self.start


@dataclasses.dataclass(frozen=True)
class Question:
    """Something that is asked.

    Attributes:
        text: with its options, where it has some.
        time: seconds at which it is asked.
        answers: what to say; `end` is when that can be known. An answer that is known before is due at once.
        repairs, fault: as of an event.
    """

    text: str
    time: float
    answers: tuple[Event, ...]
    repairs: tuple[str, ...] = ()
    fault: str = ""

    @property
    def begin(self) -> float:
        """Seconds."""
        return self.time

    @property
    def waits(self) -> bool:
        """Whether any answer can only be known later."""
        return any(answer.end > self.time for answer in self.answers)


@dataclasses.dataclass(frozen=True)
class Whole:
    """A dialogue that is one already, with a task of its own.

    Attributes:
        repairs, fault: as of an event.
    """

    dialogue: Dialogue
    repairs: tuple[str, ...] = ()
    fault: str = ""
    begin: float = 0.0


Record = Event | Question | Whole


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video with what is annotated in it.

    Attributes:
        video: as its annotations name it: an identifier, a file name or a relative path.
        duration: seconds, or None.
        records: the smallest units of the file, in its order; after `repair` in order of time.
    """

    video: str
    duration: float | None
    records: tuple[Record, ...]


def by_video(rows: Iterable[tuple[str, float | None, Record]]) -> Iterator[Clip]:
    """One clip for each video, in order of the first, from rows of (video, duration, record)."""
    durations: dict[str, float | None] = {}
    records: dict[str, list[Record]] = {}
    for video, duration, record in rows:
        durations.setdefault(video, duration)
        records.setdefault(video, []).append(record)
    for video, of_video in records.items():
        yield Clip(video, durations[video], tuple(of_video))


@dataclasses.dataclass
class Counts:
    """What became of the records of a source: kept + repaired + all dropped = total.

    Attributes:
        total: records read.
        kept: of them, as they were.
        repaired: of them, with at least one repair.
        dropped: of them, by reason.
        repairs: how often each rule was applied; a record may need several.
        videos: clips, by what was seen in them that is no fault of a record.
        dialogues: made of the records, by task.
        left_out: videos whose records were dropped with them, and why.
    """

    total: int = 0
    kept: int = 0
    repaired: int = 0
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    repairs: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    videos: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    dialogues: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    def keep(self, rules: set[str]) -> None:
        """Counts a record that is of use once these rules were applied."""
        self.repaired += bool(rules)
        self.kept += not rules
        self.repairs.update(rules)

    def leave_out(self, clip: Clip, reason: str) -> None:
        """Counts all records of a clip whose video is of no use."""
        self.total += len(clip.records)
        self.dropped.update(record.fault or reason for record in clip.records)
        self.left_out[clip.video] = reason

    def __str__(self) -> str:
        dropped = sum(self.dropped.values())
        lines = [f"{self.total} records: {self.kept} kept, {self.repaired} repaired, {dropped} dropped"]
        for name in ("repairs", "dropped", "videos", "dialogues"):
            numbers = getattr(self, name).most_common()
            lines += [f"  {name:<10}{number:>8}  {what}" for what, number in numbers if number]
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- the repairs
# The rules, in the words of the counts.

OUTER_BLANKS = "blanks around the text: removed"
INNER_BLANKS = "several blanks in a row: made one"
EARLY = "begins before the video: moved to its start"
LATE = "ends after the video: moved to its end"

NO_TEXT = "no text"
NO_TIME = "a time is no number"
EMPTY = "ends at or before its start"
OUTSIDE = "begins after the end of the video"
NO_ANSWER = "no answer"
AGAIN = "the same as another"
UNWANTED = "of no use for the tasks asked for"

_Repaired = tuple[Any, set[str]] | str  # the record with the rules that were applied, or why it is of no use


def repair(clip: Clip, counts: Counts, wanted: Callable[[Any], bool] = lambda record: True) -> Clip:
    """The clip with the records that are of use, in order of time; `counts` takes what became of each.

    Args:
        wanted: whether any task takes a record.
    """
    counts.total += len(clip.records)
    _look_over(clip, counts)
    duration = clip.duration if clip.duration is not None and 0 < clip.duration < math.inf else None
    records: dict[Record, None] = {}
    for record in clip.records:
        found = record.fault or _JUDGES[type(record)](record, duration)
        if not isinstance(found, str):
            found = AGAIN if found[0] in records else found if wanted(found[0]) else UNWANTED
        if isinstance(found, str):
            counts.dropped[found] += 1
        else:
            records[found[0]] = None
            counts.keep(found[1] | set(record.repairs))
    return Clip(clip.video, duration, tuple(sorted(records, key=lambda record: record.begin)))


def _look_over(clip: Clip, counts: Counts) -> None:
    counts.videos["read"] += 1
    spans = [(r.start, r.end) for r in clip.records if isinstance(r, Event) and r.start is not None]
    in_order = sorted(spans)
    counts.videos["with events out of order, which are sorted"] += spans != in_order
    overlap = any(first[1] > second[0] for first, second in itertools.pairwise(in_order))
    counts.videos["with events that overlap, which is left so"] += overlap


def _event(event: Event, duration: float | None) -> _Repaired:
    text, rules = _text(event.text)
    if not text:
        return NO_TEXT
    if not math.isfinite(event.begin) or not math.isfinite(event.end):
        return NO_TIME
    if event.start is not None and event.end <= max(event.start, 0):
        return EMPTY
    if duration is not None and event.begin >= duration + (_SLACK if event.start is None else 0):
        return OUTSIDE
    start = None if event.start is None else _within(event.start, duration, rules)
    return Event(text, start, _within(event.end, duration, rules)), rules


def _question(question: Question, duration: float | None) -> _Repaired:
    text, rules = _text(question.text)
    if not text:
        return NO_TEXT
    if not math.isfinite(question.time):
        return NO_TIME
    if duration is not None and question.time >= duration + _SLACK:
        return OUTSIDE
    answers = []
    for answer in question.answers:
        found = _event(answer, duration)
        if isinstance(found, str):
            return f"an answer: {found}"
        answers.append(found[0])
        rules |= found[1]
    if not answers:
        return NO_ANSWER
    answers.sort(key=lambda answer: answer.end)
    return Question(text, _within(question.time, duration, rules), tuple(answers)), rules


def _whole(whole: Whole, duration: float | None) -> _Repaired:
    spans = [(r.start, r.end) for r in whole.dialogue.responses if r.start is not None and r.end is not None]
    return EMPTY if any(end < start for start, end in spans) else (whole, set())


_JUDGES: dict[type, Callable[[Any, float | None], _Repaired]] = {Event: _event, Question: _question, Whole: _whole}


def _within(time: float, duration: float | None, rules: set[str]) -> float:
    if time < 0:
        rules.add(EARLY)
    elif duration is not None and time > duration + _ROUNDING:
        rules.add(LATE)
    return max(0.0, time if duration is None else min(time, duration))


def _text(text: str) -> tuple[str, set[str]]:
    """Without superfluous blanks; lines stay lines."""
    stripped = text.strip()
    squeezed = "\n".join(" ".join(line.split()) for line in stripped.splitlines())
    changed = {OUTER_BLANKS: stripped != text, INNER_BLANKS: squeezed != stripped}
    return squeezed, {rule for rule, applies in changed.items() if applies}
