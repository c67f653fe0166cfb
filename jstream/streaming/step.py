"""The steps of live streams as pure functions of (params, cache, inputs), and their compiled programs.

    clips → vision tower → projector ─┐
    chunks of tokens ─────────────────┴→ decoder against the cache → scores of the decision, and the next token

A step advances B streams at once, each by a chunk of its own; one alone is a batch of one. The cache is donated. Steps
are compiled ahead for static lengths, so that no stream ever waits for the compiler.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jstream.config import ModelConfig
from jstream.models import cache as kv
from jstream.models.video_lm import abstract_params, run
from jstream.sharding import cache_sharding, param_shardings, placed, replicated


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
    """

    batch: int
    slots: int
    tokens: int
    reads: int = 0
    sinks: int = 0
    int8: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """A chunk for each of B streams; one of `count` 0 leaves its stream as it is.

    Attributes:
        tokens: int32 [B, T], padded behind `count` (int32 [B]) real ones.
        rope: int32 [3, B, T]: rotary positions.
        start, position, oldest: int32 [B]: as in `cache.View`.
        gap: int32 [B]: rotary positions that lie between the sinks and the oldest token behind them.
        temperature: f32 [B]: of the next token; 0 is the most probable one.
        seed: int32 [B]: of its sampling, together with the position.
    """

    tokens: Any
    count: Any
    rope: Any
    start: Any
    position: Any
    oldest: Any
    gap: Any
    temperature: Any
    seed: Any


def abstract_inputs(shape: Shape) -> Inputs:
    whole = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int32)
    batch, tokens = shape.batch, shape.tokens
    one = whole(batch)
    temperature = jax.ShapeDtypeStruct((batch,), jnp.float32)
    return Inputs(whole(batch, tokens), one, whole(3, batch, tokens), one, one, one, one, temperature, one)


def embed_clips(config: ModelConfig, params: Any, clips: jax.Array) -> jax.Array:
    """Vision tower and projector: uint8 [N, H, W, 3 · num_images] → frame tokens [N, M, E]."""
    return run(config, params, clips, method="embed_frames")


def step_text(
    config: ModelConfig,
    language: Language,
    shape: Shape,
    params: Any,
    cache: kv.Cache,
    inputs: Inputs,
    frame_tokens: jax.Array | None = None,
) -> tuple[kv.Cache, jax.Array]:
    """One forward of a chunk for each stream, of text or with the frame tokens [B, M, E] of a frame each.

    Returns:
        The next cache, and f32 [B, scores + 1]: the protocol's scores of a decision behind the chunk, and the token
        that would follow it in a reply. One array, so that the host reads once.
    """
    model = functools.partial(run, config, params)
    if frame_tokens is None:
        embeds = model(inputs.tokens, method="embed_text")
    else:
        embeds = model(inputs.tokens, inputs.tokens == language.frame_id, frame_tokens, method="embed_tokens")
    slots = jnp.arange(shape.tokens, dtype=jnp.int32)
    positions = jnp.where(slots < inputs.count[:, None], inputs.position[:, None] + slots, kv.EMPTY)
    sink_rope = inputs.rope - inputs.gap[:, None] if shape.sinks else None
    view = kv.View(inputs.start, inputs.position, inputs.oldest, sink_rope, shape.sinks, shape.reads)
    hidden, cache = model(embeds, positions, inputs.rope, None, cache, view, method="hidden")
    last = jnp.take_along_axis(hidden, jnp.maximum(inputs.count - 1, 0)[:, None, None], axis=1)
    logits = model(last, method="logits")[:, 0]
    tokens = _next_tokens(language, logits, inputs)
    return cache, jnp.concatenate([jax.vmap(language.scores)(logits), tokens[:, None]], axis=-1)


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


def step_frame(
    config: ModelConfig,
    language: Language,
    shape: Shape,
    params: Any,
    cache: kv.Cache,
    inputs: Inputs,
    clips: jax.Array,
) -> tuple[kv.Cache, jax.Array]:
    """`step_text` with a frame for every stream, from its clip uint8 [B, H, W, 3 · num_images]."""
    return step_text(config, language, shape, params, cache, inputs, embed_clips(config, params, clips))


