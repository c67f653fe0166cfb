"""One open video container: its clock, its damage and its pictures. What `video.py` samples and `live.py` watches.

`Decoder` opens a file, a network stream or a camera through PyAV and gives every sound frame in order; the pictures are
made only of the frames that are asked for. Sources are not trusted: sizes are bounded, and FFmpeg may open nothing but
what the scheme of the source allows. Which frames are shown when, and connecting again, live elsewhere.

What the pixels are. 8-bit RGB as swscale makes it: the stream's matrix and range are honoured (BT.601 where it states
none, as FFmpeg has it), alpha is dropped, HDR is not tone-mapped, interlacing and non-square pixels stay as they are.
Rotation and mirroring are applied. The first frame fixes the geometry; later frames of another size are scaled to it.
"""

import collections
import itertools
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.error import EOFError as EndOfStream
from av.error import ExitError, FFmpegError
from av.stream import Discard, Disposition
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from jstream.errors import UserError

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
BLIND_SECONDS = 30.0  # without one picture, where packets come over a network

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
    "rtsp": "tcp",
    "rtsps": "tls,tcp",
    "camera": "file",
}
CAMERAS = {  # by system: FFmpeg's format, the device of an index, and options
    "linux": ("v4l2", "/dev/video{}", {}),
    "darwin": ("avfoundation", "{}:none", {"framerate": "30"}),  # its default, 29.97, is refused by most cameras
}
# Bit-exact, so that a frame does not depend on the processor; full chroma, or 4:4:4 would lose half of its columns.
RGB_FLAGS = int(
    Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
)
TimedFrame = tuple[Fraction, av.VideoFrame]  # seconds from the first pts


class VideoError(UserError):
    """A source that cannot be opened or read on; one line: what was expected, what was found, what to do.

    Attributes:
        reason: what was found, in few words; empty where it stands in the message alone.
    """

    def __init__(self, message: str, reason: str = ""):
        super().__init__(" ".join(message.split()))
        self.reason = reason


