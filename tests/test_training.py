"""Training: it learns, what is frozen stays, and a run that is killed goes on as if nothing had happened."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jstream import train
from jstream.config import (
    ConfigError,
    LoraConfig,
    MeshConfig,
    ObjectiveConfig,
    StageConfig,
    TrainConfig,
    WeightsConfig,
    from_dict,
)
from jstream.data import world
from jstream.data.batches import batches
from jstream.data.dialogue import Dialogue, Query, Response, write_raw
from jstream.data.rows import Sample, lay_row
from jstream.data.video_rows import VideoRows
from jstream.data.world.labels import WORDS
from jstream.data.world.write import write_video
from jstream.data.world_rows import WorldRows
from jstream.model import Model
from jstream.models.rope import packed_rope_positions, rope_positions
from jstream.models.video_lm import init_params
from jstream.protocols import make_tokenizer
from jstream.protocols.streamo import Streamo, turns_of
from jstream.sharding import training_mesh
from jstream.training import lora
from jstream.training.flops import forward_flops, step_flops
from jstream.training.loop import check_rows, place_state
from jstream.training.optimizer import stage_schedule
from jstream.training.step import (
    batch_loss,
    make_train_step,
    prepare,
    with_weights,
)
from jstream.weights.checkpoint import save_model
from jstream.weights.hf import flat
from jstream.weights.peft import write_adapter

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
    rows = WorldRows(CONFIG.seed, STAGE, 1, protocol, CONFIG.model.vision)
    return next(batches(rows, STAGE.rows, CONFIG.seed, workers=0))


def test_multimodal_positions_of_packed_rows_are_those_of_the_live_stream(protocol):
    stage = dataclasses.replace(STAGE, frames=32, tokens=640)
    rows = WorldRows(2, stage, 1, protocol, CONFIG.model.vision)
    made = [rows._dialogue(world.make_world(2, i, world.WorldConfig(10, 12)), world.generator(i)) for i in range(2)]
    row = lay_row(made, stage, CONFIG.model.vision)
    for multimodal in (False, True):
        packed = packed_rope_positions(row["is_frame"][None], row["positions"][None], (1, 5), multimodal)[:, 0]
        for segment in range(2):
            tokens = row["segments"] == segment
            alone, _ = rope_positions(row["is_frame"][tokens], (1, 5), multimodal)
            np.testing.assert_array_equal(packed[:, tokens], alone)


def run_steps(batch, protocol, steps, stage=STAGE, **settings):
    """Trains one stage on one batch: the params at first, those after it, and the losses."""
    config = dataclasses.replace(CONFIG, stages=(stage,), **settings)
    state, frozen = jax.jit(lambda: prepare(config, jax.random.key(0), len(WORDS)))()
    step = make_train_step(config, stage, protocol.decision_ids)
    first, history = jax.tree.map(np.asarray, state.trained | frozen), []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        history.append(float(metrics["loss"]))
    return first, jax.tree.map(np.asarray, state.trained | frozen), history


@pytest.mark.parametrize("optimizer", ["adamw"])  # tests/runs/test_ways.py has the others
def test_the_loss_goes_down_on_a_fixed_batch(batch, protocol, optimizer):
    stage = dataclasses.replace(STAGE, steps=1000, learning_rate=3e-3)
    _, _, history = run_steps(batch, protocol, 60, stage, optimizer=optimizer)
    assert np.mean(history[-5:]) < 0.5 * np.mean(history[:3])


@pytest.mark.parametrize("always", [True])  # tests/runs/test_ways.py has the other
def test_frozen_params_do_not_move_bit_for_bit(batch, protocol, always):
    """Neither those that no stage trains nor those that another stage does; weight decay and momentum included."""
    frozen = dataclasses.replace(STAGE, freeze=("vision/.*", "decoder/layers_0/mlp/.*"))
    config = dataclasses.replace(CONFIG, optimizer="adamw", stages=(frozen,) if always else (STAGE, frozen))
    state, apart = jax.jit(lambda: prepare(config, jax.random.key(0), len(WORDS)))()
    assert bool(apart) == always and not any(path.startswith("vision/") for path in state.trained) == always
    if not always:  # the optimizer remembers where they went
        state, _ = make_train_step(config, STAGE, protocol.decision_ids)(state, apart, batch)
    first = jax.tree.map(np.asarray, state.trained | apart)
    step = make_train_step(config, frozen, protocol.decision_ids)
    for _ in range(3):
        state, _ = step(state, apart, batch)
    still = {path for path, x in (state.trained | apart).items() if np.array_equal(first[path], x)}
    wanted = {path for path in first if path.startswith(("vision/", "decoder/layers_0/mlp/"))}
    assert wanted and still == wanted


def shapes_of(config):
    """What `prepare` makes, without making it."""
    return jax.eval_shape(lambda: prepare(config, jax.random.key(0), len(WORDS)))


def test_a_pattern_that_freezes_nothing_is_an_error():
    config = dataclasses.replace(CONFIG, stages=(dataclasses.replace(STAGE, freeze=("visoin/.*",)),))
    with pytest.raises(ConfigError, match="'visoin/.*' fits no param"):
        shapes_of(config)


# ------------------------------------------------------------------------------------------------------------ adapters

LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.0, modules=("q_proj", "v_proj", "o_proj", "down_proj"))
ADAPTED = dataclasses.replace(STAGE, freeze=("vision/.*", "decoder/.*"), objective=ObjectiveConfig())


def test_adapters_learn_and_all_else_that_is_frozen_stays(batch, protocol):
    first, after, history = run_steps(
        batch, protocol, 30, dataclasses.replace(ADAPTED, learning_rate=1e-2), lora=LORA, optimizer="adamw"
    )
    assert history[-1] < history[0]
    moved = {path.split("/")[0] for path in first if not np.array_equal(first[path], after[path])}
    assert moved == {"lora", "projector"}
    assert len([path for path in first if path.startswith("lora/")]) == 2 * 4


def test_merged_adapters_say_what_applied_ones_do(batch, protocol):
    """And adapters that have not learned change nothing."""
    config = dataclasses.replace(CONFIG, stages=(ADAPTED,), lora=LORA)
    state, frozen = jax.jit(lambda: prepare(config, jax.random.key(0), len(WORDS)))()
    whole = with_weights(batch, ADAPTED, protocol.decision_ids)
    of = jax.jit(lambda trained, frozen: batch_loss(trained, frozen, whole, config, ADAPTED)[0])
    loss = lambda trained, frozen: float(of(trained, frozen))
    plain = loss({}, {path: x for path, x in (state.trained | frozen).items() if not path.startswith("lora/")})
    assert loss(state.trained, frozen) == pytest.approx(plain, abs=1e-6)
    rng = np.random.default_rng(0)
    learned = {
        path: x + 0.1 * rng.normal(size=x.shape).astype(np.float32) if path.startswith("lora/") else x
        for path, x in state.trained.items()
    }
    applied = loss(learned, frozen)
    merged = lora.merge(lora_free := {p: x for p, x in (learned | frozen).items() if p[:5] != "lora/"}, learned, LORA)
    assert applied != pytest.approx(plain, abs=1e-3)
    assert loss({}, merged) == pytest.approx(applied, abs=1e-5)
    assert merged.keys() == lora_free.keys()


def test_adapters_are_written_also_beside_a_tower_that_has_no_published_form(tmp_path):
    config = dataclasses.replace(CONFIG, stages=(ADAPTED,), lora=LORA)
    assert config.model.vision.stem_width and config.model.vision.temporal_patch_size == 2
    state, _ = jax.jit(lambda: prepare(config, jax.random.key(0), len(WORDS)))()
    write_adapter(tmp_path / "adapter", config.model, state.trained, LORA, "base")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum("lora_A" in name for name in tensors) == sum(path.endswith("/a") for path in state.trained) > 0
    assert any("connector" in name for name in tensors) and not any("vision" in name for name in tensors)


def test_adapters_are_written_also_beside_a_connector_that_has_no_published_form(tmp_path):
    """As beside the bundled model's, which has an embedding of each place, and which they leave as it is."""
    vision = dataclasses.replace(CONFIG.model.vision, token_positions=True)
    stage = dataclasses.replace(ADAPTED, freeze=(*ADAPTED.freeze, "projector/.*"))
    config = dataclasses.replace(
        CONFIG, stages=(stage,), lora=LORA, model=dataclasses.replace(CONFIG.model, vision=vision)
    )
    state, frozen = jax.jit(lambda: prepare(config, jax.random.key(0), len(WORDS)))()
    assert "projector/token_positions" in frozen
    write_adapter(tmp_path / "adapter", config.model, state.trained, LORA, "base")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors and all("lora_" in name for name in tensors)


