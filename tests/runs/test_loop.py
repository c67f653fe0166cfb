"""The loop of a run: it stops where it should, loses nothing, and goes on elsewhere as if nothing had happened."""

import dataclasses
import json
import os
import resource
import signal
import time

import jax
import numpy as np
import pytest
from test_training import CONFIG, STAGE, finish, protocol, start  # noqa: F401  (a fixture)

import jstream
from jstream.config import LoraConfig, MeshConfig, ObjectiveConfig, ProtocolConfig
from jstream.data.world.labels import WORDS
from jstream.data.world_rows import WorldRows
from jstream.protocols import make_protocol, make_tokenizer
from jstream.sharding import training_mesh
from jstream.train import world_texts
from jstream.training.loop import Loop, Stopped, TrainingError, place_state
from jstream.weights.checkpoint import CheckpointError

RUN = dataclasses.replace(
    CONFIG, stages=(dataclasses.replace(STAGE, rows=4, steps=8),), optimizer="adamw", save_every=2, keep=3
)


def loop_of(workdir, protocol, config=RUN, devices=1, rows=None, validation_rows=None):  # noqa: F811
    """A run in this process on so many devices, and its losses by step once it has run."""
    workdir.mkdir(exist_ok=True)
    mesh = training_mesh(MeshConfig(1, -1, 1), jax.devices()[:devices])
    rows = rows or [
        WorldRows(config.seed, stage, number, protocol, config.model.vision)
        for number, stage in enumerate(config.stages)
    ]
    with jax.set_mesh(mesh):
        state, frozen = place_state(config, mesh, len(WORDS))
    return Loop(config, workdir, mesh, protocol, rows, state, frozen, validation_rows)


def run(loop):
    with jax.set_mesh(loop.mesh):
        return loop.run()


def logged(workdir, key="loss"):
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record[key] for record in records if key in record}


class Rows:
    """Those of the world, and something that happens when the n-th one is made."""

    def __init__(self, rows, number, happens):
        self.rows, self.number, self.happens, self.made = rows, number, happens, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.made += 1
        if self.made == self.number:
            self.happens()
        return self.rows[index]

    def describe(self, index):
        return self.rows.describe(index)


@pytest.fixture(scope="module")
def whole(protocol, tmp_path_factory):  # noqa: F811
    """The losses of a run on one device that nothing happened to."""
    workdir = tmp_path_factory.mktemp("whole")
    run(loop_of(workdir, protocol))
    return logged(workdir)


def test_told_to_end_it_saves_at_once_and_goes_on_on_another_mesh(protocol, tmp_path, whole):  # noqa: F811
    rows = WorldRows(RUN.seed, RUN.stages[0], 0, protocol, RUN.model.vision)
    told = Rows(rows, 18, lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=r"stopped at step (\d), saved; the same command goes on"):
        run(loop_of(tmp_path / "run", protocol, rows=[told]))
    assert signal.getsignal(signal.SIGTERM) is before
    reached = max(logged(tmp_path / "run"))
    assert reached < 8 and str(reached) in os.listdir(tmp_path / "run" / "checkpoints")
    loop = loop_of(tmp_path / "run", protocol, devices=4)
    state = run(loop)
    assert any(x.sharding.shard_shape(x.shape) != x.shape for x in state.trained.values())
    assert sorted(logged(tmp_path / "run")) == list(range(1, 9))
    for step, loss in logged(tmp_path / "run").items():
        assert loss == pytest.approx(whole[step], abs=1e-5), step


def test_a_loss_that_is_no_number_stops_with_the_step_and_what_was_in_it(protocol, tmp_path):  # noqa: F811
    class Broken(Rows):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            return (
                row if self.made <= 12 else row | {"labels": row["labels"] + 1_000_000}
            )  # none has such a probability

    broken = Broken(WorldRows(RUN.seed, RUN.stages[0], 0, protocol, RUN.model.vision), 0, None)
    with pytest.raises(TrainingError, match=r"step 4: the loss is nan, .* world row \d+ of stage 0; world row"):
        run(loop_of(tmp_path / "run", protocol, rows=[broken]))
    assert [name for name in os.listdir(tmp_path / "run" / "checkpoints") if name.isdigit()] == ["2"]
    assert max(logged(tmp_path / "run")) == 3


