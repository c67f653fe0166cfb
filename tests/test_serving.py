"""Claims about the live server's WebSocket: what a client gets, what it is refused, and what it cannot do to others."""

import dataclasses
import json
import re
import struct
import threading
import time

import numpy as np
import pytest
from served import LIMITS, MODEL, PLACES, Client, Served, Silent, frame, jpeg, make_engine, message, until
from test_session import make_model
from websockets.exceptions import ConnectionClosed

from jstream.serving.access import HostRules
from jstream.serving.outside import Outside
from jstream.streaming import step as steps
from jstream.streaming.session import Session

SHORT = dataclasses.replace(LIMITS, fps=1.0, queued=4, errors=5, open_seconds=0.5)
ALLOWED = Outside(HostRules(["127.0.0.1"], "--source_host"), HostRules(["127.0.0.1"], "--webhook_host"))


@pytest.fixture(scope="module")
def served():
    with Served() as server:
        yield server.ready()


@pytest.fixture(scope="module")
def short():
    """A server that has little patience."""
    with Served(SHORT) as server:
        yield server.ready()


@pytest.fixture(scope="module")
def session():
    return Session(make_model(), **MODEL)


def offline(session, times, questions, threshold):
    """The events of an offline session."""
    session.reset()
    session.threshold = threshold
    for seconds in times:
        if seconds in questions:
            session.ask(questions[seconds])
        yield session.see(frame(seconds, seconds))


def same(heard, event):
    said = event.to_dict()
    assert [heard[name] for name in ("time", "state", "text", "start")] == [
        said[name] for name in ("time", "state", "text", "start")
    ]
    assert heard["probs"].keys() == said["probs"].keys() and heard["latency_ms"] > 0
    np.testing.assert_allclose([*heard["probs"].values()], [*said["probs"].values()], atol=1e-4)


# ------------------------------------------------------------------------------------------------------ what is served


def test_a_client_gets_what_an_offline_session_says(served, session):
    questions = {0: "Narrate what happens.", 5: "What is it?"}
    with Client(served, threshold=0.35, queries=[questions[0]]) as client:
        for seconds in range(14):  # longer than the memory
            if seconds == 5:
                client.say(type="ask", text=questions[5])
            client.see(seconds)
        heard = client.watch(14)
    assert client.opened == {
        "type": "opened", "id": client.opened["id"], "memory": "sinks:8", "fps": 1.0, "threshold": 0.35,
        "states": ["silence", "standby", "response"], "queued": 16,
    }  # fmt: skip
    expected = list(offline(session, range(14), questions, 0.35))
    for one, event in zip(heard, expected, strict=True):
        same(one, event)
    assert 0 < sum(event.text is not None for event in expected) < 14
    assert client.notices[1:] == [
        {"type": "asked", "text": text, "time": float(seconds)} for seconds, text in questions.items()
    ]


def test_a_question_is_told_right_before_the_event_of_its_frame(served):
    with Client(served, threshold=1.0) as client:
        client.see(0)
        client.watch(1)
        client.say(type="ask", text="  What is it?\n")
        client.see(2.5)
        assert client.hear() == {"type": "asked", "text": "What is it?", "time": 2.5}
        assert client.hear()["time"] == 2.5


def test_two_clients_get_what_each_would_get_alone(served, session):
    with Client(served, threshold=0.35) as one, Client(served, threshold=0.35, queries=["What is it?"]) as other:
        for seconds in range(6):
            one.see(seconds)
            other.see(seconds)
        heard = one.watch(6), other.watch(6)
    for events, questions in zip(heard, ({}, {0: "What is it?"})):
        for event, expected in zip(events, offline(session, range(6), questions, 0.35), strict=True):
            same(event, expected)


