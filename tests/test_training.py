"""Training: it learns, what is frozen stays, and a run that is killed goes on as if nothing had happened."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import jstream
from jstream import train
from jstream.config import ConfigError, ObjectiveConfig, StageConfig, TrainConfig, from_dict
from jstream.data import pipeline, world
from jstream.data.dialogue import Dialogue, Query, Response, write_raw
from jstream.data.world.labels import WORDS
from jstream.data.world.write import write_video
from jstream.models.rope import packed_rope_positions, rope_positions
from jstream.protocols import make_tokenizer
from jstream.protocols.streamo import Streamo, turns_of
from jstream.training.optimizer import make_optimizer, stage_schedule
from jstream.training.step import batch_loss, init_state, train_step

TESTS = pathlib.Path(__file__).parent
sys.path.insert(0, str(TESTS))
import smallest  # noqa: E402

CONFIG: TrainConfig = from_dict(TrainConfig, smallest.get_config().to_dict())
STAGE = CONFIG.stages[1]


@pytest.fixture(scope="module")
def protocol() -> Streamo:
    tokenizer = make_tokenizer(CONFIG.protocol, train.world_texts(CONFIG.seed), CONFIG.model.decoder.vocab_size)
    return Streamo(CONFIG.protocol, tokenizer, CONFIG.model.vision.tokens_per_frame)


@pytest.fixture(scope="module")
def batch(protocol):
    rows = pipeline.WorldRows(CONFIG.seed, STAGE, 1, protocol, CONFIG.model.vision)
    return next(pipeline.batches(rows, STAGE.rows, CONFIG.seed, workers=0))


def test_multimodal_positions_of_packed_rows_are_those_of_the_live_stream(protocol):
    stage = dataclasses.replace(STAGE, frames=32, tokens=640)
    rows = pipeline.WorldRows(2, stage, 1, protocol, CONFIG.model.vision)
    made = [rows._dialogue(world.make_world(2, i, world.WorldConfig(10, 12)), world.generator(i)) for i in range(2)]
    row = pipeline.lay_row(made, stage, CONFIG.model.vision)
    for multimodal in (False, True):
        packed = packed_rope_positions(row["is_frame"][None], row["positions"][None], (1, 5), multimodal)[:, 0]
        for segment in range(2):
            tokens = row["segments"] == segment
            alone, _ = rope_positions(row["is_frame"][tokens], (1, 5), multimodal)
            np.testing.assert_array_equal(packed[:, tokens], alone)


def run_steps(batch, protocol, steps, config=CONFIG, stage=STAGE):
    optimizer = make_optimizer(config)
    state = init_state(config.model, optimizer, jax.random.key(0), len(WORDS))
    first, history = jax.tree.map(np.asarray, state.params), []
    for _ in range(steps):
        state, metrics = train_step(
            state, batch, config=config.model, objective=stage.objective, state_ids=protocol.state_ids,
            optimizer=optimizer, train_vision=stage.train_vision,
        )  # fmt: skip
        history.append(float(metrics["loss"]))
    return first, state, history


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loss_goes_down_on_a_fixed_batch(batch, protocol, optimizer):
    config = dataclasses.replace(
        CONFIG, optimizer=optimizer, stages=(dataclasses.replace(STAGE, steps=1000, learning_rate=3e-3),)
    )
    _, _, history = run_steps(batch, protocol, 60, config)
    assert np.mean(history[-5:]) < 0.5 * np.mean(history[:3])


def test_a_frozen_vision_tower_does_not_move_bit_for_bit(batch, protocol):
    stage = dataclasses.replace(STAGE, train_vision=False)
    first, state, _ = run_steps(batch, protocol, 3, stage=stage)
    same = lambda part: jax.tree.map(
        lambda a, b: bool(np.array_equal(a, b)), first["model"][part], state.params["model"][part]
    )
    assert all(jax.tree.leaves(same("vision")))
    assert not any(jax.tree.leaves(same("projector")))


def test_packing_changes_no_dialogues_loss(protocol):
    """Two dialogues in one row weigh in the loss as each does in a row of its own."""
    stage = StageConfig(
        steps=1, rows=1, frames=32, tokens=800, min_seconds=10, max_seconds=14, objective=ObjectiveConfig(states="ce")
    )
    rows = pipeline.WorldRows(1, stage, 1, protocol, CONFIG.model.vision)
    samples = [rows._dialogue(world.make_world(1, i, world.WorldConfig(10, 14)), world.generator(i)) for i in range(2)]
    params = init_state(CONFIG.model, make_optimizer(CONFIG), jax.random.key(0), len(WORDS)).params
    stacked = lambda samples: {
        k: v[None] for k, v in pipeline.lay_row(samples, stage, CONFIG.model.vision, rows.vocabulary).items()
    }

    def loss_and_count(samples):
        made = stacked(samples)
        loss, _ = batch_loss(params, made, CONFIG.model, stage.objective, protocol.state_ids)
        return float(loss), int((made["kinds"] > 0).sum())

    (a, n), (b, m), (both, total) = loss_and_count(samples[:1]), loss_and_count(samples[1:]), loss_and_count(samples)
    assert total == n + m
    assert both == pytest.approx((a * n + b * m) / (n + m), abs=1e-5)


def test_a_dialogue_that_does_not_fit_is_cut_behind_a_whole_turn(protocol):
    dialogue = Dialogue("", (Query("Narrate what happens.", 1),), (Response("The red circle jumps.", time=3),))
    rendering = protocol.render(turns_of(dialogue, 10))
    sample = pipeline.Sample(rendering, np.zeros((10, 24, 24, 3), np.uint8))
    for tokens in range(20, len(rendering.tokens) + 1):
        row = pipeline.lay_row([sample], dataclasses.replace(STAGE, frames=16, tokens=tokens), CONFIG.model.vision)
        used, turns = int((row["positions"] >= 0).sum()), int((row["decisions"] >= 0).sum())
        assert used <= tokens
        assert row["is_frame"].sum() == turns * protocol.tokens_per_frame  # no placeholder without its frame
        assert (row["kinds"] == 2).sum() == turns
        assert used == (rendering.ends[turns - 1] if turns else 0)
        assert turns == 10 or rendering.ends[turns] > tokens


def test_rows_are_the_same_however_often_they_are_made(protocol):
    rows = [pipeline.WorldRows(1, STAGE, 1, protocol, CONFIG.model.vision)[5] for _ in range(2)]
    assert all(np.array_equal(rows[0][name], rows[1][name]) for name in rows[0])
    other = pipeline.WorldRows(2, STAGE, 1, protocol, CONFIG.model.vision)[5]
    assert not np.array_equal(rows[0]["frames"], other["frames"])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_iterator_goes_on_at_the_exact_next_batch(protocol, workers):
    rows = pipeline.WorldRows(CONFIG.seed, STAGE, 1, protocol, CONFIG.model.vision)
    whole = pipeline.batches(rows, 2, 0, workers)
    for _ in range(2):
        next(whole)
    saved = json.loads(json.dumps(whole.get_state()))  # what a checkpoint keeps
    want = [next(whole)["tokens"] for _ in range(3)]
    again = pipeline.batches(rows, 2, 0, workers)
    again.set_state(saved)
    for tokens in want:
        np.testing.assert_array_equal(next(again)["tokens"], tokens)
    whole.close()
    again.close()


def test_real_videos_are_decoded_into_rows_and_a_missing_one_is_left_out(protocol, tmp_path, caplog):
    made = world.make_world(9, 0, world.WorldConfig(12, 12))
    write_video(made, tmp_path / "a.mp4", 48, 8, 16)
    dialogue = dataclasses.replace(world.make_dialogue(made, "narration", world.generator(1), "a.mp4"), duration=12.0)
    undated = dataclasses.replace(dialogue, duration=None)
    missing = dataclasses.replace(dialogue, video="missing.mp4")
    write_raw(tmp_path / "d.jsonl", [dialogue, missing, undated])
    stage = dataclasses.replace(STAGE, frames=36, tokens=960)
    rows = pipeline.VideoRows(tmp_path / "d.jsonl", stage, protocol, CONFIG.model.vision)
    assert len(rows) == 1
    row = rows[0]
    assert (row["decisions"] >= 0).sum() == 24 and row["first"].sum() == 2
    assert "missing.mp4" in caplog.text
    rendered = world.Renderer(made, 48)
    shown = np.stack([rendered(float(t)) for t in range(12)]).reshape(12, 24, 2, 24, 2, 3).mean((2, 4))
    assert np.abs(row["frames"][:12].astype(float) - shown).mean() < 8


def test_the_schedule_warms_up_stays_and_falls_in_every_stage():
    config = dataclasses.replace(
        CONFIG, warmup=10, stages=(
            dataclasses.replace(STAGE, steps=100, learning_rate=1.0, decay=0.5, final_rate=0.1),
            dataclasses.replace(STAGE, steps=50, learning_rate=0.5),
        ),
    )  # fmt: skip
    rate = stage_schedule(config)
    values = [float(rate(step)) for step in (0, 10, 49, 75, 99, 100, 110, 149)]
    np.testing.assert_allclose(values, [0.1, 1, 1, 0.55, 0.118, 0.05, 0.5, 0.5], atol=0.02)


# ------------------------------------------------------------------------------------------------- runs that are killed


def start(workdir, *flags):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(TESTS.parent),
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),  # the runs of a test have the same programs
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    command = [
        sys.executable,
        "-m",
        "jstream.train",
        f"--config={TESTS / 'smallest.py'}",
        f"--workdir={workdir}",
        *flags,
    ]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process) -> str:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    return out


def test_another_config_does_not_go_on_in_the_same_folder(tmp_path):
    train.keep_config(tmp_path / "config.json", CONFIG)
    train.keep_config(tmp_path / "config.json", CONFIG)
    with pytest.raises(ConfigError, match='has "seed": 3, not "seed": 4'):
        train.keep_config(tmp_path / "config.json", dataclasses.replace(CONFIG, seed=4))


def losses(workdir) -> dict[int, float]:
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def test_a_run_killed_while_it_saves_goes_on_to_the_same_losses(tmp_path):
    finish(start(tmp_path / "whole"))
    want = losses(tmp_path / "whole")
    assert sorted(want) == list(range(1, 13))

    killed = start(tmp_path / "killed")
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.time() + 200
    while time.time() < deadline and killed.poll() is None:  # a second save is under way: the first is committed
        names = [path.name for path in checkpoints.glob("*")] if checkpoints.exists() else []
        if any(name.isdigit() for name in names) and any("tmp" in name for name in names):
            break
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert max(losses(tmp_path / "killed"), default=0) < 12
    finish(start(tmp_path / "killed"))
    assert losses(tmp_path / "killed") == want

    model = jstream.load(tmp_path / "killed" / "model")
    other = jstream.load(tmp_path / "whole" / "model")
    same = jax.tree.map(lambda a, b: bool((a == b).all()), model.params, other.params)
    assert all(jax.tree.leaves(same))
    assert list((tmp_path / "whole").glob("events.out.tfevents*"))


WRONG_FLAGS = {
    "--config.modle.vision.width=3": "model",
    "--config.seed=many": "seed",
    "--no_such_flag=1": "no_such_flag",
    "--config.optimizer=sgd": "expected adamw or muon",
    "--config.save_every=0": "save_every",
    "--config.model.decoder.vocab_size=300": "vocab_size",
    "--config=missing.py": "missing.py",
}


def test_a_wrong_flag_is_one_line(tmp_path):
    started = {flag: start(tmp_path / f"run{i}", flag) for i, flag in enumerate(WRONG_FLAGS)}  # side by side
    for flag, process in started.items():
        out, _ = process.communicate(timeout=240)
        assert process.returncode != 0, flag
        lines = [line for line in out.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("error: ") and WRONG_FLAGS[flag] in lines[0], (flag, out)
    assert not list(tmp_path.glob("run*/model"))
