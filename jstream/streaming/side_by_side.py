"""`SideBySide`: B streams of a CPU, each a `Batch` of one, of which as many are stepped at a time as there are cores.

    wishes ─→ a thread for each core ─→ batch of that stream ─→ what came of it

A step of a small model keeps one core busy and hardly two, and a batch of streams is no quicker than one after another.
So each goes by itself, and nobody waits for the others.
"""

import concurrent.futures
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jstream.model import Model
from jstream.streaming.batch import Batch
from jstream.streaming.stream import Chunk, Lengths, Result, Sight, Wish


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class SideBySide:
    """For an engine what `Batch` is; here `do` comes back as soon as anything is done.

    Args:
        model, lengths, streams, ring, int8, progress: as for `Batch`.

    Attributes:
        batches: of one stream each, by place. They share their programs.
        compile_seconds: spent compiling; nothing is compiled after that.
    """

    def __init__(
        self,
        model: Model,
        lengths: Lengths,
        streams: int,
        ring: bool = False,
        int8: bool = False,
        progress: Callable[[int, int], object] = lambda done, total: None,
    ):
        one = functools.partial(Batch, model, lengths, 1, ring, int8)
        self.batches = [one(progress=progress), *(one() for _ in range(streams - 1))]
        self.compile_seconds = sum(batch.compile_seconds for batch in self.batches)
        self._at_once = cores() if model.mesh is None else 1  # devices of a mesh must all be at the same step
        self._under_way: dict[int, concurrent.futures.Future[Any]] = {}
        self._threads = concurrent.futures.ThreadPoolExecutor(min(self._at_once, streams), "step")

    @property
    def embeds(self) -> bool:
        """As `Batch.embeds`."""
        return bool(self.batches[0].embeds)

    def embed(self, sights: Sequence[tuple[int, Sight]]) -> None:
        """As `Batch.embed`, of streams of which nothing is under way."""
        for place, sight in sights:
            self.batches[place].embed([(0, sight)])

    def ready(self, places: Iterable[int]) -> bool:
        """Whether `do` would find something done, or begin something for one of these places."""
        if any(one.done() for one in self._under_way.values()):
            return True
        return len(self._under_way) < self._at_once and any(place not in self._under_way for place in places)

    def do(self, wishes: Mapping[int, Wish], on_done: Callable[[], object] | None = None) -> dict[int, Any]:
        """Begins what streams wish for, the words of replies first, as they are quick.

        Args:
            wishes: by the place of the stream, those that have waited longest first; with those that are under way.
            on_done: called from another thread when something is done that is begun here. Without it this waits until
                anything is done.

        Returns:
            What came of those that are done by now.
        """
        waiting = [place for place in wishes if place not in self._under_way]
        waiting.sort(key=lambda place: _shows(wishes[place]))
        for place in waiting[: self._at_once - len(self._under_way)]:
            one = self._under_way[place] = self._threads.submit(_step, self.batches[place], wishes[place])
            if on_done is not None:
                one.add_done_callback(lambda _: on_done())
        if on_done is None:
            concurrent.futures.wait(self._under_way.values(), return_when=concurrent.futures.FIRST_COMPLETED)
        done = [place for place, one in self._under_way.items() if one.done()]
        return {place: self._under_way.pop(place).result() for place in done}

    def leave(self, place: int) -> None:
        """Waits for what is under way of a stream, and forgets it."""
        if place in self._under_way:
            concurrent.futures.wait([self._under_way.pop(place)])


def _shows(wish: Wish) -> bool:
    """Whether it has a frame."""
    return isinstance(wish, Chunk) and wish.sight is not None


def _step(batch: Batch, wish: Wish) -> Any:
    done = batch.do({0: wish})[0]
    if isinstance(done, Result):
        _ = done.results.values  # waits for the device, in this thread
    return done
