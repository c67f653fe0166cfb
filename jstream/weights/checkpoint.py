"""Models on disk: `save_model` writes one, `load_model` opens it.

A model is a folder with `config.json` (shapes and protocol), `tokenizer.json` and `params/` (orbax); one that was
converted also holds the small files of its published folder, in `published/`. Restoring always goes through abstract
arrays with shardings, so what eight devices wrote opens on one. Nothing read here can run code.
"""

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from orbax.checkpoint import v1 as ocp

from jstream.config import ConfigError, ModelConfig, ProtocolConfig, from_dict, to_dict
from jstream.errors import UserError
from jstream.model import Model
from jstream.models.video_lm import abstract_params, param_dtype
from jstream.protocols import make_protocol
from jstream.protocols.protocol import StreamProtocol
from jstream.protocols.tokenizer import Tokenizer, TokenizerError
from jstream.sharding import param_shardings
from jstream.weights.added_tokens import complete, grow

BUNDLED = pathlib.Path(__file__).parent.parent / "assets" / "tiny"
PUBLISHED = "published"  # where a model folder keeps the small files of the published one it came from
_LARGEST_CONFIG = 1 << 20  # bytes; a config.json is a few kilobytes


class CheckpointError(UserError, ValueError):
    """A checkpoint that cannot be opened; the message is one line."""


def abstract_on(tree: Any, places: Any, dtype: jnp.dtype | None = None) -> Any:
    """The abstract arrays of a tree of arrays or shapes, placed by one sharding or by a tree of them."""
    places = jax.tree.map(lambda _: places, tree) if isinstance(places, jax.sharding.Sharding) else places
    put = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, param_dtype(x, dtype or x.dtype), sharding=sharding)
    return jax.tree.map(put, tree, places)


