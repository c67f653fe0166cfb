"""`/v1/live`: a WebSocket on which frames and questions come in, and events and notices go out.

    client ─ JPEG with its time ─→ decoded in a pool → hub ─→ the stream's log ─→ client
           └ questions ──────────→ heard with the next frame

One task reads, one writes; what is written comes from the log alone, so that a client that reads nothing costs nothing
but its socket, and is cut off. While a picture is decoded nothing more is read of its client. A stream ends with its
socket.
"""

import asyncio
import contextlib
import logging
import time
from concurrent.futures import Executor

from pydantic import ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from jstream.config import ConfigError
from jstream.data.frames import Frame, fit, from_jpeg
from jstream.serving.guard import SUBPROTOCOL
from jstream.serving.hub import CLOSED, FAULT, Hub
from jstream.serving.limits import Refused
from jstream.serving.messages import MESSAGE, Ask, Close, Open, SetThreshold, frame_of
from jstream.serving.outside import Outside
from jstream.serving.streams import ServedStream

LOGGER = logging.getLogger(__name__)
DONE, MALFORMED, POLICY, TOO_BIG, FAILED, STOPS, LATER = 1000, 1003, 1008, 1009, 1011, 1012, 1013  # RFC 6455, IANA
CLOSE_CODES = {403: POLICY, 413: TOO_BIG, 422: MALFORMED, 429: LATER, 503: LATER}
GONE = "the client has gone"
MAX_MESSAGE = 16 * 2**10  # characters of JSON: as many questions as one may hold, and little more


