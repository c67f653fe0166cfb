"""`Event`: what a live stream reports for every frame it has seen, and its JSON form (one line of `events.jsonl`)."""

import dataclasses
import json
from typing import Any, NamedTuple


class Asked(NamedTuple):
    """A question of a live stream: what was said, and the second of the frame it was heard with."""

    text: str
    time: float


@dataclasses.dataclass(frozen=True)
class Event:
    """What the model decided at one frame.

    Attributes:
        time: seconds of the frame since the start of the stream.
        state: `silence`, `standby` or `response`.
        probs: probability of each state of the protocol; they sum to 1.
        text: what was said; None unless the state is `response`.
        start: seconds; where the reply itself names the beginning of what it describes, else None.
        latency: seconds from the frame being handed over to the decision, with the reply if there is one.
    """

    time: float
    state: str
    probs: dict[str, float]
    text: str | None = None
    start: float | None = None
    latency: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The object of a line of `events.jsonl`."""
        return {
            "time": round(self.time, 3),
            "state": self.state,
            "text": self.text,
            "start": self.start,
            "probs": {state: round(p, 6) for state, p in self.probs.items()},
            "latency_ms": round(1000 * self.latency, 3),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def __str__(self) -> str:
        return f"{self.time:7.1f}s  {self.state:8s}  {self.text or ''}".rstrip()
