"""Claims about `jstream.data.live`: which picture is shown when, what is counted, and how a lost source comes back.

Time is a number here that nobody waits for. Against real servers, see tests/live.
"""

import collections
import functools
import http.server
import io
import itertools
import math
import pathlib
import sys
import threading
import weakref

import av
import numpy as np
import pytest
from PIL import Image

from jstream.data import decoding, live
from jstream.data.decoding import VideoError
from jstream.data.live import Gap, LiveVideo
from jstream.data.video import open_video


class Clock(live.Clock):
    """Time that passes only where somebody waits, and what happens at which time."""

    def __init__(self):
        self.time = 1000.0
        self.plan = []

    def now(self):
        return self.time

    def at(self, time, call):
        self.plan.append((1000 + time, len(self.plan), call))

    def wait(self, changed, seconds):
        del changed
        following = min(self.plan, default=(math.inf,))
        if following[0] <= self.time + seconds:
            self.plan.remove(following)
            self.time = max(self.time, following[0])
            following[2]()
        else:
            assert seconds < math.inf, "nothing more will happen"
            self.time += seconds

    def spend(self, seconds):
        """What a consumer does that is busy: everything that happens meanwhile happens."""
        end = self.time + seconds
        while min(self.plan, default=(math.inf,))[0] <= end:
            self.wait(None, end - self.time)
        self.time = end


class Picture:
    """A decoded frame: a number, and when it is due in its playlist."""

    def __init__(self, number, instant=0.0):
        self.number, self.instant = number, instant


class Source:
    """A connection: what it brings, one after the other; a number is a time to wait, an error ends it."""

    live, arrives, stopping, name, lost = True, True, False, "rtsp://…@camera/live", 0

    def __init__(self, clock, *script, length=None, **attributes):
        self.clock, self.script, self.length = clock, script, length
        self.notes, self.closed, self.converted = collections.Counter(), False, 0
        self.__dict__.update(attributes)

    def start(self, size=None):
        self.size = size or (4, 2)
        frames = self._frames()
        first = next(frames, None)
        if first is None:
            raise VideoError(f"{self.name}: no picture", "no picture")
        return itertools.chain([first], frames)

    def _frames(self):
        for step in self.script:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, Picture):
                yield step.instant, step
            else:
                self.clock.time += step

    def duration(self):
        return self.length

    def to_rgb(self, picture):
        self.converted += 1
        return np.full((2, 4, 3), picture.number, np.uint8)

    def close(self):
        self.closed = True


def watched(fps=1.0, until=None, rate=10, seconds=60.0, reconnect=60.0):
    """A live video whose source shows picture i at i / rate seconds, its reader and its clock."""
    clock = Clock()
    reader = live._Reader(Source(clock, Picture(0)), lambda: None, reconnect, clock)
    reader._show(Picture(0))
    for i in range(1, round(seconds * rate)):
        clock.at(i / rate, lambda i=i: reader._show(Picture(i)))
    return LiveVideo(reader, fps, until), reader, clock


def seen(video, count=None):
    """[(time, number of the picture)]"""
    return [(frame.time, int(frame.image[0, 0, 0])) for frame in itertools.islice(video, count)]


# --------------------------------------------------------------------------------------------------- the newest picture


def test_every_tick_shows_the_newest_picture():
    video, _, clock = watched()
    assert seen(video, 5) == [(0, 0), (1, 10), (2, 20), (3, 30), (4, 40)]
    assert video.dropped == 0 and clock.time == 1004


def test_a_late_consumer_gets_the_newest_picture_at_once_and_the_ticks_between_are_counted():
    video, _, clock = watched()
    times = []
    for frame in itertools.islice(video, 5):
        times.append((frame.time, int(frame.image[0, 0, 0]), clock.time - 1000))
        clock.spend(2.5)
    assert times == [(0, 0, 0), (2, 25, 2.5), (5, 50, 5), (7, 75, 7.5), (10, 100, 10)]
    assert video.dropped == 1 + 2 + 1 + 2


