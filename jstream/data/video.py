"""Videos as frames at a steady rate: the first stage of the one path.

`open_video` opens a file, a URL, a network stream or a camera; what is live is watched by `live.py`. Everything else is
a `Video`, which yields one `Frame` a tick, causally and in constant memory, and `paced` plays frames at the speed of a
clock. Decoding is in `decoding.py`; letterboxes are in `frames.py`, and how vision towers want pixels is their own.

How frames become ticks. Times are in seconds from the first presentation timestamp (pts). The frame of tick i, at
i / fps, is the newest one whose pts is at most 1 ms after the tick; the first to arrive in that millisecond settles the
tick, so that a live stream need not wait for the frame after it. A frame lasts until the next one, and the last frame
for its own duration (else as long as the one before, else 1 / average rate, else an instant): a clip of 2.0 s gives
ticks 0 and 1 at 1 fps, and ticks inside a pause repeat the newest frame. A frame whose pts is not later than the one
before is not newer and is not shown. Jumps forward by more than `MAX_GAP` or back by more than `MAX_STEP_BACK` seconds
are faults of the timestamps: time goes on from the newest frame.
"""

import math
import os
import pathlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from fractions import Fraction

from jstream.data.decoding import Decoder, TimedFrame, VideoError
from jstream.data.frames import Frame
from jstream.data.live import RECONNECT, LiveVideo, watch

TICK_TOLERANCE = Fraction(1, 1000)  # Matroska and FLV round timestamps to the millisecond


def open_video(
    source: str | int | pathlib.Path,
    fps: float | None = 1.0,
    stream: int | None = None,
    until: float | None = None,
    reconnect: float = RECONNECT,
) -> "Video | LiveVideo":
    """Opens a file, a network stream or a camera and decodes its first frame.

    Args:
        source: a path, `file:` and a path, or an http, https, rtsp or rtsps URL; a camera as its index (0 or "0") or
            its device (`/dev/video0`).
        fps: ticks a second, above 0 and at most 1000; None gives every frame at its own time.
        stream: the container's index of a video stream; FFmpeg's choice of the best one by default.
        until: seconds after which to end.
        reconnect: seconds for which a live source that was lost is tried again.

    Returns:
        An iterator of `Frame` that is also a context manager. It belongs to the process that opened it. A `LiveVideo`
        for cameras, RTSP, HTTP that pushes pictures and HLS playlists that are still growing, else a `Video`.

    Raises:
        VideoError: nothing there, not a video, no decodable frame, or too large a picture. Also while iterating, when
            a network stream breaks off, and where a live one does not come back.
    """
    if fps is not None and not 0 < fps <= 1000:  # also refuses nan; ticks are no closer than the tolerance
        raise VideoError(f"expected fps above 0 and at most 1000, found {fps}")
    decoder = Decoder(source, stream)
    if decoder.live:
        return watch(decoder, lambda: Decoder(source, stream), fps, until, reconnect)
    return Video(decoder, fps, until)


