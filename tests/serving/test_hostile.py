"""A crowd of clients that mean no good against the real server, while one that means well is served beside them."""

import json
import random
import re
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from served import HANDSHAKE, Client, until
from server_process import ServerProcess

from jstream.serving.transport import LINGER

TOKEN = "a-token-of-sixteen-and-more"
AUTHORIZED = HANDSHAKE.replace(b"\r\n\r\n", f"\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
PLACES, CROWD, AT_A_TIME = 12, 500, 8
OPEN = b'{"type": "open"}'
GROWTH = 8 * 2**20  # bytes of memory that a second crowd may cost: an allocator is not to be told to the page


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ServerProcess(tmp_path_factory.mktemp("compiled"), f"--streams={PLACES}", token=TOKEN) as process:
        yield process


def text(message):
    """A masked text message; the mask is zeros."""
    length = bytes([0x80 | len(message)]) if len(message) < 126 else b"\xfe" + struct.pack(">H", len(message))
    return b"\x81" + length + bytes(4) + message


class Raw:
    """A connection of bytes."""

    def __init__(self, server, sent=b""):
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        self.socket.sendall(sent)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def shake_hands(self):
        """Sends the handshake and reads the answer."""
        self.socket.sendall(AUTHORIZED)
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += self.socket.recv(1)
        assert b" 101 " in answer, answer
        return self

    def drop(self):
        """Goes without a word."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def rest(self):
        """All that still comes."""
        heard = b""
        while more := self.socket.recv(2**16):
            heard += more
        return heard

    def take(self, count):
        """So many bytes."""
        heard = b""
        while len(heard) < count:
            more = self.socket.recv(count - len(heard))
            assert more, "the connection has ended without a close"
            heard += more
        return heard

    def closed(self):
        """The code of the close, behind any messages. Nobody answers it: a server waits for that, and need not here."""
        while True:
            kind, length = self.take(2)
            message = self.take(struct.unpack(">H", self.take(2))[0] if length == 126 else length)
            if kind == 0x88:
                return struct.unpack(">H", message[:2])[0]


def half_a_request(server, rng):
    with Raw(server, AUTHORIZED[: rng.randrange(1, len(AUTHORIZED) - 1)]) as raw:
        raw.drop()


def half_a_frame(server, rng):
    with Raw(server) as raw:
        raw.shake_hands().socket.sendall(text(OPEN) + b"\x82\xff" + struct.pack(">Q", 50_000) + rng.randbytes(2000))
        raw.drop()


def garbage(server, rng):
    with Raw(server, b"\x16\x03\x01" + rng.randbytes(100) + b"\r\n\r\n") as raw:
        assert raw.rest().startswith(b"HTTP/1.1 400 ")


def garbage_behind_the_handshake(server, rng):
    with Raw(server) as raw:
        raw.shake_hands().socket.sendall(b"\xff" * 30)
        assert raw.closed() == 1002


def no_stream(server, rng):
    with Raw(server) as raw:
        raw.shake_hands().socket.sendall(text(b"what is this?"))
        assert raw.closed() == 1003


def a_wrong_token(server, rng):
    with Raw(server, AUTHORIZED.replace(TOKEN.encode(), rng.randbytes(16).hex().encode())) as raw:
        assert raw.rest().startswith(b"HTTP/1.1 401 ")


def no_ears(server, rng):
    with Raw(server) as raw:
        raw.shake_hands().socket.sendall(text(OPEN) + 40 * text(b"{}"))


KINDS = [half_a_request, half_a_frame, garbage, garbage_behind_the_handshake, no_stream, a_wrong_token, no_ears]


def crowd(server, count):
    """So many of them, several at a time."""
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for done in [pool.submit(KINDS[i % len(KINDS)], server, random.Random(i)) for i in range(count)]:
            done.result()


class Good(threading.Thread):
    """A client that sends a frame whenever it has an answer."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self.over, self.error = threading.Event(), None
        self.client = Client(server, headers=server.headers, threshold=1.0)
        self.start()

    def run(self):
        try:
            while not self.over.is_set():
                self.client.see(len(self.client.events))
                self.client.watch(1)
                time.sleep(0.05)
        except BaseException as error:
            self.error = error

    def leave(self):
        self.over.set()
        self.join(60)
        self.client.say(type="close")
        assert self.client.closed() == (1000, "closed")
        self.client.__exit__()


def streams(server):
    return int(float(re.search(r"^jstream_streams (\S+)$", server.ask("GET", "/metrics")[2], re.MULTILINE)[1]))


def test_a_message_of_50_megabytes_is_answered_with_its_close_code(server):
    for _ in range(2):
        with Raw(server) as raw:
            raw.shake_hands().socket.sendall(text(OPEN))
            size = 50 * 2**20
            try:
                raw.socket.sendall(b"\x82\xff" + struct.pack(">Q", size) + bytes(4) + bytes(size))
            except ConnectionError:
                pass
            assert raw.closed() == 1009
    until(lambda: streams(server) == 0)


def test_ten_thousand_questions_are_answered_up_to_the_bound_and_closed(server):
    ask = text(json.dumps({"type": "ask", "text": "What is it?"}).encode())
    with Raw(server) as raw:
        raw.shake_hands().socket.sendall(text(OPEN))
        try:
            raw.socket.sendall(10_000 * ask)
        except ConnectionError:
            pass
        assert raw.closed() == 1008
    until(lambda: streams(server) == 0)


def test_whoever_goes_on_sending_behind_a_close_is_dropped_and_costs_little(server):
    with Raw(server) as raw:
        raw.shake_hands().socket.sendall(text(OPEN))
        began, cost = time.monotonic(), server.processor_seconds
        with pytest.raises(ConnectionError):
            while time.monotonic() - began < 30:
                raw.socket.sendall(1000 * text(b"garbage"))
        assert LINGER - 1 < time.monotonic() - began < LINGER + 10
        assert server.processor_seconds - cost < 2  # it was 0.7 of every second
    until(lambda: streams(server) == 0)


def test_a_crowd_takes_nothing_and_disturbs_nobody(server):
    good = Good(server)
    crowd(server, 100)  # whatever is made once is made by now
    good.leave()
    until(lambda: streams(server) == 0)
    files, threads = server.files, server.threads

    good = Good(server)
    crowd(server, CROWD)
    between = server.memory
    crowd(server, CROWD)
    after = server.memory
    good.leave()
    assert good.error is None
    times = [event["time"] for event in good.client.events]
    assert times == list(range(len(times))) and len(times) > 10
    assert [notice["type"] for notice in good.client.notices] == ["opened", "ended"]

    until(lambda: streams(server) == 0)
    until(lambda: server.files <= files and server.threads <= threads)
    assert server.ask("GET", "/v1/server")[2]["free"] == PLACES
    assert after - between < GROWTH
    print(f"memory: {between / 2**20:.1f} MB after {CROWD}, {after / 2**20:.1f} MB after {2 * CROWD}")


def test_requests_that_never_end_hold_no_connection(server):
    """Half a request is waited for, but not for ever; meanwhile others are served."""
    files = server.files
    waiting = [Raw(server, AUTHORIZED[:40]) for _ in range(100)]
    assert server.ask("GET", "/healthz")[0] == 200
    for raw in waiting:
        assert raw.rest() == b""  # closed by the server
        raw.socket.close()
    until(lambda: server.files <= files)