def explain(error: ValidationError) -> str:
    """What is wrong with a message, in one sentence."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place or 'message'}: {first['msg']}"[:300]


class _Cut(Exception):
    """The connection is to be closed, for this reason, before there is a stream."""

    def __init__(self, code: int, reason: str):
        super().__init__(reason)
        self.code, self.reason = code, reason


class _Rate:
    """So many a second, with a burst."""

    def __init__(self, rate: float, burst: float):
        self._rate, self._burst, self._left, self._then = rate, burst, burst, time.monotonic()

    def allows(self) -> bool:
        now = time.monotonic()
        self._left = min(self._burst, self._left + self._rate * (now - self._then))
        self._then = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class LiveConnection:
    """One client.

    Args:
        socket: not accepted yet.
        hub: that watches.
        outside: what webhooks are held against.
        pool: decodes pictures.
    """

    def __init__(self, socket: WebSocket, hub: Hub, outside: Outside, pool: Executor):
        self._socket, self._hub, self._outside, self._pool = socket, hub, outside, pool
        self._limits = hub.limits
        self._rate = _Rate(self._limits.fps, self._limits.queued)
        self._changes = _Rate(self._limits.fps, self._limits.queued)  # of the threshold
        self._errors = 0
        self._newest = -1.0  # time of the newest frame
        self._at: dict[str, float] = {}  # the time of the frame that is dealt with, for what is wrong with it
        self._closing = False

    async def run(self) -> None:
        """The whole life of the connection."""
        offered = self._socket.scope.get("subprotocols", ())
        try:
            await self._socket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
            stream = await self._open()
        except _Cut as cut:
            await self._close(cut.code, cut.reason)
            return
        except WebSocketDisconnect:
            return
        tasks = [asyncio.create_task(self._read(stream)), asyncio.create_task(self._write(stream))]
        code, reason = FAILED, FAULT
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            code, reason = next(iter(done)).result()
            if tasks[0] in done and code not in (FAILED, STOPS):  # what it is refused for is still to be told
                self._hub.end(stream, reason)
                await asyncio.wait(tasks[1:], timeout=1.0)
        except Exception:
            LOGGER.exception("a live connection has failed")
        finally:
            self._hub.end(stream, reason)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._close(code, reason)

    # ------------------------------------------------------------------------------------------------------- opening

    async def _open(self) -> ServedStream:
        """Waits for the first message, and gives the stream its place."""
        try:
            async with asyncio.timeout(self._limits.open_seconds):
                message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", DONE))
            if message.get("text") is None:
                raise Refused(422, 'expected {"type": "open"} first, found a binary message')
            said = MESSAGE.validate_json(message["text"][: MAX_MESSAGE + 1])
            if not isinstance(said, Open):
                raise Refused(422, f'expected {{"type": "open"}} first, found {said.type!r}')
            return await self._begin(said)
        except (Refused, ConfigError, ValidationError, TimeoutError) as error:
            status = error.status if isinstance(error, Refused) else 422
            sentence = explain(error) if isinstance(error, ValidationError) else str(error)
            if isinstance(error, TimeoutError):
                status, sentence = 408, f"expected a first message within {self._limits.open_seconds:g} s, found none"
            await self._send_error(status, sentence)
            raise _Cut(CLOSE_CODES.get(status, POLICY), sentence) from None

    async def _begin(self, said: Open) -> ServedStream:
        self._hub.ready()  # before names are looked up
        queries = await self._outside.queries(said.queries, said.webhook)
        stream = self._hub.open("live", said.fps, said.threshold, said.memory, queries)
        opened = {"id": stream.id, "memory": stream.memory, "fps": stream.fps, "threshold": stream.threshold}
        stream.note("opened", **opened, states=self._hub.states, queued=self._limits.queued)
        return stream

    # ------------------------------------------------------------------------------------------------------- reading

    async def _read(self, stream: ServedStream) -> tuple[int, str]:
        """Takes what the client sends, until it goes or is sent away."""
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                code = message.get("code")
                return (STOPS, "the server stops") if code == STOPS else (DONE, GONE)
            self._at = {}
            try:
                if message.get("bytes") is not None:
                    await self._see(stream, message["bytes"])
                else:
                    await self._hear(stream, message.get("text") or "")
            except (Refused, ValueError) as error:  # pydantic's are ValueErrors as well
                status = error.status if isinstance(error, Refused) else 422
                sentence = explain(error) if isinstance(error, ValidationError) else str(error)
                stream.note("error", status=status, message=sentence, **self._at)
                self._errors += 1
                if self._errors >= self._limits.errors:
                    return POLICY, f"expected fewer than {self._limits.errors} errors of a client, found as many"

    async def _see(self, stream: ServedStream, data: bytes) -> None:
        since = time.perf_counter()
        frame_time, jpeg = frame_of(data)
        self._at = {"time": round(frame_time, 3)}
        if self._closing:
            raise Refused(409, "expected no frame behind `close`, found one")
        if not self._rate.allows():
            raise Refused(
                429, f"expected at most {self._limits.fps:g} frames a second, found more; this one is not seen"
            )
        if frame_time <= self._newest:
            raise Refused(422, f"expected a frame later than {self._newest:g} s, found one of {frame_time:g} s")
        if len(jpeg) > self._limits.frame_bytes:
            raise Refused(413, f"expected a picture of at most {self._limits.frame_bytes} bytes, found {len(jpeg)}")
        self._newest = frame_time
        frame = await asyncio.get_running_loop().run_in_executor(self._pool, self._decode, frame_time, jpeg)
        self._hub.see(stream, frame, since)

    def _decode(self, frame_time: float, jpeg: memoryview) -> Frame:
        """A frame at the size the model wants: what waits is small."""
        vision = self._hub.ready().model.config.vision
        return Frame(frame_time, fit(from_jpeg(jpeg, self._limits.frame_pixels), vision))

    async def _hear(self, stream: ServedStream, text: str) -> None:
        if len(text) > MAX_MESSAGE:
            raise Refused(413, f"expected a message of at most {MAX_MESSAGE} characters, found {len(text)}")
        said = MESSAGE.validate_json(text)
        if self._closing:
            raise Refused(409, f"expected nothing behind `close`, found {said.type!r}")
        match said:
            case Ask():
                for query in await self._outside.queries([said.text], said.webhook):
                    self._hub.ask(stream, query)
            case SetThreshold():
                if not self._changes.allows():
                    await asyncio.sleep(1 / self._limits.fps)
                self._hub.set_threshold(stream, said.value)
            case Close():
                self._closing = True
                self._hub.end(stream, CLOSED, at_once=False)
            case Open():
                raise Refused(409, "expected `open` once, found it again")

    # ------------------------------------------------------------------------------------------------------- writing

    async def _write(self, stream: ServedStream) -> tuple[int, str]:
        """Sends what the log has, to its end."""
        number = 0
        while True:
            for entry in stream.log.behind(number):
                if entry.number > number + 1 or stream.log.last - number > self._limits.behind:
                    return POLICY, f"expected a reader at most {self._limits.behind} messages late, found a slower one"
                try:
                    async with asyncio.timeout(self._limits.write_seconds):
                        await self._socket.send_text(entry.text)
                except TimeoutError:
                    return POLICY, "expected a client that reads, found one that does not"
                except (WebSocketDisconnect, RuntimeError):  # Starlette's, for a socket that is closed
                    return DONE, GONE
                number = entry.number
            if stream.log.closed and number == stream.log.last:
                reason = stream.end or CLOSED
                return FAILED if reason == FAULT else DONE, reason
            await stream.log.changed(number)

    async def _send_error(self, status: int, sentence: str) -> None:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(1.0):
                await self._socket.send_json({"type": "error", "status": status, "message": sentence})

    async def _close(self, code: int, reason: str) -> None:
        """Says good-bye, where anybody listens."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(1.0):
                await self._socket.close(code, reason.encode()[:120].decode(errors="ignore"))
