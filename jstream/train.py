"""Trains a model, or goes on with a run that was stopped.

    python -m jstream.train --config=configs/tiny.py --workdir=runs/tiny
    python -m jstream.train --config=configs/streamo.py:3b \\
        --config.dialogues=FILE --workdir=runs/streamo

The run lives in its folder: `checkpoints/` (goes on from the last one, to the exact next batch), `metrics.jsonl`,
TensorBoard event files, and at the end `model/`, which `jstream.load` opens. The first example makes the bundled model;
it takes hours, and needs no data. Any value of a config can be set, as in `--config.seed=2`.
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
from absl import flags
from jax.experimental import multihost_utils

from jstream import command
from jstream.config import ConfigError, TrainConfig, to_dict
from jstream.data import world
from jstream.data.video_rows import VideoRows
from jstream.data.world.labels import WORDS
from jstream.data.world_rows import WorldRows
from jstream.model import Model
from jstream.protocols import make_protocol, make_tokenizer
from jstream.protocols.protocol import StreamProtocol
from jstream.protocols.tokenizer import Tokenizer
from jstream.sharding import training_mesh
from jstream.training import lora
from jstream.training.features import check_stored_features
from jstream.training.loop import Loop, check_rows, place_state
from jstream.training.step import model_params
from jstream.training.validation import validation_stage
from jstream.weights.checkpoint import save_model
from jstream.weights.hf import flat, unflat
from jstream.weights.peft import write_adapter
from jstream.weights.published import starting_model

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; a run that is there goes on.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes; see docs/training.md.")
_PROFILE = flags.DEFINE_string("profile", "", "First and last step to write a trace of, as in 10:12.")

_OTHER_WORLDS = 1_000_003  # from the seed of training to that of its validation
_HEARTBEAT = 30  # seconds in which a process has to be heard of before the others give up
_TOKENIZER_WORLDS = 200  # videos whose texts the tokenizer is trained on


def world_texts(seed: int) -> list[str]:
    """What is said in some videos of the world: the corpus of a tokenizer trained from scratch."""
    texts = []
    for index in range(_TOKENIZER_WORLDS):
        made = world.make_world(seed, index)
        for task in world.TASKS:
            dialogue = world.make_dialogue(made, task, world.generator(seed, index))
            if dialogue is not None:
                texts += [f"{query.text}\n" for query in dialogue.queries]
                texts += [f" {response.text}" for response in dialogue.responses]
    return texts + [f" {word}" for word in WORDS] * 50


# What a run may go on with another value of, as it learns the same: where and how it is computed, kept and told.
_MAY_CHANGE = (
    "mesh", "workers", "attention", "remat", "log_every", "save_every", "keep", "best", "validate_every",
    "validation_rows", "validation_dialogues", "accumulate",
)  # fmt: skip


def keep_config(path: pathlib.Path, config: TrainConfig) -> None:
    """Writes down what a run is trained with, or checks that a run that goes on learns with the same.

    Raises:
        ConfigError: names the first setting that differs.
    """
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(to_dict(config), indent=1) + "\n")
        partial.replace(path)
        return
    before, now = (
        _settings(values) for values in (json.loads(path.read_text()), json.loads(json.dumps(to_dict(config))))
    )
    for name in {**before, **now}:
        if (
            name.split(".")[-1] not in _MAY_CHANGE
            and not name.startswith("mesh.")
            and before.get(name) != now.get(name)
        ):
            raise ConfigError(
                f"{path}: the run there has {name} = {before.get(name)}, not {now.get(name)}; use its config or "
                "another --workdir"
            )


def _settings(values: Any, name: str = "") -> dict[str, Any]:
    """The single values of a nested config by their dotted names."""
    if not isinstance(values, dict | list):
        return {name: values}
    items = values.items() if isinstance(values, dict) else enumerate(values)
    return {k: v for key, value in items for k, v in _settings(value, f"{name}.{key}".lstrip(".")).items()}


def join_processes() -> None:
    """Makes this process one of several, as the cluster says, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID where there is none."""
    number = lambda name: int(os.environ[name]) if name in os.environ else None
    jax.distributed.initialize(
        num_processes=number("JAX_NUM_PROCESSES"),
        process_id=number("JAX_PROCESS_ID"),
        heartbeat_timeout_seconds=_HEARTBEAT,
    )


def make_rows(config: TrainConfig, number: int, protocol: StreamProtocol) -> WorldRows | VideoRows:
    stage = config.stages[number]
    if config.dialogues:
        return VideoRows(config.dialogues, stage, protocol, config.model.vision, config.seed, config.fps)
    return WorldRows(config.seed, stage, number, protocol, config.model.vision)


def make_validation_rows(config: TrainConfig, protocol: StreamProtocol) -> WorldRows | VideoRows | None:
    """Rows that nothing is learned from: other videos, or other worlds with the source's own mix of tasks."""
    stage = validation_stage(config)
    if not config.validate_every or stage is None or (config.dialogues and not config.validation_dialogues):
        return None
    vision = config.model.vision
    if config.validation_dialogues:
        return VideoRows(config.validation_dialogues, stage, protocol, vision, config.seed, config.fps)
    stage = replace(stage, weights=(), objective=replace(stage.objective, words=0.0, happenings=0.0))
    return WorldRows(config.seed + _OTHER_WORLDS, stage, len(config.stages), protocol, vision)


