"""`Stream`: what the host knows of one live stream, and how a turn of it goes, without a device.

A turn is a generator: it yields what it wants to have done (`Chunk`, `Rebase`) and is sent what came of it, up to its
`Event`. A session does these things for one stream at once, an engine for many streams together (`batch.py`).

    ask(text) ─┐
    see(frame) ┴→ chunk of tokens → one forward against the cache → probabilities of the states → silent: done
                                                                    └ response: one-token steps until the reply ends

A silent turn is exactly one forward: the decision and the turn's end are not fed at once but open the next chunk.

A step is dispatched, and its result read when it is needed. Where `Settings.ahead` is set, that is late: words are fed
back on the device before the host has read them, and the next frame, where it is there already, is fed as if this one
deserved no word. What turns out wrong is taken back: its slots are written again, and nothing that anyone sees differs.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jstream.data.frames import clip_of, fit
from jstream.data.video import Frame
from jstream.model import Model
from jstream.models.cache import CacheFullError
from jstream.models.rope import rope_positions
from jstream.protocols.protocol import RESPONSE, SILENCE, STATES, StreamProtocol, Turn, span_in
from jstream.streaming import memory as mem
from jstream.streaming.event import Event
from jstream.streaming.step import FED_BACK

MAX_QUERY = 2000  # characters; a question is a sentence, not a document
CAPACITY = 4096  # tokens, where nothing is asked for


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens to be fed in one forward.

    Attributes:
        tokens: at most as many as the longest program takes.
        rope: int32 [3, T]: their rotary positions.
        start, position, oldest, gap: as in `step.Inputs`.
        sight: of the frame whose placeholders are among the tokens, or None.
        temperature, seed: of the next token.
    """

    tokens: list[int]
    rope: np.ndarray
    start: int
    position: int
    oldest: int
    gap: int
    sight: "Sight | None"
    temperature: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Sight:
    """A frame as its stream takes it in.

    Attributes:
        time: seconds.
        clip: uint8 [H, W, 3 · num_images].
        slot: where among the frames of the stream that the batch keeps (`Lengths.frames`) it is to be found.
        asked: to be heard with it.
        before: uint8 [H, W, 3]: the picture before it.
    """

    time: float
    clip: np.ndarray
    slot: int = 0
    asked: tuple[str, ...] = ()
    before: np.ndarray | None = None


class Rebase(NamedTuple):
    """Keys to be turned back by so many rotary positions. Nothing comes back."""

    distance: int


class Results:
    """What came of a step for B streams: f32 [B, scores + 1]. The device may still be at it."""

    def __init__(self, array: jax.Array):
        self._array = array

    @functools.cached_property
    def values(self) -> np.ndarray:
        """The one read of a step; it waits for the device."""
        return np.asarray(self._array)


class Result(NamedTuple):
    """What came of a chunk; it is read when it is asked for."""

    results: Results
    row: int

    @property
    def scores(self) -> list[float]:
        """Of a decision behind the chunk."""
        return self.results.values[self.row, :-1].tolist()

    @property
    def token(self) -> int:
        """That would follow in a reply."""
        return int(self.results.values[self.row, -1])


Wish = Chunk | Rebase
Steps = Generator[Wish, Any, Event]


class _Opened(NamedTuple):
    """A turn whose frame has been fed: as it was said, and what came of it."""

    sight: Sight
    turn: Turn
    shown: Turn
    asked: bool
    result: Result


class _Guess(NamedTuple):
    """The next turn, opened as if this one ended in a state, and how it stood before."""

    state: int
    opened: _Opened
    mark: mem.Mark
    pending: list[int]
    forgotten: list[str]


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
    ahead: int = 0

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
        frames: of each stream that the batch keeps, embedded by themselves; 0 where a frame comes with its chunk.
    """

    turns: tuple[int, ...]
    texts: tuple[int, ...]
    capacity: int
    sinks: int
    room: int
    frames: int = 0

    @property
    def longest(self) -> int:
        return self.turns[-1]

    @property
    def slots(self) -> int:
        """Of the cache: a step is padded, and writes its padding too. Whole lanes of a TPU."""
        return -(-(self.capacity + self.longest) // 128) * 128

    @classmethod
    def of(cls, model: Model, settings: Settings, waiting: int = 0) -> "Lengths":
        """What is right for a model and its memory.

        Args:
            waiting: frames of a stream that may be embedded before their turn comes.

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
        frames = waiting + (memory.turns or 0 if memory.reads_again else 0)
        frames += bool(frames)  # that of the turn under way
        return cls((silent, longest), tuple(sorted(texts)), capacity, sinks, room, frames)


def question_tokens(protocol: StreamProtocol, query: str) -> int:
    """Of a question, as it is said."""
    return len(protocol.tokenizer.encode(f"{query}\n"))


