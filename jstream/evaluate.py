"""Scores a checkpoint on the synthetic world or on dialogues, or what any model answered on a published benchmark.

    python -m jstream.evaluate --benchmark=world --seed=7 --num_videos=8 \\
        --out=runs/evaluation
    python -m jstream.evaluate --benchmark=live --annotations=FILE --out=runs/live
    python -m jstream.evaluate --benchmark=ovo_bench --annotations=FILE \\
        --predictions=FILE --out=runs/ovo      # or --videos=FOLDER: answers first

The folder gets `report.json` and `report.md` (metrics with their rules and 95 % intervals); of the world also
`predictions.jsonl` (what was said, one line a dialogue), of the others `scores.png`, a chart. Predictions are scored
without a model; docs/evaluation.md lists the benchmarks, and what each takes stands in `jstream/evals/BENCHMARK.py`.
With `--videos` the model and its baselines answer first; a run that was killed goes on (`jstream/evals/contest.py`).
"""

import inspect
import pathlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from absl import flags

from jstream import command
from jstream.config import ConfigError, TrainConfig
from jstream.evals import report
from jstream.evals.scorers import SCORERS

BENCHMARKS = ("world", "live", *SCORERS)
ANSWERED = ("ovo_bench", "streamingbench")  # those that a model can be run on
MAX_NEW_TOKENS = 32  # of a reply; the longest of the world take about half

_BENCHMARK = flags.DEFINE_string("benchmark", None, f"{', '.join(BENCHMARKS)}.")
_OUT = flags.DEFINE_string("out", None, "Folder of the report, made if missing.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "Model folder or hub id; the config's or the bundled model by default."
)

command.heading("What any model answered, by a benchmark's rules:")
_ANNOTATIONS = flags.DEFINE_string("annotations", None, "Questions and right answers; of live, the dialogues.")
_PREDICTIONS = flags.DEFINE_string("predictions", None, "What a model answered; stays as it is.")
_VARIANT = flags.DEFINE_multi_string("variant", [], "Another rule of the benchmark.")
_MODEL = flags.DEFINE_string("model", None, "Whose answers, where there are those of several.")
_TOLERANCE = flags.DEFINE_float("tolerance", None, "Seconds that an answer may be early or late.")

command.heading("A checkpoint, on the world or on dialogues (live):")
_SEED = flags.DEFINE_integer("seed", None, "Names the worlds; another than that of the training.")
_NUM_VIDEOS = flags.DEFINE_integer("num_videos", 64, "How many videos of the world.")
_NUM_DIALOGUES = flags.DEFINE_integer("num_dialogues", None, "How many of the dialogues; all by default.")
_TASK = flags.DEFINE_multi_string("task", [], "Only this task of the world.")
_INT8_CACHE = flags.DEFINE_bool("int8_cache", False, "Keeps keys and values in int8, to see what it costs.")
_RENDERED = flags.DEFINE_bool("rendered", False, "Takes frames from the renderer, not through H.264.")

command.heading("A checkpoint that answers ovo_bench or streamingbench first:")
_VIDEOS = flags.DEFINE_string("videos", None, "Folder of the benchmark's videos.")
_PROTOCOL = flags.DEFINE_enum("protocol", "official", ["official", "streaming"], "How questions are asked.")
_STREAMS = flags.DEFINE_integer("streams", 8, "Questions at once.", 1, 4096)
_FPS = flags.DEFINE_float("fps", 1.0, "Frames a second the model sees.", lower_bound=0.01, upper_bound=60.0)
_MEMORY = flags.DEFINE_string("memory", None, "What is kept of a stream; sinks:120 by default.")
_BASELINE = flags.DEFINE_multi_string(
    "baseline", None, "always_silent, always_respond, a memory, or none; the first two and last_frames:4 by default."
)
_CONTEXT = flags.DEFINE_float("context", None, "Seconds seen before a question; 0 for all.", lower_bound=0.0)


def scoring(scorer: ModuleType, annotations: pathlib.Path) -> Callable[[pathlib.Path], report.Report]:
    """Scores a file of predictions by the flags.

    Raises:
        ConfigError: for a flag that the benchmark does not have.
    """
    given = {"variants": _VARIANT.value, "model": _MODEL.value, "tolerance": _TOLERANCE.value}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given.keys() - inspect.signature(scorer.score).parameters:
        raise ConfigError(f"{name}: expected no such flag for {_BENCHMARK.value}, found {given[name]!r}")
    return lambda predictions: scorer.score(annotations, predictions, **given)


def checkpoint_of(config: TrainConfig | None) -> str:
    """What a report calls the model."""
    return _CHECKPOINT.value or (config.weights.checkpoint if config else "") or "bundled"


def score_predictions(scorer: ModuleType) -> None:
    if not (_ANNOTATIONS.value and _PREDICTIONS.value and _OUT.value):
        raise ConfigError("expected --annotations=FILE, --predictions=FILE and --out=FOLDER")
    predictions, out = pathlib.Path(_PREDICTIONS.value), pathlib.Path(_OUT.value)
    if predictions.resolve() in (out.resolve(), *out.resolve().parents):
        raise ConfigError(f"out: expected a folder outside the predictions, found {out}")
    found = scoring(scorer, pathlib.Path(_ANNOTATIONS.value))(predictions)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names come from files
    report.write(found, out, {"annotations": _ANNOTATIONS.value, "predictions": _PREDICTIONS.value})
    print(report.table(found), *found.notes, f"done: {out}", sep="\n")


