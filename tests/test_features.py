"""Vision features that are computed once: they teach what frames teach, and are taken for nothing that they are not."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import frozen_tower
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import CONFIG, TESTS, protocol  # noqa: F401  (a fixture)

from jstream.config import ConfigError, MeshConfig, QwenVisionConfig, TrainConfig, WeightsConfig, from_dict
from jstream.data import prepared, streamo_instruct, vision_features, world
from jstream.data.annotations import Annotations
from jstream.data.batches import batches
from jstream.data.dialogue import DialogueError, dialogue_to_raw
from jstream.data.features import from_bytes, stored_features
from jstream.data.frames import fit
from jstream.data.video import open_video
from jstream.data.video_rows import VideoRows
from jstream.data.vision_features import VisionFeatures
from jstream.data.world.labels import WORDS
from jstream.data.world.write import write_video
from jstream.models.video_lm import init_params, run, stack_frames
from jstream.sharding import make_mesh, param_shardings, training_mesh
from jstream.training.features import check_stored_features, make_encoder
from jstream.training.flops import step_flops
from jstream.training.loop import abstract_batch
from jstream.training.step import make_train_step, prepare
from jstream.weights.checkpoint import save_model
from jstream.weights.fingerprint import fingerprint
from jstream.weights.hf import flat
from jstream.weights.published import starting_model, starting_tower

WORLDS = [world.make_world(9, i, world.WorldConfig(10, 12)) for i in range(3)]
RUN: TrainConfig = from_dict(TrainConfig, frozen_tower.get_config().to_dict())
STAGE = RUN.stages[0]


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> pathlib.Path:
    """Three videos of the world with two dialogues each."""
    folder = tmp_path_factory.mktemp("videos")
    dialogues = []
    for index, made in enumerate(WORLDS):
        write_video(made, folder / f"{index}.mp4", 48)
        for task in ("narration", "event_caption"):
            dialogues.append(world.make_dialogue(made, task, world.generator(index), f"{index}.mp4"))
    (folder / "d.jsonl").write_text("".join(json.dumps(dialogue_to_raw(d)) + "\n" for d in dialogues))
    return folder


@pytest.fixture(scope="module")
def config(protocol, tmp_path_factory):  # noqa: F811
    """The run, which starts from a model."""
    folder = tmp_path_factory.mktemp("model") / "model"
    params = jax.jit(init_params, static_argnums=0)(RUN.model, jax.random.key(7))
    save_model(folder, RUN.model, protocol.config, protocol.tokenizer, params, dtype=None)
    return dataclasses.replace(RUN, weights=WeightsConfig(checkpoint=str(folder)))


def builder(config, annotations, out, dtype="bfloat16", encode=None, **settings) -> VisionFeatures:
    tower = starting_tower(config)
    encode = encode or make_encoder(config, tower, 8, jnp.dtype(dtype))
    name = fingerprint({f"vision/{path}": x for path, x in flat(tower).items()})
    return VisionFeatures(annotations, out, config.model.vision, encode, name, config.fps, dtype=dtype, **settings)


@pytest.fixture(scope="module")
def stored(config, videos, tmp_path_factory) -> dict[str, pathlib.Path]:
    """The features of the videos, in both dtypes."""
    folders = {dtype: tmp_path_factory.mktemp(dtype) for dtype in ("float32", "bfloat16")}
    for dtype, folder in folders.items():
        made = vision_features.prepare(builder(config, videos / "d.jsonl", folder, dtype, workers=2))
        assert (made["videos"], made["annotations"], made["skipped"]) == (3, 6, 0)
    return folders


def kept(folder) -> list:
    annotations = Annotations(folder)
    return [(annotations.record(i), annotations.features(i)) for i in range(len(annotations))]


# ------------------------------------------------------------------------------------------------------------ training


def start_of(config):
    """The params that training starts from."""
    return starting_model(config, training_mesh(MeshConfig(), jax.devices()[:1])).params


def train_on(path, config, protocol):  # noqa: F811
    """A few steps on annotations or on features: the losses, and the trained params at last."""
    rows = VideoRows(path, STAGE, protocol, config.model.vision, config.seed)
    made = batches(rows, STAGE.rows, config.seed, workers=0)
    given = flat(start_of(config))
    state, frozen = jax.jit(lambda given: prepare(config, jax.random.key(0), len(WORDS), given))(given)
    step = make_train_step(config, STAGE, protocol.decision_ids)
    losses = []
    for _ in range(STAGE.steps):
        state, metrics = step(state, frozen, next(made))
        losses.append(float(metrics["loss"]))
    return losses, jax.tree.map(np.asarray, state.trained)


@pytest.fixture(scope="module")
def from_frames(config, videos, protocol):  # noqa: F811
    return train_on(videos / "d.jsonl", config, protocol)


def test_features_in_f32_teach_what_frames_teach(from_frames, stored, config, protocol):  # noqa: F811
    """The same losses, and the same adapters and projector at last."""
    losses, trained = train_on(stored["float32"], config, protocol)
    assert {path.split("/")[0] for path in trained} == {"lora", "projector"}
    assert losses == pytest.approx(from_frames[0], abs=1e-6) and losses[-1] < losses[0] - 0.01
    for path, x in trained.items():
        np.testing.assert_allclose(x, from_frames[1][path], atol=1e-6, err_msg=path)


def test_features_in_bfloat16_teach_the_same_within_their_rounding(from_frames, stored, config, protocol):  # noqa: F811
    """A feature is off by 2⁻⁹ of itself at most: losses move by less than 10⁻⁴ of themselves, and the projector ends
    beside where it would by less than a hundredth of its way there."""
    losses, trained = train_on(stored["bfloat16"], config, protocol)
    assert losses == pytest.approx(from_frames[0], rel=1e-4) and losses != from_frames[0]
    first = flat(start_of(config))
    for path in trained.keys() & first.keys():
        way = np.linalg.norm(from_frames[1][path] - first[path])
        assert np.linalg.norm(trained[path] - from_frames[1][path]) < 0.01 * way, path


def test_a_packed_row_holds_what_the_tower_makes_of_its_frames(config, videos, stored, protocol):  # noqa: F811
    """Of several dialogues, the first frame of each without one before it."""
    frames, features = (
        VideoRows(path, STAGE, protocol, config.model.vision)[0] for path in (videos / "d.jsonl", stored["float32"])
    )
    assert features["first"].sum() == 2 and features["segments"].max() == 1 and "frames" not in features
    for name in features.keys() - {"features"}:
        np.testing.assert_array_equal(features[name], frames[name], name)
    clips = stack_frames(frames["frames"][None], frames["first"][None], 2)[0]
    seen = jax.jit(lambda params, x: run(config.model, params, x, method="encode"))(
        {"vision": starting_tower(config)}, clips
    )
    used = frames["decisions"] >= 0
    np.testing.assert_allclose(features["features"][used], seen[used], atol=1e-6)
    assert 0 < used.sum() < STAGE.frames and not features["features"][~used].any()


def test_workers_make_the_batch_that_was_compiled_for(config, stored, protocol):  # noqa: F811
    stored_config = dataclasses.replace(config, dialogues=str(stored["bfloat16"]))
    rows = VideoRows(stored["bfloat16"], STAGE, protocol, config.model.vision)
    with contextlib.closing(batches(rows, STAGE.rows, 0, workers=1)) as made:
        batch = next(made)
    for settings, name, other in ((stored_config, "features", "frames"), (config, "frames", "features")):
        shapes = abstract_batch(settings, STAGE, make_mesh(), 0)
        assert name in shapes and other not in shapes
        for key in batch.keys() & shapes.keys():
            assert (batch[key].shape, batch[key].dtype) == (shapes[key].shape, shapes[key].dtype), key
    assert batch["features"].dtype == jnp.bfloat16 and batch["features"].any()


def test_a_tower_that_does_not_run_is_not_counted():
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, np.float32)
    params = {"vision/layers_0/mlp/fc1/kernel": shape(16, 16), "projector/mlp/fc1/kernel": shape(16, 32)}
    count = lambda stored: step_flops(CONFIG.model, {}, params, 0, 10, 0, stored)
    assert count(True) == 2 * 10 * 5 * 16 * 32 and count(False) - count(True) == 2 * 10 * 4 * 256


# ---------------------------------------------------------------------------------------------------------- refusals


def refused(config, params) -> str:
    with pytest.raises(ConfigError) as caught:
        check_stored_features(config, params)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_features_of_another_tower_or_of_other_frames_are_refused(config, stored, protocol):  # noqa: F811
    params = start_of(config)
    good = dataclasses.replace(config, dialogues=str(stored["bfloat16"]))
    check_stored_features(good, params)
    check_stored_features(config, None)  # without features any start will do
    other = jax.jit(init_params, static_argnums=0)(RUN.model, jax.random.key(8))
    assert f"{stored['bfloat16']}: expected features of the run's tower" in refused(good, other)
    assert "starts from a fresh one" in refused(good, None)
    assert "expected features at 2 frames a second, found 1" in refused(dataclasses.replace(good, fps=2.0), params)
    larger = dataclasses.replace(RUN.model, vision=dataclasses.replace(RUN.model.vision, image_size=36))
    assert "vision.image_size = 36, found 24" in refused(dataclasses.replace(good, model=larger), params)
    with pytest.raises(ConfigError, match="vision.image_size = 36, found 24"):
        VideoRows(stored["bfloat16"], STAGE, protocol, larger.vision)
    moved = {**params, "decoder": other["decoder"], "projector": other["projector"]}
    check_stored_features(good, moved)  # what is trained behind the tower may be anything
    validated = dataclasses.replace(config, validation_dialogues=str(stored["float32"]))
    check_stored_features(validated, params)
    assert "expected features of the run's tower" in refused(validated, other)


def test_a_stage_that_trains_the_tower_is_refused(config, stored):
    params = start_of(config)
    stages = (STAGE, dataclasses.replace(STAGE, freeze=("vision/(?!head/).*", "decoder/.*")))
    message = refused(dataclasses.replace(config, stages=stages, dialogues=str(stored["bfloat16"])), params)
    assert message.startswith("stages[1].freeze: expected vision/.* to be frozen") and "vision/head/" in message


def test_params_have_one_fingerprint_however_they_are_opened_and_wherever_they_lie():
    params = flat(jax.jit(init_params, static_argnums=0)(RUN.model, jax.random.key(7)))
    params = {path: x for path, x in params.items() if "/mlp/" in path}
    name = fingerprint(params)
    rounded = {path: x.astype(jnp.bfloat16) for path, x in params.items()}
    mesh = make_mesh(fsdp=4)
    cut = jax.device_put(params, param_shardings(RUN.model.decoder, params, mesh))
    assert any(x.sharding.shard_shape(x.shape) != x.shape for x in cut.values())
    assert fingerprint(rounded) == fingerprint(cut) == fingerprint(dict(reversed(params.items()))) == name
    path = "vision/layers_0/mlp/fc1/kernel"
    x = np.array(rounded[path])
    swapped, nudged = x.copy(), x.copy()
    swapped[0, 0], swapped[1, 0] = x[1, 0], x[0, 0]
    nudged[3, 3] = np.nextafter(x[3, 3], x.dtype.type(9))
    names = {fingerprint(rounded | {path: jnp.asarray(y)}) for y in (x, swapped, nudged, x.T)}
    renamed = {path.replace("layers_0", "layers_1"): y for path, y in rounded.items()}
    assert len(names | {fingerprint(renamed)}) == 5 and name in names


# ---------------------------------------------------------------------------------------------------- making a dataset


def test_videos_that_cannot_be_read_are_skipped_and_named(config, videos, tmp_path):
    records = [json.loads(line) for line in (videos / "d.jsonl").read_text().splitlines()]
    (tmp_path / "corrupt.mp4").write_bytes((videos / "0.mp4").read_bytes()[:2000])
    names = ["corrupt.mp4", str(videos / "1.mp4"), "missing.mp4"]
    lines = [json.dumps(record | {"video_path": name}) for name in names for record in records[:2]]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    for workers in (1, 2):
        made = vision_features.prepare(builder(config, tmp_path / "d.jsonl", tmp_path / str(workers), workers=workers))
        assert (made["videos"], made["annotations"], made["skipped"]) == (1, 2, 2)
        skipped = [json.loads(line) for line in (made["folder"] / prepared.SKIPPED).read_text().splitlines()]
        assert [pathlib.Path(record["video"]).name for record in skipped] == ["corrupt.mp4", "missing.mp4"]
        assert "found nothing there" in skipped[1]["why"] and skipped[0]["why"]
    assert kept(tmp_path / "1") == kept(tmp_path / "2")


def test_prepared_frames_are_taken_where_there_are_some(config, videos, tmp_path):
    streamo_instruct.prepare(videos / "d.jsonl", tmp_path / "frames")
    vision_features.prepare(builder(config, tmp_path / "frames", tmp_path / "features", "float32"))
    jpegs = Annotations(tmp_path / "frames")
    rows = [Annotations(tmp_path / "features").features(i) for i in range(6)]
    assert [len(row) for row in rows] == [len(jpegs.frames(i)) for i in range(6)] and rows[0] == rows[1] != rows[2]
    plain = vision_features.prepare(builder(config, videos / "d.jsonl", tmp_path / "plain", "float32", max_frames=3))
    direct = Annotations(plain["folder"]).features(0)
    vision, dtype = config.model.vision, np.dtype(np.float32)
    assert len(direct) == 3 and direct[0] != rows[0][0]  # JPEG is not what the video shows
    np.testing.assert_allclose(from_bytes(direct, vision, dtype), from_bytes(rows[0][:3], vision, dtype), atol=0.3)
    with pytest.raises(ConfigError, match="expected frames at 2 a second, found 1.0; set --config.fps=1.0"):
        builder(dataclasses.replace(config, fps=2.0), tmp_path / "frames", tmp_path / "other")
    with pytest.raises(DialogueError, match="expected a folder for features alone, found .*streamo_instruct"):
        vision_features.prepare(builder(config, tmp_path / "frames", tmp_path / "frames"))


def test_what_is_there_is_not_computed_again_and_not_taken_for_what_it_is_not(config, videos, stored):
    def never(frames):
        raise AssertionError("the tower runs")

    folder = stored["bfloat16"]
    made = vision_features.prepare(builder(config, videos / "d.jsonl", folder, encode=never))
    assert made["videos"] == 3 and [path.name for path in (folder / "vision_features").iterdir()] == ["1.0.0"]
    with pytest.raises(DialogueError, match="dtype = bfloat16, not float32; delete it"):
        vision_features.prepare(builder(config, videos / "d.jsonl", folder, "float32", encode=never))
    with pytest.raises(
        ConfigError, match="at most 512 MiB of features a video, found .*; take --max_frames=3355443 or"
    ):
        builder(config, videos / "d.jsonl", folder, max_frames=10**9)
    assert stored_features(folder).fps == 1.0 and stored_features(videos / "d.jsonl") is None


def test_damaged_features_are_left_out_or_refused_in_one_line(config, stored, protocol, tmp_path, caplog):  # noqa: F811
    shutil.copytree(stored["bfloat16"], tmp_path / "copy")
    settings = next((tmp_path / "copy").rglob("metadata.json"))
    found = json.loads(settings.read_text())
    settings.write_text(json.dumps(found | {"dtype": "float32"}))  # frames have half the bytes that they should have
    row = VideoRows(tmp_path / "copy", STAGE, protocol, config.model.vision)[0]
    assert row["left_out"] == 2 and not row["features"].any() and "bytes a frame" in caplog.text
    for broken in ("{", json.dumps(found | {"dtype": "int8"}), json.dumps(found | {"vision": 3})):
        settings.write_text(broken)
        with pytest.raises(DialogueError, match="^[^\n]+$"):
            stored_features(tmp_path / "copy")


def command(name, model, *flags):
    """A command over the run that starts from a model."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS.parent), "XLA_FLAGS": "--xla_backend_optimization_level=1",
    }  # fmt: skip
    whole = [f"--config={TESTS / 'frozen_tower.py'}", f"--config.weights.checkpoint={model}", *flags]
    return subprocess.Popen(
        [sys.executable, "-m", f"jstream.{name}", *whole], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_a_killed_command_leaves_nothing_under_the_final_name_and_goes_on(config, videos, tmp_path):
    record = json.loads((videos / "d.jsonl").read_text().splitlines()[0])
    for number in range(60):
        (tmp_path / f"{number}.mp4").symlink_to(videos / "0.mp4")
    lines = [json.dumps(record | {"video_path": f"{number}.mp4"}) for number in range(60)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    where = f"--annotations={tmp_path / 'd.jsonl'}", f"--out={tmp_path}"
    process = command("features", config.weights.checkpoint, *where, "--workers=1", "--batch=4")
    computed = tmp_path / "vision_features" / "computed"
    deadline = time.time() + 120
    while process.poll() is None and len(list(computed.glob("*.npz"))) < 2 and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = list(computed.glob("*.npz"))
    assert done and not list(tmp_path.rglob("1.0.0")) and list(tmp_path.rglob("incomplete.*"))

    seen = []
    encode = make_encoder(config, starting_tower(config), 4)
    count = lambda frames: seen.append(1) or encode(frames)
    made = vision_features.prepare(builder(config, tmp_path / "d.jsonl", tmp_path, encode=count))
    assert made["videos"] == 60 and len(seen) == 60 - len(done)
    assert [path.name for path in (tmp_path / "vision_features").iterdir()] == ["1.0.0"]
    features = [of for _, of in kept(tmp_path)]
    assert len(features) == 60 and all(of == features[0] for of in features)  # before the kill and behind it


def test_what_a_command_refuses_is_one_line(config, videos, stored, protocol, tmp_path):  # noqa: F811
    other = jax.jit(init_params, static_argnums=0)(RUN.model, jax.random.key(8))
    save_model(tmp_path / "other", RUN.model, protocol.config, protocol.tokenizer, other, dtype=None)
    flags = f"--config.dialogues={stored['bfloat16']}", f"--workdir={tmp_path / 'run'}"
    started = [
        (command("train", tmp_path / "other", *flags), "expected features of the run's tower"),
        (command("features", "", f"--annotations={videos / 'd.jsonl'}", f"--out={tmp_path}"), "found none; set"),
    ]  # side by side
    for process, found in started:
        out, _ = process.communicate(timeout=240)
        lines = [line for line in out.splitlines() if line.strip()]
        assert process.returncode == 1 and len(lines) == 1 and lines[0].startswith("error: ") and found in lines[0]


def test_real_videos_become_features(config, shared_data, tmp_path):
    names = ["decord/flipping_a_pancake.mkv", "decord/corrupted.mp4", "gradio/video_sample.webm"]
    said = {"question": [{"content": "What?", "time": "1"}], "response": [{"content": "This.", "time": "1"}]}
    records = [{"video_path": str(shared_data / "videos" / name), **said} for name in names]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, records)))
    made = vision_features.prepare(builder(config, tmp_path / "d.jsonl", tmp_path, "float32", workers=2))
    assert made["skipped"] == 0
    encode = make_encoder(config, starting_tower(config), 5)
    annotations = Annotations(tmp_path)
    for index, name in enumerate(names):
        with open_video(shared_data / "videos" / name) as video:
            wanted = encode(fit(frame.image, config.model.vision) for frame in video)
        own = from_bytes(annotations.features(index), config.model.vision, np.dtype(np.float32))
        np.testing.assert_allclose(own, wanted, atol=0.02)  # the other in bfloat16


