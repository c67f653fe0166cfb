"""`Hub`: the thread that owns the engine, which steps the streams of any number of clients and sources.

    WebSocket ─ frames ─┐                            ┌→ the stream's log → WebSocket, server-sent events
    source's thread ────┴→ see → inbox → engine.step ┤
                                                     └→ on_reply → webhooks

Everybody else hands over work and goes on: nothing here waits for a client. Streams join and leave between two steps.
The model is loaded by the same thread, so that the server answers from its first second on.
"""

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence

from jstream.data.frames import Frame
from jstream.errors import UserError
from jstream.serving.limits import Limits, Refused
from jstream.serving.streams import Query, ServedStream, quantile
from jstream.streaming.engine import Engine
from jstream.streaming.event import Event
from jstream.streaming.memory import parse_narrower

LOGGER = logging.getLogger(__name__)
NEWEST = 2000  # latencies of all streams, of which quantiles are told
FAULT = "a fault of the server"
CLOSED = "closed"  # why a stream ends that is wanted no more
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Status:
    """How far the server is.

    Attributes:
        state: `loading`, `ready`, `failed` or `stopped`.
        stage, done, total: what it is at, and how far.
        error: why it failed.
    """

    state: str = "loading"
    stage: str = "starting"
    done: int = 0
    total: int = 0
    error: str | None = None


