"""What a stream leaves behind: events, captions and the picture, whole or not at all."""

import html
import json

import numpy as np
import pytest
import webvtt
from matplotlib import image

from jstream.streaming import recording
from jstream.streaming.event import Asked, Event
from jstream.streaming.recording import Recording, captions, timeline

SILENT = {"silence": 0.9, "standby": 0.06, "response": 0.04}
SPEAKING = {"silence": 0.1, "standby": 0.1, "response": 0.8}


def said(time: float, text: str, start: float | None = None) -> Event:
    return Event(time, "response", SPEAKING, text, start, latency=0.01)


def stream(frames: int, every: int = 0, text: str = "A red circle moves left.", fps: float = 1.0) -> list[Event]:
    """A stream that speaks at every so-many-th frame, or never."""
    speaks = [every and i % every == every - 1 for i in range(frames)]
    return [said(i / fps, text) if speak else Event(i / fps, "silence", SILENT) for i, speak in enumerate(speaks)]


def cues(events: list[Event]) -> list[tuple[float, float, str]]:
    """(start, end, text) as the webvtt-py parser reads them, entities undone."""
    parsed = webvtt.from_string(captions(events))
    return [(c.start_in_seconds, c.end_in_seconds, html.unescape(c.raw_text)) for c in parsed]


def milliseconds(events: list[Event]) -> list[tuple[str, str]]:
    return [(c.start, c.end) for c in webvtt.from_string(captions(events))]


# ------------------------------------------------------------------------------------------------------- the folder


@pytest.mark.smoke
def test_all_three_files_appear_when_the_stream_ends_well(tmp_path):
    events = stream(12, every=5)
    with Recording(tmp_path / "run", [Asked("What moves?", 0.0)], title="a clip") as record:
        for event in events:
            record.add(event)
        assert [p.name for p in (tmp_path / "run").iterdir()] == ["events.jsonl.partial"]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["captions.vtt", "events.jsonl", "timeline.png"]
    lines = (tmp_path / "run/events.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["time"] for line in lines] == [float(i) for i in range(12)]
    assert len(webvtt.read(tmp_path / "run/captions.vtt")) == 2
    height, width, _ = image.imread(tmp_path / "run/timeline.png").shape
    assert width > 1.5 * height > 0


def test_an_event_is_on_disk_as_soon_as_it_happens(tmp_path):
    with Recording(tmp_path) as record:
        record.add(said(3.0, "Now."))
        assert json.loads((tmp_path / "events.jsonl.partial").read_text())["text"] == "Now."


def test_a_stream_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), Recording(tmp_path) as record:
        record.add(said(3.0, "Now."))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "timeline", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), Recording(tmp_path) as record:
        record.add(said(3.0, "Now."))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_keeps_the_files_of_the_run_before(tmp_path):
    with Recording(tmp_path) as record:
        record.add(said(3.0, "Before."))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="lost"), Recording(tmp_path) as record:
        record.add(said(4.0, "After."))
        raise ValueError("lost the camera")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_adding_to_a_closed_recording_is_an_error(tmp_path):
    with Recording(tmp_path) as record:
        pass
    with pytest.raises(RuntimeError, match="expected an open recording"):
        record.add(said(0.0, "Late."))


def test_any_text_a_model_can_say_reaches_the_disk(tmp_path):
    text = 'quotes " and \\ and \ud800 alone, 水, 🎉'
    with Recording(tmp_path) as record:
        record.add(said(1.0, text))
    assert json.loads((tmp_path / "events.jsonl").read_text(encoding="utf-8"))["text"] == text
    assert "水, 🎉" in webvtt.read(tmp_path / "captions.vtt")[0].text


# ------------------------------------------------------------------------------------------------------- captions


def test_nothing_said_is_a_valid_file_without_cues():
    assert captions(stream(5)) == captions([]) == "WEBVTT\n"
    assert len(webvtt.from_string(captions([]))) == 0


def test_a_caption_stays_two_seconds_or_as_long_as_it_takes_to_read():
    assert milliseconds([said(3.0, "Now.")]) == [("00:00:03.000", "00:00:05.000")]
    assert milliseconds([said(3.0, "x" * 75)]) == [("00:00:03.000", "00:00:08.000")]
    assert milliseconds([said(3.0, "x" * 9000)]) == [("00:00:03.000", "00:00:23.000")]