def test_a_full_disk_stops_in_one_line_and_leaves_the_last_good_checkpoint(protocol, tmp_path, whole):  # noqa: F811
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    rows = WorldRows(RUN.seed, RUN.stages[0], 0, protocol, RUN.model.vision)
    fill = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # no file can grow beyond it
    try:
        with pytest.raises(CheckpointError, match="could not be written .* goes on from an earlier one") as told:
            run(loop_of(tmp_path / "run", protocol, rows=[Rows(rows, 26, fill)]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(told.value)
    run(loop_of(tmp_path / "run", protocol))
    assert logged(tmp_path / "run") == pytest.approx(whole, abs=1e-6)


def test_the_best_checkpoint_of_a_validation_is_kept_beside_the_newest(protocol, tmp_path):  # noqa: F811
    config = dataclasses.replace(RUN, keep=1, save_every=2, validate_every=2, validation_rows=4, best="ppl")
    stage = dataclasses.replace(RUN.stages[0], objective=ObjectiveConfig())
    others = WorldRows(99, stage, 0, protocol, RUN.model.vision)
    run(loop_of(tmp_path / "run", protocol, config, validation_rows=others))
    found = logged(tmp_path / "run", "validation/ppl")
    assert sorted(found) == [2, 4, 6, 8] and len(set(found.values())) == 4
    best = min(found, key=found.get)
    assert {int(name) for name in os.listdir(tmp_path / "run" / "checkpoints") if name.isdigit()} == {best, 8}


def test_live_is_learned_with_adapters(tmp_path):
    """Another protocol, the published form of its objective, the decoder frozen."""
    language = ProtocolConfig(
        name="live", system="Watch.", system_open="<|begin|>", system_close="\n", user_open="\nUser:", user_close="",
        assistant_open="\nAssistant:", assistant_close="<|end|>", frame_open="\n[", frame_close="]",
        frame_token="<|frame|>", frame_interval=",",
    )  # fmt: skip
    vocab_size = CONFIG.model.decoder.vocab_size
    live = make_protocol(
        language, make_tokenizer(language, world_texts(0), vocab_size), CONFIG.model.vision.tokens_per_frame
    )
    stage = dataclasses.replace(
        STAGE, rows=4, steps=30, learning_rate=5e-2, objective=ObjectiveConfig("live", silence=0.5),
        freeze=("vision/.*", "decoder/.*"),
    )  # fmt: skip
    config = dataclasses.replace(
        RUN, protocol=language, stages=(stage,), lora=LoraConfig(rank=4, alpha=8.0, modules=("v_proj", "down_proj")),
        save_every=30, validate_every=30, validation_rows=4,
    )  # fmt: skip
    others = WorldRows(99, stage, 0, live, CONFIG.model.vision)
    state = run(loop_of(tmp_path / "run", live, config, validation_rows=others))
    assert {path.split("/")[0] for path in state.trained} == {"lora", "projector"}
    losses = logged(tmp_path / "run")
    mean = lambda first: np.mean([losses[step] for step in range(first, first + 10)])
    assert mean(21) < 0.99 * mean(1)
    assert 0 < logged(tmp_path / "run", "validation/state_accuracy")[30] <= 1


def test_a_run_killed_while_it_saves_goes_on_to_the_same_losses(tmp_path):
    finish(start(tmp_path / "whole"))
    want = logged(tmp_path / "whole")
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
    assert max(logged(tmp_path / "killed"), default=0) < 12
    finish(start(tmp_path / "killed"))
    assert logged(tmp_path / "killed") == want

    model = jstream.load(tmp_path / "killed" / "model")
    other = jstream.load(tmp_path / "whole" / "model")
    same = jax.tree.map(lambda a, b: bool((a == b).all()), model.params, other.params)
    assert all(jax.tree.leaves(same))
    assert list((tmp_path / "whole").glob("events.out.tfevents*"))


def test_a_run_leaves_a_model_that_opens_and_a_line_a_step(tmp_path):
    traced = ("--profile=5:6", "--config.validate_every=4", "--config.validation_rows=2")
    out = finish(start(tmp_path / "run", *traced))
    assert f"done: {tmp_path / 'run' / 'model'}" in out
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 13)) and all("loss" in r for r in records)
    assert [r["step"] for r in records if "validation/state_accuracy" in r] == [4, 8, 12]
    model = jstream.load(tmp_path / "run" / "model")
    assert model.config == CONFIG.model
    assert list((tmp_path / "run").glob("events.out.tfevents*"))
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert trace.read_bytes().count(b"jit_train_step") > 0  # two steps, of twelve
