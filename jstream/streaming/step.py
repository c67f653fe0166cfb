"""The steps of live streams as pure functions of (params, cache, results, inputs), and their compiled programs.

    clips → vision tower → projector ─┐
    chunks of tokens ─────────────────┴→ decoder against the cache → results: scores of the decision, the next token

A step advances some or all of B streams, each by a chunk of its own; one alone is a batch of one. The cache is donated.
Results stay on the device, so that a step may begin with the token that the one before has found, which the host has
not read yet. Steps are compiled ahead for static lengths, so that no stream ever waits for the compiler.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jstream.config import ModelConfig
from jstream.models import cache as kv
from jstream.models.video_lm import abstract_params, run
from jstream.sharding import cache_sharding, param_shardings, placed, replicated

FED_BACK = -1  # a token of a chunk: the one that the stream's last step has found


@dataclasses.dataclass(frozen=True)
class Language:
    """What a step has to know of a protocol (`protocols.protocol.StreamProtocol` says what these are)."""

    scores: Callable[[jax.Array], jax.Array]
    frame_id: int
    unspoken_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is static in a step.

    Attributes:
        batch: B streams.
        slots: S of the cache.
        tokens: T of the chunks.
        reads: slots that the step reads, the first ones; 0 for all, or `cache.LIVE`.
        sinks: tokens at the start of every stream that are never forgotten, whatever is left out behind them.
        int8: whether the cache holds keys and values in int8, and not in the dtype of the params.
        rows: R streams that the step advances; 0 for all.
        frames: Q of each stream that are kept by themselves, as their frame tokens.
        attention: implementation of `attention.attend_cache`.
    """

    batch: int
    slots: int
    tokens: int
    reads: int = 0
    sinks: int = 0
    int8: bool = False
    rows: int = 0
    frames: int = 0
    attention: str = "xla"

    @property
    def chunks(self) -> int:
        """R, also where it is all of them."""
        return self.rows or self.batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """A chunk for each of R streams; one of `count` 0 leaves its stream as it is.

    Attributes:
        row: int32 [R]: the stream, each at most once; all in order where R = B.
        tokens: int32 [R, T], padded behind `count` (int32 [R]) real ones; FED_BACK where the host does not know it.
        rope: int32 [3, R, T]: rotary positions.
        start, position, oldest: int32 [R]: as in `cache.View`.
        gap: int32 [R]: rotary positions that lie between the sinks and the oldest token behind them.
        frame: int32 [R]: which of the stream's frames takes the places in the chunk.
        temperature: f32 [R]: of the next token; 0 is the most probable one.
        seed: int32 [R]: of its sampling, together with the position.
    """

    row: Any
    tokens: Any
    count: Any
    rope: Any
    start: Any
    position: Any
    oldest: Any
    gap: Any
    frame: Any
    temperature: Any
    seed: Any


def empty_inputs(shape: Shape) -> Inputs:
    """Chunks of nothing, as NumPy arrays."""
    rows, tokens = shape.chunks, shape.tokens
    zeros = lambda *dims: np.zeros(dims, np.int32)
    every = lambda: zeros(rows)
    return Inputs(
        np.arange(rows, dtype=np.int32), zeros(rows, tokens), every(), zeros(3, rows, tokens), every(), every(),
        every(), every(), every(), np.zeros(rows, np.float32), every(),
    )  # fmt: skip


def embed_clips(config: ModelConfig, params: Any, clips: jax.Array) -> jax.Array:
    """Vision tower and projector: uint8 [N, H, W, 3 · num_images] → frame tokens [N, M, E]."""
    return run(config, params, clips, method="embed_frames")


def embed_into(
    config: ModelConfig, params: Any, frames: jax.Array, clips: jax.Array, row: jax.Array, slot: jax.Array
) -> jax.Array:
    """The kept frames [B, Q, M, E] with those of clips [N, …] at (row, slot), int32 [N] each; a row past B is none."""
    return frames.at[row, slot].set(embed_clips(config, params, clips).astype(frames.dtype), mode="drop")


