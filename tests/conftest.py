"""What every test shares: JAX on the CPU unless told otherwise, the shared data, and no silent skips on CI."""

import importlib.metadata
import importlib.util
import os
import pathlib

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before anything imports jax
# Four devices, for meshes; one is used otherwise. Small models take longer to compile than to run, and with these half
# as long as by default.
XLA_FLAGS = ["--xla_force_host_platform_device_count=4", "--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know it, and stop
    XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(XLA_FLAGS))

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
SKIPPED: list[str] = []  # on CI: what was skipped and may not be

# The reference implementations are an extra of their own; without them their tests are not there.
collect_ignore = [] if importlib.util.find_spec("torch") else ["parity"]
# so with compilers for what is not here; where only one is, it is the one for what is here
collect_ignore += [] if all(map(importlib.util.find_spec, ("libtpu", "jax_cuda13_plugin"))) else ["aot"]


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real videos, annotations and golden values: `$JSTREAM_SHARED/data`, or beside the checkout."""
    folder = pathlib.Path(os.environ.get("JSTREAM_SHARED") or REPOSITORY.parent / "shared") / "data"
    if not folder.is_dir():
        pytest.skip(f"expected the shared data at {folder}; JSTREAM_SHARED names its parent")
    return folder


# ---------------------------------------------------------------- on CI a skipped test is a failure, named at the end


def _on_ci() -> bool:
    return os.environ.get("CI", "").lower() == "true"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    expected_failure = hasattr(report, "wasxfail")
    if report.skipped and not expected_failure and not item.get_closest_marker("may_skip"):
        SKIPPED.append(f"{item.nodeid}: {report.longrepr[2]}")
    return report


def pytest_collectreport(report):
    if report.skipped:
        SKIPPED.append(f"{report.nodeid}: {report.longrepr[2]}")


def pytest_collection_modifyitems(items):
    for item in items:
        for marker in item.iter_markers("may_skip"):
            if not (marker.args or marker.kwargs.get("reason")):
                raise pytest.UsageError(f'{item.nodeid}: expected may_skip("reason"), found no reason')


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """With pytest-xdist: what one of its processes skipped."""
    SKIPPED.extend(line for line in node.workeroutput.get("skipped", ()) if line not in SKIPPED)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes; the first one judges
        session.config.workeroutput["skipped"] = SKIPPED
    elif _on_ci() and SKIPPED and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if _on_ci():
        for line in SKIPPED:
            terminalreporter.write_line(f"SKIPPED ON CI, which counts as a failure: {line}", red=True)