def test_a_consumer_that_is_late_once_is_on_time_again():
    video, _, clock = watched(fps=2)
    assert seen(video, 2) == [(0, 0), (0.5, 5)]
    clock.spend(0.7)
    assert seen(video, 3) == [(1, 12), (1.5, 15), (2, 20)]
    assert video.dropped == 0


def test_ticks_of_any_rate_fall_on_the_same_times_as_those_of_a_file():
    video, _, _ = watched(fps=0.7)
    assert [time for time, _ in seen(video, 4)] == pytest.approx([0, 1 / 0.7, 2 / 0.7, 3 / 0.7])
    video, _, clock = watched(fps=30, rate=100)
    assert [time for time, _ in seen(video, 31)] == pytest.approx([i / 30 for i in range(31)])
    assert video.dropped == 0 and clock.time == pytest.approx(1001)


def test_no_more_than_one_picture_waits():
    video, reader, clock = watched(seconds=0)
    pictures = [Picture(i) for i in range(1000)]
    alive = weakref.WeakSet(pictures)
    while pictures:
        reader._show(pictures.pop())
    assert [picture.number for picture in alive] == [0]
    assert seen(video, 1) == [(0, 0)]


def test_a_pause_repeats_the_picture_and_converts_it_once():
    video, reader, clock = watched(rate=1, seconds=1)
    clock.at(2.5, lambda: reader._show(Picture(7)))
    frames = list(itertools.islice(video, 4))
    assert [(frame.time, int(frame.image[0, 0, 0])) for frame in frames] == [(0, 0), (1, 0), (2, 0), (3, 7)]
    assert frames[0].image is frames[2].image
    assert reader.decoder.converted == 2


def test_at_native_rate_every_picture_comes_at_its_time_and_the_missed_ones_are_counted():
    video, _, clock = watched(fps=None)
    assert seen(video, 3) == [(0, 0), (pytest.approx(0.1), 1), (pytest.approx(0.2), 2)]
    clock.spend(0.5)
    assert seen(video, 2) == [(pytest.approx(0.7), 7), (pytest.approx(0.8), 8)]
    assert video.dropped == 4


def test_time_begins_with_the_first_frame_that_is_handed_out():
    video, _, clock = watched()
    clock.spend(20.0)  # a model that is being compiled
    assert seen(video, 2) == [(0, 200), (1, 210)]
    assert video.dropped == 0


def test_a_watch_of_a_given_length_ends_before_the_next_tick():
    video, reader, _ = watched(until=3)
    assert video.num_frames == 3
    assert seen(video) == [(0, 0), (1, 10), (2, 20)]
    assert video.end == "closed" and reader.decoder.stopping


# ----------------------------------------------------------------------------------------------------------------- gaps


def test_a_gap_is_reported_when_it_begins_and_when_it_is_over_and_shows_nothing():
    video, reader, clock = watched(seconds=3.1)
    gaps = []
    video.on_gap = lambda gap: gaps.append((clock.time - 1000, gap))
    clock.at(3.2, lambda: reader._lose("the stream broke off"))
    for i in range(10):
        clock.at(8.5 + i / 10, lambda i=i: reader._show(Picture(100 + i)))
    assert seen(video, 6) == [(0, 0), (1, 10), (2, 20), (3, 30), (8, 100), (9, 105)]
    (began, first), (ended, second) = gaps
    assert (began, ended) == (pytest.approx(3.2), pytest.approx(8.5))
    assert first == Gap(pytest.approx(3), "the stream broke off", None)
    assert second == Gap(pytest.approx(3), "the stream broke off", pytest.approx(5.5))
    assert "broke off" in str(first) and str(second).split() == ["8.5s", "gap", "over", "after", "5.5", "s"]
    assert video.dropped == 0 and video.reconnects == 1
    assert video.summary == "reconnects: 1 (5.5 s without pictures)"


