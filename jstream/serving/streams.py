"""`ServedStream`: what the server knows of one stream: what it was asked, what it has said, and its figures.

The hub hands its frames to the engine and writes down what comes of them; clients read. Whatever several threads touch
is guarded by `lock`. Nothing here knows of the network or of the device.
"""

import collections
import json
import secrets
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from jstream.data.frames import Frame
from jstream.data.live import Gap
from jstream.serving.limits import Limits, Refused
from jstream.serving.log import Log
from jstream.streaming.event import Event
from jstream.streaming.recording import captions

LATENCIES = 1000  # the newest ones, of which quantiles are told


class Query(NamedTuple):
    """A question, and where its answers are to be posted."""

    text: str
    webhook: str | None = None


class Waiting(NamedTuple):
    """A frame on its way through the engine: its time, what is heard with it, and when it came by `perf_counter`."""

    time: float
    asked: tuple[Query, ...]
    since: float


def quantile(values: list[float], share: float) -> float:
    """Of values in any order: the smallest that at least so many of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


class ServedStream:
    """One stream, from its opening until it is forgotten.

    Args:
        source: where its frames come from, without passwords; `live` for those of a client.
        fps, threshold, memory: as the engine was told.
        limits: of the server.
        on_answer: called after each frame's event, and at the end.

    Attributes:
        id: not to be guessed.
        log: of events and notices.
        end: why it ended; None while it runs.
        closing: why it will end with the last frame that waits; None otherwise.
        waiting: frames that the engine has and has not answered, oldest first.
        picture: the newest one of a source.
        hooks: queries with a webhook that have been heard, by their number.
        used, capacity: tokens in its cache.
    """

    def __init__(
        self,
        source: str,
        fps: float,
        threshold: float | None,
        memory: str,
        limits: Limits,
        on_answer: Callable[[], object] = lambda: None,
    ):
        self.id = secrets.token_hex(8)
        self.source, self.fps, self.threshold, self.memory = source, fps, threshold, memory
        self.limits, self.on_answer = limits, on_answer
        self.created = time.time()
        self.lock = threading.Lock()
        self.log = Log(limits.history)
        self.end: str | None = None
        self.ended_at = 0.0  # by `time.monotonic`
        self.closing: str | None = None
        self.waiting: collections.deque[Waiting] = collections.deque()
        self.latencies: collections.deque[float] = collections.deque(maxlen=LATENCIES)
        self.spoken: collections.deque[Event] = collections.deque(maxlen=limits.replies)
        self.hooks: dict[int, Query] = {}
        self.time: float | None = None
        self.events = self.replies = self.dropped = self.reconnects = 0
        self.used, self.capacity = 0, 0
        self.picture: Frame | None = None
        self._asked: list[Query] = []  # to be heard with the next frame
        self._asked_tokens = 0  # of these
        self._queries = 0  # so far
        self._webhooks = 0

    # ------------------------------------------------------------------------------------------------------ questions

    def ask(self, query: Query, tokens: Callable[[str], int], room: int) -> None:
        """Keeps a question for the next frame.

        Args:
            tokens: of a question.
            room: tokens of all that wait.

        Raises:
            Refused: 409 after the end, 422 for an empty or too long one, 429 for too many.
        """
        try:
            size = tokens(query.text)
        except ValueError as error:
            raise Refused(422, str(error)) from None
        with self.lock:
            if self.end is not None or self.closing is not None:
                raise Refused(409, f"expected a stream that runs, found one that has ended: {self.end or self.closing}")
            if len(self._asked) >= self.limits.queries:
                raise Refused(
                    429, f"expected at most {self.limits.queries} questions to wait for the next frame, found one more"
                )
            if self._asked_tokens + size > room:
                raise Refused(429, f"expected at most {room} tokens of questions for one frame, found more")
            if query.webhook is not None:
                if self._webhooks >= self.limits.queries:
                    raise Refused(429, f"expected at most {self.limits.queries} webhooks of a stream, found one more")
                self._webhooks += 1
            self._asked.append(query._replace(text=query.text.strip()))
            self._asked_tokens += size

    def take(self, frame_time: float, since: float) -> Waiting | None:
        """Counts a frame as waiting, with what is to be heard with it; None where too many wait already."""
        with self.lock:
            if len(self.waiting) >= self.limits.queued:
                return None
            asked, self._asked, self._asked_tokens = tuple(self._asked), [], 0
            one = Waiting(frame_time, asked, since)
            self.waiting.append(one)
        return one

    # --------------------------------------------------------------------------------------------------- what is said

    def answer(self, event: Event) -> list[tuple[int, Query]]:
        """Writes down the event of the oldest frame that waits; the queries with a webhook that a reply goes to."""
        now = time.perf_counter()
        with self.lock:
            one = self.waiting.popleft()
            self.latencies.append(now - one.since)
            self.time = event.time
            self.events += 1
            for query in one.asked:
                self._queries += 1
                if query.webhook is not None:
                    self.hooks[self._queries] = query
            if event.text:
                self.replies += 1
                self.spoken.append(event)
        for query in one.asked:
            self.note("asked", text=query.text, time=round(one.time, 3))
        self.log.add(event.to_json())
        return list(self.hooks.items()) if event.text else []

    def note(self, kind: str, **fields: object) -> None:
        """Adds a notice to the log."""
        self.log.add(json.dumps({"type": kind, **fields}, ensure_ascii=False), kind)

    def drop(self, frame_time: float, count: int) -> None:
        """Frames up to one of this time are not seen."""
        with self.lock:
            self.dropped += count
        self.note("dropped", time=round(frame_time, 3), total=self.dropped)

    def note_gap(self, gap: Gap) -> None:
        """A source has lost its connection, or has it again."""
        if gap.seconds is not None:
            self.reconnects += 1
        seconds = None if gap.seconds is None else round(gap.seconds, 3)
        self.note("gap", time=round(gap.time, 3), reason=gap.reason, seconds=seconds)

    def finish(self, reason: str) -> None:
        """Writes down the end; once."""
        with self.lock:
            if self.end is not None:
                return
            self.end, self.ended_at = reason, time.monotonic()
            self.waiting.clear()
        ended = {"type": "ended", "reason": reason, "events": self.events}
        self.log.add(json.dumps(ended, ensure_ascii=False), "ended", last=True)
        self.picture = None
        self.on_answer()

    def captions(self) -> str:
        """WebVTT of the replies that are kept."""
        with self.lock:
            spoken = list(self.spoken)
        return captions(spoken)

    def quantiles(self) -> dict[str, float] | None:
        """p50 and p99 of the newest latencies from a frame's arrival to its event, in milliseconds."""
        with self.lock:
            values = list(self.latencies)
        return {f"p{p}": round(1000 * quantile(values, p / 100), 3) for p in (50, 99)} if values else None
