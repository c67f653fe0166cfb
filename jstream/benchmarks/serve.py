"""How the live server does with many clients: from a frame's sending to its event, what is lost, and what memory grows.

    bench process: clients ─ JPEG at every tick ─→ server process ─ event ─→ clients

Clients send worlds over WebSockets as cameras would, each at its own phase, and ask; every event is compared with what
a session on the same pictures gives. A second time, where that is asked for, with hostile clients beside them.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import random
import re
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from jstream.benchmarks.memory import resident
from jstream.benchmarks.report import Figure
from jstream.data import world as worlds
from jstream.data.frames import Frame, from_jpeg, to_jpeg
from jstream.errors import UserError
from jstream.streaming.event import Event
from jstream.streaming.session import Session
from jstream.weights.checkpoint import load_model

FPS = 2.0
SECONDS = 60  # of a world; it is shown again after that
SIDE, QUALITY = 480, 85  # pixels and quality of the pictures, as a browser sends them
SEED = 5
ASKED = {0: "Narrate what happens.", 30: "What colour is the circle?", 75: "How many shapes are there?"}  # by frame
MEMORY = "sinks"
SETTLED = 0.1  # of a run, after which memory is looked at: buffers and threads have come by then
CLOSE = 30.0  # seconds for the last events
HOSTILE = 1  # bad clients at a time


@dataclasses.dataclass
class Seen:
    """What one client has seen.

    Attributes:
        sent: when each frame was sent, by its number.
        latencies: seconds from a frame to its event.
        events: as they came.
        notices: how many of each type.
    """

    sent: dict[int, float] = dataclasses.field(default_factory=dict)
    latencies: list[float] = dataclasses.field(default_factory=list)
    events: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    notices: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


def pictures_of(client: int) -> list[bytes]:
    """A world as JPEGs."""
    world = worlds.make_world(SEED, client, worlds.WorldConfig(SECONDS, SECONDS))
    draw = worlds.Renderer(world, SIDE)
    return [to_jpeg(draw(tick / FPS), SIDE * SIDE, QUALITY) for tick in range(int(SECONDS * FPS))]


@contextlib.contextmanager
def running_server(streams: int) -> Iterator[tuple[int, int, float]]:
    """A server of its own process: its port, its process id, and the seconds until it was ready."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "jstream.serve", "--port=0", f"--streams={streams}", f"--memory={MEMORY}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = 0
        for line in process.stdout:
            if found := re.match(r"open https?://[^/]*:(\d+)/", line):
                port = int(found[1])
            if line.startswith("ready"):
                break
        else:
            raise UserError("expected a server that gets ready, found one that ended; run jstream.serve by itself")
        while json.loads(_get(port, "/healthz"))["status"] != "ready":
            time.sleep(0.01)
        yield port, process.pid, time.perf_counter() - began
    finally:
        process.terminate()
        process.wait(timeout=60)