def test_ticks_missed_beside_a_gap_are_counted_without_those_inside_it():
    video, reader, clock = watched(seconds=3.1)
    seen(video, 1)
    clock.at(3.2, lambda: reader._lose("it broke"))
    clock.at(8.5, lambda: reader._show(Picture(100)))
    clock.spend(10.2)
    assert seen(video, 1) == [(10, 100)]
    assert video.dropped == 4  # those of 1, 2, 3 and 9; there was nothing to see from 4 to 8, and 10 is this one


def test_a_watch_of_a_given_length_ends_in_a_gap_too():
    video, reader, clock = watched(until=6, seconds=3.1)
    clock.at(3.2, lambda: reader._lose("it broke"))
    assert [time for time, _ in seen(video)] == [0, 1, 2, 3]
    assert clock.time == 1006 and video.end == "closed"


def test_closing_ends_the_iteration_wherever_it_waits():
    video, reader, clock = watched()
    clock.at(2.25, video.close)
    assert [time for time, _ in seen(video)] == [0, 1, 2]
    assert clock.time == 1002.25 and video.end == "closed" and seen(video) == []


def test_a_source_that_is_stuck_without_an_error_is_given_up():
    video, _, clock = watched(seconds=0.05, reconnect=5)
    with pytest.raises(VideoError, match="within 5 s, found nothing at all"):
        seen(video)
    assert video.end == "lost" and clock.time == pytest.approx(1000 + 5 + 2 * decoding.NETWORK_TIMEOUT)


# ------------------------------------------------------------------------------------------------------- coming back


def test_attempts_are_half_a_second_apart_and_twice_as_long_each_time_up_to_eight():
    assert list(itertools.islice(live.delays(lambda: 0.0), 7)) == [0.5, 1, 2, 4, 8, 8, 8]
    assert list(itertools.islice(live.delays(lambda: 0.5), 5)) == [0.5625, 1.125, 2.25, 4.5, 9]
    drawn = list(itertools.islice(live.delays(), 5))
    assert all(d <= found < 1.25 * d for d, found in zip([0.5, 1, 2, 4, 8], drawn))


def read(connections, reconnect=60.0, first=None):
    """Runs a reader to its end on one connection after the other, then on refusals; it, and when it tried."""
    clock = Clock()
    connections = [make(clock) for make in connections]
    attempts = []

    def connect():
        attempts.append(clock.time - 1000)
        found = connections.pop(0) if connections else VideoError("refused", "Connection refused")
        if isinstance(found, Exception):
            raise found
        return found

    reader = live._Reader(connections.pop(0), connect, reconnect, clock, lambda: 0.0)
    reader.run()
    return reader, attempts


def test_a_lost_source_is_tried_until_its_time_is_up():
    reader, attempts = read([lambda clock: Source(clock, Picture(0), 2.0, Picture(1))], reconnect=20)
    assert attempts == [2.5, 3.5, 5.5, 9.5, 17.5]
    assert reader.end == "lost" and reader.clock.time == 1022
    message = str(reader.error)
    assert "rtsp://…@camera/live: expected the stream back within 20 s, found Connection refused" in message
    video = LiveVideo(reader)
    with pytest.raises(VideoError, match="within 20 s"):
        next(video)
    assert seen(video) == []


def test_without_time_to_come_back_a_loss_is_the_end():
    reader, attempts = read([lambda clock: Source(clock, Picture(0))], reconnect=0)
    assert attempts == [] and reader.end == "lost" and "within 0 s, found the stream broke off" in str(reader.error)


def test_what_broke_is_the_reason_of_the_gap():
    stalled = VideoError("rtsp://…: no data", "no data for 10 s")
    reader, _ = read([lambda clock: Source(clock, Picture(0), stalled)], reconnect=1)
    assert [loss.reason for loss in reader.losses] == ["no data for 10 s"]


