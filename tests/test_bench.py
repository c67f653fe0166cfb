"""The bench command reports what it measured, and says in one line what it cannot do. How fast it is, no test says."""

import dataclasses
import importlib.util
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from jstream.benchmarks import memory, peer, report, rows, synthetic, train, turn
from jstream.config import ConfigError, ObjectiveConfig, QwenVisionConfig, TrainConfig, from_dict
from jstream.data.dialogue import Dialogue, Query, Response, write_raw
from jstream.data.world import make_world
from jstream.data.world.write import write_video
from jstream.protocols.protocol import STATE
from tests.published_configs import published

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import smallest  # noqa: E402

CONFIG: TrainConfig = from_dict(TrainConfig, smallest.get_config().to_dict())
# one device: the tests have four
ALONE = dataclasses.replace(CONFIG, mesh=dataclasses.replace(CONFIG.mesh, data=2, fsdp=1, tensor=-1))


def run(*arguments):
    command = [sys.executable, "-m", "jstream.bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--mode=speed"], "expected --mode=train|rows|engine|longrun|frame|reply|peer|serve, found 'speed'"),
        (["--mode=peer", "--config=tests/smallest.py"], "expected a config of VideoLLM-online's make"),
        (["--mode=train"], "expected --config=FILE with stages"),
        (["--mode=train", "--config=tests/smallest.py", "--stage=2"], "expected one of the 2 stages"),
        (["--mode=rows", "--config=tests/smallest.py", "--dialogues=nowhere.json"], "nowhere.json"),
    ],
)
def test_what_cannot_be_is_an_error_of_one_line(arguments, line):
    done = run(*arguments)
    assert done.returncode == 1 and line in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize("kind", ["frame", "reply"])
def test_a_step_of_a_stream_is_timed_beside_its_floor(kind, monkeypatch):
    monkeypatch.setattr(turn, "measured_peaks", lambda: (1e9, 1e9))
    found = {figure.key: figure.value for figure in turn.measure(CONFIG, kind, slots=256, steps=5)}
    per_frame, decoder = CONFIG.model.vision.tokens_per_frame, CONFIG.model.decoder
    assert found["tokens"] == 1 if kind == "reply" else found["tokens"] > per_frame
    assert 256 - found["tokens"] - per_frame < found["cache_tokens"] <= 256 - found["tokens"]
    assert 0 < found["ms_median"] <= found["ms_p99"]
    a_token = 2 * 4 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim  # bytes of its keys and values
    assert found["bytes"] > (found["cache_tokens"] + found["tokens"]) * a_token
    assert found["floor_ms"] == pytest.approx(1e3 * max(found["bytes"], found["flops"]) / 1e9)
    assert found["fraction_of_floor"] == pytest.approx(found["floor_ms"] / found["ms_median"])
    with pytest.raises(ConfigError, match="room for two frames"):
        turn.measure(CONFIG, kind, slots=per_frame, steps=5)


@pytest.mark.parametrize("name", ["streamo", "videollm_online"])
def test_made_up_rows_are_full_of_whole_dialogues_with_valid_ids(name):
    config = train.with_steps(published(name), 0)
    vision = config.model.vision
    if isinstance(vision, QwenVisionConfig):
        vision = dataclasses.replace(vision, frame_height=56, frame_width=56)
    else:
        vision = dataclasses.replace(vision, image_size=32)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vision=vision))
    stage = dataclasses.replace(config.stages[0], rows=2, accumulate=1, frames=80, tokens=1200)
    batch, state_ids = synthetic.synthetic_batch(config, stage, turns=20)
    size, used = config.model.decoder.vocab_size, batch["positions"] >= 0
    text = used & ~batch["is_frame"]
    assert batch["tokens"][text].min() >= 0 and batch["tokens"][text].max() < size
    assert batch["tokens"][text].max() > size // 2  # from all of the vocabulary
    learned = batch["kinds"] > 0
    assert learned.any() and batch["labels"][learned].max() < size
    of_states = batch["labels"][batch["kinds"] == STATE]
    assert set(np.unique(of_states)) <= set(state_ids) and len(np.unique(of_states)) > 1
    frames = (batch["decisions"] >= 0).sum(axis=1)
    assert (batch["is_frame"].sum(axis=1) == frames * vision.tokens_per_frame).all()
    full = (frames == stage.frames) | (used.sum(axis=1) > 0.9 * stage.tokens)
    assert full.all() and (batch["first"].sum(axis=1) == -(-frames // 20)).all()


def test_made_up_rows_for_the_vision_tower_alone_have_frames_and_no_tokens():
    batch, _ = synthetic.synthetic_batch(CONFIG, CONFIG.stages[0], turns=4)
    assert batch["tokens"].shape == (2, 0) and batch["first"].sum() == 4 and (batch["decisions"] >= 0).sum() == 12
    assert batch["words"].any() and batch["frames"].std() > 50


def test_a_vocabulary_that_is_too_small_is_an_error():
    small = dataclasses.replace(CONFIG.model.decoder, vocab_size=600)
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, decoder=small))
    with pytest.raises(ConfigError, match="vocab_size: expected at least the 640"):
        synthetic.bundled_protocol(config)