def test_dropout_acts_on_adapters_and_differs_from_step_to_step(batch, protocol):
    config = dataclasses.replace(CONFIG, stages=(ADAPTED,), lora=dataclasses.replace(LORA, dropout=0.5))
    state, frozen = jax.jit(lambda: prepare(config, jax.random.key(0), len(WORDS)))()
    learned = {path: x + 0.1 if path.endswith("/b") else x for path, x in state.trained.items()}
    whole = with_weights(batch, ADAPTED, protocol.decision_ids)
    of = jax.jit(lambda key: batch_loss(learned, frozen, whole, config, ADAPTED, key)[0])
    loss = lambda key: float(of(key))
    keys = jax.random.split(jax.random.key(1), 2)
    assert len({loss(None), loss(keys[0]), loss(keys[1])}) == 3 and loss(keys[0]) == loss(keys[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": dataclasses.replace(LORA, modules=("q_porj",))}, "expected some of .*q_proj.*, found 'q_porj'"),
        ({"stages": (STAGE,), "lora": LORA}, "expected decoder/.* to be frozen, as it has an adapter"),
    ],
)
def test_adapters_that_cannot_be_are_an_error(settings, message):
    config = dataclasses.replace(CONFIG, **{"stages": (ADAPTED,), **settings})
    with pytest.raises(ConfigError, match=message):
        shapes_of(config)