def step_text(
    config: ModelConfig,
    language: Language,
    shape: Shape,
    params: Any,
    cache: kv.Cache,
    results: jax.Array,
    inputs: Inputs,
    frame_tokens: jax.Array | None = None,
) -> tuple[kv.Cache, jax.Array]:
    """One forward of a chunk for each of R streams, of text or with the frame tokens [R, M, E] of a frame each.

    Args:
        results: as the step before has returned them.

    Returns:
        The next cache, and f32 [B, scores + 1]: the protocol's scores of a decision behind the chunk, and the token
        that would follow it in a reply; as before for streams that are not among these. One array, so that the host
        reads once.
    """
    model = functools.partial(run, config, params, attention=shape.attention)
    rows = None if shape.chunks == shape.batch else inputs.row
    before = kv.of_rows(results, rows)
    tokens = jnp.where(inputs.tokens == FED_BACK, before[:, -1:].astype(jnp.int32), inputs.tokens)
    if frame_tokens is None:
        embeds = model(tokens, method="embed_text")
    else:
        embeds = model(tokens, tokens == language.frame_id, frame_tokens, method="embed_tokens")
    slots = jnp.arange(shape.tokens, dtype=jnp.int32)
    positions = jnp.where(slots < inputs.count[:, None], inputs.position[:, None] + slots, kv.EMPTY)
    sink_rope = inputs.rope - inputs.gap[:, None] if shape.sinks else None
    view = kv.View(inputs.start, inputs.position, inputs.oldest, rows, sink_rope, shape.sinks, shape.reads)
    hidden, cache = model(embeds, positions, inputs.rope, None, cache, view, method="hidden")
    last = jnp.take_along_axis(hidden, jnp.maximum(inputs.count - 1, 0)[:, None, None], axis=1)
    logits = model(last, method="logits")[:, 0]
    found = jnp.concatenate([jax.vmap(language.scores)(logits), _next_tokens(language, logits, inputs)[:, None]], -1)
    found = jnp.where(inputs.count[:, None] > 0, found, before)
    return cache, found if rows is None else results.at[rows].set(found, unique_indices=True)


def _next_tokens(language: Language, logits: jax.Array, inputs: Inputs) -> jax.Array:
    """f32 [B]: the ids of the most probable tokens behind logits [B, V], samples where the temperature is above 0."""
    logits = logits.at[:, jnp.asarray(language.unspoken_ids, jnp.int32)].set(-jnp.inf)
    greedy = jnp.argmax(logits, axis=-1)

    def sample(logits, temperature, seed, position):
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))

    def sampled():
        drawn = jax.vmap(sample)(logits, inputs.temperature, inputs.seed, inputs.position)
        return jnp.where(inputs.temperature > 0, drawn, greedy)

    tokens = jax.lax.cond(jnp.any(inputs.temperature > 0), sampled, lambda: greedy)
    return tokens.astype(jnp.float32)  # exact up to 2²⁴


def step_turn(
    config: ModelConfig,
    language: Language,
    shape: Shape,
    params: Any,
    cache: kv.Cache,
    results: jax.Array,
    inputs: Inputs,
    frames: jax.Array,
) -> tuple[kv.Cache, jax.Array]:
    """`step_text` with a kept frame for each stream, of all [B, Q, M, E]."""
    return step_text(config, language, shape, params, cache, results, inputs, frames[inputs.row, inputs.frame])


def step_frame(
    config: ModelConfig,
    language: Language,
    shape: Shape,
    params: Any,
    cache: kv.Cache,
    results: jax.Array,
    inputs: Inputs,
    clips: jax.Array,
) -> tuple[kv.Cache, jax.Array]:
    """`step_text` with a new frame for each stream, from its clip uint8 [R, H, W, 3 · num_images]."""
    return step_text(config, language, shape, params, cache, results, inputs, embed_clips(config, params, clips))


# ------------------------------------------------------------------------------------------------------- as programs


def _abstract_params(config: ModelConfig, dtype: Any, mesh: jax.sharding.Mesh | None) -> Any:
    params = abstract_params(config, dtype)
    return params if mesh is None else placed(params, param_shardings(config.decoder, params, mesh))


def _abstract(make: Callable[[], Any], places: Any) -> Any:
    """The shapes of what a function makes, where they are to lie; None is anywhere."""
    shapes = jax.eval_shape(make)
    return shapes if places is None else placed(shapes, places)


def _empty_cache(config: ModelConfig, shape: Shape, dtype: Any) -> kv.Cache:
    return kv.empty_cache(config.decoder, shape.batch, shape.slots, jnp.int8 if shape.int8 else dtype)


def _empty_frames(config: ModelConfig, shape: Shape, dtype: Any) -> jax.Array:
    width = config.decoder.width * (1 + config.decoder.deep_layers)
    return jnp.zeros((shape.batch, shape.frames, config.vision.tokens_per_frame, width), dtype)


