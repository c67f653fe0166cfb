"""`Engine`: many live streams of one model, which share its programs, its cache and, on accelerators, its steps.

    engine = Engine(model, streams=16)
    door, yard = engine.open(), engine.open()
    engine.ask(door, "Tell me when someone comes in.")
    engine.see(door, frame)                     # any number of frames to any number of streams, then
    for place, event in engine.run():           # what comes of them, as it comes

Streams join and leave without anything being compiled. Each has its own clock, questions and memory; one that fails
ends alone. On accelerators one that replies shares a forward with another that sees a frame, and frames that wait are
embedded together, a few ahead of their turn; on CPUs, where a batch gains nothing, each core is at a stream of its own.
"""

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

from jstream.config import ConfigError
from jstream.data.video import Frame
from jstream.errors import UserError
from jstream.model import Model
from jstream.models.cache import CacheFullError
from jstream.protocols.protocol import StreamProtocol
from jstream.streaming.batch import Batch, default_ahead
from jstream.streaming.event import Event
from jstream.streaming.memory import parse_memory, parse_narrower
from jstream.streaming.side_by_side import SideBySide
from jstream.streaming.stream import (
    Lengths,
    Settings,
    Sight,
    Steps,
    Stream,
    Wish,
    checked_question,
    question_tokens,
)

LOOKS = 4  # frames of a stream that are embedded ahead of their turn, where that is worth while


class EngineFullError(UserError, RuntimeError):
    """All places are taken; the message is one line."""


@dataclasses.dataclass
class _Place:
    """A stream of the engine.

    Attributes:
        frames: that wait, each with the moment it came.
        looked: the first so many of them have been embedded.
        turn: that is under way, with the moment its frame came; None between turns.
        wish: what it waits for.
    """

    stream: Stream
    frames: collections.deque[tuple[Sight, float]] = dataclasses.field(default_factory=collections.deque)
    looked: int = 0
    turn: Steps | None = None
    since: float = 0.0
    wish: Wish | None = None

    @property
    def following(self) -> Sight | None:
        """The next frame, where it can be seen at once."""
        return self.frames[0][0] if self.looked else None

    def begin(self) -> None:
        """Starts the turn of the next frame."""
        sight, self.since = self.frames.popleft()
        self.looked -= 1
        self.turn = self.stream.see(sight, lambda: self.following)


