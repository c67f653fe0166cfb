"""Compiles a training step for accelerators that are not here, and says how much memory a chip needs.

    python launch/aot.py --config=configs/streamo.py --topology=v5p:2x2x1 [--config.mesh.tensor=2 …]

Topologies: v4, v5e, v5p and v6e slices by their shape (v5p:4x4x4), and the cards h200, a100 and rtx3090. Needs the
extra `aot`, for cards also `pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt` in jax's version. Nothing runs:
the bytes are those that the compiler of the accelerator lays out.
"""

import time
from dataclasses import replace

from jstream import accelerators

accelerators.compile_without_devices()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from absl import flags  # noqa: E402

from jstream import command  # noqa: E402
from jstream.accelerators import GIB, abstract_devices  # noqa: E402
from jstream.config import ConfigError, TrainConfig  # noqa: E402
from jstream.data.world.labels import WORDS  # noqa: E402
from jstream.models.attention import implementation_for  # noqa: E402
from jstream.sharding import training_mesh  # noqa: E402
from jstream.training.loop import abstract_batch, abstract_state, check_rows  # noqa: E402
from jstream.training.step import make_train_step  # noqa: E402

_TOPOLOGY = flags.DEFINE_string("topology", None, f"What to compile for: {accelerators.KNOWN}.")


def compile_step(config: TrainConfig, number: int, devices: list):
    """The compiled step of a stage on these devices."""
    mesh = training_mesh(config.mesh, devices)
    if config.attention == "auto":
        attention = implementation_for(devices[0].platform, config.model.decoder.head_dim, config.compute_dtype)
        config = replace(config, attention=attention)
    check_rows(config.stages, mesh)
    stage = config.stages[number]
    with jax.set_mesh(mesh):
        state, frozen = abstract_state(config, mesh, len(WORDS))
        places = jax.tree.map(lambda x: x.sharding, state)
        step = make_train_step(config, stage, (0, 1, 2), places)
        return step.lower(state, frozen, abstract_batch(config, stage, mesh, len(WORDS))).compile(), state, frozen


def held(tree) -> int:
    """Bytes of a tree of arrays on each device."""
    size = lambda x: jnp.dtype(x.dtype).itemsize * int(jnp.prod(jnp.asarray(x.sharding.shard_shape(x.shape))))
    return sum(map(size, jax.tree.leaves(tree)))


def main() -> None:
    config = command.given_config()
    if config is None or _TOPOLOGY.value is None or not config.stages:
        raise ConfigError("expected --config=FILE with stages, and --topology: " + accelerators.KNOWN)
    try:
        devices, memory = abstract_devices(_TOPOLOGY.value)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--topology: {error}") from None
    for number in range(len(config.stages)):
        began = time.perf_counter()
        try:
            compiled, state, frozen = compile_step(config, number, devices)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"stage {number}: does not fit {_TOPOLOGY.value}: {str(error).splitlines()[0]}")
            continue
        found = compiled.memory_analysis()
        total = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
        total -= found.alias_size_in_bytes
        fits = "fits" if total < memory else "does not fit"
        print(
            f"stage {number} on {len(devices)} × {_TOPOLOGY.value.partition(':')[0]}: {total / GIB:.2f} GiB a chip of "
            f"{memory / GIB:.2f}: {fits}\n"
            f"  trained params {held(state.trained) / GIB:.2f}, optimizer {held(state.opt_state) / GIB:.2f}, "
            f"frozen params {held(frozen) / GIB:.2f}, temporary {found.temp_size_in_bytes / GIB:.2f} GiB "
            f"(compiled in {time.perf_counter() - began:.0f} s)"
        )


if __name__ == "__main__":
    command.run(main)
