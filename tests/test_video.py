"""Claims about `jstream.data.video`: which frames come out, when, and what becomes of damage."""

import collections
import functools
import http.server
import json
import os
import pathlib
import socket
import threading
from fractions import Fraction

import av
import numpy as np
import pytest

from jstream.data import decoding, video
from jstream.data.frames import letterbox
from jstream.data.video import Frame, VideoError, open_video, paced

SHARED = pathlib.Path(os.environ.get("JSTREAM_SHARED") or pathlib.Path(__file__).parents[2] / "shared") / "data"
RATES = (1, 2, 0.7)


def _read_lines(name):
    path = SHARED / "videos" / name
    return {row["file"]: row for row in map(json.loads, path.read_text().splitlines())} if path.exists() else {}


PROBES, PTS = _read_lines("PROBE.jsonl"), _read_lines("PTS.jsonl")
DAMAGED = {name for name, probe in PROBES.items() if probe.get("decode_error")}
HEALTHY = sorted(name for name, row in PTS.items() if row["pts"] and name not in DAMAGED)
HOPELESS = sorted(set(PROBES) - set(HEALTHY) - DAMAGED)


def _stated_times(name):
    """Exact seconds from the first pts of every frame."""
    unit = Fraction(PTS[name]["time_base"])
    return [(pts - PTS[name]["pts"][0]) * unit for pts in PTS[name]["pts"]]


def _ticks_by_the_rule(times, last, fps):
    """[(tick time, index of its frame)]: for every tick that a frame covers, the newest with pts <= tick + 1 ms."""
    late, end, found, tick = Fraction(1, 1000), times[-1] + last, [], 0
    while True:
        instant = Fraction(tick) / Fraction(fps)
        if instant > times[-1] + late and instant + late >= end:
            return found
        found.append((float(instant), max(i for i, t in enumerate(times) if t <= instant + late)))
        tick += 1


# ----------------------------------------------------------------------------------------------- files made on the fly


def _write(path, stamps, *, size=(64, 48), unit=Fraction(1, 1000), options=None, gop=4):
    """Writes one frame for each pts in `stamps` (in `unit`); frame i is a flat grey of level 8 i."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = stream.time_base = unit
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = 0
        for i, pts in enumerate(stamps):
            grey = np.full((size[1], size[0], 3), 8 * i % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey).reformat(format="yuv420p")
            frame.pts, frame.time_base = pts, unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _noise(path, frames=60, fmt_options=None):
    """An mp4 at 10 fps whose every frame is noise, so that damage anywhere hits a picture."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options=fmt_options or {}) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.gop_size = 5
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))))
        container.mux(stream.encode(None))
    return path


def _seen(source, fps=1.0):
    """[(time, which frame is shown, of those that `_write` wrote)]"""
    with open_video(source, fps) as frames:
        return [(round(frame.time, 6), round(float(frame.image.mean()) / 8)) for frame in frames]


def _times(source, fps=1.0):
    return [time for time, _ in _seen(source, fps)]


def _one_line_error(source, *words, **kwargs):
    with pytest.raises(VideoError) as caught:
        list(open_video(source, **kwargs))
    message = str(caught.value)
    assert "\n" not in message and "expected" in message and "found" in message and ";" in message
    assert all(word in message for word in words), message
    return message


# -------------------------------------------------------------------------------------------------- the shared videos


@pytest.fixture
def unconverted(monkeypatch):
    """Skips the conversion to RGB where a test is about times only, and says which pts would have been converted."""
    converted = []
    blank = np.zeros((1, 1, 3), np.uint8)
    monkeypatch.setattr(decoding.Decoder, "to_rgb", lambda self, frame: converted.append(frame.pts) or blank)
    return converted


@pytest.mark.parametrize("name", HEALTHY)
def test_every_frame_comes_at_its_stated_time(name, shared_data, unconverted):
    with open_video(shared_data / name, fps=None) as frames:
        times = [frame.time for frame in frames]
    assert times == [float(time) for time in _stated_times(name)]
    assert unconverted == PTS[name]["pts"]
    assert frames.lost == 0
    assert frames.duration is None or frames.duration > times[-1] - 0.1


