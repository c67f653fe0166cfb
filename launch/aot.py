"""Compiles a training step for accelerators that are not here, and says how much memory a chip needs.

    python launch/aot.py --config=configs/streamo.py --topology=v5p:2x2x1 [--config.mesh.tensor=2 …]

Topologies: v4, v5e, v5p and v6e slices by their shape (v5p:4x4x4), and the cards h200, a100 and rtx3090. Needs the
extra `aot`, for cards also `pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt` in jax's version. Nothing runs:
the bytes are those that the compiler of the accelerator lays out.
"""

import time

from jstream import accelerators

accelerators.compile_without_devices()

from absl import flags  # noqa: E402

from jstream import command  # noqa: E402
from jstream.accelerators import GIB, abstract_devices  # noqa: E402
from jstream.config import ConfigError  # noqa: E402
from jstream.training.compiled import TooLarge, compile_step, foretold, held  # noqa: E402

_TOPOLOGY = flags.DEFINE_string("topology", None, f"What to compile for: {accelerators.KNOWN}.")


def verdict(needed: float, memory: float) -> str:
    fits = "fits" if needed < memory else f"does not fit, {(needed - memory) / GIB:.2f} GiB too many"
    return f"{needed / GIB:.2f} GiB a chip of {memory / GIB:.2f}: {fits}"


def main() -> None:
    config = command.given_config()
    if config is None or _TOPOLOGY.value is None or not config.stages:
        raise ConfigError("expected --config=FILE with stages, and --topology: " + accelerators.KNOWN)
    try:
        devices, memory = abstract_devices(_TOPOLOGY.value)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--topology: {error}") from None
    on = f"{len(devices)} × {_TOPOLOGY.value.partition(':')[0]}"
    for number in range(len(config.stages)):
        began = time.perf_counter()
        try:
            compiled, state, frozen, batch = compile_step(config, number, devices)
        except TooLarge as error:
            print(f"stage {number} on {on}: {verdict(error.needed, memory)} ({time.perf_counter() - began:.0f} s)")
            continue
        except RuntimeError as error:
            if "cuDNN" not in str(error):
                raise
            raise ConfigError(
                "--topology: expected cuDNN, whose attention the step uses on a card, found none; "
                "pip install nvidia-cudnn-cu13, or take --config.attention=xla, which needs about as much memory"
            ) from None
        temporary = compiled.memory_analysis().temp_size_in_bytes
        print(
            f"stage {number} on {on}: {verdict(foretold(compiled), memory)}\n"
            f"  trained params {held(state.trained) / GIB:.2f}, optimizer {held(state.opt_state) / GIB:.2f}, "
            f"frozen params {held(frozen) / GIB:.2f}, batch {held(batch) / GIB:.2f}, "
            f"temporary {temporary / GIB:.2f} GiB (compiled in {time.perf_counter() - began:.0f} s)"
        )


if __name__ == "__main__":
    command.run(main)
