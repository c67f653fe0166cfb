"""One attempt to deliver a webhook: signed as Standard Webhooks 1.0 has it, sent to an address that was checked.

The connection goes to the addresses of a `Target` and looks no name up, so nothing can lead it elsewhere after the
check; for TLS and the Host header the name counts. Redirects are not followed, and nothing is made of an answer but its
status and `Retry-After`. When to try again is decided elsewhere.

Source: github.com/standard-webhooks/standard-webhooks, spec/standard-webhooks.md.
"""

import base64
import binascii
import contextlib
import email.utils
import hashlib
import hmac
import http.client
import math
import socket
import ssl
import threading
from collections.abc import Callable
from typing import NamedTuple

from jstream.errors import UserError
from jstream.serving.access import Target

TIMEOUT = 10.0  # seconds for a connection, and for each read
LONGEST = 30.0  # seconds for all of an attempt: an answer that trickles in would never time out
MAX_ANSWER = 64 * 1024  # bytes of an answer's body that are read, and thrown away, so that the receiver can finish
SECRET_PREFIX = "whsec_"
MIN_SECRET, MAX_SECRET = 24, 64  # bytes, of the specification
SECRET_FLAG = "--webhook_secret_file or JSTREAM_WEBHOOK_SECRET"


class Answer(NamedTuple):
    """What came of an attempt.

    Attributes:
        status: of HTTP; None where there was no answer.
        reason: why not, or what the status is called.
        retry_after: seconds that the receiver asks to wait; None where it does not.
    """

    status: int | None
    reason: str
    retry_after: float | None = None

    @property
    def received(self) -> bool:
        return self.status is not None and 200 <= self.status < 300

    def __str__(self) -> str:
        return self.reason if self.status is None else f"{self.status} {self.reason}".rstrip()


def secret_of(text: str) -> bytes:
    """The key that a secret stands for: `whsec_` and base64 as in the specification; any other text is the key itself.

    Raises:
        UserError: there is none, or what stands behind `whsec_` is no key.
    """
    text = text.strip()
    if not text:
        raise UserError(f"{SECRET_FLAG}: expected a secret, found nothing; write one into the file")
    if not text.startswith(SECRET_PREFIX):
        return text.encode()
    try:
        key = base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
    except binascii.Error:
        key = b""
    if not MIN_SECRET <= len(key) <= MAX_SECRET:
        raise UserError(
            f"{SECRET_FLAG}: expected base64 of {MIN_SECRET} to {MAX_SECRET} bytes behind {SECRET_PREFIX}, found "
            f"{f'{len(key)} bytes' if key else 'something else'}; make one with `echo whsec_$(openssl rand -base64 32)`"
        )
    return key


def signed_headers(id: str, timestamp: int, body: bytes, secret: bytes) -> dict[str, str]:
    """The three headers of the specification; the signature is HMAC-SHA256 over `id.timestamp.body`."""
    digest = hmac.digest(secret, f"{id}.{timestamp}.".encode() + body, hashlib.sha256)
    return {
        "webhook-id": id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": "v1," + base64.b64encode(digest).decode(),
    }


class _Connection(http.client.HTTPConnection):
    """To the addresses of a target, whatever its name stands for by now; `opened` is shown every socket."""

    def __init__(self, target: Target, tls: ssl.SSLContext, opened: Callable[[socket.socket | None], None]):
        super().__init__(target.host, target.port, timeout=TIMEOUT)
        if target.scheme == "https":
            self.default_port = http.client.HTTPS_PORT  # is left out of the Host header
        self._target, self._tls, self._opened = target, tls, opened

    def connect(self) -> None:
        error = OSError("no address")
        for address in self._target.addresses:
            self._opened(None)
            try:
                self.sock = socket.create_connection((address, self._target.port), TIMEOUT)
                break
            except OSError as failure:
                error = failure
        else:
            raise error
        self._opened(self.sock)
        if self._target.scheme == "https":
            self.sock = self._tls.wrap_socket(
                self.sock, server_hostname=self._target.host, do_handshake_on_connect=False
            )
            self._opened(self.sock)  # before the handshake, which may take for ever
            self.sock.do_handshake()


class Attempt:
    """One POST; `stop` ends it from another thread."""

    def __init__(self):
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._stopped = ""

    def post(self, target: Target, headers: dict[str, str], body: bytes, tls: ssl.SSLContext, now: float) -> Answer:
        """Sends a body of JSON and waits for the answer, for `LONGEST` seconds at most. Never raises for the network.

        Args:
            target: for https, the certificate has to be of its host.
            headers: those of the webhook.
            body: JSON.
            tls: how certificates are verified; for https.
            now: unix seconds, to which a `Retry-After` with a date is taken.
        """
        connection = _Connection(target, tls, self._opened)
        timer = threading.Timer(LONGEST, self.stop, (f"no answer within {LONGEST:g} s",))
        timer.daemon = True
        timer.start()
        try:
            connection.request(
                "POST",
                target.path,
                body,
                {"Content-Type": "application/json", "User-Agent": "jstream", "Connection": "close", **headers},
            )
            response = connection.getresponse()
            answer = Answer(
                response.status, _printable(response.reason), wait_asked(response.getheader("Retry-After"), now)
            )
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):  # the status is what counts
                response.read(MAX_ANSWER)
            return answer
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = str(error) if isinstance(error, OSError) and str(error) else type(error).__name__
            return Answer(None, self._stopped or _printable(reason))
        finally:
            timer.cancel()
            connection.close()
            with self._lock:
                self._socket = None

    def stop(self, reason: str = "stopped") -> None:
        """Breaks the connection off."""
        with self._lock:
            self._stopped = self._stopped or reason
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    # not SSLSocket's own, which takes from the reading thread what it reads with
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _opened(self, connected: socket.socket | None) -> None:
        with self._lock:
            if self._stopped:
                raise OSError(self._stopped)
            self._socket = connected


def wait_asked(header: str | None, now: float) -> float | None:
    """Seconds that a `Retry-After` header asks for, given as such or as a date (RFC 9110); None where it is neither."""
    if not header:
        return None
    try:
        if header.strip().isdigit():
            seconds = float(header)
        else:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - now
    except (ValueError, OverflowError):
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _printable(text: str, longest: int = 100) -> str:
    """What a stranger wrote, for one line of a log."""
    return "".join(c if c.isprintable() else "?" for c in text[:longest])