def traced_steps() -> tuple[int, int] | None:
    """What --profile says.

    Raises:
        ConfigError: no two steps.
    """
    if not _PROFILE.value:
        return None
    first, _, last = _PROFILE.value.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
        raise ConfigError(f"--profile={_PROFILE.value}: expected the first and the last step, as in 10:12")
    return int(first), int(last)


def resolve_epochs(config: TrainConfig, rows: Sequence[Any]) -> TrainConfig:
    """The config with the steps of every stage, where it gave epochs.

    Raises:
        ConfigError: the world has no end, and so no epochs.
    """
    if not config.dialogues and any(stage.epochs for stage in config.stages):
        raise ConfigError(
            "dialogues: expected annotations to pass over, found none; set --config.dialogues=FILE, or the steps of "
            "each stage to train on the synthetic world"
        )
    steps = lambda stage, rows: stage.steps or max(math.ceil(stage.epochs * len(rows) / stage.rows), 1)
    stages = [replace(stage, steps=steps(stage, own), epochs=0.0) for stage, own in zip(config.stages, rows)]
    return replace(config, stages=tuple(stages))


def given_params(model: Model, fresh: Sequence[str]) -> dict[str, jax.Array]:
    """The params that training takes over from a model.

    Args:
        fresh: patterns of the paths that it does not take over.

    Raises:
        ConfigError: a pattern fits nothing.
    """
    params = flat(model.params)
    for pattern in fresh:
        if not any(re.fullmatch(pattern, path) for path in params):
            raise ConfigError(f"weights.fresh: {pattern!r} fits no param; paths look like {next(iter(params))}")
    return {path: x for path, x in params.items() if not any(re.fullmatch(pattern, path) for pattern in fresh)}


def main() -> None:
    if _DISTRIBUTED.value:
        join_processes()
    config = command.given_config()
    if config is None or _WORKDIR.value is None:
        raise ConfigError(
            "expected --config=FILE and --workdir=FOLDER, e.g. --config=configs/tiny.py --workdir=runs/tiny"
        )
    if not config.stages:
        raise ConfigError("stages: expected at least one, found none: there is nothing to train")
    workdir, first = pathlib.Path(_WORKDIR.value), jax.process_index() == 0
    workdir.mkdir(parents=True, exist_ok=True)
    mesh = training_mesh(config.mesh)
    check_rows(config.stages, mesh)
    if first:
        keep_config(workdir / "config.json", config)

    # ------------------------------------------------------------------------------------------- protocol and rows
    given = starting_model(config, mesh)
    check_stored_features(config, None if given is None else given.params)
    tokenizer_path = workdir / "tokenizer.json"
    if first and not tokenizer_path.exists():
        if given is not None:
            tokenizer = given.protocol.tokenizer
        elif config.tokenizer:
            tokenizer = Tokenizer.load(config.tokenizer)
        else:
            tokenizer = make_tokenizer(config.protocol, world_texts(config.seed), config.model.decoder.vocab_size)
        tokenizer.save(tokenizer_path)
    multihost_utils.sync_global_devices("the folder of the run is ready")
    protocol = make_protocol(config.protocol, Tokenizer.load(tokenizer_path), config.model.vision.tokens_per_frame)
    rows = [make_rows(config, number, protocol) for number in range(len(config.stages))]
    config = resolve_epochs(config, rows)

    # ----------------------------------------------------------------------------------------------------- the run
    with jax.set_mesh(mesh):
        params = None if given is None else given_params(given, config.weights.fresh)
        state, frozen = place_state(config, mesh, len(WORDS), params)
        del given, params
        loop = Loop(
            config, workdir, mesh, protocol, rows, state, frozen, make_validation_rows(config, protocol), traced_steps()
        )
        state = loop.run()
        trained = model_params({**state.trained, **frozen})
        if config.lora.rank:
            trained = lora.merge(trained, state.trained, config.lora)
        save_model(workdir / "model", config.model, protocol.config, protocol.tokenizer, unflat(trained))
        if config.lora.rank:
            base = config.weights.llm or config.weights.checkpoint
            write_adapter(workdir / "adapter", config.model, state.trained, config.lora, base)
    if first:
        print(f"done: {workdir / 'model'}")


if __name__ == "__main__":
    command.run(main)