def _empty_results(config: ModelConfig, language: Language, shape: Shape) -> jax.Array:
    logits = jax.ShapeDtypeStruct((config.decoder.vocab_size,), jnp.float32)
    (scores,) = jax.eval_shape(language.scores, logits).shape
    return jnp.zeros((shape.batch, scores + 1), jnp.float32)


def _abstract_clips(config: ModelConfig, count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *config.vision.frame_size, 3 * config.vision.num_images), jnp.uint8)


KINDS: dict[str, Callable[..., Any]] = {"frame": step_frame, "turn": step_turn, "text": step_text}


@functools.lru_cache(maxsize=128)
def compile_step(
    kind: str,
    config: ModelConfig,
    language: Language,
    shape: Shape,
    dtype: Any,
    mesh: jax.sharding.Mesh | None = None,
) -> Any:
    """The compiled step of a kind and shape; streams of one shape share it.

    Args:
        kind: all take params, cache, results and inputs; `frame` (`step_frame`) also clips, `turn` (`step_turn`) the
            kept frames, `text` (`step_text`) nothing more.
        mesh: it may be one of devices that are not here.
    """
    everywhere = None if mesh is None else replicated(mesh)
    places = None if mesh is None else cache_shardings(config, shape, mesh)
    arguments = [
        _abstract_params(config, dtype, mesh),
        _abstract(functools.partial(_empty_cache, config, shape, dtype), places),
        _abstract(functools.partial(_empty_results, config, language, shape), everywhere),
        empty_inputs(shape),
    ]
    if kind == "frame":
        arguments.append(_abstract_clips(config, shape.chunks))
    elif kind == "turn":
        arguments.append(_abstract(functools.partial(_empty_frames, config, shape, dtype), everywhere))
    step = functools.partial(KINDS[kind], config, language, shape)
    out = None if mesh is None else (places, everywhere)
    return jax.jit(step, donate_argnums=1, out_shardings=out).lower(*arguments).compile()


@functools.lru_cache(maxsize=32)
def compile_embed(
    config: ModelConfig, shape: Shape, count: int, dtype: Any, mesh: jax.sharding.Mesh | None = None
) -> Any:
    """`embed_into` of so many clips, compiled; the kept frames are donated."""
    everywhere = None if mesh is None else replicated(mesh)
    frames = _abstract(functools.partial(_empty_frames, config, shape, dtype), everywhere)
    embed = jax.jit(functools.partial(embed_into, config), donate_argnums=1, out_shardings=everywhere)
    index = np.zeros(count, np.int32)
    return embed.lower(
        _abstract_params(config, dtype, mesh), frames, _abstract_clips(config, count), index, index
    ).compile()


@functools.lru_cache(maxsize=8)
def compile_rebase(config: ModelConfig, shape: Shape, dtype: Any, mesh: jax.sharding.Mesh | None = None) -> Any:
    """`cache.rebase`, compiled: cache, int32 [B] → cache."""
    step = lambda cache, distance: kv.rebase(config.decoder, cache, shape.sinks, distance)
    places = None if mesh is None else cache_shardings(config, shape, mesh)
    cache = _abstract(functools.partial(_empty_cache, config, shape, dtype), places)
    distance = np.zeros(shape.batch, np.int32)
    return jax.jit(step, donate_argnums=0, out_shardings=places).lower(cache, distance).compile()


def cache_shardings(config: ModelConfig, shape: Shape, mesh: jax.sharding.Mesh) -> Any:
    """Where a cache lies on a mesh: keys and values by their heads, the rest on every device."""
    heads = cache_sharding(config.decoder, shape.batch, mesh)
    layers = (kv.Int8(heads, heads) if shape.int8 else heads,) * config.decoder.num_layers  # type: ignore[arg-type]
    return kv.Cache(layers, layers, replicated(mesh))  # type: ignore[arg-type]


def fresh_state(
    config: ModelConfig, language: Language, shape: Shape, dtype: Any, mesh: jax.sharding.Mesh | None = None
) -> tuple[kv.Cache, jax.Array, jax.Array]:
    """An empty cache, results of nothing, and room for the kept frames; on the mesh or on the default device."""

    def make() -> tuple[kv.Cache, jax.Array, jax.Array]:
        results = _empty_results(config, language, shape)
        return _empty_cache(config, shape, dtype), results, _empty_frames(config, shape, dtype)

    if mesh is None:
        return make()
    places = cache_shardings(config, shape, mesh), replicated(mesh), replicated(mesh)
    return jax.jit(make, out_shardings=places)()