# ------------------------------------------------------------------------------------------------------- as programs


def _abstract_params(config: ModelConfig, dtype: Any, mesh: jax.sharding.Mesh | None) -> Any:
    params = abstract_params(config, dtype)
    return params if mesh is None else placed(params, param_shardings(config.decoder, params, mesh))


def _abstract_cache(config: ModelConfig, shape: Shape, dtype: Any, mesh: jax.sharding.Mesh | None) -> kv.Cache:
    cache = jax.eval_shape(lambda: _empty_cache(config, shape, dtype))
    return cache if mesh is None else placed(cache, cache_shardings(config, shape, mesh))


def _empty_cache(config: ModelConfig, shape: Shape, dtype: Any) -> kv.Cache:
    return kv.empty_cache(config.decoder, shape.batch, shape.slots, jnp.int8 if shape.int8 else dtype)


def _abstract_clips(config: ModelConfig, count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *config.vision.frame_size, 3 * config.vision.num_images), jnp.uint8)


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
        kind: `frame` takes params, cache, inputs and clips; `turn` frame tokens in place of clips; `text` neither.
        mesh: it may be one of devices that are not here.
    """
    params = _abstract_params(config, dtype, mesh)
    clips, rest = _abstract_clips(config, shape.batch), []
    if kind == "frame":
        rest = [clips]
    elif kind == "turn":
        frame_tokens = jax.eval_shape(functools.partial(embed_clips, config), params, clips)
        rest = [frame_tokens if mesh is None else placed(frame_tokens, replicated(mesh))]
    step = functools.partial(step_frame if kind == "frame" else step_text, config, language, shape)
    out = None if mesh is None else (cache_shardings(config, shape, mesh), replicated(mesh))
    arguments = (params, _abstract_cache(config, shape, dtype, mesh), abstract_inputs(shape), *rest)
    return jax.jit(step, donate_argnums=1, out_shardings=out).lower(*arguments).compile()


@functools.lru_cache(maxsize=32)
def compile_embed(config: ModelConfig, count: int, dtype: Any, mesh: jax.sharding.Mesh | None = None) -> Any:
    """`embed_clips` of so many clips, compiled."""
    embed = jax.jit(functools.partial(embed_clips, config), out_shardings=None if mesh is None else replicated(mesh))
    return embed.lower(_abstract_params(config, dtype, mesh), _abstract_clips(config, count)).compile()


@functools.lru_cache(maxsize=8)
def compile_rebase(config: ModelConfig, shape: Shape, dtype: Any, mesh: jax.sharding.Mesh | None = None) -> Any:
    """`cache.rebase`, compiled: cache, int32 [B] → cache."""
    step = lambda cache, distance: kv.rebase(config.decoder, cache, shape.sinks, distance)
    places = None if mesh is None else cache_shardings(config, shape, mesh)
    distance = jax.ShapeDtypeStruct((shape.batch,), jnp.int32)
    cache = _abstract_cache(config, shape, dtype, mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=places).lower(cache, distance).compile()


def cache_shardings(config: ModelConfig, shape: Shape, mesh: jax.sharding.Mesh) -> Any:
    """Where a cache lies on a mesh: keys and values by their heads, the rest on every device."""
    heads = cache_sharding(config.decoder, shape.batch, mesh)
    layers = (kv.Int8(heads, heads) if shape.int8 else heads,) * config.decoder.num_layers  # type: ignore[arg-type]
    return kv.Cache(layers, layers, replicated(mesh))  # type: ignore[arg-type]


def fresh_cache(config: ModelConfig, shape: Shape, dtype: Any, mesh: jax.sharding.Mesh | None) -> kv.Cache:
    """An empty cache, on the mesh or on the default device."""
    make = functools.partial(_empty_cache, config, shape, dtype)
    return make() if mesh is None else jax.jit(make, out_shardings=cache_shardings(config, shape, mesh))()