def test_the_host_is_one_ahead_of_what_is_timed():
    told = []

    class Slow:
        def __init__(self, number):
            self.number = number

        def block_until_ready(self):
            told.append(("done", self.number))
            return self

    def dispatch():
        told.append(("begun", sum(what == "begun" for what, _ in told)))
        return Slow(told[-1][1])

    timing = report.timed(dispatch, 3)
    assert told == [("begun", 0), ("begun", 1), ("done", 0), ("begun", 2), ("done", 1), ("done", 2)]
    assert len(timing.each) == 3 and timing.whole == pytest.approx(sum(timing.each))


def test_the_peak_of_a_process_is_seen():
    peak = memory.ProcessPeak(counted=1 << 20)
    if not peak.known:
        pytest.skip("expected /proc/self/clear_refs, which Linux has")
    np.ones(64 << 17).sum()  # 64 MiB, gone again
    assert 60 << 20 < peak.bytes() < 120 << 20


def test_rows_of_videos_are_counted(tmp_path):
    world = make_world(3, 0)
    write_video(world, tmp_path / "a.mp4", 48)
    said = Dialogue("a.mp4", (Query("What happens?", 1.0),), (Response("something", 4.0),), "tsqa", "here")
    write_raw(tmp_path / "said.json", [said] * 4)
    found = {f.key: f.value for f in rows.measure(CONFIG, 1, str(tmp_path / "said.json"), 1, 2, step_ms=1e9)}
    assert found["rows"] == 2 and found["waiting_1_worker"] == 0
    frames = found["frames_per_second_1_worker"] / found["rows_per_second_1_worker"]
    assert 1 <= frames <= CONFIG.stages[1].frames


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": 0}, "expected one with tokens"),
        ({"remat": "dots"}, "expected --config.remat=none or layer"),
    ],
)
def test_what_the_peer_cannot_do_is_an_error(settings, message):
    number = settings.pop("stage", 1)
    with pytest.raises(ConfigError, match=message):
        peer.plain(dataclasses.replace(CONFIG, **settings), number)
    with pytest.raises(ConfigError, match="found a Qwen model"):
        peer.plain(published("streamo"), 0)


def test_a_stage_can_be_made_smaller_to_fit_a_device():
    stage = train.sized(published("videollm_online"), -1, rows=1, frames=0, tokens=4096).stages[0]
    assert (stage.rows, stage.accumulate, stage.frames, stage.tokens) == (1, 1, 1280, 4096)
    assert train.sized(CONFIG, 1, 0, 0, 0) == CONFIG


def test_the_peer_and_we_minimise_cross_entropy_alone():
    config = peer.plain(CONFIG, -1)
    assert config.stages == (dataclasses.replace(CONFIG.stages[1], objective=ObjectiveConfig("ce")),)
    assert config.optimizer == "adamw" and config.lora.dropout == 0


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is here")
@pytest.mark.may_skip("where the extra `parity` is installed")
def test_without_torch_the_peer_is_an_error_of_one_line():
    done = run("--mode=train", "--peer", "--config=tests/smallest.py", "--config.mesh.data=1")
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
