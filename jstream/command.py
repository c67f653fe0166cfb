"""What every command shares: flags and a config in, one line out when something the user can mend is wrong, and a help
that fits on a screen.

The help is made of the docstring of the command's module: its first paragraph says what the command does, and what
stands indented in it are the examples. A flag has one line, in the order in which the flags are defined.
"""

import inspect
import os
import pathlib
import re
import sys
import textwrap
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from jstream.config import TrainConfig, from_dict
from jstream.errors import Stopped, UserError

_STOPPED = 143  # as a shell says that SIGTERM ended it

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="A file such as configs/streamo.py:7b; --config.a.b=c changes a value of it."
)

_COLUMNS = 80
_HEADINGS: dict[int, str] = {}  # by how many flags there are before it


def heading(text: str) -> None:
    """Puts a line into the help, before the flags that are defined after it."""
    _HEADINGS[len(flags.FLAGS)] = text


def given_config() -> TrainConfig | None:
    """The config that --config names, with what the command line changes in it.

    Raises:
        ConfigError: where it does not fit.
    """
    return None if _CONFIG.value is None else from_dict(TrainConfig, _CONFIG.value.to_dict(), "config")


def run(main: Callable[[], Any]) -> None:
    """Parses the flags, calls `main`, and exits: 0, 1 with a line for an error a user can mend, 2 for wrong flags."""
    asked = [argument.lstrip("-").partition("=")[0] for argument in sys.argv[1:] if argument.startswith("-")]
    if any(name in ("h", "help", "helpshort", "helpfull") for name in asked):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # … is not in every encoding
        try:
            print(full_help(main) if "helpfull" in asked else short_help(main), flush=True)
        except BrokenPipeError:  # `| head` has seen enough; nothing is left to be flushed at the end either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)

    logging.set_verbosity(logging.WARNING)
    logging.get_absl_logger().setLevel("CRITICAL")  # orbax and jax tell every step they take; what fails raises

    def parse(argv: list[str]) -> list[str]:
        for argument in argv:
            path = argument.removeprefix("--config=").partition(":")[0]
            if argument.startswith("--config=") and not os.path.isfile(path):
                fail(f"--config={path}: expected a configuration file, found nothing there", code=2)
        try:
            rest = flags.FLAGS(argv)
        except Exception as error:  # a configuration file is Python, and can fail in any way
            what = "" if isinstance(error, flags.Error | LookupError | AttributeError) else f"{type(error).__name__}: "
            fail(what + str(error.args[0] if error.args else error).strip("'\""), code=2)
        if len(rest) > 1:
            fail(f"expected flags only, found {rest[1]!r}", code=2)
        return rest

    def guarded(_: list[str]) -> None:
        try:
            main()
        except (UserError, OSError) as error:
            if os.environ.get("JSTREAM_TRACEBACK"):
                raise
            if isinstance(error, OSError) and error.filename is not None:
                fail(f"{error.filename}: {error.strerror}")
            fail(str(error))
        except Stopped as stopped:  # not an end: whoever started the run should see that it has to be started again
            fail(str(stopped), code=_STOPPED)
        except KeyboardInterrupt:
            fail("interrupted", code=130)
        except BaseException as error:
            if "RESOURCE_EXHAUSTED" in str(error) and not os.environ.get("JSTREAM_TRACEBACK"):
                fail(
                    "the device is out of memory; take a smaller --capacity, several devices (--tensor=4) or weights "
                    f"in int8 (jstream.convert --int8): {str(error).splitlines()[0][:200]}"
                )
            if _is_one_of_several():  # an error of ours, with its traceback
                traceback.print_exc()
                _leave(1)
            raise

    app.run(guarded, flags_parser=parse)


def fail(message: str, code: int = 1) -> NoReturn:
    """Ends the process with one line on stderr."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Ends the process; one of several that fails ends at once, as it would wait for the others, and they for it."""
    if _is_one_of_several() and code not in (0, _STOPPED):
        os._exit(code)
    sys.exit(code)


