"""`Stream`: what the host knows of one live stream, and how a turn of it goes, without a device.

A turn is a generator: it yields what it wants to have done (`Chunk`, `Look`, `Rebase`) and is sent what came of it, up
to its `Event`. A session does these things for one stream at once, an engine for many streams together (`batch.py`).

    ask(text) ─┐
    see(frame) ┴→ chunk of tokens → one forward against the cache → probabilities of the states → silent: done
                                                                    └ response: one-token steps until the reply ends

A silent turn is exactly one forward: the decision and the turn's end are not fed at once but open the next chunk.
"""

import dataclasses
from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import numpy as np

from jstream.data.frames import clip_of, fit
from jstream.data.video import Frame
from jstream.model import Model
from jstream.models.rope import rope_positions
from jstream.protocols.protocol import RESPONSE, STATES, Turn, span_in
from jstream.streaming import memory as mem
from jstream.streaming.event import Event

MAX_QUERY = 2000  # characters; a question is a sentence, not a document
CAPACITY = 4096  # tokens, where nothing is asked for


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens to be fed in one forward.

    Attributes:
        tokens: at most as many as the longest program takes.
        rope: int32 [3, T]: their rotary positions.
        start, position, oldest, gap: as in `step.Inputs`.
        clip: uint8 [H, W, 3 · num_images]: the frame whose placeholders are among the tokens, or None.
        frame_tokens: [1, M, E]: the same, already embedded, or None.
        temperature, seed: of the next token.
    """

    tokens: list[int]
    rope: np.ndarray
    start: int
    position: int
    oldest: int
    gap: int
    clip: np.ndarray | None
    frame_tokens: jax.Array | None
    temperature: float
    seed: int


class Look(NamedTuple):
    """A frame to be embedded: its clip uint8 [H, W, 3 · num_images]. Frame tokens [1, M, E] come back."""

    clip: np.ndarray


class Rebase(NamedTuple):
    """Keys to be turned back by so many rotary positions. Nothing comes back."""

    distance: int


class Result(NamedTuple):
    """What came of a chunk: the scores of a decision behind it, and the token that would follow in a reply."""

    scores: list[float]
    token: int


Wish = Chunk | Look | Rebase
Steps = Generator[Wish, Any, Event]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a stream; `Session` says what each is."""

    memory: mem.Memory = mem.Memory()
    capacity: int | None = None
    fps: float = 1.0
    threshold: float | None = None
    temperature: float = 0.0
    max_new_tokens: int = 64
    int8_cache: bool = False

    def __post_init__(self):
        if not self.fps > 0:
            raise ValueError(f"fps: expected a number > 0, found {self.fps}")


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Of what the streams of a model feed, and of the cache that takes it.

    Attributes:
        turns: of chunks with a frame: without a question, and with one.
        texts: of chunks without: a word of a reply, what opens a reply, and a long question.
        capacity: slots that tokens take.
        sinks: tokens that are never forgotten.
        room: tokens of questions that can stand.
    """

    turns: tuple[int, ...]
    texts: tuple[int, ...]
    capacity: int
    sinks: int
    room: int

    @property
    def longest(self) -> int:
        return self.turns[-1]

    @property
    def slots(self) -> int:
        """Of the cache: a step is padded, and writes its padding too."""
        return self.capacity + self.longest

    @classmethod
    def of(cls, model: Model, settings: Settings) -> "Lengths":
        """What is right for a model and its memory.

        Raises:
            ConfigError: a window does not fit into the capacity.
        """
        protocol, memory = model.protocol, settings.memory
        label = Turn(100, 101)
        silent = len(protocol.close_turn(0)) + len(protocol.open_turn(label))
        silent = -(-silent // 8) * 8
        longest = silent + 40
        sinks = 0
        if memory.sinks:
            before_frames = protocol.open_turn(label).index(protocol.frame_id)
            sinks = len(protocol.prefix) or min(mem.MIN_SINKS, before_frames)
        capacity, room = settings.capacity or CAPACITY, mem.MAX_STANDING
        if memory.turns is not None:
            capacity = settings.capacity or mem.window_capacity(memory, protocol, settings.max_new_tokens)
            beside = sinks + 3 * longest if memory.ring else 0  # a ring is never quite full, see `Places.left`
            room = mem.question_room(memory, protocol, settings.max_new_tokens, capacity, beside)
        texts = {1, len(protocol.open_reply(label)), longest}
        return cls((silent, longest), tuple(sorted(texts)), capacity, sinks, room)


class Stream:
    """One live stream, from the first frame on.

    Args:
        model: whose language it speaks; its params are not touched.
        settings, lengths: see there.
        seed: of sampled replies.

    Attributes:
        threshold: as in the settings; may be changed at any time.
    """

    def __init__(self, model: Model, settings: Settings, lengths: Lengths, seed: int = 0):
        self.protocol, self.settings, self.lengths = model.protocol, settings, lengths
        self.threshold = settings.threshold
        self._vision, self._multimodal = model.config.vision, bool(model.config.decoder.mrope_section)
        self._memory, self._seed = settings.memory, seed
        self.places = mem.Places(lengths.capacity, lengths.longest, self._memory, lengths.sinks)
        self._pending: list[int] = list(self.protocol.prefix)  # tokens that open the next chunk
        self.queries: list[str] = []  # to be heard with the next frame
        self._forgotten: list[str] = []  # asked in turns that are gone, and to be said again
        self._heard: list[str] = []  # questions that stand; of them and the rest only a prompt needs to know
        self._kept: list[mem.KeptTurn] = []
        self._last_image: np.ndarray | None = None

    def ask(self, text: str) -> None:
        """As `Session.ask`."""
        text = text.strip()
        if not text or len(text) > MAX_QUERY:
            raise ValueError(f"a question: expected 1 to {MAX_QUERY} characters, found {len(text)}")
        if self._memory.turns is not None and (size := self._tokens_in(text)) > self.lengths.room:
            raise ValueError(
                f"a question: expected at most {self.lengths.room} tokens, which fit into the cache, found {size}"
            )
        self.queries.append(text)

    def see(self, frame: Frame) -> Steps:
        """The turn of the next frame, step by step; the event it ends in has no latency yet.

        Raises:
            CacheFullError: before anything is fed, and nothing has changed.
        """
        image = fit(frame.image, self._vision)
        clip = clip_of(image, self._last_image, self._vision)
        asked = list(self.queries)  # more may be asked while the turn is under way
        turn = Turn(frame.time, frame.time + 1 / self.settings.fps, "\n".join(asked) or None)
        if self._memory.reads_again:
            shown, frame_tokens, result = yield from self._see_prompt(turn, asked, clip)
        else:
            shown, result = yield from self._see_next(turn, asked, clip)
            frame_tokens = None
        del self.queries[: len(asked)]
        self._last_image = image

        scores, reply, text = result.scores, [], None
        state = self.protocol.decide(scores, self.threshold, asked=bool(asked))
        if state == RESPONSE:
            reply = yield from self._reply(self.protocol.open_reply(shown))
            text = self.protocol.decode_reply(reply)
        else:
            self._pending = self.protocol.end_turn(dataclasses.replace(shown, state=state))
        if frame_tokens is not None:
            self._kept.append(mem.keep(self._memory, turn, state, reply, frame_tokens))
        span = span_in(text) if text is not None else None
        start = None if span is None else span[0]
        return Event(frame.time, STATES[state], self.protocol.probs(scores), text, start)

    # ------------------------------------------------------------------------------------------------------ one turn

    def _see_next(self, turn: Turn, asked: list[str], clip: np.ndarray) -> Generator[Wish, Any, tuple[Turn, Result]]:
        """A turn that only adds to what is in the cache; also as it was said, with what is asked again."""
        places = self.places
        if self._memory.ring and places.gap > mem.REBASE_AT:
            yield Rebase(places.rebase())
        self._forgotten += places.open_turn()
        again = mem.standing(self._forgotten, self._tokens_in, self.lengths.room)
        queries = [*(query for query in again if query not in asked), *asked]
        shown = dataclasses.replace(turn, query="\n".join(queries) or None)
        places.ask(queries)
        chunk = [*self._pending, *self.protocol.open_turn(shown)]
        if not self._memory.ring:
            mem.require_room(places.capacity - places.left, len(chunk), places.capacity)
        self._forgotten.clear()
        result = yield from self._feed(chunk, clip=clip)
        return shown, result

    def _see_prompt(
        self, turn: Turn, asked: list[str], clip: np.ndarray
    ) -> Generator[Wish, Any, tuple[Turn, jax.Array, Result]]:
        """A turn of a window; where the memory drops some for it, the others are read anew.

        Returns:
            The turn as the prompt has it, its frame tokens, and what came of it.
        """
        places, prefix = self.places, len(self.protocol.prefix)
        spare = places.capacity - self.settings.max_new_tokens - 1  # a whole reply fits behind
        heard = mem.standing([*self._heard, *asked], self._tokens_in, self.lengths.room)
        past, shown = self._kept, turn
        chunks = [[*self._pending, *self.protocol.open_turn(turn)]]
        used = places.capacity - places.left
        if past and (not self._memory.grows(len(past)) or used + len(chunks[0]) > spare):
            used = prefix
            past, chunks, shown = mem.read_again(self._memory, self.protocol, past, turn, heard, spare - used)
        mem.require_room(used, sum(map(len, chunks)) + self.settings.max_new_tokens, places.capacity)
        frame_tokens = yield Look(clip)
        if len(chunks) > 1 or shown is not turn:
            places.forget(prefix)
        for chunk, kept in zip(chunks[:-1], past):
            yield from self._feed(chunk, frame_tokens=kept.frame_tokens)
        result = yield from self._feed(chunks[-1], frame_tokens=frame_tokens)
        self._heard, self._kept = heard, past
        return shown, frame_tokens, result

    def _reply(self, opening: list[int]) -> Generator[Wish, Any, list[int]]:
        """Generates a reply behind the tokens that open it; leaves what closes the turn pending."""
        tokens, reply = opening, []
        while True:
            if len(tokens) > self.places.left:
                self._pending = [*tokens, *self.protocol.close]  # cut here; the next frame will find the cache full
                return reply
            token = (yield from self._feed(tokens)).token
            if token == self.protocol.end_id:
                self._pending = list(self.protocol.close)
                return reply
            reply.append(token)
            if len(reply) == self.settings.max_new_tokens:  # cut: its last token has not been fed yet
                self._pending = [token, *self.protocol.close]
                return reply
            tokens = [token]

    def _feed(
        self, tokens: list[int], clip: np.ndarray | None = None, frame_tokens: jax.Array | None = None
    ) -> Generator[Wish, Any, Result]:
        """Feeds tokens that end in a frame, or in none; what is too long for a program goes ahead in pieces of text."""
        longest = self.lengths.longest
        while len(tokens) > longest:
            size = min(longest, len(tokens) - longest)
            yield self._chunk(tokens[:size])
            tokens = tokens[size:]
        return (yield self._chunk(tokens, clip, frame_tokens))

    def _chunk(self, tokens: list[int], clip: np.ndarray | None = None, frame_tokens: jax.Array | None = None) -> Chunk:
        """Lays tokens behind the others, and counts them as fed."""
        places = self.places
        position = places.position
        start, gone = places.take(len(tokens))
        self._forgotten += gone
        is_frame = np.asarray(tokens) == self.protocol.frame_id
        rope, after = rope_positions(is_frame, self._vision.token_grid, self._multimodal, places.rope)
        places.rope = int(after)
        where = (start, position, places.oldest, places.gap)
        return Chunk(tokens, rope, *where, clip, frame_tokens, self.settings.temperature, self._seed)

    def _tokens_in(self, query: str) -> int:
        return len(self.protocol.tokenizer.encode(f"{query}\n"))
