"""Converts a model: `python -m jstream.convert --source=FOLDER|id --target=FOLDER --format=orbax|hf [--dtype=…]`.

`orbax` makes a folder of ours from one in a published format or a hub id; `hf` makes a published folder again, so that
others can serve the model. There and back is the same bit for bit, its small files included, where no --dtype is given.
"""

import pathlib

import jax.numpy as jnp
from absl import flags

from jstream import command
from jstream.config import ConfigError, ProtocolConfig
from jstream.protocols.streamo import SYSTEM_PROMPT
from jstream.protocols.tokenizer import Tokenizer
from jstream.weights import hf
from jstream.weights.checkpoint import PUBLISHED, CheckpointError, read_model, save_model
from jstream.weights.hf_config import family_of, read_json
from jstream.weights.published import STREAMO_PIXELS

_SOURCE = flags.DEFINE_string("source", None, "Model folder, or for orbax also a hub id.")
_TARGET = flags.DEFINE_string("target", None, "Folder to make; there must be none yet.")
_FORMAT = flags.DEFINE_enum("format", None, ["orbax", "hf"], "What to make.")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the params; as they are by default.")

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
    folder = hf.resolve(source)
    config = hf.read_config(folder, STREAMO_PIXELS)
    dtype = jnp.dtype(_DTYPE.value) if _DTYPE.value else hf.stored_dtype(folder)
    params = hf.load_params(folder, config, dtype)
    language = ProtocolConfig(system=SYSTEM_PROMPT)
    save_model(target, config, language, Tokenizer.load(folder), params, dtype=None, published=small_files(folder))


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
    target = pathlib.Path(_TARGET.value)
    if target.exists():
        raise ConfigError(f"--target={target}: expected a new folder, found one; choose another name or move it away")
    convert = {"orbax": to_orbax, "hf": to_hf}[_FORMAT.value]
    convert(_SOURCE.value, target)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"done: {target}, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    command.run(main)
