"""The bench of a training step: that it counts what it says, and what its command leaves."""

import json

import jax
import numpy as np
import pytest
from test_bench import ALONE, run

from jstream.benchmarks import train
from jstream.training.compiled import foretold


def test_the_command_times_a_step_and_leaves_a_report(tmp_path):
    done = run("--mode=train", "--config=tests/smallest.py", "--steps=3", "--turns=6", f"--out={tmp_path}",
               "--config.mesh.data=2", "--config.mesh.fsdp=1", "--config.mesh.tensor=-1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["mode"] == "train" and found["stage"] == 1 and found["steps"] == 3
    assert found["machine"]["platform"] == "cpu" and found["machine"]["versions"]["jax"] == jax.__version__
    assert 0 < found["tokens"] <= 2 * 320 and 0 < found["frames"] <= 2 * 16 and found["dialogues"] >= 2
    assert 0 < found["step_median_ms"] <= found["step_p99_ms"] and found["flops_a_step"] > 1e6
    ratio = found["tokens_per_second"] / found["frames_per_second"]
    assert ratio == pytest.approx(found["tokens"] / found["frames"])
    assert found["mfu"] is None and found["floor_ms"] is None  # a CPU's peak is not known
    assert found["memory_foretold_gib"] > 0
    assert "tokens per second" in done.stdout and [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_step_is_counted_as_training_counts_it():
    step = train.Step(ALONE, 1, turns=8)
    step.begin()
    metrics = step()
    assert np.isfinite(float(metrics["loss"])) and int(step.state.step) == 1
    assert step.work.tokens == (step.batch["positions"] >= 0).sum()
    kernels = [x for path, x in step.state.trained.items() if path.startswith("decoder/") and path.endswith("kernel")]
    assert step.flops > 6 * step.work.tokens * sum(x.size for x in kernels)
    # params, the moments of the optimizer and the batch at least
    assert foretold(step.compiled) > sum(x.nbytes for x in jax.tree.leaves(step.state)) / jax.device_count()