class Engine:
    """Up to so many streams at once, all of one model, frame size and memory.

    Args:
        model: as `jstream.load` gives it; its frame size is that of all streams (`Model.for_frames`).
        streams: places.
        max_queued: frames of a stream that may wait; one more is refused.
        memory, capacity, fps, threshold, temperature, max_new_tokens, int8_cache: as for `Session`; `capacity` is that
            of each stream.
        ahead: as for `Session`. Where it is 0, streams are stepped `SideBySide`; where it is not, as one `Batch`, and a
            frame that waits is also fed before the host has read what came of the one before, as if that deserved no
            word.
        progress: told how many programs are compiled, of how many.

    Attributes:
        streams: places.
        memory: the policy of all streams; one may look back over less.
        compile_seconds: spent compiling; all of it before the first frame.

    Raises:
        ConfigError: for an unknown memory, no place, or a window that does not fit into the capacity.
    """

    def __init__(
        self,
        model: Model,
        streams: int = 8,
        memory: str = "append",
        capacity: int | None = None,
        fps: float = 1.0,
        threshold: float | None = None,
        temperature: float = 0.0,
        max_new_tokens: int = 64,
        max_queued: int = 16,
        int8_cache: bool = False,
        ahead: int | None = None,
        progress: Callable[[int, int], object] = lambda done, total: None,
    ):
        if streams < 1:
            raise ConfigError(f"streams: expected at least one place, found {streams}")
        policy = self.memory = parse_memory(memory)
        self.model, self.streams, self.max_queued = model, streams, max_queued
        ahead = default_ahead(model) if ahead is None else ahead
        self._settings = Settings(policy, capacity, fps, threshold, temperature, max_new_tokens, int8_cache, ahead)
        self._looks = LOOKS if ahead else 0
        self._lengths = Lengths.of(model, self._settings, waiting=self._looks)
        shared = model, self._lengths, streams, policy.ring, int8_cache
        self.batch: Batch | SideBySide
        if ahead:
            self.batch = Batch(*shared, max(streams, self._looks), progress)
        else:
            self.batch = SideBySide(*shared, progress)
        self.compile_seconds = self.batch.compile_seconds
        self._places: dict[int, _Place] = {}

    @property
    def places(self) -> tuple[int, ...]:
        """Of the streams that are open."""
        return tuple(self._places)

    @property
    def busy(self) -> bool:
        """Whether a frame waits or a turn is under way."""
        return any(map(self.waits, self._places))

    @property
    def ready(self) -> bool:
        """Whether `step` has something to do, and would not only wait for what is under way."""
        return self.batch.ready(filter(self.waits, self._places))

    def waits(self, place: int) -> bool:
        """Whether a stream has a frame that waits or is under way."""
        return bool(self._places[place].frames or self._places[place].turn)

    def queued(self, place: int) -> int:
        """Frames of a stream that wait behind the one that is under way."""
        return len(self._places[place].frames)

    def open(
        self,
        seed: int = 0,
        protocol: StreamProtocol | None = None,
        fps: float | None = None,
        threshold: float | None = None,
        memory: str | None = None,
    ) -> int:
        """Begins a stream, and returns its place.

        Args:
            protocol: the model's own language, with another rule for when to speak.
            fps, threshold: where they differ from the engine's.
            memory: the engine's policy over fewer turns.

        Raises:
            EngineFullError: there is none.
            ConfigError: for another policy, or one of more turns.
        """
        free = [number for number in range(self.streams) if number not in self._places]
        if not free:
            raise EngineFullError(f"the engine has {self.streams} places and all are taken; close a stream first")
        model = self.model if protocol is None else dataclasses.replace(self.model, protocol=protocol)
        settings = self._settings
        own = {"fps": fps, "threshold": threshold, "memory": memory and parse_narrower(memory, self.memory)}
        settings = dataclasses.replace(settings, **{name: value for name, value in own.items() if value is not None})
        self._places[free[0]] = _Place(Stream(model, settings, self._lengths, seed))
        return free[0]

    def close(self, place: int) -> None:
        """Ends a stream; what waits is dropped."""
        del self._places[place]
        self.batch.leave(place)

    def set_threshold(self, place: int, threshold: float | None) -> None:
        """As `Session.threshold`, from the next decision on."""
        self._places[place].stream.threshold = threshold

    def used(self, place: int) -> int:
        """Tokens that a stream holds in its cache, of `capacity`."""
        return self._places[place].stream.places.used

    @property
    def threshold(self) -> float | None:
        """Of streams that name none."""
        return self._settings.threshold

    @property
    def capacity(self) -> int:
        """Tokens that the cache of each stream holds."""
        return self._lengths.capacity

    def tokens_of_question(self, text: str) -> int:
        """What a question takes of the cache; those that are heard together should take no more than `question_room`.

        Raises:
            ValueError: as `Session.ask`. From any thread.
        """
        protocol = self.model.protocol
        return question_tokens(protocol, checked_question(protocol, self.memory, self._lengths, text))

    @property
    def question_room(self) -> int:
        """Tokens of questions that can be heard together."""
        return self._lengths.room

    def ask(self, place: int, text: str) -> None:
        """As `Session.ask`; heard with the next frame that is not under way yet."""
        self._places[place].stream.ask(text)

    def see(self, place: int, frame: Frame, asked: Sequence[str] = ()) -> None:
        """Hands a frame to a stream; `step` or `run` gives its event.

        Args:
            asked: questions to be heard with this frame and no other.

        Raises:
            EngineFullError: `max_queued` frames of it wait already.
            ValueError: for a question, as `Session.ask`.
        """
        one = self._places[place]
        if len(one.frames) >= self.max_queued:
            raise EngineFullError(f"stream {place}: expected at most {self.max_queued} frames to wait, found one more")
        one.frames.append((one.stream.look(frame, asked), time.perf_counter()))

    def step(self, on_done: Callable[[], object] | None = None) -> list[tuple[int, Event | Exception]]:
        """One forward for all streams that want one, or one for each of as many as are stepped side by side.

        Args:
            on_done: where this is given, nothing is waited for: it is called, from another thread, when a forward has
                ended that is under way by then.

        Returns:
            The turns that ended with it: place and event. A stream that cannot go on gives its error instead, and is
            closed.
        """
        ended: list[tuple[int, Event | Exception]] = []
        self._look()
        for number, place in list(self._places.items()):
            if place.turn is None and place.frames:
                place.begin()
                self._go_on(number, place, None, ended)
        by_age = sorted(self._places.items(), key=lambda item: item[1].since)
        wishes = {number: place.wish for number, place in by_age if place.wish is not None}
        for number, done in (self.batch.do(wishes, on_done) if wishes else {}).items():
            self._go_on(number, self._places[number], done, ended)
        return ended

    def _look(self) -> None:
        """Embeds frames that wait, all together, where one is wanted now; where none may be ahead, only those that are
        wanted."""
        if all(place.looked or not place.frames or place.turn for place in self._places.values()):
            return
        sights = []
        for number, place in self._places.items():
            ready = min(len(place.frames), self._looks or (place.turn is None))
            sights += [(number, sight) for sight, _ in itertools.islice(place.frames, place.looked, ready)]
            place.looked = ready
        if self.batch.embeds:
            self.batch.embed(sights)

    def run(self) -> Iterator[tuple[int, Event | Exception]]:
        """Steps until nothing waits; see `step`."""
        while self.busy:
            yield from self.step()

    def _go_on(self, number: int, place: _Place, done: object, ended: list[tuple[int, Event | Exception]]) -> None:
        """Sends a turn what came of its wish, up to its next one or its end."""
        assert place.turn is not None
        try:
            place.wish = place.turn.send(done)
        except StopIteration as end:
            place.turn = place.wish = None
            ended.append((number, dataclasses.replace(end.value, latency=time.perf_counter() - place.since)))
        except (CacheFullError, ValueError) as error:
            del self._places[number]
            ended.append((number, error))
