"""Every way to compute a step teaches the same, and every optimizer learns."""

import dataclasses

import jax
import numpy as np
import pytest
from test_training import (  # noqa: F401  (fixtures)
    CONFIG,
    STAGE,
    batch,
    protocol,
    run_steps,
)
from test_training import test_frozen_params_do_not_move_bit_for_bit as frozen_params_do_not_move

from jstream.config import MeshConfig
from jstream.data.batches import batches
from jstream.data.world.labels import WORDS
from jstream.data.world_rows import WorldRows
from jstream.sharding import training_mesh
from jstream.training.loop import place_state, to_devices
from jstream.training.step import make_train_step


@pytest.mark.parametrize("optimizer", ["muon", "adamw_8bit", "adafactor"])
def test_the_loss_goes_down_with_every_other_optimizer(batch, protocol, optimizer):  # noqa: F811
    stage = dataclasses.replace(STAGE, steps=1000, learning_rate=3e-3)
    _, _, history = run_steps(batch, protocol, 60, stage, optimizer=optimizer)
    assert np.mean(history[-5:]) < 0.5 * np.mean(history[:3])


def test_what_a_stage_freezes_does_not_move_bit_for_bit(batch, protocol):  # noqa: F811
    frozen_params_do_not_move(batch, protocol, always=False)


# Eight rows at once, under the loss that counts states over all of them: silences are dealt out unevenly.
EIGHT = dataclasses.replace(STAGE, rows=8, objective=dataclasses.replace(STAGE.objective, states="focal"))


@pytest.fixture(scope="module")
def eight_rows(protocol):  # noqa: F811
    return next(batches(WorldRows(CONFIG.seed, EIGHT, 1, protocol, CONFIG.model.vision), 8, CONFIG.seed, workers=0))


@pytest.fixture(scope="module")
def plainly(eight_rows, protocol):  # noqa: F811
    """Three steps on them as they come, on one device in f32: what every other way is compared with."""
    return run_steps(eight_rows, protocol, 3, EIGHT, optimizer="adamw")


def agree(found, want, tolerance=2e-5):
    for path, x in want.items():
        np.testing.assert_allclose(found[path], x, atol=tolerance, err_msg=path)


def test_bfloat16_computes_about_the_same_from_float32_params(eight_rows, protocol, plainly):  # noqa: F811
    _, after, history = run_steps(eight_rows, protocol, 3, EIGHT, optimizer="adamw", compute_dtype="bfloat16")
    assert {x.dtype.name for x in after.values()} == {"float32"}
    np.testing.assert_allclose(history, plainly[2], rtol=0.02)


@pytest.mark.parametrize("remat", ["dots", "layer"])
def test_what_is_computed_again_teaches_the_same(eight_rows, protocol, plainly, remat):  # noqa: F811
    _, found, again = run_steps(eight_rows, protocol, 3, EIGHT, optimizer="adamw", remat=remat)
    np.testing.assert_allclose(again, plainly[2], rtol=1e-5)
    agree(found, plainly[1])


def test_parts_of_a_batch_teach_the_same_as_the_whole(eight_rows, protocol, plainly):  # noqa: F811
    stage = dataclasses.replace(EIGHT, accumulate=4)
    _, found, in_parts = run_steps(eight_rows, protocol, 3, stage, optimizer="adamw")
    np.testing.assert_allclose(in_parts, plainly[2], rtol=1e-5)
    agree(found, plainly[1])


def test_several_devices_learn_what_one_does(eight_rows, protocol, plainly):  # noqa: F811
    """Params cut by rows and by columns; test_processes has the other axes."""
    config = dataclasses.replace(CONFIG, stages=(EIGHT,), mesh=MeshConfig(1, 2, 2), optimizer="adamw", seed=0)
    mesh = training_mesh(config.mesh, jax.devices()[:4])
    with jax.set_mesh(mesh):
        state, frozen = place_state(config, mesh, len(WORDS))
        places = jax.tree.map(lambda x: x.sharding, state)
        step, history = make_train_step(config, EIGHT, protocol.decision_ids, places), []
        for _ in range(3):
            state, metrics = step(state, frozen, to_devices(eight_rows, 8, mesh))
            history.append(float(metrics["loss"]))
    assert any(x.sharding.shard_shape(x.shape) != x.shape for x in state.trained.values())
    np.testing.assert_allclose(history, plainly[2], rtol=1e-5)
    agree(jax.tree.map(np.asarray, state.trained | frozen), plainly[1])
