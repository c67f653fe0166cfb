"""Chats made from offline annotations, by the scheme of VideoLLM-online (arXiv 2406.11816, section 3.2).

Notes on a video are rewritten to plain second person. One to three queries about the past, the present or the future
are put at random times; each is answered at once, as a live stream must, and at *every* later change of state, from the
notes on what has begun by then. An answer that only repeats the last one to its query is left out, and answers that
fall into one frame are said in one reply.

As in the released generation (repository showlab/videollm-online, `data/livechat/`), states change where a segment
begins and where it ends, a chat that lasts less than 60 or more than 3600 seconds or gives away a time is dropped, and
one begins up to 20 frames before its first query. So that a model learns to trust the video rather than its own words
(`data/stream.py` there), some chats get a wrong or a missed answer, put right a few frames later; the fault itself is
not learned.
"""

import dataclasses
import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jstream.data.prepared import MAX_FRAMES
from jstream.data.synthesis import prompts
from jstream.data.synthesis.asking import Ask, Dropped, one_line, some
from jstream.data.synthesis.source import AnnotatedVideo, Segment
from jstream.protocols.live import PUBLISHED_FPS

MIN_SECONDS, MAX_SECONDS = 60, 3600
MAX_QUERIES = 3
MAX_WAITING = 20  # frames before the first query
MAX_DELAY = 4  # frames from a fault to its correction

_LEAK = re.compile(r"\bseconds?\b|\b\d+(\.\d+)?\s*(s|secs?)\b|\b\d+:\d\d\b", re.IGNORECASE)


@dataclasses.dataclass
class Moment:
    """What is said behind one frame."""

    query: str | None = None
    reply: str | None = None


def live_chats(
    source: AnnotatedVideo, ask: Ask, rng: random.Random, faults: float = 0.3, max_frames: int = MAX_FRAMES
) -> dict[str, Any]:
    """One chat over a video.

    Args:
        source: its segments are notes.
        faults: share of chats with a fault.
        max_frames: of a chat; what training would cut off is not paid for.

    Returns:
        A record with `video`, `conversation`, `start` and `fps`; see `data.annotations`.

    Raises:
        Dropped: there is too little to talk about, or what a model gave cannot be used.
    """
    if not source.segments:
        raise Dropped("expected annotated segments, found none")
    frames_of = lambda segment: (_frame(segment.start), _frame(segment.end))
    changes = sorted({frame for segment in source.segments for frame in frames_of(segment)})
    queries = _draw_queries(changes, rng)
    seconds = (changes[-1] - min(queries)) / PUBLISHED_FPS
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise Dropped(f"expected a chat of {MIN_SECONDS} to {MAX_SECONDS} s, found {seconds:g} s")
    first = max(0, min(queries) - rng.randint(0, MAX_WAITING))
    queries = {frame: query for frame, query in queries.items() if frame < first + max_frames}
    changes = [frame for frame in changes if frame < first + max_frames]

    notes = ask.lines(prompts.REWRITE, [segment.text for segment in source.segments])
    moments = {frame: Moment(query=query) for frame, query in queries.items()}
    for asked, query in sorted(queries.items()):
        last = None
        for frame in [asked, *(frame for frame in changes if frame > asked)]:
            answer = ask(
                prompts.CHAT_ANSWER, check=some("answer"), notes=_notes(source.segments, notes, frame), query=query
            )
            text = one_line(answer["answer"])
            if leak := _LEAK.search(text):
                raise Dropped(f"an answer leaks a time, {leak[0]!r}: {text[:120]!r}")
            if text != last:
                moment = moments.setdefault(frame, Moment())
                moment.reply = text if moment.reply is None else f"{moment.reply} {text}"
            last = text

    fault = _draw_fault(moments, rng) if rng.random() < faults else None
    conversation = _conversation(moments, first, fault)
    return {"video": source.name, "fps": PUBLISHED_FPS, "start": first / PUBLISHED_FPS, "conversation": conversation}


