"""Claims about `jstream.serving.alerts`: what a webhook's receiver gets, and what is not lost.

Receivers are real, on loopback. Time is a number that leaps to whatever is due next.
"""

import base64
import email.utils
import hashlib
import hmac
import http.server
import json
import pathlib
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest

from jstream.errors import UserError
from jstream.serving import alerts as module
from jstream.serving import webhook
from jstream.serving.access import HostRules, NotAllowed, check_url
from jstream.serving.alerts import Alert, Alerts, delay
from jstream.serving.spool import Spool
from jstream.serving.webhook import Attempt, secret_of, signed_headers, wait_asked

EVENT = {
    "time": 6.0,
    "state": "response",
    "text": "The kettle boils… \ud83d",
    "start": None,
    "probs": {"response": 0.95},
}
SECRET = b"a key of sixteen and more bytes"
HOUR, DAY = 3600, 86400


class Clock(module.Clock):
    """Time that passes only where somebody waits for a time, and then at once."""

    def __init__(self):
        self.time = 5000.0

    def now(self):
        return self.time

    def unix(self):
        return self.time + 1_700_000_000

    def wait(self, changed, seconds):
        if seconds is None:
            changed.wait()
        else:
            self.time += seconds


class Receiver(http.server.ThreadingHTTPServer):
    """Answers its requests as the script says, one after the other, and keeps them.

    A step is a status, (status, headers), `closes` for a connection without an answer, or an event to wait for, after
    which the next step is taken. The last one stays.
    """

    daemon_threads = True

    def __init__(self, *script, tls=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.requests, self.lock = list(script) or [204], [], threading.Lock()
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def place(self):
        return f"127.0.0.1:{self.server_port}"

    @property
    def ids(self):
        return [headers["webhook-id"] for _, headers, _ in self.requests]

    def handle_error(self, request, client_address):
        """A connection that was broken off is what some tests are about."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.requests.append((self.path, self.headers, body))
            take = lambda: self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
            step = take()
            event = step if isinstance(step, threading.Event) else None
            step = take() if event else step
        if event:
            event.wait(30)
        if step == "closes":
            return
        status, headers = step if isinstance(step, tuple) else (step, {})
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def receiver():
    """Makes receivers, and ends them."""
    made = []

    def make(*script, **arguments):
        made.append(Receiver(*script, **arguments))
        return made[-1]

    yield make
    for server in made:
        server.shutdown()
        server.server_close()


@pytest.fixture
def started(monkeypatch):
    """Makes alerts that may go to loopback, and closes them."""
    monkeypatch.setattr(module, "GRACE", 0.1)
    made = []

    def make(spool=None, patterns=("127.0.0.1",), clock=None, **arguments):
        rules = HostRules(patterns, "--webhook_host")
        arguments = {"chance": lambda: 0.0, **arguments}
        made.append(Alerts(rules, SECRET, spool, clock or Clock(), **arguments))
        return made[-1]

    yield make
    for alerts in made:
        alerts.close()


def alert(receiver, number=1, path="/hook", **fields):
    usual = {"id": f"s.{number}.0", "url": f"http://{receiver.place}{path}", "stream": "s", "query": "Tea?"}
    return Alert(**{**usual, "event": EVENT, **fields})


def until(true):
    """Waits for other threads; a test that would wait for ever fails."""
    for _ in range(20_000):
        if true():
            return
        time.sleep(0.001)
    raise AssertionError("it did not come true")


def files(folder):
    return sorted(path.name for path in pathlib.Path(folder).iterdir() if path.name != "lock")


def seconds_between(receiver):
    """Between the attempts, by the timestamps that are signed."""
    times = [int(headers["webhook-timestamp"]) for _, headers, _ in receiver.requests]
    return [later - time for time, later in zip(times, times[1:])]


# ------------------------------------------------------------------------------------------------- what a receiver gets


def test_an_alert_survives_an_error_and_a_broken_connection_and_is_delivered_with_one_id(receiver, started, tmp_path):
    hook = receiver(500, "closes", 204)
    alerts = started(tmp_path)
    assert alerts.post(alert(hook, path="/hook?a=1"))
    until(lambda: alerts.counts().delivered)
    assert hook.ids == ["s.1.0"] * 3
    until(lambda: alerts.counts().pending == 0)
    assert alerts.counts() == module.Counts(0, delivered=1, failed=2, given_up=0, refused=0, unwritten=0, damaged=0)
    assert files(tmp_path) == []
    path, headers, body = hook.requests[-1]
    assert path == "/hook?a=1" and headers["Content-Type"] == "application/json" and headers["Host"] == hook.place
    assert json.loads(body) == {"id": "s.1.0", "stream": "s", "query": "Tea?", "event": EVENT}
    assert {body for _, _, body in hook.requests} == {body}


def test_every_attempt_is_signed_with_its_own_time(receiver, started):
    hook = receiver(500, 204)
    alerts = started()
    alerts.post(alert(hook))
    until(lambda: alerts.counts().delivered)
    assert seconds_between(hook) == [1]
    for _, headers, body in hook.requests:
        signed = headers["webhook-id"].encode() + b"." + headers["webhook-timestamp"].encode() + b"." + body
        digest = hmac.new(SECRET, signed, hashlib.sha256).digest()
        assert headers["webhook-signature"] == "v1," + base64.b64encode(digest).decode()


def verify(headers, body: bytes, secret: str, tolerance: float = 300.0) -> bool:
    """What the docs give to receivers."""
    key = base64.b64decode(secret[6:]) if secret.startswith("whsec_") else secret.encode()
    sent = headers["webhook-timestamp"]
    digest = hmac.digest(key, f"{headers['webhook-id']}.{sent}.".encode() + body, "sha256")
    wanted = b"v1," + base64.b64encode(digest)
    signed = any(hmac.compare_digest(wanted, given.encode()) for given in headers["webhook-signature"].split())
    return signed and abs(time.time() - int(sent)) <= tolerance


def test_a_receiver_tells_the_servers_requests_from_others_with_ten_lines(receiver, started):
    hook = receiver()
    alerts = started(clock=module.Clock())
    alerts.post(alert(hook))
    until(lambda: alerts.counts().delivered)
    _, headers, body = hook.requests[0]
    assert verify(headers, body, SECRET.decode())
    assert not verify(headers, body + b" ", SECRET.decode()) and not verify(headers, body, "another key")
    assert not verify({**headers, "webhook-id": "s.2.0"}, body, SECRET.decode())
    later = {**headers, **signed_headers("s.1.0", int(time.time()) - 301, body, SECRET)}
    assert not verify(later, body, SECRET.decode()) and verify(later, body, SECRET.decode(), tolerance=600)


def test_the_signature_is_that_of_the_specifications_own_libraries():
    key = secret_of("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n")
    headers = signed_headers("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}', key)
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_secret_without_the_prefix_is_its_own_key():
    assert secret_of(" my secret\n") == b"my secret"
    assert secret_of("MfKQ9r8G") == b"MfKQ9r8G"
    assert secret_of("whsec_" + "MfKQ" * 8) == base64.b64decode("MfKQ" * 8)
    for wrong in ("", " \n", "whsec_", "whsec_no base64!", "whsec_abc", "whsec_MfKQ", "whsec_" + "MfKQ" * 22):
        with pytest.raises(UserError, match="JSTREAM_WEBHOOK_SECRET: expected") as raised:
            secret_of(wrong)
        assert "MfKQ" not in str(raised.value)
    with pytest.raises(UserError, match="JSTREAM_WEBHOOK_SECRET: expected"):
        Alerts(HostRules(), b"")


# ------------------------------------------------------------------------------------------------------------ back-off


def test_attempts_come_after_twice_the_time_up_to_ten_minutes_for_a_day(receiver, started, tmp_path):
    hook = receiver(503)
    alerts = started(tmp_path)
    alerts.post(alert(hook))
    until(lambda: alerts.counts().given_up and not alerts.counts().pending)
    gaps = seconds_between(hook)
    assert gaps[:11] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600]
    assert set(gaps[11:-1]) == {600} and sum(gaps) == DAY
    assert alerts.counts().failed == len(hook.requests) and alerts.counts().given_up == 1
    assert files(tmp_path) == []


def test_chance_shortens_a_delay_by_a_quarter_at_most():
    assert [delay(n, None, 0.0) for n in (1, 2, 10, 11, 10_000)] == [1, 2, 512, 600, 600]
    assert [delay(n, None, 1.0) for n in (1, 2, 10, 11, 10_000)] == [0.75, 1.5, 384, 450, 450]
    assert delay(1, 30.0, 0.5) == 30 and delay(9, 30.0, 0.0) == 256 and delay(1, 10 * DAY, 0.0) == HOUR


def test_a_receiver_is_given_the_time_it_asks_for_up_to_an_hour(receiver, started):
    later = lambda seconds: (503, {"Retry-After": str(seconds)})
    hook = receiver(later(120), (429, {"Retry-After": "0"}), later(10**9), later("soon"), 200)
    alerts = started()
    alerts.post(alert(hook))
    until(lambda: alerts.counts().delivered)
    assert seconds_between(hook) == [120, 2, HOUR, 8]


def test_a_time_to_come_back_may_be_a_date():
    now = 1_700_000_000.0
    assert wait_asked(email.utils.formatdate(now + 90, usegmt=True), now) == 90
    assert wait_asked(email.utils.formatdate(now - 90, usegmt=True), now) == 0
    assert wait_asked(" 7 ", now) == 7
    for nothing in (None, "", "-5", "1.5", "soon", "²", "9" * 400, "Tue, 99 Foo 2023 00:00:00 GMT"):
        assert wait_asked(nothing, now) is None


def test_a_receiver_that_is_gone_gets_nothing_more_of_what_waits_for_it(receiver, started, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WORKERS", 1)
    posted = threading.Event()
    hook = receiver(posted, 410, 200)
    alerts = started(tmp_path)
    for number in (1, 2):
        alerts.post(alert(hook, number))
    alerts.post(alert(hook, 3, path="/other"))
    until(lambda: len(files(tmp_path)) == 3)
    posted.set()
    until(lambda: alerts.counts().pending == 0)
    assert hook.ids == ["s.1.0", "s.3.0"]
    assert alerts.counts()[:4] == (0, 1, 1, 2)
    assert files(tmp_path) == []


def test_a_redirect_is_a_failure_and_is_not_followed(receiver, started):
    elsewhere = receiver(200)
    to = {"Location": f"http://{elsewhere.place}/"}
    hook = receiver((302, to), (307, to), (308, to), 201)
    alerts = started()
    alerts.post(alert(hook))
    until(lambda: alerts.counts().delivered)
    assert alerts.counts().failed == 3 and elsewhere.requests == []


# ------------------------------------------------------------------------------------------------------ nothing is lost

SERVER = """
import sys
from jstream.serving.access import HostRules
from jstream.serving.alerts import Alert, Alerts
alerts = Alerts(HostRules(["127.0.0.1"]), b"key", sys.argv[1])
alerts.post(Alert("s.1.0", sys.argv[2], "s", "Tea?", {"time": 6.0}))
sys.stdin.read()
"""


def test_what_a_killed_server_had_not_delivered_its_follower_delivers(receiver, started, tmp_path):
    hook = receiver(500)
    command = [sys.executable, "-c", SERVER, str(tmp_path), f"http://{hook.place}/hook"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as server:
        until(lambda: hook.requests)
        server.send_signal(signal.SIGKILL)
    assert len(files(tmp_path)) == 1
    before = len(hook.requests)
    hook.script = [200]
    alerts = started(tmp_path)
    until(lambda: alerts.counts().delivered and not alerts.counts().pending)
    assert hook.ids[before:] == ["s.1.0"]
    assert hook.requests[-1][2] == hook.requests[0][2]
    assert files(tmp_path) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_server_killed_while_it_writes_leaves_a_whole_file_or_none(tmp_path, monkeypatch, step):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    spool = Spool(tmp_path)
    spool.write({"id": "a", "n": 1})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("os." + step, kill)
        spool.write({"id": "b", "n": 2})
    spool.close()
    assert len(files(tmp_path)) == 2
    again = Spool(tmp_path)
    assert again.read() == ([{"id": "a", "n": 1}], [])
    assert len(files(tmp_path)) == 1
    again.close()


def test_an_alert_is_sent_only_when_it_is_in_the_folder_and_nobody_waits_for_that(
    receiver, started, tmp_path, monkeypatch
):
    written, write = threading.Event(), Spool.write
    monkeypatch.setattr(Spool, "write", lambda *arguments: written.wait(30) and write(*arguments))
    hook = receiver()
    alerts = started(tmp_path)
    assert alerts.post(alert(hook)) and alerts.post(alert(hook))  # twice the same one is one
    assert alerts.counts().pending == 1 and hook.requests == []
    written.set()
    until(lambda: alerts.counts().delivered == 1 and not alerts.counts().pending)
    alerts.post(alert(hook, 2))
    until(lambda: alerts.counts().delivered == 2 and not alerts.counts().pending)
    assert hook.ids == ["s.1.0", "s.2.0"]


def test_a_full_disk_is_counted_and_the_alert_is_sent_all_the_same(receiver, started, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jstream.serving.spool.os.fsync", full)
    hook = receiver()
    alerts = started(tmp_path)
    alerts.post(alert(hook))
    until(lambda: alerts.counts().delivered == 1)
    assert alerts.counts().unwritten == 1 and files(tmp_path) == []


def test_closing_is_soon_and_keeps_what_was_not_received(receiver, started, tmp_path):
    never = threading.Event()
    hook = receiver(*[never, 200] * 5)
    alerts = started(tmp_path)
    for number in range(5):
        alerts.post(alert(hook, number))
    until(lambda: hook.requests)
    alerts.close()
    alerts.close()
    assert len(files(tmp_path)) == 5 and alerts.counts().delivered == alerts.counts().failed == 0
    assert not alerts.post(alert(hook, 6)) and alerts.counts().refused == 1
    never.set()
    before = len(hook.requests)
    following = started(tmp_path)
    until(lambda: not following.counts().pending)
    assert sorted(hook.ids[before:]) == [f"s.{number}.0" for number in range(5)]


def test_alerts_come_back_oldest_first_and_are_given_up_by_their_age(receiver, started, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WORKERS", 1)
    hook, clock = receiver(500, 500, 200), Clock()
    spool = Spool(tmp_path)
    for number, age in ((1, 2 * DAY), (2, DAY / 2), (3, -DAY)):
        fields = {name: getattr(alert(hook, number), name) for name in ("id", "url", "stream", "query", "event")}
        spool.write({**fields, "created": clock.unix() - age})
    spool.close()
    alerts = started(tmp_path, clock=clock)
    until(lambda: not alerts.counts().pending)
    assert hook.ids == ["s.1.0", "s.2.0", "s.3.0", "s.2.0"]  # the first is older than a day, and was tried once more
    assert alerts.counts()[:4] == (0, 2, 2, 1)


def test_an_alert_whose_file_stayed_comes_again_under_its_id(receiver, started, tmp_path, monkeypatch):
    def stays(*_):
        raise PermissionError(13, "Permission denied")

    hook = receiver()
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "remove", stays)
        alerts = started(tmp_path)
        alerts.post(alert(hook))
        until(lambda: alerts.counts().delivered and not alerts.counts().pending)
        alerts.close()
    again = started(tmp_path)
    until(lambda: again.counts().delivered and not again.counts().pending)
    assert hook.ids == ["s.1.0"] * 2 and files(tmp_path) == []


def test_damaged_files_are_set_aside_and_the_others_delivered(receiver, started, tmp_path):
    hook = receiver()
    spool = Spool(tmp_path)
    fields = {name: getattr(alert(hook), name) for name in ("id", "url", "stream", "query", "event")}
    spool.write({**fields, "created": 1.0})
    spool.write({**fields, "id": "no time"})
    spool.write({**fields, "id": "no url", "url": None, "created": 1.0})
    spool.write({**fields, "id": "no event", "event": [], "created": 1.0})
    spool.write({**fields, "id": "cut", "created": 1.0})
    spool.close()
    cut = next(path for path in tmp_path.glob("*.json") if b'"cut"' in path.read_bytes())
    cut.write_bytes(cut.read_bytes()[:-9])
    for name, content in {"empty": b"", "deep": b"[" * 10**5, "bytes": b"\xff\xfe\x00", "list": b"[]"}.items():
        (tmp_path / f"{name}.json").write_bytes(content)
    shutil.copy(next(tmp_path.glob("*.json")), tmp_path / "copy.json")
    (tmp_path / "notes.txt").write_text("not ours")
    alerts = started(tmp_path)
    until(lambda: alerts.counts().delivered and not alerts.counts().pending)
    assert hook.ids == ["s.1.0"]
    assert alerts.counts().damaged == 9
    assert [name for name in files(tmp_path) if not name.endswith(".damaged")] == ["notes.txt"]
    alerts.close()
    assert started(tmp_path).counts().damaged == 0


def test_a_folder_has_one_server(started, tmp_path):
    first = started(tmp_path / "a" / "spool")
    with pytest.raises(UserError, match="a folder of this server alone"):
        started(tmp_path / "a" / "spool")
    first.close()
    started(tmp_path / "a" / "spool")
    assert (tmp_path / "a" / "spool").stat().st_mode & 0o077 == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a folder that can be written"):
        started(tmp_path / "file")


# --------------------------------------------------------------------------------------------------------------- bounds


def test_receivers_that_do_not_answer_hold_up_nobody_else(receiver, started, tmp_path):
    never = threading.Event()
    dead = [receiver(*[never, 200] * 20) for _ in range(3)]
    well = receiver()
    alerts = started(tmp_path)
    for number in range(30):
        alerts.post(alert(dead[number % 3], number))
    until(lambda: sum(len(hook.requests) for hook in dead) == 6)
    for number in range(100, 120):
        alerts.post(alert(well, number))
    until(lambda: alerts.counts().delivered == 20)
    assert sorted(well.ids) == [f"s.{number}.0" for number in range(100, 120)]
    assert [len(hook.requests) for hook in dead] == [2, 2, 2]
    never.set()
    until(lambda: not alerts.counts().pending)
    assert alerts.counts()[:3] == (0, 50, 0)


def test_receivers_take_turns_however_much_waits_for_one_of_them(receiver, started, monkeypatch):
    monkeypatch.setattr(module, "WORKERS", 1)
    posted = threading.Event()
    hook = receiver(posted, 200)
    alerts = started(patterns=["127.0.0.1", "localhost"], resolve=lambda *_: ["127.0.0.1"])
    for number in range(4):
        alerts.post(alert(hook, number))
    alerts.post(alert(hook, 9, url=f"http://localhost:{hook.server_port}/"))
    posted.set()
    until(lambda: not alerts.counts().pending)
    assert hook.ids == ["s.0.0", "s.9.0", "s.1.0", "s.2.0", "s.3.0"]


def test_beyond_the_bound_the_oldest_stay_and_new_ones_are_refused(receiver, started):
    never = threading.Event()
    hook = receiver(never, 200, never, 200, 200)
    alerts = started(max_pending=3)
    assert [alerts.post(alert(hook, number)) for number in range(5)] == [True] * 3 + [False] * 2
    assert alerts.counts().refused == 2
    never.set()
    until(lambda: not alerts.counts().pending)
    assert sorted(hook.ids) == ["s.0.0", "s.1.0", "s.2.0"]
    assert alerts.post(alert(hook, 9))


def test_the_bytes_that_wait_are_bounded(receiver, started):
    never = threading.Event()
    hook = receiver(never, 200)
    one = len(alert(hook, 1).body())
    alerts = started(max_bytes=2 * one)
    assert [alerts.post(alert(hook, number)) for number in range(3)] == [True, True, False]
    never.set()
    until(lambda: not alerts.counts().pending)
    assert alerts.post(alert(hook, 3)) and not alerts.post(alert(hook, 4, query="x" * 2 * one))


def test_an_answer_without_end_is_cut_off_and_a_trickle_of_one_is_broken_off(receiver, monkeypatch):
    hook = receiver((200, {"Content-Length": str(10**12)}))
    target = check_url(f"http://{hook.place}/", ("http",), HostRules(["127.0.0.1"]))
    tls = ssl.create_default_context()
    monkeypatch.setattr(webhook, "LONGEST", 0.2)
    assert Attempt().post(target, {}, b"{}", tls, 0.0).received  # the status counts
    never = threading.Event()
    hook.script = [never, 200]
    answer = Attempt().post(target, {}, b"{}", tls, 0.0)
    assert (answer.status, str(answer)) == (None, "no answer within 0.2 s")
    stopped = Attempt()
    stopped.stop("the server stops")
    assert str(stopped.post(target, {}, b"{}", tls, 0.0)) == "the server stops"
    never.set()


# -------------------------------------------------------------------------------------------------------- where it goes


def test_a_name_that_turns_to_a_private_address_later_is_refused_then(receiver, started):
    hook = receiver()
    looks = iter([["93.184.216.34"]])
    url = f"http://hook.example.com:{hook.server_port}/"
    alerts = started(patterns=["public"], resolve=lambda *_: next(looks, ["127.0.0.1"]))
    assert alerts.check(url).addresses == ("93.184.216.34",)
    alerts.post(alert(hook, url=url))
    until(lambda: alerts.counts().given_up)
    assert hook.requests == [] and alerts.counts().failed > 100


def test_the_connection_goes_to_the_address_that_was_checked_under_the_name_that_was_given(receiver, started):
    hook = receiver()
    alerts = started(patterns=["hook.invalid"], resolve=lambda *_: ["127.0.0.1"])  # no system knows this name
    alerts.post(alert(hook, url=f"http://Hook.INVALID:{hook.server_port}/x"))
    until(lambda: alerts.counts().delivered)
    assert hook.requests[0][1]["Host"] == f"hook.invalid:{hook.server_port}"


def test_the_next_address_is_tried_where_the_first_refuses(receiver, started):
    hook = receiver()
    alerts = started(patterns=["hook.invalid"], resolve=lambda *_: ["::1", "127.0.0.1"])
    alerts.post(alert(hook, url=f"http://hook.invalid:{hook.server_port}/"))
    until(lambda: alerts.counts().delivered)
    assert alerts.counts().failed == 0


def test_a_webhook_without_permission_is_refused_when_it_is_named(started):
    alerts = started(patterns=["hook.example.com"], resolve=lambda *_: ["10.0.0.1"])
    assert alerts.check("https://hook.example.com/x").port == 443
    for url in (
        "https://other.example.com/",
        "rtsp://hook.example.com/",
        "https://me:pw@hook.example.com/",
        "http://[",
    ):
        with pytest.raises(NotAllowed):
            alerts.check(url)


def test_an_alert_to_a_url_that_is_none_harms_nobody(receiver, started):
    hook = receiver()
    alerts = started()
    for number, url in enumerate(["http://[", "", "nonsense", "http://127.0.0.1:99999/"]):
        alerts.post(alert(hook, number, url=url))
    alerts.post(alert(hook, 9))
    until(lambda: alerts.counts().given_up == 4 and alerts.counts().delivered == 1)


@pytest.mark.may_skip("a certificate is made with openssl, which not every system has")
def test_a_certificate_has_to_be_valid_and_of_the_name(receiver, started, tmp_path, monkeypatch):
    if not shutil.which("openssl"):
        pytest.skip("no openssl here")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=hook.invalid"
    files = ["-addext", "subjectAltName=DNS:hook.invalid", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*make.split(), *files], check=True, capture_output=True)
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(certificate, key)
    hook = receiver(tls=served)
    known = ssl.create_default_context(cafile=str(certificate))
    connect = socket.create_connection
    to_the_hook = lambda place, seconds: connect((place[0], hook.server_port), seconds) if place[1] == 443 else None
    monkeypatch.setattr(webhook.socket, "create_connection", to_the_hook)
    outcomes = {}
    for name, tls in {"hook.invalid": known, "other.invalid": known, "stranger": None}.items():
        host = "hook.invalid" if name == "stranger" else name
        alerts = started(patterns=[host], resolve=lambda *_: ["127.0.0.1"], tls=tls)
        alerts.post(alert(hook, url=f"https://{host}/"))
        until(lambda: alerts.counts().delivered or alerts.counts().failed)  # noqa: B023
        outcomes[name] = bool(alerts.counts().delivered)
        alerts.close()
    assert outcomes == {"hook.invalid": True, "other.invalid": False, "stranger": False}
    assert [headers["Host"] for _, headers, _ in hook.requests] == ["hook.invalid"]