@pytest.mark.parametrize("name", HEALTHY)
def test_ticks_show_the_newest_frame_and_no_other_is_converted(name, shared_data, unconverted):
    times = _stated_times(name)
    rate = next(s["avg_rate"] for s in PROBES[name]["video_streams"] if s["index"] == PROBES[name]["best_video_stream"])
    last = times[-1] - times[-2] if len(times) > 1 else 1 / Fraction(rate) if rate else 0
    for fps in RATES:
        unconverted.clear()
        with open_video(shared_data / name, fps) as frames:
            seen = [frame.time for frame in frames]
        expected = _ticks_by_the_rule(times, last, fps)
        assert seen == pytest.approx([time for time, _ in expected])
        assert unconverted == [PTS[name]["pts"][i] for i in dict.fromkeys(i for _, i in expected)]
        if frames.num_frames is not None and not frames.warnings:
            assert frames.num_frames == len(seen)


@pytest.mark.parametrize("name", sorted(DAMAGED))
def test_a_damaged_file_gives_its_good_frames_and_counts_the_lost_ones(name, shared_data):
    with open_video(shared_data / name, fps=None) as frames:
        times = [frame.time for frame in frames]
    assert len(times) >= PROBES[name]["decoded_frames"]
    assert times == sorted(set(times)) and times[0] == 0
    assert frames.lost > 0 and "damaged" in frames.summary
    assert times == _times(shared_data / name, None), "decoding damage again gives the same frames"


@pytest.mark.parametrize("name", HOPELESS)
def test_a_file_without_a_picture_is_a_one_line_error(name, shared_data):
    _one_line_error(shared_data / name, pathlib.Path(name).name)


@pytest.mark.parametrize(("angle", "quarter_turns"), [(0, 0), (90, -1), (180, 2), (270, 1)])
def test_rotated_files_are_shown_upright(angle, quarter_turns, shared_data, monkeypatch):
    path = shared_data / f"videos/decord/video_{angle}.mov"  # four views of one keyboard
    with open_video(path) as frames:
        upright = next(frames).image
        assert (
            upright.shape == (frames.height, frames.width, 3) == ((320, 568, 3) if angle % 180 == 0 else (568, 320, 3))
        )
    monkeypatch.setattr(decoding, "_orientation", lambda frame: (False, False, False))
    assert np.array_equal(upright, np.rot90(next(open_video(path)).image, quarter_turns))


def test_mirrored_files_are_shown_as_they_should_be(shared_data, tmp_path):
    path = shared_data / "videos/decord/video_0.mov"
    data = path.read_bytes()
    one = (1 << 16).to_bytes(4, "big")
    matrix = data.index(one + bytes(12) + one, data.index(b"tkhd"))  # of the track: a b u c d ...
    mirrored = tmp_path / "mirrored.mov"
    mirrored.write_bytes(data[:matrix] + (-(1 << 16)).to_bytes(4, "big", signed=True) + data[matrix + 4 :])
    assert np.array_equal(next(open_video(mirrored)).image, next(open_video(path)).image[:, ::-1])


@pytest.mark.parametrize(
    ("name", "matrix", "full"),
    [
        ("bt601_full_range", (0.299, 0.114), True),
        ("bt601_limited_range", (0.299, 0.114), False),
        ("bt709_full_range", (0.2126, 0.0722), True),
        ("bt2020_10bit", (0.2627, 0.0593), False),
    ],
)
def test_colours_follow_the_matrix_and_range_of_the_stream(name, matrix, full, shared_data):
    path = shared_data / "videos/torchcodec" / f"{name}.mp4"
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0)).reformat(format="yuv444p")
    y, u, v = frame.to_ndarray().astype(float)
    y, u, v = (
        (y / 255, (u - 128) / 255, (v - 128) / 255) if full else ((y - 16) / 219, (u - 128) / 224, (v - 128) / 224)
    )
    image = next(open_video(path)).image

    def error(kr, kb):
        r, b = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
        g = (y - kr * r - kb * b) / (1 - kr - kb)
        return np.abs(np.clip(np.stack([r, g, b], -1) * 255, 0, 255) - image).mean()

    assert error(*matrix) < 3  # what is left is the filter that fills in chroma
    for other in {(0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593)} - {matrix}:
        assert error(*other) > error(*matrix) + 1


