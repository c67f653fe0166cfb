"""The command `jstream`, and the help of every command: it fits on a screen and shows every flag, and what works."""

import ast
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from jstream.__main__ import COMMANDS

ROOT = pathlib.Path(__file__).resolve().parent.parent
COLUMNS, LINES = 80, 45
SCRIPT = [sys.executable, "-c", "import sys; sys.argv[0] = 'bin/jstream'; from jstream.__main__ import main; main()"]

# whoever shares the way in is a command
FOUND = {
    " ".join(path.relative_to(ROOT / "jstream").with_suffix("").parts).removesuffix(" __main__"): path
    for path in sorted((ROOT / "jstream").rglob("*.py"))
    if "command.run(main)" in path.read_text(encoding="utf-8")
}


def run(*arguments: str, program=SCRIPT) -> subprocess.CompletedProcess:
    environment = os.environ | {"COLUMNS": "200"}  # what a terminal is wide changes nothing
    return subprocess.run(
        [*program, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )


def flags_of(command: str) -> list[str]:
    """The flags that a command's module defines, from its source."""
    tree = ast.parse(FOUND[command].read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func).startswith("flags.DEFINE_")]


def examples_in(text: str) -> list[list[str]]:
    """What is indented and runs jstream, as words; a comment and the end of a line with a backslash are left out."""
    joined = re.sub(r"\\\n\s+", "", text)
    lines = [line.strip() for line in joined.splitlines() if re.match(r" +(python -m )?jstream\b", line)]
    return [shlex.split(line, comments=True) for line in lines]


def checked(words: list[str]) -> str:
    """The command of an example, whose flags all exist."""
    words = words[2:] if words[:2] == ["python", "-m"] else words
    first = next(number for number, word in enumerate([*words, "--"]) if word.startswith("--"))
    command = " ".join(words[:first]).replace(".", " ").removeprefix("jstream ")
    given = {name: value for name, _, value in (word.removeprefix("--").partition("=") for word in words[first:])}
    assert command in COMMANDS, words
    assert all(word.startswith("--") for word in words[first:]), words
    unknown = {name for name in given if name.partition(".")[0] != "config"} - set(flags_of(command))
    assert not unknown, f"{command} has no {unknown}"
    if "config" in given:
        assert (ROOT / given["config"].partition(":")[0]).is_file(), words
    return command


@pytest.mark.smoke
def test_every_command_is_listed_in_a_line_and_no_jax_is_needed_for_that():
    program = [
        sys.executable, "-X", "importtime", "-c",
        "import sys; sys.argv = ['jstream']; from jstream.__main__ import main; main()",
    ]  # fmt: skip
    bare = run(program=program)
    assert bare.returncode == 0
    assert bare.stdout == run("--help").stdout
    assert {line.rpartition("|")[2].strip() for line in bare.stderr.splitlines()}.isdisjoint({"jax", "absl", "numpy"})
    lines = bare.stdout.splitlines()
    assert all(len(line) <= COLUMNS for line in lines)
    for command, what in COMMANDS.items():
        assert sum(line.split("  ")[1:2] == [command] and line.endswith(what) for line in lines) == 1, command


def test_all_that_is_a_command_is_in_the_table():
    assert FOUND.keys() <= COMMANDS.keys()
    assert {"stream", "train", "evaluate", "convert", "bench", "features", "data world"} <= FOUND.keys()


@pytest.mark.parametrize("command", FOUND)
def test_help_fits_on_a_screen_names_every_flag_and_shows_what_works(command):
    shown = run(*command.split(), "--help")
    assert shown.returncode == 0 and not shown.stderr
    lines = shown.stdout.splitlines()
    assert len(lines) <= LINES
    assert [line for line in lines if len(line) > COLUMNS] == []
    assert lines[0].startswith(f"usage: jstream {command} ")
    assert lines[-1] == f"jstream {command} --helpfull tells everything."
    named = re.findall(r"^  --(\w+)", shown.stdout, flags=re.MULTILINE)
    assert [name for name in named if name != "config"] == flags_of(command)
    assert ("config" in named) == ("given_config(" in FOUND[command].read_text(encoding="utf-8"))
    assert command in [checked(words) for words in examples_in(shown.stdout)]


def test_help_calls_a_command_as_the_user_did():
    short = run("data", "world", "-h").stdout
    for program, called in (
        ([sys.executable, "-m", "jstream", "data", "world"], "python -m jstream data world"),
        ([sys.executable, "-m", "jstream.data.world"], "python -m jstream.data.world"),
    ):
        shown = run("--help", program=program).stdout
        assert f"\n  {called} --out=runs/world" in shown
        assert shown.replace(called, "jstream data world") == short


def test_defaults_and_choices_stand_in_the_help():
    shown = run("evaluate", "--help").stdout
    assert "  --protocol=official  official, streaming: How questions are asked.\n" in shown
    assert "  --num_videos=64      How many" in shown and "  --seed=N             Names" in shown
    assert "  --variant=…          Another rule of the benchmark; may be repeated.\n" in shown
    assert "  --rendered           Takes frames" in shown and "  --fps=1              Frames" in shown


def test_the_long_help_has_the_whole_docstring_and_the_flags_of_libraries():
    full = run("data", "world", "--helpfull")
    assert full.returncode == 0
    assert "Stopped, it goes on" in full.stdout
    assert "--num_videos: How many videos." in full.stdout and "--verbosity" in full.stdout


def test_the_inner_commands_are_listed_by_their_room():
    shown = run("data")
    assert shown.returncode == 0 and shown.stdout == run("data", "--help").stdout
    assert re.findall(r"^  (\w+ \w+)", shown.stdout, flags=re.MULTILINE) == [c for c in COMMANDS if c[:5] == "data "]


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["strem"], "expected a command, found 'strem'; did you mean 'stream'?"),
        (["world"], "expected a command, found 'world'; did you mean 'data world'?"),
        (["data", "wrld"], "expected a command, found 'data wrld'; did you mean 'data world'?"),
        (["zzz"], "expected a command, found 'zzz'; known: stream, serve, train"),
        (["--fps=2", "stream"], "expected a command, found '--fps=2'"),
    ],
)
def test_an_unknown_command_is_an_error_that_names_the_nearest(typed, line):
    done = run(*typed)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"error: {line}") and len(done.stderr.splitlines()) == 1


def test_the_same_flags_both_ways(tmp_path):
    made = {}
    for name, program in (
        ("short", [*SCRIPT, "data", "world"]),
        ("long", [sys.executable, "-m", "jstream.data.world"]),
    ):
        out = tmp_path / name
        done = run(
            f"--out={out}", "--num_videos=2", "--min_seconds=10", "--max_seconds=10", "--seed=3", program=program
        )
        assert done.returncode == 0, done.stderr
        made[name] = (out / "dialogues.jsonl").read_text()
        wrong = run("--num_video=2", program=program)
        assert wrong.returncode == 2 and "num_video" in wrong.stderr and len(wrong.stderr.splitlines()) == 1
    assert made["short"] == made["long"]


def test_the_version_is_that_of_the_package():
    declared = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert declared and run("--version").stdout == f"jstream {declared[1]}\n"
