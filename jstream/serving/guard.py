"""`Guard`: what every request passes before anything else looks at it: Host, origin, token, and the size of its body.

ASGI middleware. A WebSocket is refused before its handshake, with the same statuses as a request. It knows nothing of
streams.
"""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers

from jstream.serving.access import bearer_of, host_allowed, origin_allowed, token_matches
from jstream.serving.limits import Limits

SUBPROTOCOL = "jstream.v1"
LINGER = 2.0  # seconds for which the body of a request is read that was refused
PUBLIC = ("/healthz", "/page/")  # and `/`: whoever may connect may see these
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; connect-src 'self' ws: wss:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(self)",
}

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


@dataclasses.dataclass(frozen=True)
class Door:
    """Who may come in.

    Attributes:
        host: where the server listens.
        token: that every request has to bring; None for none.
        origins: pages of others that may talk to the server, such as `https://app.example.com`.
    """

    host: str = "127.0.0.1"
    token: str | None = None
    origins: tuple[str, ...] = ()


class Guard:
    """Lets through what may come in.

    Args:
        app: what lies behind.
        door: who may.
        limits: of the server.
    """

    def __init__(self, app: Any, door: Door, limits: Limits):
        self.app, self.door, self.limits = app, door, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _refuse(scope, receive, send, *refusal)
        elif scope["type"] == "websocket":
            await self.app(scope, receive, send)
        else:
            await self._http(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        """Status and sentence, where it may not come in."""
        host, origin = headers.get("host"), headers.get("origin")
        if not host_allowed(host, self.door.host, self.door.origins):
            return 403, f"expected a name of this server in the Host header, found {_shown(host)}; --origin adds one"
        if not origin_allowed(origin, host, scope["scheme"], self.door.origins):
            return 403, f"expected a page of this server, found one of {_shown(origin)}; --origin adds one"
        path = scope["path"]
        if scope["type"] == "http" and (path == "/" or path.startswith(PUBLIC)):
            return None
        given = bearer_of(headers.get("authorization"), scope.get("subprotocols", ()))
        if self.door.token is not None and not token_matches(given, self.door.token):
            found = "another one" if given else "none"
            return 401, f"expected the server's token as `Authorization: Bearer TOKEN`, found {found}"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.limits.body_bytes:
            return 413, f"expected a body of at most {self.limits.body_bytes} bytes, found {_shown(length)}"
        return None

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:  # whole, as what reads it behind here would make an error of its own of one that is too large
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.limits.body_bytes:
                sentence = f"expected a body of at most {self.limits.body_bytes} bytes, found a larger one"
                return await _refuse(scope, receive, send, 413, sentence)
        given = False

        async def again() -> dict[str, Any]:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        await self.app(scope, again, with_headers)


def _shown(text: str | None) -> str:
    return repr(text[:100]) if text else "none"


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"detail": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] if scope["type"] == "http" else []
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    kind = "http.response" if scope["type"] == "http" else "websocket.http.response"
    await send({"type": f"{kind}.start", "status": status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body, "more_body": scope["type"] == "http"})
    if scope["type"] == "http":  # a close over unread bytes resets the connection, and takes the answer with it
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                while (await receive()).get("more_body"):
                    pass
        await send({"type": f"{kind}.body", "body": b""})