def test_packing_changes_no_dialogues_loss(protocol):
    """Two dialogues in one row weigh in the loss as each does in a row of its own."""
    stage = StageConfig(
        steps=1, rows=1, frames=32, tokens=800, min_seconds=10, max_seconds=14, objective=ObjectiveConfig(states="ce")
    )
    rows = WorldRows(1, stage, 1, protocol, CONFIG.model.vision)
    samples = [rows._dialogue(world.make_world(1, i, world.WorldConfig(10, 14)), world.generator(i)) for i in range(2)]
    config = dataclasses.replace(CONFIG, stages=(stage,))
    state, frozen = jax.jit(lambda: prepare(config, jax.random.key(0), len(WORDS)))()
    stacked = lambda samples: {
        k: v[None] for k, v in lay_row(samples, stage, CONFIG.model.vision, rows.vocabulary).items()
    }

    def loss_and_count(samples):
        made = with_weights(stacked(samples), stage, protocol.decision_ids)
        loss, _ = jax.jit(lambda made: batch_loss(state.trained, frozen, made, config, stage))(made)
        return float(loss), int((made["kinds"] > 0).sum())

    (a, n), (b, m), (both, total) = loss_and_count(samples[:1]), loss_and_count(samples[1:]), loss_and_count(samples)
    assert total == n + m
    assert both == pytest.approx((a * n + b * m) / (n + m), abs=1e-5)


