"""There and back: a published folder to ours and to a published one again, bit for bit."""

import pathlib
import subprocess
import sys

import jax
import pytest
from safetensors import numpy as safetensors
from test_hf import QWEN3, qwen_shapes, random_tensors, write

import jstream
from jstream.protocols.tokenizer import train_tokenizer

CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]


def convert(*arguments):
    command = [sys.executable, "-m", "jstream.convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parent.parent)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "qwen"
    tokenizer = train_tokenizer(["system user assistant What happens?\n <0s-1s>\n"] * 20, 300, CHAT_TOKENS)
    config = QWEN3 | {"text_config": QWEN3["text_config"] | {"vocab_size": tokenizer.vocab_size}}
    write(folder, config, random_tensors(qwen_shapes(config, "model.language_model.", "model.visual.")))
    tokenizer.save(folder / "tokenizer.json")
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def ours(published, tmp_path_factory):
    """The same as a folder of ours."""
    folder = tmp_path_factory.mktemp("converted") / "ours"
    made = convert(f"--source={published}", f"--target={folder}", "--format=orbax")
    assert made.returncode == 0, made.stderr
    return folder


def test_there_and_back_is_the_same_folder(published, ours, tmp_path):
    again = tmp_path / "again"
    made = convert(f"--source={ours}", f"--target={again}", "--format=hf")
    assert made.returncode == 0, made.stderr
    files = {path.name for path in published.iterdir()}
    assert {path.name for path in again.iterdir()} == files
    for name in files - {"model.safetensors"}:
        assert (again / name).read_bytes() == (published / name).read_bytes(), name
    one, other = (safetensors.load_file(folder / "model.safetensors") for folder in (published, again))
    assert one.keys() == other.keys()
    assert all(one[key].dtype == other[key].dtype and one[key].tobytes() == other[key].tobytes() for key in one)

    # both open as the same model, which has got the state tokens
    a, b = jstream.load(published), jstream.load(ours)
    assert a.config == b.config and a.protocol.config == b.protocol.config
    assert a.protocol.decision_ids == b.protocol.decision_ids
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a.params, b.params))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--source={folder}", "--format=orbax"], "expected --source"),
        (["--source={folder}", "--target={folder}", "--format=orbax"], "expected a new folder"),
        (["--source={folder}/none", "--target={new}", "--format=orbax"], "none"),
        (["--source={bundled}", "--target={new}", "--format=hf"], "no published layout"),
        (["--source={folder}", "--target={new}", "--format=hf", "--int8"], "expected --format=orbax"),
    ],
)
def test_what_cannot_be_converted_is_one_line(published, tmp_path, arguments, words):
    names = {"folder": published, "new": tmp_path / "new", "bundled": jstream.BUNDLED}
    made = convert(*(argument.format(**names) for argument in arguments))
    assert made.returncode != 0
    lines = [line for line in made.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and words in lines[0], made.stderr
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob("*.partial"))


def test_a_converted_folder_can_be_converted_again(published, ours, tmp_path):
    halved, again = tmp_path / "halved", tmp_path / "again"
    made = convert(f"--source={ours}", f"--target={halved}", "--format=orbax", "--dtype=bfloat16", "--tensor=2")
    assert made.returncode == 0, made.stderr
    made = convert(f"--source={halved}", f"--target={again}", "--format=hf")
    assert made.returncode == 0, made.stderr
    assert (again / "config.json").read_bytes() == (published / "config.json").read_bytes()
