"""What the live server bounds. Every client is a stranger: each number is what one of them may take of the machine.

Each limit answers with a status and a sentence where it is met (`live.py`, `api.py`, `guard.py`); nothing is buffered
beyond it.
"""

import dataclasses

from jstream.errors import UserError
from jstream.streaming.stream import MAX_QUERY


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one server.

    Attributes:
        frame_bytes: of a picture as it is sent.
        frame_pixels: of a picture, whatever few bytes claim.
        fps: frames a second of a stream; those above are refused.
        queued: frames of a stream that may wait for the model; one more is dropped.
        query_characters: of a question.
        queries: questions of a stream that may wait for its next frame, and webhooks that may listen to it.
        errors: that a connection may make before it is closed.
        behind: events and notices that a reader may be late by; a slower one is cut off.
        history: events and notices that a stream keeps, for readers that come later.
        replies: of a stream that are kept, for its subtitles.
        ended: streams that are kept after their end.
        ended_seconds: and for how long.
        body_bytes: of a request that is no picture.
        connections: at once, of all clients.
        open_seconds: for a client to say what it wants, once it is connected.
        write_seconds: for a client to take what it is sent, where its buffers are full.
    """

    frame_bytes: int = 4 * 2**20
    frame_pixels: int = 4 * 2**20
    fps: float = 30.0
    queued: int = 16
    query_characters: int = MAX_QUERY
    queries: int = 16
    errors: int = 50
    behind: int = 256
    history: int = 4000
    replies: int = 1000
    ended: int = 32
    ended_seconds: float = 600.0
    body_bytes: int = 64 * 2**10
    connections: int = 256
    open_seconds: float = 10.0
    write_seconds: float = 10.0


class Refused(UserError):
    """The server does not do what was asked for.

    Attributes:
        status: as HTTP has it: 403 not allowed, 409 too late, 413 too large, 422 not understood, 429 too much, 503 not
            now.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status