def test_a_dialogue_that_does_not_fit_is_cut_behind_a_whole_turn(protocol):
    dialogue = Dialogue("", (Query("Narrate what happens.", 1),), (Response("The red circle jumps.", time=3),))
    rendering = protocol.render(turns_of(dialogue, 10))
    sample = Sample(rendering, np.zeros((10, 24, 24, 3), np.uint8))
    for tokens in range(20, len(rendering.tokens) + 1):
        row = lay_row([sample], dataclasses.replace(STAGE, frames=16, tokens=tokens), CONFIG.model.vision)
        used, turns = int((row["positions"] >= 0).sum()), int((row["decisions"] >= 0).sum())
        assert used <= tokens
        assert row["is_frame"].sum() == turns * protocol.tokens_per_frame  # no placeholder without its frame
        assert (row["kinds"] == 2).sum() == turns
        assert used == (rendering.ends[turns - 1] if turns else 0)
        assert turns == 10 or rendering.ends[turns] > tokens


def test_rows_are_the_same_however_often_they_are_made(protocol):
    rows = [WorldRows(1, STAGE, 1, protocol, CONFIG.model.vision)[5] for _ in range(2)]
    assert all(np.array_equal(rows[0][name], rows[1][name]) for name in rows[0])
    other = WorldRows(2, STAGE, 1, protocol, CONFIG.model.vision)[5]
    assert not np.array_equal(rows[0]["frames"], other["frames"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_is_a_function_of_its_number_for_every_process(protocol, workers):
    rows = WorldRows(CONFIG.seed, STAGE, 1, protocol, CONFIG.model.vision)
    whole = batches(rows, 2, 0, workers)
    want = [next(whole) for _ in range(5)]
    again = batches(rows, 2, 0, workers, first=2, own=[1])
    for batch in want[2:]:
        for name, value in next(again).items():
            np.testing.assert_array_equal(value, batch[name][1:], name)
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
    rows = VideoRows(tmp_path / "d.jsonl", stage, protocol, CONFIG.model.vision)
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


def test_a_run_starts_from_a_model(protocol, tmp_path):
    params = jax.jit(init_params, static_argnums=0)(CONFIG.model, jax.random.key(7))
    save_model(tmp_path / "model", CONFIG.model, protocol.config, protocol.tokenizer, params, dtype=None)
    config = dataclasses.replace(CONFIG, weights=WeightsConfig(checkpoint=str(tmp_path / "model")))
    mesh = training_mesh(MeshConfig(), jax.devices()[:2])
    model = train.starting_model(config, mesh)
    state, _ = place_state(config, mesh, len(WORDS), flat(model.params))
    for path, x in flat(params).items():
        np.testing.assert_array_equal(state.trained[path], x)
    narrow = dataclasses.replace(config.model, decoder=dataclasses.replace(config.model.decoder, mlp_dim=16))
    with pytest.raises(ConfigError, match="model.decoder.mlp_dim: expected that of the weights, 32, found 16"):
        train.starting_model(dataclasses.replace(config, model=narrow), mesh)
    assert train.starting_model(CONFIG, mesh) is None


def test_what_is_to_start_fresh_is_not_taken_over(protocol):
    model = Model(CONFIG.model, jax.jit(init_params, static_argnums=0)(CONFIG.model, jax.random.key(7)), protocol)
    before = {path: np.asarray(x) for path, x in flat(model.params).items()}
    mesh = training_mesh(MeshConfig(), jax.devices()[:1])
    given = train.given_params(model, (r"decoder/layers_\d+/.*kernel",))
    state, _ = place_state(CONFIG, mesh, len(WORDS), given)
    fresh = {path for path, x in before.items() if not np.array_equal(state.trained[path], x)}
    assert fresh == {path for path in before if path.startswith("decoder/layers_") and path.endswith("kernel")} != set()
    with pytest.raises(ConfigError, match="weights.fresh: 'decoder/norm' fits no param"):
        train.given_params(model, ("decoder/norm",))


def test_rows_that_cannot_be_dealt_out_are_an_error():
    mesh, four = training_mesh(MeshConfig(), jax.devices()[:4]), dataclasses.replace(STAGE, rows=4)
    check_rows((four,), mesh)
    with pytest.raises(ValueError, match="expected rows / accumulate to be a multiple of the 4 devices .* found 4 / 2"):
        check_rows((dataclasses.replace(four, accumulate=2),), mesh)


def test_a_mesh_takes_all_devices():
    assert dict(training_mesh(MeshConfig(2, -1, 1), jax.devices()[:4]).shape) == {"data": 2, "fsdp": 2, "tensor": 1}
    for sizes in (MeshConfig(3, -1, 1), MeshConfig(1, 2, 1)):
        with pytest.raises(ValueError, match="expected data × fsdp × tensor to be the 4 devices here"):
            training_mesh(sizes, jax.devices()[:4])


def test_the_flops_of_a_step_are_six_a_param_and_token_where_all_is_trained():
    decoder = CONFIG.model.decoder
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, np.float32)
    kernel, table = (
        {"decoder/layers_0/mlp/up_proj/kernel": shape(32, 64)},
        {"decoder/embed_tokens/embedding": shape(640, 32)},
    )
    count = lambda trained, frozen, pairs=0.0: step_flops(CONFIG.model, trained, frozen, 100, 0, pairs)
    assert count(kernel, {}) == 6 * 100 * 32 * 64 and count({}, kernel) == 4 * 100 * 32 * 64
    assert count(table, {}) == 6 * 100 * 640 * 32  # tied: it is the head
    assert count({}, {}, 50.0) == 3 * 4 * 50 * decoder.num_layers * decoder.num_heads * decoder.head_dim
    tower = {"vision/layers_0/mlp/fc1/kernel": shape(16, 16)}
    assert step_flops(CONFIG.model, {}, tower, 0, 10, 0) == 2 * 10 * 4 * 256  # 4 patches a frame, forward alone
    forward = lambda params, pairs=0.0: forward_flops(CONFIG.model, params, 100, 10, pairs, decided=1)
    assert forward(tower) == 2 * 10 * 4 * 256 and forward(kernel) == 2 * 100 * 32 * 64
    assert forward(table) == 2 * 640 * 32  # behind one token alone
    assert forward({}, 50.0) == 4 * 50 * decoder.num_layers * decoder.num_heads * decoder.head_dim


# ----------------------------------------------------------------------------------------------------- the command


def start(workdir, *flags):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(TESTS.parent),
        "XLA_FLAGS": "--xla_backend_optimization_level=1",  # and one device
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
    with pytest.raises(ConfigError, match="has seed = 3, not 4"):
        train.keep_config(tmp_path / "config.json", dataclasses.replace(CONFIG, seed=4))
    elsewhere = dataclasses.replace(CONFIG, mesh=MeshConfig(2, 2, 1), workers=7, remat="layer")
    train.keep_config(tmp_path / "config.json", elsewhere)  # it learns the same there


WRONG_FLAGS = {
    "--config.modle.vision.width=3": "model",
    "--config.seed=many": "seed",
    "--no_such_flag=1": "no_such_flag",
    "--config.optimizer=sgd": "expected adamw, adamw_8bit, adafactor or muon",
    "--config.save_every=0": "save_every",
    "--config.model.decoder.vocab_size=300": "vocab_size",
    "--config=missing.py": "missing.py",
    "--profile=7": "--profile=7: expected the first and the last step, as in 10:12",
}


def test_a_wrong_flag_is_one_line(tmp_path):
    started = {flag: start(tmp_path / f"run{i}", flag) for i, flag in enumerate(WRONG_FLAGS)}  # side by side
    for flag, process in started.items():
        out, _ = process.communicate(timeout=240)
        assert process.returncode != 0, flag
        lines = [line for line in out.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("error: ") and WRONG_FLAGS[flag] in lines[0], (flag, out)
    assert not list(tmp_path.glob("run*/model"))
