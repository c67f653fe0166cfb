"""Video files and network streams as frames at a steady rate: the first stage of the one path.

`open_video` decodes a file or URL through PyAV and yields one `Frame` a tick, causally and in constant memory;
`letterbox` makes a frame square and `paced` plays frames at the speed of a clock. Cameras, reconnecting and the
normalisation of pixels for a vision tower live elsewhere.

How frames become ticks. Times are in seconds from the first presentation timestamp (pts). The frame of tick i, at
i / fps, is the newest one whose pts is at most 1 ms after the tick; the first to arrive in that millisecond settles the
tick, so that a live stream need not wait for the frame after it. A frame lasts until the next one, and the last frame
for its own duration (else as long as the one before, else 1 / average rate, else an instant): a clip of 2.0 s gives
ticks 0 and 1 at 1 fps, and ticks inside a pause repeat the newest frame. A frame whose pts is not later than the one
before is not newer and is not shown. Jumps forward by more than `MAX_GAP` or back by more than `MAX_STEP_BACK` seconds
are faults of the timestamps: time goes on from the newest frame.

What the pixels are. 8-bit RGB as swscale makes it: the stream's matrix and range are honoured (BT.601 where it states
none, as FFmpeg has it), alpha is dropped, HDR is not tone-mapped, interlacing and non-square pixels stay as they are.
Rotation and mirroring are applied. The first frame fixes the geometry; later frames of another size are scaled to it.
"""

import collections
import itertools
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.error import EOFError as EndOfStream
from av.error import FFmpegError
from av.stream import Disposition
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

TICK_TOLERANCE = Fraction(1, 1000)  # Matroska and FLV round timestamps to the millisecond
MAX_GAP = 3600  # seconds; a longer pause is a corrupt timestamp, and would repeat one picture for every tick in it
MAX_STEP_BACK = 10  # seconds; FFmpeg's own threshold (dts_delta_threshold) for a stream that has restarted
FALLBACK_RATE = 25  # frames a second, FFmpeg's choice for streams that state no rate
MAX_PIXELS = 64 * 2**20  # twice an 8K frame; a damaged or hostile header can claim 2^31, and RGB takes 3 bytes of each
TWO_THREADS_FROM = 1920 * 1080 + 1  # pixels; below, one thread keeps up and fails on damage in the same way every time
MAX_READ_ERRORS = 32  # in a row: the reader then stands still and the rest is given up
MAX_BLIND_PACKETS = 10_000  # without one picture: minutes of video
TRUNCATED = 0.5  # seconds missing from the duration that the header states before it is worth a warning
# For metadata that is not UTF-8; PyAV 19 opens such files by itself.
_LENIENT: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
NETWORK_TIMEOUT = 10.0  # seconds without an answer or data

# Containers that hold their own video. Formats that open other files or devices, or that turn any text into a picture
# (concat, image2, lavfi, tty, ...), are never probed; playlists only where they come from the network and stay there.
# Audio formats are listed to say "no video stream" rather than "unknown format".
FILE_FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,gif,apng,h263,h264,hevc,vvc,m4v,mjpeg,ivf,obu,"
    "dv,mxf,nut,rm,wtv,vc1,dirac,yuv4mpegpipe,wav,mp3,flac,aac"
)
NETWORK_FORMATS = FILE_FORMATS + ",hls,rtsp,mpjpeg"
PROTOCOLS = {  # by scheme of the source: what it, and whatever it refers to, may open
    "file": "file",
    "http": "http,https,httpproxy,tls,tcp,crypto",
    "https": "https,httpproxy,tls,tcp,crypto",
    "rtsp": "rtsp,rtp,udp,tcp",
}
# Bit-exact, so that a frame does not depend on the processor; full chroma, or 4:4:4 would lose half of its columns.
RGB_FLAGS = int(
    Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
)
TimedFrame = tuple[Fraction, av.VideoFrame]  # seconds from the first pts


