"""Kernels of accelerators against the reference, interpreted: GQA, masks by position, ragged lengths, two dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jstream.models import attention, kernels
from jstream.models.cache import EMPTY, Cache, View, write, write_positions

CLOSE = {jnp.float32: 2e-6, jnp.bfloat16: 2e-2}


def normal(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("tokens", [1, 70, 144])
def test_splash_over_a_cache_is_the_reference(tokens, dtype, monkeypatch):
    """Three streams: one has forgotten its beginning, one goes back by a few tokens, one is new; chunks are padded."""
    monkeypatch.setattr(kernels, "splash_cache", functools.partial(kernels.splash_cache, interpret=True))
    rng = np.random.default_rng(0)
    slots, used = 512, np.array([300, 40, 0])
    positions = np.where(np.arange(slots) < used[:, None], np.arange(slots), EMPTY)
    layer = tuple(normal(rng, 3, 2, slots, 128, dtype=dtype) for _ in range(2))
    cache = Cache((layer[0],), (layer[1],), jnp.asarray(positions, jnp.int32))
    at = jnp.asarray([300, 35, 0])
    view = View(at, at, jnp.asarray([120, 0, 0]))
    count = np.array([tokens, max(tokens - 3, 1), tokens])[:, None]
    new = np.where(np.arange(tokens) < count, np.asarray(at)[:, None] + np.arange(tokens), EMPTY)
    cache = write_positions(cache, view, jnp.asarray(new, jnp.int32))
    cache = write(cache, view, 0, *(normal(rng, 3, tokens, 2, 128, dtype=dtype) for _ in range(2)))
    q = normal(rng, 3, tokens, 6, 128, dtype=dtype)
    seen = lambda how: jax.jit(lambda q: attention.attend_cache(q, jnp.asarray(new), cache, view, 0, None, how))(q)
    real = np.arange(tokens) < count
    got, want = (np.asarray(seen(how).astype(jnp.float32))[real] for how in ("splash", "xla"))
    assert np.ptp(want) > 0.1
    np.testing.assert_allclose(got, want, atol=CLOSE[dtype])


@pytest.mark.parametrize("dtype", CLOSE)
def test_splash_over_packed_rows_is_the_reference(dtype):
    rng = np.random.default_rng(1)
    segments = jnp.asarray(np.repeat([[0, 1, 2, EMPTY], [0, 0, 1, 1]], 50, axis=1), jnp.int32)
    q, k, v = normal(rng, 2, 200, 6, 128, dtype=dtype), *(normal(rng, 2, 200, 2, 128, dtype=dtype) for _ in range(2))
    got = kernels.splash_packed(q, k, v, segments, interpret=True)
    at = jnp.broadcast_to(jnp.arange(200), (2, 200))
    mask = attention.position_mask(at, jnp.where(segments == EMPTY, EMPTY, at), segments, segments)
    want = attention.attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
    real = np.asarray(segments != EMPTY)
    close = dict(atol=CLOSE[dtype])
    np.testing.assert_allclose(*(np.asarray(x.astype(jnp.float32))[real] for x in (got, want)), **close)


def test_a_kernel_is_taken_where_it_can_be_and_is_worth_it():
    choose = attention.implementation_for_cache
    assert choose("gpu", 128, jnp.bfloat16, 144, 8192) == "cudnn"
    assert choose("tpu", 128, jnp.bfloat16, 144, 8192) == "splash"
    assert choose("tpu", 128, jnp.bfloat16, 144, 8200) == "xla"  # no whole lanes
    assert choose("gpu", 128, jnp.float32, 144, 8192) == choose("gpu", 128, jnp.bfloat16, 11, 8192) == "xla"
    assert choose("cpu", 128, jnp.bfloat16, 144, 8192) == choose("tpu", 80, jnp.bfloat16, 144, 8192) == "xla"
