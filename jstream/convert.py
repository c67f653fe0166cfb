"""Converts a model: one in a published format to a folder of ours, and back, or to weights in int8.

    python -m jstream.convert --source=jstream/assets/tiny --target=runs/tiny8 \\
        --format=orbax --int8
    python -m jstream.convert --source=FOLDER --target=runs/qwen --format=orbax
    python -m jstream.convert --source=runs/qwen --target=runs/back --format=hf

`orbax` makes a folder of ours from one in a published format or a hub id; `hf` makes a published folder again, so that
others can serve the model. There and back is the same bit for bit, its small files included, where no --dtype is given.
An adapter is merged; `--config=configs/videollm_online.py` says where what it is for lies. `--int8` makes a folder of
ours with weights in int8, to stream with, and tells how far its logits are off.
"""

import itertools
import pathlib

import jax.numpy as jnp
import numpy as np
from absl import flags

from jstream import command
from jstream.config import ConfigError
from jstream.data.video import open_video
from jstream.evals import closeness
from jstream.sharding import make_mesh
from jstream.weights import hf
from jstream.weights.checkpoint import BUNDLED, PUBLISHED, CheckpointError, assemble, read_model, save_model
from jstream.weights.hf_config import family_of, read_json
from jstream.weights.int8 import to_int8
from jstream.weights.published import is_ours, read_published, settings_of

_SOURCE = flags.DEFINE_string("source", None, "Model folder, or for orbax also a hub id.")
_TARGET = flags.DEFINE_string("target", None, "Folder to make; there must be none yet.")
_FORMAT = flags.DEFINE_enum("format", None, ["orbax", "hf"], "What to make.")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the params; as they are by default.")
_TENSOR = flags.DEFINE_integer("tensor", 1, "Devices that share the model meanwhile.", 1)
_INT8 = flags.DEFINE_bool("int8", False, "Weights of the decoder in int8; with --format=orbax.")

_NUM_FRAMES, _QUERY = 16, "Narrate what happens."  # what int8 weights are compared on: the bundled clip
_SMALL_FILES = (".json", ".txt", ".jinja", ".md")  # of a published folder; its weights are in safetensors
_LARGEST_FILE = 64 << 20  # bytes; the largest tokenizer.json has about ten million


def small_files(folder: pathlib.Path) -> dict[str, bytes]:
    """Configs, tokenizer and papers of a published folder by name, the index of its shards left out."""
    paths = [path for path in sorted(folder.iterdir()) if path.suffix in _SMALL_FILES and path.is_file()]
    return {
        path.name: path.read_bytes()
        for path in paths
        if path.stat().st_size <= _LARGEST_FILE and not path.name.endswith(".index.json")
    }


def to_orbax(source: str, target: pathlib.Path) -> None:
    given = command.given_config()
    settings = settings_of(given) if given is not None else {}
    dtype = jnp.dtype(_DTYPE.value) if _DTYPE.value else None
    ours = is_ours(source)
    folder = pathlib.Path(source) if ours else hf.resolve(source)
    mesh = make_mesh(tensor=_TENSOR.value) if _TENSOR.value > 1 else None
    config, language, tokenizer, params = (
        read_model(folder, dtype, mesh) if ours else read_published(folder, dtype, mesh=mesh, **settings)
    )
    published = None  # merged and int8 weights have no published layout to go back to
    if _INT8.value:
        whole = assemble(source, config, language, tokenizer, params, mesh)  # with all its tokens
        config, params, tokenizer = *to_int8(whole.config, whole.params), whole.protocol.tokenizer
        smaller = assemble(source, config, language, tokenizer, params, mesh)
        print(f"int8 weights: {closeness.compare(whole, smaller, first_frames(_NUM_FRAMES), _QUERY)}")
    elif ours and (folder / PUBLISHED).is_dir():
        published = small_files(folder / PUBLISHED)
    elif not ours and not (folder / "adapter_config.json").exists():
        published = small_files(folder)
    save_model(target, config, language, tokenizer, params, dtype=None, published=published)


def first_frames(count: int) -> list[np.ndarray]:
    """Images uint8 [H, W, 3] of the bundled clip, one a second."""
    with open_video(BUNDLED / "clip.mp4", fps=1.0) as video:
        return [frame.image for frame in itertools.islice(video, count)]


def to_hf(source: str, target: pathlib.Path) -> None:
    config, _, _, params = read_model(source, jnp.dtype(_DTYPE.value) if _DTYPE.value else None)
    kept = pathlib.Path(source) / PUBLISHED
    if not (kept / "config.json").exists():
        raise CheckpointError(
            f"{source}: expected a model that was converted from a published one, found no {PUBLISHED}/config.json: "
            "there is no published layout for it"
        )
    record = read_json(kept / "config.json")
    family = family_of(record, kept / "config.json")
    hf.save_hf(target, family, config, params, record, others=small_files(kept))  # the very bytes of config.json too


def main() -> None:
    if not _SOURCE.value or not _TARGET.value or not _FORMAT.value:
        raise ConfigError("expected --source=FOLDER, --target=FOLDER and --format=orbax or hf")
    if _INT8.value and _FORMAT.value != "orbax":
        raise ConfigError("--int8: expected --format=orbax, found hf, in which no one else would read it")
    target = pathlib.Path(_TARGET.value)
    if target.exists():
        raise ConfigError(f"--target={target}: expected a new folder, found one; choose another name or move it away")
    convert = {"orbax": to_orbax, "hf": to_hf}[_FORMAT.value]
    convert(_SOURCE.value, target)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"done: {target}, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    command.run(main)
