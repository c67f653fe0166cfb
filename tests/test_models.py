"""The network: streaming equals batch, positions, attention, the cache, the vision tower."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jstream.config import DecoderConfig, ModelConfig, SiglipConfig
from jstream.models import rope
from jstream.models.attention import attend, position_mask
from jstream.models.cache import EMPTY, CacheFullError, View, empty_cache, require_room, to_int8
from jstream.models.layers import MLP, RMSNorm, SwiGLU
from jstream.models.siglip import Siglip, pooling_matrix
from jstream.models.tiled_attention import _over_tiles, attend_live, attend_tiled
from jstream.models.video_lm import VideoLM, abstract_params, stack_frames

PLAIN = ModelConfig(
    SiglipConfig(
        image_size=24, patch_size=8, width=16, num_layers=1, num_heads=2, mlp_dim=32, grid=2, stem_width=8,
        temporal_patch_size=2, token_positions=True,
    ),
    DecoderConfig(
        vocab_size=37, width=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=48, rope_theta=100.0,
        qkv_bias=False, tie_embeddings=True,
    ),
)  # fmt: skip
MULTIMODAL = ModelConfig(
    dataclasses.replace(PLAIN.vision, grid=3, pooled_token=False, stem_width=0, temporal_patch_size=1),
    dataclasses.replace(
        PLAIN.decoder,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        qkv_bias=True,
        tie_embeddings=False,
        mrope_section=(2, 3, 3),
    ),
)
MODELS = pytest.mark.parametrize("config", [PLAIN, MULTIMODAL], ids=["plain", "multimodal"])


def loud_params(config, seed=0):
    """Random params in which everything matters, biases and norms too; fresh ones are too quiet to tell errors by."""
    leaves, tree = jax.tree.flatten(abstract_params(config))
    rng = np.random.default_rng(seed)
    scale = lambda leaf: 1.0 if leaf.ndim == 1 else leaf.shape[0] ** -0.5
    made = [jnp.asarray(0.3 + rng.normal(0, scale(leaf), leaf.shape), jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, [m - 0.3 * (m.ndim > 1) for m in made])


@dataclasses.dataclass
class Stream:
    """A random stream: chunks of text and whole frames, and the arrays of one forward over all of it."""

    chunks: list[slice]
    tokens: np.ndarray
    is_frame: np.ndarray
    images: np.ndarray
    rope_positions: np.ndarray


def random_stream(config, seed, turns=6):
    rng = np.random.default_rng(seed)
    v = config.vision
    is_frame, chunks = [], []
    for turn in range(turns):
        start = len(is_frame)
        is_frame += [False] * int(rng.integers(1, 6))
        if turn != 2:  # one chunk of text alone
            is_frame += [True] * v.tokens_per_frame * (2 if turn == 4 else 1)  # and one of two frames
        is_frame += [False] * int(rng.integers(0, 4))
        chunks.append(slice(start, len(is_frame)))
    is_frame = np.array(is_frame)
    num_frames = is_frame.sum() // v.tokens_per_frame
    frames = rng.integers(0, 256, (1, num_frames, v.image_size, v.image_size, 3), np.uint8)
    first = np.arange(num_frames)[None] == 0
    images = np.asarray(stack_frames(frames, first, v.temporal_patch_size))[0]
    positions, _ = rope.rope_positions(is_frame, (v.grid, v.grid), bool(config.decoder.mrope_section))
    return Stream(chunks, rng.integers(0, config.decoder.vocab_size, len(is_frame)), is_frame, images, positions)


@functools.partial(jax.jit, static_argnames="config")
def embed(params, images, tokens, is_frame, *, config):
    """[1, T, D] of a stream, its frames in place."""
    run = functools.partial(VideoLM(config).apply, {"params": params})
    frame_tokens = run(images, method="embed_frames").reshape(1, -1, config.decoder.width)
    return run(tokens[None], is_frame[None], frame_tokens, method="embed_tokens")


@functools.partial(jax.jit, static_argnames="config")
def forward(params, embeds, positions, rope_positions, segments=None, cache=None, view=None, *, config):
    run = functools.partial(VideoLM(config).apply, {"params": params})
    hidden, cache = run(embeds, positions, rope_positions, segments, cache, view, method="hidden")
    return run(hidden, method="logits"), cache


def at(*places):
    """The view of streams that have so many tokens, one behind the other from the first slot on."""
    places = jnp.asarray(places, jnp.int32)
    return View(places, places, jnp.zeros_like(places))


def whole_forward(params, config, stream):
    embeds = embed(params, stream.images, stream.tokens, stream.is_frame, config=config)
    positions = np.arange(len(stream.tokens), dtype=np.int32)[None]
    return embeds, forward(params, embeds, positions, stream.rope_positions[:, None], config=config)[0]


def padded(array, length, value, axis):
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, length - array.shape[axis])
    return np.pad(np.asarray(array), widths, constant_values=value)


# ---------------------------------------------------------------------------------------------- streaming equals batch


@pytest.mark.smoke
@MODELS
def test_streaming_equals_one_full_forward(config):
    params, stream = loud_params(config), random_stream(config, seed=1)
    embeds, expected = whole_forward(params, config, stream)
    v, multimodal = config.vision, bool(config.decoder.mrope_section)
    length = 24  # one padded chunk length: nothing compiles twice
    cache = empty_cache(config.decoder, batch=1, slots=len(stream.tokens) + length)
    got, used, place, frames_seen = [], 0, 0, 0
    for chunk in stream.chunks:
        is_frame = stream.is_frame[chunk]
        rope_positions, place = rope.rope_positions(is_frame, (v.grid, v.grid), multimodal, place)
        np.testing.assert_array_equal(rope_positions, stream.rope_positions[:, chunk])
        # the live stream sees only the frames of its chunk
        count = is_frame.sum() // v.tokens_per_frame
        images = stream.images[frames_seen : frames_seen + max(count, 1)]
        frames_seen += count
        new = len(is_frame)
        tokens, is_frame = padded(stream.tokens[chunk], length, 7, 0), padded(is_frame, length, False, 0)
        live = embed(params, images, tokens, is_frame, config=config)
        np.testing.assert_allclose(live[:, :new], embeds[:, chunk], atol=1e-4)
        positions = padded(np.arange(used, used + new, dtype=np.int32)[None], length, EMPTY, 1)
        require_room(used, length, cache.slots)
        rope_positions = padded(rope_positions, length, 0, 1)[:, None]
        logits, cache = forward(params, live, positions, rope_positions, None, cache, at(used), config=config)
        got.append(logits[:, :new])
        used += new
        assert int((cache.positions != EMPTY).sum()) == used
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(np.concatenate(got, axis=1), expected, atol=1e-4)


@MODELS
def test_a_token_is_seen_by_what_follows_and_by_nothing_before(config):
    params, stream = loud_params(config), random_stream(config, seed=2)
    _, expected = whole_forward(params, config, stream)
    at = int(np.flatnonzero(~stream.is_frame)[5])
    tokens = stream.tokens.copy()
    tokens[at] = (tokens[at] + 1) % config.decoder.vocab_size
    _, changed = whole_forward(params, config, dataclasses.replace(stream, tokens=tokens))
    difference = np.abs(np.asarray(changed - expected)).max(axis=(0, 2))
    assert difference[:at].max() == 0 and difference[at:].min() > 1e-4
    ids = stream.tokens.copy()
    ids[stream.is_frame] = 3  # the id at a placeholder does not matter
    np.testing.assert_array_equal(whole_forward(params, config, dataclasses.replace(stream, tokens=ids))[1], expected)


@MODELS
def test_packed_dialogues_do_not_see_each_other(config):
    params = loud_params(config)
    streams = [random_stream(config, seed, turns=3) for seed in (3, 4)]
    alone = [whole_forward(params, config, stream) for stream in streams]
    padding = 5
    lengths = [len(stream.tokens) for stream in streams]
    embeds = jnp.concatenate([*(e for e, _ in alone), jnp.ones((1, padding, config.decoder.width))], axis=1)
    positions = np.concatenate([*map(np.arange, lengths), np.full(padding, EMPTY)])[None].astype(np.int32)
    places = [*(stream.rope_positions for stream in streams), np.zeros((3, padding), np.int32)]
    rope_positions = np.concatenate(places, axis=1)[:, None]
    segments = np.repeat([0, 1, EMPTY], [*lengths, padding])[None].astype(np.int32)
    together, cache = forward(params, embeds, positions, rope_positions, segments, config=config)
    assert cache is None and np.isfinite(together).all()
    for (_, expected), start in zip(alone, (0, lengths[0]), strict=True):
        np.testing.assert_allclose(together[:, start : start + expected.shape[1]], expected, atol=1e-4)


def test_frame_tokens_of_each_row_take_their_places_in_order():
    model, config = VideoLM(MULTIMODAL), MULTIMODAL
    params = loud_params(config)
    tokens = jnp.arange(12).reshape(2, 6)
    is_frame = jnp.array([[0, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0, 1]], bool)
    frame_tokens = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, config.decoder.width)), jnp.float32)
    out = model.apply({"params": params}, tokens, is_frame, frame_tokens, method="embed_tokens")
    words = params["decoder"]["embed_tokens"]["embedding"][tokens]
    expected = np.array(words)
    expected[0, [1, 2, 4]] = frame_tokens[0, :3]
    expected[1, [0, 5]] = frame_tokens[1, :2]
    np.testing.assert_array_equal(out, expected)


# ------------------------------------------------------------------------------------------------------------ the cache


def test_a_full_cache_is_an_error_not_an_overwrite():
    require_room(10, 6, 16)
    with pytest.raises(CacheFullError, match="holds 16 tokens and 10 are used: 7 more do not fit"):
        require_room(10, 7, 16)
    params, cache = loud_params(PLAIN), empty_cache(PLAIN.decoder, 1, 8)
    embeds, positions = jnp.ones((1, 8, 32)), jnp.arange(8, dtype=jnp.int32)[None]
    rope_positions = jnp.broadcast_to(positions, (3, 1, 8))
    _, cache = forward(params, embeds, positions, rope_positions, None, cache, at(0), config=PLAIN)
    np.testing.assert_array_equal(cache.positions[0], np.arange(8))
    with pytest.raises(CacheFullError):
        require_room(8, 1, cache.slots)


def test_an_empty_cache_has_the_shapes_of_its_decoder():
    cache = empty_cache(PLAIN.decoder, batch=2, slots=10, dtype=jnp.bfloat16)
    assert len(cache.keys) == len(cache.values) == 3 and cache.slots == 10
    assert {(x.shape, x.dtype) for x in (*cache.keys, *cache.values)} == {((2, 2, 10, 16), jnp.dtype(jnp.bfloat16))}
    assert (cache.positions == EMPTY).all()


def test_a_step_takes_the_cache_over_and_is_traced_once():
    params, traces, length = loud_params(PLAIN), [], 4

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache, params, embeds, start, tokens):
        traces.append(1)
        positions = jnp.where(jnp.arange(length) < tokens, start + jnp.arange(length), EMPTY)[None]
        run = functools.partial(VideoLM(PLAIN).apply, {"params": params})
        hidden, cache = run(
            embeds, positions, jnp.broadcast_to(positions, (3, 1, length)), None, cache, at(start), method="hidden"
        )
        return cache, run(hidden, method="logits")

    cache = empty_cache(PLAIN.decoder, 1, 256)
    arguments = (jnp.ones((1, length, 32)), jnp.int32(0), jnp.int32(3))
    compiled = step.lower(cache, params, *arguments).compile()
    size = sum(x.nbytes for x in jax.tree.leaves(cache))
    assert compiled.memory_analysis().alias_size_in_bytes >= size
    used = 0
    for tokens in (3, 4, 1, 2, 4, 3):
        old = cache
        cache, _ = step(cache, params, arguments[0], jnp.int32(used), jnp.int32(tokens))
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
        used += tokens
    assert len(traces) == 1
    kept = np.array(cache.positions[0])
    np.testing.assert_array_equal(kept[:used], np.arange(used))
    assert (kept[used:] == EMPTY).all()


# ------------------------------------------------------------------------------------------------------------ attention


def test_attention_is_the_one_written_out_in_numpy():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, t, n, 8)) for t, n in ((3, 6), (5, 2), (5, 2)))
    mask = rng.random((2, 3, 5)) < 0.6
    mask[..., 0] = True
    out = attend(*(jnp.asarray(x, jnp.float32) for x in (q, k.swapaxes(1, 2), v.swapaxes(1, 2))), jnp.asarray(mask))
    for b in range(2):
        for n in range(6):
            scores = np.where(mask[b], q[b, :, n] @ k[b, :, n // 3].T / np.sqrt(8), -np.inf)
            probs = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
            np.testing.assert_allclose(out[b, :, n], probs @ v[b, :, n // 3], atol=1e-5)


def test_masks_go_by_position_and_segment_whatever_the_slot():
    queries, keys = jnp.array([[5, 6, EMPTY]]), jnp.array([[6, EMPTY, 0, 7, 5]])
    expected = [[0, 0, 1, 0, 1], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(position_mask(queries, keys)[0], np.array(expected, bool))
    segments = jnp.array([[0, 1, 1]]), jnp.array([[1, 1, 1, 0, 0]])
    expected = [[0, 0, 0, 0, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(position_mask(queries, keys, *segments)[0], np.array(expected, bool))


LAYOUTS = {  # lengths of the dialogues of each row; what is left of its 23 tokens is padding
    "one dialogue": ([23], [23]),
    "several": ([9, 10], [3, 4, 5, 11]),
    "a row of padding": ([], [20]),
}


@pytest.mark.parametrize("block", [5, 8, 256])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_attention_by_tiles_is_attention_under_the_full_mask(layout, dtype, block):
    rng = np.random.default_rng(1)
    length = 23
    q, k, v = (jnp.asarray(rng.normal(size=(2, length, n, 8)), dtype) for n in (4, 2, 2))
    positions, segments = np.full((2, 2, length), EMPTY, np.int32)
    for row, dialogues in enumerate(layout):
        whole = np.arange(sum(dialogues))
        segments[row, whole] = np.repeat(np.arange(len(dialogues)), dialogues)
        positions[row, whole] = whole
    weights = jnp.asarray(rng.normal(size=q.shape), jnp.float32) * (positions != EMPTY)[..., None, None]

    @functools.partial(jax.jit, static_argnums=0)
    def both(attention, *qkv):
        loss = lambda *qkv: jnp.sum(attention(*qkv) * weights)
        return attention(*qkv) * weights, *jax.grad(loss, argnums=(0, 1, 2))(*qkv)

    # compared with f32, whatever the dtype, as the reference also rounds
    expected = both(
        lambda q, k, v: attend(
            q, k.swapaxes(1, 2), v.swapaxes(1, 2), position_mask(positions, positions, segments, segments)
        ),
        *(x.astype(jnp.float32) for x in (q, k, v)),
    )
    for got, want in zip(both(lambda *qkv: attend_tiled(*qkv, segments, block), q, k, v), expected, strict=True):
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=1e-5 if dtype == jnp.float32 else 5e-2)


def test_tiles_with_nothing_to_see_are_not_visited():
    visited = lambda segments: _over_tiles(jnp.asarray(segments)[:, None], lambda i, j, state: state + 1, 0)
    assert visited([[0, 0], [0, 0], [0, 0]]) == 6
    assert visited([[0, 0], [0, 1], [1, 1]]) == 5  # the last block does not see the first
    assert visited([[0, 0], [1, 1], [EMPTY, EMPTY]]) == 2


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("block", [4, 7, 256])
@pytest.mark.parametrize("queries", [1, 5])
def test_attention_to_what_is_live_is_attention_to_the_whole_cache(queries, block, sinks):
    rng = np.random.default_rng(2)
    slots, used = 23, np.array([9, 16, 0])  # the last stream is idle
    q, of_sinks = (jnp.asarray(rng.normal(size=(3, queries, 4, 8)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(3, 2, slots, 8)), jnp.float32) for _ in range(2))
    sees = (np.arange(slots) < used[:, None, None]) & (rng.random((3, queries, slots)) < 0.5)
    sees[:2, :, 0] = True
    extra = (of_sinks, sinks) if sinks else ()
    want = attend(q, k, v, jnp.asarray(sees), *extra)[:2]
    if block == 4:  # what lies behind is not even read, or it would spoil the sums
        v = v.at[:, :, used.max() :].set(jnp.nan)
    got = jax.jit(lambda *qkv: attend_live(*qkv, jnp.asarray(sees), *extra, block=block))(q, k, v)
    np.testing.assert_allclose(got[:2], want, atol=1e-6)


@pytest.mark.parametrize("sinks", [0, 3])
def test_attention_to_int8_is_attention_to_what_it_stands_for(sinks):
    rng = np.random.default_rng(3)
    q, of_sinks = (jnp.asarray(rng.normal(size=(2, 5, 4, 8)), jnp.float32) for _ in range(2))
    # tokens of very different size, and one of zeros
    sizes = 10.0 ** rng.integers(-3, 3, (2, 2, 2, 23, 1)) * (np.arange(23) != 4)[:, None]
    k, v = (jnp.asarray(rng.normal(size=(2, 2, 23, 8)) * size, jnp.float32) for size in sizes)
    mask = jnp.asarray(rng.random((2, 5, 23)) < 0.7).at[:, :, 0].set(True)
    extra = (of_sinks, sinks) if sinks else ()
    small = [to_int8(x) for x in (k, v)]
    back = [x.values * x.scales[..., None] for x in small]
    for x, rounded in zip((k, v), back):
        assert (jnp.abs(x - rounded) <= 0.5001 * jnp.abs(x).max(-1, keepdims=True) / 127).all()
    want = attend(q, *back, mask, *extra)
    for attention in (attend, functools.partial(attend_live, block=7)):
        np.testing.assert_allclose(
            attention(q, *small, mask, *extra), want, rtol=2e-5, atol=1e-5 * float(jnp.abs(v).max())
        )


# ------------------------------------------------------------------------------------------------------------ positions


def test_rotary_positions_turn_pairs_like_complex_numbers():
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(2, 5, 3, 16)), rng.integers(0, 3000, (2, 5))
    angles = rope.rotary_angles(jnp.broadcast_to(positions, (3, 2, 5)), 16, 10_000.0)
    out = rope.rotate(jnp.asarray(x, jnp.float32), angles)
    turn = np.exp(1j * positions[..., None] * 10_000.0 ** (-np.arange(8) / 8))[:, :, None]
    expected = (x[..., :8] + 1j * x[..., 8:]) * turn
    np.testing.assert_allclose(out, np.concatenate([expected.real, expected.imag], axis=-1), atol=2e-3)
    near = positions < 50
    np.testing.assert_allclose(out[near], np.concatenate([expected.real, expected.imag], axis=-1)[near], atol=1e-5)


def test_a_rotated_product_depends_on_the_distance_alone():
    q, k = (jnp.asarray(np.random.default_rng(s).normal(size=(1, 1, 1, 16)), jnp.float32) for s in (0, 1))
    at = lambda x, p: rope.rotate(x, rope.rotary_angles(jnp.full((3, 1, 1), p), 16, 100.0))
    near, far = (jnp.sum(at(q, p + 7) * at(k, p)) for p in (0, 500))
    np.testing.assert_allclose(near, far, atol=1e-4)
    assert abs(float(near - jnp.sum(at(q, 8) * at(k, 0)))) > 1e-2


def test_multimodal_positions_turn_their_own_pairs():
    rng = np.random.default_rng(0)
    positions, sections = rng.integers(0, 40, (3, 2, 5)), (2, 3, 3)
    angles = rope.rotary_angles(jnp.asarray(positions), 16, 1e6, sections)
    frequencies = 1e6 ** (-np.arange(8) / 8)
    for pair, axis in enumerate([0, 0, 1, 1, 1, 2, 2, 2]):
        np.testing.assert_allclose(angles[..., pair], positions[axis] * frequencies[pair], rtol=1e-5)
    text = jnp.broadcast_to(positions[0], (3, 2, 5))
    np.testing.assert_allclose(
        rope.rotary_angles(text, 16, 1e6, sections), rope.rotary_angles(text, 16, 1e6), rtol=1e-6
    )


def test_a_frame_stands_at_one_time_with_rows_and_columns():
    is_frame = np.array([0, 0] + [1] * 6 + [0] + [1] * 12 + [0], bool)
    positions, after = rope.rope_positions(is_frame, (2, 3), multimodal=True, start=10)
    t = [10, 11] + [12] * 6 + [15] + [16] * 6 + [19] * 6 + [22]
    h = [10, 11, 12, 12, 12, 13, 13, 13, 15, 16, 16, 16, 17, 17, 17, 19, 19, 19, 20, 20, 20, 22]
    w = [10, 11, 12, 13, 14, 12, 13, 14, 15, 16, 17, 18, 16, 17, 18, 19, 20, 21, 19, 20, 21, 22]
    np.testing.assert_array_equal(positions, [t, h, w])
    assert positions.dtype == np.int32 and after == 23


def test_plain_positions_count_every_token():
    positions, after = rope.rope_positions(np.array([0, 1, 1, 0], bool), (1, 2), multimodal=False, start=5)
    np.testing.assert_array_equal(positions, [[5, 6, 7, 8]] * 3)
    assert after == 9


@pytest.mark.parametrize("multimodal", [False, True])
def test_positions_of_chunks_are_those_of_the_whole(multimodal):
    stream = random_stream(MULTIMODAL, seed=5, turns=8)
    whole, end = rope.rope_positions(stream.is_frame, (3, 3), multimodal)
    parts, place = [], 0
    for chunk in stream.chunks:
        part, place = rope.rope_positions(stream.is_frame[chunk], (3, 3), multimodal, place)
        parts.append(part)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    assert place == end


# ------------------------------------------------------------------------------------------------------- small modules


def test_the_norm_is_the_root_mean_square():
    x, scale = np.random.default_rng(0).normal(3, 2, (4, 8)), np.arange(8.0)
    out = RMSNorm(1e-2).apply({"params": {"scale": jnp.asarray(scale)}}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(out, x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-2) * scale, rtol=1e-5)
    large = RMSNorm().apply({"params": {"scale": jnp.ones(8)}}, jnp.full((1, 8), 6e4, jnp.float16))
    assert large.dtype == jnp.float16 and (large == 1).all()  # squared in f32


def test_the_feed_forward_is_gated_by_silu():
    rng = np.random.default_rng(0)
    x, gate, up, down = (rng.normal(size=s) for s in ((3, 4), (4, 6), (4, 6), (6, 4)))
    params = {f"{name}_proj": {"kernel": jnp.asarray(w)} for name, w in (("gate", gate), ("up", up), ("down", down))}
    out = SwiGLU(6).apply({"params": params}, jnp.asarray(x))
    silu = (x @ gate) / (1 + np.exp(-(x @ gate)))
    np.testing.assert_allclose(out, (silu * (x @ up)) @ down, rtol=1e-4, atol=1e-5)


def test_gelu_comes_in_its_exact_and_its_tanh_form():
    x = np.linspace(-4, 4, 33)[:, None]
    identity = {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}
    run = lambda approximate: MLP(1, 1, approximate).apply(
        {"params": {"fc1": identity, "fc2": identity}}, jnp.asarray(x)
    )
    exact = x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    tanh = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(run(False), exact, atol=1e-6)
    np.testing.assert_allclose(run(True), tanh, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- vision tower


def test_pooling_windows_are_those_of_torch():
    eighth = np.kron(np.eye(3), np.full((1, 8), 1 / 8))
    np.testing.assert_allclose(pooling_matrix(24, 3), eighth)
    np.testing.assert_allclose(pooling_matrix(5, 3), np.array([[3, 3, 0, 0, 0], [0, 2, 2, 2, 0], [0, 0, 0, 3, 3]]) / 6)
    np.testing.assert_allclose(pooling_matrix(7, 2), np.array([[1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1]]) / 4)
    np.testing.assert_allclose(pooling_matrix(4, 4), np.eye(4))


@pytest.mark.parametrize(("grid", "pooled", "tokens"), [(2, True, 5), (3, False, 9), (1, True, 2), (0, True, 1)])
def test_a_frame_gives_as_many_tokens_as_its_config_says(grid, pooled, tokens):
    config = dataclasses.replace(PLAIN.vision, grid=grid, pooled_token=pooled)
    made = jax.eval_shape(
        Siglip(config).init_with_output, jax.random.key(0), jax.ShapeDtypeStruct((3, 24, 24, 6), jnp.uint8)
    )
    assert made[0].shape == (3, tokens, 16) and config.tokens_per_frame == tokens
    assert ("head" in made[1]["params"]) == pooled


def test_the_pooled_token_comes_first_and_the_grid_is_read_row_by_row():
    config = dataclasses.replace(MULTIMODAL.vision, pooled_token=True, num_layers=0)
    params = loud_params(dataclasses.replace(MULTIMODAL, vision=config))["vision"]
    images = np.random.default_rng(0).integers(0, 256, (1, 24, 24, 3), np.uint8)
    run = jax.jit(Siglip(config).apply)
    out = run({"params": params}, images)
    for cell in range(9):  # with no layers a patch is seen by its own token and the pooled one alone
        other = images.copy()
        row, column = divmod(cell, 3)
        other[0, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] //= 2
        changed = np.abs(np.asarray(run({"params": params}, other) - out)).max(axis=2)[0] > 1e-5
        assert np.flatnonzero(changed).tolist() == [0, 1 + cell]


def test_every_frame_is_stacked_behind_the_one_before_it():
    frames = jnp.arange(2 * 4, dtype=jnp.uint8).reshape(2, 4, 1, 1, 1) * jnp.ones((1, 1, 2, 2, 3), jnp.uint8)
    first = jnp.array([[True, False, True, False], [True, False, False, False]])
    out = stack_frames(frames, first, 2)
    assert out.shape == (2, 4, 2, 2, 6) and out.dtype == jnp.uint8
    np.testing.assert_array_equal(out[..., 0, 0, 0], [[0, 0, 2, 2], [4, 4, 5, 6]])  # before
    np.testing.assert_array_equal(out[..., 0, 0, 3:], np.repeat(np.arange(8).reshape(2, 4, 1), 3, axis=2))
    assert stack_frames(frames, first, 1) is frames


def test_params_hold_what_the_config_asks_for():
    fresh = abstract_params(PLAIN)
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype(jnp.float32)}
    assert set(fresh) == {"vision", "projector", "decoder"} and "lm_head" not in fresh["decoder"]
    assert "lm_head" in abstract_params(MULTIMODAL)["decoder"]
    bias = lambda config: "bias" in abstract_params(config)["decoder"]["layers_0"]["self_attn"]["q_proj"]
    assert not bias(PLAIN) and bias(MULTIMODAL)
