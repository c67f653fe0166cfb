"""The command `python -m jstream.serve` as a process of its own, with the bundled model: for tests."""

import os
import pathlib
import re
import subprocess
import sys
import threading

from served import ask

from jstream.benchmarks.memory import resident

ROOT = pathlib.Path(__file__).resolve().parent.parent


class ServerProcess:
    """A server on a free port of loopback, that is ready.

    Args:
        compiled: folder in which programs are kept for the next one.
        token: that it wants.
        flags: of the command.
    """

    def __init__(self, compiled, *flags, token=None):
        self.headers = {"authorization": f"Bearer {token}"} if token else {}
        environment = {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "--xla_backend_optimization_level=1",
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        } | ({"JSTREAM_TOKEN": token} if token else {})
        command = [sys.executable, "-m", "jstream.serve", "--port=0", "--memory=sinks:20", "--max_new_tokens=8", *flags]
        self.process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
        self.printed = []
        for line in self._lines():
            if line.startswith("ready after"):
                break
        else:
            raise AssertionError(f"the server ended with {self.process.wait()}: {self.printed}")
        found = re.search(r"open http://127\.0\.0\.1:(\d+)/", "".join(self.printed))
        assert found, self.printed
        self.port = int(found[1])
        self._reading = threading.Thread(target=lambda: list(self._lines()), daemon=True)
        self._reading.start()

    def _lines(self):
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed.append(line)
            yield line

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        self.process.kill()
        self.process.wait()
        self._reading.join(10)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def ask(self, method, path, body=None):
        """See `served.ask`."""
        return ask(self.port, method, path, body, self.headers)

    @property
    def files(self):
        """Descriptors that the process has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def threads(self):
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    @property
    def processor_seconds(self):
        """That the process has computed."""
        ticks = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    @property
    def memory(self):
        """Resident bytes."""
        return resident(self.process.pid)
