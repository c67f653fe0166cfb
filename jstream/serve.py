"""Serves a page and an API for live streams, all watched by one model.

    python -m jstream.serve                           # then http://127.0.0.1:8000
    python -m jstream.serve --streams=4 --source_host=camera.example
    python -m jstream.serve --host=0.0.0.0 --certificate=FILE --key=FILE

Streams are cameras of browsers and programs over a WebSocket, and cameras of the network (`--source_host` allows one).
On another address than loopback everybody needs a token, and a phone's camera needs TLS. docs/serving.md tells
the rest.
"""

import contextlib
import dataclasses
import ipaddress
import os
import pathlib
import socket
import sys
import threading

import jax.numpy as jnp
from absl import flags
from tqdm import tqdm

from jstream import command
from jstream.config import ConfigError
from jstream.data.live import RECONNECT
from jstream.errors import UserError
from jstream.sharding import make_mesh
from jstream.streaming.engine import Engine
from jstream.streaming.memory import EXPECTED, parse_memory
from jstream.weights.checkpoint import BUNDLED
from jstream.weights.published import load_of_config

try:
    import uvicorn

    from jstream.serving import webhook
    from jstream.serving.access import HostRules, checked_origins, checked_token, make_token
    from jstream.serving.alerts import Alert, Alerts
    from jstream.serving.api import Server, create_app
    from jstream.serving.guard import Door
    from jstream.serving.hub import Hub, Progress
    from jstream.serving.limits import Limits
    from jstream.serving.outside import Outside
    from jstream.serving.transport import settings
except ModuleNotFoundError as error:
    command.fail(f"expected the extra `serve`, found no {error.name}; install it with pip install 'jstream[serve]'")

_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 for all there are.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on.", 0, 65535)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "Model folder or hub id; the bundled by default.")
_TENSOR = flags.DEFINE_integer("tensor", 1, "Devices that share the model.", 1)
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the params; float32 on a CPU, else bfloat16.")
_STREAMS = flags.DEFINE_integer("streams", 16, "Streams at once.", 1, 1024)
_MEMORY = flags.DEFINE_string("memory", "sinks", f"What is kept of a stream: {EXPECTED}.")
_CAPACITY = flags.DEFINE_integer("capacity", None, "Tokens of a stream's cache; enough by default.", 256)
_THRESHOLD = flags.DEFINE_float("threshold", None, "Speak when p(response) reaches this.", 0.0, 1.0)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "A reply is cut there.", 1, 4096)
_INT8_CACHE = flags.DEFINE_bool("int8_cache", False, "Keep keys and values in int8, in half the bytes.")
_SIZE = flags.DEFINE_string("frame_size", "640x360", "Of frames, where a tower keeps their aspect.")
_FPS_MAX = flags.DEFINE_float("fps_max", 30.0, "Frames a second of one stream, at most.", 0.01, 1000.0)
_TOKEN_FILE = flags.DEFINE_string("token_file", None, "With the token of clients; or JSTREAM_TOKEN.")
_ORIGIN = flags.DEFINE_multi_string("origin", [], "A further origin of pages, such as https://app.example.com.")
_SOURCE_HOST = flags.DEFINE_multi_string("source_host", [], "A host to watch: a name, *.name, address or network.")
_WEBHOOK_HOST = flags.DEFINE_multi_string("webhook_host", [], "A host to post to: the same, or the word public.")
_SECRET_FILE = flags.DEFINE_string("webhook_secret_file", None, "Signs alerts; or JSTREAM_WEBHOOK_SECRET.")
_SPOOL = flags.DEFINE_string("spool", "runs/serve/alerts", "Folder for alerts that are not received yet.")
_CERTIFICATE = flags.DEFINE_string("certificate", None, "TLS certificate, a PEM file.")
_KEY = flags.DEFINE_string("key", None, "Its key, a PEM file.")
_RECONNECT = flags.DEFINE_float("reconnect", RECONNECT, "Seconds for which a lost source is tried again.", 0.0)

UNREAD = 30_000  # milliseconds after which a connection is dropped whose other side takes nothing


def secret_from(flag: str, path: str | None, variable: str) -> str | None:
    """What a file or a variable of the environment holds.

    Raises:
        UserError: the file holds nothing.
    """
    text = os.environ.get(variable) if path is None else pathlib.Path(path).read_text(encoding="utf-8")
    if text is not None and not text.strip():
        raise UserError(f"{f'--{flag}={path}' if path else variable}: expected a secret, found nothing in it")
    return None if text is None else text.strip()


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def frame_size(text: str) -> tuple[int, int]:
    """Height and width of `WIDTHxHEIGHT`.

    Raises:
        ConfigError: it is not of this form.
    """
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and 16 <= int(width) <= 4096 and 16 <= int(height) <= 4096):
        raise ConfigError(f"--frame_size: expected WIDTHxHEIGHT from 16 to 4096 pixels, as in 640x360, found {text!r}")
    return int(height), int(width)