def test_another_stream_can_be_chosen_by_its_index(shared_data):
    path = shared_data / "videos/torchcodec/nasa_13013.mp4"
    with open_video(path) as best, open_video(path, stream=0) as first:
        assert (best.width, best.height) == (480, 270)
        assert (first.width, first.height) == (320, 180)
    _one_line_error(path, "index of a video stream", "0, 3", stream=1)


# ------------------------------------------------------------------------------------------------------------- timing


def test_two_seconds_at_one_a_second_are_two_ticks(tmp_path):
    path = _write(tmp_path / "a.mp4", range(0, 2000, 100))
    assert _seen(path) == [(0, 0), (1, 10)]
    assert _times(path, 2) == [0, 0.5, 1, 1.5]
    assert len(_times(path, None)) == 20


def test_a_single_frame_gives_the_first_tick(tmp_path):
    assert _times(_write(tmp_path / "a.mkv", [0])) == [0]


def test_a_watch_of_a_given_length_ends_before_the_tick_at_its_end(tmp_path):
    path = _write(tmp_path / "a.mp4", range(0, 5000, 100))
    with open_video(path, 2, until=1.5) as frames:
        assert frames.num_frames == 3
        assert [frame.time for frame in frames] == [0, 0.5, 1]
    with open_video(path, None, until=0.3) as frames:
        assert len(list(frames)) == frames.num_frames == 3
    assert open_video(path, until=60).num_frames == 5


def test_times_count_from_the_first_timestamp(tmp_path):
    path = _write(tmp_path / "a.mkv", range(5300, 7300, 100))
    assert _seen(path) == [(0, 0), (1, 10)]


def test_a_frame_up_to_a_millisecond_late_is_on_its_tick(tmp_path):
    path = _write(tmp_path / "a.mkv", [0, 500, 1001, 1500, 2002, 2500])
    assert _seen(path)[:3] == [(0, 0), (1, 2), (2, 3)]


def test_a_variable_rate_repeats_and_skips_frames(tmp_path):
    path = _write(tmp_path / "a.mkv", [0, 100, 200, 3500, 3600, 4000])
    assert _seen(path)[:5] == [(0, 0), (1, 2), (2, 2), (3, 2), (4, 5)]


def test_a_stream_without_a_duration_plays_to_its_end(tmp_path):
    path = _write(tmp_path / "a.mkv", range(0, 3000, 100), options={"live": "1"})
    with open_video(path) as frames:
        assert frames.duration is None and frames.num_frames is None
        assert [frame.time for frame in frames] == [0, 1, 2]


@pytest.mark.parametrize("jump", [7200_000, 10**10])
def test_a_corrupt_jump_ahead_is_bridged_not_filled(jump, tmp_path):
    stamps = [*range(0, 1000, 100), *range(jump, jump + 1000, 100)]
    with open_video(_write(tmp_path / "a.mkv", stamps)) as frames:
        assert [frame.time for frame in frames] == [0, 1]
    assert frames.warnings and "jump" in frames.summary


class _Stamped:
    """A decoded frame as far as the clock sees it."""

    is_corrupt = False

    def __init__(self, pts, dts=None, duration=100):
        self.pts, self.dts, self.duration = pts, dts, duration


def _clocked(frames):
    """The times that the clock gives to frames stamped in milliseconds, None where one is not newer, and its notes."""
    decoder = object.__new__(decoding.Decoder)
    decoder.time, decoder._unit = Fraction(0), Fraction(1, 1000)
    decoder._origin = decoder._last_duration = decoder._last_delta = None
    decoder.notes = collections.Counter()
    decoder.stream = type("Stream", (), {"average_rate": Fraction(10)})
    return [float(decoder.time) if decoder._advance(frame) else None for frame in frames], decoder.notes


def test_a_frame_that_goes_back_is_not_newer():
    times, notes = _clocked([_Stamped(t) for t in (0, 100, 50, 100, 200)])
    assert times == [0, 0.1, None, None, 0.2]
    assert list(notes.values()) == [2]