def test_after_a_picture_the_delays_begin_anew():
    refused = lambda clock: VideoError("refused", "Connection refused")
    one = lambda clock: Source(clock, Picture(0), 3.0)
    empty = lambda clock: Source(clock)  # connects, and brings nothing
    reader, attempts = read([one, refused, refused, one, empty, one], reconnect=6)
    assert attempts == [3.5, 4.5, 6.5, 10, 11, 14.5, 15.5, 17.5]
    assert reader.reconnects == 2 and reader.missing == 6.5 + 4.5
    assert [loss.over is not None for loss in reader.losses] == [False, True, False, True, False]


def test_every_connection_is_closed_and_its_damage_is_counted():
    first, second = {}, {}
    reader, _ = read(
        [
            lambda clock: first.setdefault(0, Source(clock, Picture(0), lost=2, notes=collections.Counter(a=1))),
            lambda clock: second.setdefault(0, Source(clock, Picture(0), lost=3, notes=collections.Counter(a=1, b=1))),
        ],
        reconnect=1,
    )
    assert first[0].closed and second[0].closed
    video = LiveVideo(reader)
    assert video.lost == 5 and video.warnings[:3] == ["5 damaged packets or frames skipped", "a", "b"]


def test_the_first_picture_gives_the_size_of_those_after_a_loss():
    second = {}
    read([lambda clock: Source(clock, Picture(0)), lambda clock: second.setdefault(0, Source(clock, Picture(0)))])
    assert second[0].size == (4, 2)


def test_a_playlist_that_has_an_end_when_it_is_opened_again_has_ended():
    playlist = {"arrives": False}
    reader, attempts = read(
        [
            lambda clock: Source(clock, Picture(0), Picture(1, 1.0), **playlist),
            lambda clock: Source(clock, Picture(0), live=False),
        ]
    )
    assert reader.end == "ended" and reader.error is None and attempts == [1.5]
    assert seen(LiveVideo(reader)) == []


def test_a_recording_that_was_played_to_its_end_has_ended_and_a_shorter_one_was_lost():
    assert read([lambda clock: Source(clock, Picture(0), 9.5, length=10.0)])[0].end == "ended"
    assert read([lambda clock: Source(clock, Picture(0), 5.0, length=10.0)])[0].end == "lost"


def test_the_segments_of_a_playlist_are_shown_at_their_pace():
    pictures = [Picture(i, i / 2) for i in range(8)]
    reader = []
    shown = []

    class Watching(live._Reader):
        def _show(self, frame):
            shown.append((frame.number, self.clock.time - 1000))

    clock = Clock()
    late = Picture(8, 4.0)
    leap = Picture(9, 104.0)  # what was between is gone
    source = Source(clock, *pictures, 3.0, late, leap, Picture(10, 104.5), arrives=False)
    reader = Watching(source, lambda: None, 0, clock)
    reader.run()
    assert shown == [*((i, i / 2) for i in range(8)), (8, 6.5), (9, 6.5), (10, 7.0)]


# -------------------------------------------------------------------------------------------------- what a source is


@pytest.fixture
def opened(monkeypatch):
    """What FFmpeg was asked to open, in place of which nothing is found."""
    calls = []

    def refuse(url, **options):
        calls.append((url, options))
        raise FileNotFoundError(2, "No such file or directory", url)

    monkeypatch.setattr(decoding.av, "open", refuse)
    return calls


