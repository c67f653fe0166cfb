"""A training step compiled before there is anything to train, and the bytes that its compiler foretells.

Serves devices that are here (`jstream.bench`) and devices that are not (`launch/aot.py`).
"""

import math
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jstream.accelerators import GIB
from jstream.config import TrainConfig
from jstream.data.world.labels import WORDS
from jstream.models.attention import implementation_for
from jstream.sharding import training_mesh
from jstream.training.loop import abstract_batch, abstract_state, check_rows
from jstream.training.step import make_train_step


class TooLarge(Exception):
    """A program that its compiler finds no room for.

    Attributes:
        needed: bytes a device.
    """

    def __init__(self, needed: float):
        super().__init__(f"the step needs {needed / GIB:.2f} GiB a device, more than there is")
        self.needed = needed


def compile_step(
    config: TrainConfig, number: int, devices: list, state_ids: tuple[int, ...] = (0, 1, 2)
) -> tuple[Any, Any, Any, Any]:
    """The compiled step of a stage on these devices, with the state, the frozen params and the batch that it takes, as
    shapes.

    Args:
        state_ids: token ids of the states.

    Raises:
        ConfigError: the rows cannot be dealt out to the devices.
        TooLarge: the compiler finds no room for it.
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
        batch = abstract_batch(config, stage, mesh, len(WORDS))
        lowered = step.lower(state, frozen, batch)
    try:
        return lowered.compile(), state, frozen, batch
    except jax.errors.JaxRuntimeError as error:
        needed = bytes_needed(str(error), held((state, frozen, batch)))
        if needed is None:
            raise
        raise TooLarge(needed) from None


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def bytes_needed(message: str, given: float) -> float | None:
    """Bytes a device of a program that does not fit, from what the compiler says; None where it complains of another
    thing.

    Args:
        given: bytes of the program's arguments, which one of the compiler's two messages leaves out.
    """
    found = re.search(r"RESOURCE_EXHAUSTED.*?(Used |temporaries \()([\d.]+)([KMGT]?)", message, re.DOTALL)
    if found is None:
        return None
    size = float(found[2]) * _UNITS[found[3]]
    return size + given if found[1].startswith("temp") else size


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
