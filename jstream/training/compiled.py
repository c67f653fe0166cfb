"""A training step compiled before there is anything to train, and the bytes that its compiler foretells.

Serves devices that are here (`jstream.bench`) and devices that are not (`launch/aot.py`).
"""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jstream.config import TrainConfig
from jstream.data.world.labels import WORDS
from jstream.models.attention import implementation_for
from jstream.sharding import training_mesh
from jstream.training.loop import abstract_batch, abstract_state, check_rows
from jstream.training.step import make_train_step


def compile_step(
    config: TrainConfig, number: int, devices: list, state_ids: tuple[int, ...] = (0, 1, 2)
) -> tuple[Any, Any, Any]:
    """The compiled step of a stage on these devices, with the state and the frozen params that it takes, as shapes.

    Args:
        state_ids: token ids of the states.

    Raises:
        ConfigError: the rows cannot be dealt out to the devices.
    """
    mesh = training_mesh(config.mesh, devices)
    if config.attention == "auto":
        attention = implementation_for(devices[0].platform, config.model.decoder.head_dim, config.compute_dtype)
        config = replace(config, attention=attention)
    stage = config.stages[number]
    check_rows([stage], mesh)
    with jax.set_mesh(mesh):
        state, frozen = abstract_state(config, mesh, len(WORDS))
        places = jax.tree.map(lambda x: x.sharding, state)
        step = make_train_step(config, stage, state_ids, places)
        return step.lower(state, frozen, abstract_batch(config, stage, mesh, len(WORDS))).compile(), state, frozen


def held(tree: Any) -> int:
    """Bytes of a tree of arrays on each device."""
    size = lambda x: jnp.dtype(x.dtype).itemsize * math.prod(x.sharding.shard_shape(x.shape))
    return sum(map(size, jax.tree.leaves(tree)))


def foretold(compiled: Any) -> int:
    """Bytes that a compiled program takes on each device while it runs, by its compiler's count: what goes in, what
    comes out in another place, and what is there in between."""
    found = compiled.memory_analysis()
    total = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return total - found.alias_size_in_bytes
