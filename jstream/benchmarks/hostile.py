"""Bad clients of the live server, one after another, for as long as they are let, beside the good ones of a benchmark.

    python -m jstream.benchmarks.hostile PORT      # until its input ends; prints how many there were

A process of its own, and a modest one: what an attacker computes is not to be taken from the server it attacks.
"""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import websockets

PAUSE = 0.2  # seconds between two of them
NICE = 19  # as little of the processor as there is


async def harass(port: int) -> int:
    """Sends every kind of bad client in turn, until the input ends; how many there were."""
    over = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    kinds = (_die_in_a_frame, _send_garbage, _send_too_much, _ask_too_much, _read_nothing, _knock)
    count = 0
    while not over.done():
        with contextlib.suppress(Exception):  # whatever comes of it, the next one is due
            async with asyncio.timeout(10.0):
                await kinds[count % len(kinds)](port)
        count += 1
        await asyncio.sleep(PAUSE)
    return count


@contextlib.asynccontextmanager
async def _opened(port: int) -> AsyncIterator[Any]:
    """A stream, of which nothing is read any more."""
    async with websockets.connect(f"ws://127.0.0.1:{port}/v1/live", compression=None, max_queue=None) as socket:
        await socket.send(json.dumps({"type": "open"}))
        yield socket


async def _die_in_a_frame(port: int) -> None:
    async with _opened(port) as socket:
        socket.transport.write(b"\x82\xfe\x40\x00half a frame")
        socket.transport.abort()


async def _send_garbage(port: int) -> None:
    async with _opened(port) as socket:
        while True:
            await socket.send(os.urandom(2000))
            await socket.send("garbage")


async def _send_too_much(port: int) -> None:
    async with _opened(port) as socket:
        await socket.send(bytes(50_000_000))
        await socket.recv()
        await socket.recv()


async def _ask_too_much(port: int) -> None:
    async with _opened(port) as socket:
        for number in range(10_000):
            await socket.send(json.dumps({"type": "ask", "text": f"Question {number}?"}))


async def _read_nothing(port: int) -> None:
    async with _opened(port) as socket:
        socket.transport.pause_reading()
        for _ in range(200):
            await socket.send(json.dumps({"type": "ask", "text": ""}))
        await asyncio.sleep(1.0)
        socket.transport.abort()


async def _knock(port: int) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /v1/live HTTP/1.1\r\nHost: elsewhere.example\r\nAuthorization: Bearer wrong\r\n\r\n")
    await writer.drain()
    writer.close()


if __name__ == "__main__":
    os.nice(NICE)
    print(asyncio.run(harass(int(sys.argv[1]))))
