"""Starts one training as several processes of this machine's CPU, to try what a cluster does without one.

    python launch/local.py --processes=2 --devices=2 [--restarts=3] -- --config=configs/tiny.py --workdir=runs/two

Every process is `python -m jstream.train --distributed …` with so many CPU devices of its own; JAX joins them. What
process 0 prints comes through as it is, what another prints only if it fails. When one fails, all end, and with
--restarts all are started again: the run goes on from its last checkpoint. One accelerator machine does not need this:
a single process uses all of its devices.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

_POLL = 0.05  # seconds
_GRACE = 5.0  # seconds from SIGTERM to SIGKILL, when another process has failed
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's own options, and what follows `--`, which goes to every process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1, help="CPU devices of each process")
    parser.add_argument("--restarts", type=int, default=0, help="how often all are started again after one has failed")
    parser.add_argument("--module", default="jstream.train", help="what runs, as in `python -m`")
    end = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:end])
    if min(options.processes, options.devices) < 1 or options.restarts < 0:
        parser.error("expected --processes and --devices ≥ 1 and --restarts ≥ 0")
    return options, argv[end + 1 :]


def environment(number: int, options: argparse.Namespace, port: int) -> dict[str, str]:
    """What tells JAX where a process stands.

    JAX itself reads the coordinator's address, `jstream.train` the other two.
    """
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(options.devices),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(options.processes),
        "JAX_PROCESS_ID": str(number),
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def die_with_parent() -> None:
    """Called in a new process: Linux kills it when the launcher ends, even by SIGKILL, after which nobody could signal
    a process group. SIGTERM would not do: JAX takes it for the notice of a preemption and goes on.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Launch:
    """The processes of one start after another, and the signal that ended them, if one did."""

    def __init__(self, options: argparse.Namespace, arguments: list[str]):
        self._options = options
        self._command = [sys.executable, "-m", options.module, "--distributed", *arguments]
        self._processes: list[subprocess.Popen] = []
        self.signal = 0

    def pass_on(self, number: int, _frame) -> None:
        """Handles a signal: all get it and may take their time to save; a second one kills."""
        for process in self._processes:
            process.send_signal(signal.SIGKILL if self.signal else number)
        self.signal = number

    def run(self) -> int:
        """Starts all and waits for all; returns the exit code of the first that failed, or 0."""
        port, outputs, self._processes = free_port(), [], []
        for number in range(self._options.processes):
            outputs.append(tempfile.TemporaryFile() if number else None)  # None: the launcher's own
            self._processes.append(
                subprocess.Popen(
                    self._command,
                    env=environment(number, self._options, port),
                    stdin=subprocess.DEVNULL,
                    stdout=outputs[number],
                    stderr=outputs[number],
                    process_group=0,  # so Ctrl-C in a terminal reaches only the launcher, which passes it on once
                    preexec_fn=die_with_parent,
                )
            )
        if self.signal:  # it came while they were being started: there is nothing to save yet
            self.pass_on(self.signal, None)
        failed, codes = [], [None]
        while None in codes and (self.signal or not failed):
            time.sleep(_POLL)
            codes = [process.poll() for process in self._processes]
            failed = failed or [number for number, code in enumerate(codes) if code]
        self._end()
        for number in failed:
            print(f"process {number} of {self._options.processes} ended with {codes[number]}", file=sys.stderr)
            if number and not self.signal:
                outputs[number].seek(0)
                for line in outputs[number].read().decode(errors="replace").splitlines():
                    print(f"[{number}] {line}", file=sys.stderr)
        code = codes[failed[0]] if failed else 0
        return code if code >= 0 else 128 - code  # as a shell says that a signal ended it

    def _end(self) -> None:
        """Ends what is left: alone, no process can save or go on. What a failed one started goes with it."""
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + _GRACE
        while any(process.poll() is None for process in self._processes) and time.monotonic() < deadline:
            time.sleep(_POLL)
        for process in self._processes:
            if process.returncode != 0:  # a group that ended well may be another's by now
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def main() -> int:
    options, arguments = parse(sys.argv[1:])
    launch = Launch(options, arguments)
    signal.signal(signal.SIGTERM, launch.pass_on)
    signal.signal(signal.SIGINT, launch.pass_on)
    code = launch.run()
    for restart in range(options.restarts):
        if code == 0 or launch.signal:
            break
        print(f"starting all again: restart {restart + 1} of at most {options.restarts}", file=sys.stderr, flush=True)
        code = launch.run()
    return code


if __name__ == "__main__":
    sys.exit(main())
