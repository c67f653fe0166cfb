"""A model sits an exam: many questions at once, each in a stream of its own in one engine.

    questions → places of the engine ← a thread for each that decodes its video
                    └ what is said goes back to the question, which asks on or is done; the next takes its place

A question whose video is missing, breaks, or stands still fails alone, and the others go on. What is answered does not
depend on who sits beside whom, but for the last bits of a float.
"""

import collections
import copy
import dataclasses
import itertools
import math
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jstream.data.prepare.videos import Folder
from jstream.data.video import Frame, VideoError, open_video
from jstream.errors import UserError
from jstream.evals.exam import Asking, Question, Said, Watch
from jstream.protocols.protocol import RESPONSE, SILENCE, StreamProtocol
from jstream.streaming.engine import LOOKS, Engine
from jstream.streaming.event import Event
from jstream.streaming.stream import MAX_QUERY

PATIENCE = 300.0  # seconds of waiting for a frame after which its video counts as broken
_QUEUED = LOOKS  # frames of a stream that are decoded ahead
_CLOSING = 2.0  # seconds for a thread to end
_POLL = 0.5  # seconds after which a wait looks up
_SOON = 1e-3  # seconds by which a frame may be early, as sampled times are


class Done(NamedTuple):
    """A question that is over.

    Attributes:
        answer: as the question gives it; None where it failed.
        failure: why, or None.
        short: whether a video ended before what was to be seen of it.
    """

    question: str
    answer: Any
    failure: str | None
    short: bool


@dataclasses.dataclass
class Clock:
    """Where the time went, in seconds, and how much was done in it.

    Attributes:
        decode: of the threads that decode, all together.
        model: in steps of the engine.
        waited: with nothing to do but wait for frames.
    """

    decode: float = 0.0
    model: float = 0.0
    waited: float = 0.0
    frames: int = 0
    questions: int = 0
    compiled: float = 0.0


def _heard_first(protocol: StreamProtocol, forced: bool) -> StreamProtocol:
    """The protocol of one stream that says nothing before it is asked.

    Args:
        forced: whether it replies to a question in its turn, and at no other time; else it decides from there on.
    """
    own, heard = protocol.decide, False

    def decide(scores, threshold=None, asked=False) -> int:
        nonlocal heard
        heard = heard or asked
        if forced:
            return RESPONSE if asked else SILENCE
        return own(scores, threshold, asked) if heard else SILENCE

    protocol = copy.copy(protocol)
    protocol.decide = decide  # type: ignore[method-assign]
    return protocol


# ------------------------------------------------------------------------------------------------------------- decoding


class Shown(NamedTuple):
    """A frame on its way to the engine, and whether the question is heard with it."""

    frame: Frame
    asks: bool


def frames_of(
    path: pathlib.Path,
    watch: Watch,
    fps: float,
    keeps: int | None = None,
    alive: Callable[[float], None] = lambda _: None,
) -> Iterator[Shown]:
    """The frames of a watch, their times on its own clock.

    Args:
        keeps: frames that an answer depends on, where the others need not be shown; None for all.
        alive: is told the seconds of every frame that was decoded.

    Raises:
        VideoError: the video cannot be read, or ends before the watch begins.
    """
    until = max(watch.until, watch.start + 1 / fps)

    def decoded() -> Iterator[Frame]:
        with open_video(path, fps, until=until) as video:
            while True:
                began = time.perf_counter()
                frame = next(video, None)
                alive(time.perf_counter() - began)
                if frame is None:
                    return
                if frame.time >= watch.start - _SOON:
                    yield dataclasses.replace(frame, time=max(frame.time - watch.start, 0.0))

    frames: Iterator[Frame] = decoded()
    if keeps is not None and watch.forced:
        frames = iter(collections.deque(frames, keeps + 1))  # the towers of some models look at the frame before, too
    held, asked, at = None, False, watch.at - watch.start
    for frame in itertools.chain(frames, [None]):
        if held is not None:
            asks = not asked and (held.time >= at - _SOON or frame is None)
            asked = asked or asks
            yield Shown(held, asks)
        held = frame
    if not asked:
        raise VideoError(f"{path}: expected a video of more than {watch.start:g} s, found the end of it")


class _Feed:
    """A thread that decodes the frames of a watch, and what of them waits; `changed` guards it all."""

    def __init__(self, frames: Callable[[Callable[[float], None]], Iterator[Shown]], changed: threading.Condition):
        self.waiting: collections.deque[Shown] = collections.deque()
        self.failure: Exception | None = None
        self.ended = self.stopping = False
        self.decode = self.idle = 0.0  # seconds: spent decoding, and since the last frame was decoded or taken
        self._changed = changed
        self.thread = threading.Thread(target=self._run, args=(frames,), daemon=True)
        self.thread.start()

    def _alive(self, spent: float) -> None:
        self.decode, self.idle = self.decode + spent, 0.0
        if self.stopping:
            raise VideoError("stopped")

    def _run(self, frames: Callable[[Callable[[float], None]], Iterator[Shown]]) -> None:
        failure = None
        try:
            for shown in frames(self._alive):
                with self._changed:
                    self._changed.wait_for(lambda: len(self.waiting) < _QUEUED or self.stopping)
                    self.waiting.append(shown)
                    self._changed.notify_all()
        except Exception as error:  # a thread has nobody to tell
            failure = error
        with self._changed:
            self.failure, self.ended = failure, True
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self.stopping = True
            self._changed.notify_all()

    @property
    def stuck(self) -> bool:
        return not self.ended and not self.waiting and self.idle > PATIENCE