def test_missing_timestamps_come_from_dts_or_the_frame_before():
    times, _ = _clocked([_Stamped(0), _Stamped(None, dts=150), _Stamped(None), _Stamped(None, dts=10), _Stamped(500)])
    assert times == [0, 0.15, 0.25, 0.35, 0.5]


def test_a_restarted_stream_goes_on_from_the_newest_frame():
    times, notes = _clocked([_Stamped(t) for t in (60_000, 60_100, 0, 100, 200)])
    assert times == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert list(notes) == ["{} jumps of the timestamps"]


# ------------------------------------------------------------------------------------------------------------- damage


def test_a_truncated_file_keeps_what_is_there_and_says_what_is_missing(tmp_path):
    whole = _noise(tmp_path / "whole.mp4", fmt_options={"movflags": "faststart"})
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with open_video(cut, fps=None) as frames:
        times = [frame.time for frame in frames]
    assert 20 < len(times) < 40 and times == _times(whole, None)[: len(times)]
    assert "of the 6.0 s" in frames.summary


def test_corrupt_bytes_in_the_middle_cost_only_the_frames_they_hit(tmp_path):
    path = _noise(tmp_path / "a.mp4")
    data = bytearray(path.read_bytes())
    middle = len(data) // 3  # inside the pictures: the index follows them
    data[middle : middle + 12_000] = bytes(12_000)
    path.write_bytes(data)
    with open_video(path, fps=None) as frames:
        times = [frame.time for frame in frames]
    assert frames.lost > 0
    assert len(times) + frames.lost >= 60 and times[-1] == pytest.approx(5.9)


def test_a_mp4_cut_before_its_index_is_a_one_line_error(tmp_path):
    path = _noise(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes()[:20_000])
    _one_line_error(path, "damaged format")


def test_a_change_of_size_keeps_the_first_geometry(tmp_path):
    small = _write(tmp_path / "a.ts", range(0, 2000, 100), size=(64, 48))
    large = _write(tmp_path / "b.ts", range(2000, 4000, 100), size=(128, 112))
    joined = tmp_path / "joined.ts"
    joined.write_bytes(small.read_bytes() + large.read_bytes())
    with av.open(str(joined)) as container:
        sizes = {(frame.width, frame.height) for frame in container.decode(video=0)}
    assert sizes == {(64, 48), (128, 112)}
    with open_video(joined) as frames:
        images = [frame.image for frame in frames]
    assert len(images) == 4 and {image.shape for image in images} == {(48, 64, 3)}


# ------------------------------------------------------------------------------------------------------------ opening


def test_what_is_no_video_is_a_one_line_error(tmp_path):
    text = tmp_path / "notes.mp4"
    text.write_text("not a video\n" * 100)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    _one_line_error(tmp_path / "missing.mp4", "nothing there")
    _one_line_error(tmp_path, "a directory")
    _one_line_error(empty, "0 bytes")
    _one_line_error(text, "text")
    _one_line_error("ftp://host/a.mp4", "found ftp")
    _one_line_error(tmp_path / "two\nlines.mp4")