class Decoder:
    """A container, its clock and its damage.

    Args:
        source: as `open_video` takes it.
        stream: the container's index of a video stream; FFmpeg's choice of the best one by default.

    Attributes:
        name: the source for messages, without passwords.
        arrives: pictures come when they are made, and what counts is when they arrive: RTSP, cameras, pictures pushed
            over HTTP. Every sound frame is given, whatever its timestamp.
        live: what was not watched is gone: `arrives`, and playlists that are still growing.
        size: (width, height) of every picture, from `start` on.
        time: seconds from the first pts to the newest frame.
        lost: packets and frames skipped as damaged.
        notes: how often each other fault occurred, by message.
        stopping: set to end `frames` early.
    """

    def __init__(self, source: str | int | pathlib.Path, stream: int | None):
        self.name, url, scheme = _resolve(source)
        self.local = scheme == "file"
        self.time: Fraction = Fraction(0)
        self._origin: Fraction | None = None  # seconds of the first pts in the stream's own time, moved by every jump
        self._last_duration: Fraction | None = None
        self._last_delta: Fraction | None = None
        self.lost = 0
        self.notes = collections.Counter()
        self.stopping = False
        kind, options = None, {}
        if scheme == "camera":
            kind, _, options = CAMERAS[sys.platform]
        elif scheme in ("rtsp", "rtsps"):
            # UDP loses packets, and passes few firewalls. To wait for the rate would take most of the time of opening.
            options = {"rtsp_transport": "tcp", "allowed_media_types": "video", "fpsprobesize": "0"}
        options = {
            "protocol_whitelist": PROTOCOLS[scheme],
            "format_whitelist": FILE_FORMATS if self.local else kind or NETWORK_FORMATS,
            "max_pixels": str(MAX_PIXELS),
            **options,
        }
        timeout = None if self.local else NETWORK_TIMEOUT  # for opening, and for every read after it
        began = time.monotonic()
        try:
            self.container = av.open(url, format=kind, options=options, timeout=timeout, **_LENIENT)
        except (FFmpegError, OSError, ValueError) as error:
            late = timeout is not None and time.monotonic() - began >= timeout
            raise _opening_error(self.name, url, scheme, error, late) from None
        form = self.container.format.name
        self.arrives = scheme in ("camera", "rtsp", "rtsps") or form == "mpjpeg"
        self.live = self.arrives or (form == "hls" and self.container.duration is None)  # no end in its playlist yet
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
            if not self.local:
                for other in self.container.streams:  # sound, and the other sizes of a playlist, are not even fetched
                    if other.index != self.stream.index:
                        other.discard = Discard.all
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

    def start(self, size: tuple[int, int] | None = None) -> Iterator[TimedFrame]:
        """Decodes the first frame and gives them all, that one included; closes the container where there is none.

        Args:
            size: (width, height) of every picture; by default the first frame's.

        Raises:
            VideoError: no frame that decodes.
        """
        try:
            frames = self.frames()
            first = next(frames, None)
            if first is None:
                raise VideoError(
                    f"{self.name}: expected a video, found no frame that decodes ({self.lost} packets failed); convert "
                    f"it if it plays elsewhere: it is corrupt, or has more than {MAX_PIXELS} pixels a frame",
                    "no picture",
                )
            self.size = size or self._upright_size(first[1])
        except BaseException:
            self.close()
            raise
        return itertools.chain([first], frames)

    def frames(self) -> Iterator[TimedFrame]:
        """Yields (seconds from the first pts, frame) for every sound frame that is newer than the one before."""
        blind, seen = 0, False
        deadline = time.monotonic() + BLIND_SECONDS
        for packet in self._packets():
            for frame in self._decode(packet):
                if frame.is_corrupt:
                    self.lost += 1
                elif self.arrives or self._advance(frame):
                    seen = True
                    yield self.time, frame
            blind += 1
            if not seen and (blind >= MAX_BLIND_PACKETS or not self.local and time.monotonic() > deadline):
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
                if not self.local:
                    raise VideoError(
                        f"{self.name}: expected more of the stream after {float(self.time):.1f} s, found "
                        f"{_reason(error)}; check the connection and open it again",
                        _reason(error),
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

    def _upright_size(self, frame: av.VideoFrame) -> tuple[int, int]:
        return (frame.height, frame.width) if _orientation(frame)[0] else (frame.width, frame.height)

    def to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """The upright picture of a frame at the size of the first one, [H, W, 3] uint8, read-only."""
        transposed, flip_x, flip_y = _orientation(frame)
        width, height = self.size[::-1] if transposed else self.size
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


def _resolve(source: str | int | pathlib.Path) -> tuple[str, str, str]:
    """Returns (name for messages, what FFmpeg opens, scheme); refuses what cannot be a video before FFmpeg sees it."""
    text = str(source) if isinstance(source, int) else os.fspath(source)
    if not isinstance(source, pathlib.Path) and re.fullmatch(r"\d{1,3}", text):
        if sys.platform not in CAMERAS:
            raise VideoError(
                f"camera {text}: expected Linux or macOS, found {sys.platform}; give the camera's rtsp or http address"
            )
        return f"camera {text}", CAMERAS[sys.platform][1].format(text), "camera"
    if re.fullmatch(r"/dev/(video\d+|v4l/.+)", text) and sys.platform == "linux":
        return f"camera {text}", text, "camera"
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if isinstance(source, str) and scheme and scheme[1].lower() != "file":
        name, kind = _without_secrets(text), scheme[1].lower()
        if kind not in PROTOCOLS or kind == "camera":
            raise VideoError(
                f"{name}: expected a path, a camera or an http, https, rtsp or rtsps URL, found {kind}; download it "
                "first"
            )
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


def _without_secrets(url: str) -> str:
    """The URL for messages: no user and password, and nothing of a query, where cameras take passwords and tokens."""
    scheme, rest = url.split("://", 1)
    secret, at, place = rest.rpartition("@")  # a password should not hold an @, and does
    if "?" in secret:
        return f"{scheme}://…"
    address, query, _ = place.partition("?")
    return f"{scheme}://{at and '…@'}{address}{query and '?…'}"


def _opening_error(name: str, url: str, scheme: str, error: Exception, late: bool) -> VideoError:
    reason = f"no answer for {NETWORK_TIMEOUT:g} s" if late else _reason(error)
    if scheme == "camera":
        return VideoError(f"{name}: expected a camera, found {reason}; check that it is plugged in and free", reason)
    if scheme != "file":
        return VideoError(f"{name}: expected a video stream, found {reason}; check address and connection", reason)
    if isinstance(error, PermissionError):
        return VideoError(f"{name}: expected a readable file, found {reason}; check its permissions")
    with open(url.removeprefix("file:"), "rb") as file:
        is_text = re.fullmatch(rb"[\t\n\r\x20-\x7e\x80-\xff]*", file.read(4096)) is not None
    found = "text (playlists are not followed)" if is_text else f"an unknown or damaged format ({reason})"
    return VideoError(f"{name}: expected an mp4, mkv, webm, avi, gif, ..., found {found}; convert or copy it again")


def _reason(error: Exception) -> str:
    if isinstance(error, ExitError):  # the timeout's
        return f"no data for {NETWORK_TIMEOUT:g} s"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