@pytest.mark.parametrize("source", [0, "0", "/dev/video0", pathlib.Path("/dev/video0")])
def test_an_index_or_a_device_is_a_camera(source, opened, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(VideoError, match="camera .*: expected a camera, found No such file") as caught:
        open_video(source)
    assert caught.value.reason == "No such file or directory"
    url, options = opened[0]
    assert url == "/dev/video0" and options["format"] == "v4l2"
    assert options["options"]["format_whitelist"] == "v4l2"


def test_where_there_are_no_cameras_it_says_so(opened, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(VideoError, match="camera 1: expected Linux or macOS, found win32; give the camera's rtsp"):
        open_video(1)
    assert not opened


@pytest.mark.parametrize(("scheme", "allowed"), [("rtsp", "tcp"), ("rtsps", "tls,tcp")])
def test_rtsp_goes_over_tcp_and_reaches_nothing_else(scheme, allowed, opened):
    with pytest.raises(VideoError, match=f"{scheme}://…@10.0.0.7:554/live: expected a video stream"):
        open_video(f"{scheme}://admin:12345@10.0.0.7:554/live")
    url, options = opened[0]
    assert url == f"{scheme}://admin:12345@10.0.0.7:554/live" and options["timeout"] == decoding.NETWORK_TIMEOUT
    assert options["options"]["rtsp_transport"] == "tcp"
    assert options["options"]["protocol_whitelist"] == allowed


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rtsp://cam/live", "rtsp://cam/live"),
        ("rtsp://admin:secret@cam:554/live", "rtsp://…@cam:554/live"),
        ("rtsp://admin:sec@ret/x@cam/live", "rtsp://…@cam/live"),
        ("rtsp://admin:secret?@cam/live", "rtsp://…"),
        ("rtsp://cam/live?user=admin&password=secret", "rtsp://cam/live?…"),
        ("http://cam/video?password=sec@ret", "http://…"),
        ("https://secret@host/live.m3u8?token=secret", "https://…@host/live.m3u8?…"),
    ],
)
def test_no_password_is_shown(url, shown, opened):
    with pytest.raises(VideoError) as caught:
        open_video(url)
    assert str(caught.value).startswith(f"{shown}: expected") and "sec" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- over the network


class Web(http.server.SimpleHTTPRequestHandler):
    """Files, and at /camera one JPEG after the other, as network cameras push them, until `more` says otherwise."""

    more: threading.Event
    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        if self.path != "/camera":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        picture = io.BytesIO()
        Image.new("RGB", (32, 16), (200, 0, 0)).save(picture, "JPEG")
        try:
            while not self.more.wait(0.01):
                self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\n")
                self.wfile.write(b"Content-Length: %d\r\n\r\n%s\r\n" % (len(picture.getvalue()), picture.getvalue()))
        except ConnectionError:
            self.more.set()

    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path, monkeypatch):
    """(address, what was asked for, an event that ends the pictures, and is set when nobody watches)."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    handler = type("Handler", (Web,), {"more": threading.Event(), "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler.asked, handler.more
        handler.more.set()
        server.shutdown()


def test_pictures_pushed_over_http_are_live(web):
    address, _, _ = web
    with open_video(f"{address}/camera", fps=None) as video:
        assert isinstance(video, LiveVideo) and (video.width, video.height) == (32, 16)
        frames = list(itertools.islice(video, 3))
    assert frames[0].time == 0 < frames[1].time < frames[2].time
    assert np.abs(frames[0].image.astype(int) - (200, 0, 0)).max() < 12 and not frames[0].image.flags.writeable
    assert video.end == "closed" and not video._thread.is_alive() and list(video) == []


def test_a_live_video_that_nobody_holds_is_closed(web):
    address, _, gone = web
    video = open_video(f"{address}/camera")
    next(video)
    thread = video._thread
    del video
    thread.join(30)
    assert not thread.is_alive()
    assert gone.wait(30)  # the server has noticed, too


def test_a_growing_playlist_reads_no_local_file(tmp_path, web, monkeypatch):
    address, asked, _ = web
    inside = tmp_path / "inside.ts"
    with av.open(str(inside), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
        container.mux(stream.encode(None))
    for i, target in enumerate(
        [
            "inside.ts",
            f"file://{inside}",
            f"file:{inside}",
            f"concat:{inside}|{inside}",
            f"subfile,,start,0,end,0,,:{inside}",
        ]
    ):
        (tmp_path / f"{i}.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n")
    with open_video(f"{address}/0.m3u8") as video:
        assert isinstance(video, LiveVideo) and not next(video).image.any()
    monkeypatch.setattr(decoding, "NETWORK_TIMEOUT", 0.4)  # it would look for new segments until then
    for i in range(1, 5):
        with pytest.raises(VideoError, match="expected a video stream"):
            open_video(f"{address}/{i}.m3u8")
        assert f"/{i}.m3u8" in asked
