"""The steps of a live stream as pure functions of (params, state, inputs), and their compiled programs.

    image → vision tower → projector ─┐
    chunk of tokens ──────────────────┴→ decoder against the cache → scores of the decision, or the next token

The state is donated. A step is compiled ahead for a static chunk length, so that a stream never waits for the compiler.
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
from jstream.sharding import cache_sharding, param_shardings, replicated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamState:
    """What a step takes, donates and returns.

    Attributes:
        cache: everything the decoder has seen.
        last_image: uint8 [1, H, W, 3]: the newest frame that `step_frame` saw, for patches that see two.
    """

    cache: kv.Cache
    last_image: jax.Array


def fresh_state(
    config: ModelConfig, capacity: int, dtype: jnp.dtype = jnp.float32, mesh: jax.sharding.Mesh | None = None
) -> StreamState:
    """The state before the first frame, with room for `capacity` tokens, on the mesh or on the default device."""

    def make() -> StreamState:
        last_image = jnp.zeros((1, *config.vision.frame_size, 3), jnp.uint8)
        return StreamState(kv.empty_cache(config.decoder, 1, capacity, dtype), last_image)

    return make() if mesh is None else jax.jit(make, out_shardings=state_shardings(config, mesh))()


def state_shardings(config: ModelConfig, mesh: jax.sharding.Mesh) -> Any:
    """Where a state lies on a mesh: keys and values by their heads, the rest on every device."""
    heads, whole = cache_sharding(config.decoder, 1, mesh), replicated(mesh)
    layers = (heads,) * config.decoder.num_layers
    cache: Any = kv.Cache(layers, layers, whole, whole)  # type: ignore[arg-type]
    return StreamState(cache, whole)  # type: ignore[arg-type]


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


def embed_image(config: ModelConfig, params: Any, before: jax.Array, image: jax.Array) -> jax.Array:
    """Vision tower and projector.

    Args:
        before, image: uint8 [1, H, W, 3]: a frame and the one before it, which is itself where it opens the stream.

    Returns:
        Frame tokens [1, M, E].
    """
    clip = image
    if config.vision.num_images == 2:
        clip = jnp.concatenate([before, image], axis=-1)
    return run(config, params, clip, method="embed_frames")


def step_turn(
    config: ModelConfig,
    scores: Callable[[jax.Array], jax.Array],
    frame_id: int,
    params: Any,
    state: StreamState,
    tokens: jax.Array,
    count: jax.Array,
    rope: jax.Array,
    frame_tokens: jax.Array,
) -> tuple[StreamState, jax.Array]:
    """A turn up to its decision, one forward, from its frame tokens [1, M, E].

    Returns:
        The next state and the protocol's scores of the decision, a few f32.
    """
    cache, logits = forward_chunk(config, params, state.cache, tokens, count, rope, tokens == frame_id, frame_tokens)
    return dataclasses.replace(state, cache=cache), scores(logits)


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
    """A turn up to its decision from its image: vision tower, projector and one forward.

    Args:
        image: uint8 [1, H, W, 3].
        first: bool []: whether it opens the stream.

    Returns:
        As `step_turn`.
    """
    frame_tokens = embed_image(config, params, jnp.where(first, image, state.last_image), image)
    state, decision = step_turn(config, scores, frame_id, params, state, tokens, count, rope, frame_tokens)
    return dataclasses.replace(state, last_image=image), decision


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
    mesh: jax.sharding.Mesh | None,
) -> Any:
    """The compiled step of a kind (`frame`, `turn` or `text`) and chunk length; sessions of one shape share it.

    It takes the params, the state, which is donated, and what the step of that name takes behind them. The kind `embed`
    is `embed_image`, whatever the length. The mesh may be one of devices that are not here.
    """
    abstract = jax.ShapeDtypeStruct
    params = abstract_params(config, dtype)
    state = jax.eval_shape(lambda: fresh_state(config, capacity, dtype))
    placed: dict[str, Any] = {}
    if mesh is not None:
        of_state = state_shardings(config, mesh)
        put = lambda x, sharding: abstract(x.shape, x.dtype, sharding=sharding)
        params = jax.tree.map(put, params, param_shardings(config.decoder, params, mesh))
        state = jax.tree.map(put, state, of_state)
        placed = {"out_shardings": (of_state, replicated(mesh))}
    image = abstract((1, *config.vision.frame_size, 3), jnp.uint8)
    embed = functools.partial(embed_image, config)
    whole = None if mesh is None else replicated(mesh)
    if kind == "embed":
        return jax.jit(embed, out_shardings=whole).lower(params, image, image).compile()
    chunk = (abstract((1, bucket), jnp.int32), abstract((), jnp.int32), abstract((3, 1, bucket), jnp.int32))
    if kind == "frame":
        step = functools.partial(step_frame, config, scores, frame_id)
        rest = (image, abstract((), jnp.bool_))
    elif kind == "turn":
        step = functools.partial(step_turn, config, scores, frame_id)
        frame_tokens = jax.eval_shape(embed, params, image, image)
        rest = (abstract(frame_tokens.shape, frame_tokens.dtype, sharding=whole),)
    else:
        step = functools.partial(step_text, config, unspoken_ids)
        rest = (abstract((), jnp.float32), jax.eval_shape(lambda: jax.random.key(0)))
    return jax.jit(step, donate_argnums=1, **placed).lower(params, state, *chunk, *rest).compile()
