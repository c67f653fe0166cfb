"""The training loop: batches in, steps, and what is logged, validated and kept on the way.

The device is always one step ahead of the host: a step is dispatched, then the metrics of the one before are read.
"""

import contextlib
import dataclasses
import math
import pathlib
import signal
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jstream.config import ConfigError, StageConfig, TrainConfig
from jstream.data.batches import batches
from jstream.data.features import stored_features
from jstream.data.rows import lay_row
from jstream.errors import Stopped, UserError
from jstream.protocols.protocol import StreamProtocol
from jstream.sharding import ROWS, optimizer_shardings, own_rows, param_shardings, placed, replicated, rows_sharding
from jstream.training import validation
from jstream.training.optimizer import learning_rate
from jstream.training.progress import Progress
from jstream.training.step import Params, TrainState, make_train_step, prepare
from jstream.weights.run_checkpoints import RunCheckpoints

Batch = dict[str, np.ndarray]


class TrainingError(UserError, RuntimeError):
    """A run that cannot go on; the message is one line."""


# -------------------------------------------------------------------------------------------------- on the devices


def place_state(
    config: TrainConfig, mesh: Mesh, num_words: int, given: Mapping[str, jax.Array] | None = None
) -> tuple[TrainState, Params]:
    """The state before the first step and the frozen params (`step.prepare`), each where its rule puts it.

    Args:
        given: as for `prepare`; taken over.
    """
    places = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh, num_words))
    make = lambda given: prepare(config, jax.random.key(config.seed), num_words, given)
    with warnings.catch_warnings():  # what is given in another dtype than it is trained in cannot stay where it is
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        return jax.jit(make, out_shardings=places, donate_argnums=0)(given)


def abstract_state(config: TrainConfig, mesh: Mesh, num_words: int) -> tuple[TrainState, Params]:
    """What `place_state` makes, as shapes with shardings; the devices of the mesh need not be here."""
    state, frozen = jax.eval_shape(lambda: prepare(config, jax.random.key(0), num_words))
    decoder = config.model.decoder
    places = (
        TrainState(
            param_shardings(decoder, state.trained, mesh),
            optimizer_shardings(state.opt_state, state.trained, decoder, mesh),
            replicated(mesh),  # type: ignore[arg-type]
        ),
        param_shardings(decoder, frozen, mesh),
    )
    return placed((state, frozen), places)


def abstract_batch(
    config: TrainConfig, stage: StageConfig, mesh: Mesh, num_words: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of a stage, as shapes with shardings; of features where that is what the config's dialogues hold."""
    stored = stored_features(config.dialogues) if config.dialogues else None
    vocabulary = np.zeros(num_words, np.int32) if stage.objective.needs_names else None
    row = lay_row([], stage, config.model.vision, vocabulary, features=stored.dtype if stored else None)
    put = lambda x: jax.ShapeDtypeStruct((stage.rows, *np.shape(x)), x.dtype, sharding=rows_sharding(mesh))
    return {name: put(x) for name, x in row.items()}


def to_devices(batch: Batch, rows: int, mesh: Mesh) -> dict[str, jax.Array]:
    """A batch across all processes from what each made of it."""
    place = rows_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(place, value, (rows, *value.shape[1:]))
        for name, value in batch.items()
    }


def check_rows(stages: Sequence[StageConfig], mesh: Mesh) -> None:
    """Checks that the rows of every part of every batch can be dealt out.

    Raises:
        ConfigError: they cannot.
    """
    devices = math.prod(mesh.shape[axis] for axis in ROWS)
    for number, stage in enumerate(stages):
        if stage.rows // stage.accumulate % devices:
            raise ConfigError(
                f"stages[{number}]: expected rows / accumulate to be a multiple of the {devices} devices of data × "
                f"fsdp, found {stage.rows} / {stage.accumulate}; take other rows, fewer parts "
                f"(--config.stages[{number}].accumulate) or more --config.mesh.tensor"
            )


class _StopSignal:
    """Whether the run should stop: SIGTERM, which says that the machine will be taken away."""

    def __init__(self):
        self._alone, self._told, self._before = jax.process_count() == 1, False, None

    def _note(self, *_: Any) -> None:
        self._told = True

    def __enter__(self):
        if self._alone:  # else JAX's own service hears it, and agrees with the other processes on a step
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._alone:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self, step: int) -> bool:
        """Called at every step, and true at the same one in all processes."""
        return self._told if self._alone else multihost_utils.reached_preemption_sync_point(step)


# --------------------------------------------------------------------------------------------------------- the loop


