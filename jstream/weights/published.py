"""Opens a model wherever it lies: a folder of ours, a folder in a published format, or a hub id.

A published Qwen model whose vocabulary holds the state tokens of JoyAI speaks that protocol, and every other one
Streamo's: where its vocabulary lacks the state tokens they are added, each beginning as the mean of what spells it. An
adapter is VideoLLM-online's and speaks LIVE.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from jstream.config import ConfigError, ModelConfig, ProtocolConfig, QwenVisionConfig, TrainConfig
from jstream.model import Model
from jstream.models.video_lm import abstract_params
from jstream.protocols import joyai, live, streamo
from jstream.protocols.tokenizer import Tokenizer, TokenizerError
from jstream.sharding import param_shardings
from jstream.weights.checkpoint import BUNDLED, CheckpointError, assemble, read_model, speak
from jstream.weights.hf import load_params, read_config, resolve, stored_dtype
from jstream.weights.hf_config import read_json
from jstream.weights.videollm_online import load_siglip, load_videollm_online, parts_config

FRAME_PIXELS = {"streamo": streamo.MAX_PIXELS, "joyai": joyai.MAX_PIXELS}  # a frame's budget by the protocol's name
SIGLIP = "google/siglip-large-patch16-384"  # VideoLLM-online's vision tower; its adapter names the language model only


def load(
    source: str | pathlib.Path = BUNDLED,
    dtype: jnp.dtype | None = None,
    *,
    llm: str = "",
    vision: str = "",
    language: ProtocolConfig | None = None,
    max_pixels: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Model:
    """Opens a model.

    Args:
        source: a folder that `save_model` wrote; a folder with a published `config.json` and safetensors, or with an
            adapter; or a hub id. The bundled model by default.
        dtype: of the params; bfloat16 by default, float32 on a CPU, where it is faster.
        llm, vision: folders or hub ids of what an adapter is for; by default what it names, and SigLIP-L/16-384.
        language: in place of the one that the weights were trained with.
        max_pixels: budget of a frame, for towers that keep the aspect; that of the protocol by default.
        mesh: devices that share the model (`sharding.make_mesh`); the default device by default.

    Raises:
        CheckpointError: where something is missing, damaged, or of another shape than its config says.
    """
    if dtype is None:
        dtype = jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if is_ours(source):
        config, spoken, tokenizer, params = read_model(source, dtype, mesh)
        if max_pixels is not None and isinstance(config.vision, QwenVisionConfig):
            config = dataclasses.replace(config, vision=within(config.vision, max_pixels))
        return assemble(source, config, language or spoken, tokenizer, params, mesh)
    parts = read_published(source, dtype, llm=llm, vision=vision, language=language, max_pixels=max_pixels, mesh=mesh)
    return assemble(source, *parts, mesh)


def load_of_config(
    config: TrainConfig | None,
    checkpoint: str = "",
    dtype: jnp.dtype | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Model:
    """Opens the weights that a config names, or a checkpoint in place of them; without either the bundled model.

    The checkpoint's own files decide its shapes; of the config count its language, its parts and its pixel budget.

    Raises:
        CheckpointError: as `load`.
    """
    source = checkpoint or (config.weights.checkpoint if config else "") or BUNDLED
    return load(source, dtype, mesh=mesh, **(settings_of(config) if config else {}))


def load_base(
    llm: str, vision: str, language: ProtocolConfig, dtype: jnp.dtype, mesh: jax.sharding.Mesh | None = None
) -> Model:
    """The parts that VideoLLM-online is trained from, without a connector.

    Raises:
        CheckpointError: as `load`.
    """
    llm_folder, vision_folder = resolve(llm), resolve(vision)
    config = parts_config(llm_folder, vision_folder)
    tokenizer = _tokenizer(llm_folder).with_specials([language.frame_token])
    speak(llm_folder, config, language, tokenizer)
    _, params = load_videollm_online(llm_folder, vision_folder, None, dtype, _places(config, mesh))
    return assemble(llm_folder, config, language, tokenizer, params, mesh)


def starting_model(config: TrainConfig, mesh: jax.sharding.Mesh) -> Model | None:
    """The model that training starts from: the base models of an adapter where the config names them, else its
    checkpoint, else none.

    Raises:
        CheckpointError: as `load`.
        ConfigError: it is of another shape than the config's.
    """
    weights = config.weights
    if not weights.checkpoint and not weights.llm:
        return None
    dtype = jnp.dtype(config.compute_dtype if config.lora.rank else config.param_dtype)  # adapters: nothing else is big
    if weights.llm and weights.vision:
        model = load_base(weights.llm, weights.vision, config.protocol, dtype, mesh)
    else:
        model = load_of_config(config, dtype=dtype, mesh=mesh)
    _check_shapes(config.model, model.config, ("vision", "decoder"))
    return model


def starting_tower(config: TrainConfig) -> dict[str, Any] | None:
    """The vision tower of the model that training starts from, in the dtype of the forward pass; of base models
    nothing else is read.

    Raises:
        CheckpointError, ConfigError: as `starting_model`.
    """
    weights, dtype = config.weights, jnp.dtype(config.compute_dtype)
    if weights.llm and weights.vision:
        found, params = load_siglip(resolve(weights.vision), config.model, dtype)
    elif weights.checkpoint or weights.llm:
        model = load_of_config(config, dtype=dtype)
        found, params = model.config, model.params
    else:
        return None
    _check_shapes(config.model, found, ("vision",))
    return params["vision"]


def _check_shapes(wanted: ModelConfig, found: ModelConfig, parts: tuple[str, ...]) -> None:
    for part in parts:
        for field in dataclasses.fields(getattr(found, part)):
            have, want = (getattr(getattr(config, part), field.name, None) for config in (found, wanted))
            if have != want and not field.name.startswith("frame_"):
                raise ConfigError(
                    f"model.{part}.{field.name}: expected that of the weights, {have}, found {want}; "
                    f"set --config.model.{part}.{field.name}"
                )


def within(vision: QwenVisionConfig, max_pixels: int) -> QwenVisionConfig:
    """The same tower with another budget for a frame."""
    least = min(vision.min_pixels, max_pixels)
    return dataclasses.replace(vision, max_pixels=max_pixels, min_pixels=least).for_frames(*vision.frame_size)


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """What a config says of published weights, as `load` and `read_published` take it."""
    settings = {"llm": config.weights.llm, "vision": config.weights.vision, "language": config.protocol}
    if isinstance(config.model.vision, QwenVisionConfig):
        settings["max_pixels"] = config.model.vision.max_pixels
    return settings


def is_ours(source: str | pathlib.Path) -> bool:
    """Whether a source is no hub id and no folder that holds safetensors instead of what `save_model` writes."""
    path = pathlib.Path(source)
    published = path.is_dir() and not (path / "params").exists() and any(path.glob("*.safetensors*"))
    return path.exists() and not published


def read_published(
    source: str | pathlib.Path,
    dtype: jnp.dtype | None,
    *,
    llm: str = "",
    vision: str = "",
    language: ProtocolConfig | None = None,
    max_pixels: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[ModelConfig, ProtocolConfig, Tokenizer, dict[str, Any]]:
    """What a published folder or hub id holds, as `checkpoint.read_model`: no token is added yet.

    Args:
        dtype: of the params; None keeps the stored one.

    Raises:
        CheckpointError: as `load`.
    """
    folder = resolve(source)
    if (folder / "adapter_config.json").exists():
        return _read_adapted(folder, dtype, llm, vision, language or live.PUBLISHED, mesh)
    tokenizer = _tokenizer(folder)
    language = language or language_of(tokenizer)
    config = read_config(folder, max_pixels or FRAME_PIXELS.get(language.name))
    speak(folder, config, language, tokenizer)  # what is wrong there is told before gigabytes are read
    params = load_params(folder, config, dtype or stored_dtype(folder), _places(config, mesh))
    return config, language, tokenizer, params


def language_of(tokenizer: Tokenizer) -> ProtocolConfig:
    """The language that a published model with this vocabulary speaks."""
    return joyai.PUBLISHED if tokenizer.specials.keys() >= set(joyai.STATE_TOKENS) else streamo.PUBLISHED


def _read_adapted(
    folder: pathlib.Path,
    dtype: jnp.dtype | None,
    llm: str,
    vision: str,
    language: ProtocolConfig,
    mesh: jax.sharding.Mesh | None,
) -> tuple[ModelConfig, ProtocolConfig, Tokenizer, dict[str, Any]]:
    """VideoLLM-online from its parts, merged."""
    if language.name != live.PUBLISHED.name:
        raise CheckpointError(
            f"{folder}: expected the language live for an adapter, found {language.name}; "
            "its config is configs/videollm_online.py"
        )
    named = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not llm and not isinstance(named, str):
        raise CheckpointError(f"{folder}: expected an adapter that names its base model; say which one with llm=")
    llm_folder, vision_folder = resolve(llm or str(named)), resolve(vision or SIGLIP)
    config = parts_config(llm_folder, vision_folder)
    tokenizer = _tokenizer(folder if (folder / "tokenizer.json").exists() else llm_folder)
    tokenizer = tokenizer.with_specials([language.frame_token])
    speak(folder, config, language, tokenizer)
    dtype = dtype or stored_dtype(llm_folder)
    _, params = load_videollm_online(llm_folder, vision_folder, folder, dtype, shardings=_places(config, mesh))
    return config, language, tokenizer, params


def _tokenizer(folder: pathlib.Path) -> Tokenizer:
    try:
        return Tokenizer.load(folder)
    except TokenizerError as error:
        raise CheckpointError(str(error)) from None


def _places(config: ModelConfig, mesh: jax.sharding.Mesh | None) -> Any:
    return None if mesh is None else param_shardings(config.decoder, abstract_params(config), mesh)