def _get(port: int, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.read()


# ------------------------------------------------------------------------------------------------------------- clients


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[Any]:
    import websockets  # of the extra `serve`, which other benchmarks can do without

    async with websockets.connect(f"ws://127.0.0.1:{port}/v1/live", compression=None, max_queue=None) as socket:
        yield socket


async def watch(port: int, pictures: Sequence[bytes], frames: int, phase: float, bar: tqdm) -> Seen:
    """One client, from its first frame to the event of its last."""
    seen = Seen()
    await asyncio.sleep(phase / FPS)
    async with connected(port) as socket:
        await socket.send(json.dumps({"type": "open", "fps": FPS}))

        async def read() -> None:
            async for text in socket:
                now, said = time.perf_counter(), json.loads(text)
                if "type" in said:
                    seen.notices[said["type"]] += 1
                    continue
                seen.events.append(said)
                seen.latencies.append(now - seen.sent[round(said["time"] * FPS)])
                bar.update()

        reader = asyncio.create_task(read())
        began = time.perf_counter()
        for tick in range(frames):
            await asyncio.sleep(began + tick / FPS - time.perf_counter())
            if tick in ASKED:
                await socket.send(json.dumps({"type": "ask", "text": ASKED[tick]}))
            seen.sent[tick] = time.perf_counter()
            await socket.send(struct.pack(">d", tick / FPS) + pictures[tick % len(pictures)])
        await socket.send(json.dumps({"type": "close"}))
        async with asyncio.timeout(CLOSE):
            await reader
    return seen


async def watch_all(port: int, process: int, clients: Sequence[Sequence[bytes]], frames: int, bar: tqdm):
    """All clients at once, and the server's memory meanwhile, every second."""
    phases = random.Random(SEED)
    tasks = [asyncio.create_task(watch(port, one, frames, phases.random(), bar)) for one in clients]
    memory: list[int] = []

    async def look() -> None:
        while True:
            memory.append(resident(process))
            await asyncio.sleep(1.0)

    looking = asyncio.create_task(look())
    seen = await asyncio.gather(*tasks)
    looking.cancel()
    return seen, memory


# ------------------------------------------------------------------------------------------------------------ measures


def offline(session: Session, pictures: Sequence[bytes], frames: int) -> list[Event]:
    """What a session says to the same pictures."""
    session.reset()
    events, images = [], [from_jpeg(jpeg) for jpeg in pictures]
    for tick in range(frames):
        if tick in ASKED:
            session.ask(ASKED[tick])
        events.append(session.see(Frame(tick / FPS, images[tick % len(images)])))
    return events


def differences(events: Sequence[dict[str, Any]], expected: Sequence[Event]) -> tuple[int, float]:
    """How many events are others, and how far probabilities are off at most."""
    others, off = abs(len(events) - len(expected)), 0.0
    for event, wanted in zip(events, expected):
        known = wanted.to_dict()
        others += any(event[key] != known[key] for key in ("time", "state", "text", "start"))
        off = max(off, *(abs(event["probs"][state] - p) for state, p in known["probs"].items()))
    return others, off


def measure(clients: int, frames: int, hostile: bool) -> list[Figure]:
    """The whole benchmark.

    Args:
        clients: at once.
        frames: of each.
        hostile: whether it is done again with bad clients beside them.
    """
    pictures = [pictures_of(client) for client in tqdm(range(clients), desc="drawing", unit="world")]
    figures: list[Figure] = []
    with running_server(clients + HOSTILE * hostile) as (port, process, ready):
        figures.append(Figure("ready_s", round(ready, 2), "{} s from the start of the process"))
        with tqdm(total=1, desc="one client", unit="frame", disable=True) as bar:
            first, _ = asyncio.run(watch_all(port, process, pictures[:1], 4, bar))
        figures.append(Figure("first_event_ms", round(1000 * first[0].latencies[0], 1), "{} ms"))
        seen: list[Seen] = []
        for name in ("", "hostile_") if hostile else ("",):
            with contextlib.ExitStack() as stack:
                bad = stack.enter_context(hostile_clients(port)) if name else []
                bar = stack.enter_context(tqdm(total=clients * frames, desc=name[:-1] or "clients", unit="frame"))
                seen, memory = asyncio.run(watch_all(port, process, pictures, frames, bar))
            figures += _figures(name, seen, memory, frames)
            figures += [Figure("hostile_connections", count, "{}") for count in bad]
    session, others, off = Session(load_model(), MEMORY, fps=FPS), 0, 0.0
    for one, shown in zip(tqdm(seen, desc="comparing", unit="client"), pictures):
        count, far = differences(one.events, offline(session, shown, frames))
        others, off = others + count, max(off, far)
    figures.append(Figure("events_unlike_offline", others, "{}" + f" of {clients * frames}"))
    figures.append(Figure("probabilities_off", off, "{:.1e} at most"))
    return figures


@contextlib.contextmanager
def hostile_clients(port: int) -> Iterator[list[int]]:
    """Bad clients beside the others, in a process of their own; a list that has their number at the end."""
    command = [sys.executable, "-m", "jstream.benchmarks.hostile", str(port)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    count: list[int] = []
    try:
        yield count
    finally:
        said, _ = process.communicate(timeout=60)
        count.append(int(said))


def _figures(name: str, seen: Sequence[Seen], memory: Sequence[int], frames: int) -> list[Figure]:
    latencies = 1000 * np.array([latency for one in seen for latency in one.latencies])
    settled = memory[int(len(memory) * SETTLED) :]
    grown = (settled[-1] - settled[0]) / 2**20
    replies = sum(event["text"] is not None for one in seen for event in one.events)
    values = [
        ("clients", len(seen), "{}"),
        ("frames_a_client", frames, "{}"),
        ("frames_lost", sum(frames - len(one.events) for one in seen), "{}"),
        ("errors", sum(one.notices["error"] + one.notices["dropped"] for one in seen), "{}"),
        ("replies", replies, "{}"),
        ("p50_ms", round(float(np.percentile(latencies, 50)), 1), "{} ms from a frame to its event"),
        ("p95_ms", round(float(np.percentile(latencies, 95)), 1), "{} ms"),
        ("p99_ms", round(float(np.percentile(latencies, 99)), 1), "{} ms"),
        ("most_ms", round(float(latencies.max()), 1), "{} ms"),
        ("server_memory_mb", round(settled[-1] / 2**20, 1), "{} MB at the end"),
        ("server_memory_grown_mb", round(grown, 1), "{} MB since a tenth of the run"),
    ]
    return [Figure(name + key, value, form) for key, value, form in values]
