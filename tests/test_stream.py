"""The command people try first: what it writes, and one line for everything that can be wrong."""

import json
import pathlib
import shutil
import sys

import pytest
import webvtt
from absl import flags
from absl.testing import flagsaver
from published_configs import CONFIGS
from test_published import CHAT_TOKENS, publish

from jstream import command, load, stream
from jstream.data import world
from jstream.data.world.write import write_video
from jstream.errors import UserError
from jstream.protocols.tokenizer import train_tokenizer
from jstream.weights.checkpoint import BUNDLED


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs the command in this process; returns the exit code, stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["stream", *map(str, arguments)])
        with flagsaver.flagsaver():
            flags.FLAGS.unparse_flags()
            try:
                command.run(stream.main)
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(world.make_world(41, 0, world.WorldConfig(12, 12)), path, 96, 8, 16)
    return path


@pytest.mark.smoke
def test_the_bundled_model_watches_the_bundled_clip(run, tmp_path):
    code, out, _ = run(f"--out={tmp_path / 'o'}")
    assert code == 0
    assert "query" in out and "response" in out
    events = [json.loads(line) for line in (tmp_path / "o" / "events.jsonl").read_text().splitlines()]
    assert [event["time"] for event in events] == [float(i) for i in range(len(events))]
    assert all(sum(event["probs"].values()) == pytest.approx(1, abs=1e-4) for event in events)
    assert all((event["text"] is not None) == (event["state"] == "response") for event in events)
    replies = [event["text"] for event in events if event["text"]]
    assert len(replies) >= 3
    captions = webvtt.read(str(tmp_path / "o" / "captions.vtt"))
    assert [caption.text for caption in captions] == replies
    assert (tmp_path / "o" / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["captions.vtt", "events.jsonl", "timeline.png"]


def test_queries_are_asked_at_their_time(run, clip, tmp_path):
    code, out, _ = run(
        f"--video={clip}", "--query=4.5:What colour is it?", "--query=Narrate: all.", f"--out={tmp_path}"
    )
    assert code == 0
    asked = [line.split(maxsplit=2) for line in out.splitlines() if " query " in line]
    assert asked == [["0.0s", "query", "Narrate: all."], ["5.0s", "query", "What colour is it?"]]


def test_a_window_of_turns_watches_to_the_end(run, clip, tmp_path):
    code, out, _ = run(f"--video={clip}", "--max_turns=3", "--query=What happens?", f"--out={tmp_path}")
    assert code == 0 and "12 frames" in out
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and any(line["text"] for line in lines)


def test_several_videos_are_watched_together_each_with_a_folder_of_its_own(run, clip, tmp_path):
    code, out, _ = run(f"--video={clip}", f"--video={clip}", "--query=Narrate what happens.", f"--out={tmp_path / 'o'}")
    assert code == 0 and out.count("query") == 2
    folders = sorted(path.name for path in (tmp_path / "o").iterdir())
    assert folders == [f"1-{clip.stem}", f"2-{clip.stem}"]
    records = [(tmp_path / "o" / name / "events.jsonl").read_text().splitlines() for name in folders]
    facts = [[(e["time"], e["state"], e["text"]) for e in map(json.loads, lines)] for lines in records]
    assert facts[0] == facts[1] and len(facts[0]) > 5
    assert all((tmp_path / "o" / name / "timeline.png").stat().st_size > 1000 for name in folders)


def test_one_of_several_videos_that_cannot_be_opened_is_one_line(run, clip, tmp_path):
    code, _, err = run(f"--video={clip}", f"--video={tmp_path / 'none.mp4'}", f"--out={tmp_path / 'o'}")
    assert code == 1 and "none.mp4" in err and not (tmp_path / "o").exists()


def test_in_real_time_the_clock_is_kept(run, tmp_path, monkeypatch):
    short = tmp_path / "short.mp4"
    write_video(world.make_world(41, 1, world.WorldConfig(10, 10)), short, 96, 8, 16)
    now = [0.0]
    monkeypatch.setattr(stream, "paced", lambda video: stream_paced(video, now))
    code, out, _ = run(f"--video={short}", "--realtime", f"--out={tmp_path / 'o'}")
    assert code == 0 and "late frames dropped" in out
    assert now[0] == pytest.approx(9.0)


def stream_paced(video, now):
    from jstream.data.video import paced

    return paced(video, lambda: now[0], lambda seconds: now.__setitem__(0, now[0] + seconds))


def other_config(tmp_path) -> pathlib.Path:
    """The bundled checkpoint under a config.json of another width."""
    folder = tmp_path / "other"
    shutil.copytree(BUNDLED, folder)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["decoder"]["mlp_dim"] += 64
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def written(tmp_path, name, content) -> pathlib.Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


BAD = {
    "missing video": (lambda t, clip: ["--video=/no/such/video.mp4"], "no/such/video.mp4"),
    "a directory": (lambda t, clip: [f"--video={t}"], "directory"),
    "zero bytes": (lambda t, clip: [f"--video={written(t, 'zero.mp4', b'')}"], "zero.mp4"),
    "a text file": (lambda t, clip: [f"--video={written(t, 'text.mp4', b'hello ' * 500)}"], "text.mp4"),
    "a corrupt mp4": (
        lambda t, clip: [f"--video={written(t, 'bad.mp4', clip.read_bytes()[:64] + bytes(5000))}"],
        "bad.mp4",
    ),
    "missing checkpoint": (lambda t, clip: [f"--video={clip}", f"--checkpoint={t / 'none'}"], "none"),
    "a file as checkpoint": (lambda t, clip: [f"--video={clip}", f"--checkpoint={clip}"], "a file"),
    "checkpoint of another config": (
        lambda t, clip: [f"--video={clip}", f"--checkpoint={other_config(t)}"],
        "not of this config",
    ),
    "a query without words": (lambda t, clip: [f"--video={clip}", "--query=12:"], "--query"),
    "a query before the start": (lambda t, clip: [f"--video={clip}", "--query=-3:Hello?"], "--query"),
    "a query at no number": (lambda t, clip: [f"--video={clip}", "--query=1.2.3:Hello?"], "--query"),
    "an unknown memory": (lambda t, clip: [f"--video={clip}", "--memory=elephant"], "reprefill[:TURNS]"),
    "a memory and a window": (lambda t, clip: [f"--video={clip}", "--memory=append", "--max_turns=4"], "--max_turns"),
    "a window of no turns": (lambda t, clip: [f"--video={clip}", "--max_turns=0"], "max_turns"),
    "a window past the cache": (lambda t, clip: [f"--video={clip}", "--max_turns=99", "--capacity=512"], "99 turns"),
    "an unknown flag": (lambda t, clip: [f"--vidoe={clip}"], "vidoe"),
    "a rate of zero": (lambda t, clip: [f"--video={clip}", "--fps=0"], "fps"),
    "a stray word": (lambda t, clip: ["clip.mp4"], "clip.mp4"),
    "an output folder that is a file": (lambda t, clip: [f"--video={clip}", f"--out={clip}"], "clip.mp4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(run, clip, tmp_path, name):
    arguments, words = BAD[name]
    out_dir = tmp_path / "out"
    made = arguments(tmp_path, clip)
    code, out, err = run(f"--out={out_dir}", *made)
    assert code not in (0, None)
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], err
    assert "Traceback" not in out + err
    assert not list(out_dir.glob("*"))


def test_a_damaged_video_is_watched_as_far_as_it_goes_and_says_so(run, clip, tmp_path):
    data = bytearray(clip.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 1500] = bytes(1500)
    code, out, _ = run(f"--video={written(tmp_path, 'damaged.mp4', bytes(data))}", f"--out={tmp_path / 'o'}")
    assert code == 0 and "damaged" in out
    assert len((tmp_path / "o" / "events.jsonl").read_text().splitlines()) >= 10


def test_what_was_seen_is_kept_when_the_cache_is_full(run, clip, tmp_path):
    code, out, err = run(f"--video={clip}", "--fps=4", "--capacity=256", f"--out={tmp_path}")
    assert code == 1 and err.splitlines()[-1].startswith("error: the cache holds 256 tokens")
    assert 4 <= len((tmp_path / "events.jsonl").read_text().splitlines()) < 20


def test_a_stream_without_a_frame_is_no_crash(run, clip, tmp_path):
    code, out, err = run(f"--video={clip}", "--capacity=256", f"--query={'what is it? ' * 150}", f"--out={tmp_path}")
    assert code == 1 and "Traceback" not in err and "0 frames, 0 replies" in out


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("[]"), "tokenizer.json"),
        (lambda folder: shutil.rmtree(folder / "params"), "params"),
        (lambda folder: [p.write_bytes(b"x") for p in (folder / "params").rglob("*") if p.is_file()], "params"),
    ],
)
def test_a_broken_checkpoint_is_one_line(tmp_path, break_it, words):
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED, folder)
    break_it(folder)
    with pytest.raises((UserError, OSError)) as error:
        load(folder)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_model_folder_round_trips_bit_for_bit(tmp_path):
    import jax
    import jax.numpy as jnp

    from jstream.weights.checkpoint import save_model

    model = load()
    language = model.protocol.config, model.protocol.tokenizer
    save_model(tmp_path / "copy", model.config, *language, model.params, dtype=jnp.float32)
    again = load(tmp_path / "copy")
    assert again.config == model.config and again.protocol.config == model.protocol.config
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), model.params, again.params)))
    assert not list(tmp_path.glob("*.partial"))


