"""What every command shares: flags in, one line out when something the user can mend is wrong."""

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging

from jstream.config import ConfigError
from jstream.data.dialogue import DialogueError
from jstream.data.video import VideoError
from jstream.models.cache import CacheFullError
from jstream.protocols.tokenizer import TokenizerError
from jstream.weights.checkpoint import CheckpointError

EXPECTED = (ConfigError, DialogueError, VideoError, TokenizerError, CheckpointError, CacheFullError, OSError)


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
        except KeyboardInterrupt:
            fail("interrupted", code=130)

    app.run(guarded, flags_parser=parse)


def fail(message: str, code: int = 1) -> NoReturn:
    """Ends the process with one line on stderr."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)
