"""Scores a checkpoint on a benchmark.

    python -m jstream.evaluate --benchmark=world --seed=7 --out=runs/evaluation [--num_videos=64] [--checkpoint=FOLDER]

The folder gets `report.json` and `report.md` (metrics with their rules and 95 % intervals) and `predictions.jsonl`
(what was said, one line a dialogue).
"""

from absl import flags

from jstream import command
from jstream.config import ConfigError
from jstream.evals import world
from jstream.streaming.session import Session
from jstream.weights.published import load_of_config

BENCHMARKS = ("world",)
MAX_NEW_TOKENS = 32  # of a reply; the longest of the world take about half

_BENCHMARK = flags.DEFINE_string("benchmark", None, f"What to score on: {', '.join(BENCHMARKS)}.")
_SEED = flags.DEFINE_integer("seed", None, "Names the series of videos; take another than the model was trained with.")
_OUT = flags.DEFINE_string("out", None, "Folder of the report, made if missing.")
_NUM_VIDEOS = flags.DEFINE_integer("num_videos", 64, "How many videos.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "Model folder or hub id; the config's or the bundled model by default."
)
_TASK = flags.DEFINE_multi_string("task", [], f"Only this task; may be repeated. One of {', '.join(world.TASKS)}.")
_INT8_CACHE = flags.DEFINE_bool("int8_cache", False, "Keeps keys and values in int8, to see what that costs.")
_RENDERED = flags.DEFINE_bool("rendered", False, "Takes frames from the renderer instead of through H.264.")


def main() -> None:
    if _BENCHMARK.value not in BENCHMARKS:
        raise ConfigError(f"benchmark: expected --benchmark={'|'.join(BENCHMARKS)}, found {_BENCHMARK.value!r}")
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
    report = world.evaluate(session, samples, _OUT.value, about, size, rendered=_RENDERED.value, progress=True)
    print(world.table(report))
    print(f"done: {_OUT.value}")


if __name__ == "__main__":
    command.run(main)
