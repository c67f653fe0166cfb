"""Several processes learn what one does, whatever becomes of them on the way."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
CONFIG = TESTS / "runs" / "four_rows.py"
STEPS = 120


def environment(tmp_path, **more) -> dict[str, str]:
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_backend_optimization_level=1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        **more,
    }


def one(tmp_path, workdir, devices=4, *flags):
    """One process of so many devices."""
    command = [sys.executable, "-m", "jstream.train", f"--config={CONFIG}", f"--workdir={workdir}", *flags]
    return subprocess.run(
        command,
        env=environment(tmp_path, JAX_NUM_CPU_DEVICES=str(devices)),
        capture_output=True,
        text=True,
        timeout=600,
    )


def two(tmp_path, workdir, *flags, restarts=0):
    """Two processes of two devices, under the launcher."""
    command = [sys.executable, str(ROOT / "launch" / "local.py"), "--processes=2", "--devices=2"]
    command += [f"--restarts={restarts}", "--", f"--config={CONFIG}", f"--workdir={workdir}", *flags]
    return subprocess.Popen(
        command, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def lines(workdir, key) -> dict[int, float]:
    records = map(json.loads, (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record[key] for record in records if key in record}


def same(found, want, tolerance):
    assert sorted(found) == sorted(want)
    for step, value in want.items():
        assert found[step] == pytest.approx(value, abs=tolerance), step


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of one process with four devices that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs")
    done = one(folder, folder / "whole", 4, "--config.keep=100")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(lines(folder / "whole", "loss")) == list(range(1, STEPS + 1))
    return folder


@pytest.fixture(scope="module")
def pair(whole):
    """The same in two processes."""
    process = two(whole, whole / "pair")
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    return whole / "pair"


def test_two_processes_learn_what_one_does(whole, pair):
    same(lines(pair, "loss"), lines(whole / "whole", "loss"), 1e-5)
    for metric in ("state_accuracy", "reply_f1", "time_diff", "ppl"):
        name = f"validation/{metric}"
        found, want = lines(pair, name), lines(whole / "whole", name)
        assert want
        same(found, want, 1e-3 * max(want.values()))


def processes_of(workdir) -> list[int]:
    found = subprocess.run(["pgrep", "-f", f"jstream.train.*--workdir={workdir}$"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def test_a_run_whose_processes_are_killed_ten_times_ends_with_the_same_losses(whole, pair):
    """SIGKILL of either process, three times while starting and seven at a random instant of training."""
    rng, workdir = random.Random(5), whole / "killed"
    launcher = two(whole, workdir, restarts=10)
    log, seen = workdir / "metrics.jsonl", set()
    size = lambda: log.stat().st_size if log.exists() else 0
    for kill in range(10):
        while len(running := [pid for pid in processes_of(workdir) if pid not in seen]) < 2:
            assert launcher.poll() is None, launcher.communicate()[0]
            time.sleep(0.02)
        seen.update(running)
        if kill % 3 == 0:
            time.sleep(rng.uniform(0, 6))
        else:  # this start has learned something, how much and whether it is saved is left to chance
            before, start = size(), time.monotonic()
            while size() <= before and launcher.poll() is None and time.monotonic() < start + 120:
                before = min(before, size())  # what was logged beyond the checkpoint is forgotten first
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 1))
        os.kill(rng.choice(running), signal.SIGKILL)
    out, _ = launcher.communicate(timeout=600)
    assert launcher.returncode == 0, out
    same(lines(workdir, "loss"), lines(pair, "loss"), 1e-5)
    assert len(log.read_text().splitlines()) == STEPS


def test_told_to_end_all_processes_save_and_the_same_command_goes_on(whole, pair):
    workdir = whole / "told"
    launcher = two(whole, workdir)
    deadline = time.monotonic() + 300
    log = workdir / "metrics.jsonl"
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) >= 5):
        time.sleep(0.02)
    launcher.send_signal(signal.SIGTERM)
    out, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == 143, out
    reached = max(lines(workdir, "loss"))
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    assert saved >= reached and f"stopped at step {saved}, saved" in out
    launcher = two(whole, workdir)
    out, _ = launcher.communicate(timeout=600)
    assert launcher.returncode == 0, out
    same(lines(workdir, "loss"), lines(pair, "loss"), 1e-5)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_checkpoint_of_four_devices_goes_on_on_others(whole, devices, tmp_path):
    """The first half on four devices, the second on others: the losses are those of four."""
    workdir = tmp_path / "run"
    shutil.copytree(whole / "whole", workdir)
    (workdir / "metrics.jsonl").unlink()
    for path in (workdir / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > STEPS // 2:
            shutil.rmtree(path)
    done = one(whole, workdir, devices, "--config.mesh.data=1")
    assert done.returncode == 0, done.stdout + done.stderr
    found, want = lines(workdir, "loss"), lines(whole / "whole", "loss")
    assert found and max(found) == STEPS
    same(found, {step: want[step] for step in found}, 1e-5)