def checked_question(protocol: StreamProtocol, memory: mem.Memory, lengths: Lengths, text: str) -> str:
    """A question as it is heard.

    Raises:
        ValueError: it is empty, of more than MAX_QUERY characters, or fits into no window.
    """
    text = text.strip()
    if not text or len(text) > MAX_QUERY:
        raise ValueError(f"a question: expected 1 to {MAX_QUERY} characters, found {len(text)}")
    if memory.turns is not None and (size := question_tokens(protocol, text)) > lengths.room:
        raise ValueError(f"a question: expected at most {lengths.room} tokens, which fit into the cache, found {size}")
    return text


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
        self._looked = 0  # frames
        self._guessed: _Opened | None = None  # the turn of the next frame, where it has been opened
        self._last_silent = SILENCE

    def ask(self, text: str) -> None:
        """As `Session.ask`."""
        self.queries.append(self.checked(text))

    def checked(self, text: str) -> str:
        """A question as it is heard.

        Raises:
            ValueError: as `Session.ask`.
        """
        return checked_question(self.protocol, self._memory, self.lengths, text)

    def look(self, frame: Frame, asked: Sequence[str] = ()) -> Sight:
        """Takes in the next frame; `see` comes for it in its turn.

        Args:
            asked: to be heard with this frame and no other.
        """
        before, self._last_image = self._last_image, fit(frame.image, self._vision)
        slot = self._looked % max(self.lengths.frames, 1)
        self._looked += 1
        clip = clip_of(self._last_image, before, self._vision)
        return Sight(frame.time, clip, slot, tuple(map(self.checked, asked)), before)

    def see(self, sight: Sight, following: Callable[[], Sight | None] = lambda: None) -> Steps:
        """The turn of the next frame, step by step; the event it ends in has no latency yet.

        Args:
            following: gives the frame behind it, if it is there already.

        Raises:
            CacheFullError: before anything is fed, and nothing has changed.
        """
        opened, self._guessed = self._guessed, None
        if opened is None:
            try:
                opened = yield from self._open(sight)
            except CacheFullError:
                self._last_image = sight.before
                raise
        guess = yield from self._guess(opened, following())
        scores = opened.result.scores
        state = self.protocol.decide(scores, self.threshold, asked=opened.asked)
        if guess is not None and state == guess.state:
            self._guessed = guess.opened
        elif guess is not None:
            self.places.go_back(guess.mark)
            self._pending, self._forgotten = guess.pending, guess.forgotten
        reply, text = [], None
        if state == RESPONSE:
            reply = yield from self._reply(self.protocol.open_reply(opened.shown))
            text = self.protocol.decode_reply(reply)
        else:
            self._last_silent = state
            if self._guessed is None:
                self._pending = self.protocol.end_turn(dataclasses.replace(opened.shown, state=state))
        if self._memory.reads_again:
            self._kept.append(mem.keep(self._memory, opened.turn, state, reply, sight.slot))
        span = span_in(text) if text is not None else None
        start = None if span is None else span[0]
        return Event(sight.time, STATES[state], self.protocol.probs(scores), text, start)

    # ------------------------------------------------------------------------------------------------------ one turn

    def _open(self, sight: Sight) -> Generator[Wish, Any, _Opened]:
        """Feeds the frame of a turn, with what is asked."""
        asked = [*self.queries, *sight.asked]
        count = len(self.queries)  # more may be asked while the turn is under way
        turn = Turn(sight.time, sight.time + 1 / self.settings.fps, "\n".join(asked) or None)
        if self._memory.reads_again:
            shown, result = yield from self._see_prompt(turn, asked, sight)
        else:
            if self._memory.ring and self.places.gap > mem.REBASE_AT:
                yield Rebase(self.places.rebase())
            shown, chunk = self._next_chunk(turn, asked)
            self._forgotten.clear()
            result = yield from self._feed(chunk, sight)
        del self.queries[:count]
        return _Opened(sight, turn, shown, bool(asked), result)

    def _guess(self, opened: _Opened, sight: Sight | None) -> Generator[Wish, Any, _Guess | None]:
        """Opens the turn of the next frame as if this one deserved no word; None where it could not be taken back."""
        places = self.places
        if sight is None or not self.settings.ahead or self._memory.reads_again or self.queries or sight.asked:
            return None
        if places.gap > mem.REBASE_AT:
            return None
        state, mark, before = self._last_silent, places.mark(), (self._pending, list(self._forgotten))
        self._pending = self.protocol.end_turn(dataclasses.replace(opened.shown, state=state))
        turn = Turn(sight.time, sight.time + 1 / self.settings.fps)
        try:
            shown, chunk = self._next_chunk(turn, [])
        except CacheFullError:
            chunk = None
        if chunk is None or len(chunk) > self.lengths.longest or places.harms(len(chunk), mark):
            places.go_back(mark)
            self._pending, self._forgotten = before
            return None
        self._forgotten.clear()
        result = yield from self._feed(chunk, sight)
        return _Guess(state, _Opened(sight, turn, shown, False, result), mark, *before)

    def _next_chunk(self, turn: Turn, asked: list[str]) -> tuple[Turn, list[int]]:
        """A turn that only adds to what is in the cache, as it is said, with what is asked again; and its tokens."""
        places = self.places
        self._forgotten += places.open_turn()
        again = mem.standing(self._forgotten, self.tokens_in, self.lengths.room)
        queries = [*(query for query in again if query not in asked), *asked]
        shown = dataclasses.replace(turn, query="\n".join(queries) or None)
        places.ask(queries)
        chunk = [*self._pending, *self.protocol.open_turn(shown)]
        if not self._memory.ring:
            mem.require_room(places.capacity - places.left, len(chunk), places.capacity)
        return shown, chunk

    def _see_prompt(self, turn: Turn, asked: list[str], sight: Sight) -> Generator[Wish, Any, tuple[Turn, Result]]:
        """A turn of a window; where the memory drops some for it, the others are read anew.

        Returns:
            The turn as the prompt has it, and what came of it.
        """
        places, prefix = self.places, len(self.protocol.prefix)
        spare = places.capacity - self.settings.max_new_tokens - 1  # a whole reply fits behind
        heard = mem.standing([*self._heard, *asked], self.tokens_in, self.lengths.room)
        past, shown = self._kept, turn
        chunks = [[*self._pending, *self.protocol.open_turn(turn)]]
        used = places.capacity - places.left
        if past and (not self._memory.grows(len(past)) or used + len(chunks[0]) > spare):
            used = prefix
            past, chunks, shown = mem.read_again(self._memory, self.protocol, past, turn, heard, spare - used)
        mem.require_room(used, sum(map(len, chunks)) + self.settings.max_new_tokens, places.capacity)
        if len(chunks) > 1 or shown is not turn:
            places.forget(prefix)
        for chunk, kept in zip(chunks[:-1], past):
            yield from self._feed(chunk, dataclasses.replace(sight, slot=kept.frame))
        result = yield from self._feed(chunks[-1], sight)
        self._heard, self._kept = heard, past
        return shown, result

    def _reply(self, opening: list[int]) -> Generator[Wish, Any, list[int]]:
        """Generates a reply behind the tokens that open it; leaves what closes the turn pending."""
        places, reply = self.places, []
        if len(opening) > places.left:
            self._pending = [*opening, *self.protocol.close]  # cut here; the next frame will find the cache full
            return reply
        under_way = collections.deque([(yield from self._feed(opening))])  # results that have not been read
        marks: collections.deque[mem.Mark] = collections.deque()  # before the tokens were fed that they will name
        while True:
            while len(under_way) <= self.settings.ahead and len(reply) + len(under_way) < self.settings.max_new_tokens:
                if places.harms(1):
                    break
                marks.append(places.mark())
                under_way.append((yield from self._feed([FED_BACK])))
            token = under_way.popleft().token
            mark = marks.popleft() if marks else None
            if token == self.protocol.end_id:
                if mark is not None:
                    places.go_back(mark)
                self._pending = list(self.protocol.close)
                return reply
            reply.append(token)
            if under_way:  # so the token has been fed
                continue
            if len(reply) == self.settings.max_new_tokens or places.left < 1:  # cut: its last token is not fed yet
                self._pending = [token, *self.protocol.close]
                return reply
            under_way.append((yield from self._feed([token])))

    def _feed(self, tokens: list[int], sight: Sight | None = None) -> Generator[Wish, Any, Result]:
        """Feeds tokens that end in a frame, or in none; what is too long for a program goes ahead in pieces of text."""
        longest = self.lengths.longest
        while len(tokens) > longest:
            size = min(longest, len(tokens) - longest)
            yield self._chunk(tokens[:size])
            tokens = tokens[size:]
        return (yield self._chunk(tokens, sight))

    def _chunk(self, tokens: list[int], sight: Sight | None = None) -> Chunk:
        """Lays tokens behind the others, and counts them as fed."""
        places = self.places
        position = places.position
        start, gone = places.take(len(tokens))
        self._forgotten += gone
        is_frame = np.asarray(tokens) == self.protocol.frame_id
        rope, after = rope_positions(is_frame, self._vision.token_grid, self._multimodal, places.rope)
        places.rope = int(after)
        where = (start, position, places.oldest, places.gap)
        return Chunk(tokens, rope, *where, sight, self.settings.temperature, self._seed)

    def tokens_in(self, query: str) -> int:
        """Of a question, as it is said."""
        return question_tokens(self.protocol, query)
