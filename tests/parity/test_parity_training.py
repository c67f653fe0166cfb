"""A training step in torch and transformers, on the same packed rows from the same weights, has our losses: on the
first batch, and after the optimizer has moved everything."""

import dataclasses
import pathlib
import runpy

import jax
import numpy as np
import pytest

from jstream.benchmarks import peer
from jstream.benchmarks.train import Step
from jstream.config import LoraConfig, MeshConfig, TrainConfig, from_dict
from jstream.sharding import training_mesh

torch = pytest.importorskip("torch")

from jstream.benchmarks.torch_step import TorchStep  # noqa: E402

TESTS = pathlib.Path(__file__).parent.parent
CONFIG = from_dict(TrainConfig, runpy.run_path(str(TESTS / "smallest.py"))["get_config"]().to_dict())
# SigLIP as it is published: no stem, patches of one frame
PUBLISHED = dataclasses.replace(CONFIG.model.vision, stem_width=0, temporal_patch_size=1, image_size=36)
UNTIED = dataclasses.replace(CONFIG.model.decoder, tie_embeddings=False)


@pytest.mark.parametrize("kind", ["whole", "tower frozen, in parts", "published tower", "adapters"])
def test_steps_of_torch_have_our_losses(kind, monkeypatch):
    alone = jax.devices()[:1]  # the tests have four devices
    monkeypatch.setattr(jax, "devices", lambda *_: alone)
    config, stage = CONFIG, dataclasses.replace(CONFIG.stages[1], learning_rate=1e-2)
    if kind == "tower frozen, in parts":
        stage = dataclasses.replace(stage, freeze=("vision/.*",), accumulate=2)
        config = dataclasses.replace(config, remat="layer")
    elif kind == "published tower":
        vision = dataclasses.replace(PUBLISHED, token_positions=True)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vision=vision))
    elif kind == "adapters":
        stage = dataclasses.replace(stage, freeze=("vision/.*", "decoder/.*"))
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, vision=PUBLISHED, decoder=UNTIED),
            lora=LoraConfig(rank=3, alpha=6.0),
        )
    config = peer.plain(dataclasses.replace(config, stages=(stage,), mesh=MeshConfig()), 0)
    assert training_mesh(config.mesh).size == 1
    ours = Step(config, 0, turns=7)
    ours.begin()
    params = jax.tree.map(np.asarray, {**ours.state.trained, **ours.frozen})
    theirs = TorchStep(config, params, set(ours.state.trained), ours.batch)
    mine, found = zip(*((float(ours()["loss"]), float(theirs())) for _ in range(4)))
    np.testing.assert_allclose(found[:1], mine[:1], rtol=1e-5)
    np.testing.assert_allclose(found, mine, rtol=1e-4)
    assert abs(mine[-1] - mine[0]) > 0.05  # it has learned something
