"""Where a run tells how it goes: a progress bar, `metrics.jsonl` and TensorBoard."""

import contextlib
import json
import pathlib
import time
from collections.abc import Mapping

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from jstream.accelerators import peak_flops
from jstream.config import ModelConfig
from jstream.training.flops import Work, step_flops
from jstream.training.step import Params


class Progress:
    """What happened since the last logged step; silent in all processes but the first.

    Args:
        workdir: of the run.
        total, step: steps of the run, and those already taken.
        share: of every batch, what this process makes.
    """

    def __init__(self, workdir: pathlib.Path, total: int, step: int, config: ModelConfig, share: float):
        self._config, self._share = config, share
        self._first = jax.process_index() == 0
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self._bar = tqdm(
            total=total, initial=step, unit="step", dynamic_ncols=True, smoothing=0.05, disable=not self._first
        )
        if self._first:
            path = workdir / "metrics.jsonl"
            _forget_after(path, step)
            self._log = path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(workdir), purge_step=step + 1)
        self._begin()

    def _begin(self) -> None:
        self._since, self._waited = time.perf_counter(), 0.0
        self._tokens, self._frames, self._dialogues, self._flops, self._left_out = 0.0, 0.0, 0.0, 0.0, 0

    def count(self, batch: Mapping[str, np.ndarray], waited: float, trained: Params, frozen: Params) -> None:
        """Counts a step.

        Args:
            batch: what this process made of it.
            waited: seconds for it.
        """
        work = Work.of(batch)
        tokens, frames, pairs = (count / self._share for count in (work.tokens, work.frames, work.pairs))
        self._tokens, self._frames = self._tokens + tokens, self._frames + frames
        self._dialogues += np.sum(batch["first"]) / self._share
        self._left_out += int(np.sum(batch["left_out"]))
        if self._peak:
            self._flops += step_flops(self._config, trained, frozen, tokens, frames, pairs, "features" in batch)
        self._waited += waited
        self._bar.update()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line: the metrics, and how fast it went since the last one."""
        seconds = time.perf_counter() - self._since
        speed = {
            "tokens_per_second": self._tokens / seconds,
            "frames_per_second": self._frames / seconds,
            "dialogues_per_second": self._dialogues / seconds,
            "waiting": self._waited / seconds,
        }
        if self._left_out:
            speed["left_out"] = self._left_out
        if self._peak:
            speed["mfu"] = self._flops / seconds / (self._peak * jax.device_count())
        self._write(step, {**metrics, **speed})
        mfu = f", MFU {100 * speed['mfu']:.0f} %" if self._peak else ""
        self._bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {speed['tokens_per_second']:.0f} tokens/s{mfu}")
        self._begin()

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self._first:
            return
        self._log.write(json.dumps({"step": step, **{name: round(value, 6) for name, value in metrics.items()}}) + "\n")
        self._log.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._bar.close()
        if self._first:
            self._log.close()
            self._board.close()


def _forget_after(path: pathlib.Path, step: int) -> None:
    """Leaves out what a killed run logged beyond the checkpoint that it goes on from, as those steps come again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # the last line, where it was being written
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)
