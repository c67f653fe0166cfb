"""Training steps compile for slices and cards that are not here, cut over the mesh, with the attention of each."""

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import pytest

from jstream.accelerators import GIB, abstract_devices
from jstream.config import MeshConfig, SiglipConfig
from jstream.training.compiled import bytes_needed, compile_step, held
from tests.published_configs import published

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
spec = importlib.util.spec_from_file_location("aot", ROOT / "launch" / "aot.py")
assert spec is not None and spec.loader is not None
aot = importlib.util.module_from_spec(spec)
spec.loader.exec_module(aot)


def shallow(rows=4, accumulate=1, **settings):
    """VideoLLM-online's decoder, two layers of it, trained whole; a small tower."""
    config = published("videollm_online")
    vision = SiglipConfig(image_size=32, patch_size=16, width=64, num_layers=1, num_heads=2, mlp_dim=64)
    decoder = dataclasses.replace(config.model.decoder, num_layers=2, vocab_size=1024)
    stage = dataclasses.replace(
        config.stages[0], steps=1, epochs=0.0, rows=rows, accumulate=accumulate, frames=32, tokens=2048, freeze=()
    )
    model = dataclasses.replace(config.model, vision=vision, decoder=decoder)
    lora = dataclasses.replace(config.lora, rank=0)
    return dataclasses.replace(config, model=model, stages=(stage,), lora=lora, **settings)


@pytest.mark.parametrize(
    ("topology", "mesh", "accumulate"),
    [
        ("v5p:2x2x1", MeshConfig(1, 4, 1), 1),
        ("v5e:2x2", MeshConfig(2, 2, 1), 2),
        ("v6e:2x2", MeshConfig(1, 2, 2), 2),
    ],
)
def test_a_step_on_a_slice_is_cut_over_it(topology, mesh, accumulate):
    config = shallow(rows=4 * accumulate, accumulate=accumulate, mesh=mesh)
    devices, memory = abstract_devices(topology)
    compiled, state, *_ = compile_step(config, 0, devices)
    assert "splash" in compiled.as_text()
    params = sum(x.size for x in state.trained.values())
    assert held(state.trained) < 1.1 * 4 * params / (mesh.fsdp * mesh.tensor)
    assert held(state.opt_state) < 1.1 * 8 * params / (mesh.fsdp * mesh.tensor)
    found = compiled.memory_analysis()
    assert found.alias_size_in_bytes >= held(state)  # the state is donated, all of it
    # beside the state there is a gradient of the size of the params, a copy in bfloat16, and activations
    assert found.temp_size_in_bytes < 3 * held(state.trained) + 600e6


@pytest.mark.parametrize("card", ["h200", "rtx3090"])
def test_a_step_on_a_card_compiles(card):
    config = shallow(rows=1, mesh=MeshConfig(), attention="xla")
    compiled, state, *_ = compile_step(config, 0, abstract_devices(card)[0])
    assert compiled.memory_analysis().alias_size_in_bytes >= held(state)


def test_what_does_not_fit_is_told_in_bytes():
    devices, _ = abstract_devices("v5e:2x2")
    place = jax.sharding.SingleDeviceSharding(devices[0])
    x = jax.ShapeDtypeStruct((1 << 16, 1 << 16), jnp.bfloat16, sharding=place)
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.jit(lambda x: jnp.sort(x @ x, axis=0) @ x).lower(x).compile()
    needed = bytes_needed(str(error.value), held(x))
    assert needed is not None and 24 * GIB <= needed < 64 * GIB  # the argument, and two products at least
    assert aot.verdict(20 * GIB, 16 * GIB) == "20.00 GiB a chip of 16.00: does not fit, 4.00 GiB too many"
    assert bytes_needed("INTERNAL: something else", 0) is None