def answer_and_score(scorer: ModuleType) -> None:
    from jstream.evals import contest, run_ovo, run_streamingbench  # with JAX and the models
    from jstream.weights.published import load_of_config

    if _BENCHMARK.value not in ANSWERED:
        raise ConfigError(f"videos: expected --benchmark={'|'.join(ANSWERED)}, found {_BENCHMARK.value}")
    if not (_VIDEOS.value and _ANNOTATIONS.value and _OUT.value) or _PREDICTIONS.value:
        raise ConfigError("expected --annotations=FILE and --out=FOLDER with --videos, and no --predictions")
    other = {"ovo_bench": "context", "streamingbench": "seed"}[_BENCHMARK.value]
    if flags.FLAGS[other].value is not None:
        raise ConfigError(f"{other}: expected no such flag for {_BENCHMARK.value}, found {flags.FLAGS[other].value}")
    annotations, config = pathlib.Path(_ANNOTATIONS.value), command.given_config()
    about: dict[str, Any] = {
        "checkpoint": checkpoint_of(config),
        "protocol": _PROTOCOL.value,
    }
    if _BENCHMARK.value == "ovo_bench":
        about["seed"] = _SEED.value or 0
        exam = run_ovo.exam(annotations, _PROTOCOL.value, about["seed"])
    else:
        about["context"] = run_streamingbench.CONTEXT if _CONTEXT.value is None else _CONTEXT.value
        exam = run_streamingbench.exam(annotations, _PROTOCOL.value, about["context"])
    memory = _MEMORY.value or contest.MEMORY
    baselines = dict.fromkeys(_BASELINE.value or contest.BASELINES)
    found = contest.hold(
        contest.Contest(
            exam,
            annotations,
            scoring(scorer, annotations),
            pathlib.Path(_VIDEOS.value),
            pathlib.Path(_OUT.value),
            about,
            lambda: load_of_config(config, _CHECKPOINT.value),
            _STREAMS.value,
            _FPS.value,
            _INT8_CACHE.value,
        ),
        memory,
        [name for name in baselines if name not in ("none", memory)],
    )
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names come from files
    print(contest.table(found), *found["model"].notes, f"done: {_OUT.value}", sep="\n")


def play_world() -> None:
    from jstream.evals import world  # with JAX and the models
    from jstream.streaming.session import Session
    from jstream.weights.published import load_of_config

    if _SEED.value is None or not _OUT.value:
        raise ConfigError("expected --seed=NUMBER and --out=FOLDER, e.g. --seed=7 --out=runs/evaluation")
    samples = world.make_samples(_SEED.value, _NUM_VIDEOS.value, _TASK.value or world.TASKS)

    model = load_of_config(command.given_config(), _CHECKPOINT.value)
    size = max(model.config.vision.frame_size)
    model = model.for_frames(size, size)
    capacity = world.room_for(samples, model.protocol, MAX_NEW_TOKENS)
    session = Session(model, capacity=capacity, max_new_tokens=MAX_NEW_TOKENS, int8_cache=_INT8_CACHE.value)

    about = {
        "benchmark": _BENCHMARK.value,
        "seed": _SEED.value,
        "num_videos": _NUM_VIDEOS.value,
        "checkpoint": _CHECKPOINT.value or "bundled",
        "int8_cache": _INT8_CACHE.value,
    }
    found = world.evaluate(session, samples, _OUT.value, about, size, rendered=_RENDERED.value, progress=True)
    print(world.table(found))
    print(f"done: {_OUT.value}")


def measure_live() -> None:
    from jstream.evals import live_run  # with JAX and the models
    from jstream.weights.published import load_of_config

    if not (_ANNOTATIONS.value and _OUT.value):
        raise ConfigError("expected --annotations=FILE and --out=FOLDER")
    config = command.given_config()
    model = load_of_config(config, _CHECKPOINT.value)
    fps = config.fps if config else 1.0
    found = live_run.evaluate(model, _ANNOTATIONS.value, _OUT.value, fps, _NUM_DIALOGUES.value, progress=True)
    report.write(found, _OUT.value, {"annotations": _ANNOTATIONS.value, "checkpoint": checkpoint_of(config)})
    print(report.table(found), *found.notes, f"done: {_OUT.value}", sep="\n")


def main() -> None:
    if _BENCHMARK.value not in BENCHMARKS:
        raise ConfigError(f"benchmark: expected --benchmark={'|'.join(BENCHMARKS)}, found {_BENCHMARK.value!r}")
    if _BENCHMARK.value == "world":
        play_world()
    elif _BENCHMARK.value == "live":
        measure_live()
    elif _VIDEOS.value:
        answer_and_score(SCORERS[_BENCHMARK.value])
    else:
        score_predictions(SCORERS[_BENCHMARK.value])


if __name__ == "__main__":
    command.run(main)
