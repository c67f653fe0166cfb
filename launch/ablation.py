"""Tunes one base model with each objective for state tokens, several seeds each, and tells what came out.

    python launch/ablation.py --out=runs/ablation [--seeds=1,2,3] [--objectives=ce,focal]

Stopped, the same command goes on. At the end `table.md` and `results.json` lie in the folder. Everything it starts is a
command that can be given by hand (configs/ablation.py shows them).
"""

import argparse
import json
import pathlib
import runpy
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence

from tqdm import tqdm

MEASURED = {  # metric of the world benchmark → what the table calls it
    "state_accuracy": "state accuracy",
    "response_recall": "response recall",
    "response_precision": "response precision",
    "reply_timing_f1": "replies, timing F1",
    "reply_f1": "replies, exact F1",
    "count_accuracy": "counting",
    "forward_miou": "forward grounding, mIoU",
    "backward_miou": "backward grounding, mIoU",
    "false_responses_per_minute": "out of place, a minute",
}
CONFIG = "configs/ablation.py"
OBJECTIVES = tuple(runpy.run_path(str(pathlib.Path(__file__).resolve().parent.parent / CONFIG))["OBJECTIVES"])


def command_of(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"jstream.{module}", *arguments]


def training(name: str, seed: str, workdir: pathlib.Path, base: pathlib.Path | None = None) -> list[str]:
    arguments = [f"--config={CONFIG}:{name}", f"--config.seed={seed}", f"--workdir={workdir}"]
    return command_of("train", *arguments, *([] if base is None else [f"--config.weights.checkpoint={base}"]))


def evaluation(model: pathlib.Path, out: pathlib.Path, num_videos: int) -> list[str]:
    arguments = ["--benchmark=world", "--seed=7", f"--num_videos={num_videos}", f"--checkpoint={model}", f"--out={out}"]
    return command_of("evaluate", *arguments)


def missing(out: pathlib.Path, objectives: Sequence[str], seeds: Sequence[str], num_videos: int) -> list[list[str]]:
    """The commands that are left to be run, in order."""
    base = out / "base" / "model"
    wanted = [(base, training("base", "1", out / "base"))]
    for seed in seeds:  # a table of fewer seeds is there as soon as it can be
        for name in objectives:
            run = out / f"{name}-{seed}"
            wanted.append((run / "model", training(name, seed, run, base)))
            wanted.append((run / "scores" / "report.json", evaluation(run / "model", run / "scores", num_videos)))
    return [arguments for made, arguments in wanted if not made.exists()]


def results(out: pathlib.Path, objectives: Sequence[str], seeds: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Objective → metric → its value for each seed."""
    of = lambda name, seed: json.loads((out / f"{name}-{seed}" / "scores" / "report.json").read_text())["metrics"]
    reports = {name: [of(name, seed) for seed in seeds] for name in objectives}
    return {name: {metric: [found[metric] for found in reports[name]] for metric in MEASURED} for name in objectives}


def table(found: dict[str, dict[str, list[float]]]) -> Iterator[str]:
    """Lines of Markdown: the mean over seeds, and the smallest and the largest value."""
    yield "| | " + " | ".join(found) + " |"
    yield "|---" * (len(found) + 1) + "|"
    for metric, title in MEASURED.items():
        cells = []
        for of_objective in found.values():
            values = [value for value in of_objective[metric] if value is not None]
            spread = f"{statistics.mean(values):.3f} ({min(values):.3f} – {max(values):.3f})" if values else "–"
            cells.append(spread)
        yield f"| {title} | " + " | ".join(cells) + " |"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    listed = lambda text: text.split(",")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of all runs, made if missing")
    parser.add_argument("--seeds", type=listed, default=["1", "2", "3"], help="of the videos that are learned from")
    parser.add_argument("--objectives", type=listed, default=list(OBJECTIVES), help="which to compare")
    parser.add_argument("--num_videos", type=int, default=24, help="fresh videos that each model is scored on")
    options = parser.parse_args(argv)
    if not set(options.objectives) <= set(OBJECTIVES):
        parser.error(f"expected --objectives among {', '.join(OBJECTIVES)}, found {', '.join(options.objectives)}")
    if not all(seed.isdecimal() for seed in options.seeds) or options.num_videos < 1:
        parser.error("expected --seeds such as 1,2,3 and --num_videos ≥ 1")
    return options


def main() -> int:
    options = parse()
    out, objectives, seeds = options.out, options.objectives, options.seeds
    out.mkdir(parents=True, exist_ok=True)
    for arguments in tqdm(missing(out, objectives, seeds, options.num_videos), unit="command"):
        tqdm.write(" ".join(["python", *arguments[1:]]))
        if code := subprocess.run(arguments).returncode:
            print(f"error: expected {' '.join(arguments[1:])} to end well, found exit code {code}", file=sys.stderr)
            return 1
    found = results(out, objectives, seeds)
    lines = list(table(found))
    for name, content in (("results.json", json.dumps(found, indent=1)), ("table.md", "\n".join(lines))):
        partial = out / f"{name}.partial"
        partial.write_text(content + "\n", encoding="utf-8")
        partial.replace(out / name)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