def listen(host: str, port: int) -> socket.socket:
    """A socket whose connections end where the other side takes nothing for long: buffers are not for ever.

    Raises:
        UserError: the address is taken, or not of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD)
        listening.bind(address)
    except OSError as error:
        raise UserError(
            f"--host={host} --port={port}: expected a free address of this machine, found {error}"
        ) from None
    return listening


def main() -> None:
    limits = dataclasses.replace(Limits(), fps=_FPS_MAX.value)
    height, width = frame_size(_SIZE.value)
    parse_memory(_MEMORY.value)
    config = command.given_config()
    loopback = is_loopback(_HOST.value)

    # ------------------------------------------------------------------------------------------------ who, and where
    token = secret_from("token_file", _TOKEN_FILE.value, "JSTREAM_TOKEN")
    token = checked_token(token) if token else None if loopback else make_token()
    door = Door(_HOST.value, token, checked_origins(_ORIGIN.value))
    if any(host.strip().lower().partition(":")[0] == "public" for host in _SOURCE_HOST.value):
        raise ConfigError("--source_host=public: expected the hosts by name, as a source may lead on to others")
    outside = Outside(HostRules(_SOURCE_HOST.value, "--source_host"), HostRules(_WEBHOOK_HOST.value, "--webhook_host"))
    alerts = None
    if outside.webhooks:
        secret = secret_from("webhook_secret_file", _SECRET_FILE.value, "JSTREAM_WEBHOOK_SECRET")
        if secret is None:
            raise UserError(
                "--webhook_host: expected --webhook_secret_file=FILE or JSTREAM_WEBHOOK_SECRET, found neither"
            )
        alerts = Alerts(outside.webhooks, webhook.secret_of(secret), _SPOOL.value)

    # ------------------------------------------------------------------------------------------------------ the model
    bar = tqdm(total=1, unit="program", desc="loading the model", dynamic_ncols=True, disable=None)

    def make_engine(progress: Progress) -> Engine:
        progress("reading the model", 0, 0)
        dtype = jnp.dtype(_DTYPE.value) if _DTYPE.value else None
        mesh = make_mesh(tensor=_TENSOR.value) if _TENSOR.value > 1 else None
        model = load_of_config(config, _CHECKPOINT.value, dtype, mesh).for_frames(height, width)

        def compiled(done: int, total: int) -> None:
            progress("compiling", done, total)
            bar.set_description("compiling")
            bar.total = total
            bar.update(done - bar.n)

        progress("compiling", 0, 0)
        engine = Engine(
            model,
            _STREAMS.value,
            _MEMORY.value,
            capacity=_CAPACITY.value,
            threshold=_THRESHOLD.value,
            max_new_tokens=_MAX_NEW_TOKENS.value,
            int8_cache=_INT8_CACHE.value,
            max_queued=limits.queued,
            progress=compiled,
        )
        bar.close()
        compiling = f"{hub.seconds:.1f} s, of which compiling {engine.compile_seconds:.1f} s"
        print(f"ready after {compiling}; places for {_STREAMS.value} streams", flush=True)
        return engine

    def post(stream, event_number, query_number, query, event) -> None:
        assert alerts is not None and query.webhook is not None
        name = f"{stream.id}.{event_number}.{query_number}"
        alerts.post(Alert(name, query.webhook, stream.id, query.text, event.to_dict()))

    hub = Hub(make_engine, limits, post)
    named = _CHECKPOINT.value or (config.weights.checkpoint if config else "") or "bundled model"
    server = Server(hub, door, outside, limits, alerts, pathlib.PurePath(named).name, BUNDLED, _RECONNECT.value)

    # --------------------------------------------------------------------------------------------------- the network
    if bool(_CERTIFICATE.value) != bool(_KEY.value):
        raise ConfigError("expected --certificate and --key together, found one of them")
    listening = listen(_HOST.value, _PORT.value)
    port = listening.getsockname()[1]
    shown = socket.gethostname() if _HOST.value in ("0.0.0.0", "::") else _HOST.value
    shown = f"[{shown}]" if ":" in shown else shown
    link = f"{'https' if _KEY.value else 'http'}://{shown}:{port}/" + (f"#token={token}" if token else "")
    print(f"open {link}", flush=True)
    if not loopback and not _KEY.value:
        print("browsers give a page their camera over https alone: --certificate and --key", flush=True)
    served = settings(create_app(server), limits, _CERTIFICATE.value, _KEY.value)
    with contextlib.closing(listening):
        uvicorn.Server(served).run(sockets=[listening])
    bar.close()
    if hub.status.state == "failed":
        raise UserError(f"the model could not be loaded: {hub.status.error}")
    sys.stdout.flush()
    threading.excepthook = lambda _: None  # threads that stand in a read of the network end with the process


if __name__ == "__main__":
    command.run(main)
