"""Live sources from servers that are killed, stopped and started again while they are watched."""

import functools
import http.server
import io
import itertools
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import av
import numpy as np
import pytest
import webvtt
from PIL import Image

from jstream.data import decoding
from jstream.data.live import LiveVideo
from jstream.data.video import VideoError, open_video

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DEBIANS_PYTHON = "/usr/bin/python3"
RTSP_SERVER = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"


class Camera:
    """An RTSP server in a process of its own that can be killed, stopped and started, always at the same address."""

    def __init__(self, *login, rate=25):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.address = f"rtsp://127.0.0.1:{self.port}/live"
        self.command = [DEBIANS_PYTHON, HERE / "rtsp_server.py", str(self.port), "320", "240", str(rate), *login]
        self.process = None
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"

    def send(self, number):
        self.process.send_signal(number)

    def kill(self):
        self.process.kill()  # also where it is stopped
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def camera():
    """Makes cameras, and kills them in the end."""
    if subprocess.run([DEBIANS_PYTHON, "-c", RTSP_SERVER], capture_output=True).returncode:
        pytest.skip("expected GStreamer's RTSP server with its bindings for Debian's Python; see .ci/run")
    made = []
    yield lambda *login, **options: made.append(Camera(*login, **options)) or made[-1]
    for each in made:
        each.kill()


def written(image):
    """When a picture was made, in milliseconds of the monotonic clock modulo 2^16: see `rtsp_server.py`."""
    height, width, _ = image.shape
    bars = image[height // 2].mean(axis=-1).reshape(16, width // 16)[:, width // 32]
    return int("".join("1" if bar > 127 else "0" for bar in bars), 2)


def age(image):
    """Milliseconds since a picture was made."""
    return (int(1000 * time.monotonic()) - written(image)) % 2**16


# ---------------------------------------------------------------------------------------------------------------- RTSP


def test_a_camera_that_is_killed_comes_back_with_new_pictures(camera):
    source, gaps, stamps = camera(), [], []
    with open_video(source.address, fps=5) as video:
        video.on_gap = gaps.append
        assert isinstance(video, LiveVideo) and (video.width, video.height) == (320, 240)
        for frame in itertools.islice(video, 20):
            stamps.append((frame.time, written(frame.image), age(frame.image)))
            if len(stamps) == 8:
                source.kill()
                threading.Timer(1.0, source.start).start()
    times, made, ages = map(np.array, zip(*stamps))
    steps = np.diff(made) % 2**16
    assert (np.diff(times) > 0).all() and (5 * times == np.round(5 * times)).all()
    assert (steps < 2**15).all() and steps.any(), "no picture is older than the one before"
    assert steps.max() >= 1000 and np.argmax(steps) == np.argmax(np.diff(times)), "the gap is where the time leaps"
    assert [gap.seconds is None for gap in gaps] == [True, False]
    assert gaps[1].seconds == pytest.approx(np.diff(times).max(), abs=0.5)
    assert video.reconnects == 1 and video.end == "closed"


def test_pictures_are_of_now_and_not_of_a_queue_after_the_consumer_was_busy(camera):
    with open_video(camera().address, fps=5) as video:
        next(video)
        time.sleep(3)
        late = next(video)
        assert age(late.image) < 2000
        assert late.time >= 2.8 and video.dropped == round(5 * late.time) - 1


def test_a_camera_that_says_nothing_any_more_is_connected_again(camera, monkeypatch):
    monkeypatch.setattr(decoding, "NETWORK_TIMEOUT", 1.5)
    source, gaps = camera(), []

    def report(gap):
        gaps.append(gap)
        source.send(signal.SIGCONT)

    with open_video(source.address, fps=5) as video:
        video.on_gap = report
        next(video)
        source.send(signal.SIGSTOP)
        next(frame for frame in video if video.reconnects)
    assert "no data for 1.5 s" in str(gaps[0]) and gaps[1].seconds >= 1.5


def test_a_camera_that_stays_away_is_given_up(camera):
    source = camera()
    with open_video(source.address, reconnect=1) as video:
        next(video)
        source.kill()
        with pytest.raises(VideoError, match="back within 1 s, found Connection refused; check the source"):
            list(video)
        assert video.end == "lost" and list(video) == []


def test_a_camera_with_a_password_opens_with_it_and_never_shows_it(camera):
    source = camera("admin", "hunter2")
    with open_video(source.address.replace("//", "//admin:hunter2@")) as video:
        next(video)
        assert video.name == source.address.replace("//", "//…@")
    for wrong in ("", "admin:wrong@"):
        with pytest.raises(VideoError, match="401 Unauthorized") as caught:
            open_video(source.address.replace("//", f"//{wrong}"))
        assert "wrong" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------- HLS


class Broadcast(threading.Thread):
    """Writes segments of a second each, as a live encoder does; picture i, at 10 a second, is a grey of level 2 i."""

    def __init__(self, folder, width=64, height=48):
        super().__init__(daemon=True)
        self.folder, self.width, self.height = folder, width, height
        self.begun, self.over = threading.Event(), threading.Event()

    def run(self):
        options = {"hls_time": "1", "hls_list_size": "4", "hls_flags": "delete_segments+temp_file"}
        with av.open(str(self.folder / "live.m3u8"), "w", format="hls", options=options) as container:
            stream = container.add_stream("libx264", rate=10, options={"preset": "ultrafast", "tune": "zerolatency"})
            stream.width, stream.height, stream.pix_fmt, stream.gop_size = self.width, self.height, "yuv420p", 10
            began = time.monotonic()
            for i in range(120):
                grey = np.full((self.height, self.width, 3), 2 * i, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(grey).reformat(format="yuv420p")))
                if (self.folder / "live.m3u8").exists():
                    self.begun.set()
                if self.over.wait(max(0, began + i / 10 - time.monotonic())):
                    break
            container.mux(stream.encode(None))  # the playlist now says that it has ended


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class Web:
    """A web server of a folder that can be stopped and started, always at the same address."""

    def __init__(self, folder):
        self.folder, self.port = folder, 0
        self.start()

    def start(self):
        handler = functools.partial(Quiet, directory=self.folder)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


