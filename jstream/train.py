"""Trains a model: `python -m jstream.train --config=configs/tiny.py --workdir=runs/tiny [--config.a.b=c …]`.

The run lives in its folder: `checkpoints/` (goes on from the last one, to the exact next batch), `metrics.jsonl`,
TensorBoard event files, and at the end `model/`, which `jstream.load` opens.
"""

import contextlib
import json
import pathlib
import time

import grain
import jax
import numpy as np
from absl import flags
from tensorboardX import SummaryWriter
from tqdm import tqdm

from jstream import command
from jstream.config import ConfigError, StageConfig, TrainConfig, to_dict
from jstream.data import pipeline, world
from jstream.data.world.labels import WORDS
from jstream.protocols import make_protocol, make_tokenizer
from jstream.protocols.protocol import StreamProtocol
from jstream.protocols.tokenizer import Tokenizer
from jstream.training.optimizer import learning_rate, make_optimizer
from jstream.training.step import TrainState, init_state, train_step
from jstream.weights.checkpoint import RunCheckpoints, load_model, save_model

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; a run that is there goes on.")
_INIT = flags.DEFINE_string("init", "", "Model folder to start from instead of fresh params.")

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


def keep_config(path: pathlib.Path, config: TrainConfig) -> None:
    """Writes down what a run is trained with, or checks that a run that goes on is trained with the same.

    Raises:
        ConfigError: names the first setting that differs; the number of workers counts, as batches depend on it.
    """
    text = json.dumps(to_dict(config), indent=1) + "\n"
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text)
        partial.replace(path)
    elif path.read_text() != text:
        old, new = path.read_text().splitlines(), text.splitlines()
        differing = next((pair for pair in zip(old, new) if pair[0] != pair[1]), ("fewer lines", "more lines"))
        before, now = (line.strip().rstrip(",") for line in differing)
        raise ConfigError(f"{path}: the run there has {before}, not {now}; use its config or another --workdir")


def make_rows(config: TrainConfig, number: int, protocol: StreamProtocol) -> pipeline.WorldRows | pipeline.VideoRows:
    stage = config.stages[number]
    if config.dialogues:
        return pipeline.VideoRows(config.dialogues, stage, protocol, config.model.vision, config.seed)
    return pipeline.WorldRows(config.seed, stage, number, protocol, config.model.vision)


class Progress:
    """Progress bar, `metrics.jsonl` and TensorBoard in one place."""

    def __init__(self, workdir: pathlib.Path, total: int, step: int):
        self._bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, smoothing=0.05)
        self._log = (workdir / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir))
        self._since, self._tokens, self._frames, self._waited = time.perf_counter(), 0, 0, 0.0

    def count(self, batch: dict[str, np.ndarray], waited: float) -> None:
        self._tokens += int(np.sum(batch["positions"] >= 0))
        self._frames += int(np.sum(batch["decisions"] >= 0))
        self._waited += waited
        self._bar.update()

    def log(self, step: int, rate: float, metrics: dict[str, jax.Array]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        seconds = time.perf_counter() - self._since
        values |= {
            "learning_rate": rate,
            "tokens_per_second": self._tokens / seconds,
            "frames_per_second": self._frames / seconds,
            "waiting": self._waited / seconds,
        }
        self._since, self._tokens, self._frames, self._waited = time.perf_counter(), 0, 0, 0.0
        self._log.write(json.dumps({"step": step, **{name: round(value, 6) for name, value in values.items()}}) + "\n")
        self._log.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._bar.set_postfix_str(f"loss {values['loss']:.3f}, {values['tokens_per_second']:.0f} tokens/s")

    def close(self) -> None:
        self._bar.close()
        self._log.close()
        self._board.close()


def main() -> None:
    config = command.given_config()
    if config is None or _WORKDIR.value is None:
        raise ConfigError(
            "expected --config=FILE and --workdir=FOLDER, e.g. --config=configs/tiny.py --workdir=runs/tiny"
        )
    if not config.stages:
        raise ConfigError("stages: expected at least one, found none: there is nothing to train")
    workdir = pathlib.Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    keep_config(workdir / "config.json", config)

    # ---------------------------------------------------------------------------------------- protocol and params
    given = load_model(_INIT.value) if _INIT.value else None
    if given is not None and given.config != config.model:
        raise ConfigError(f"--init={_INIT.value}: its model is of another shape than the config's")
    tokenizer_path = workdir / "tokenizer.json"
    if not tokenizer_path.exists():
        if given is not None:
            tokenizer = given.protocol.tokenizer
        elif config.tokenizer:
            tokenizer = Tokenizer.load(config.tokenizer)
        else:
            tokenizer = make_tokenizer(config.protocol, world_texts(config.seed), config.model.decoder.vocab_size)
        tokenizer.save(tokenizer_path)
    protocol = make_protocol(config.protocol, Tokenizer.load(tokenizer_path), config.model.vision.tokens_per_frame)
    rows = [make_rows(config, number, protocol) for number in range(len(config.stages))]
    optimizer = make_optimizer(config)
    state = init_state(config.model, optimizer, jax.random.key(config.seed), len(WORDS))
    if given is not None:
        state = TrainState(state.params | {"model": given.params}, state.opt_state, state.step)

    # ------------------------------------------------------------------------------------------------------- train
    with contextlib.closing(RunCheckpoints(workdir, config.keep)) as checkpoints:  # waits for what is being written
        iterator_state = None
        if checkpoints.latest_step is not None:
            state, iterator_state = checkpoints.load(state)
        step, begin = int(state.step), 0
        with contextlib.closing(Progress(workdir, sum(stage.steps for stage in config.stages), step)) as progress:
            for stage, stage_rows in zip(config.stages, rows):
                end = begin + stage.steps
                if step < end:
                    batches = pipeline.batches(stage_rows, stage.rows, config.seed, config.workers)
                    with contextlib.closing(batches):
                        if iterator_state is not None and step > begin:
                            batches.set_state(iterator_state)
                        state = _run_stage(
                            config, stage, state, step, end, batches, protocol, optimizer, progress, checkpoints
                        )
                    step = end
                begin = end
    save_model(workdir / "model", config.model, protocol.config, protocol.tokenizer, state.params["model"])
    print(f"done: {workdir / 'model'}")


def _run_stage(
    config: TrainConfig,
    stage: StageConfig,
    state: TrainState,
    step: int,
    end: int,
    batches: grain.DatasetIterator,
    protocol: StreamProtocol,
    optimizer,
    progress: Progress,
    checkpoints: RunCheckpoints,
) -> TrainState:
    while step < end:
        asked = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - asked
        state, metrics = train_step(
            state,
            batch,
            config=config.model,
            objective=stage.objective,
            state_ids=protocol.decision_ids,
            optimizer=optimizer,
            train_vision=stage.train_vision,
        )
        step += 1
        progress.count(batch, waited)
        if step % config.log_every == 0 or step == end:
            progress.log(step, learning_rate(config, step - 1), metrics)
        if step % config.save_every == 0 or step == end:
            checkpoints.save(step, state, batches.get_state())
    return state


if __name__ == "__main__":
    command.run(main)