def _frame(time: float) -> int:
    """The frame in which a time falls, by the rule of `protocols.streamo.turns_of`."""
    return max(0, math.ceil(time * PUBLISHED_FPS - 1e-6) - 1)


def _draw_queries(changes: Sequence[int], rng: random.Random) -> dict[int, str]:
    """Queries at frames of their own, each with a change of state behind it."""
    if changes[-1] == changes[0]:
        raise Dropped("expected states that change, found one alone")
    number = rng.randint(1, min(MAX_QUERIES, changes[-1] - changes[0]))
    frames = sorted(rng.sample(range(changes[0], changes[-1]), number))
    return {frame: rng.choice(rng.choice((prompts.PAST, prompts.PRESENT, prompts.FUTURE))) for frame in frames}


def _notes(segments: Sequence[Segment], notes: Sequence[str], frame: int) -> str:
    """What has begun by a frame."""
    begun = [(note, _frame(s.end) > frame) for s, note in zip(segments, notes, strict=True) if _frame(s.start) <= frame]
    lines = [f"- {note}{prompts.STILL_GOING_ON * going_on}" for note, going_on in begun]
    return "\n".join(lines) or prompts.NOTHING_YET


# --------------------------------------------------------------------------------------------------- laid over frames


@dataclasses.dataclass(frozen=True)
class _Fault:
    """A reply that goes wrong at a frame: other words, or none; `delay` frames later it is put right."""

    frame: int
    said: str | None
    right: str
    delay: int


def _draw_fault(moments: Mapping[int, Moment], rng: random.Random) -> _Fault | None:
    """Of a reply with frames behind it to put it right in; a query's own frame always has an answer, maybe a wrong
    one. None where there is no such reply."""
    frames = sorted(moments)
    free = {frame: later - frame - 1 for frame, later in zip(frames, frames[1:])}
    options = [frame for frame in free if free[frame] and moments[frame].reply is not None]
    if not options:
        return None
    frame = rng.choice(options)
    right = moments[frame].reply or ""
    others = sorted({m.reply for m in moments.values() if m.reply is not None} - {right})
    missed = moments[frame].query is None and (not others or rng.random() < 0.5)
    if not missed and not others:
        return None
    said = None if missed else rng.choice(others)
    correction = right if missed else rng.choice(prompts.CORRECTIONS).format(right)
    return _Fault(frame, said, correction, rng.randint(1, min(MAX_DELAY, free[frame])))


def _conversation(moments: Mapping[int, Moment], first: int, fault: _Fault | None) -> list[dict[str, Any]]:
    """Messages from the frame `first` on. Not learned: the frame of a query, which no one can foresee; a missed answer,
    and silence in place of its correction; wrong words."""
    said = dict(moments)
    unlearned = {frame for frame, moment in moments.items() if moment.query is not None}
    if fault is not None:
        late = fault.frame + fault.delay
        said[fault.frame] = Moment(moments[fault.frame].query, fault.said)
        said[late] = Moment(reply=fault.right)
        unlearned |= set(range(fault.frame + (fault.said is not None), late))
    messages: list[dict[str, Any]] = []
    begin = first
    for frame in sorted(said):
        messages += _stream(begin, frame + 1, unlearned)
        begin, moment = frame + 1, said[frame]
        if moment.query is not None:
            messages.append({"role": "user", "content": moment.query})
        if moment.reply is not None:
            learn = fault is None or frame != fault.frame
            messages.append({"role": "assistant", "content": moment.reply, "learn": learn})
    return messages


def _stream(begin: int, end: int, unlearned: set[int]) -> list[dict[str, Any]]:
    """Frames begin … end − 1 as few messages: in each, those that are learned come first."""
    messages: list[dict[str, Any]] = []
    for frame in range(begin, end):
        learn = frame not in unlearned
        last = messages[-1] if messages else None
        if last is None or (learn and last["learn"] < last["num_frames"]):
            messages.append(last := {"role": "stream", "num_frames": 0, "learn": 0})
        last["num_frames"] += 1
        last["learn"] += learn
    return messages
