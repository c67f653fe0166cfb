"""What goes over the wire: bodies of requests and answers, as the OpenAPI document has them, and a client's messages.

An event is the object of a line of `events.jsonl`; everything else that a stream says is a notice, an object with a
`type`. Sizes are bounded here or where the words are used (`limits.py`).
"""

import math
import struct
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from jstream.streaming.stream import MAX_QUERY

MAX_QUERIES = 16  # of one request
LARGEST_TIME = 1e9  # seconds, thirty years

Text = Annotated[str, Field(min_length=1, max_length=MAX_QUERY, description="A question or an order to the model.")]
Webhook = Annotated[str, Field(min_length=1, max_length=2048, description="A URL that replies are posted to.")]
Memory = Annotated[
    str,
    Field(
        max_length=40, description="The server's memory over fewer turns, such as `sinks:60`.", examples=["sinks:60"]
    ),
]
Fps = Annotated[float, Field(gt=0, allow_inf_nan=False, description="Frames a second that the model sees.")]
Threshold = Annotated[
    float | None,
    Field(ge=0, le=1, description="Speak when p(response) reaches this; null is the model's own rule."),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Asked(_Strict):
    """A question, and where the replies after it are posted."""

    text: Text
    webhook: Webhook | None = None


Queries = Annotated[list[Text | Asked], Field(max_length=MAX_QUERIES)]


class NewStream(_Strict):
    """A source to be watched."""

    source: Annotated[
        str,
        Field(
            max_length=2048,
            description="rtsp, rtsps, http or https, of a host that the server's flags allow.",
            examples=["rtsp://camera.example/live"],
        ),
    ]
    fps: Fps = 1.0
    queries: Queries = []
    webhook: Webhook | None = None
    threshold: Threshold = None
    memory: Memory | None = None


class Change(_Strict):
    """What can be changed of a stream that runs."""

    threshold: Threshold


class Heard(BaseModel):
    """A question that was taken, to be heard with the next frame."""

    text: str


class Quantiles(BaseModel):
    """Milliseconds from the arrival of a frame to its event, of the newest 1,000 frames."""

    p50: float
    p99: float


class Cache(BaseModel):
    """Tokens."""

    used: int
    capacity: int


class StreamState(BaseModel):
    """A stream as it stands."""

    id: str
    source: Annotated[str, Field(description="Without passwords; `live` for the frames of a client.")]
    state: Literal["running", "ended"]
    end: Annotated[str | None, Field(description="Why it ended.")]
    fps: float
    threshold: float | None
    memory: str
    created: Annotated[float, Field(description="Seconds since 1970.")]
    time: Annotated[float | None, Field(description="Of the newest event.")]
    events: int
    replies: int
    dropped: int
    queued: int
    reconnects: int
    latency_ms: Quantiles | None
    cache: Cache | None


class Health(BaseModel):
    """Whether the model is ready, and how far it is."""

    status: Literal["loading", "ready", "failed", "stopped"]
    stage: str
    done: int
    total: int
    seconds: float
    error: str | None = None


class MemoryState(BaseModel):
    """What a decision looks back over."""

    policy: str
    turns: int | None


class LimitsState(BaseModel):
    """Of one stream."""

    frame_bytes: int
    frame_pixels: int
    fps: float
    queued: int
    query_characters: int
    queries: int


class ServerState(Health):
    """What a client may want to know before it opens a stream; of the model nothing is known while it is loading."""

    version: str
    model: str | None
    states: list[str] | None
    threshold: float | None
    memory: MemoryState | None
    places: int | None
    free: int
    sources: Annotated[bool, Field(description="Whether any network source is allowed.")]
    webhooks: Annotated[bool, Field(description="Whether any webhook is allowed.")]
    limits: LimitsState


class Refusal(BaseModel):
    """Why not, in a sentence."""

    detail: str


# ------------------------------------------------------------------------------------------- what a live client sends


class Open(_Strict):
    """The first message."""

    type: Literal["open"]
    fps: Fps = 1.0
    queries: Queries = []
    webhook: Webhook | None = None
    threshold: Threshold = None
    memory: Memory | None = None


class Ask(_Strict):
    type: Literal["ask"]
    text: Text
    webhook: Webhook | None = None


class SetThreshold(_Strict):
    type: Literal["threshold"]
    value: Threshold


class Close(_Strict):
    """No more frames come; what waits is to be seen."""

    type: Literal["close"]


Message = Annotated[Open | Ask | SetThreshold | Close, Field(discriminator="type")]
MESSAGE: TypeAdapter[Open | Ask | SetThreshold | Close] = TypeAdapter(Message)
HEADER = struct.Struct(">d")  # seconds, before the JPEG


def frame_of(data: bytes) -> tuple[float, memoryview]:
    """A binary message: seconds since the start of the stream, and a JPEG.

    Raises:
        ValueError: it is no such thing.
    """
    if len(data) <= HEADER.size:
        raise ValueError(f"expected 8 bytes of time and a JPEG, found {len(data)} bytes")
    (time,) = HEADER.unpack_from(data)
    if not (math.isfinite(time) and 0 <= time <= LARGEST_TIME):
        raise ValueError(f"expected a time in seconds from 0 on, as a big-endian float64, found {time}")
    return time, memoryview(data)[HEADER.size :]
