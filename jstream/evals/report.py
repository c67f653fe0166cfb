"""What a scorer found, and how it is written: `report.json`, `report.md` and a chart of the scores.

A report says all that a number depends on: the rules in force, how many cases stand behind it, what in the predictions
did not fit, and how far chance alone would move it.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jstream.config import ConfigError
from jstream.data.dialogue import DialogueError
from jstream.evals.metrics import RESAMPLES

FILES = ("report.json", "report.md", "scores.png")
Part = tuple[float, float]  # of one question: (numerator, denominator); a metric is the ratio of their sums
MAX_METRICS = 200
_BLOCK = 2**22  # draws of the bootstrap held at a time


@dataclasses.dataclass(frozen=True)
class Report:
    """What a scorer found.

    Attributes:
        benchmark: its name.
        metrics: by name, in percent where `units` does not say otherwise; None without cases.
        intervals: of the metrics: the ends of the 95 % bootstrap interval.
        cases: of the metrics: numerator and denominator; none for a mean of others.
        rules: the rules in force: what each is about, and one sentence.
        notes: what in the predictions did not fit, one line each.
        means: of which metrics a metric is the mean.
        units: of metrics that are not in percent.
        drawn: what the bootstrap draws.
    """

    benchmark: str
    metrics: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]
    cases: dict[str, Part]
    rules: dict[str, str]
    notes: tuple[str, ...] = ()
    means: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    units: dict[str, str] = dataclasses.field(default_factory=dict)
    drawn: str = "questions"

    def to_json(self) -> dict[str, Any]:
        """What `report.json` holds."""
        counts = {name: {"numerator": round(a, 6), "cases": round(b, 6)} for name, (a, b) in self.cases.items()}
        units = {name: self.units.get(name, "%") for name in self.metrics}
        return {
            "metrics": self.metrics,
            "intervals": self.intervals,
            "counts": counts,
            "units": units,
            "means": self.means,
            "drawn": self.drawn,
            "rules": self.rules,
            "notes": self.notes,
        }


def rules_in_force(
    rules: Mapping[str, str], variants: Mapping[str, Mapping[str, str]], chosen: Collection[str]
) -> dict[str, str]:
    """The rules of a benchmark with those that the chosen variants put in their place.

    Raises:
        ConfigError: for a variant that the benchmark does not have.
    """
    for name in chosen:
        if name not in variants:
            raise ConfigError(f"variant: expected {' or '.join(variants) or 'none'}, found {name!r}")
    in_force = dict(rules)
    for name, its_rules in variants.items():
        in_force |= its_rules if name in chosen else {}
    return in_force


def make_report(
    benchmark: str,
    parts: Mapping[str, Sequence[Part]],
    rules: Mapping[str, str],
    notes: Sequence[str] = (),
    means: Mapping[str, Sequence[str]] | None = None,
    units: Mapping[str, str] | None = None,
    drawn: str = "questions",
) -> Report:
    """Computes metrics and their intervals.

    Args:
        parts: for each metric, one part a question, or what else is `drawn`.
        means: for further metrics, the metrics they are the plain mean of. The first of them comes first in the report,
            each of the others before what it is made of.
        units: of metrics that are no percentage.

    Raises:
        DialogueError: for more metrics than can be drawn.
    """
    means, units = dict(means or {}), dict(units or {})
    if len(parts) > MAX_METRICS:
        raise DialogueError(f"{benchmark}: expected at most {MAX_METRICS} tasks, found {len(parts)}")
    draws = {name: _draws(np.asarray(p, float).reshape(-1, 2), seed) for seed, (name, p) in enumerate(parts.items())}
    sums = {name: np.asarray(p, float).reshape(-1, 2).sum(axis=0) for name, p in parts.items()}
    values = {name: a / b if b else np.nan for name, (a, b) in sums.items()}
    for name in reversed(means):  # a mean of means follows what it is made of
        draws[name] = np.mean([draws[of] for of in means[name]], axis=0)
        values[name] = np.mean([values[of] for of in means[name]])

    metrics, intervals = {}, {}
    order = list(means)[:1]
    for name in list(means)[1:]:
        order += [name, *means[name]]
    for name in dict.fromkeys([*order, *parts]):
        scale = 1 if name in units else 100
        defined = bool(np.isfinite(values[name]))
        metrics[name] = round(scale * float(values[name]), 6) if defined else None
        ends = np.nanquantile(scale * draws[name], [0.025, 0.975]) if defined else None
        intervals[name] = None if ends is None else (round(float(ends[0]), 6), round(float(ends[1]), 6))
    cases = {name: (float(a), float(b)) for name, (a, b) in sums.items()}
    of = {name: tuple(names) for name, names in means.items()}
    return Report(benchmark, metrics, intervals, cases, dict(rules), tuple(notes), of, units, drawn)


def _draws(parts: np.ndarray, seed: int) -> np.ndarray:
    """[R]: the ratio over questions drawn again with replacement (`metrics.bootstrap`), to be averaged with others."""
    generator, ratios = np.random.Generator(np.random.PCG64(seed)), np.full(RESAMPLES, np.nan)
    if not parts[:, 1].any():
        return ratios
    step = max(1, _BLOCK // len(parts))
    for begin in range(0, RESAMPLES, step):
        drawn = generator.integers(len(parts), size=(min(step, RESAMPLES - begin), len(parts)))
        above, below = parts[drawn, 0].sum(axis=1), parts[drawn, 1].sum(axis=1)
        ratios[begin : begin + step] = np.divide(above, below, out=np.full(len(below), np.nan), where=below > 0)
    return ratios


# -------------------------------------------------------------------------------------------------------------- writing


def write(report: Report, out: str | pathlib.Path, inputs: Mapping[str, str] | None = None) -> None:
    """Writes `report.json`, `report.md` and `scores.png` into a folder, made if missing.

    Args:
        inputs: of what: names of files, say.
    """
    content = {"benchmark": report.benchmark, "inputs": dict(inputs or {}), **report.to_json()}
    with whole_files(out, FILES) as partial:
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        partial["report.json"].write_text(text, encoding="utf-8", errors="backslashreplace")
        partial["report.md"].write_text(markdown(report, inputs), encoding="utf-8", errors="backslashreplace")
        chart(report, partial["scores.png"])


@contextlib.contextmanager
def whole_files(out: str | pathlib.Path, names: Sequence[str]) -> Iterator[dict[str, pathlib.Path]]:
    """Where to write files of a folder, made if missing; they get their names together at the end.

    Stopped or failed, it leaves none behind, and those of an earlier run in the folder stay as they were.
    """
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    partial = {name: out / f"{name}.partial" for name in names}
    try:
        yield partial
        for name, path in partial.items():
            path.replace(out / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def table(report: Report) -> str:
    """The metrics of a report as a Markdown table that also reads well on a terminal."""
    rows = [("metric", "value", "95 % interval", "cases")]
    for name, value in report.metrics.items():
        ends = report.intervals[name]
        unit = report.units.get(name, "%")
        number = "–" if value is None else f"{value:.2f} {unit}".rstrip()
        rows.append((name, number, "–" if ends is None else f"{ends[0]:.2f} – {ends[1]:.2f}", _cases(report, name)))
    return aligned(rows)


def _cases(report: Report, name: str) -> str:
    if name in report.means:
        return f"mean of {', '.join(report.means[name])}" if len(report.means[name]) <= 6 else "mean of all below"
    above, below = report.cases[name]
    return f"{above:.0f} / {below:g}" if above == int(above) and name not in report.units else f"{below:g}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of them the head, as a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def markdown(report: Report, inputs: Mapping[str, str] | None = None) -> str:
    """A report to read: the table, the rules in force, and what did not fit."""
    about = "\n".join(f"- {what}: {which}" for what, which in (inputs or {}).items())
    rules = [f"- {what}: {rule}" for what, rule in report.rules.items()]
    notes = [f"- {line}" for line in report.notes] or ["- nothing"]
    cases = f"Cases: right / all, or what a mean is over. The intervals resample {report.drawn}."
    parts = [
        f"# {report.benchmark}",
        *filter(None, [about]),
        table(report),
        cases,
        "## Rules in force",
        "\n".join(rules),
    ]
    return "\n\n".join([*parts, "## What did not fit", "\n".join(notes)]) + "\n"


def chart(report: Report, path: pathlib.Path) -> None:
    """Draws the metrics as bars with their intervals, as PNG; one panel for each unit, totals and
    means darker."""
    from matplotlib.figure import Figure  # a third of a second, for those who draw

    units = list(dict.fromkeys(report.units.get(name, "%") for name in report.metrics))
    panels = [[name for name in report.metrics if report.units.get(name, "%") == unit] for unit in units]
    height = 0.34 * len(report.metrics) + 1.0 * len(panels) + 0.4
    figure = Figure(figsize=(8, height), layout="constrained")
    ratios = [len(names) + 1.5 for names in panels]
    for axes, names, unit in zip(
        figure.subplots(len(panels), squeeze=False, height_ratios=ratios)[:, 0], panels, units
    ):
        rows, values = np.arange(len(names)), np.array([report.metrics[name] or 0.0 for name in names])
        colors = ["#4a7fb5" if name in report.means or name == "total" else "#a9c6e3" for name in names]
        axes.barh(rows, values, color=colors, height=0.72)
        tops = [ends[1] for name in names if (ends := report.intervals[name])]
        reach = max([*values, *tops, 100.0 if unit == "%" else 0.0]) or 1.0
        for row, name, value in zip(rows, names, values):
            ends = report.intervals[name]
            if ends is not None:
                axes.plot(ends, [row, row], color="#222222", linewidth=1.1, solid_capstyle="butt")
            end = value if ends is None else max(value, ends[1])
            text = "–" if report.metrics[name] is None else f"{value:.1f}" if unit == "%" else f"{value:.2f}"
            axes.text(end + 0.01 * reach, row, text, va="center", fontsize=9)
        labels = [name.encode(errors="backslashreplace").decode() for name in names]  # they may come from files
        axes.set_yticks(rows, labels, fontsize=9, parse_math=False)
        axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top
        axes.set_xlim(0, 1.09 * reach)
        axes.set_xlabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.suptitle(f"{report.benchmark}, with 95 % intervals", fontsize=11)
    figure.savefig(path, format="png", dpi=120)