# -------------------------------------------------------------------------------------------------------------- sitting


@dataclasses.dataclass
class _Sitting:
    """A question at a place of the engine, in one of its watches; `last` is the time of the newest frame."""

    name: str
    path: pathlib.Path
    asking: Asking
    watch: Watch
    feed: _Feed
    said: list[Said] = dataclasses.field(default_factory=list)
    last: float = 0.0
    short: bool = False


def sit(engine: Engine, questions: Mapping[str, Question], folder: Folder, fps: float, clock: Clock) -> Iterator[Done]:
    """Has a model answer questions, as many at once as the engine has places.

    Args:
        engine: nothing else steps it meanwhile.
        folder: where the videos lie.
        clock: is added to.

    Returns:
        Each question when it is done, in no order.
    """
    changed = threading.Condition()
    # frames that a forced answer depends on: all, where their traces stay in the cache
    keeps = None if engine.memory.words else engine.memory.turns
    waiting = collections.deque(questions.items())
    sittings: dict[int, _Sitting] = {}

    def admit(name: str, path: pathlib.Path, asking: Asking, watch: Watch, short: bool) -> None:
        feed = _Feed(lambda alive: frames_of(path, watch, fps, keeps, alive), changed)
        place = engine.open(protocol=_heard_first(engine.model.protocol, watch.forced))
        sittings[place] = _Sitting(name, path, asking, watch, feed, short=short)

    def leave(place: int) -> _Sitting:
        sitting = sittings.pop(place)
        sitting.feed.stop()
        clock.decode += sitting.feed.decode
        if place in engine.places:
            engine.close(place)
        return sitting

    def fail(place: int, error: Exception) -> Done:
        sitting = leave(place)
        return Done(sitting.name, None, told(error, sitting.path), sitting.short)

    def finish(place: int) -> Done | None:
        """Tells a question what was said; it is over, or has another stream."""
        sitting = leave(place)
        watch, short = sitting.watch, sitting.short
        ends = [watch.at] if watch.first and sitting.said and not watch.forced else [watch.at, watch.until]
        wanted = max([int(end) for end in ends if math.isfinite(end)], default=0)
        short = short or sitting.last + watch.start + 1 / fps < wanted
        try:
            following = sitting.asking.send(sitting.said)
        except StopIteration as end:
            return Done(sitting.name, end.value, None, short)
        admit(sitting.name, sitting.path, sitting.asking, following, short)
        return None

    try:
        while waiting or sittings:
            while waiting and len(sittings) < engine.streams:
                name, question = waiting.popleft()
                found = folder.find(question.video)
                if isinstance(found, str):
                    yield Done(name, None, f"{question.video}: {found}", False)
                    continue
                asking = question.begin()
                try:
                    admit(name, found, asking, next(asking), False)
                except StopIteration as end:  # it has nothing to ask
                    yield Done(name, end.value, None, False)
            over: list[Done | None] = []
            with changed:
                began = turned = time.perf_counter()
                if sittings and not engine.busy:
                    changed.wait_for(lambda: any(s.feed.waiting or s.feed.ended for s in sittings.values()), _POLL)
                clock.waited += time.perf_counter() - began
                for s in sittings.values():
                    s.feed.idle = 0.0 if s.feed.waiting else s.feed.idle
                taken = [
                    (place, s.feed.waiting.popleft())
                    for place, s in sittings.items()
                    if s.feed.waiting and engine.queued(place) < LOOKS
                ]
                changed.notify_all()
            for place, shown in taken:
                try:
                    engine.see(place, shown.frame, _pieces(sittings[place].watch.ask) if shown.asks else ())
                    sittings[place].last = shown.frame.time
                except ValueError as error:  # the question does not fit into the cache
                    over.append(fail(place, error))
            began = time.perf_counter()
            events = engine.step()
            clock.model += time.perf_counter() - began
            for place, event in sorted(events, key=lambda ended: isinstance(ended[1], Event)):  # a free place first
                if not isinstance(event, Event):
                    over.append(fail(place, event))
                    continue
                clock.frames += 1
                sitting = sittings[place]
                if event.text and event.text.strip():
                    sitting.said.append(Said(event.time + sitting.watch.start, event.text.strip()))
                    if sitting.watch.first:
                        over.append(finish(place))
            for place, sitting in list(sittings.items()):
                feed = sitting.feed
                feed.idle += min(time.perf_counter() - turned, 2 * _POLL)  # not the time that this process was stopped
                if feed.stuck:
                    over.append(fail(place, VideoError(f"expected a frame within {PATIENCE:g} s, found none")))
                elif feed.ended and not feed.waiting and not engine.waits(place):
                    over.append(fail(place, feed.failure) if feed.failure else finish(place))
            for done in over:
                if done is not None:
                    clock.questions += 1
                    yield done
    finally:
        for sitting in [leave(place) for place in list(sittings)]:
            sitting.feed.thread.join(_CLOSING)


def told(error: Exception, path: str | pathlib.Path) -> str:
    """An error in one line, the video by its name alone."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".replace(str(path), pathlib.Path(path).name).split())


def _pieces(text: str) -> list[str]:
    """A prompt in pieces that a stream takes as questions; they are heard together, a line each."""
    pieces = []
    while len(text) > MAX_QUERY:
        cut = max(text.rfind("\n", 1, MAX_QUERY), 0) or max(text.rfind(" ", 1, MAX_QUERY), 0) or MAX_QUERY
        pieces.append(text[:cut])
        text = text[cut:].lstrip()
    return [piece for piece in (*pieces, text) if piece.strip()]