# ------------------------------------------------------------------------------------------------------- other towers


def test_a_qwen_tower_is_cut_behind_its_mergers_and_these_have_to_be_frozen(config, videos, tmp_path):
    vision = QwenVisionConfig(
        tower="qwen3", frame_height=32, frame_width=64, patch_size=8, width=16, num_layers=2, num_heads=2, mlp_dim=16,
        out_width=32, window_size=0, full_attention_layers=(), num_positions=16, deep_layers=(0,),
    )  # fmt: skip
    decoder = dataclasses.replace(RUN.model.decoder, deep_layers=1)
    model = dataclasses.replace(RUN.model, vision=vision, decoder=decoder)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(7))
    qwen = dataclasses.replace(RUN, model=model, dialogues=str(tmp_path))
    name = fingerprint({f"vision/{path}": x for path, x in flat(params["vision"]).items()})
    encode = make_encoder(qwen, params["vision"], 8, jnp.float32)
    vision_features.prepare(VisionFeatures(videos / "d.jsonl", tmp_path, vision, encode, name, dtype="float32"))
    with open_video(videos / "0.mp4") as video:
        images = np.stack([fit(frame.image, vision) for frame in itertools.islice(video, 4)])
    seen = jax.jit(lambda x: run(model, params, x, method="embed_frames"))(images)
    features = from_bytes(Annotations(tmp_path).features(0)[:4], vision, np.dtype(np.float32))
    assert features.shape == (4, 8, 64)
    np.testing.assert_allclose(features, seen, atol=1e-5)  # nothing stands behind it
    np.testing.assert_array_equal(run(model, params, features, method="project"), features)
    check_stored_features(qwen, params)
    merging = dataclasses.replace(STAGE, freeze=("vision/(?!merger/|deepstack_).*", "decoder/.*"))
    message = refused(dataclasses.replace(qwen, stages=(merging,)), params)
    assert "found that vision/deepstack_0/" in message and message.endswith("freeze it, or train from frames")
