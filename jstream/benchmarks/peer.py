"""The same training step beside torch and transformers: equal weights, batch, length, optimizer and device.

Both minimise plain cross entropy with AdamW. First their losses on the same batches are compared, then rounds of the
one and of the other take turns, so that whatever else the machine does falls on both.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jstream.benchmarks.report import Figure, Timing, timed
from jstream.benchmarks.train import Step, figures_of_rows, stage_number, with_steps
from jstream.config import ConfigError, ObjectiveConfig, SiglipConfig, TrainConfig

ROUNDS = 5
COMPARED = 2  # steps whose losses are compared: before the optimizer has done anything, and after
CLOSE = {"float32": 1e-4, "bfloat16": 2e-2}  # how far losses may differ, relative


def plain(config: TrainConfig, number: int) -> TrainConfig:
    """What both can do of a config's stage: cross entropy alone, AdamW, no dropout.

    Raises:
        ConfigError: the stage or its model has something that is not written in torch here.
    """
    config, number = with_steps(config, number), stage_number(config, number)
    stage, decoder = config.stages[number], config.model.decoder
    if not stage.tokens:
        raise ConfigError(f"--stage={number}: expected one with tokens, as the peer is a language model")
    if not isinstance(config.model.vision, SiglipConfig) or decoder.mrope_section or decoder.qkv_bias:
        raise ConfigError("--peer: expected a SigLIP tower and a decoder like Llama's, found a Qwen model")
    if config.remat == "dots":
        raise ConfigError("--peer: expected --config.remat=none or layer, which torch can do as well, found dots")
    stage = dataclasses.replace(stage, objective=ObjectiveConfig("ce"))
    no_dropout = dataclasses.replace(config.lora, dropout=0.0)
    return dataclasses.replace(config, stages=(stage,), optimizer="adamw", lora=no_dropout)


def measure(config: TrainConfig, number: int, steps: int, turns: int) -> list[Figure]:
    """Times both.

    Args:
        steps: of each, in ROUNDS rounds.

    Raises:
        ConfigError: torch is missing, the model is not written in torch here, or the losses are not the same.
    """
    config, number = plain(config, number), stage_number(config, number)
    if jax.device_count() > 1:
        raise ConfigError(f"--peer: expected one device, found {jax.device_count()}")
    try:
        from jstream.benchmarks.torch_step import TorchStep
    except ImportError as error:
        raise ConfigError(f"--peer: expected torch and transformers ({error}); pip install '.[parity]'") from None
    ours = Step(config, 0, turns)
    ours.begin()
    params, trained = {**ours.state.trained, **ours.frozen}, set(ours.state.trained)
    theirs = TorchStep(config, jax.tree.map(np.asarray, params), trained, ours.batch)
    runs: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
        "torch": (theirs, float),
        "ours": (ours, lambda metrics: float(metrics["loss"])),
    }
    losses = {name: [value(run()) for _ in range(COMPARED)] for name, (run, value) in runs.items()}
    for name, found in losses.items():
        if not np.allclose(found, losses["ours"], rtol=CLOSE[config.compute_dtype], atol=0):
            raise ConfigError(
                f"--peer: expected the losses to be the same, found {losses['ours']} and {found} ({name})"
            )

    each = max(steps // ROUNDS, 1)
    spent: dict[str, list[Round]] = {name: [] for name in runs}
    with tqdm(total=ROUNDS * len(runs), desc="rounds", delay=2, dynamic_ncols=True) as bar:
        for _ in range(ROUNDS):
            for name, (run, _) in runs.items():
                spent[name].append(Round.of(run, each))
                bar.update()
    return [*figures_of_rows(config, 0, ours.batch)[1:], *figures(losses, spent, ours.work.tokens)]


@dataclasses.dataclass(frozen=True)
class Round:
    """Some steps in a row: seconds of each, and of all cores together."""

    timing: Timing
    cpu_seconds: float

    @classmethod
    def of(cls, run: Callable[[], Any], steps: int) -> "Round":
        began = time.process_time()
        timing = timed(run, steps)
        return cls(timing, time.process_time() - began)


def figures(losses: Mapping[str, Sequence[float]], spent: Mapping[str, Sequence[Round]], tokens: int) -> list[Figure]:
    """Losses, speeds, and how the speeds compare: medians over the rounds."""
    found, cpu = [], jax.default_backend() == "cpu"
    speeds = {
        name: np.array([len(round.timing.each) * tokens / round.timing.whole for round in rounds])
        for name, rounds in spent.items()
    }
    for name, rounds in spent.items():
        steps = sum(len(round.timing.each) for round in rounds)
        found += [
            Figure(f"loss_{name}", losses[name][0], "{:.6f}"),
            Figure(f"loss_{name}_after_a_step", losses[name][1], "{:.6f}"),
            Figure(f"tokens_per_second_{name}", float(np.median(speeds[name])), "{:,.0f}"),
            Figure(
                f"step_median_ms_{name}",
                1e3 * float(np.median([seconds for round in rounds for seconds in round.timing.each])), "{:,.1f}",
            ),
        ]  # fmt: skip
        if cpu:  # hardly depends on what else the machine does
            seconds = sum(round.cpu_seconds for round in rounds) / steps
            found.append(Figure(f"core_seconds_a_step_{name}", seconds, "{:,.2f}"))
    for name in spent:
        if name != "ours":
            ratio = float(np.median(speeds["ours"] / speeds[name]))  # of rounds that came one after the other
            found.append(Figure(f"ours_to_{name}", ratio, "{:.2f}"))
    return found