class Hub:
    """All streams of a server.

    Args:
        make_engine: opens the model; told how to say how far it is.
        limits: of the server; the engine has to hold `limits.queued` frames of a stream.
        on_reply: called with the stream, the number of the event, the query and the event for every reply that a
            webhook waits for. It must not wait.

    Attributes:
        engine: once it is ready.
        status: how far it is.
        began: by `time.monotonic`.
        frames, replies, dropped, opened: so far, of all streams.
    """

    def __init__(
        self,
        make_engine: Callable[[Progress], Engine],
        limits: Limits | None = None,
        on_reply: Callable[[ServedStream, int, int, Query, Event], object] = lambda *_: None,
    ):
        self.limits = limits or Limits()
        self._make, self._on_reply = make_engine, on_reply
        self.engine: Engine | None = None
        self.status = Status()
        self.began = time.monotonic()
        self.ready_after: float | None = None
        self.frames = self.replies = self.dropped = self.opened = 0
        self.latencies: collections.deque[float] = collections.deque(maxlen=NEWEST)
        self._changed = threading.Condition()
        self._inbox: list[tuple[ServedStream, Callable[[Engine], object]]] = []
        self._stopping = False
        self._streams: dict[str, ServedStream] = {}
        self._places: dict[str, int] = {}  # of the engine, by the stream's id; the hub's thread alone
        self._of_place: dict[int, ServedStream] = {}
        self._running = 0  # streams that have a place, or will
        self._thread = threading.Thread(target=self._live, name="hub", daemon=True)

    # ------------------------------------------------------------------------------------ from any thread: all at once

    def start(self) -> None:
        self._thread.start()

    @property
    def seconds(self) -> float:
        """That loading has taken, so far or in all."""
        return time.monotonic() - self.began if self.ready_after is None else self.ready_after

    def stop(self, seconds: float = 10.0) -> None:
        """Ends all streams and the thread, which may be compiling."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(seconds)
        for stream in self.streams():
            stream.finish("the server has stopped")

    @property
    def free(self) -> int:
        """Places for streams."""
        return 0 if self.engine is None else self.engine.streams - self._running

    @property
    def states(self) -> list[str]:
        """Of the model's protocol."""
        protocol = self.ready().model.protocol
        return list(protocol.probs([1.0] * len(protocol.decision_ids)))

    def ready(self) -> Engine:
        """The engine.

        Raises:
            Refused: 503 while there is none.
        """
        if self.status.state == "ready" and self.engine is not None:
            return self.engine
        if self.status.state == "failed":
            raise Refused(503, f"the model could not be loaded: {self.status.error}")
        raise Refused(503, "expected a model that is ready, found one that is being loaded; try again in some seconds")

    def open(
        self, source: str, fps: float, threshold: float | None, memory: str | None, queries: Sequence[Query] = ()
    ) -> ServedStream:
        """Begins a stream, with what is to be heard with its first frame.

        Args:
            source: see `ServedStream`.
            threshold, memory: the engine's where they are None.

        Raises:
            Refused: 503 without a model, 422 for too many frames a second, 429 where all places are taken; as `ask`.
            ConfigError: for a memory that is not the engine's.
        """
        engine = self.ready()
        if fps > self.limits.fps:
            raise Refused(422, f"expected at most {self.limits.fps:g} frames a second, found {fps:g}")
        threshold = engine.threshold if threshold is None else threshold
        stream = self._place(engine, ServedStream(source, fps, threshold, memory or str(engine.memory), self.limits))
        try:
            for query in queries:
                self.ask(stream, query)
        except Refused as refused:
            self.end(stream, str(refused))
            raise
        return stream

    def _place(self, engine: Engine, stream: ServedStream) -> ServedStream:
        """Gives a stream a place in the engine."""
        settings = {"fps": stream.fps, "threshold": stream.threshold, "memory": stream.memory}
        parse_narrower(stream.memory, engine.memory)
        stream.capacity = engine.capacity
        with self._changed:
            if self._running >= engine.streams:
                raise Refused(
                    429, f"expected a free place, found all {engine.streams} taken; close a stream, or try later"
                )
            self._running += 1
            self.opened += 1
            self._streams[stream.id] = stream
            self._forget()

            def begin(engine: Engine) -> None:
                place = engine.open(**settings)
                self._places[stream.id], self._of_place[place] = place, stream

            self._inbox.append((stream, begin))
            self._changed.notify_all()
        return stream

    def streams(self) -> list[ServedStream]:
        """Those that run, and those that have ended not long ago."""
        with self._changed:
            self._forget()
            return list(self._streams.values())

    def find(self, name: str) -> ServedStream | None:
        with self._changed:
            self._forget()
            return self._streams.get(name)

    def ask(self, stream: ServedStream, query: Query) -> None:
        """Says something to a stream; it is heard with its next frame.

        Raises:
            Refused: see `ServedStream.ask`.
        """
        engine = self.ready()
        stream.ask(query, engine.tokens_of_question, engine.question_room)

    def see(self, stream: ServedStream, frame: Frame, since: float) -> bool:
        """Hands a frame over; False where it is dropped, as too many wait.

        Args:
            since: when it came, by `time.perf_counter`.
        """
        one = stream.take(frame.time, since)
        if one is None:
            self.drop(stream, frame.time)
            return False
        texts = [query.text for query in one.asked]
        self._hand_over(stream, lambda engine: engine.see(self._places[stream.id], frame, texts))
        return True

    def drop(self, stream: ServedStream, frame_time: float, count: int = 1) -> None:
        """Counts frames up to one of this time as not seen."""
        with self._changed:
            self.dropped += count
        stream.drop(frame_time, count)

    def set_threshold(self, stream: ServedStream, threshold: float | None) -> None:
        """When to speak, from the next decision on."""
        stream.threshold = threshold
        self._hand_over(stream, lambda engine: engine.set_threshold(self._places[stream.id], threshold))

    def end(self, stream: ServedStream, reason: str, at_once: bool = True) -> None:
        """Ends a stream, or has it end when all that waits is seen."""

        def finish(_: Engine) -> None:
            if at_once or not stream.waiting:
                self._end(stream, reason)
            else:
                stream.closing = reason

        self._hand_over(stream, finish)

    def quantiles(self) -> dict[float, float] | None:
        """Of the newest latencies of all streams, from a frame's arrival to its event; seconds."""
        values = list(self.latencies)
        return {share: quantile(values, share) for share in (0.5, 0.99)} if values else None

    def _hand_over(self, stream: ServedStream, work: Callable[[Engine], object]) -> None:
        with self._changed:
            self._inbox.append((stream, work))
            self._changed.notify_all()

    def _look_up(self) -> None:
        """Has the thread see what has changed."""
        with self._changed:
            self._changed.notify_all()

    def _forget(self) -> None:
        """Drops streams that ended long ago, or that are too many."""
        ended = [stream for stream in self._streams.values() if stream.end is not None]
        old = [stream for stream in ended if time.monotonic() - stream.ended_at > self.limits.ended_seconds]
        for stream in {one.id: one for one in (*old, *ended[: max(0, len(ended) - self.limits.ended)])}.values():
            del self._streams[stream.id]

    # ----------------------------------------------------------------------------------------------- the hub's thread

    def _live(self) -> None:
        """The thread's whole life."""

        def progress(stage: str, done: int, total: int) -> None:
            self.status = Status("loading", stage, done, total)

        try:
            self.engine = engine = self._make(progress)
            self.ready_after = time.monotonic() - self.began
            self.status = Status("ready", "ready")
            while not self._stopping:
                self._turn(engine)
            self.status = Status("stopped", "stopped")
        except Exception as error:  # a thread has nobody to tell
            if not isinstance(error, UserError | OSError):
                LOGGER.exception("the engine has failed")
            self.status = Status("failed", "failed", error=" ".join(str(error).split())[:500] or type(error).__name__)
            for stream in self.streams():
                stream.finish(FAULT)

    def _turn(self, engine: Engine) -> None:
        """Takes what came in, steps once, and tells what came of it."""
        with self._changed:
            while not self._inbox and not self._stopping and not engine.ready:
                self._changed.wait()
            inbox, self._inbox = self._inbox, []
        for stream, work in inbox:
            if stream.end is None:
                self._do(stream, engine, work)
        for place, what in engine.step(self._look_up):
            stream = self._of_place[place]
            if isinstance(what, Event):
                self._do(stream, engine, lambda engine, stream=stream, event=what: self._tell(engine, stream, event))
            else:  # the engine has closed it
                self._leave(stream)
                stream.finish(str(what))

    def _do(self, stream: ServedStream, engine: Engine, work: Callable[[Engine], object]) -> None:
        """Does something for a stream; where it fails, that stream ends alone."""
        try:
            work(engine)
        except Exception:
            LOGGER.exception("stream %s has failed", stream.id)
            self._end(stream, FAULT)

    def _tell(self, engine: Engine, stream: ServedStream, event: Event) -> None:
        hooks = stream.answer(event)
        stream.used = engine.used(self._places[stream.id])
        self.frames += 1
        self.replies += bool(event.text)
        self.latencies.append(stream.latencies[-1])
        for number, query in hooks:
            self._on_reply(stream, stream.events, number, query, event)
        stream.on_answer()
        if stream.closing is not None and not stream.waiting:
            self._end(stream, stream.closing)

    def _end(self, stream: ServedStream, reason: str) -> None:
        if stream.end is not None:
            return
        place = self._places.get(stream.id)
        if place is not None and self.engine is not None:
            self.engine.close(place)
        self._leave(stream)
        stream.finish(reason)

    def _leave(self, stream: ServedStream) -> None:
        """Gives the place of a stream back."""
        place = self._places.pop(stream.id, None)
        if place is not None:
            del self._of_place[place]
        with self._changed:
            self._running -= 1
