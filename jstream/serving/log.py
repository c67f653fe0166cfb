"""`Log`: what a stream says, numbered and kept for a while, for any number of readers.

    hub, sources → add → the newest entries → followers, each at its own place

A follower has a place in the log and no buffer: what it has not read yet is kept once for all, and one that falls
behind what is kept has missed it. Entries are added from any thread; followers live in one event loop.
"""

import asyncio
import collections
import itertools
import threading
from typing import NamedTuple


class Entry(NamedTuple):
    """A line of the log.

    Attributes:
        number: from 1, without holes.
        kind: of a notice; None for an event.
        text: JSON.
    """

    number: int
    kind: str | None
    text: str


class Log:
    """The newest `kept` entries of a stream.

    Attributes:
        last: the number of the newest entry; 0 where there is none.
        closed: whether there will be no more.
    """

    def __init__(self, kept: int):
        self._entries: collections.deque[Entry] = collections.deque(maxlen=kept)
        self._lock = threading.Lock()
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self.last = 0
        self.closed = False

    def add(self, text: str, kind: str | None = None, last: bool = False) -> int:
        """Appends an entry and wakes whoever waits for it; returns its number. After the last one nothing is added."""
        with self._lock:
            if self.closed:
                return self.last
            self.last += 1
            self.closed = last
            self._entries.append(Entry(self.last, kind, text))
            waiting, self._waiting = self._waiting, set()
        for loop, event in waiting:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # the loop is closed, and its followers with it
                pass
        return self.last

    def behind(self, number: int) -> list[Entry]:
        """What is kept of the entries behind a number, oldest first."""
        with self._lock:
            count = min(self.last - number, len(self._entries))
            return list(itertools.islice(self._entries, len(self._entries) - count, None)) if count > 0 else []

    async def changed(self, number: int) -> None:
        """Waits until there is an entry behind a number, or there will be none."""
        event = asyncio.Event()
        waiter = (asyncio.get_running_loop(), event)
        with self._lock:
            if self.last > number or self.closed:
                return
            self._waiting.add(waiter)
        try:
            await event.wait()
        finally:
            with self._lock:
                self._waiting.discard(waiter)
