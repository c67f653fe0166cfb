"""Claims about the live server's HTTP: who may come in, what streams tell, and what is refused."""

import dataclasses
import http.client
import json

import pytest
import webvtt
from prometheus_client.parser import text_string_to_metric_families
from served import LIMITS, PLACES, Client, Served, until
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from jstream.serving.access import HostRules
from jstream.serving.guard import Door
from jstream.serving.outside import Outside

TOKEN = "a-token-of-sixteen-and-more"
BEARER = {"authorization": f"Bearer {TOKEN}"}
UNKNOWN = "0123456789abcdef"
OUTSIDE = Outside(HostRules(["127.0.0.1"], "--source_host"), HostRules(["hooks.example"], "--webhook_host"))


@pytest.fixture(scope="module")
def served():
    with Served(outside=OUTSIDE) as server:
        yield server.ready()


@pytest.fixture(scope="module")
def locked():
    """A server that wants a token, and keeps little."""
    with Served(dataclasses.replace(LIMITS, history=5), Door("127.0.0.1", TOKEN, ("https://app.example",))) as server:
        yield server.ready()


@pytest.fixture
def stream(served):
    one = served.open(threshold=0)
    yield one
    served.hub.end(one, "closed")
    until(lambda: one.end)


def messages(text):
    """(id, type, data) of server-sent events; comments are passed over."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((int(fields["id"]), fields.get("event", "message"), json.loads(fields["data"])))
    return found


# ------------------------------------------------------------------------------------------------------ who may come in


def test_without_the_token_nothing_is_told_but_health_and_the_page(locked):
    for headers in ({}, {"authorization": "Bearer another-token-of-16"}, {"authorization": f"Basic {TOKEN}"}):
        for path in ("/v1/server", "/v1/streams", "/metrics", "/openapi.json", "/v1/nowhere"):
            status, answered, body = locked.ask("GET", path, headers=headers)
            assert status == 401 and "token" in body["detail"] and answered["www-authenticate"] == "Bearer"
    for path in ("/healthz", "/", "/page/style.css"):
        assert locked.ask("GET", path)[0] == 200
    for path in ("/v1/server", "/v1/streams", "/metrics", "/openapi.json"):
        assert locked.ask("GET", path, headers=BEARER)[0] == 200


def socket_status(served, headers=None, subprotocols=None, **options):
    """What a handshake is answered with."""
    url = f"ws://127.0.0.1:{served.port}/v1/live"
    try:
        with connect(url, additional_headers=headers, subprotocols=subprotocols, proxy=None, **options) as socket:
            return 101, socket.subprotocol
    except InvalidStatus as refused:
        return refused.response.status_code, json.loads(refused.response.body)["detail"]


def test_a_websocket_brings_the_token_as_a_header_or_as_a_subprotocol(locked):
    assert socket_status(locked, BEARER) == (101, None)
    assert socket_status(locked, subprotocols=["jstream.v1", f"bearer.{TOKEN}"]) == (101, "jstream.v1")
    for headers, subprotocols in ((None, None), (None, ["jstream.v1", "bearer.wrong"]), ({"authorization": "x"}, None)):
        status, sentence = socket_status(locked, headers, subprotocols)
        assert status == 401 and "token" in sentence


def test_pages_of_others_are_kept_out(locked):
    own = f"http://127.0.0.1:{locked.port}"
    for origin, expected in ((own, 101), ("https://app.example", 101), ("https://evil.example", 403), ("null", 403)):
        status, sentence = socket_status(locked, BEARER, origin=origin)
        assert status == expected and (status == 101 or "--origin" in sentence)
    assert locked.ask("GET", "/v1/server", headers={**BEARER, "origin": own})[0] == 200
    for path in ("/v1/server", "/healthz", "/"):
        assert locked.ask("GET", path, headers={**BEARER, "origin": "https://evil.example"})[0] == 403


def test_a_name_that_was_made_to_point_here_is_kept_out(locked):
    for host in ("evil.example", f"evil.example:{locked.port}", "127.0.0.1.evil.example", ""):
        for path in ("/v1/server", "/healthz", "/"):
            status, _, body = locked.ask("GET", path, headers={**BEARER, "host": host})
            assert status == 403 and "Host header" in body["detail"]
    assert locked.ask("GET", "/v1/server", headers={**BEARER, "host": f"localhost:{locked.port}"})[0] == 200


@pytest.mark.parametrize("length", [65 * 2**10, 8 * 2**20])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused_however_it_comes(served, length, chunked):
    whole = b'{"text": "' + b"x" * length + b'"}'
    body = (whole[at : at + 2**14] for at in range(0, len(whole), 2**14)) if chunked else whole
    status, _, answer = served.ask("POST", f"/v1/streams/{UNKNOWN}/queries", body)
    assert status == 413 and "at most 65536 bytes" in answer["detail"]


@pytest.mark.parametrize(
    "path",
    [
        "/page/../../../../../../etc/passwd",
        "/page/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/page/..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/page/%252e%252e%252fetc%252fpasswd",
        "/page/..%5c..%5cetc%5cpasswd",
        "/page//etc/passwd",
        "/page/%2fetc%2fpasswd",
        "/page/style.css%00",
        "/page/../guard.py",
        "/page/",
    ],
)
def test_no_path_leads_out_of_the_page(served, path):
    status, _, body = served.ask("GET", path)
    assert status == 404 and "root:" not in str(body)


def test_the_page_is_served_with_a_policy_that_lets_nothing_else_in(served):
    status, headers, body = served.ask("GET", "/")
    assert status == 200 and headers.get_content_type() == "text/html" and "<html" in body
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


# ------------------------------------------------------------------------------------------------- opening of sources


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"source": "file:///etc/passwd"}, "scheme rtsp"),
        ({"source": "/etc/passwd"}, "no scheme"),
        ({"source": "concat:/etc/passwd|/etc/hosts"}, "no scheme"),
        ({"source": "rtsp://10.0.0.1/live"}, "--source_host=10.0.0.1"),
        ({"source": "http://169.254.169.254/latest"}, "--source_host=169.254.169.254"),
        (
            {"source": "rtsp://127.0.0.1/", "webhook": "https://a.example/", "queries": ["?"]},
            "--webhook_host=a.example",
        ),
        ({"source": "rtsp://127.0.0.1/", "queries": [{"text": "?", "webhook": "file:///x"}]}, "scheme https"),
    ],
)
def test_what_the_operator_did_not_allow_is_refused_with_the_flag_that_allows_it(served, body, words):
    status, _, answer = served.ask("POST", "/v1/streams", body)
    assert status == 403 and words in answer["detail"]
    assert served.hub.free == PLACES


def test_where_nothing_is_allowed_no_name_is_looked_up(locked):
    status, _, answer = locked.ask("POST", "/v1/streams", {"source": "rtsp://camera.example/live"}, BEARER)
    assert status == 403 and "--source_host=camera.example" in answer["detail"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("{", "body: JSON"),
        (b"\xb1\xb2", "UTF-8"),
        ({}, "source"),
        ({"source": "rtsp://127.0.0.1/", "fps": 0}, "fps"),
        ({"source": "rtsp://127.0.0.1/", "fps": 1e9}, "at most 1000 frames"),
        ({"source": "rtsp://127.0.0.1/", "threshold": 2}, "threshold"),
        ({"source": "rtsp://127.0.0.1/", "memory": "sinks:9"}, "sinks:9"),
        ({"source": "rtsp://127.0.0.1/", "queries": ["?"] * 17}, "queries"),
        ({"source": "rtsp://127.0.0.1/", "more": 1}, "more"),
        ({"source": 3}, "source"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_sentence(served, body, words):
    status, _, answer = served.ask("POST", "/v1/streams", body)
    assert status == 422 and words in answer["detail"] and answer.keys() == {"detail"}
    assert served.hub.free == PLACES


def test_a_source_that_cannot_be_opened_ends_with_the_reason(served):
    status, _, opened = served.ask("POST", "/v1/streams", {"source": "rtsp://user:secret@127.0.0.1:9/live?key=1"})
    assert status == 201 and opened["source"] == "rtsp://…@127.0.0.1:9/live?…"
    path = f"/v1/streams/{opened['id']}"
    until(lambda: served.ask("GET", path)[2]["state"] == "ended")
    ended = served.ask("GET", path)[2]
    assert "Connection refused" in ended["end"] and "secret" not in json.dumps(ended)
    assert messages(served.ask("GET", f"{path}/events")[2])[-1][1] == "ended"
    until(lambda: served.hub.free == PLACES)


# ---------------------------------------------------------------------------------------------------------- one stream


def test_a_stream_that_is_not_there_is_404_and_a_name_that_is_none_422(served):
    for method, tail, body in (
        ("GET", "", None), ("DELETE", "", None), ("PATCH", "", {"threshold": None}),
        ("POST", "/queries", {"text": "?"}),
        ("GET", "/events", None), ("GET", "/captions.vtt", None), ("GET", "/snapshot.jpg", None),
    ):  # fmt: skip
        status, _, answer = served.ask(method, f"/v1/streams/{UNKNOWN}{tail}", body)
        assert status == 404 and "expected the id of a stream" in answer["detail"]
        assert served.ask(method, f"/v1/streams/elephant{tail}", body)[0] == 422
    assert served.ask("GET", "/v1/nowhere")[0] == 404
    status, headers, _ = served.ask("PUT", "/v1/streams")
    assert status == 405 and headers["allow"] == "GET, POST"


def test_a_stream_is_shown_changed_and_deleted(served, stream):
    path = f"/v1/streams/{stream.id}"
    served.see(stream, range(3))
    state = served.ask("GET", path)[2]
    assert [state[name] for name in ("id", "source", "state", "end", "threshold", "memory", "time", "events")] == [
        stream.id, "live", "running", None, 0, "sinks:8", 2.0, 3,
    ]  # fmt: skip
    assert 0 < state["cache"]["used"] <= state["cache"]["capacity"] == 512
    assert 0 < state["latency_ms"]["p50"] <= state["latency_ms"]["p99"]
    assert stream.id in [one["id"] for one in served.ask("GET", "/v1/streams")[2]]
    assert served.ask("GET", f"{path}/snapshot.jpg")[0] == 404  # the pictures are the client's own

    for threshold in (1.0, None, 0.4):
        status, _, changed = served.ask("PATCH", path, {"threshold": threshold})
        assert status == 200 and changed["threshold"] == threshold == stream.threshold
    for body in ({}, {"threshold": -1}, {"threshold": "0.5"}, {"threshold": 0.5, "fps": 2}):
        assert served.ask("PATCH", path, body)[0] == 422

    status, _, heard = served.ask("POST", f"{path}/queries", {"text": " What is it? "})
    assert (status, heard) == (202, {"text": "What is it?"})
    assert served.ask("POST", f"{path}/queries", {"text": ""})[0] == 422
    status, _, refused = served.ask("POST", f"{path}/queries", {"text": "?", "webhook": "https://a.example"})
    assert status == 403 and "--webhook_host=a.example" in refused["detail"]
    for _ in range(15):
        assert served.ask("POST", f"{path}/queries", {"text": "?"})[0] == 202
    status, headers, refused = served.ask("POST", f"{path}/queries", {"text": "?"})
    assert status == 429 and headers["retry-after"] and "at most 16 questions" in refused["detail"]

    free = served.hub.free
    status, _, nothing = served.ask("DELETE", path)
    assert (status, nothing) == (204, "")
    until(lambda: served.hub.free == free + 1)
    ended = served.ask("GET", path)[2]
    assert (ended["state"], ended["end"], ended["cache"]) == ("ended", "closed", None)
    assert served.ask("DELETE", path)[0] == 204
    assert served.ask("PATCH", path, {"threshold": None})[0] == 409
    assert served.ask("POST", f"{path}/queries", {"text": "?"})[0] == 409


def test_a_live_client_is_a_stream_as_well_and_ends_when_it_is_deleted(served):
    with Client(served) as client:
        assert served.ask("DELETE", f"/v1/streams/{client.opened['id']}")[0] == 204
        assert client.closed() == (1000, "closed")


def test_events_can_be_read_from_anywhere_on_without_a_hole_or_a_double(served, stream):
    path = f"/v1/streams/{stream.id}/events"
    served.see(stream, range(3))
    served.hub.drop(stream, 3.5, 2)
    served.ask("POST", f"/v1/streams/{stream.id}/queries", {"text": "What is it?"})

    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    assert answer.status == 200 and answer.headers.get_content_type() == "text/event-stream"
    served.see(stream, [4])  # while it is being read
    served.hub.end(stream, "closed")
    live = messages(answer.read().decode())  # ends with the stream
    connection.close()

    assert [number for number, _, _ in live] == list(range(1, 8))
    kinds = ["message"] * 3 + ["dropped", "asked", "message", "ended"]
    assert [kind for _, kind, _ in live] == kinds
    assert [data["time"] for _, kind, data in live if kind == "message"] == [0, 1, 2, 4]
    assert live[3][2] == {"type": "dropped", "time": 3.5, "total": 2}
    assert live[4][2] == {"type": "asked", "text": "What is it?", "time": 4.0}
    assert live[6][2] == {"type": "ended", "reason": "closed", "events": 4}

    assert messages(served.ask("GET", path)[2]) == live
    for number in range(8):
        assert messages(served.ask("GET", path, headers={"last-event-id": str(number)})[2]) == live[number:]
        assert messages(served.ask("GET", f"{path}?after={number}")[2]) == live[number:]
    assert messages(served.ask("GET", path, headers={"last-event-id": "99"})[2]) == []
    for wrong in ("-1", "x", "1.5", "9" * 17, "²"):
        assert served.ask("GET", path, headers={"last-event-id": wrong.encode()})[0] == 422
    assert served.ask("GET", f"{path}?after=-1")[0] == 422


def test_a_reader_hears_how_much_it_has_missed(locked):
    stream = locked.open(threshold=1.0)
    locked.see(stream, range(7))
    locked.hub.end(stream, "closed")
    until(lambda: stream.end)
    path = f"/v1/streams/{stream.id}/events"
    heard = messages(locked.ask("GET", path, headers={**BEARER, "last-event-id": "1"})[2])
    assert heard[0] == (3, "missed", {"type": "missed", "count": 2})
    assert [number for number, _, _ in heard] == [3, 4, 5, 6, 7, 8]
    assert [data["time"] for _, kind, data in heard if kind == "message"] == [3, 4, 5, 6]
    assert messages(locked.ask("GET", path, headers={**BEARER, "last-event-id": "3"})[2]) == heard[1:]


def test_captions_are_webvtt_of_what_was_said(served, stream, tmp_path):
    path = f"/v1/streams/{stream.id}/captions.vtt"
    assert served.ask("GET", path)[2] == "WEBVTT\n"
    served.see(stream, range(3))
    status, headers, text = served.ask("GET", path)
    assert status == 200 and headers.get_content_type() == "text/vtt"
    (tmp_path / "captions.vtt").write_text(text, encoding="utf-8")
    captions = webvtt.read(str(tmp_path / "captions.vtt")).captions
    assert [caption.start_in_seconds for caption in captions] == [event.time for event in stream.spoken]
    assert captions


def figures(served):
    """The figures of `/metrics`, by name and labels."""
    status, headers, text = served.ask("GET", "/metrics")
    assert status == 200 and headers.get_content_type() == "text/plain"
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_what_happens(served, stream):
    before = figures(served)
    served.see(stream, range(4))
    served.hub.drop(stream, 5, 3)
    after = figures(served)
    grown = lambda name: after[name,] - before[name,]
    assert grown("jstream_frames_total") == 4 and grown("jstream_frames_dropped_total") == 3
    assert grown("jstream_replies_total") == len(stream.spoken) > 0
    assert after["jstream_ready",] == 1 and after["jstream_places",] == PLACES and after["jstream_streams",] == 1
    assert after["jstream_frames_waiting",] == 0 and after["jstream_cache_tokens",] == stream.used > 0
    assert after["jstream_cache_capacity_tokens",] == 512 * PLACES
    assert 0 < after["jstream_latency_seconds", "0.5"] <= after["jstream_latency_seconds", "0.99"]
    served.hub.end(stream, "closed")
    until(lambda: figures(served)["jstream_streams",] == 0)


def test_the_server_tells_what_a_client_has_to_know(served):
    status, _, about = served.ask("GET", "/v1/server")
    assert status == 200 and about.pop("seconds") == round(served.hub.seconds, 1) and about.pop("version")
    assert about == {
        "status": "ready", "stage": "ready", "done": 0, "total": 0, "error": None, "model": "bundled model",
        "states": ["silence", "standby", "response"], "threshold": None, "memory": {"policy": "sinks", "turns": 8},
        "places": PLACES, "free": PLACES, "sources": True, "webhooks": False,
        "limits": {
            "frame_bytes": 65536, "frame_pixels": 65536, "fps": 1000.0, "queued": 16, "query_characters": 2000,
            "queries": 16,
        },
    }  # fmt: skip