def one_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def save_model(
    path: str | pathlib.Path,
    config: ModelConfig,
    language: ProtocolConfig,
    tokenizer: Tokenizer,
    params: Any,
    dtype: DTypeLike | None = jnp.bfloat16,
    published: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a model folder; it appears whole or not at all and takes the place of an earlier one.

    Where several processes hold the params, all of them call it.

    Args:
        language, tokenizer: of the protocol; special tokens of its own may be missing and are added when it is opened.
        dtype: of the stored params; None stores them as they are.
        published: name → content of small files to keep beside it.
    """
    path = pathlib.Path(path).absolute()
    partial, earlier = path.with_name(path.name + ".partial"), path.with_name(path.name + ".earlier")
    first = jax.process_index() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "config.json").write_text(
            json.dumps({"model": to_dict(config), "protocol": to_dict(language)}, indent=1) + "\n"
        )
        tokenizer.save(partial / "tokenizer.json")
        for name, content in (published or {}).items():
            (partial / PUBLISHED).mkdir(exist_ok=True)
            (partial / PUBLISHED / name).write_bytes(content)
    stored = params if dtype is None else jax.tree.map(lambda x: x.astype(param_dtype(x, dtype)), params)
    ocp.save(str(partial / "params"), stored)  # waits for all processes
    if first:
        shutil.rmtree(earlier, ignore_errors=True)
        if path.exists():
            path.rename(earlier)
        partial.rename(path)
        shutil.rmtree(earlier, ignore_errors=True)


def load_model(
    path: str | pathlib.Path = BUNDLED, dtype: jnp.dtype = jnp.float32, mesh: jax.sharding.Mesh | None = None
) -> Model:
    """Opens a model folder.

    Args:
        path: a folder that `save_model` wrote; the bundled model by default.
        dtype: of the params in memory.
        mesh: devices that share the model; the default device by default.

    Raises:
        CheckpointError: where something is missing, damaged, or of another shape than the config says.
    """
    return assemble(path, *read_model(path, dtype, mesh), mesh)


def assemble(
    where: Any,
    config: ModelConfig,
    language: ProtocolConfig,
    tokenizer: Tokenizer,
    params: dict[str, Any],
    mesh: jax.sharding.Mesh | None = None,
) -> Model:
    """A model of what was read, with the tokens that its protocol needs and its vocabulary lacks.

    Args:
        where: it was read; named in the error.

    Raises:
        CheckpointError: as `speak`.
    """
    protocol, new_rows = speak(where, config, language, tokenizer)
    config, params = grow(config, params, new_rows)
    if new_rows and mesh is not None:
        params = jax.device_put(params, param_shardings(config.decoder, params, mesh))
    return Model(config, params, protocol)


def speak(
    where: Any, config: ModelConfig, language: ProtocolConfig, tokenizer: Tokenizer
) -> tuple[StreamProtocol, dict[int, list[int]]]:
    """The protocol of what was read, and how the tokens that are new in it are spelled (`added_tokens.complete`).

    Raises:
        CheckpointError: the vocabulary lacks a token of the chat template, or has more ids than the model has rows.
    """
    beyond = tokenizer.specials.get(language.frame_token, 0) >= config.decoder.vocab_size  # no one reads that row
    if tokenizer.vocab_size - beyond > config.decoder.vocab_size:
        raise CheckpointError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} ids, the model {config.decoder.vocab_size}"
        )
    try:
        tokenizer, new_rows = complete(tokenizer, language)
        return make_protocol(language, tokenizer, config.vision.tokens_per_frame), new_rows
    except TokenizerError as error:
        raise CheckpointError(f"{where}: {error}") from None


def read_model(
    path: str | pathlib.Path, dtype: jnp.dtype | None, mesh: jax.sharding.Mesh | None = None
) -> tuple[ModelConfig, ProtocolConfig, Tokenizer, dict[str, Any]]:
    """What a model folder holds, as `save_model` was given it; dtype None keeps that of the stored params.

    Raises:
        CheckpointError: as `load_model`.
    """
    path = pathlib.Path(path).absolute()
    what = f"{path}: expected a jstream checkpoint (config.json, tokenizer.json, params/)"
    if not path.is_dir():
        raise CheckpointError(f"{what}, found {'a file' if path.exists() else 'nothing'}")
    try:
        text = (path / "config.json").open(encoding="utf-8").read(_LARGEST_CONFIG)
        record = json.loads(text)
        config = from_dict(ModelConfig, record["model"], "config.json: model")
        language = from_dict(ProtocolConfig, record["protocol"], "config.json: protocol")
    except OSError as error:
        raise CheckpointError(f"{what}, found no readable config.json ({error.strerror})") from None
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: config.json does not describe a model: {error}") from None
    try:
        tokenizer = Tokenizer.load(path)
    except TokenizerError as error:
        raise CheckpointError(str(error)) from None
    speak(path, config, language, tokenizer)
    expected = abstract_params(config)
    try:
        found = ocp.metadata(str(path / "params")).metadata
    except Exception as error:  # orbax raises many kinds for a folder that is none of its own or is damaged
        raise CheckpointError(
            f"{path}/params: expected an orbax checkpoint, found: {str(error).splitlines()[0]}"
        ) from None
    if found is None:
        raise CheckpointError(f"{path}/params: the orbax checkpoint is damaged: its metadata cannot be read")
    _check_shapes(path, expected, found)
    try:
        like = expected if dtype else jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), found)
        places = one_device() if mesh is None else param_shardings(config.decoder, like, mesh)
        params = ocp.load(str(path / "params"), abstract_on(like, places, dtype))
    except Exception as error:
        raise CheckpointError(f"{path}/params: the orbax checkpoint is damaged: {str(error).splitlines()[0]}") from None
    return config, language, tokenizer, params


def _check_shapes(path: pathlib.Path, expected: Any, found: Any) -> None:
    named = lambda tree: {
        jax.tree_util.keystr(key, simple=True, separator="/"): leaf.shape
        for key, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    want, have = named(expected), named(found)
    for name in sorted(want.keys() | have.keys()):
        if want.get(name) != have.get(name):
            raise CheckpointError(
                f"{path}: the checkpoint is not of this config: {name} should be {want.get(name, 'absent')}, "
                f"is {have.get(name, 'absent')}"
            )
