"""How fast a training step is, and how much memory it takes: the step of a real stage at its real size, on made-up
rows, with fresh params, on the devices that are here. Nothing is opened, saved or validated."""

import dataclasses
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jstream.accelerators import GIB, peak_flops
from jstream.benchmarks.memory import ProcessPeak, device_peak
from jstream.benchmarks.report import Figure, Timing, timed
from jstream.benchmarks.synthetic import synthetic_batch
from jstream.config import ConfigError, TrainConfig
from jstream.data.world.labels import WORDS
from jstream.sharding import training_mesh
from jstream.training.compiled import compile_step, foretold, held
from jstream.training.flops import Work, step_flops
from jstream.training.loop import place_state, to_devices

WARM_UP = 3  # steps that are not timed
_STEPS = 1000  # of a stage that gives epochs: its schedule has to end somewhere


def measure(config: TrainConfig, number: int, steps: int, turns: int) -> list[Figure]:
    """Times a stage's training step.

    Args:
        number: of the stage; −1 is the last.
        steps: timed.
        turns: of each made-up dialogue.

    Raises:
        ConfigError: there is no such stage, or its rows cannot be dealt out.
    """
    config, number = with_steps(config, number), stage_number(config, number)
    own = Step(config, number, turns)
    own.begin()
    peak = ProcessPeak(held((own.state, own.frozen)))
    timing = own.time(steps)
    growth = peak.bytes() if jax.default_backend() == "cpu" else None
    return [*figures_of_rows(config, number, own.batch), *own.figures(timing, growth)]


def stage_number(config: TrainConfig, number: int) -> int:
    """The place of a stage, counted from the first.

    Raises:
        ConfigError: there is none.
    """
    count = len(config.stages)
    if not -count <= number < count:
        raise ConfigError(f"--stage={number}: expected one of the {count} stages of the config, the first is 0")
    return number % count


def with_steps(config: TrainConfig, number: int) -> TrainConfig:
    """The config with steps in the place of epochs."""
    stages = [dataclasses.replace(stage, steps=stage.steps or _STEPS, epochs=0.0) for stage in config.stages]
    return dataclasses.replace(config, stages=tuple(stages))


def sized(config: TrainConfig, number: int, rows: int, frames: int, tokens: int) -> TrainConfig:
    """The config with other sizes of one stage, to fit one device; 0 leaves what there is.

    Args:
        rows: of a step, which then go through the model in one part.
    """
    number = stage_number(config, number)
    stages, stage = list(config.stages), config.stages[number]
    stages[number] = dataclasses.replace(
        stage,
        rows=rows or stage.rows,
        accumulate=1 if rows else stage.accumulate,
        frames=frames or stage.frames,
        tokens=tokens or stage.tokens,
    )
    return dataclasses.replace(config, stages=tuple(stages))


def figures_of_rows(config: TrainConfig, number: int, batch: dict[str, np.ndarray]) -> list[Figure]:
    """What is learned from in a step."""
    stage, work = config.stages[number], Work.of(batch)
    slots = f"{stage.rows} × {stage.tokens} tokens, {stage.frames} frames"
    return [
        Figure("stage", number),
        Figure("rows", f"{slots}" + (f", in {stage.accumulate} parts" if stage.accumulate > 1 else "")),
        Figure("dialogues", int(batch["first"].sum())),
        Figure("tokens", work.tokens, "{:,}"),
        Figure("frames", work.frames, "{:,}"),
    ]


class Step:
    """The compiled training step of a stage, with a batch to run it on.

    Args:
        config: with the steps of every stage.
        batch, state_ids: as `synthetic_batch` makes them, which is the default.
    """

    def __init__(self, config: TrainConfig, number: int, turns: int, batch: Any = None, state_ids: Any = None):
        self.config, self.stage = config, config.stages[number]
        if batch is None:
            batch, state_ids = synthetic_batch(config, self.stage, turns)
        self.batch, self.work = batch, Work.of(batch)
        self.mesh = training_mesh(config.mesh)
        self.compiled, self.shapes, *_ = compile_step(config, number, jax.devices(), state_ids)

    def begin(self) -> None:
        """Fresh params, on the devices."""
        with jax.set_mesh(self.mesh):
            self.state, self.frozen = jax.block_until_ready(place_state(self.config, self.mesh, len(WORDS)))
        self.flops = step_flops(self.config.model, self.state.trained, self.frozen, *dataclasses.astuple(self.work))

    def __call__(self) -> dict[str, jax.Array]:
        """Starts a step; its metrics."""
        with jax.set_mesh(self.mesh):
            batch = to_devices(self.batch, self.stage.rows, self.mesh)  # anew for each step, as in training
            self.state, metrics = self.compiled(self.state, self.frozen, batch)
        return metrics

    def time(self, steps: int, warm_up: int = WARM_UP) -> Timing:
        with tqdm(total=warm_up + steps, desc="steps", unit="step", delay=2, dynamic_ncols=True) as bar:
            timed(self, warm_up, bar.update)
            return timed(self, steps, bar.update)

    def figures(self, timing: Timing, growth: int | None = None) -> list[Figure]:
        """Speed and memory.

        Args:
            growth: bytes of the process, where its memory is that of the device.
        """
        steps, count = len(timing.each), jax.device_count()
        peak = peak_flops(jax.devices()[0].device_kind)
        told, taken = foretold(self.compiled), device_peak() if growth is None else growth
        gib = lambda size: None if size is None else size / GIB
        return [
            Figure("tokens_per_second", steps * self.work.tokens / timing.whole, "{:,.0f}"),
            Figure("frames_per_second", steps * self.work.frames / timing.whole, "{:,.1f}"),
            Figure("steps", steps),
            Figure("step_median_ms", 1e3 * timing.median, "{:,.1f}"),
            Figure("step_p99_ms", 1e3 * timing.p99, "{:,.1f}"),
            Figure("flops_a_step", self.flops, "{:.4g}"),
            Figure("flops_per_second", steps * self.flops / timing.whole, "{:.4g}"),
            Figure("floor_ms", None if peak is None else 1e3 * self.flops / (peak * count), "{:,.1f}"),
            Figure("mfu", None if peak is None else steps * self.flops / timing.whole / (peak * count), "{:.1%}"),
            Figure("memory_foretold_gib", gib(told), "{:.3f}"),
            Figure("memory_peak_gib", gib(taken), "{:.3f}"),
            Figure("memory_peak_to_foretold", None if taken is None else taken / told, "{:.3f}"),
        ]
