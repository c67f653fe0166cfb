"""The checkpoints of a training run: kept by step, written in the background, committed whole.

A checkpoint holds what the run trains and the optimizer's state. Batches are a function of the step, and params that
are never trained come from where they came from at first: this is all it takes to go on, on any mesh.
"""

import contextlib
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jstream.weights.checkpoint import CheckpointError


class RunCheckpoints:
    """The checkpoints in `folder/checkpoints`.

    Args:
        folder: of the run.
        keep: how many of the newest to keep.
        best: metric whose best checkpoint is kept as well; losses, errors and perplexities are best where they are
            least.
    """

    def __init__(self, folder: str | pathlib.Path, keep: int, best: str = ""):
        policies = ocp.training.preservation_policies
        newest: Any = policies.LatestN(keep)
        if best:
            least = best.endswith(("loss", "ppl", "time_diff"))
            kept = policies.BestN(
                get_metric_fn=lambda metrics: metrics[best], n=1, reverse=least, keep_checkpoints_without_metrics=False
            )
            newest = policies.AnyPreservationPolicy([newest, kept])
        self._folder = pathlib.Path(folder).absolute() / "checkpoints"
        self._checkpointer = ocp.training.Checkpointer(
            str(self._folder),
            preservation_policy=newest,
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Starts writing; returns once the device arrays are copied. The commit follows in the background.

        Raises:
            CheckpointError: it, or the one before, cannot be written, as where the disk is full.
        """
        with self._told():
            self._checkpointer.save_async(step, state, metrics=dict(metrics) if metrics else None, force=True)

    def load(self, state: Any) -> Any:
        """Restores the last committed checkpoint.

        Args:
            state: tree of arrays or shapes with shardings: where the restored arrays will lie, whatever wrote them.

        Raises:
            CheckpointError: it is of another shape.
        """
        latest = self._checkpointer.latest
        assert latest is not None
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        try:
            return self._checkpointer.load(latest.step, like)
        except (KeyError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"checkpoint {latest.step} of the run does not fit its config: {reason}") from None

    def close(self) -> None:
        """Waits for what is being written.

        Raises:
            CheckpointError: as `save`.
        """
        with self._told():
            self._checkpointer.close()

    @contextlib.contextmanager
    def _told(self):
        """Tells in one line what went wrong while writing; orbax raises many kinds of errors."""
        try:
            yield
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            kept = "the run goes on from an earlier one" if self.latest_step is not None else "there is no earlier one"
            raise CheckpointError(f"{self._folder}: a checkpoint could not be written ({lines[0]}); {kept}") from None
