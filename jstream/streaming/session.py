"""`Session`: one live stream. Frames and questions in, an `Event` for every frame out.

    ask(text) ─┐
    see(frame) ┴→ chunk of tokens → one forward against the cache → probabilities of the states → silent: done
                                                                    └ response: one-token steps until the reply ends

A silent turn is exactly one forward: the decision and the turn's end are not fed at once but open the next chunk.
Programs are compiled ahead for a few chunk lengths, so that a stream never waits for the compiler; the state is donated
to each of them. A memory that drops turns (`memory.py`) keeps the frame tokens of the others, to read them again.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jstream.data.frames import fit
from jstream.data.video import Frame
from jstream.model import Model
from jstream.models import cache as kv
from jstream.models.rope import rope_positions
from jstream.protocols.protocol import RESPONSE, SILENCE, STATES, Turn, span_in
from jstream.streaming import memory as mem
from jstream.streaming.event import Event
from jstream.streaming.step import compile_step, fresh_state

MAX_QUERY = 2000  # characters; a question is a sentence, not a document
CAPACITY = 4096  # tokens, where nothing is asked for


class Session:
    """One live stream of one model.

    Args:
        model: as `jstream.load` gives it.
        memory: `append`: everything is kept until the cache is full, which is an error. `reprefill:300`: the newest 300
            turns. `last_frames:4`: the newest 4 frames, without what was said. See `memory.py`.
        capacity: tokens the cache holds; a turn of the bundled model takes about 20. By default 4096, or what the
            window needs. A window never fills its cache: where its turns said too much to fit, fewer of them are kept.
        fps: frames a second that `see` will be given; the labels of turns tell the model.
        threshold: speak when p(response) reaches it; None is the protocol's own rule (`decide`).
        temperature: of replies; 0 is greedy.
        max_new_tokens: a reply is cut there.
        seed: of sampled replies.

    A vision tower that keeps the aspect of frames takes its geometry from the first one, for which programs may have to
    be compiled anew (`Model.for_frames` before the session avoids that); later frames are stretched to it.

    Attributes:
        compile_seconds: spent compiling.

    Raises:
        ConfigError: for an unknown memory, or a window that does not fit into the capacity.
    """

    def __init__(
        self,
        model: Model,
        memory: str = "append",
        capacity: int | None = None,
        fps: float = 1.0,
        threshold: float | None = None,
        temperature: float = 0.0,
        max_new_tokens: int = 64,
        seed: int = 0,
    ):
        self.memory = mem.parse_memory(memory)
        if not fps > 0:
            raise ValueError(f"fps: expected a number > 0, found {fps}")
        self.fps = fps
        self.threshold, self.max_new_tokens = threshold, max_new_tokens
        self._wanted, self._temperature, self._seed = capacity, np.float32(temperature), seed
        self.compile_seconds = 0.0
        self._adopt(model)

    def _adopt(self, model: Model) -> None:
        """Begins to stream with a model; its programs are compiled ahead."""
        self.model, self.protocol = model, model.protocol
        self._multimodal = bool(model.config.decoder.mrope_section)
        # Lengths of chunks that programs are compiled for: a turn without a question, and one with; of text alone: a
        # word of a reply, what opens a reply, and a long question.
        silent = len(self.protocol.close_turn(SILENCE)) + len(self.protocol.open_turn(Turn(100, 101)))
        silent = -(-silent // 8) * 8
        self._capacity = self._wanted or CAPACITY
        if self.memory.turns is not None:
            self._capacity = self._wanted or mem.window_capacity(self.memory, self.protocol, self.max_new_tokens)
            self._room = mem.question_room(self.memory, self.protocol, self.max_new_tokens, self._capacity)
        self._buckets = (silent, silent + 40)
        self._text_buckets = tuple(sorted({1, len(self.protocol.open_reply(Turn(100, 101))), silent + 40}))
        self.reset()
        self._compile()

    # ----------------------------------------------------------------------------------------------- the public face

    def reset(self) -> None:
        """Forgets the stream and starts another; nothing is compiled again."""
        self.__dict__.pop("_state", None)  # a cache is large: the old one goes before the new one is made
        self._state = fresh_state(self.model.config, self._capacity, self.model.dtype, self.model.mesh)
        self._pending: list[int] = list(self.protocol.prefix)  # tokens that open the next chunk
        self._queries: list[str] = []
        self._length = 0  # tokens in the cache, as the host counts them
        self._rope = 0  # rotary position of the next token
        self._turns = 0
        self._heard: list[str] = []  # questions that stand; of them and the rest only a window needs to know
        self._kept: list[mem.KeptTurn] = []
        self._last_image: np.ndarray | None = None
        self._key = jax.random.key(self._seed)

    def ask(self, text: str) -> None:
        """Says something to the model; it is heard with the next frame.

        Raises:
            ValueError: for an empty text, one of more than MAX_QUERY characters, or one that fits into no window.
        """
        text = text.strip()
        if not text or len(text) > MAX_QUERY:
            raise ValueError(f"a question: expected 1 to {MAX_QUERY} characters, found {len(text)}")
        if self.memory.turns is not None and (size := self._tokens_in(text)) > self._room:
            raise ValueError(
                f"a question: expected at most {self._room} tokens, which fit into the cache, found {size}"
            )
        self._queries.append(text)

    def see(self, frame: Frame) -> Event:
        """Watches the next frame and decides.

        Args:
            frame: image uint8 [H, W, 3] of any size, time in seconds.

        Returns:
            The decision, with the reply if there is one.

        Raises:
            CacheFullError: the stream has outgrown `capacity`; nothing has changed.
        """
        begin = time.perf_counter()
        if self._turns == 0:
            self._fit_to(frame)
        query = "\n".join(self._queries) or None
        turn = Turn(frame.time, frame.time + 1 / self.fps, query)
        image = fit(frame.image, self.model.config.vision)[None]
        if self.memory.turns is None:
            chunk = [*self._pending, *self.protocol.open_turn(turn)]
            kv.require_room(self._length, self._slots_of(chunk), self._capacity)
            scores = self._see_chunk("frame", chunk, image, np.asarray(self._turns == 0))
            shown, frame_tokens = turn, None
        else:
            shown, frame_tokens, scores = self._see_in_window(turn, image)
        scores = np.asarray(scores).tolist()
        self._queries.clear()
        self._turns += 1

        state, reply, text = self.protocol.decide(scores, self.threshold, asked=query is not None), [], None
        if state == RESPONSE:
            reply = self._reply(self.protocol.open_reply(shown))
            text = self.protocol.decode_reply(reply)
        else:
            self._pending = self.protocol.close_turn(state)
        if frame_tokens is not None:
            self._kept.append(mem.keep(self.memory, turn, state, reply, frame_tokens))
        span = span_in(text) if text is not None else None
        return Event(
            time=frame.time,
            state=STATES[state],
            probs=self.protocol.probs(scores),
            text=text,
            start=None if span is None else span[0],
            latency=time.perf_counter() - begin,
        )

    # ------------------------------------------------------------------------------------------------------ one turn

    def _fit_to(self, frame: Frame) -> None:
        """Takes the geometry of the first frame, where the tower has one for every aspect."""
        model = self.model.for_frames(*frame.image.shape[:2])
        if model.config != self.model.config:
            queries = list(self._queries)
            self._adopt(model)
            self._queries = queries

    def _slots_of(self, chunk: Sequence[int]) -> int:
        """Cache slots a chunk touches, the padding of its last piece included."""
        return max(len(chunk), self._buckets[-1])

    def _see_in_window(self, turn: Turn, image: np.ndarray) -> tuple[Turn, jax.Array, jax.Array]:
        """A turn up to its decision; where the memory drops one for it, the others are read anew.

        Returns:
            The turn as the prompt has it, its frame tokens, and the scores.
        """
        spare = self._capacity - self._buckets[-1] - self.max_new_tokens  # behind it, padding and a whole reply fit
        heard = mem.standing([*self._heard, *self._queries], self._tokens_in, self._room)
        start, past, shown = self._length, self._kept, turn
        chunks = [[*self._pending, *self.protocol.open_turn(turn)]]
        if past and (not self.memory.grows(len(past)) or start + len(chunks[0]) > spare):
            start = len(self.protocol.prefix)
            past, chunks, shown = mem.read_again(self.memory, self.protocol, past, turn, heard, spare - start)
        kv.require_room(start, sum(map(len, chunks)) + self._capacity - spare, self._capacity)
        if start < self._length:
            self._rewind(start)
        before = image if self._last_image is None else self._last_image
        frame_tokens = self._programs["embed", 0](self.model.params, before, image)
        for chunk, kept in zip(chunks[:-1], past):
            self._see_chunk("turn", chunk, kept.frame_tokens)
        scores = self._see_chunk("turn", chunks[-1], frame_tokens)
        self._heard, self._kept, self._last_image = heard, past, image
        return shown, frame_tokens, scores

    def _tokens_in(self, query: str) -> int:
        return len(self.protocol.tokenizer.encode(f"{query}\n"))

    def _rewind(self, length: int) -> None:
        """Forgets all but the first tokens, no more than the protocol's prefix: each takes one rotary position."""
        cache = kv.rewind(self._state.cache, np.asarray(length, np.int32))
        self._state = dataclasses.replace(self._state, cache=cache)
        self._length = self._rope = length

    def _see_chunk(self, kind: str, chunk: list[int], *seen: Any) -> jax.Array:
        """Feeds a chunk that ends in a frame; text too long for a bucket goes ahead in pieces.

        Args:
            kind: `frame` or `turn`.
            seen: what that step takes behind the chunk.
        """
        longest = self._buckets[-1]
        while len(chunk) > longest:
            size = min(longest, len(chunk) - longest)
            self._step_text(chunk[:size])
            chunk = chunk[size:]
        bucket = next(size for size in self._buckets if len(chunk) <= size)
        arguments = (*self._chunk_arguments(chunk, bucket), *seen)
        self._state, scores = self._programs[kind, bucket](self.model.params, self._state, *arguments)
        return scores

    def _reply(self, opening: list[int]) -> list[int]:
        """Generates a reply behind the tokens that open it; leaves what closes the turn pending."""
        tokens, reply = opening, []
        while True:
            slots = 1 if len(tokens) == 1 else self._slots_of(tokens)
            if self._length + slots > self._capacity:
                self._pending = [*tokens, *self.protocol.close]  # cut here; the next frame will find the cache full
                return reply
            token = int(self._step_text(tokens))
            if token == self.protocol.end_id:
                self._pending = list(self.protocol.close)
                return reply
            reply.append(token)
            if len(reply) == self.max_new_tokens:  # cut: its last token has not been fed yet
                self._pending = [token, *self.protocol.close]
                return reply
            tokens = [token]

    def _step_text(self, tokens: list[int]) -> jax.Array:
        """Feeds text, in pieces where it is long; the token that follows."""
        longest = self._text_buckets[-1]
        if len(tokens) > longest:
            self._step_text(tokens[:longest])
            return self._step_text(tokens[longest:])
        bucket = next(size for size in self._text_buckets if len(tokens) <= size)
        self._key, key = jax.random.split(self._key) if self._temperature else (self._key, self._key)
        arguments = (*self._chunk_arguments(tokens, bucket), self._temperature, key)
        self._state, token = self._programs["text", bucket](self.model.params, self._state, *arguments)
        return token

    def _chunk_arguments(self, chunk: list[int], bucket: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pads a chunk, lays out its rotary positions, and counts it as fed."""
        tokens = np.zeros((1, bucket), np.int32)
        tokens[0, : len(chunk)] = chunk
        rope = np.zeros((3, 1, bucket), np.int32)
        rope[:, 0, : len(chunk)], self._rope = rope_positions(
            tokens[0, : len(chunk)] == self.protocol.frame_id,
            self.model.config.vision.token_grid,
            self._multimodal,
            self._rope,
        )
        self._length += len(chunk)
        return tokens, np.asarray(len(chunk), np.int32), rope

    # ------------------------------------------------------------------------------------------------------ programs

    def _compile(self) -> None:
        """All programs of the stream, by kind and length of the chunk."""
        begin = time.perf_counter()
        windowed = self.memory.turns is not None
        kinds = [("turn" if windowed else "frame", bucket) for bucket in self._buckets]
        kinds += [("embed", 0)] * windowed + [("text", bucket) for bucket in self._text_buckets]
        language = (self.protocol.scores, self.protocol.frame_id, self.protocol.unspoken_ids)
        where = (self.model.dtype, self.model.mesh)
        self._programs = {
            (kind, bucket): compile_step(kind, self.model.config, *language, self._capacity, bucket, *where)
            for kind, bucket in kinds
        }
        if windowed:
            self._rewind(0)
        self.compile_seconds += time.perf_counter() - begin
