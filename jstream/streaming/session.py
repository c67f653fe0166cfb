"""`Session`: one live stream. Frames and questions in, an `Event` for every frame out.

    ask(text) ─┐
    see(frame) ┴→ chunk of tokens → one forward against the cache → probabilities of the states → silent: done
                                                                    └ response: one-token steps until the reply ends

A silent turn is exactly one forward: the decision and the turn's end are not fed at once but open the next chunk.
Programs are compiled ahead for a few chunk lengths, so that a stream never waits for the compiler; the state is donated
to each of them.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jstream.config import ModelConfig
from jstream.data.frames import fit
from jstream.data.video import Frame
from jstream.model import Model
from jstream.models import cache as kv
from jstream.models.rope import rope_positions
from jstream.models.video_lm import abstract_params, run
from jstream.protocols.protocol import RESPONSE, SILENCE, STATES, StreamProtocol, Turn, span_in
from jstream.streaming.event import Event

MAX_QUERY = 2000  # characters; a question is a sentence, not a document


def capacity_for(protocol: StreamProtocol, num_turns: int, queries: Iterable[str] = (), reply_tokens: int = 64) -> int:
    """Tokens a cache must hold for a stream of so many turns, whatever it says.

    Args:
        protocol: the language of the model.
        num_turns: frames.
        queries: all that will be asked.
        reply_tokens: of a reply in every turn, at most; less is a guess about how much is said.
    """
    label = Turn(1e6, 1e6 + 1)  # as long as labels get
    turn = len(protocol.open_turn(label)) + len(protocol.close_turn(RESPONSE)) + reply_tokens
    asked = sum(len(protocol.tokenizer.encode(f"{query}\n")) for query in queries)
    padding = len(protocol.open_turn(label)) + 128  # the last chunk is padded to its bucket
    return len(protocol.prefix) + num_turns * turn + asked + padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamState:
    """What a step takes, donates and returns.

    Attributes:
        cache: everything the decoder has seen.
        last_image: uint8 [1, H, W, 3]: the newest frame, for patches that see two.
    """

    cache: kv.Cache
    last_image: jax.Array


def fresh_state(config: ModelConfig, capacity: int, dtype: jnp.dtype = jnp.float32) -> StreamState:
    """The state before the first frame, with room for `capacity` tokens."""
    last_image = jnp.zeros((1, *config.vision.frame_size, 3), jnp.uint8)
    return StreamState(kv.empty_cache(config.decoder, 1, capacity, dtype), last_image)


def forward_chunk(
    config: ModelConfig,
    params: Any,
    cache: kv.Cache,
    tokens: jax.Array,
    count: jax.Array,
    rope: jax.Array,
    is_frame: jax.Array | None = None,
    frame_tokens: jax.Array | None = None,
) -> tuple[kv.Cache, jax.Array]:
    """One forward of a chunk against the cache.

    Args:
        tokens: int32 [1, T], padded behind `count` (int32 []) real ones.
        rope: int32 [3, 1, T]: rotary positions.
        is_frame, frame_tokens: bool [1, T] and [1, M, E], where the chunk holds a frame.

    Returns:
        The cache, advanced by `count`, and the logits f32 [V] behind the last real token.
    """
    model = functools.partial(run, config, params)
    if is_frame is None or frame_tokens is None:
        embeds = model(tokens, method="embed_text")
    else:
        embeds = model(tokens, is_frame, frame_tokens, method="embed_tokens")
    slots = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions = jnp.where(slots < count, cache.length + slots, kv.EMPTY)
    hidden, cache = model(embeds, positions, rope, None, cache, method="hidden")
    last = jax.lax.dynamic_slice_in_dim(hidden, count - 1, 1, axis=1)
    return kv.advance(cache, count), model(last, method="logits")[0, 0]


def step_frame(
    config: ModelConfig,
    scores: Callable[[jax.Array], jax.Array],
    frame_id: int,
    params: Any,
    state: StreamState,
    tokens: jax.Array,
    count: jax.Array,
    rope: jax.Array,
    image: jax.Array,
    first: jax.Array,
) -> tuple[StreamState, jax.Array]:
    """A turn up to its decision: vision tower, projector and one forward.

    Args:
        image: uint8 [1, H, W, 3].
        first: bool []: whether it opens the stream.

    Returns:
        The next state and the protocol's scores of the decision, a few f32.
    """
    clip = image
    if config.vision.num_images == 2:
        clip = jnp.concatenate([jnp.where(first, image, state.last_image), image], axis=-1)
    frame_tokens = run(config, params, clip, method="embed_frames")
    cache, logits = forward_chunk(config, params, state.cache, tokens, count, rope, tokens == frame_id, frame_tokens)
    return StreamState(cache, image), scores(logits)


def step_text(
    config: ModelConfig,
    unspoken_ids: tuple[int, ...],
    params: Any,
    state: StreamState,
    tokens: jax.Array,
    count: jax.Array,
    rope: jax.Array,
    temperature: jax.Array,
    key: jax.Array,
) -> tuple[StreamState, jax.Array]:
    """Text without a frame: a long question, or a token of a reply.

    Args:
        unspoken_ids: special tokens that a reply cannot hold.

    Returns:
        The next state and the token that follows, int32 []: the most probable one, or a sample at temperature > 0.
    """
    cache, logits = forward_chunk(config, params, state.cache, tokens, count, rope)
    logits = logits.at[jnp.asarray(unspoken_ids, jnp.int32)].set(-jnp.inf)
    sampled = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    token = jnp.where(temperature > 0, sampled, jnp.argmax(logits))
    return dataclasses.replace(state, cache=cache), token.astype(jnp.int32)


@functools.lru_cache(maxsize=64)
def compile_step(
    kind: str,
    config: ModelConfig,
    scores: Callable[[jax.Array], jax.Array],
    frame_id: int,
    unspoken_ids: tuple[int, ...],
    capacity: int,
    bucket: int,
    dtype: jnp.dtype,
) -> Any:
    """The compiled step of a kind (`frame` or `text`) and chunk length; sessions of one shape share it.

    It takes the params, the state, which is donated, and what `step_frame` or `step_text` take behind them.
    """
    abstract = jax.ShapeDtypeStruct
    params = jax.tree.map(lambda x: abstract(x.shape, dtype), abstract_params(config))
    state = jax.eval_shape(lambda: fresh_state(config, capacity))
    chunk = (abstract((1, bucket), jnp.int32), abstract((), jnp.int32), abstract((3, 1, bucket), jnp.int32))
    if kind == "frame":
        step = functools.partial(step_frame, config, scores, frame_id)
        rest = (abstract((1, *config.vision.frame_size, 3), jnp.uint8), abstract((), jnp.bool_))
    else:
        step = functools.partial(step_text, config, unspoken_ids)
        rest = (abstract((), jnp.float32), jax.eval_shape(lambda: jax.random.key(0)))
    return jax.jit(step, donate_argnums=1).lower(params, state, *chunk, *rest).compile()


class Session:
    """One live stream of one model.

    Args:
        model: as `jstream.load` gives it.
        memory: `append`: everything is kept until the cache is full, which is an error.
        capacity: tokens the cache holds; a turn of the bundled model takes about 20.
        fps: frames a second that `see` will be given; the labels of turns tell the model.
        threshold: speak exactly when p(response) reaches it; None takes the most probable state.
        temperature: of replies; 0 is greedy.
        max_new_tokens: a reply is cut there.
        seed: of sampled replies.

    A vision tower that keeps the aspect of frames takes its geometry from the first one, for which programs may have to
    be compiled anew (`Model.for_frames` before the session avoids that); later frames are stretched to it.

    Attributes:
        compile_seconds: spent compiling.
    """

    def __init__(
        self,
        model: Model,
        memory: str = "append",
        capacity: int = 4096,
        fps: float = 1.0,
        threshold: float | None = None,
        temperature: float = 0.0,
        max_new_tokens: int = 64,
        seed: int = 0,
    ):
        if memory != "append":
            raise ValueError(f"memory: expected 'append', found {memory!r}")
        if not fps > 0:
            raise ValueError(f"fps: expected a number > 0, found {fps}")
        self.fps = fps
        self.threshold, self.max_new_tokens = threshold, max_new_tokens
        self._capacity, self._temperature, self._seed = capacity, np.float32(temperature), seed
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
        self._buckets = (silent, silent + 40)
        self._text_buckets = tuple(sorted({1, len(self.protocol.open_reply(Turn(100, 101))), silent + 40}))
        self.reset()
        self._warm_up()

    # ----------------------------------------------------------------------------------------------- the public face

    def reset(self) -> None:
        """Forgets the stream and starts another; nothing is compiled again."""
        self._state = fresh_state(self.model.config, self._capacity)
        self._pending: list[int] = list(self.protocol.prefix)  # tokens that open the next chunk
        self._queries: list[str] = []
        self._length = 0  # tokens in the cache, as the host counts them
        self._rope = 0  # rotary position of the next token
        self._turns = 0
        self._key = jax.random.key(self._seed)

    def ask(self, text: str) -> None:
        """Says something to the model; it is heard with the next frame.

        Raises:
            ValueError: for an empty text or one of more than MAX_QUERY characters.
        """
        text = text.strip()
        if not text or len(text) > MAX_QUERY:
            raise ValueError(f"a question: expected 1 to {MAX_QUERY} characters, found {len(text)}")
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
        chunk = [*self._pending, *self.protocol.open_turn(turn)]
        kv.require_room(self._length, self._slots_of(chunk), self._capacity)
        image = fit(frame.image, self.model.config.vision)
        scores = self._see_chunk(chunk, image)
        self._queries.clear()
        self._turns += 1

        state, text = self.protocol.decide(scores, self.threshold, asked=query is not None), None
        if state == RESPONSE:
            text = self.protocol.decode_reply(self._reply(self.protocol.open_reply(turn)))
        else:
            self._pending = self.protocol.close_turn(state)
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

    def _see_chunk(self, chunk: list[int], image: np.ndarray) -> list[float]:
        """Feeds a chunk that ends in a frame; text too long for a bucket goes ahead in pieces."""
        longest = self._buckets[-1]
        while len(chunk) > longest:
            size = min(longest, len(chunk) - longest)
            self._step_text(chunk[:size])
            chunk = chunk[size:]
        bucket = next(size for size in self._buckets if len(chunk) <= size)
        arguments = (*self._chunk_arguments(chunk, bucket), image[None], np.asarray(self._turns == 0))
        self._state, scores = self._program("frame", bucket)(self.model.params, self._state, *arguments)
        return np.asarray(scores).tolist()

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
        self._state, token = self._program("text", bucket)(self.model.params, self._state, *arguments)
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

    def _warm_up(self) -> None:
        for bucket in self._buckets:
            self._program("frame", bucket)
        for bucket in self._text_buckets:
            self._program("text", bucket)

    def _program(self, kind: str, bucket: int) -> Any:
        begin = time.perf_counter()
        dtype = jax.tree.leaves(self.model.params)[0].dtype
        language = (self.protocol.scores, self.protocol.frame_id, self.protocol.unspoken_ids)
        program = compile_step(kind, self.model.config, *language, self._capacity, bucket, dtype)
        self.compile_seconds += time.perf_counter() - begin
        return program