# ---------------------------------------------------------------------------------------------------- published weights


def test_a_config_opens_a_published_folder(run, clip, tmp_path):
    """The config's language and budget of pixels; `:4b` and its like choose the size that the hub would give."""
    tokenizer = train_tokenizer(["system user assistant What happens?\n <0s-1s>\n"] * 20, 300, CHAT_TOKENS)
    publish(tmp_path / "qwen", tokenizer, tokenizer.vocab_size)
    code, out, err = run(
        f"--config={CONFIGS / 'streamo.py'}:7b", "--config.model.vision.max_pixels=3200", "--capacity=4096",
        f"--checkpoint={tmp_path / 'qwen'}", f"--video={clip}", "--max_new_tokens=2", f"--out={tmp_path / 'o'}",
    )  # fmt: skip
    assert code == 0, err
    events = [json.loads(line) for line in (tmp_path / "o" / "events.jsonl").read_text().splitlines()]
    assert len(events) == 12 and set(events[0]["probs"]) == {"silence", "standby", "response"}
    assert "; 4 tokens a frame" in out


@pytest.mark.parametrize("name", ["streamo.py:3b", "joyai.py", "videollm_online.py"])
def test_without_the_hub_a_config_says_what_to_do(run, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, _, err = run(f"--config={CONFIGS / name}", f"--out={tmp_path / 'o'}")
    assert code == 1 and err.count("\n") == 1 and "jstream[hub]" in err and not (tmp_path / "o").exists()


def test_a_size_that_a_config_does_not_have_is_one_line(run):
    code, _, err = run(f"--config={CONFIGS / 'streamo.py'}:13b")
    assert code == 2 and err.count("\n") == 1 and "expected 3b, 7b or 4b" in err
