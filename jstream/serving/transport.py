"""How the server speaks HTTP and WebSocket: uvicorn's protocols, and its settings, for clients that are strangers.

A request that does not arrive whole within some seconds is broken off, so that half a request holds no place; sockets
are counted whatever they speak; and a WebSocket that is closed for what it sends is listened to for a while longer, as
a close over unread bytes would reset the connection before the client has read why. Nothing here knows of streams.
"""

import asyncio
import functools
import json
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from jstream.serving.limits import Limits

SHUTDOWN = 5  # seconds for connections to end when the server does
LINGER = 5.0  # seconds for which a client is listened to that was told why it is closed
LEFTOVER = 2**17  # bytes of which it is still looked for its answer; who sends more does not listen
CALM = 0.02  # seconds between two reads of what it sends
OVERHEAD = 1024  # bytes of a message beside the picture
FULL = json.dumps({"detail": "expected fewer connections at once, found as many as the server takes; try later"})


class Requests(H11Protocol):
    """HTTP, with an end to waiting for a request.

    Args:
        seconds: for a request to arrive whole.
    """

    def __init__(self, *args: Any, seconds: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._seconds = seconds
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._wait_no_more()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """As uvicorn does it, which counts requests alone against `limit_concurrency`."""
        self._wait_no_more()
        if self.limit_concurrency is not None and len(self.connections) > self.limit_concurrency:
            headers = f"content-type: application/json\r\ncontent-length: {len(FULL)}\r\nconnection: close"
            self.transport.write(f"HTTP/1.1 503 Service Unavailable\r\n{headers}\r\n\r\n{FULL}".encode())
            self.transport.close()
            return
        super().handle_websocket_upgrade(event)

    def _wait_for_request(self) -> None:
        """From its first byte to its last one."""
        upgraded = self.transport.get_protocol() is not self
        if upgraded or self.transport.is_closing() or self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._wait_no_more()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self._seconds, self.transport.close)

    def _wait_no_more(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class WebSockets(WebSocketsSansIOProtocol):
    """WebSocket, whose client gets to read why it is closed, and takes little of the server if it does not."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.close_timeout = LINGER
        self._leftover = LEFTOVER

    def data_received(self, data: bytes) -> None:
        if self.close_sent:
            self._leftover -= len(data)
            self.transport.pause_reading()
            self.loop.call_later(CALM, self._read_on)
        if self.conn.parser_exc is None and self._leftover >= 0:
            super().data_received(data)

    def _read_on(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def handle_parser_exception(self) -> None:
        """For a message that is too big or against the protocol. What still comes is thrown away."""
        assert self.conn.close_sent is not None
        code, reason = self.conn.close_sent.code, self.conn.close_sent.reason
        self.stop_keepalive()
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        if self.close_timer is None:
            self.close_timer = self.loop.call_later(LINGER, self.transport.close)
        if self.transport.can_write_eof():  # not over TLS
            self.transport.write_eof()


def settings(app: Any, limits: Limits, certificate: str | None = None, key: str | None = None) -> uvicorn.Config:
    """How uvicorn serves the app.

    Args:
        certificate, key: PEM files, for TLS.
    """
    return uvicorn.Config(
        app,
        http=functools.partial(Requests, seconds=limits.open_seconds),  # type: ignore[arg-type]
        ws=WebSockets,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        ws_max_size=limits.frame_bytes + OVERHEAD,
        ws_per_message_deflate=False,  # pictures do not get smaller, and what a bomb expands to is not to be held
        limit_concurrency=limits.connections,
        timeout_graceful_shutdown=SHUTDOWN,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
