"""The command `jstream`: `jstream stream --video=…` is short for `python -m jstream.stream --video=…`.

It knows what commands there are and hands the rest of the line to one of them. It imports none of them and no JAX, so
that what can be done is listed at once.
"""

import difflib
import os
import runpy
import sys
from pathlib import PurePath
from typing import NoReturn

# What is typed, and what it does. A command is the module of its name; those behind `data` lie in `jstream.data`.
COMMANDS = {
    "stream": "watch videos, cameras and live streams",
    "serve": "the same over the network, for many at once",
    "train": "train a model, or go on with a run",
    "evaluate": "score a model, or what any model answered",
    "convert": "turn published weights into ours and back, or into int8",
    "bench": "measure speed and memory on the devices here",
    "features": "compute once what a frozen vision tower sees",
    "data world": "write the synthetic world as videos with dialogues",
    "data prepare": "make dialogues of published annotations",
    "data streamo_instruct": "decode annotated videos once, to train on",
    "data synthesis": "make instruction data with a language model",
}
_HELP = ("--help", "-h", "-help", "help")


def listing(called: str, inside: str) -> str:
    """The commands inside `data`, or all where `inside` is empty, a line each."""
    shown = {name: what for name, what in COMMANDS.items() if name.startswith(inside)}
    width = max(map(len, shown))
    return "\n".join(
        [
            f"usage: {' '.join(filter(None, [called, inside]))} COMMAND [--FLAG=VALUE ...]",
            "",
            *(f"  {name:{width}}  {what}" for name, what in shown.items()),
            "",
            f"{called} {next(iter(shown))} --help tells what a command takes.",
            *(() if inside else (f"{called} --version tells the version.",)),
        ]
    )


def main() -> None:
    """Runs the command that is named, lists them where none is, and exits with 2 for one that does not exist."""
    called = "jstream" if PurePath(sys.argv[0]).stem == "jstream" else "python -m jstream"
    given = sys.argv[1:]
    inside = "data" if given[:1] == ["data"] else ""
    rest = given[1:] if inside else given
    if not rest or rest[0] in _HELP:
        try:
            print(listing(called, inside), flush=True)
        except BrokenPipeError:  # as in `jstream.command`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if rest[0] == "--version" and not inside:
        from importlib import metadata

        print(f"jstream {metadata.version('jstream')}")
        return
    name = " ".join(filter(None, [inside, rest[0]]))
    if name not in COMMANDS:
        _unknown(name, inside)
    sys.argv = [f"{called} {name}", *rest[1:]]  # what `jstream.command` and absl call the program
    runpy.run_module(f"jstream.{name.replace(' ', '.')}", run_name="__main__")


def _unknown(name: str, inside: str) -> NoReturn:
    known = [command for command in COMMANDS if command.startswith(inside)]
    if not inside:  # whoever types `jstream world` means `jstream data world`
        known += [command.partition(" ")[2] for command in COMMANDS if " " in command]
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        meant = near[0] if near[0] in COMMANDS else f"data {near[0]}"
        advice = f"did you mean {meant!r}?"
    else:
        advice = f"known: {', '.join(command for command in COMMANDS if command.startswith(inside))}"
    print(f"error: expected a command, found {name!r}; {advice}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
