"""Live sources: cameras, RTSP, growing playlists. The newest picture at every tick, and a connection that comes back.

A thread (`_Reader`) decodes all the time and keeps one picture, the newest. `LiveVideo` hands it out at the ticks of
the wall clock, which begins with the first frame handed out: timestamps jump when a connection is renewed, and what
counts is when something was seen. As with files, a tick without a newer picture repeats the last one. Whoever is late
gets the newest picture at once, under the tick that has passed last; the others are counted.

A connection that ends, breaks, or brings no data for `NETWORK_TIMEOUT` seconds is lost. While it is, no frame is handed
out; it is tried again after half a second, then after twice as long each time up to eight, until it is back or its time
is up. The end of a stream cannot be told from a loss, except for a playlist that says so when it is opened again.
"""

import collections
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np

from jstream.data.decoding import NETWORK_TIMEOUT, Decoder, TimedFrame, VideoError
from jstream.data.frames import Frame

RECONNECT = 60.0  # seconds for which a lost source is tried again
FIRST_DELAY, LONGEST_DELAY = 0.5, 8.0  # seconds before the first attempt, and before the late ones
JITTER = 0.25  # of a delay, at most, is added by chance: many watchers of one server should not come back at once
LONGEST_HOLD = 10.0  # seconds; a playlist that leaps further has lost what was between
MAX_GAPS = 100  # reports that wait for a consumer that is busy
CLOSING = 1.0  # seconds for the thread to end by itself; it may stand in a read until that times out


class Clock:
    """The time as live sources know it."""

    def now(self) -> float:
        """Seconds."""
        return time.monotonic()

    def wait(self, changed: threading.Condition, seconds: float | None) -> None:
        """Waits for a notice on a condition that is held, or until so many seconds are over."""
        changed.wait(seconds)


@dataclass(frozen=True)
class Gap:
    """A time without pictures, as it is reported when it begins and again when it is over.

    Attributes:
        time: seconds of the stream at its last picture.
        reason: why the connection was lost.
        seconds: from that picture to the next; None while there is none.
    """

    time: float
    reason: str
    seconds: float | None

    def __str__(self) -> str:
        if self.seconds is None:
            return f"{self.time:7.1f}s  gap       {self.reason}; connecting again"
        return f"{self.time + self.seconds:7.1f}s  gap       over after {self.seconds:.1f} s"


class _Picture(NamedTuple):
    frame: av.VideoFrame
    decoder: Decoder  # makes the image of it


class _Loss(NamedTuple):
    """A gap by the clock: the last picture, when it was noticed, the next picture."""

    since: float
    noticed: float
    over: float | None
    reason: str


def delays(jitter: Callable[[], float] = random.random) -> Iterator[float]:
    """Seconds to wait before each attempt to connect; `jitter` gives numbers in [0, 1)."""
    delay = FIRST_DELAY
    while True:
        yield delay * (1 + JITTER * jitter())
        delay = min(2 * delay, LONGEST_DELAY)


