"""What every command shares: flags and a config in, one line out when something the user can mend is wrong."""

import os
import sys
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


def given_config() -> TrainConfig | None:
    """The config that --config names, with what the command line changes in it.

    Raises:
        ConfigError: where it does not fit.
    """
    return None if _CONFIG.value is None else from_dict(TrainConfig, _CONFIG.value.to_dict(), "config")


def run(main: Callable[[], Any]) -> None:
    """Parses the flags, calls `main`, and exits: 0, 1 with a line for an error a user can mend, 2 for wrong flags."""

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
