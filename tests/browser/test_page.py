"""What the page does, as its user sees it: sources, questions, moments, files, and all that can go wrong."""

import fractions
import io
import json
import math
import re
import struct

import av
import numpy as np
import pytest
import webvtt
from page_server import STREAMS, Guests, Pictures, Served
from playwright.sync_api import Page, expect

from jstream.data.frames import from_jpeg
from jstream.data.world import make_world, write_video
from jstream.streaming.event import Event
from jstream.streaming.recording import captions

PHONE = {"width": 360, "height": 640}
ENDED, WATCHING = re.compile("^Ended"), "Watching"
SHAPES = re.compile("circle|square|triangle|star|ring")


def choose(page: Page, source: str) -> None:
    page.locator(f"[name=source][value={source}]").check(force=True)  # what is pressed is the label over it


def state(page: Page):
    return page.locator("#state")


def replies(page: Page) -> list[str]:
    return page.locator("#log .reply p").all_inner_texts()


def questions(page: Page) -> list[tuple[str, str]]:
    """When each was heard, and what it was."""
    times = page.locator("#log .question .moment").all_inner_texts()
    texts = page.locator("#log .question p").all_inner_texts()
    return [(time, text.removeprefix("You asked ")) for time, text in zip(times, texts)]


def play_sample(page: Page, pace: str = "fast") -> None:
    page.select_option("#pace", pace)
    page.get_by_role("button", name="Play the sample clip").click()


def shown(page: Page, element: str) -> bool:
    """Whether an element lies within what is seen without scrolling."""
    box, seen = page.locator(element).bounding_box(), page.viewport_size
    assert box is not None and seen is not None
    return box["y"] >= 0 and box["y"] + box["height"] <= seen["height"] and box["x"] + box["width"] <= seen["width"]


# ------------------------------------------------------------------------------------------------------------- sources


def test_the_sample_clip_is_narrated_and_its_questions_are_answered(visit):
    page = visit()
    play_sample(page)
    expect(state(page)).to_have_text(ENDED)
    said = replies(page)
    missing = {"The green star spins.", "The green star turns blue.", "Blue."} - set(said)
    assert not missing, said
    assert questions(page) == [
        ("0:00", "Tell me what happens."),
        ("0:34", "What colour is the star now?"),
        ("0:46", "How many objects are there now?"),
    ]
    assert page.locator("#seen").inner_text() == "52"
    assert page.locator("#dropped").inner_text() == "0"
    assert page.locator("#said").inner_text() == str(len(said))


def test_every_frame_of_an_uploaded_file_is_seen(visit, server, tmp_path):
    world = make_world(seed=41, index=3)
    write_video(world, tmp_path / "world.mp4", size=128)
    page = visit()
    page.select_option("#pace", "fast")
    page.select_option("#fps", "2")
    page.set_input_files("#file", tmp_path / "world.mp4")
    expect(state(page)).to_have_text(ENDED)
    newest = max(server.get("v1/streams"), key=lambda stream: stream["created"])
    assert (newest["events"], newest["dropped"], newest["fps"]) == (2 * world.duration, 0, 2.0)
    assert page.locator("#seen").inner_text() == str(2 * world.duration)
    assert any(SHAPES.search(text) for text in replies(page))


