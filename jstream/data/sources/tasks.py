"""Dialogues over annotated clips: what is asked about a video, what is said, and when, for each task.

Seconds stay as they were annotated, so a time that falls on the border of two turns belongs to the first, as in
Streamo's own conversion (`protocols.streamo.turns_of`). What is said of something that lasts to the end of its video is
said in the last second, or no turn would be left for it. Which of several wordings a query has depends on the video and
the task alone.
"""

import collections
import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from jstream.data.dialogue import Dialogue, Query, Response
from jstream.data.sources.clip import Clip, Event, Question, Record, Whole
from jstream.data.world.tasks import EVENT_CAPTION, NARRATION

ACTION_CAPTION = (
    "Describe each action when it is done.",
    "Say what is done, each time something is done.",
    "Caption every action.",
    "Name every step as soon as it is over.",
)
GROUNDING = (
    "Tell me when this happens: {}.",
    "Let me know from when to when this happens: {}.",
    "Watch for this and say when it was: {}.",
    "When does this happen: {}?",
)
_DURATION_ROUNDING = 0.01  # seconds: a last frame that would show less than this is not there

_Item = TypeVar("_Item")


@dataclasses.dataclass(frozen=True)
class Task:
    """What a task makes of a clip.

    Attributes:
        takes: whether a record is of use for it.
        say: the dialogues, from such records, in order of time, and their clip; video, task and source may be blank.
    """

    takes: Callable[[Record], bool]
    say: Callable[[Sequence[Any], Clip], Iterable[Dialogue]]


def dialogues_of(clip: Clip, task: str, source: str = "") -> list[Dialogue]:
    """The dialogues of a task over a repaired clip; none where it has nothing of use.

    Args:
        task: a key of `TASKS`.
        source: the name of the dataset.
    """
    records = [record for record in clip.records if TASKS[task].takes(record)]
    return [
        dataclasses.replace(
            said, video=clip.video, task=said.task or task, source=said.source or source, duration=clip.duration
        )
        for said in (TASKS[task].say(records, clip) if records else ())
    ]


def _dialogue(queries: Iterable[Query], responses: Iterable[Response]) -> Dialogue:
    given = lambda response: response.time if response.end is None else response.end + 1
    return Dialogue("", tuple(queries), tuple(sorted(responses, key=given)))


# ------------------------------------------------------------------------------------------- one query for the video


def _narration(events: Sequence[Event], clip: Clip) -> Iterator[Dialogue]:
    query = Query(_worded(NARRATION, clip.video), 0.0)
    yield _dialogue([query], (Response(event.text, time=_after(event.end, clip)) for event in events))


def _captions(wordings: Sequence[str], events: Sequence[Event], clip: Clip) -> Iterator[Dialogue]:
    query = Query(_worded(wordings, clip.video), 0.0)
    yield _dialogue([query], (_spanned(event.text, event, 0.0, clip) for event in events))


# ------------------------------------------------------------------------------------------ queries answered in turn


def _grounding(events: Sequence[Event], clip: Clip) -> Iterator[Dialogue]:
    """A query for each sentence, answered each time it has happened, before the next one is asked.

    Sentences whose times overlap are asked in different dialogues.
    """
    happens: dict[str, list[Event]] = collections.defaultdict(list)
    for event in dict.fromkeys(events):
        happens[event.text].append(event)
    until = lambda same: _after(max(event.end for event in same), clip)
    for lane in lanes(happens.values(), lambda same: (same[0].begin, until(same))):
        queries, responses, asked = [], [], 0.0
        for same in lane:
            text = same[0].text
            queries.append(Query(_worded(GROUNDING, clip.video, text).format(text.rstrip(".")), asked))
            responses += [_spanned(_when(event), event, asked, clip) for event in same]
            asked = until(same) + 1
        yield _dialogue(queries, responses)


def _answers(questions: Sequence[Question], clip: Clip) -> Iterator[Dialogue]:
    """Questions at their times. Those asked while another waits for its answer are in different dialogues."""
    said = [_asked_and_answered(question, clip) for question in questions]
    for lane in lanes(said, lambda pair: (pair[0].time, max(response.time or 0.0 for response in pair[1]))):
        yield _dialogue((query for query, _ in lane), (response for _, responses in lane for response in responses))


def _asked_and_answered(question: Question, clip: Clip) -> tuple[Query, list[Response]]:
    """With each answer at once where it is known already, or in the first turn that shows what it needs."""
    query = Query(question.text, min(question.time, _turns(clip)))
    at = lambda answer: query.time if answer.end <= question.time else _after(answer.end, clip)
    return query, [Response(answer.text, time=at(answer)) for answer in question.answers]


def lanes(items: Iterable[_Item], times: Callable[[_Item], tuple[float, float]]) -> list[list[_Item]]:
    """As few lists as can be, in each of which an item begins a second or more after the one before has ended.

    Args:
        times: (begin, end) of an item in seconds.
    """
    found: list[list[_Item]] = []
    free: list[float] = []  # of each lane: from when on
    for item in sorted(items, key=times):
        begin, end = times(item)
        lane = next((i for i, time in enumerate(free) if time <= begin), len(found))
        if lane == len(found):
            found.append([])
            free.append(0.0)
        found[lane].append(item)
        free[lane] = end + 1
    return found


# ------------------------------------------------------------------------------------------------- words and moments


def _worded(wordings: Sequence[str], *key: str) -> str:
    return wordings[zlib.crc32("\n".join(key).encode()) % len(wordings)]


def _turns(clip: Clip) -> float:
    """How many one-second turns a video has: the time of the last one."""
    return math.inf if clip.duration is None else max(1, math.ceil(clip.duration - _DURATION_ROUNDING))


def _after(end: float, clip: Clip) -> float:
    """The time of the turn after `end`, or of the last one."""
    return min(end + 1, _turns(clip))


def _spanned(text: str, event: Event, asked: float, clip: Clip) -> Response:
    """What is said of an event once it is over; one in progress when asked starts with the question."""
    last = _turns(clip) - 1
    if last < 1:  # a video of one turn
        return Response(text, time=1.0)
    end = min(event.end, last)
    return Response(text, start=min(max(event.begin, asked), end), end=end)


def _when(event: Event) -> str:
    """Its span in whole seconds: what a model can tell from frames one second apart."""
    start, end = math.floor(event.begin + 0.5), math.floor(event.end + 0.5)
    return f"From {start}s to {max(start + 1, end)}s."


# ------------------------------------------------------------------------------------------------ the table of tasks

_is_event = lambda record: isinstance(record, Event)
_is_span = lambda record: isinstance(record, Event) and record.start is not None
_is_due_at_once = lambda record: isinstance(record, Question) and not record.waits
_is_due_later = lambda record: isinstance(record, Question) and record.waits

TASKS: dict[str, Task] = {
    "narration": Task(_is_event, _narration),
    "event_caption": Task(_is_span, functools.partial(_captions, EVENT_CAPTION)),
    "action_caption": Task(_is_span, functools.partial(_captions, ACTION_CAPTION)),
    "grounding": Task(_is_span, _grounding),
    "qa": Task(_is_due_at_once, _answers),
    "time_sensitive_qa": Task(_is_due_later, _answers),
    "as_published": Task(lambda record: isinstance(record, Whole), lambda wholes, _: [w.dialogue for w in wholes]),
}
