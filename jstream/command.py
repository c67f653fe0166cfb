"""What every command shares: flags and a config in, one line out when something the user can mend is wrong."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from jstream.config import ConfigError, TrainConfig, from_dict
from jstream.data.dialogue import DialogueError
from jstream.data.video import VideoError
from jstream.models.cache import CacheFullError
from jstream.protocols.tokenizer import TokenizerError
from jstream.training.loop import Stopped, TrainingError
from jstream.weights.checkpoint import CheckpointError

EXPECTED = (
    ConfigError, DialogueError, VideoError, TokenizerError, CheckpointError, CacheFullError, TrainingError, OSError,
)  # fmt: skip

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
        except EXPECTED as error:
            if os.environ.get("JSTREAM_TRACEBACK"):
                raise
            if isinstance(error, OSError) and error.filename is not None:
                fail(f"{error.filename}: {error.strerror}")
            fail(str(error))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or os.environ.get("JSTREAM_TRACEBACK"):
                raise
            fail(
                "the device is out of memory; take a smaller --capacity, several devices (--tensor=4) or weights in "
                f"int8 (jstream.convert --int8): {str(error).splitlines()[0][:200]}"
            )
        except Stopped as stopped:  # not an end: whoever started the run should see that it has to be started again
            fail(str(stopped), code=_STOPPED)
        except KeyboardInterrupt:
            fail("interrupted", code=130)
        except BaseException:  # an error of ours, with its traceback
            if jax.distributed.is_initialized():
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
    if jax.distributed.is_initialized() and code not in (0, _STOPPED):
        os._exit(code)
    sys.exit(code)
