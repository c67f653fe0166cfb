"""Videos into an engine: each is decoded in a thread of its own, and handed over a frame at a time.

    source → thread → a queue of a few frames → engine → events

What waits is bounded: where the engine is slower than a file, the file's thread waits for it; a camera's own reader
keeps only its newest picture (`data/live.py`). Frames of a file are handed over a few ahead, so that the engine can
embed them together; those of a camera only when their turn has come. A source that breaks ends alone.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import NamedTuple

from jstream.data.video import Frame
from jstream.streaming.engine import LOOKS, Engine
from jstream.streaming.event import Event

QUEUED = 2  # frames of a source that are decoded ahead
_CLOSING = 2.0  # seconds for a thread to end; one that stands in a read of the network may take longer
_POLL = 0.5  # seconds after which a wait looks up, so that Ctrl-C is heard


class Ended(NamedTuple):
    """The end of a stream: with what went wrong, or with nothing."""

    error: Exception | None = None


@dataclasses.dataclass
class _Feed:
    """A source on its way to the engine; guarded by the condition that all share.

    Attributes:
        frames: decoded, and not handed over.
        end: set where there will be no more.
    """

    frames: collections.deque[Frame] = dataclasses.field(default_factory=collections.deque)
    end: Ended | None = None
    stopping: bool = False


def _decode(source: Iterable[Frame], feed: _Feed, changed: threading.Condition) -> None:
    """The thread's whole life."""
    end = Ended()
    try:
        for frame in source:
            with changed:
                changed.wait_for(lambda: len(feed.frames) < QUEUED or feed.stopping)
                if feed.stopping:
                    break
                feed.frames.append(frame)
                changed.notify_all()
    except Exception as error:  # a thread has nobody to tell
        end = Ended(error)
    with changed:
        feed.end = end
        changed.notify_all()


def watch(
    engine: Engine,
    sources: Mapping[int, Iterable[Frame]],
    asked: Callable[[int, Frame], Sequence[str]] = lambda *_: (),
) -> Generator[tuple[int, Event | Ended], None, None]:
    """Watches sources with streams that are open, to the end of each.

    Args:
        engine: nothing else steps it meanwhile.
        sources: frames for each place.
        asked: called before a frame is handed over: what is to be heard with it.

    Returns:
        Place and event for every frame, and the end of each stream, which is closed by then.
    """
    changed = threading.Condition()
    feeds = {place: _Feed() for place in sources}
    start = lambda place, source: threading.Thread(target=_decode, args=(source, feeds[place], changed), daemon=True)
    threads = [start(place, source) for place, source in sources.items()]
    for thread in threads:
        thread.start()
    live = {place for place, source in sources.items() if hasattr(source, "dropped")}  # a late frame is worth nothing
    told = dict.fromkeys(sources, 0.0)  # when the last event came
    ahead = min(LOOKS, engine.max_queued)
    wanted = lambda place: not engine.waits(place) if place in live else engine.queued(place) < ahead
    try:
        while feeds:
            with changed:
                if not engine.busy:
                    ready = lambda: any(feeds[place].frames or feeds[place].end for place in feeds)
                    while not changed.wait_for(ready, _POLL):
                        pass
                taken = {
                    place: feeds[place].frames.popleft() for place in feeds if feeds[place].frames and wanted(place)
                }
                over = [p for p, feed in feeds.items() if feed.end and p not in taken and not engine.waits(p)]
                changed.notify_all()
            for place, frame in taken.items():
                engine.see(place, frame, asked(place, frame))
            for place in over:
                engine.close(place)
                yield place, feeds.pop(place).end or Ended()
            for place, event in engine.step():
                if isinstance(event, Event):
                    now = time.perf_counter()
                    if place not in live:  # it was handed over ahead of its turn
                        event = dataclasses.replace(event, latency=min(event.latency, now - told[place]))
                    told[place] = now
                    yield place, event
                else:
                    feeds.pop(place).stopping = True
                    yield place, Ended(event)
    finally:
        with changed:
            for feed in feeds.values():
                feed.stopping = True
            changed.notify_all()
        for thread in threads:  # whoever opened a source will close it, and nobody should read from it then
            thread.join(_CLOSING)
