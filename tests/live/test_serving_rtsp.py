"""The real server and a camera that is killed and comes back while it is watched."""

import http.client
import json
import threading
import time

from served import until
from server_process import ServerProcess
from test_servers import camera as camera  # a fixture

BACK = 10  # seconds within which pictures go on, once the camera is there again


class Events(threading.Thread):
    """Reads a stream's server-sent events to their end: (when it came, type, data)."""

    def __init__(self, server, name):
        super().__init__(daemon=True)
        self.got, self.ended = [], False
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        self.connection.request("GET", f"/v1/streams/{name}/events")
        self.answer = self.connection.getresponse()
        self.start()

    def run(self):
        kind = "message"
        for line in self.answer:
            name, _, value = line.decode().rstrip("\n").partition(": ")
            if name == "event":
                kind = value
            elif name == "data":
                self.got.append((time.monotonic(), kind, json.loads(value)))
                kind = "message"
        self.ended = True

    def of(self, kind):
        return [data for _, what, data in list(self.got) if what == kind]


def test_a_camera_that_comes_back_is_watched_on_and_the_questions_stand(camera, tmp_path):
    source = camera()
    (tmp_path / "secret").write_text("a secret of sixteen and more characters")
    flags = ["--streams=2", "--source_host=127.0.0.1", "--webhook_host=127.0.0.1"]
    flags += [f"--webhook_secret_file={tmp_path}/secret", f"--spool={tmp_path}/spool"]
    with ServerProcess(tmp_path / "compiled", *flags) as server:
        question = {"text": "Narrate what happens.", "webhook": "http://127.0.0.1:9/"}  # nobody is there: they pend
        status, _, opened = server.ask(
            "POST", "/v1/streams", {"source": source.address, "fps": 4, "threshold": 0, "queries": [question]}
        )
        assert status == 201 and opened["source"] == source.address
        path = f"/v1/streams/{opened['id']}"
        events = Events(server, opened["id"])
        until(lambda: len(events.of("message")) >= 4, "an event")
        assert events.of("asked") == [{"type": "asked", "text": "Narrate what happens.", "time": 0.0}]
        status, headers, _ = server.ask("GET", f"{path}/snapshot.jpg")
        assert status == 200 and headers.get_content_type() == "image/jpeg"

        source.kill()
        until(lambda: events.of("gap"), "the gap")
        source.start()
        back = time.monotonic()
        until(lambda: len(events.of("gap")) == 2, "the end of the gap")
        seen = len(events.of("message"))
        until(lambda: len(events.of("message")) > seen + 4, "an event behind the gap")
        first = next(when for when, kind, _ in events.got[events.got.index(over_of(events)) :] if kind == "message")
        assert first - back < BACK
        begins, over = events.of("gap")
        assert begins["seconds"] is None and begins["reason"]
        assert over["seconds"] > 0 and over["time"] == begins["time"]
        assert server.ask("GET", path)[2]["reconnects"] == 1
        behind = [event for event in events.of("message") if event["time"] > over["time"] + over["seconds"]]
        said = [event for event in behind if event["text"]]
        assert behind and said
        until(lambda: alerts_of(tmp_path, said[0]["time"]), "an alert of a reply behind the gap")

        assert server.ask("DELETE", path)[0] == 204
        until(lambda: events.ended, "the end")
        assert events.got[-1][1] == "ended" and events.got[-1][2]["reason"] == "closed"
        times = [event["time"] for event in events.of("message")]
        assert times == sorted(set(times)) and all(4 * t == round(4 * t) for t in times)
        assert len(events.of("asked")) == 1
        assert server.ask("GET", "/v1/server")[2]["free"] == 2


def over_of(events):
    """The notice that the gap is over."""
    return next(got for got in events.got if got[1] == "gap" and got[2]["seconds"] is not None)


def alerts_of(folder, seconds):
    """What waits for the webhook, of the reply at this time."""
    waiting = [json.loads(path.read_text()) for path in (folder / "spool").glob("*.json")]
    return [one for one in waiting if one["query"] == "Narrate what happens." and one["event"]["time"] == seconds]