def test_sound_alone_is_a_one_line_error(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    _one_line_error(path, "only audio")


def test_a_rate_that_gives_no_ticks_is_an_error(tmp_path):
    path = _write(tmp_path / "a.mp4", [0])
    for fps in (0, -1, float("nan"), float("inf"), 1e6):
        with pytest.raises(VideoError, match="fps"):
            open_video(path, fps)


def test_a_picture_beyond_the_limit_is_an_error(tmp_path, monkeypatch):
    path = _write(tmp_path / "a.mp4", [0])
    monkeypatch.setattr(decoding, "MAX_PIXELS", 1000)
    _one_line_error(path, "1000 pixels")
    _one_line_error(_write(tmp_path / "a.ts", [0]), "1000 pixels")


def test_a_local_playlist_opens_no_other_file_and_no_connection(tmp_path):
    inside = _write(tmp_path / "inside.ts", range(0, 1000, 100))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        for i, target in enumerate(
            [inside, inside.name, "/etc/passwd", f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"]
        ):
            hls, concat = tmp_path / f"{i}.m3u8", tmp_path / f"{i}.ffconcat"
            hls.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n")
            concat.write_text(f"ffconcat version 1.0\nfile '{target}'\n")
            _one_line_error(hls, "playlists are not followed")
            _one_line_error(concat, "playlists are not followed")
        _one_line_error(f"concat:{inside}|{inside}", "nothing there")
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_name_with_a_colon_or_a_pattern_is_still_a_file(tmp_path):
    for name in ("http:a.mp4", "a%03d.mp4", "a b.mp4"):
        assert _times(_write(tmp_path / name, range(0, 1000, 100))) == [0]
    assert _times(f"file:{tmp_path / 'a b.mp4'}") == _times(f"file://{tmp_path / 'a b.mp4'}") == [0]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path, monkeypatch):
    """Serves `tmp_path`; gives its address."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_video_is_read_from_the_web(tmp_path, web):
    _write(tmp_path / "a.mkv", range(0, 2000, 100))
    assert _seen(f"{web}/a.mkv") == [(0, 0), (1, 10)]
    message = _one_line_error(f"{web}/none.mkv".replace("//", "//user:secret@"), "404")
    assert "secret" not in message


def test_a_playlist_from_the_web_reaches_no_local_file(tmp_path, web):
    inside = _write(tmp_path / "inside.ts", range(0, 1000, 100))
    for name, target in (("web", "inside.ts"), ("local", f"file://{inside}")):
        lines = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n"
        (tmp_path / f"{name}.m3u8").write_text(lines)
    assert _times(f"{web}/web.m3u8") == [0]
    _one_line_error(f"{web}/local.m3u8")


# ------------------------------------------------------------------------------------------------------------ resources


def test_a_long_video_is_decoded_only_as_far_as_it_is_watched(tmp_path, monkeypatch):
    path = _write(tmp_path / "a.mp4", range(0, 60_000, 100), gop=50)
    decoded = []
    advance = decoding.Decoder._advance
    monkeypatch.setattr(
        decoding.Decoder, "_advance", lambda self, frame: decoded.append(frame.pts) or advance(self, frame)
    )
    with open_video(path) as frames:
        assert len(decoded) == 1
        for i, _ in zip(range(3), frames, strict=False):
            assert len(decoded) == 10 * i + 1
        assert len(list(frames)) == 57 and len(decoded) == 600


def test_only_the_newest_frames_are_held(tmp_path, monkeypatch):
    path = _write(tmp_path / "a.mp4", range(0, 60_000, 100), gop=50)
    alive, most = set(), []

    class Held:
        is_corrupt = False

        def __init__(self, frame):
            self.frame, self.pts, self.dts, self.duration = frame, frame.pts, frame.dts, frame.duration
            self.width, self.height, self.side_data = frame.width, frame.height, frame.side_data
            alive.add(self.pts)
            most.append(len(alive))

        def __del__(self):
            alive.discard(self.pts)

    decode = decoding.Decoder._decode
    monkeypatch.setattr(decoding.Decoder, "_decode", lambda self, packet: (Held(f) for f in decode(self, packet)))
    monkeypatch.setattr(decoding.Decoder, "to_rgb", lambda self, held: np.zeros((1, 1, 3), np.uint8))
    assert len(list(open_video(path))) == 60
    assert len(most) == 600 and max(most) <= 4


def test_a_video_closes_at_its_end_on_a_break_and_on_an_error(tmp_path, monkeypatch):
    path = _write(tmp_path / "a.mp4", range(0, 3000, 100))
    closed = []
    close = decoding.Decoder.close
    monkeypatch.setattr(decoding.Decoder, "close", lambda self: closed.append(1) or close(self))
    for _ in open_video(path):
        break
    assert closed  # the last reference is gone
    closed.clear()
    frames = open_video(path)
    assert len(list(frames)) == 3 and closed
    closed.clear()
    with pytest.raises(RuntimeError), open_video(path) as frames:
        raise RuntimeError
    assert closed and list(frames) == []
    frames.close()


def test_a_video_stays_in_its_process(tmp_path, monkeypatch):
    frames = open_video(_write(tmp_path / "a.mp4", [0]))
    monkeypatch.setattr(video.os, "getpid", lambda: -1)
    with pytest.raises(VideoError, match="another process"):
        next(frames)


# ------------------------------------------------------------------------------------------------- letterbox and paced


def test_letterbox_centres_the_picture_on_black():
    wide = letterbox(np.full((50, 100, 3), (10, 200, 255), np.uint8), 64)
    assert wide.shape == (64, 64, 3) and wide.dtype == np.uint8
    assert (wide[16:48] == (10, 200, 255)).all() and not wide[:16].any() and not wide[48:].any()
    tall = letterbox(np.full((30, 10, 3), (10, 200, 255), np.uint8), 60)
    assert (tall[:, 20:40] == (10, 200, 255)).all() and not tall[:, :20].any() and not tall[:, 40:].any()
    assert letterbox(np.full((1, 1000, 3), 9, np.uint8), 32).any(axis=(1, 2)).sum() == 2


@pytest.mark.parametrize("shape", [(64, 64), (90, 160), (160, 90), (37, 101), (101, 37), (2160, 3840), (24, 32)])
def test_letterbox_is_the_published_filter(shape):
    """That of FFmpeg with which VideoLLM-online prepares videos (`data/utils.py`), here on planes of colours."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    size = 48
    graph = av.filter.Graph()
    planes = av.VideoFrame.from_ndarray(np.ascontiguousarray(image.transpose(2, 0, 1)), format="yuv444p")
    source = graph.add_buffer(width=shape[1], height=shape[0], format=planes.format, time_base=Fraction(1))
    wide = f"if(gt(iw,ih),{size},-2)", f"if(gt(iw,ih),-2,{size})"
    scale = graph.add("scale", f"w='{wide[0]}':h='{wide[1]}':flags=bicubic+accurate_rnd+bitexact")
    sink = graph.add("buffersink")
    source.link_to(scale)
    scale.link_to(sink)
    graph.configure()
    graph.push(planes)
    scaled = graph.pull().to_ndarray().transpose(1, 2, 0)
    expected = np.zeros((size, size, 3), np.uint8)
    top, left = (size - scaled.shape[0]) // 2, (size - scaled.shape[1]) // 2
    expected[top : top + scaled.shape[0], left : left + scaled.shape[1]] = scaled
    found = letterbox(image, size)
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert np.array_equal(found, letterbox(image.copy(), size))


def test_letterbox_leaves_a_fitting_picture_alone_and_refuses_other_arrays():
    image = np.zeros((32, 32, 3), np.uint8)
    assert letterbox(image, 32) is image
    for wrong in (image[..., 0], image.astype(np.float32), np.zeros((32, 32, 4), np.uint8), image[:0]):
        with pytest.raises(ValueError, match="expected uint8"):
            letterbox(wrong, 16)


class _Clock:
    """Time that passes only in `sleep` and where the test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def _frames(count):
    return [Frame(float(i), np.zeros((1, 1, 3), np.uint8)) for i in range(count)]


def test_paced_frames_come_at_their_times_to_a_consumer_that_keeps_up():
    clock = _Clock()
    played = paced(_frames(5), clock, clock.sleep)
    seen = []
    for frame in played:
        seen.append((frame.time, clock.now - 100))
        clock.now += 0.3
    assert seen == [(i, pytest.approx(i)) for i in range(5)] and played.dropped == 0


def test_paced_drops_what_a_late_consumer_missed_and_keeps_the_newest():
    clock = _Clock()
    played = paced(_frames(10), clock, clock.sleep)
    seen = []
    for frame in played:
        seen.append(frame.time)
        clock.now += 2.5
    assert seen == [0, 2, 5, 7, 9] and played.dropped == 5


def test_paced_hands_on_a_live_frame_when_it_comes_and_not_with_the_next():
    clock = _Clock()

    def live():
        for frame in _frames(5):
            clock.now = max(clock.now, 100 + frame.time)  # a camera: nothing comes before its time
            yield frame

    seen = [(frame.time, clock.now - 100) for frame in paced(live(), clock, clock.sleep)]
    assert seen == [(i, i) for i in range(5)]


def test_paced_never_drops_the_last_frame():
    clock = _Clock()
    played = paced(_frames(3), clock, clock.sleep)
    assert next(played).time == 0
    clock.now += 100
    assert [frame.time for frame in played] == [2] and played.dropped == 1
    assert list(paced([], clock, clock.sleep)) == []