class _Reader:
    """The thread's side: the connection, and the newest picture. What both sides see is guarded by `changed`.

    Attributes:
        newest: the picture to show; None while there is none.
        untaken: nobody has taken it yet.
        losses: what the consumer has not been told yet.
        end: why there will be no more: `ended`, `lost` or `closed`; None while there may be.
        error: what to raise at that end.
        heard: when something last happened, by the clock.
        overwritten: pictures that were replaced before anybody took them.
        reconnects, missing: how often the connection came back, and seconds without pictures before it did.
    """

    def __init__(
        self,
        decoder: Decoder,
        connect: Callable[[], Decoder],
        reconnect: float = RECONNECT,
        clock: Clock | None = None,
        jitter: Callable[[], float] = random.random,
    ):
        self.clock = clock or Clock()
        self.changed = threading.Condition()
        self.newest: _Picture | None = None
        self.untaken = False
        self.losses: collections.deque[_Loss] = collections.deque(maxlen=MAX_GAPS)
        self.end: str | None = None
        self.error: BaseException | None = None
        self.overwritten = self.reconnects = 0
        self.missing = 0.0
        self.heard = self.clock.now()
        self.lost, self.notes = 0, collections.Counter()  # of the connections before this one
        self.reconnect = reconnect
        self.decoder = decoder
        self._connect, self._jitter = connect, jitter
        self._frames: Iterator[TimedFrame] = decoder.start()
        self.size = decoder.size
        self._loss: _Loss | None = None
        self._last = self.heard  # when the newest picture came

    def run(self) -> None:
        """Reads until the end; the thread's whole life."""
        try:
            while (reason := self._watch()) is not None and self._come_back(reason):
                pass
        except BaseException as error:  # a thread has nobody to tell
            self._finish("lost", error)
        finally:
            self.decoder.close()

    def stop(self) -> None:
        """Ends the reading soon; from any thread."""
        with self.changed:
            self.decoder.stopping = True
            self._finish("closed")

    def _finish(self, end: str, error: BaseException | None = None) -> None:
        with self.changed:
            if self.end is None:
                self.end, self.error, self.newest = end, error, None
            self.changed.notify_all()

    def _watch(self) -> str | None:
        """Shows pictures for as long as the connection holds; why it does not, or None where nothing more is wanted."""
        began = self.clock.now()
        base = None  # what the clock showed at the start of the playlist
        try:
            for instant, frame in self._frames:
                if not self.decoder.arrives:
                    base = self._hold(base, float(instant))
                if self.end is not None:
                    return None
                self._show(frame)
        except VideoError as error:
            return None if self.end is not None else error.reason or str(error)
        if self.end is not None:
            return None
        length = self.decoder.duration()  # of a recording that is played to us
        if length is not None and self.clock.now() - began >= length - 1:
            self._finish("ended")
            return None
        return "the stream broke off"

    def _hold(self, base: float | None, instant: float) -> float:
        """Waits until a frame of a playlist is due: its segments come at once, and are meant to last."""
        with self.changed:
            if base is None or base + instant - self.clock.now() > LONGEST_HOLD:
                return self.clock.now() - instant
            while self.end is None and (wait := base + instant - self.clock.now()) > 0:
                self.clock.wait(self.changed, wait)
        return base

    def _show(self, frame: av.VideoFrame) -> None:
        with self.changed:
            self.heard = self._last = self.clock.now()
            if self._loss is not None:
                self.reconnects += 1
                self.missing += self.heard - self._loss.since
                self.losses.append(self._loss._replace(over=self.heard))
                self._loss = None
            self.overwritten += self.untaken
            self.newest, self.untaken = _Picture(frame, self.decoder), True
            self.changed.notify_all()

    def _come_back(self, reason: str) -> bool:
        """Connects again; False where that is over."""
        noticed = self._lose(reason)
        for delay in delays(self._jitter):
            self._leave()
            with self.changed:
                wanted = min(self.clock.now() + delay, noticed + self.reconnect)
                while self.end is None and (wait := wanted - self.clock.now()) > 0:
                    self.clock.wait(self.changed, wait)
            if self.end is not None:
                return False
            if self.clock.now() >= noticed + self.reconnect:
                self.give_up(reason)
                return False
            try:
                self.decoder = self._connect()
                if not self.decoder.live:  # a playlist that has an end by now
                    self._finish("ended")
                    return False
                self._frames = self.decoder.start(self.size)
                return True
            except VideoError as error:
                reason = error.reason or str(error)
            self.heard = self.clock.now()
        return False

    def _lose(self, reason: str) -> float:
        """Takes the picture away and reports a gap; the time by the clock."""
        with self.changed:
            self.newest, self.untaken = None, False
            self._loss = _Loss(self._last, self.clock.now(), None, reason)
            self.losses.append(self._loss)
            self.changed.notify_all()
        return self._loss.noticed

    def _leave(self) -> None:
        """Closes a connection, and keeps count of its damage."""
        self.decoder.close()
        self.lost += self.decoder.lost
        self.notes.update(self.decoder.notes)
        self.decoder.lost = 0
        self.decoder.notes.clear()

    def give_up(self, reason: str) -> None:
        self._finish(
            "lost",
            VideoError(
                f"{self.decoder.name}: expected the stream back within {self.reconnect:g} s, found {reason}; check the "
                "source and the network, or allow it more time",
                reason,
            ),
        )