def _is_one_of_several() -> bool:
    jax = sys.modules.get("jax")  # a command that has no use for it does not wait for it
    return jax is not None and jax.distributed.is_initialized()


# ------------------------------------------------------------------------------------------------------------- help


def short_help(main: Callable[[], Any]) -> str:
    """What a command does, examples, and a line for each flag of its own, within 80 columns.

    Args:
        main: a function of the command's module.
    """
    name, docstring = _called(main), _docstring(main)
    what = textwrap.wrap(" ".join(docstring.partition("\n\n")[0].split()), _COLUMNS)
    examples = [line[2:] for line in docstring.splitlines() if line.startswith("    ")]
    places = {flag: place for place, flag in enumerate(flags.FLAGS)}
    own = flags.FLAGS.get_flags_for_module(sys.argv[0] if main.__module__ == "__main__" else main.__module__)
    source = inspect.getsourcefile(main)
    if source is not None and "given_config(" in pathlib.Path(source).read_text("utf-8"):  # others have no use for it
        above = [flag for flag in own if places[flag.name] < min(_HEADINGS, default=len(places))]
        own.insert(len(above), flags.FLAGS["config"])
    width = max(len(_left(flag)) for flag in own)
    lines = [f"usage: {name} [--FLAG=VALUE …]", "", *what, "", *examples, ""]
    for flag in own:
        if title := _HEADINGS.get(places[flag.name]):
            lines.append(title)
        lines += textwrap.wrap(
            _meaning(flag),
            _COLUMNS,
            initial_indent=f"  {_left(flag):{width}}  ",
            subsequent_indent=" " * (width + 4),
            break_on_hyphens=False,
        )
    return "\n".join([*lines, "", f"{name} --helpfull tells everything."])


def full_help(main: Callable[[], Any]) -> str:
    """The whole docstring of a command's module, and every flag that absl knows, those of libraries too."""
    app.define_help_flags()
    return f"usage: {_called(main)} [--FLAG=VALUE …]\n\n{_docstring(main)}\n\nflags:\n{flags.FLAGS.get_help()}"


_CONSOLE = re.compile(r"((?:python -m )?jstream) [\w ]+")  # what jstream/__main__.py calls the program


def _called(main: Callable[[], Any]) -> str:
    """The command as the user has called it."""
    if _CONSOLE.fullmatch(sys.argv[0]):
        return sys.argv[0]
    spec = main.__globals__["__spec__"]
    return f"python {sys.argv[0]}" if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"


def _docstring(main: Callable[[], Any]) -> str:
    """That of the command's module, with every command in it written as the user has called this one."""
    docstring = inspect.cleandoc(main.__globals__["__doc__"])
    if console := _CONSOLE.fullmatch(sys.argv[0]):
        written = lambda found: f"{console[1]} {found[1].replace('.', ' ')}"
        docstring = re.sub(r"python -m jstream\.([\w.]*\w)", written, docstring)
    return docstring


def _left(flag: flags.Flag) -> str:
    """`--name=default`, or what kind of value it takes where there is no default."""
    if flag.boolean:
        return f"--{'no' if flag.default else ''}{flag.name}"
    if flag.name == "config":
        return "--config=FILE"
    kind = flag.parser.flag_type()
    value = flag.default
    if value in (None, "", []):
        value = {"int": "N", "float": "X"}.get(kind, "…")
    return f"--{flag.name}={value:g}" if isinstance(value, float) else f"--{flag.name}={value}"


def _meaning(flag: flags.Flag) -> str:
    """The help of a flag, with what absl adds to it in fewer words."""
    text = re.sub(r"\.?;\s+repeat this option to specify a list of values", "; may be repeated.", flag.help or "")
    choices = getattr(flag.parser, "enum_values", None)
    return f"{', '.join(choices)}: {text.partition('>: ')[2]}" if choices else text
