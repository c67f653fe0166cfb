"""The promises around the code: the README's two commands are found word for word, and CI lets no test be skipped."""

import os
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def test_the_readme_has_exactly_the_two_commands_that_ci_runs():
    listed = subprocess.run(["bash", REPOSITORY / ".ci/run", "--list"], capture_output=True, text=True, check=True)
    install, test = listed.stdout.splitlines()
    assert install == (
        "python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && .venv/bin/python -m jstream.stream"
    )
    assert test == ".venv/bin/python -m pytest -q -n 2 --dist=worksteal"


@pytest.mark.parametrize(
    "readme", ["no commands", "<!-- ci:1 -->\n```bash\ntrue\n```\n", "<!-- ci:1 -->\n<!-- ci:2 -->\n"]
)
def test_a_readme_without_two_commands_is_an_error(tmp_path, readme):
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci/run").write_bytes((REPOSITORY / ".ci/run").read_bytes())
    (tmp_path / "README.md").write_text(readme)
    listed = subprocess.run(["bash", tmp_path / ".ci/run", "--list"], capture_output=True, text=True)
    assert listed.returncode == 1 and "expected two commands" in listed.stderr


SKIPS = {
    "a call": "def test_it():\n    pytest.skip('no video')",
    "a mark": "@pytest.mark.skip(reason='no video')\ndef test_it(): pass",
    "a whole file": "pytest.skip('no video', allow_module_level=True)",
    "missing shared data": "def test_it(shared_data): pass",
}


def run_pytest(folder: pathlib.Path, body: str, ci: str, *flags: str) -> subprocess.CompletedProcess:
    """Runs a test file, beside one test that passes, with the project's conftest.py in a folder of its own."""
    tests = folder / "checkout/tests"
    tests.mkdir(parents=True)
    (tests / "conftest.py").write_bytes((REPOSITORY / "tests/conftest.py").read_bytes())
    (tests / "test_it.py").write_text("import pytest\n\n" + body)
    (tests / "test_passes.py").write_text("def test_passes(): pass")
    (tests.parent / "pytest.ini").write_text("[pytest]\nmarkers = may_skip(reason)\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTEST_ADDOPTS", "JSTREAM_SHARED")} | {"CI": ci}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *flags, "."]
    return subprocess.run(command, cwd=tests.parent, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("flags", [(), ("-n", "2")], ids=["in one process", "in two"])
@pytest.mark.parametrize("body", SKIPS.values(), ids=SKIPS)
def test_on_ci_a_skipped_test_is_a_failure_that_is_named(tmp_path, body, flags):
    run = run_pytest(tmp_path, body, "true", *flags)
    assert run.returncode == 1
    assert "counts as a failure: tests/test_it.py" in run.stdout
    assert "1 passed, 1 skipped" in run.stdout.splitlines()[-1]


def test_elsewhere_a_test_may_be_skipped(tmp_path):
    assert run_pytest(tmp_path, SKIPS["a call"], ci="").returncode == 0


def test_a_test_that_may_skip_gives_its_reason(tmp_path):
    body = "def test_it():\n    pytest.skip('no GPU')"
    assert run_pytest(tmp_path / "1", f"@pytest.mark.may_skip('needs a GPU')\n{body}", ci="true").returncode == 0
    without = run_pytest(tmp_path / "2", f"@pytest.mark.may_skip\n{body}", ci="true")
    assert without.returncode != 0 and "expected may_skip" in without.stdout + without.stderr


def test_an_expected_failure_is_not_a_skip(tmp_path):
    body = "@pytest.mark.xfail\ndef test_it():\n    assert False"
    assert run_pytest(tmp_path, body, ci="true").returncode == 0