def write_greys(path, fps=8, seconds=8):
    """A video whose every frame has a grey of its own: 20 and 3 more for each."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=fps, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(fps * seconds):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 + 3 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, fractions.Fraction(1, fps)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


OVERHEAR = """() => {
  const send = WebSocket.prototype.send;
  const bytes = async (what) => [...new Uint8Array(await new Blob([what]).arrayBuffer())];
  window.sent = [];
  WebSocket.prototype.send = function (what) {
    if (typeof what !== "string") window.sent.push(bytes(what));
    send.call(this, what);
  };
}"""


@pytest.mark.parametrize("fps", ["4", "16"])
def test_what_is_sent_of_a_file_is_the_picture_at_each_time(visit, tmp_path, fps):
    write_greys(tmp_path / "greys.mp4")
    page = visit()
    page.evaluate(OVERHEAR)
    page.select_option("#pace", "fast")
    page.evaluate("fps => { document.querySelector('#fps').append(new Option(fps, fps)); }", fps)
    page.select_option("#fps", fps)
    page.set_input_files("#file", tmp_path / "greys.mp4")
    expect(state(page)).to_have_text(ENDED)
    frames = [bytes(frame) for frame in page.evaluate("() => Promise.all(window.sent)")]
    times = [struct.unpack(">d", frame[:8])[0] for frame in frames]
    greys = [from_jpeg(frame[8:]).mean() for frame in frames]
    assert times == [number / int(fps) for number in range(8 * int(fps))]
    assert [round((grey - 20) / 3) for grey in greys] == [int(8 * time) for time in times]


def test_a_file_that_is_no_video_is_refused_in_words(visit, tmp_path):
    (tmp_path / "letter.mp4").write_text("no video")
    page = visit()
    page.set_input_files("#file", tmp_path / "letter.mp4")
    expect(page.locator("#veil_title")).to_have_text("This browser cannot play the video")
    expect(page.locator("#veil_text")).to_contain_text("H.264")


def test_a_camera_is_narrated_and_a_moment_of_it_can_be_looked_up(visit):
    page = visit()
    choose(page, "camera")
    page.get_by_role("button", name="Turn the camera on").click()
    expect(page.locator("#log .reply").first).to_contain_text(SHAPES)
    assert state(page).inner_text() == WATCHING
    assert page.locator("#view").evaluate("view => view.srcObject !== null && view.videoWidth > 0")

    page.locator("#log .reply .moment").first.click()
    expect(page.locator("#peek")).to_be_visible()
    assert page.locator("#peek_picture").evaluate("picture => picture.decode().then(() => picture.naturalWidth)") > 100
    page.keyboard.press("Escape")
    expect(page.locator("#peek")).to_be_hidden()
    page.get_by_role("button", name="Stop").click()
    expect(state(page)).to_have_text(ENDED)
    assert page.locator("#view").evaluate("view => view.srcObject") is None


def test_a_refused_camera_says_what_to_do(visit, chromium):
    browser = chromium("--use-fake-device-for-media-stream", "--deny-permission-prompts")
    page = visit(by=browser)
    choose(page, "camera")
    page.get_by_role("button", name="Turn the camera on").click()
    expect(page.locator("#veil_title")).to_have_text("The camera was refused")
    expect(page.locator("#veil_text")).to_contain_text("Allow it for this page")
    expect(page.get_by_role("button", name="Try again")).to_be_visible()
    page.context.close()
    browser.close()


def test_a_machine_without_a_camera_says_so(visit, chromium):
    browser = chromium()
    page = visit(by=browser)
    choose(page, "camera")
    page.get_by_role("button", name="Turn the camera on").click()
    expect(page.locator("#veil_title")).to_have_text("There is no camera")
    page.context.close()
    browser.close()


def test_a_camera_of_the_network_is_watched_by_the_server_and_seen_on_the_page(visit, server, frames):
    page = visit()
    choose(page, "network")
    with Pictures(frames) as camera:
        page.get_by_label("Address of the stream").fill(camera.address)
        page.get_by_role("button", name="Watch", exact=True).click()
        expect(page.locator("#log .reply").first).to_contain_text(SHAPES)
        expect(page.locator("#snapshot")).to_have_js_property("naturalWidth", 256)
        page.get_by_role("button", name="Stop").click()
        expect(state(page)).to_have_text(ENDED)
        assert not server.running()


def test_a_source_that_the_server_may_not_open_is_refused_in_its_words(visit):
    page = visit()
    choose(page, "network")
    page.get_by_label("Address of the stream").fill("rtsp://192.0.2.1/live")
    page.get_by_role("button", name="Watch", exact=True).click()
    expect(page.locator("#veil_title")).to_have_text("It cannot be watched")
    expect(page.locator("#veil_text")).to_contain_text("192.0.2.1")


# ------------------------------------------------------------------------------------ questions, moments, the threshold


def test_a_question_is_heard_and_answered_in_mid_stream(visit):
    page = visit()
    play_sample(page, pace="played")
    expect(page.locator("#seen")).not_to_have_text("0")
    page.get_by_label("Your question").fill("What colour is the star now?")
    page.get_by_label("Your question").press("Enter")
    asked = page.locator("#log .question", has_text="What colour is the star now?")
    expect(asked.locator(".moment")).to_have_text(re.compile(r"^0:\d\d$"))
    expect(page.locator("#log .reply", has_text="Green.")).to_be_visible()
    assert page.get_by_label("Your question").input_value() == ""


def test_questions_before_the_start_are_asked_with_the_first_frame_and_may_be_taken_back(visit):
    page = visit()
    page.get_by_role("button", name="Do not ask: Tell me what happens.").click()
    page.get_by_label("Your question").fill("Where is the circle now?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.set_input_files("#file", "jstream/assets/tiny/clip.mp4")
    expect(page.locator("#log .question .moment").first).to_have_text("0:00")
    assert questions(page) == [("0:00", "Where is the circle now?")]


def test_a_marker_leads_to_its_moment_by_mouse_and_by_keyboard(visit):
    page = visit()
    play_sample(page)
    expect(state(page)).to_have_text(ENDED)
    slider = page.get_by_role("slider", name="Replies over time")
    slider.focus()
    page.keyboard.press("End")
    marked = page.locator("#log .line[aria-current=true]")
    last = replies(page)[-1]
    expect(marked).to_contain_text(last)
    assert last in (slider.get_attribute("aria-valuetext") or "")
    page.keyboard.press("ArrowLeft")
    expect(marked).to_contain_text(replies(page)[-2])
    page.keyboard.press("Home")
    first = page.locator("#log .reply").first
    expect(first).to_have_attribute("aria-current", "true")

    spins = page.locator("#log .reply", has_text="The green star spins.")
    minutes, seconds = spins.locator(".moment").inner_text().split(":")
    time = 60 * int(minutes) + int(seconds)
    box = page.locator("#timeline").bounding_box()
    assert box is not None
    page.locator("#timeline").click(position={"x": 7 + (box["width"] - 14) * time / 52, "y": 12})
    expect(spins).to_have_attribute("aria-current", "true")
    expect(page.locator("#peek_text")).to_contain_text("The green star spins.")
    expect(page.locator("#subtitle")).to_have_text("The green star spins.")
    assert page.locator("#view").evaluate("view => view.currentTime") == pytest.approx(time, abs=0.1)


def test_a_paused_file_can_be_looked_back_in_and_goes_on_where_it_was(visit):
    page = visit()
    page.select_option("#fps", "4")
    play_sample(page, pace="played")
    expect(page.locator("#log .reply").first).to_be_visible()
    page.get_by_role("button", name="Pause").click()
    expect(state(page)).to_have_text("Paused")
    page.wait_for_timeout(3000)  # for frames that were on their way
    seen = page.locator("#seen").inner_text()
    page.locator("#log .question .moment").first.click()
    assert page.locator("#view").evaluate("view => view.currentTime") == pytest.approx(0, abs=0.1)
    page.wait_for_timeout(1000)
    assert page.locator("#seen").inner_text() == seen
    page.get_by_role("button", name="Go on").click()
    expect(page.locator("#peek")).to_be_hidden()
    expect(page.locator("#seen")).not_to_have_text(seen)


def test_the_threshold_changes_what_is_said_while_the_stream_runs(visit):
    page = visit()
    choose(page, "camera")
    page.get_by_role("button", name="Turn the camera on").click()
    page.get_by_label("Speaks from").fill("0")
    assert not page.get_by_label("Automatic").is_checked()
    expect(page.locator("#threshold_value")).to_have_text("0.00")
    expect(page.locator("#log .reply")).to_have_count(4)  # a reply to every frame
    page.get_by_label("Speaks from").fill("1")
    seen = int(page.locator("#seen").inner_text())
    page.wait_for_timeout(3000)  # for frames that were on their way
    said = len(replies(page))
    expect(page.locator("#seen")).to_have_text(re.compile(rf"^(?!({'|'.join(map(str, range(seen + 8)))})$)"))
    assert len(replies(page)) == said


def test_the_memory_that_was_chosen_is_that_of_the_next_stream(visit, server):
    page = visit()
    expect(page.locator("#memory option").first).to_have_text("sinks, 120 turns")
    page.get_by_label("Memory").select_option("sinks:30")
    play_sample(page, pace="played")
    expect(state(page)).to_have_text(WATCHING)
    assert [stream["memory"] for stream in server.running()] == ["sinks:30"]


# --------------------------------------------------------------------------------------------------- files and leaving


def test_what_is_saved_is_what_came(visit):
    page, received = visit(), []
    heard = lambda socket: socket.on("framereceived", lambda text: received.append(text))
    page.on("websocket", heard)
    play_sample(page)
    expect(state(page)).to_have_text(ENDED)

    def saved(name: str) -> str:
        with page.expect_download() as download:
            page.get_by_role("button", name=name).click()
        assert download.value.suggested_filename == name
        return download.value.path().read_text(encoding="utf-8")

    lines = [text for text in received if "type" not in json.loads(text)]
    assert len(lines) == 52
    assert saved("events.jsonl") == "".join(f"{line}\n" for line in lines)
    events = [
        Event(**{"latency": 0.0} | {key: value for key, value in json.loads(line).items() if key != "latency_ms"})
        for line in lines
    ]
    vtt = saved("captions.vtt")
    assert vtt == captions(events)
    assert [cue.text for cue in webvtt.from_buffer(io.StringIO(vtt))] == replies(page)
    transcript = saved("transcript.txt")
    assert transcript.startswith("0:00  asked: Tell me what happens.\n")
    assert [line.split("  ", 1)[1] for line in transcript.splitlines() if "asked: " not in line] == replies(page)


def test_leaving_the_page_closes_its_stream(visit, server):
    page = visit()
    play_sample(page, pace="played")
    expect(state(page)).to_have_text(WATCHING)
    assert len(server.running()) == 1
    page.goto("about:blank")
    for _ in range(100):
        if not server.running():
            break
        page.wait_for_timeout(100)
    assert not server.running()


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_stream_goes_on_after_its_server_was_started_again(visit, cache):
    with Served(cache, f"--streams={STREAMS}", token="a-secret-of-this-test") as mortal:
        page = visit(mortal, "#token=a-secret-of-this-test")
        assert "token" not in page.url
        play_sample(page, pace="played")
        expect(page.locator("#log .reply").first).to_be_visible()
        before = replies(page)
        mortal.kill()
        expect(page.locator("#veil_title")).to_have_text("Not connected")
        expect(page.locator("#veil_text")).to_contain_text("Trying again in")
        mortal.start(wait=False)
        expect(page.locator("#veil_title")).to_have_text("The model is loading")
        expect(page.locator("#log .note")).to_contain_text("Connected anew; the questions were asked again")
        expect(state(page)).to_have_text(ENDED)
        assert replies(page)[: len(before)] == before
        assert len(replies(page)) > len(before)
        assert page.locator("#seen").inner_text() == "52"  # of a file no frame is lost
        assert page.locator("#log .question").count() == 3


def test_a_token_is_asked_for_and_a_wrong_one_is_not_taken(visit, cache):
    mortal = Served(cache, f"--streams={STREAMS}", token="a-secret-of-this-test")
    try:
        mortal.start(wait=False).wait("loading")
        page = visit(mortal)
        token = page.get_by_role("textbox", name="Token")
        token.fill("another one")
        token.press("Enter")
        expect(page.locator("#access_text")).to_contain_text("not the server's")
        token.fill("a-secret-of-this-test")
        token.press("Enter")
        expect(page.locator("#access")).to_be_hidden()
        expect(page.locator("#server")).to_contain_text(f"{STREAMS} of {STREAMS} places free")
        play_sample(page, pace="played")
        expect(state(page)).to_have_text(WATCHING)
    finally:
        mortal.kill()


def test_a_full_server_is_told_and_tried_again(visit, server):
    page = visit()
    with Guests(server, STREAMS) as guests:
        play_sample(page)
        expect(page.locator("#veil_title")).to_have_text("The server is full")
        expect(page.locator("#veil_text")).to_have_text(
            re.compile(rf"All {STREAMS} places are taken. Trying again in \d+ s")
        )
        expect(page.get_by_role("button", name="Try now")).to_be_visible()
        guests.leave()
        expect(state(page)).to_have_text(ENDED)
    assert page.locator("#seen").inner_text() == "52"


# ------------------------------------------------------------------------------------------------ who can use it, where


def test_a_phone_shows_picture_subtitle_and_question_box_without_scrolling(visit):
    page = visit(viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=3)
    play_sample(page, pace="played")
    expect(page.locator("#subtitle")).to_be_visible()
    for element in ("#stage", "#subtitle", "#question", "#ask button[type=submit]", "#stop"):
        assert shown(page, element), element
    for source in ("sample", "camera", "file", "network"):
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        if source == "sample":
            page.get_by_role("button", name="Stop").tap()
        choose(page, source)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_on_the_page_is_hard_to_reach_or_to_read(visit, axe, scheme):
    page = visit(color_scheme=scheme, bypass_csp=True)  # the scanner is a script of the test's own
    page.add_script_tag(content=axe)

    def scan(moment: str) -> None:
        found = page.evaluate("axe.run()")["violations"]
        assert not [(moment, fault["id"], [node["html"] for node in fault["nodes"]]) for fault in found]

    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    for source in ("camera", "file", "network", "sample"):
        choose(page, source)
        scan(source)
    play_sample(page)
    expect(state(page)).to_have_text(ENDED)
    page.get_by_role("slider", name="Replies over time").focus()
    page.keyboard.press("Home")
    scan("a moment")
    page.get_by_role("button", name=re.compile("Change to")).click()
    assert page.evaluate("document.documentElement.dataset.theme") != scheme
    scan("the other theme")


def test_the_page_can_be_used_with_the_keyboard_alone(visit):
    page = visit()
    page.select_option("#pace", "fast")
    page.locator("[name=source][value=sample]").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Play the sample clip"
    page.keyboard.press("Enter")
    expect(state(page)).to_have_text(ENDED)
    assert math.isclose(float(page.locator("#seen").inner_text()), 52)
