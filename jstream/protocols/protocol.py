"""What every protocol has: turns, renderings, and the face that the session and the training pipeline see.

A protocol is the language of a turn. It renders a whole dialogue with its labels for training, the next chunk of a live
one for streaming, and reads decisions back; both ways give the same tokens.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import jax
import numpy as np

from jstream.config import ProtocolConfig
from jstream.protocols.tokenizer import Tokenizer

STATES = ("silence", "standby", "response")
SILENCE, STANDBY, RESPONSE = range(3)

# What a position predicts.
NOT_LEARNED, TEXT, STATE = range(3)


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one frame brings.

    Attributes:
        start, end: seconds the turn stands for, as its label says.
        query: what the user says in it, or None.
        state: index into STATES.
        reply: the words, where the state is RESPONSE.
        learn_state, learn_reply: whether training learns them; None leaves the state to the protocol's rule. A wrong
            answer that is put right later is rendered and not learned.
    """

    start: float
    end: float
    query: str | None = None
    state: int = SILENCE
    reply: str | None = None
    learn_state: bool | None = None
    learn_reply: bool = True


@dataclasses.dataclass(frozen=True)
class Rendering:
    """A whole dialogue as tokens, with what each position predicts.

    Attributes:
        tokens: int32 [T].
        is_frame: bool [T]: placeholders of frame tokens.
        labels: int32 [T]: the token that position t predicts (already shifted); 0 where nothing is learned.
        kinds: int8 [T]: NOT_LEARNED, TEXT or STATE.
        decisions: int32 [F]: the position at which each turn's state is decided.
        ends: int32 [F]: one past the last token of each turn.
    """

    tokens: np.ndarray
    is_frame: np.ndarray
    labels: np.ndarray
    kinds: np.ndarray
    decisions: np.ndarray
    ends: np.ndarray


def lay_labels(
    tokens: Sequence[int],
    frame_id: int,
    labelled: Sequence[tuple[int, int, int]],
    decisions: Sequence[int],
    ends: Sequence[int],
) -> Rendering:
    """The rendering of tokens with their (position, label, kind) triples."""
    labels, kinds = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.int8)
    for position, label, kind in labelled:
        labels[position], kinds[position] = label, kind
    ids = np.asarray(tokens, np.int32)
    index = lambda positions: np.asarray(positions, np.int32)
    return Rendering(ids, ids == frame_id, labels, kinds, index(decisions), index(ends))


class StreamProtocol(Protocol):
    """The face of a protocol.

    Attributes:
        name: in `ProtocolConfig`.
        own_tokens: special tokens beside those of the chat template.
        prefix: tokens before the first turn.
        close: tokens from the end of a reply to the end of its turn; the first is `end_id`.
        frame_id: the placeholder of a frame token.
        decision_ids: the tokens among which the decision falls.
        scores: what `probs` and `decide` need of the logits f32 [V] behind a turn, a few f32; hashable, as it becomes
            part of a compiled step.
        unspoken_ids: special tokens that a reply cannot hold.
    """

    name: ClassVar[str]
    own_tokens: ClassVar[tuple[str, ...]]
    config: ProtocolConfig
    tokenizer: Tokenizer
    tokens_per_frame: int
    prefix: list[int]
    close: list[int]
    frame_id: int
    end_id: int
    decision_ids: tuple[int, ...]
    scores: Callable[[jax.Array], jax.Array]
    unspoken_ids: tuple[int, ...]

    def __init__(self, config: ProtocolConfig, tokenizer: Tokenizer, tokens_per_frame: int): ...

    def open_turn(self, turn: Turn) -> list[int]:
        """Tokens from the end of the turn before up to where this turn's state is decided."""
        ...

    def probs(self, scores: Sequence[float]) -> dict[str, float]:
        """The probability of each state that the protocol knows; they sum to 1."""
        ...

    def decide(self, scores: Sequence[float], threshold: float | None = None, asked: bool = False) -> int:
        """The state, by the protocol's rule or by a threshold in [0, 1]; `asked`: a question came with the frame."""
        ...

    def open_reply(self, turn: Turn) -> list[int]:
        """Tokens between a decision to speak and the first word."""
        ...

    def encode_reply(self, text: str) -> list[int]: ...

    def decode_reply(self, tokens: Sequence[int]) -> str: ...

    def close_turn(self, state: int, reply: Sequence[int] = ()) -> list[int]:
        """Tokens from a decision to the end of its turn."""
        ...

    def end_turn(self, turn: Turn, reply: Sequence[int] = ()) -> list[int]:
        """The same for a turn that is over, from its state, what it asks, and the tokens of its reply."""
        ...

    def render(self, turns: Sequence[Turn]) -> Rendering:
        """A whole dialogue for training."""
        ...


_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*s(?:ec(?:ond)?s?)?\s*(?:-|–|to|until)\s*(\d+(?:\.\d+)?)\s*s")


def span_in(reply: str) -> tuple[float, float] | None:
    """The first span of seconds that a reply names ("From 3s to 7s.", "<3s-7s>"), or None."""
    found = _SPAN.search(reply)
    return (float(found[1]), float(found[2])) if found else None
