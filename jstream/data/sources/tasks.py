"""Dialogues over annotated clips: what is asked about a video, what is said, and when, for each task.

Seconds stay as they were annotated, so a time that falls on the border of two turns belongs to the first, as in
Streamo's own conversion (`protocols.streamo.turns_of`). What is said of something that lasts to the end of its video is
said in the last second, or no turn would be left for it. Which of several wordings a query has depends on its event
alone: the same annotations give the same dialogues.
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
_MARGIN = 0.01  # seconds before the end of a video, which may be a little earlier than its annotations say

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
    return Dialogue("", tuple(queries), tuple(sorted(responses, key=lambda response: response.given)))


# ------------------------------------------------------------------------------------------- one query for the video


def _narration(events: Sequence[Event], clip: Clip) -> Iterator[Dialogue]:
    query = Query(_worded(NARRATION, events[0]), 0.0)
    yield _dialogue([query], (Response(event.text, time=_after(event.end, clip)) for event in events))


def _captions(wordings: Sequence[str], events: Sequence[Event], clip: Clip) -> Iterator[Dialogue]:
    query = Query(_worded(wordings, events[0]), 0.0)
    yield _dialogue([query], (_spanned(event.text, event, clip) for event in events))


# ------------------------------------------------------------------------------------------ queries answered in turn


def _grounding(events: Sequence[Event], clip: Clip) -> Iterator[Dialogue]:
    """A query for each sentence, answered each time it has happened, before the next one is asked.

    Sentences whose times overlap are asked in different dialogues.
    """
    happens: dict[str, list[Event]] = collections.defaultdict(list)
    for event in events:
        happens[event.text].append(event)
    until = lambda same: _after(max(event.end for event in same), clip)
    for lane in lanes(happens.values(), lambda same: (same[0].begin, until(same))):
        queries, responses, asked = [], [], 0.0
        for same in lane:
            queries.append(Query(_worded(GROUNDING, same[0]).format(same[0].text.rstrip(".")), asked))
            responses += [_spanned(_when(event), event, clip) for event in same]
            asked = round(until(same) + 1, 6)
        yield _dialogue(queries, responses)


def _answers(questions: Sequence[Question], clip: Clip) -> Iterator[Dialogue]:
    """Questions at their times. Those asked while another waits for its answer are in different dialogues."""
    said = [_asked_and_answered(question, clip) for question in questions]
    for lane in lanes(said, lambda pair: (pair[0].time, max(response.time or 0.0 for response in pair[1]))):
        yield _dialogue((query for query, _ in lane), (response for _, responses in lane for response in responses))


def _asked_and_answered(question: Question, clip: Clip) -> tuple[Query, list[Response]]:
    """With each answer at once where it is known already, or in the first turn that shows what it needs."""
    query = Query(question.text, min(question.time, _last(clip)))
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


def _worded(wordings: Sequence[str], first: Event) -> str:
    return wordings[zlib.crc32(f"{first.text}{first.begin}".encode(errors="replace")) % len(wordings)]


def _last(clip: Clip) -> float:
    """A time in the last turn of a video, at any frame rate."""
    return math.inf if clip.duration is None else max(clip.duration - _MARGIN, 0.0)


def _after(end: float, clip: Clip) -> float:
    """A time in the turn after `end`, or in the last one."""
    return round(min(end + 1, _last(clip)), 6)  # sums of fractions do not show


def _spanned(text: str, event: Event, clip: Clip) -> Response:
    """What is said of an event once it is over."""
    last = round(_last(clip) - 1, 6)  # second that leaves a turn for the reply
    if last <= 0:
        return Response(text, time=_last(clip))
    end = min(event.end, last)
    return Response(text, start=min(event.begin, end), end=end)


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