def test_a_caption_gives_way_to_the_next_reply():
    events = [said(3599.5, "x" * 150), said(3600.25, "Two."), said(400000.0, "Days later.")]
    assert milliseconds(events) == [
        ("00:59:59.500", "01:00:00.250"),
        ("01:00:00.250", "01:00:02.250"),
        ("111:06:40.000", "111:06:42.000"),
    ]


def test_captions_at_the_same_time_both_last():
    assert milliseconds([said(1.0, "One."), said(1.0002, "Two.")]) == [("00:00:01.000", "00:00:03.000")] * 2


def test_text_that_looks_like_markup_or_timing_comes_back_as_it_was():
    texts = ["a & b < c > d", "00:00:01.000 --> 00:00:02.000", "<b>bold</b> &amp;", "NOTE not a note", "WEBVTT"]
    read = cues([said(10.0 * i, text) for i, text in enumerate(texts)])
    assert [text for *_, text in read] == texts
    body = captions([said(0.0, texts[1])]).split("\n", 3)[3]
    assert body.count("-->") == 1  # the cue's own


def test_blank_lines_and_control_characters_cannot_break_a_cue():
    odd = "first\n\n \r\n\x0bsecond\x00\u2028\u2029third\x85\n"
    assert [text for *_, text in cues([said(1.0, odd), said(5.0, "after")])] == ["first\nsecond\nthird", "after"]
    assert captions([said(1.0, "\n \x00")]) == "WEBVTT\n"


# ------------------------------------------------------------------------------------------------------- the picture


def words_of(figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def overlapping(figure) -> list[tuple[str, str]]:
    boxes = [(t.get_text(), t.get_window_extent()) for t in figure.texts if t.get_text()]
    return [(a, b) for i, (a, box) in enumerate(boxes) for b, other in boxes[:i] if box.overlaps(other)]


DENSE = stream(400, every=2)
STREAMS = {
    "five frames": stream(5, every=3),
    "one frame": stream(1),
    "no frames": [],
    "nothing said": stream(60),
    "a clip": stream(30, every=5),
    "live states at 2 fps": [Event(e.time, e.state, {"silence": 0.7, "response": 0.3}) for e in stream(200, fps=2)],
    "dense": DENSE,
    "two hours": stream(7200, every=36, text="long " * 200),
    "no spaces": stream(60, every=9, text="x" * 5000),
    "odd characters": stream(60, every=9, text="水壶 🎉 $x^2$ <b> \\frac \n\n עברית \ud800\u200b\t%s"),
    "all at one time": [said(5.0, f"Reply {i}.") for i in range(200)],
    "a pause of an hour": [*stream(5), said(3600.0, "Back.", start=3.0)],
}


@pytest.mark.filterwarnings("error")  # matplotlib warns of characters it cannot draw
@pytest.mark.parametrize("name", STREAMS)
def test_no_text_of_the_picture_overlaps_another_or_is_cut(name):
    queries = [Asked("What happens? " * 30, 0.0), Asked("And now?", 2.0), Asked("The same time.", 2.0)]
    figure = timeline(STREAMS[name], queries, title="A title with $maths$ that is long " * 10)
    figure.canvas.draw()
    page = figure.bbox
    assert overlapping(figure) == []
    for text in figure.texts:
        box = text.get_window_extent()
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text.get_text()


def test_replies_and_queries_stand_in_the_picture_with_their_times():
    words = words_of(timeline([*stream(6), said(6.0, "The kettle boils.")], [Asked("When?", 2.0)], title="kitchen.mp4"))
    assert {"kitchen.mp4", "6 s", "The kettle boils.", "2 s  asked", "When?"} <= set(words)
    assert "7 frames  ·  1 reply  ·  1 query" in words


def test_texts_that_do_not_fit_are_counted():
    words = words_of(timeline(DENSE))
    shown = sum(word.startswith("A red circle") for word in words)
    assert 20 < shown < 200
    assert f"400 frames  ·  200 replies  ·  0 queries  ·  +{200 - shown} more texts than fit here" in words


def test_one_reply_among_thousands_of_frames_can_be_seen():
    def blue_pixels(events: list[Event]) -> int:
        figure = timeline(events)
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)  # pyright: ignore
        return (np.abs(pixels - [0x00, 0x72, 0xB2]).max(axis=-1) < 30).sum()

    silent = stream(7200)
    one_speaks = [*silent[:5000], said(5000.0, ""), *silent[5001:]]  # without words, so that no label counts
    assert blue_pixels(one_speaks) - blue_pixels(silent) > 40