def test_less_memory_may_be_asked_for_and_another_kind_may_not(served):
    with Client(served, memory="sinks:3", threshold=1.0) as client:
        assert client.opened["memory"] == "sinks:3"
        for seconds in range(8):
            client.see(seconds)
        client.watch(8)
        narrow = client.stream.used
    with Client(served, threshold=1.0) as client:
        for seconds in range(8):
            client.see(seconds)
        client.watch(8)
        assert narrow < client.stream.used
    for memory in ("sinks:9", "window:4", "append", "elephant"):
        with Client(served, opening=False) as client:
            client.say(type="open", memory=memory)
            assert client.closed()[0] == 1003
        assert client.notices[0]["status"] == 422 and repr(memory) in client.notices[0]["message"]


def test_the_threshold_counts_from_the_next_decision_on(served):
    with Client(served, threshold=0) as client:
        states = []
        for seconds, threshold in enumerate([0, 1, 0, None]):
            client.say(type="threshold", value=threshold)
            client.see(seconds)
            states.append(client.watch(1)[0]["state"])
        assert client.stream.threshold is None
    assert states[0] == states[2] == "response" != states[1]


def test_a_threshold_that_is_changed_all_the_time_is_heard_slowly():
    with Served(dataclasses.replace(LIMITS, fps=50, queued=4)) as server:
        with Client(server.ready(), threshold=0) as client:
            began = time.monotonic()
            for number in range(64):
                client.say(type="threshold", value=number / 64)
            until(lambda: client.stream.threshold == 63 / 64)
            assert time.monotonic() - began > 20 / 50  # a half of those beyond the burst
            client.see(0)
            assert client.watch(1) and not client.stream.end


def test_close_sees_what_waits_and_says_how_much_that_was(served):
    with Client(served, threshold=1.0) as client:
        with served.held():
            for seconds in range(5):
                client.see(seconds)
            client.say(type="close")
            client.see(5)  # too late
            client.say(type="ask", text="And now?")
            until(lambda: client.stream.log.last == 3)
        assert client.closed() == (1000, "closed")
    assert [event["time"] for event in client.events] == [0, 1, 2, 3, 4]
    assert [notice.get("status") for notice in client.notices[1:3]] == [409, 409]
    assert client.notices[-1] == {"type": "ended", "reason": "closed", "events": 5}


# ---------------------------------------------------------------------------------------------------- what is refused

TIME = struct.pack(">d", 50)  # stands for a time that is right
PICTURE = jpeg(0)
SIZE = re.search(rb"\xff\xc0\x00\x11\x08(....)", PICTURE, re.DOTALL)
assert SIZE is not None
BOMB = PICTURE[: SIZE.start(1)] + struct.pack(">HH", 60_000, 60_000) + PICTURE[SIZE.end(1) :]

