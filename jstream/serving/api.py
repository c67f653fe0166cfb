"""The server as an ASGI app: REST, server-sent events, the WebSocket and the page. OpenAPI comes from what stands here.

Handlers only translate: what they do is done by the hub, sources and alerts. Everything passes the guard first.
"""

import asyncio
import contextlib
import dataclasses
import importlib.metadata
import pathlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from fastapi import FastAPI, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.websockets import WebSocket

from jstream.config import ConfigError
from jstream.data.frames import to_jpeg
from jstream.serving.alerts import Alerts
from jstream.serving.guard import Door, Guard
from jstream.serving.hub import CLOSED, Hub
from jstream.serving.limits import Limits, Refused
from jstream.serving.live import LiveConnection
from jstream.serving.messages import (
    Asked,
    Change,
    Health,
    Heard,
    LimitsState,
    MemoryState,
    NewStream,
    Refusal,
    ServerState,
    StreamState,
)
from jstream.serving.metrics import exposition
from jstream.serving.openapi import document
from jstream.serving.outside import Outside
from jstream.serving.sources import Source
from jstream.serving.streams import ServedStream

PAGE = pathlib.Path(__file__).parent / "page"
DECODERS = 2  # threads that decode pictures; more would only take the cores from the model
KEEPALIVE = 15.0  # seconds of silence after which a reader of events gets a comment
SNAPSHOT_PIXELS, SNAPSHOT_QUALITY = 640 * 640, 80

Name = Annotated[str, Path(pattern="^[0-9a-f]{16}$", description="Id of a stream.")]
LastEventId = Annotated[str, Header(pattern="^[0-9]{0,16}$", description="Number of the last message that was read.")]
After = Annotated[int, Query(ge=0, le=2**53, description="Go on behind this message.")]


@dataclasses.dataclass(frozen=True)
class Server:
    """What the app serves.

    Attributes:
        hub: started by the app, and stopped with it.
        door, outside, limits: who may come in, where it may go out, and how much.
        alerts: None where no webhook is allowed.
        model: its name, for people.
        sample: folder of a clip to try, `clip.mp4` and `clip.json`.
        reconnect: seconds for which a source that was lost is tried again.
    """

    hub: Hub
    door: Door
    outside: Outside
    limits: Limits
    alerts: Alerts | None = None
    model: str = "bundled model"
    sample: pathlib.Path | None = None
    reconnect: float = 60.0


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Refusal} for status in (401, 403, *statuses)}


