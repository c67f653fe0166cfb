"""Alerts from the real server to a receiver that fails, across a server that is killed."""

import base64
import hashlib
import hmac
import http.server
import json
import threading

import pytest
from served import Client, until
from server_process import ServerProcess

SECRET = "a secret of sixteen and more characters"


class Receiver(http.server.ThreadingHTTPServer):
    """Answers with the statuses that it is given, then with 200; keeps what it got."""

    def __init__(self, *statuses):
        self.statuses, self.got = list(statuses), []
        super().__init__(("127.0.0.1", 0), Answer)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class Answer(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append((self.headers, body))
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def receiver():
    one = Receiver(500, 503)
    yield one
    one.shutdown()
    one.server_close()


def test_an_alert_outlives_failures_of_its_receiver_and_a_server_that_is_killed(tmp_path, receiver):
    (tmp_path / "secret").write_text(SECRET + "\n")
    spool = tmp_path / "spool"
    flags = ["--streams=2", "--webhook_host=127.0.0.1", f"--webhook_secret_file={tmp_path}/secret", f"--spool={spool}"]
    url = f"http://127.0.0.1:{receiver.server_port}/hook"
    start = lambda: ServerProcess(tmp_path / "compiled", *flags)

    with start() as server:
        question = {"text": "Say what you see.", "webhook": url}
        with Client(server, threshold=0, queries=[question]) as client:
            client.see(0)
            (event,) = client.watch(1)
            until(lambda: receiver.got)  # and fails
            stream = client.opened["id"]
        server.kill()
    assert len(list(spool.glob("*.json"))) == 1

    with start() as server:
        until(lambda: "jstream_alerts_delivered_total 1.0" in server.ask("GET", "/metrics")[2])
        until(lambda: not list(spool.glob("*.json")))
    assert len(receiver.got) == 3
    assert event["text"] and event["state"] == "response"
    for headers, body in receiver.got:
        assert body == receiver.got[0][1]
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        digest = hmac.digest(SECRET.encode(), signed, hashlib.sha256)
        assert headers["webhook-signature"] == "v1," + base64.b64encode(digest).decode()
        said = json.loads(body)
        assert said["id"] == headers["webhook-id"] == f"{stream}.1.1"
        assert (said["stream"], said["query"]) == (stream, "Say what you see.")
        assert said["event"] == event
