"""Models shared by several devices: every param has its rule, and nothing but the place of things changes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_configs import published
from test_published import CHAT_TOKENS, TEXTS, publish
from test_session import frames, make_model

from jstream.config import ConfigError
from jstream.model import Model
from jstream.models.video_lm import abstract_params
from jstream.protocols.tokenizer import train_tokenizer
from jstream.sharding import cache_sharding, make_mesh, param_shardings, rules_for
from jstream.streaming.session import Session
from jstream.streaming.step import compile_step
from jstream.weights.checkpoint import CheckpointError, load_model, save_model
from jstream.weights.int8 import to_int8
from jstream.weights.published import load

ALL = [
    ("streamo", "3b"),
    ("streamo", "7b"),
    ("streamo", "4b"),
    ("joyai", None),
    ("videollm_online", None),
    ("tiny", None),
]


@pytest.mark.parametrize(("name", "size"), ALL)
def test_every_param_has_exactly_one_rule(name, size):
    params = abstract_params(published(name, size).model)
    paths = [
        jax.tree_util.keystr(key, simple=True, separator="/") for key, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    assert {path: len(rules_for(path)) for path in paths} == dict.fromkeys(paths, 1)


@pytest.mark.parametrize(("name", "size"), ALL[:5])
def test_four_devices_hold_about_a_fourth_each(name, size):
    model = published(name, size).model
    mesh = make_mesh(tensor=4)
    params = abstract_params(model)
    places = param_shardings(model.decoder, params, mesh)
    held = jax.tree.map(lambda leaf, place: math.prod(place.shard_shape(leaf.shape)), params, places)
    whole = sum(leaf.size for leaf in jax.tree.leaves(params["decoder"]))
    assert sum(jax.tree.leaves(held["decoder"])) < 0.28 * whole
    assert jax.tree.leaves(held["vision"]) == [leaf.size for leaf in jax.tree.leaves(params["vision"])]
    # key-value heads are shared out where there are enough of them, whole everywhere else
    heads = cache_sharding(model.decoder, 1, mesh).shard_shape((1, model.decoder.num_kv_heads, 8, 128))[1]
    assert heads == {2: 2, 4: 1, 8: 2}[model.decoder.num_kv_heads]


@pytest.mark.parametrize("memory", ["append", "reprefill:3"])
def test_a_session_on_a_mesh_sees_and_says_the_same(memory):
    model = make_model((1, 1, 2))
    mesh = make_mesh(tensor=2)
    places = param_shardings(model.config.decoder, model.params, mesh)
    shared = dataclasses.replace(model, params=jax.device_put(model.params, places))
    assert model.mesh is None and shared.mesh == mesh
    sessions = [Session(m, memory, capacity=512, max_new_tokens=5, threshold=0.3) for m in (model, shared)]
    for session in sessions:
        session.ask("What is it?")
    compiled, spoken = compile_step.cache_info().misses, 0
    for frame in frames(10):
        one, two = (session.see(frame) for session in sessions)
        assert (one.state, one.text) == (two.state, two.text)
        np.testing.assert_allclose([*one.probs.values()], [*two.probs.values()], atol=1e-5)
        spoken += one.text is not None
    assert 0 < spoken < 10
    assert compile_step.cache_info().misses == compiled
    cache = sessions[1].batch.cache
    assert {len(array.sharding.device_set) for array in cache.keys} == {2}
    assert cache.keys[0].sharding.shard_shape(cache.keys[0].shape)[1] == 1  # one of the two heads


def test_in_bfloat16_the_cache_is_too_and_the_numbers_stay_close():
    model = make_model()
    milder = jax.tree.map(lambda x: x / 2, model.params)  # very sharp models magnify rounding
    kinds = {
        dtype: jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), milder) for dtype in (jnp.float32, jnp.bfloat16)
    }
    sessions = [Session(dataclasses.replace(model, params=params), capacity=512) for params in kinds.values()]
    assert [session.batch.cache.keys[0].dtype for session in sessions] == [jnp.float32, jnp.bfloat16]
    for frame in frames(6):
        one, two = ([*session.see(frame).probs.values()] for session in sessions)
        np.testing.assert_allclose(one, two, atol=0.05)


def test_a_checkpoint_opens_on_a_mesh(tmp_path):
    model = make_model()
    save_model(tmp_path / "model", model.config, model.protocol.config, model.protocol.tokenizer, model.params, None)
    mesh = make_mesh(fsdp=2, tensor=2)
    shared: Model = load_model(tmp_path / "model", mesh=mesh)
    assert shared.mesh == mesh
    jax.tree.map(np.testing.assert_array_equal, shared.params, model.params)
    kernel = shared.params["decoder"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (16, 24)


def test_int8_weights_are_close_on_one_device_and_on_two(tmp_path):
    model, dtype = make_model(), jnp.bfloat16
    milder = jax.tree.map(lambda x: x / 2, model.params)
    config, params = to_int8(model.config, milder)
    save_model(tmp_path / "int8", config, model.protocol.config, model.protocol.tokenizer, params)
    whole = dataclasses.replace(model, params=jax.tree.map(lambda x: x.astype(dtype), milder))
    opened = [load_model(tmp_path / "int8", dtype, mesh) for mesh in (None, make_mesh(tensor=2))]
    kernel = lambda m: m.params["decoder"]["layers_1"]["self_attn"]["q_proj"]
    assert [kernel(m)["kernel"].dtype for m in opened] == [jnp.int8] * 2
    assert [kernel(m)["kernel_scale"].dtype for m in opened] == [dtype] * 2
    np.testing.assert_array_equal(kernel(opened[0])["kernel_scale"], kernel(opened[1])["kernel_scale"])
    sessions = [Session(m, capacity=512) for m in (whole, *opened)]
    for frame in frames(4):
        one, *others = ([*session.see(frame).probs.values()] for session in sessions)
        for other in others:
            np.testing.assert_allclose(one, other, atol=0.05)
        np.testing.assert_allclose(*others, atol=0.02)
    with pytest.raises(CheckpointError, match="found one with int8 weights"):
        to_int8(config, params)


def test_published_folders_open_on_a_mesh(tmp_path):
    """A base model whose embedding grows, so that its rows no longer divide."""
    tokenizer = train_tokenizer(TEXTS, 300, CHAT_TOKENS)
    publish(tmp_path / "qwen", tokenizer, tokenizer.vocab_size)
    mesh = make_mesh(tensor=2)
    shared, whole = load(tmp_path / "qwen", mesh=mesh), load(tmp_path / "qwen")
    jax.tree.map(np.testing.assert_array_equal, shared.params, whole.params)
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(shared.params)} == {mesh}
    kernel = shared.params["decoder"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[1] == kernel.shape[1] // 2


@pytest.mark.parametrize("tensor", [3, 64])
def test_a_mesh_that_the_model_does_not_divide_by_is_one_line(tensor):
    model = make_model()
    mesh = jax.sharding.AbstractMesh((1, 1, tensor), ("data", "fsdp", "tensor"))
    with pytest.raises(ConfigError, match=f"expected tensor to divide the 4 heads of the model, found {tensor}"):
        param_shardings(model.config.decoder, model.params, mesh)


def test_a_mesh_of_more_devices_than_there_are_is_one_line():
    with pytest.raises(ConfigError, match=r"between 1 and the \d+ devices here, found 1 × 1 × 64"):
        make_mesh(tensor=64)
