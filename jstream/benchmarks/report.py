"""What every benchmark shares: how something is timed, where it ran, and the report of it, as a table and as a file."""

import dataclasses
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np

LIBRARIES = ("jax", "jaxlib", "flax", "torch", "transformers")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One line of a report.

    Attributes:
        key: its name in `report.json`.
        value: None where it cannot be known here.
        form: how the table shows it.
    """

    key: str
    value: Any
    form: str = "{}"

    @property
    def text(self) -> str:
        return "unknown" if self.value is None else self.form.format(self.value)


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long something took that was done over and over.

    Attributes:
        whole: seconds of all of it, up to the end of the last one.
        each: seconds of each one: from the end of the one before to its own.
    """

    whole: float
    each: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.each))

    @property
    def p99(self) -> float:
        return float(np.percentile(self.each, 99))


def timed(dispatch: Callable[[], Any], times: int, done: Callable[[], Any] = lambda: None) -> Timing:
    """Times what the device does while the host is one ahead of it, as in training.

    Args:
        dispatch: starts one and returns arrays that are ready when it is over.
        done: called after each one, for a progress bar.
    """
    jax.effects_barrier()
    ends, before = [time.perf_counter()], None
    for _ in range(times):
        after = dispatch()
        if before is not None:
            jax.block_until_ready(before)
            ends.append(time.perf_counter())
            done()
        before = after
    jax.block_until_ready(before)
    ends.append(time.perf_counter())
    done()
    return Timing(ends[-1] - ends[0], tuple(np.diff(ends).tolist()))


def machine() -> dict[str, Any]:
    """Where this runs, and what with."""
    devices = jax.devices()
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": devices[0].device_kind if devices[0].platform != "cpu" else _processor(),
        "platform": devices[0].platform,
        "devices": len(devices),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    """The CPU's name, as Linux knows it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def table(where: dict[str, Any], figures: Sequence[Figure]) -> str:
    """The report for a reader: a name and a value in each line."""
    device = f"{where['devices']} × {where['device']}" if where["platform"] != "cpu" else where["device"]
    lines = [
        ("device", f"{device} ({where['platform']}, {where['cores']} cores)"),
        ("versions", ", ".join(f"{name} {version}" for name, version in where["versions"].items())),
        *((figure.key.replace("_", " "), figure.text) for figure in figures),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def write(folder: str | pathlib.Path, mode: str, where: dict[str, Any], figures: Sequence[Figure]) -> pathlib.Path:
    """Writes `report.json`, whole or not at all; an older one is replaced."""
    path = pathlib.Path(folder) / "report.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"mode": mode, "machine": where, **{figure.key: figure.value for figure in figures}}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return path