def test_a_growing_playlist_plays_at_its_pace_outlives_its_server_and_ends(tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    broadcast, web = Broadcast(tmp_path), Web(tmp_path)
    broadcast.start()
    assert broadcast.begun.wait(30)
    seen, gaps = [], []

    def report(gap):
        gaps.append(gap)
        if len(gaps) == 1:
            web.start()

    with open_video(f"http://127.0.0.1:{web.port}/live.m3u8", fps=4) as video:
        video.on_gap = report
        assert isinstance(video, LiveVideo)
        for frame in video:
            seen.append((frame.time, float(frame.image.mean()) / 2, video.reconnects))
            if len(seen) == 8:
                web.stop()
            if video.reconnects and len([None for _, _, back in seen if back]) == 8:
                broadcast.over.set()
    web.stop()
    assert video.end == "ended"
    assert [gap.seconds is None for gap in gaps[:3]] == [True, False, True]
    for back in (0, 1):
        times, levels = zip(*((time, level) for time, level, reconnects in seen if reconnects == back))
        assert np.diff(levels).max() < 9, "a segment of ten pictures is not skipped through"
        assert levels[7] - levels[0] == pytest.approx(10 * (times[7] - times[0]), abs=4)


def test_of_a_playlist_with_several_sizes_only_one_is_fetched(tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    asked = []
    monkeypatch.setattr(Quiet, "do_GET", lambda self: asked.append(self.path) or super(Quiet, self).do_GET())
    sizes = {"small": (64, 48), "large": (128, 96)}
    master = ["#EXTM3U"]
    for name, (width, height) in sizes.items():
        folder = tmp_path / name
        folder.mkdir()
        broadcast = Broadcast(folder, width, height)
        broadcast.start()
        assert broadcast.begun.wait(30)
        master += [f"#EXT-X-STREAM-INF:BANDWIDTH={100 * width},RESOLUTION={width}x{height}", f"{name}/live.m3u8"]
    (tmp_path / "master.m3u8").write_text("\n".join(master) + "\n")
    web = Web(tmp_path)
    with open_video(f"http://127.0.0.1:{web.port}/master.m3u8", fps=2) as video:
        assert isinstance(video, LiveVideo)
        shown, other = sorted(sizes, key=lambda name: sizes[name] != (video.width, video.height))
        opening = len(asked)
        assert len(list(itertools.islice(video, 8))) == 8
    web.stop()
    assert any(f"/{shown}/" in path for path in asked[opening:])
    assert not any(f"/{other}/" in path for path in asked[opening:])


# ------------------------------------------------------------------------------------------------------------- cameras


def test_a_camera_that_is_unplugged_comes_back(tmp_path, monkeypatch):
    """A named pipe stands in for the device, and pictures one after the other for what it sends."""
    device = tmp_path / "video7"
    os.mkfifo(device)
    monkeypatch.setitem(decoding.CAMERAS, sys.platform, ("mjpeg", str(tmp_path / "video{}"), {}))
    unplugged, watched = threading.Event(), threading.Event()

    def plug(level):
        picture = io.BytesIO()
        Image.new("L", (32, 16), level).save(picture, "JPEG")
        with device.open("wb") as pipe:
            try:
                while not (unplugged if level == 50 else watched).wait(0.02):
                    pipe.write(picture.getvalue())
                    pipe.flush()
            except BrokenPipeError:
                pass

    threading.Thread(target=plug, args=(50,), daemon=True).start()
    gaps = []

    def report(gap):
        gaps.append(gap)
        if len(gaps) == 1:
            threading.Thread(target=plug, args=(200,), daemon=True).start()

    with open_video("7", fps=10) as video:
        video.on_gap = report
        assert isinstance(video, LiveVideo) and video.name == "camera 7"
        assert [round(float(frame.image.mean()), -1) for frame in itertools.islice(video, 3)] == [50] * 3
        unplugged.set()
        frame = next(frame for frame in video if video.reconnects)
        assert round(float(frame.image.mean()), -1) == 200 and len(gaps) == 2
    watched.set()


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """Starts the command; what is compiled is kept for the next one."""
    environment = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "",  # lines are to come at once without it
        "XLA_FLAGS": "--xla_backend_optimization_level=1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }

    def start(out_dir, *flags):
        command = [sys.executable, "-m", "jstream.stream", f"--out={out_dir}", "--capacity=4096", *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=os.environ | environment, **pipes)

    return start


def written_events(tmp_path):
    return [json.loads(line) for line in (tmp_path / "o" / "events.jsonl").read_text().splitlines()]


def test_a_camera_is_watched_until_ctrl_c_and_everything_is_written(camera, stream, tmp_path):
    source = camera("admin", "hunter2")
    address = source.address.replace("//", "//admin:hunter2@")
    process = stream(tmp_path / "o", f"--video={address}", "--fps=4", "--query=What happens?")
    lines = []
    for line in process.stdout:  # comes while the stream runs, though it goes to a pipe
        lines.append(line)
        if "query" in line:
            source.kill()
        if "connecting again" in line:
            source.start()
        if "over after" in line:
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=120)
    out = "".join(lines) + out
    assert process.returncode == 0, err
    assert "stopped" in out and "hunter2" not in out + err
    assert re.fullmatch(r"late frames dropped: \d+, reconnects: 1", out.splitlines()[-1])
    events = written_events(tmp_path)
    assert events and f"{len(events)} frames" in out
    assert all(4 * event["time"] == round(4 * event["time"]) for event in events)
    assert len(webvtt.read(str(tmp_path / "o" / "captions.vtt")).captions) == sum(
        event["text"] is not None for event in events
    )
    assert (tmp_path / "o" / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["captions.vtt", "events.jsonl", "timeline.png"]


def test_a_watch_can_be_stopped_while_its_camera_is_away(camera, stream, tmp_path):
    source = camera()
    process = stream(tmp_path / "o", f"--video={source.address}", "--reconnect=600")
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search("silence|standby|response", line):  # the first frame has been seen
            source.kill()
        if "connecting again" in line:
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "stopped" in out, err
    assert re.fullmatch(r"late frames dropped: \d+, reconnects: 0", out.splitlines()[-1])
    assert len(written_events(tmp_path)) >= 1


def test_a_duration_ends_the_watch_and_a_camera_that_stays_away_is_one_line(camera, stream, tmp_path):
    source = camera()
    process = stream(tmp_path / "o", f"--video={source.address}", "--fps=2", "--duration=2.5")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert len(written_events(tmp_path)) <= 5 and written_events(tmp_path)[-1]["time"] == 2
    assert out.splitlines()[-1].endswith("reconnects: 0")
    process = stream(tmp_path / "o", f"--video={source.address}", "--fps=2", "--reconnect=0.5")
    for line in process.stdout:
        if "query" in line:
            source.kill()
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"error: {source.address}: expected the stream back within 0.5 s, found ")
    assert written_events(tmp_path)[0]["time"] == 0