def create_app(server: Server) -> Guard:
    """The app, behind its guard."""
    hub, limits = server.hub, server.limits
    pool = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        hub.start()
        yield
        await asyncio.to_thread(hub.stop)
        if server.alerts is not None:
            await asyncio.to_thread(server.alerts.close)
        pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="jstream",
        version=importlib.metadata.version("jstream"),
        description="Live video streams, watched by one model. Frames of a client go over the WebSocket `/v1/live`.",
        lifespan=life,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        headers = {"retry-after": "5"} if error.status in (429, 503) else None
        return JSONResponse({"detail": str(error)}, error.status, headers)

    @app.exception_handler(ConfigError)
    async def misfit(_: Request, error: ConfigError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        parts = () if first["type"] == "json_invalid" else first["loc"]  # that of JSON is a place in the text
        place = ".".join(str(part) for part in parts if part != "body")
        return JSONResponse({"detail": f"{place or 'body'}: {first['msg']}"[:300]}, 422)

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400:  # FastAPI's, of a body that is not even text
            return JSONResponse({"detail": "body: expected JSON in UTF-8, found something else"}, 422)
        headers = error.headers
        if error.status_code == 405:  # of all handlers of the path, where Starlette names the first one's
            handlers = (route for route in app.routes if route.matches(request.scope)[0] != Match.NONE)
            headers = {"allow": ", ".join(sorted({way for one in handlers for way in getattr(one, "methods", ())}))}
        return JSONResponse({"detail": str(error.detail)}, error.status_code, headers)

    def found(name: str) -> ServedStream:
        stream = hub.find(name)
        if stream is None:
            raise Refused(404, "expected the id of a stream, found none of this name; it may have ended long ago")
        return stream

    # ------------------------------------------------------------------------------------------------- the server

    @app.get("/healthz", responses={403: {"model": Refusal}, 503: {"model": Health}})
    async def health(response: Response) -> Health:
        """Whether the model is ready; 503 while it is being loaded."""
        state = _health(hub)
        response.status_code = 200 if state.status == "ready" else 503
        return state

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **_refusals()}, response_class=Response)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(exposition(hub, server.alerts), media_type="text/plain; version=1.0.0; charset=utf-8")

    @app.get("/v1/server", responses=_refusals())
    async def describe() -> ServerState:
        """What a client may want to know before it opens a stream."""
        engine = hub.engine if hub.status.state == "ready" else None
        policy = "" if engine is None else str(engine.memory).partition(":")[0]
        return ServerState(
            **_health(hub).model_dump(),
            version=app.version,
            model=None if engine is None else server.model,
            states=None if engine is None else hub.states,
            threshold=None if engine is None else engine.threshold,
            memory=None if engine is None else MemoryState(policy=policy, turns=engine.memory.turns),
            places=None if engine is None else engine.streams,
            free=hub.free,
            sources=bool(server.outside.sources),
            webhooks=server.alerts is not None,
            limits=LimitsState(**{name: getattr(limits, name) for name in LimitsState.model_fields}),
        )

    # ------------------------------------------------------------------------------------------------- the streams

    @app.post("/v1/streams", status_code=201, responses=_refusals(413, 422, 429, 503))
    async def open_stream(new: NewStream) -> StreamState:
        """Watches a source, until it ends or is deleted. What it cannot open ends with the reason."""
        hub.ready()  # before names are looked up
        target = await server.outside.source(new.source)
        queries = await server.outside.queries(new.queries, new.webhook)
        stream = hub.open(target.shown, new.fps, new.threshold, new.memory, queries)
        Source(hub, stream, server.outside.opened(target), server.reconnect)
        return _state(stream)

    @app.get("/v1/streams", responses=_refusals())
    async def list_streams() -> list[StreamState]:
        """Streams that run, those of live clients among them, and those that ended not long ago."""
        return [_state(stream) for stream in hub.streams()]

    @app.get("/v1/streams/{name}", responses=_refusals(404, 422))
    async def show_stream(name: Name) -> StreamState:
        """A stream as it stands."""
        return _state(found(name))

    @app.delete("/v1/streams/{name}", status_code=204, responses=_refusals(404, 422))
    async def end_stream(name: Name) -> None:
        """Ends a stream; what it has said can be read for some minutes more."""
        hub.end(found(name), CLOSED)

    @app.patch("/v1/streams/{name}", responses=_refusals(404, 409, 413, 422))
    async def change_stream(name: Name, change: Change) -> StreamState:
        """Sets when to speak, from the next decision on."""
        stream = found(name)
        if stream.end is not None:
            raise Refused(409, f"expected a stream that runs, found one that has ended: {stream.end}")
        hub.set_threshold(stream, change.threshold)
        return _state(stream)

    @app.post("/v1/streams/{name}/queries", status_code=202, responses=_refusals(404, 409, 413, 422, 429, 503))
    async def ask(name: Name, asked: Asked) -> Heard:
        """Says something to the model; it is heard with the next frame."""
        stream = found(name)
        (query,) = await server.outside.queries([asked], None)
        hub.ask(stream, query)
        return Heard(text=query.text.strip())

    @app.get(
        "/v1/streams/{name}/events",
        responses={200: {"content": {"text/event-stream": {}}}, **_refusals(404, 422)},
        response_class=StreamingResponse,
    )
    async def events(name: Name, last_event_id: LastEventId = "", after: After = 0) -> StreamingResponse:
        """Server-sent events: an event for every frame, and notices under their types; to the end of the stream."""
        after = int(last_event_id or after)
        return StreamingResponse(_told(found(name), after), media_type="text/event-stream", headers=_UNSTORED)

    @app.get(
        "/v1/streams/{name}/captions.vtt",
        responses={200: {"content": {"text/vtt": {}}}, **_refusals(404, 422)},
        response_class=Response,
    )
    async def subtitles(name: Name) -> Response:
        """The newest replies as WebVTT."""
        return Response(found(name).captions(), media_type="text/vtt", headers=_UNSTORED)

    @app.get(
        "/v1/streams/{name}/snapshot.jpg",
        responses={200: {"content": {"image/jpeg": {}}}, **_refusals(404, 422)},
        response_class=Response,
    )
    async def snapshot(name: Name) -> Response:
        """The newest picture of a source."""
        frame = found(name).picture
        if frame is None:
            raise Refused(
                404, "expected a stream with a picture, found none: it is a client's, has ended or has just begun"
            )
        encode: Callable[[], bytes] = lambda: to_jpeg(frame.image, SNAPSHOT_PIXELS, SNAPSHOT_QUALITY)
        jpeg = await asyncio.get_running_loop().run_in_executor(pool, encode)
        return Response(jpeg, media_type="image/jpeg", headers={**_UNSTORED, "x-frame-time": f"{frame.time:.3f}"})

    @app.websocket("/v1/live")
    async def live(socket: WebSocket) -> None:
        await LiveConnection(socket, hub, server.outside, pool).run()

    # ----------------------------------------------------------------------------------------------------- the page

    files = {path.name: path for path in PAGE.iterdir() if path.is_file()}
    if server.sample is not None:
        files |= {"sample.mp4": server.sample / "clip.mp4", "sample.json": server.sample / "clip.json"}

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(files["index.html"], headers=_FRESH)

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> FileResponse:
        if name not in files:  # a table of names, so that no path leads anywhere else
            raise Refused(404, "expected a file of the page, found none of this name")
        return FileResponse(files[name], headers=_FRESH)

    told = document(app, server.door, limits)
    app.openapi = lambda: told
    return Guard(app, server.door, limits)


