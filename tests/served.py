"""A live server of the smallest model, in a thread: for tests. And the clients that they need: WebSocket and HTTP."""

import contextlib
import functools
import http.client
import io
import json
import socket
import struct
import threading
import time

import numpy as np
import uvicorn
from PIL import Image
from test_session import make_model
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from jstream.data.frames import Frame, fit, from_jpeg
from jstream.serving.api import Server, create_app
from jstream.serving.guard import Door
from jstream.serving.hub import Hub
from jstream.serving.limits import Limits
from jstream.serving.outside import Outside
from jstream.serving.transport import settings
from jstream.streaming.engine import Engine

PLACES = 3
MODEL = dict(memory="sinks:8", capacity=512, max_new_tokens=3)
LIMITS = Limits(fps=1000.0, frame_bytes=64 * 2**10, frame_pixels=256 * 256)  # clients may be as fast as they can
HANDSHAKE = (
    b"GET /v1/live HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
PATIENCE = 120  # seconds for anything that is to happen


def make_engine(progress=None):
    """Compiles once a process: programs are kept by their sizes."""
    return Engine(make_model(), PLACES, **MODEL)


@functools.cache
def jpeg(seed):
    """A picture, as a client sends it."""
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (36, 48, 3), np.uint8)).save(picture, "JPEG")
    return picture.getvalue()


def message(seconds, picture):
    """A binary message of a client."""
    return struct.pack(">d", seconds) + picture


def frame(seconds, seed):
    """What the server makes of such a message."""
    return Frame(float(seconds), fit(from_jpeg(jpeg(seed)), make_model().config.vision))


def until(true, what="it"):
    """Waits for something."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, f"{what} does not come"
        time.sleep(0.005)


def ask(port, method, path, body=None, headers=None):
    """Asks a server of this machine: (status, headers, body), whose JSON is read."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
        given = json.dumps(body) if isinstance(body, dict) else body
        kind = {"content-type": "application/json"} if body is not None else {}
        connection.request(method, path, given, {**kind, **(headers or {})})
        answer = connection.getresponse()
        content = answer.read()
    is_json = answer.headers.get_content_type() == "application/json"
    return (
        answer.status,
        answer.headers,
        json.loads(content) if is_json and content else content.decode("utf-8", "replace"),
    )


class Served:
    """A server on a free port of loopback.

    Args:
        buffer: bytes that the system keeps of what a client has not read; its own measure where None.
    """

    def __init__(
        self, limits=LIMITS, door=None, outside=None, make=make_engine, on_reply=None, buffer=None, alerts=None
    ):
        self.limits, self.hub = limits, Hub(make, limits, on_reply or (lambda *_: None))
        app = create_app(Server(self.hub, door or Door(), outside or Outside(), limits, alerts))
        self.socket = socket.create_server(("127.0.0.1", 0))
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        self.port = self.socket.getsockname()[1]
        self.server = uvicorn.Server(settings(app, limits))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def __enter__(self):
        self.thread.start()
        until(lambda: self.server.started, "the server")
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(PATIENCE)
        self.socket.close()
        assert not self.thread.is_alive()

    def ready(self):
        until(lambda: self.hub.status.state == "ready", "the model")
        return self

    def ask(self, method, path, body=None, headers=None):
        """See `ask`."""
        return ask(self.port, method, path, body, headers)

    def open(self, threshold=None):
        """A stream whose frames come from the test itself."""
        return self.hub.open("live", 1.0, threshold, "sinks:8")

    def see(self, stream, times):
        """Shows frames to such a stream, and waits for their events."""
        for seconds in times:
            events = stream.events
            assert self.hub.see(stream, frame(seconds, int(seconds)), time.perf_counter())
            until(lambda events=events: stream.events > events or stream.end)

    @contextlib.contextmanager
    def held(self):
        """The model takes its time."""
        engine, released = self.hub.engine, threading.Event()
        step = engine.step
        engine.step = lambda *args: (released.wait(PATIENCE), step(*args))[1]
        try:
            yield
        finally:
            released.set()
            engine.step = step


class Client:
    """A client of `/v1/live`. Without `opening` it says nothing by itself."""

    def __init__(self, served, opening=True, headers=None, **fields):
        self.served = served
        url = f"ws://127.0.0.1:{served.port}/v1/live"
        self._connection = connect(url, additional_headers=headers, proxy=None, max_size=None)
        self.socket = self._connection.__enter__()
        self.notices, self.events = [], []
        if opening:
            self.say(type="open", **fields)
            self.opened = self.hear()
            assert self.opened["type"] == "opened", self.opened

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()
        if hasattr(self, "opened") and isinstance(self.served, Served):
            until(lambda: self.stream.end, "the end of the stream")

    @property
    def stream(self):
        return self.served.hub.find(self.opened["id"])

    def say(self, raw=None, /, **fields):
        self.socket.send(json.dumps(fields) if raw is None else raw)

    def see(self, seconds, picture=None):
        self.socket.send(message(seconds, jpeg(int(seconds)) if picture is None else picture))

    def hear(self):
        """The next message."""
        heard = json.loads(self.socket.recv(PATIENCE))
        (self.notices if "type" in heard else self.events).append(heard)
        return heard

    def watch(self, count):
        """The next so many events; notices between them are kept."""
        end = len(self.events) + count
        while len(self.events) < end:
            self.hear()
        return self.events[-count:]

    def closed(self):
        """(code, reason) of the close; what comes before is kept."""
        try:
            while True:
                self.hear()
        except ConnectionClosed as error:
            assert error.rcvd is not None, error
            return error.rcvd.code, error.rcvd.reason


class Silent:
    """A client of `/v1/live` that reads nothing but the answer to its handshake, and whose buffers are small."""

    def __init__(self, served):
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(("127.0.0.1", served.port))
        self.socket.sendall(HANDSHAKE)
        assert b" 101 " in self.socket.recv(100)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def open(self):
        self.say(b'{"type": "open"}')
        assert b"opened" in self.socket.recv(2000) + self.socket.recv(2000)

    def say(self, text):
        """A masked text message."""
        with contextlib.suppress(ConnectionError):
            length = bytes([0x80 | len(text)]) if len(text) < 126 else b"\xfe" + struct.pack(">H", len(text))
            self.socket.sendall(b"\x81" + length + bytes(4) + text)
