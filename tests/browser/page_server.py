"""A server in a process of its own, as `python -m jstream.serve` starts it, for tests of its page. It can be killed and
started again at the same address; nothing here knows of browsers.
"""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

import websockets.sync.client

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent
STREAMS = 4  # places of a server
READY = 600  # seconds; compiling takes a minute on two idle cores


class Served:
    """One server; a context manager.

    Args:
        cache: folder for compiled programs, so that the second server of a test run starts in seconds.
        flags: of the command, on top of a port.
        token: that it asks for.
    """

    def __init__(self, cache: pathlib.Path, *flags: str, token: str | None = None):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}/"
        self.token = token
        self._command = [sys.executable, "-m", "jstream.serve", f"--port={self.port}", *flags]
        self._environment = os.environ | {
            "PYTHONPATH": str(REPOSITORY),
            "XLA_FLAGS": "",  # what makes tests of small models compile soon makes this one slow
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        if token:
            self._environment["JSTREAM_TOKEN"] = token
        self._process: subprocess.Popen | None = None

    def start(self, wait: bool = True) -> "Served":
        self._errors = tempfile.TemporaryFile("w+")
        streams = {"stdout": subprocess.DEVNULL, "stderr": self._errors, "cwd": REPOSITORY}
        self._process = subprocess.Popen(self._command, env=self._environment, **streams)
        if wait:
            self.wait()
        return self

    def wait(self, state: str = "ready") -> None:
        """Until it is ready, or only answers (`loading`)."""
        deadline = time.monotonic() + READY
        while time.monotonic() < deadline:
            assert self._process is not None
            if self._process.poll() is not None:
                self._errors.seek(0)
                raise RuntimeError(f"expected a server, found it ended: {self._errors.read()[-2000:]}")
            health = self.health()
            if health and health["status"] in ("ready", state):
                return
            time.sleep(0.2)
        raise TimeoutError(f"expected a server that is {state} within {READY} s, found {self.health()}")

    def health(self) -> dict | None:
        try:
            with urllib.request.urlopen(f"{self.address}healthz", timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return json.load(error)
        except OSError:
            return None

    def get(self, path: str):
        """What a path of the API answers."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        with urllib.request.urlopen(urllib.request.Request(self.address + path, headers=headers), timeout=60) as answer:
            return json.load(answer)

    def running(self) -> list[dict]:
        return [stream for stream in self.get("v1/streams") if stream["state"] == "running"]

    def kill(self) -> None:
        """Ends it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> "Served":
        return self.start()

    def __exit__(self, *_) -> None:
        self.kill()


class Guests:
    """Clients that take places of a server and send nothing; a context manager."""

    def __init__(self, server: Served, count: int):
        self._address = server.address.replace("http", "ws") + "v1/live"
        self._count = count
        self._sockets = contextlib.ExitStack()

    def __enter__(self) -> "Guests":
        for _ in range(self._count):
            guest = self._sockets.enter_context(websockets.sync.client.connect(self._address))
            guest.send(json.dumps({"type": "open"}))
            assert json.loads(guest.recv())["type"] == "opened"
        return self

    def leave(self) -> None:
        self._sockets.close()

    def __exit__(self, *_) -> None:
        self.leave()


class Pictures:
    """A camera of the network: JPEG after JPEG over HTTP at `address`; a context manager.

    Args:
        jpegs: shown one after the other, over and over, eight a second.
    """

    def __init__(self, jpegs: list[bytes]):
        self._jpegs = jpegs
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listening.getsockname()[1]}/camera.mjpg"
        self._over = False

    def __enter__(self) -> "Pictures":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._over = True
        self._listening.close()

    def _accept(self) -> None:
        while not self._over:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._show, args=(client,), daemon=True).start()

    def _show(self, client: socket.socket) -> None:
        with client:
            try:
                client.recv(4096)
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=picture\r\n\r\n")
                number = 0
                while not self._over:
                    jpeg = self._jpegs[number % len(self._jpegs)]
                    head = f"--picture\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                    client.sendall(head.encode() + jpeg + b"\r\n")
                    number += 1
                    time.sleep(1 / 8)
            except OSError:
                return
