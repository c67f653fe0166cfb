"""How much memory a process or its devices took at most."""

import ctypes
import gc
import pathlib

import jax

_RESET = pathlib.Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc_pid_clear_refs(5)


def device_peak() -> int | None:
    """Bytes that any device of this process held at most since it started; None where the backend does not count."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known else None


def resident(process: int | str = "self") -> int:
    """Bytes of memory that a process holds, this one by default; 0 where Linux does not tell."""
    return _of_status("VmRSS", process)


class ProcessPeak:
    """The most resident memory that this process takes from now on, beside what it has now: that of a program on a CPU.

    Args:
        counted: bytes of what is there already and belongs to the program, such as its params.
    """

    def __init__(self, counted: int):
        self.known = _RESET.exists()
        if self.known:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what was freed would be taken again without a trace
            _RESET.write_text(_RESET_PEAK)
        self._before = resident() - counted

    def bytes(self) -> int | None:
        """None where Linux does not tell."""
        return _of_status("VmHWM") - self._before if self.known else None


def _of_status(name: str, process: int | str = "self") -> int:
    status = pathlib.Path(f"/proc/{process}/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