@dataclasses.dataclass
class Loop:
    """A run from its last checkpoint to its end.

    Attributes:
        config: with the steps of every stage.
        rows: of each stage.
        validation_rows: None where nothing is validated.
        profile: first and last step to write a trace of, into `workdir/profile`; None writes none.
    """

    config: TrainConfig
    workdir: pathlib.Path
    mesh: Mesh
    protocol: StreamProtocol
    rows: Sequence[Any]
    state: TrainState
    frozen: Params
    validation_rows: Any = None
    profile: tuple[int, int] | None = None
    _tracing: bool = dataclasses.field(default=False, init=False)

    def run(self) -> TrainState:
        """Trains to the end.

        Raises:
            Stopped: on SIGTERM, with everything saved.
            TrainingError: where a loss is no number; what was saved before is left as it is.
        """
        config = self.config
        total = sum(stage.steps for stage in config.stages)
        with contextlib.ExitStack() as stack:
            self._stop = stack.enter_context(_StopSignal())
            self._checkpoints = RunCheckpoints(self.workdir, config.keep, config.best)
            stack.enter_context(contextlib.closing(self._checkpoints))  # waits for what is being written
            if self._checkpoints.latest_step is not None:
                self.state = self._checkpoints.load(self.state)
            self._step, begin = int(self.state.step), 0
            own = len(own_rows(self.mesh, config.stages[0].rows)) / config.stages[0].rows
            self._progress = Progress(self.workdir, total, self._step, config.model, own)
            stack.enter_context(contextlib.closing(self._progress))
            self._validate = self._make_validation()
            stack.callback(self._end_trace)
            for number, stage in enumerate(config.stages):
                if self._step < begin + stage.steps:
                    self._run_stage(number, stage, begin)
                begin += stage.steps
        return self.state

    def _run_stage(self, number: int, stage: StageConfig, begin: int) -> None:
        config, end = self.config, begin + stage.steps
        places = jax.tree.map(lambda x: x.sharding, self.state)
        train_step = make_train_step(config, stage, self.protocol.decision_ids, places)
        rows = self.rows[number]
        made = batches(
            rows, stage.rows, config.seed, config.workers, self._step - begin, own_rows(self.mesh, stage.rows)
        )
        unread: tuple[int, Any, Batch] | None = None  # the step before, whose metrics are still on the device
        with contextlib.closing(made):  # type: ignore[type-var]
            while self._step < end:
                asked = time.perf_counter()
                batch = next(made)
                waited = time.perf_counter() - asked
                self._trace(self._step + 1)
                on_devices = to_devices(batch, stage.rows, self.mesh)
                self.state, metrics = train_step(self.state, self.frozen, on_devices)
                self._step += 1
                if unread is not None:
                    self._read(*unread, rows)
                unread = self._step, metrics, batch
                self._progress.count(batch, waited, self.state.trained, self.frozen)
                if self._keep(stage, unread, end, rows):
                    unread = None

    def _keep(self, stage: StageConfig, newest: tuple[int, Any, Batch], end: int, rows: Any) -> bool:
        """Logs, validates and saves where it is time; whether the metrics of the newest step have been read for it."""
        config, step = self.config, self._step
        due = lambda every: bool(every) and (step % every == 0 or step == end)
        told = self._stop.reached(step)
        logs, saves, validates = due(config.log_every), due(config.save_every) or told, due(config.validate_every)
        if not (logs or saves or validates):
            return False
        values = self._read(*newest, rows)
        found = self._validate() if validates and self._validate else {}
        if logs or found:
            told_of = {f"validation/{name}": value for name, value in found.items()}
            self._progress.log(step, {**values, "learning_rate": learning_rate(config, step - 1), **told_of})
        if saves or (found and config.best):
            self._checkpoints.save(step, self.state, found)
        if told:
            raise Stopped(f"stopped at step {step}, saved; the same command goes on")
        return True

    def _read(self, step: int, metrics: Mapping[str, jax.Array], batch: Batch, rows: Any) -> dict[str, float]:
        """The metrics of a step.

        Raises:
            TrainingError: the loss or the gradient is no number.
        """
        values = {name: float(value) for name, value in metrics.items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            named = [rows.describe(int(row)) for row in batch["row"]]
            raise TrainingError(
                f"step {step}: the loss is {values['loss']}, the gradient's norm {values['gradient_norm']}, on "
                f"{'; '.join(named)}; the last checkpoint is as it was; try a lower learning_rate or clip_norm"
            )
        return values

    def _make_validation(self) -> Callable[[], dict[str, float]] | None:
        config, stage = self.config, validation.validation_stage(self.config)
        if self.validation_rows is None or stage is None:
            return None
        validation_step = validation.make_validation_step(config, self.protocol)
        own, rows = own_rows(self.mesh, stage.rows), self.validation_rows
        number = max(min(config.validation_rows, len(rows)) // stage.rows, 1)

        def validate() -> dict[str, float]:
            turns = []
            with contextlib.closing(batches(rows, stage.rows, config.seed, config.workers, 0, own)) as made:  # type: ignore[type-var]
                for _ in range(number):
                    batch = next(made)
                    on_devices = to_devices(batch, stage.rows, self.mesh)
                    scored = validation_step(self.state, self.frozen, on_devices)
                    whole = {name: on_devices[name] for name in validation.READ} | dict(
                        zip(("log_probs", "scores"), scored)
                    )
                    whole = {name: multihost_utils.process_allgather(x, tiled=True) for name, x in whole.items()}
                    for i in range(stage.rows):
                        turns += validation.turns_of_row({name: x[i] for name, x in whole.items()}, self.protocol)
            return validation.summarize(turns)

        return validate

    def _trace(self, step: int) -> None:
        """Begins and ends the trace around the steps of `profile`."""
        if self.profile is None:
            return
        if step > self.profile[1]:
            self._end_trace()
        elif step >= self.profile[0] and not self._tracing:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # with it, ending a trace while a checkpoint is written can crash Python
            jax.profiler.start_trace(str(self.workdir / "profile"), profiler_options=options)
            self._tracing = True

    def _end_trace(self) -> None:
        if self._tracing:
            jax.block_until_ready(self.state)
            jax.profiler.stop_trace()
            self._tracing = False