WRONG = {
    "no JSON": ("{", 422, "JSON"),
    "no object": ("[]", 422, "object"),
    "no type": ("{}", 422, "type"),
    "unknown type": ('{"type": "dance"}', 422, "dance"),
    "open again": ('{"type": "open"}', 409, "expected `open` once"),
    "no text": ('{"type": "ask"}', 422, "text"),
    "a text that is none": ('{"type": "ask", "text": 3}', 422, "string"),
    "an empty text": ('{"type": "ask", "text": ""}', 422, "text"),
    "a blank text": ('{"type": "ask", "text": " \\n"}', 422, "found 0"),
    "half a character": ('{"type": "ask", "text": "\\ud800"}', 422, "JSON"),
    "a field too many": ('{"type": "close", "now": true}', 422, "now"),
    "too long a question": (json.dumps({"type": "ask", "text": "x" * 2001}), 422, "2000"),
    "too long a message": (json.dumps({"type": "ask", "text": "x" * 20_000}), 413, "at most 16384 characters"),
    "too high a threshold": ('{"type": "threshold", "value": 1.5}', 422, "value"),
    "a threshold that is none": ('{"type": "threshold", "value": NaN}', 422, "value"),
    "a webhook": ('{"type": "ask", "text": "?", "webhook": "https://a.example"}', 403, "--webhook_host=a.example"),
    "nothing": (b"", 422, "8 bytes of time"),
    "no picture": (TIME, 422, "8 bytes of time"),
    "no time": (message(float("nan"), PICTURE), 422, "seconds"),
    "a time before the first": (message(-1, PICTURE), 422, "seconds"),
    "a time without end": (message(float("inf"), PICTURE), 422, "seconds"),
    "text": (message(50, b"GIF89a and so on"), 422, "expected a JPEG"),
    "a JPEG that is cut off": (message(50, PICTURE[: len(PICTURE) // 2]), 422, "expected a JPEG"),
    "a bomb": (message(50, BOMB), 422, "at most 65536 pixels"),
    "too large a picture": (message(50, b"\xff" * (LIMITS.frame_bytes + 1)), 413, "at most 65536 bytes"),
}


@pytest.fixture(scope="module")
def patient():
    """A client that sends what is wrong, again and again."""
    with Served() as server, Client(server.ready(), threshold=1.0) as client:
        client.see(60)
        client.watch(1)
        yield client


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_answered_with_a_sentence_and_the_stream_goes_on(patient, what):
    given, status, words = WRONG[what]
    later = patient.events[-1]["time"] + 100
    if isinstance(given, bytes) and len(given) > 8 and given[:8] == TIME:
        given = message(later - 1, given[8:])
    patient.say(given)
    notice = patient.hear()
    assert notice["type"] == "error" and notice["status"] == status and words in notice["message"]
    assert "\n" not in notice["message"] and len(notice["message"]) <= 400
    patient.see(later)
    assert patient.watch(1)[0]["time"] == later


def test_times_have_to_increase(served):
    with Client(served, threshold=1.0) as client:
        for seconds in (0, 3, 3, 2, 4):
            client.see(seconds)
        assert [event["time"] for event in client.watch(3)] == [0, 3, 4]
    told = [(notice["time"], notice["message"]) for notice in client.notices[1:]]
    assert told == [(late, f"expected a frame later than 3 s, found one of {late} s") for late in (3, 2)]


def test_questions_that_wait_are_bounded_in_number_and_in_length(served):
    with Client(served, threshold=1.0) as client:
        for _ in range(17):
            client.say(type="ask", text="?")
        assert "at most 16 questions" in client.hear()["message"]
        client.see(0)
        client.watch(1)
        for _ in range(2):
            client.say(type="ask", text="Narrate " * 200)
        refused = client.hear()
        assert refused["status"] == 429 and "tokens of questions" in refused["message"]
    assert sum(notice["type"] == "asked" for notice in client.notices) == 16


def test_frames_above_the_rate_are_refused(short):
    with Client(short, threshold=1.0) as client:
        for seconds in range(7):
            client.see(seconds)
        until(lambda: client.stream.log.last >= 8)
        client.say(type="close")
        assert client.closed()[0] == 1000
    errors = [notice for notice in client.notices if notice["type"] == "error"]
    assert len(client.events) + len(errors) == 7 and len(errors) >= 2
    assert {error["status"] for error in errors} == {429} and "at most 1 frames a second" in errors[0]["message"]


def test_a_client_that_is_faster_than_the_model_is_told_what_is_not_seen(served):
    with Client(served, threshold=1.0) as client:
        with served.held():
            for seconds in range(19):
                client.see(seconds)
            until(lambda: client.stream.dropped == 3)
        assert [event["time"] for event in client.watch(16)] == list(range(16))
        client.see(19)
        assert client.watch(1)[0]["time"] == 19
    assert client.notices[1:] == [{"type": "dropped", "time": 15.0 + total, "total": total} for total in (1, 2, 3)]


def test_a_client_that_makes_only_errors_is_sent_away(short):
    with Client(short) as client:
        for _ in range(5):
            client.say("nonsense")
        code, reason = client.closed()
    assert code == 1008 and "fewer than 5 errors" in reason
    assert [notice["type"] for notice in client.notices] == ["opened", *["error"] * 5, "ended"]


@pytest.mark.parametrize(
    ("first", "status", "code", "words"),
    [
        (b"\0" * 100, 422, 1003, "expected {\"type\": \"open\"} first"),
        ("{", 422, 1003, "JSON"),
        ('{"type": "close"}', 422, 1003, "found 'close'"),
        ('{"type": "open", "fps": 2000}', 422, 1003, "at most 1 frames"),
        ('{"type": "open", "fps": 0}', 422, 1003, "fps"),
        ('{"type": "open", "queries": ["", "?"]}', 422, 1003, "queries"),
        ('{"type": "open", "webhook": "https://a.example", "queries": ["?"]}', 403, 1008, "--webhook_host=a.example"),
        (None, 408, 1008, "within 0.5 s"),
    ],
)  # fmt: skip
def test_a_client_that_does_not_open_a_stream_is_told_why_and_takes_no_place(short, first, status, code, words):
    free = short.hub.free
    with Client(short, opening=False) as client:
        if first is not None:
            client.say(first)
        assert client.closed()[0] == code
    assert client.notices[0]["type"] == "error" and client.notices[0]["status"] == status
    assert words in client.notices[0]["message"]
    until(lambda: short.hub.free == free)


def test_a_message_that_is_too_big_is_told_so(served):
    with Client(served) as client:
        try:
            client.socket.send(bytes(2**25))
        except ConnectionClosed:  # it may hear of it before all is sent
            pass
        assert client.closed()[0] == 1009
        until(lambda: client.stream.end)


# ------------------------------------------------------------------------------------------------- places and others


def test_a_full_server_says_so_and_a_place_that_is_left_is_free():
    with Served(outside=ALLOWED) as server:
        server.ready()
        clients = [Client(server) for _ in range(PLACES)]
        with Client(server, opening=False) as late:
            late.say(type="open")
            code, reason = late.closed()
        assert code == 1013 and late.notices[0]["status"] == 429 and f"all {PLACES} taken" in reason
        status, headers, body = server.ask("POST", "/v1/streams", {"source": "rtsp://127.0.0.1:9/live"})
        assert status == 429 and f"all {PLACES} taken" in body["detail"] and int(headers["retry-after"]) > 0
        clients[1].socket.close()
        until(lambda: server.hub.free == 1)
        with Client(server) as late:
            late.see(0)
            late.watch(1)
        for client in clients:
            client.__exit__()
        until(lambda: server.hub.free == PLACES)


def test_nothing_is_compiled_for_those_who_come_and_go(served):
    compiled = steps.compile_step.cache_info().misses
    for number in range(4):
        with Client(served, threshold=number % 2, fps=2.0) as one, Client(served, memory="sinks:2") as other:
            for client in (one, other):
                client.see(number)
                client.say(type="ask", text="What is it?")
                client.see(number + 1)
                client.watch(2)
    assert steps.compile_step.cache_info().misses == compiled


def test_a_client_that_breaks_off_in_a_frame_leaves_its_place(served):
    client = Client(served)
    client.see(0)
    client.watch(1)
    free = served.hub.free
    client.socket.socket.sendall(b"\x82\xfe\xff\xff" + bytes(1000))  # the beginning of a message of 64 kB
    client.socket.socket.shutdown(2)
    until(lambda: served.hub.free == free + 1)
    assert client.stream.end == "the client has gone"


def test_a_client_that_does_not_read_is_cut_off_and_what_waits_for_it_is_bounded():
    limits = dataclasses.replace(LIMITS, errors=10**6, behind=50, history=200, write_seconds=0.3)
    with Served(limits, buffer=4096) as server:
        server.ready()
        with Silent(server) as client:
            client.open()
            stream = server.hub.streams()[0]
            while stream.end is None:
                client.say(b'{"type": "' + b"x" * 200 + b'"}')
            assert "expected a reader" in stream.end or "expected a client that reads" in stream.end
            assert len(stream.log.behind(0)) <= 200
            until(lambda: server.hub.free == PLACES)


def test_a_stream_that_fails_ends_alone(served, monkeypatch):
    with Client(served, threshold=1.0) as one, Client(served, threshold=1.0) as other:
        engine, unlucky = served.hub.engine, served.hub._places[one.opened["id"]]
        see = engine.see

        def fails(place, *args):
            if place == unlucky:
                raise RuntimeError("boom")
            see(place, *args)

        monkeypatch.setattr(engine, "see", fails)
        one.see(0)
        other.see(0)
        assert one.closed() == (1011, "a fault of the server")
        assert one.notices[-1] == {"type": "ended", "reason": "a fault of the server", "events": 0}
        other.see(1)
        assert [event["time"] for event in other.watch(2)] == [0, 1]


def test_every_reply_is_posted_once_for_every_query_with_a_webhook_from_its_frame_on():
    posted = []
    told = lambda stream, event, number, query, said: posted.append((event, number, query.webhook, said.time))
    urls = [f"http://127.0.0.1:{port}/" for port in (1, 2)]
    with Served(outside=ALLOWED, on_reply=told) as server:
        server.ready()
        with Client(server, threshold=0, queries=["Narrate.", {"text": "What?", "webhook": urls[0]}]) as client:
            for seconds in range(2):
                client.see(seconds)
            client.say(type="ask", text="And now?", webhook=urls[1])
            for seconds in range(2, 5):
                client.see(seconds)
            events = client.watch(5)
    expected = [
        (index + 1, number, url, float(index))
        for index, event in enumerate(events)
        for number, url, since in ((2, urls[0], 0), (3, urls[1], 2))
        if event["text"] and index >= since
    ]
    assert posted == expected and len(expected) >= 5


# --------------------------------------------------------------------------------------------- before there is a model


def test_a_server_that_loads_says_how_far_it_is_and_takes_nobody():
    going, loaded = threading.Event(), threading.Event()

    def make(progress):
        progress("compiling", 3, 9)
        going.set()
        assert loaded.wait(30)
        return make_engine()

    with Served(make=make, outside=ALLOWED) as server:
        assert going.wait(30)
        status, _, health = server.ask("GET", "/healthz")
        seconds = health.pop("seconds")
        assert status == 503 and seconds >= 0
        assert health == {"status": "loading", "stage": "compiling", "done": 3, "total": 9, "error": None}
        status, _, about = server.ask("GET", "/v1/server")
        assert status == 200 and about["status"] == "loading" and about["free"] == 0
        assert [about[name] for name in ("model", "states", "threshold", "memory", "places")] == [None] * 5
        with Client(server, opening=False) as client:
            client.say(type="open")
            assert client.closed()[0] == 1013
        assert client.notices[0]["status"] == 503 and "being loaded" in client.notices[0]["message"]
        status, headers, body = server.ask("POST", "/v1/streams", {"source": "rtsp://127.0.0.1:9/live"})
        assert status == 503 and "being loaded" in body["detail"] and int(headers["retry-after"]) > 0
        loaded.set()
        server.ready()
        assert server.ask("GET", "/healthz")[0] == 200
        with Client(server) as client:
            client.see(0)
            client.watch(1)


def test_a_model_that_cannot_be_loaded_says_why():
    def make(_):
        raise OSError("no weights\nin this folder")

    with Served(make=make) as server:
        until(lambda: server.hub.status.state == "failed")
        status, _, health = server.ask("GET", "/healthz")
        assert (status, health["status"], health["error"]) == (503, "failed", "no weights in this folder")
        with Client(server, opening=False) as client:
            client.say(type="open")
            assert client.closed()[0] == 1013
        assert client.notices[0]["message"] == "the model could not be loaded: no weights in this folder"
