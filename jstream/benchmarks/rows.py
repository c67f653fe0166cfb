"""How fast the input pipeline makes rows: from videos, from a prepared dataset, or from the world, in one worker
process and in several; and whether a training step of a given length would wait for it."""

import contextlib
import time
from typing import Any

import numpy as np
from tqdm import tqdm

from jstream.benchmarks.report import Figure
from jstream.benchmarks.synthetic import bundled_protocol
from jstream.benchmarks.train import stage_number, with_steps
from jstream.config import ConfigError, TrainConfig
from jstream.data.batches import batches
from jstream.data.video_rows import VideoRows
from jstream.data.world_rows import WorldRows
from jstream.protocols import make_protocol
from jstream.protocols.tokenizer import Tokenizer
from jstream.training.flops import Work


def measure(config: TrainConfig, number: int, dialogues: str, workers: int, count: int, step_ms: float) -> list[Figure]:
    """Times rows as training gets them.

    Args:
        number: of the stage that they are made for.
        dialogues: annotations or a prepared folder; "" is the config's own, or the world.
        workers: the most processes; one alone is timed as well.
        count: rows that are timed.
        step_ms: milliseconds of a training step; 0 leaves out what it would wait.

    Raises:
        ConfigError: the stage has no tokens to lay videos in.
        DialogueError: the annotations cannot be read.
    """
    config, number = with_steps(config, number), stage_number(config, number)
    stage, dialogues = config.stages[number], dialogues or config.dialogues
    vision = config.model.vision
    if config.tokenizer:
        protocol = make_protocol(config.protocol, Tokenizer.load(config.tokenizer), vision.tokens_per_frame)
    else:
        protocol = bundled_protocol(config)
    rows: Any
    if not dialogues:
        rows = WorldRows(config.seed, stage, number, protocol, vision)
    elif stage.tokens:
        rows = VideoRows(dialogues, stage, protocol, vision, config.seed, config.fps)
    else:
        raise ConfigError(f"--stage={number}: expected one with tokens, as videos come with what is said over them")

    height, width = vision.frame_size
    figures = [
        Figure("source", dialogues or "the world"),
        Figure("stage", number),
        Figure("row", f"{stage.tokens} tokens, {stage.frames} frames of {height} × {width}"),
        Figure("rows", count),
    ]
    for processes in sorted({1, max(workers, 1)}):
        seconds, work, made = timed_rows(rows, config.seed, processes, count)
        name = f"{processes}_worker" + "s" * (processes > 1)
        figures += [
            Figure(f"rows_per_second_{name}", count / seconds, "{:,.2f}"),
            Figure(f"dialogues_per_second_{name}", made / seconds, "{:,.1f}"),
            Figure(f"frames_per_second_{name}", work.frames / seconds, "{:,.1f}"),
        ]
        if step_ms:
            batch = 1e3 * seconds / count * stage.rows
            waiting = max(batch - step_ms, 0.0) / max(batch, step_ms)
            figures.append(Figure(f"waiting_{name}", waiting, f"{{:.0%}} of the time, at steps of {step_ms:g} ms"))
    return figures


def timed_rows(rows: Any, seed: int, workers: int, count: int) -> tuple[float, Work, int]:
    """Seconds from the first row that arrives to `count` more, what those hold, and how many dialogues that is."""
    frames = tokens = pairs = dialogues = 0
    made: Any = batches(rows, 1, seed, workers)
    with contextlib.closing(made), tqdm(total=count, desc=f"rows, {workers} at work", delay=2) as bar:
        next(made)  # the workers have started
        began = time.perf_counter()
        for _ in range(count):
            batch = next(made)
            work = Work.of(batch)
            frames, tokens, pairs = frames + work.frames, tokens + work.tokens, pairs + work.pairs
            dialogues += int(np.sum(batch["first"]))
            bar.update()
        seconds = time.perf_counter() - began
    return seconds, Work(tokens, frames, pairs), dialogues
