"""Measures speed and memory, on the devices that are here: one mode for each thing that is measured.

    python -m jstream.bench --mode=frame            # a step of a stream; or reply
    python -m jstream.bench --mode=engine --streams=4      # many streams at once
    python -m jstream.bench --mode=longrun --frames=2000      # one, for long
    python -m jstream.bench --mode=serve --streams=4 --hostile   # the live server
    python -m jstream.bench --mode=peer --config=configs/bench_125m.py  # and torch
    python -m jstream.bench --mode=train --config=configs/tiny.py --stage=3
    python -m jstream.bench --mode=rows --config=configs/tiny.py

What is measured, and what was found where: docs/benchmarks.md. `--mode=peer`, and `--peer` with `--mode=train`, need
the extra `parity`. The folder gets `report.json`.
"""

from collections.abc import Callable, Sequence

from absl import flags

from jstream import command
from jstream.benchmarks import peer, report, rows, serve, stream_peer, streams, train, turn
from jstream.benchmarks.report import Figure
from jstream.config import ConfigError, TrainConfig

_MODE = flags.DEFINE_string("mode", None, "What to measure: see the examples.")
_OUT = flags.DEFINE_string("out", None, "Folder of the report, made if missing.")
_STEPS = flags.DEFINE_integer("steps", 20, "How many steps, or rows, are timed.", lower_bound=1)
_FRAMES = flags.DEFINE_integer("frames", 0, "Frame slots of a row, or frames of a stream.", lower_bound=0)

command.heading("Training (train, rows):")
_STAGE = flags.DEFINE_integer("stage", -1, "Of the config, the first is 0; the last by default.")
_TURNS = flags.DEFINE_integer("turns", 60, "Turns of each made-up dialogue.", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", 0, "Rows of a step, in one part; the stage's by default.", lower_bound=0)
_TOKENS = flags.DEFINE_integer("tokens", 0, "Token slots of a row; the stage's by default.", lower_bound=0)
_PEER = flags.DEFINE_bool("peer", False, "Beside the same step in torch; extra `parity`.")
_DIALOGUES = flags.DEFINE_string("dialogues", "", "Annotations or prepared folder; the world by default.")
_WORKERS = flags.DEFINE_integer("workers", 2, "The most processes that make rows; one is timed too.", lower_bound=1)
_STEP_MS = flags.DEFINE_float("step_ms", 0.0, "Of a training step: how long would it wait for rows?")

command.heading("Streams (frame, reply, peer, engine, longrun, serve):")
_STREAMS = flags.DEFINE_integer("streams", 16, "How many are watched at once.", lower_bound=1)
_SLOTS = flags.DEFINE_integer("slots", 1024, "Tokens that the cache can hold.", lower_bound=64)
_SEEN = flags.DEFINE_integer("seen", 0, "Tokens already seen; as many as it can hold by default.", 0)
_HOSTILE = flags.DEFINE_bool("hostile", False, "Of serve: once more, with hostile clients beside them.")
_MEMORY = flags.DEFINE_string("memory", "", "Policy; append by default, sinks for a long run.")


def _train(config: TrainConfig | None) -> Sequence[Figure]:
    config = _with_stages(config)
    if _PEER.value:
        return peer.measure(config, _STAGE.value, _STEPS.value, _TURNS.value)
    return train.measure(config, _STAGE.value, _STEPS.value, _TURNS.value)


def _rows(config: TrainConfig | None) -> Sequence[Figure]:
    config = _with_stages(config)
    return rows.measure(config, _STAGE.value, _DIALOGUES.value, _WORKERS.value, _STEPS.value, _STEP_MS.value)


def _with_stages(config: TrainConfig | None) -> TrainConfig:
    if config is None or not config.stages:
        raise ConfigError("expected --config=FILE with stages, e.g. --config=configs/tiny.py")
    return train.sized(config, _STAGE.value, _ROWS.value, _FRAMES.value, _TOKENS.value)


def _engine(config: TrainConfig | None) -> Sequence[Figure]:
    return streams.measure_engine(config, _STREAMS.value, _FRAMES.value or 60, _MEMORY.value or "append")


def _longrun(config: TrainConfig | None) -> Sequence[Figure]:
    return streams.measure_longrun(config, _FRAMES.value or 10_000, _MEMORY.value or "sinks")


def _turn(config: TrainConfig | None) -> Sequence[Figure]:
    return turn.measure(config, _MODE.value or "frame", _SLOTS.value, _STEPS.value, _SEEN.value)


def _stream_peer(config: TrainConfig | None) -> Sequence[Figure]:
    return stream_peer.measure(config, _SLOTS.value, _STEPS.value)


def _serve(_: TrainConfig | None) -> Sequence[Figure]:
    return serve.measure(_STREAMS.value, _FRAMES.value or 600, _HOSTILE.value)


MODES: dict[str, Callable[[TrainConfig | None], Sequence[Figure]]] = {
    "train": _train,
    "rows": _rows,
    "engine": _engine,
    "longrun": _longrun,
    "frame": _turn,
    "reply": _turn,
    "peer": _stream_peer,
    "serve": _serve,
}


def main() -> None:
    if _MODE.value not in MODES:
        raise ConfigError(f"mode: expected --mode={'|'.join(MODES)}, found {_MODE.value!r}")
    figures = MODES[_MODE.value](command.given_config())
    where = report.machine()
    print(report.table(where, figures))
    if _OUT.value:
        print(f"done: {report.write(_OUT.value, _MODE.value, where, figures)}")


if __name__ == "__main__":
    command.run(main)
