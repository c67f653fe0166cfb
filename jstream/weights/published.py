"""Opens a model wherever it lies: a folder of ours, a folder in a published format, or a hub id.

A published Qwen model speaks the Streamo protocol: where its vocabulary lacks the state tokens they are added, each
beginning as the mean of what spells it.
"""

import pathlib

import jax
import jax.numpy as jnp

from jstream.config import ProtocolConfig
from jstream.model import Model
from jstream.protocols import make_protocol
from jstream.protocols.streamo import SYSTEM_PROMPT
from jstream.protocols.tokenizer import Tokenizer, TokenizerError
from jstream.weights.added_tokens import complete, grow
from jstream.weights.checkpoint import BUNDLED, CheckpointError, load_model
from jstream.weights.hf import load_params, read_config, resolve

STREAMO_PIXELS = 100_352  # a frame's budget in Streamo's scripts (MAX_PIXELS): 128 frame tokens


def load(
    source: str | pathlib.Path = BUNDLED, dtype: jnp.dtype | None = None, max_pixels: int = STREAMO_PIXELS
) -> Model:
    """Opens a model on the default device.

    Args:
        source: a folder that `save_model` wrote, a folder with a published `config.json` and safetensors, or a hub id;
            the bundled model by default.
        dtype: of the params; bfloat16 by default, float32 on a CPU, where it is faster.
        max_pixels: budget of a frame, for towers that keep the aspect.

    Raises:
        CheckpointError: where something is missing, damaged, or of another shape than its config says.
    """
    if dtype is None:
        dtype = jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if pathlib.Path(source).exists() and not is_published(pathlib.Path(source)):
        return load_model(source, dtype)
    folder = resolve(source)
    config = read_config(folder, max_pixels)
    language = ProtocolConfig(system=SYSTEM_PROMPT)
    try:
        tokenizer, new_rows = complete(Tokenizer.load(folder), language)
        protocol = make_protocol(language, tokenizer, config.vision.tokens_per_frame)
    except TokenizerError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return Model(*grow(config, load_params(folder, config, dtype), new_rows), protocol)


def is_published(folder: pathlib.Path) -> bool:
    """Whether a folder holds safetensors instead of what `save_model` writes."""
    return folder.is_dir() and not (folder / "params").exists() and any(folder.glob("*.safetensors*"))