class LiveVideo:
    """Frames of a live source as they come; see `open_video`. Leaving the `with` block closes it.

    Args:
        reader: the thread's side.
        fps: ticks a second; None hands out every picture that is newer, at the time it came.
        until: seconds after which to end.
        thread: runs the reader.

    Attributes:
        name: the source, without passwords.
        live: True.
        width, height: pixels of every frame, after rotation.
        duration: None.
        num_frames: how many frames to expect at most, or None.
        dropped: frames that were passed over because nobody asked for them in time.
        on_gap: called with a `Gap` when one begins and when it is over, by whoever iterates.
    """

    live = True
    duration = None

    def __init__(
        self,
        reader: _Reader,
        fps: float | None = 1.0,
        until: float | None = None,
        thread: threading.Thread | None = None,
    ):
        self._reader, self._clock, self._thread = reader, reader.clock, thread
        self._process = os.getpid()
        self.name = reader.decoder.name
        self.width, self.height = reader.size
        self._period = None if fps is None else 1 / Fraction(float(fps))
        self._until = math.inf if until is None else until
        self.num_frames = None if fps is None or until is None else max(1, math.ceil(until * fps - 1e-6))
        self.dropped = 0
        self.on_gap: Callable[[Gap], object] = lambda gap: None
        self._start: float | None = None  # by the clock
        self._tick = 0  # the next one
        self._blank = 0  # ticks since the last frame that had no picture to show
        self._shown: tuple[_Picture, np.ndarray] | None = None
        self._raised = False

    @property
    def end(self) -> str | None:
        """Why there are no more frames: `ended` by its server, `lost`, or `closed`, by the reader or by `until`."""
        return self._reader.end

    @property
    def reconnects(self) -> int:
        """How often the connection was lost and came back."""
        return self._reader.reconnects

    @property
    def lost(self) -> int:
        """Damaged packets and frames skipped so far."""
        return self._reader.lost + self._reader.decoder.lost

    @property
    def warnings(self) -> list[str]:
        """What was wrong so far, one line a kind."""
        lost = [f"{self.lost} damaged packets or frames skipped"] if self.lost else []
        notes = self._reader.notes + self._reader.decoder.notes
        missing = f"reconnects: {self.reconnects} ({self._reader.missing:.1f} s without pictures)"
        return lost + [text.format(count) for text, count in notes.items()] + [missing] * bool(self.reconnects)

    @property
    def summary(self) -> str:
        """The warnings in one line."""
        return "; ".join(self.warnings) or "no damage found"

    def __iter__(self) -> "LiveVideo":
        return self

    def __next__(self) -> Frame:
        if os.getpid() != self._process:
            raise VideoError(f"{self.name}: opened in another process; open it in the worker that reads it")
        while True:
            with self._reader.changed:
                loss = self._reader.losses.popleft() if self._reader.losses else None
                if loss is None:
                    if self._reader.end is not None:
                        break
                    due = self._due()
            if loss is not None:
                self._tell(loss)
            elif due is not None:
                return Frame(due[0], self._image(due[1]))
        if self._reader.error is not None and not self._raised:
            self._raised = True
            raise self._reader.error
        raise StopIteration

    def _due(self) -> tuple[float, _Picture] | None:
        """The frame to hand out now; waits a while and gives None where there is none yet."""
        reader, now = self._reader, self._clock.now()
        picture = reader.newest
        passed = 0.0 if self._start is None else now - self._start
        if self._period is None:
            instant, wait = passed, None if reader.untaken else math.inf
        else:
            tick = max(self._tick, self._tick_at(passed))
            instant = float(tick * self._period)
            wait = instant - passed if instant - passed > 1e-6 else None
        if instant >= self._until:
            reader.stop()
            return None
        if picture is None or wait is not None:
            # A source may be stuck where no timeout holds, as cameras can be.
            patience = reader.heard + reader.reconnect + 2 * NETWORK_TIMEOUT - now
            if patience <= 0:
                reader.give_up("nothing at all")
                return None
            ends = (math.inf if wait is None else wait, self._until - passed, patience)
            self._clock.wait(reader.changed, min(ends))
            return None
        if self._start is None:
            self._start, reader.overwritten, self._blank = now, 0, 0
        elif self._period is None:
            self.dropped, reader.overwritten = self.dropped + reader.overwritten, 0
        else:
            self.dropped += max(0, tick - self._tick - self._blank)
            self._blank = 0
        if self._period is not None:
            self._tick = tick + 1
        reader.untaken = False
        return instant, picture

    def _tick_at(self, passed: float) -> int:
        """The newest tick that is due."""
        return math.floor((Fraction(passed) + Fraction(1, 10**6)) / self._period) if self._period else 0

    def _tell(self, loss: _Loss) -> None:
        start = loss.since if self._start is None else self._start
        seconds = None if loss.over is None else loss.over - loss.since
        if loss.over is not None:
            self._blank += self._tick_at(loss.over - start) - self._tick_at(loss.noticed - start)
        self.on_gap(Gap(max(0.0, loss.since - start), loss.reason, seconds))

    def _image(self, picture: _Picture) -> np.ndarray:
        """[H, W, 3] uint8; made once for a picture that is shown again."""
        if self._shown is None or self._shown[0] is not picture:
            self._shown = picture, picture.decoder.to_rgb(picture.frame)
        return self._shown[1]

    def __enter__(self) -> "LiveVideo":
        return self

    def __exit__(self, *_):
        self.close()

    def stop(self) -> None:
        """Ends the iteration soon; from any thread, and without waiting."""
        self._reader.stop()

    def close(self):
        """Ends the iteration and closes the source; may be called twice, and from another thread."""
        self.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(CLOSING)

    def __del__(self):
        if os.getpid() == self._process:  # another one has no thread, and the lock may be held for ever
            self._reader.stop()  # the thread does not know this object, and would keep the connection


def watch(
    decoder: Decoder, connect: Callable[[], Decoder], fps: float | None, until: float | None, reconnect: float
) -> LiveVideo:
    """Begins to read a live source.

    Args:
        decoder: the open source.
        connect: opens it again.
        fps, until, reconnect: see `open_video`.
    """
    reader = _Reader(decoder, connect, reconnect)
    thread = threading.Thread(target=reader.run, name="live source", daemon=True)
    thread.start()
    return LiveVideo(reader, fps, until, thread)