class VideoError(Exception):
    """A source that cannot be opened or read on; one line: what was expected, what was found, what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True)
class Frame:
    """One sampled picture.

    Attributes:
        time: seconds since the first frame of the source; the time of the tick (of the frame itself at native rate).
        image: [H, W, 3] uint8 RGB, read-only: ticks that repeat a picture share it.
    """

    time: float
    image: np.ndarray


def open_video(source: str | pathlib.Path, fps: float | None = 1.0, stream: int | None = None) -> "Video":
    """Opens a file or a network stream and decodes its first frame.

    Args:
        source: a path, `file:` and a path, or an http, https or rtsp URL.
        fps: ticks a second, above 0 and at most 1000; None gives every frame at its own time.
        stream: the container's index of a video stream; FFmpeg's choice of the best one by default.

    Returns:
        An iterator of `Frame` that is also a context manager. It belongs to the process that opened it.

    Raises:
        VideoError: nothing there, not a video, no decodable frame, or too large a picture. Also while iterating, when
            a network stream breaks off.
    """
    return Video(source, fps, stream)


class Video:
    """Frames of an open source, one pass; see `open_video`. Leaving the `with` block or reaching the end closes it.

    Attributes:
        source: as given.
        width, height: pixels of every frame, after rotation.
        duration: seconds as the header states it, or None.
        num_frames: how many frames to expect, for a progress bar, or None. A header can be wrong.
    """

    def __init__(self, source: str | pathlib.Path, fps: float | None = 1.0, stream: int | None = None):
        if fps is not None and not 0 < fps <= 1000:  # also refuses nan; ticks are no closer than the tolerance
            raise VideoError(f"expected fps above 0 and at most 1000, found {fps}")
        self.source = source
        self._process = os.getpid()
        self._decoder = _Decoder(source, stream)
        try:
            frames = self._decoder.frames()
            first = next(frames, None)
            if first is None:
                raise VideoError(
                    f"{self._decoder.name}: expected a video, found no frame that decodes "
                    f"({self._decoder.lost} packets failed); convert it if it plays elsewhere: it is corrupt, or has "
                    f"more than {MAX_PIXELS} pixels a frame"
                )
            self.width, self.height = self._decoder.fix_geometry(first[1])
            self.duration = self._decoder.duration()
            self.num_frames = self._expected(fps)
        except BaseException:
            self._decoder.close()
            raise
        # The generator knows the decoder but not this object, so that dropping the last reference (a `break` out of
        # `for frame in open_video(...)`) frees the container at once.
        self._frames = _sample(self._decoder, itertools.chain([first], frames), fps)

    def _expected(self, fps: float | None) -> int | None:
        rate = self._decoder.stream.average_rate if fps is None else fps
        if fps is None and self._decoder.stream.frames:
            return self._decoder.stream.frames
        if self.duration is None or not rate:
            return None
        return max(1, math.ceil((self.duration - float(TICK_TOLERANCE)) * float(rate)))

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
        return next(self._frames)

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


def _sample(decoder: "_Decoder", frames: Iterator[TimedFrame], fps: float | None) -> Generator[Frame, None, None]:
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


class _Decoder:
    """A container, its clock and its damage.

    Attributes:
        time: seconds from the first pts to the newest frame.
        lost: packets and frames skipped as damaged.
        notes: how often each other fault occurred, by message.
        stopping: set to end `frames` early.
    """

    def __init__(self, source: str | pathlib.Path, stream: int | None):
        self.name, url, scheme = _resolve(source)
        self.network = scheme != "file"
        self.time: Fraction = Fraction(0)
        self._origin: Fraction | None = None  # seconds of the first pts in the stream's own time, moved by every jump
        self._last_duration: Fraction | None = None
        self._last_delta: Fraction | None = None
        self.lost = 0
        self.notes = collections.Counter()
        self.stopping = False
        options = {
            "protocol_whitelist": PROTOCOLS[scheme],
            "format_whitelist": NETWORK_FORMATS if self.network else FILE_FORMATS,
            "max_pixels": str(MAX_PIXELS),
        }
        if scheme == "rtsp":
            options["rtsp_transport"] = "tcp"  # UDP loses packets, and passes few firewalls
        try:
            # The timeout holds for opening, and for every read after it.
            self.container = av.open(
                url, options=options, timeout=NETWORK_TIMEOUT if self.network else None, **_LENIENT
            )
        except (FFmpegError, OSError, ValueError) as error:
            raise _opening_error(self.name, url, self.network, error) from None
        try:
            self.stream = self._choose(stream)
            self._unit = self.stream.time_base or Fraction(1, av.time_base)
            codec = self.stream.codec_context
            pixels = codec.width * codec.height
            if pixels > MAX_PIXELS:
                raise VideoError(
                    f"{self.name}: expected at most {MAX_PIXELS} pixels a frame, found {codec.width}x{codec.height}; "
                    "scale it down first"
                )
            codec.options = {"max_pixels": str(MAX_PIXELS)}  # for sizes that only show up, or change, in the stream
            codec.thread_count = 2 if pixels >= TWO_THREADS_FROM else 1
            codec.thread_type = "AUTO"
        except BaseException:
            self.container.close()
            raise
        self._reformatter = VideoReformatter()

    def _choose(self, index: int | None) -> av.VideoStream:
        streams = self.container.streams
        videos = [s for s in streams.video if not s.disposition & Disposition.attached_pic]
        if not videos:
            kinds = sorted({"cover picture" if s.type == "video" else s.type for s in streams})
            found = f"only {', '.join(kinds)}" if kinds else "no stream at all"
            raise VideoError(f"{self.name}: expected a video stream, found {found}; give a file with video")
        wanted = getattr(streams.best("video"), "index", None) if index is None else index
        chosen = next((s for s in videos if s.index == wanted), videos[0] if index is None else None)
        if chosen is None:
            found = ", ".join(str(s.index) for s in videos)
            raise VideoError(f"{self.name}: expected the index of a video stream, found {index}; choose among {found}")
        if chosen.codec_context is None:
            raise VideoError(f"{self.name}: expected a codec that FFmpeg decodes, found another; convert the file")
        return chosen

    def close(self):
        self.container.close()

    def frames(self) -> Iterator[TimedFrame]:
        """Yields (seconds from the first pts, frame) for every sound frame that is newer than the one before."""
        blind = 0
        for packet in self._packets():
            for frame in self._decode(packet):
                if frame.is_corrupt:
                    self.lost += 1
                elif self._advance(frame):
                    yield self.time, frame
            blind += 1
            if self._origin is None and blind >= MAX_BLIND_PACKETS:
                return
        stated = None if self._origin is None or self.stopping else self.duration()
        if stated is not None and self.end() < stated - TRUNCATED:
            self.notes[f"ends at {float(self.end()):.1f} s of the {stated:.1f} s its header states"] = 1

    def _packets(self) -> Iterator[av.Packet | None]:
        """Yields the packets and, at the end, None: the order to hand out what the decoder still holds."""
        errors = 0
        while errors < MAX_READ_ERRORS:
            try:
                for packet in self.container.demux(self.stream):
                    if self.stopping:
                        return
                    errors = 0
                    # Empty packets (AVI writes them for repeated pictures) must not reach the decoder, which would take
                    # them for the end.
                    if packet.size:
                        yield packet
                break
            except (FFmpegError, OSError) as error:
                if self.network:
                    raise VideoError(
                        f"{self.name}: expected more of the stream after {float(self.time):.1f} s, found "
                        f"{_reason(error)}; check the connection and open it again"
                    ) from None
                self.lost += 0 if errors else 1  # one damaged place, however often it is tried
                errors += 1
        yield None

    def _decode(self, packet: av.Packet | None) -> Iterator[av.VideoFrame]:
        for _ in range(1 if packet is not None else MAX_READ_ERRORS):  # emptying goes on after an error
            try:
                yield from self.stream.decode(packet)
                return
            except EndOfStream:
                return
            except FFmpegError:
                self.lost += 1

    def _advance(self, frame: av.VideoFrame) -> bool:
        """Moves the clock to a frame; False if the frame is not newer than the one before."""
        stamp = frame.pts if frame.pts is not None else frame.dts
        raw = stamp * self._unit if stamp is not None else None
        if self._origin is None:
            self._origin, instant = raw or Fraction(0), Fraction(0)
        else:
            following = self.time + (self._lasts() or Fraction(1, FALLBACK_RATE))
            instant = raw - self._origin if raw is not None else following
            if frame.pts is None:
                instant = instant if instant > self.time else following  # a dts may lie far behind the pts before it
                self.notes["{} frames without a timestamp"] += 1
            delta = instant - self.time
            if delta > MAX_GAP or delta < -MAX_STEP_BACK:
                self._origin += instant - following
                instant = following
                self.notes["{} jumps of the timestamps"] += 1
            elif delta <= 0:
                self.notes["{} frames not newer than the one before"] += 1
                return False
            self._last_delta = instant - self.time
        self.time = instant
        duration = (frame.duration or 0) * self._unit
        self._last_duration = duration if 0 < duration <= MAX_GAP else None
        return True

    def _lasts(self) -> Fraction | None:
        """How long the newest frame lasts, in seconds."""
        rate = self.stream.average_rate
        return self._last_duration or self._last_delta or (1 / rate if rate else None)

    def end(self) -> Fraction:
        """Seconds from the first pts to the end of the newest frame."""
        return self.time + (self._lasts() or 0)

    def duration(self) -> float | None:
        """Seconds from the first pts to the end, as the header states it."""
        if self.stream.duration and self.stream.duration > 0:
            return float(self.stream.duration * self._unit)
        if self.container.duration and self.container.duration > 0:
            # The container's covers all streams, from the earliest; this one may start later.
            end = Fraction((self.container.start_time or 0) + self.container.duration, av.time_base)
            start = self._origin or Fraction(0)
            return float(end - start) if end > start else None
        return None

    def fix_geometry(self, frame: av.VideoFrame) -> tuple[int, int]:
        """Sets and returns (width, height) of every picture from the first frame."""
        size = (frame.width, frame.height)
        self._size = (size[1], size[0]) if _orientation(frame)[0] else size
        return self._size

    def to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """The upright picture of a frame at the geometry of the first one, [H, W, 3] uint8, read-only."""
        transposed, flip_x, flip_y = _orientation(frame)
        width, height = self._size[::-1] if transposed else self._size
        try:
            rgb = self._reformatter.reformat(
                frame, width, height, "rgb24", interpolation=RGB_FLAGS, dst_color_range=ColorRange.JPEG, threads=1
            ).to_ndarray()
        except (FFmpegError, ValueError) as error:
            raise VideoError(
                f"{self.name}: expected a pixel format that converts to RGB, found {frame.format.name} "
                f"({_reason(error)}); convert the file to yuv420p"
            ) from None
        if transposed:
            rgb = rgb.transpose(1, 0, 2)
        rgb = np.ascontiguousarray(rgb[:: -1 if flip_y else 1, :: -1 if flip_x else 1])
        rgb.flags.writeable = False
        return rgb


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """(transpose, then flip x, then flip y) that make a frame upright, from its display matrix.

    The matrix maps stored to shown coordinates: x' = a x + c y, y' = b x + d y, stored as [[a, b, _], [c, d, _], _] in
    16.16 fixed point (FFmpeg `libavutil/display.h`). Angles between right angles go to the nearest.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, False, False
    (a, b), (c, d) = np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def _resolve(source: str | pathlib.Path) -> tuple[str, str, str]:
    """Returns (name for messages, what FFmpeg opens, scheme); refuses what cannot be a video before FFmpeg sees it."""
    text = os.fspath(source)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if isinstance(source, str) and scheme and scheme[1].lower() != "file":
        name, kind = re.sub(r"//[^/]*@", "//", text), scheme[1].lower()  # no passwords in messages
        if kind not in PROTOCOLS:
            raise VideoError(f"{name}: expected a path or an http, https or rtsp URL, found {kind}; download it first")
        return name, text, kind
    if isinstance(source, str):
        text = re.sub(r"^file:(//)?", "", text)
    path = pathlib.Path(text)
    if not path.exists():
        raise VideoError(f"{path}: expected a video file, found nothing there; check the path")
    if not path.is_file():
        found = "a directory" if path.is_dir() else "a device or pipe"
        raise VideoError(f"{path}: expected a video file, found {found}; give a regular file")
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: expected a video file, found an empty file (0 bytes); copy or record it again")
    # With its scheme a path is never read as a URL, nor as a pattern of many files.
    return str(path), f"file:{path}", "file"