_UNSTORED = {"cache-control": "no-store"}
_FRESH = {"cache-control": "no-cache"}


def _health(hub: Hub) -> Health:
    status = hub.status
    seconds = round(hub.seconds, 1)
    return Health(
        status=status.state,  # type: ignore[arg-type]
        stage=status.stage,
        done=status.done,
        total=status.total,
        seconds=seconds,
        error=status.error,
    )


def _state(stream: ServedStream) -> StreamState:
    return StreamState(
        id=stream.id,
        source=stream.source,
        state="running" if stream.end is None else "ended",
        end=stream.end,
        fps=stream.fps,
        threshold=stream.threshold,
        memory=stream.memory,
        created=stream.created,
        time=stream.time,
        events=stream.events,
        replies=stream.replies,
        dropped=stream.dropped,
        queued=len(stream.waiting),
        reconnects=stream.reconnects,
        latency_ms=stream.quantiles(),  # type: ignore[arg-type]
        cache={"used": stream.used, "capacity": stream.capacity} if stream.end is None else None,  # type: ignore[arg-type]
    )


async def _told(stream: ServedStream, after: int) -> AsyncIterator[str]:
    """A stream's log as server-sent events, from behind a number to its end."""
    log, number = stream.log, min(after, stream.log.last)
    yield ": jstream\n\n"
    while True:
        for entry in log.behind(number):
            if entry.number > number + 1:
                missed = f'{{"type": "missed", "count": {entry.number - number - 1}}}'
                yield f"id: {entry.number - 1}\nevent: missed\ndata: {missed}\n\n"
            kind = "" if entry.kind is None else f"event: {entry.kind}\n"
            yield f"id: {entry.number}\n{kind}data: {entry.text}\n\n"
            number = entry.number
        if log.closed and number >= log.last:
            return
        try:
            async with asyncio.timeout(KEEPALIVE):
                await log.changed(number)
        except TimeoutError:
            yield ": still here\n\n"