class Video:
    """Frames of an open source, one pass; see `open_video`. Leaving the `with` block or reaching the end closes it.

    Attributes:
        name: the source, without passwords.
        live: False.
        width, height: pixels of every frame, after rotation.
        duration: seconds as the header states it, or None.
        num_frames: how many frames to expect, for a progress bar, or None. A header can be wrong.
    """

    live = False

    def __init__(self, decoder: Decoder, fps: float | None = 1.0, until: float | None = None):
        self.name = decoder.name
        self._process = os.getpid()
        self._decoder = decoder
        frames = decoder.start()
        self.width, self.height = decoder.size
        self.duration = decoder.duration()
        self.num_frames = self._expected(fps, until)
        # The generator knows the decoder but not this object, so that dropping the last reference (a `break` out of
        # `for frame in open_video(...)`) frees the container at once.
        self._frames = _sample(decoder, frames, fps)
        self._until = math.inf if until is None else until

    def _expected(self, fps: float | None, until: float | None) -> int | None:
        rate = self._decoder.stream.average_rate if fps is None else fps
        if fps is None and until is None and self._decoder.stream.frames:
            return self._decoder.stream.frames
        seconds = min((end for end in (self.duration, until) if end is not None), default=None)
        if seconds is None or not rate:
            return None
        return max(1, math.ceil((seconds - float(TICK_TOLERANCE)) * float(rate)))

    @property
    def lost(self) -> int:
        """Damaged packets and frames skipped so far."""
        return self._decoder.lost

    @property
    def warnings(self) -> list[str]:
        """What was wrong so far, one line a kind."""
        lost = [f"{self.lost} damaged packets or frames skipped"] if self.lost else []
        return lost + [text.format(count) for text, count in self._decoder.notes.items()]

    @property
    def summary(self) -> str:
        """The warnings in one line."""
        return "; ".join(self.warnings) or "no damage found"

    def __iter__(self) -> "Video":
        return self

    def __next__(self) -> Frame:
        if os.getpid() != self._process:
            raise VideoError(f"{self._decoder.name}: opened in another process; open it in the worker that reads it")
        frame = next(self._frames)
        if frame.time >= self._until:
            self.close()
            raise StopIteration
        return frame

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Ends the iteration and closes the source; may be called twice, and from another thread."""
        self._decoder.stopping = True
        try:
            self._frames.close()
        except ValueError:  # another thread is inside a frame: it stops at the next packet and closes there
            return
        self._decoder.close()


def _sample(decoder: Decoder, frames: Iterator[TimedFrame], fps: float | None) -> Generator[Frame, None, None]:
    """Picks the frames that fall on ticks, and converts no other."""
    try:
        if fps is None:
            for instant, frame in frames:
                yield Frame(float(instant), decoder.to_rgb(frame))
            return
        period = 1 / Fraction(float(fps))
        _, newest = next(frames)
        image = decoder.to_rgb(newest)
        yield Frame(0.0, image)  # at once: a live stream may be long in bringing its second frame
        tick = 1
        for instant, frame in frames:
            while tick * period + TICK_TOLERANCE < instant:
                image = decoder.to_rgb(newest) if image is None else image
                yield Frame(float(tick * period), image)
                tick += 1
            newest, image = frame, None
            if tick * period <= instant:
                image = decoder.to_rgb(newest)
                yield Frame(float(tick * period), image)
                tick += 1
        while tick * period <= decoder.time + TICK_TOLERANCE or tick * period + TICK_TOLERANCE < decoder.end():
            image = decoder.to_rgb(newest) if image is None else image
            yield Frame(float(tick * period), image)
            tick += 1
    finally:
        decoder.close()


class Paced:
    """Plays frames at the speed of a clock, as a camera would: each no earlier than its time after the first one came.

    A consumer that is late gets the newest frame that is due, the older ones are dropped, the last one never is. A
    frame is handed on without waiting for the one after it, which a live source may not have yet: only where that one
    should be due as well, as far apart as the two before, is it looked at.

    Attributes:
        dropped: frames passed over so far.
    """

    def __init__(self, frames: Iterable[Frame], clock: Callable[[], float], sleep: Callable[[float], None]):
        self._frames, self._clock, self._sleep = iter(frames), clock, sleep
        self._start: float | None = None
        self._ahead: Frame | None = None
        self._last, self._interval = 0.0, math.inf  # the newest frame's time, and how long after the one before
        self.dropped = 0

    def __iter__(self) -> "Paced":
        return self

    def __next__(self) -> Frame:
        frame, self._ahead = self._ahead or self._read(), None
        if frame is None:
            raise StopIteration
        if self._start is None:
            self._start = self._clock()
        while self._clock() - self._start >= frame.time + self._interval:
            self._ahead = self._read()
            if self._ahead is None or self._ahead.time > self._clock() - self._start:
                break
            self.dropped += 1
            frame, self._ahead = self._ahead, None
        wait = self._start + frame.time - self._clock()
        if wait > 0:
            self._sleep(wait)
        return frame

    def _read(self) -> Frame | None:
        frame = next(self._frames, None)
        if frame is not None:
            self._interval = frame.time - self._last or math.inf
            self._last = frame.time
        return frame


def paced(
    frames: Iterable[Frame], clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> Paced:
    """`Paced` frames; the clock gives seconds, and `sleep` waits for as many."""
    return Paced(frames, clock, sleep)