def _opening_error(name: str, url: str, network: bool, error: Exception) -> VideoError:
    if network:
        return VideoError(f"{name}: expected a video stream, found {_reason(error)}; check address and connection")
    if isinstance(error, PermissionError):
        return VideoError(f"{name}: expected a readable file, found {_reason(error)}; check its permissions")
    with open(url.removeprefix("file:"), "rb") as file:
        is_text = re.fullmatch(rb"[\t\n\r\x20-\x7e\x80-\xff]*", file.read(4096)) is not None
    found = "text (playlists are not followed)" if is_text else f"an unknown or damaged format ({_reason(error)})"
    return VideoError(f"{name}: expected an mp4, mkv, webm, avi, gif, ..., found {found}; convert or copy it again")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class Paced:
    """Plays frames at the speed of a clock, as a camera would: each no earlier than its time after the iteration began.

    A consumer that is late gets the newest frame that is due, the older ones are dropped, the last one never is. One
    frame is read ahead, so that decoding happens while waiting.

    Attributes:
        dropped: frames passed over so far.
    """

    def __init__(self, frames: Iterable[Frame], clock: Callable[[], float], sleep: Callable[[float], None]):
        self._frames, self._clock, self._sleep = iter(frames), clock, sleep
        self._start, self._ahead = None, None
        self.dropped = 0

    def __iter__(self) -> "Paced":
        return self

    def __next__(self) -> Frame:
        if self._start is None:
            self._start = self._clock()
            self._ahead = next(self._frames, None)
        if self._ahead is None:
            raise StopIteration
        frame, self._ahead = self._ahead, next(self._frames, None)
        while self._ahead is not None and self._ahead.time <= self._clock() - self._start:
            self.dropped += 1
            frame, self._ahead = self._ahead, next(self._frames, None)
        wait = self._start + frame.time - self._clock()
        if wait > 0:
            self._sleep(wait)
        return frame


def paced(
    frames: Iterable[Frame], clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> Paced:
    """`Paced` frames; the clock gives seconds, and `sleep` waits for as many."""
    return Paced(frames, clock, sleep)
