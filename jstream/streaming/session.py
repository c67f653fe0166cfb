"""`Session`: one live stream. Frames and questions in, an `Event` for every frame out.

How a turn goes stands in `stream.py`, what a long stream keeps in `memory.py`. Programs are compiled ahead for a few
lengths of chunks, so that a stream never waits for the compiler.
"""

import dataclasses
import time
from typing import Any

from jstream.data.video import Frame
from jstream.model import Model
from jstream.streaming.batch import Batch, default_ahead
from jstream.streaming.event import Event
from jstream.streaming.memory import parse_memory
from jstream.streaming.stream import Lengths, Settings, Stream


class Session:
    """One live stream of one model.

    Args:
        model: as `jstream.load` gives it.
        memory: `append`: everything is kept until the cache is full, which is an error. `sinks:120`: the newest 120
            turns and the first tokens, for as long as one likes. Others stand in `memory.py`.
        capacity: tokens the cache holds; a turn of the bundled model takes about 20. By default 4096, or what the
            memory needs. A window never fills its cache: where its turns said too much to fit, fewer of them are kept.
        fps: frames a second that `see` will be given; the labels of turns tell the model.
        threshold: speak when p(response) reaches it; None is the protocol's own rule (`decide`).
        temperature: of replies; 0 is greedy.
        max_new_tokens: a reply is cut there.
        seed: of sampled replies.
        int8_cache: whether keys and values are kept in int8, in half the bytes of bfloat16.
        ahead: words of a reply that are computed before the host has read the ones before. By default none on a CPU,
            which has its own work to do meanwhile.

    A vision tower that keeps the aspect of frames takes its geometry from the first one, for which programs may have to
    be compiled anew (`Model.for_frames` before the session avoids that); later frames are stretched to it.

    Attributes:
        compile_seconds: spent compiling.

    Raises:
        ConfigError: for an unknown memory, or a window that does not fit into the capacity.
    """

    def __init__(
        self,
        model: Model,
        memory: str = "append",
        capacity: int | None = None,
        fps: float = 1.0,
        threshold: float | None = None,
        temperature: float = 0.0,
        max_new_tokens: int = 64,
        seed: int = 0,
        int8_cache: bool = False,
        ahead: int | None = None,
    ):
        self.memory = parse_memory(memory)
        ahead = default_ahead(model) if ahead is None else ahead
        self._settings = Settings(self.memory, capacity, fps, threshold, temperature, max_new_tokens, int8_cache, ahead)
        self._seed = seed
        self.compile_seconds = 0.0
        self._adopt(model)

    def _adopt(self, model: Model) -> None:
        """Begins to stream with a model; its programs are compiled ahead."""
        self.model = model
        lengths = Lengths.of(model, self._settings)
        self.__dict__.pop("batch", None)  # its cache goes before another is made
        self.batch = Batch(model, lengths, 1, self.memory.ring, self._settings.int8_cache)
        self.compile_seconds += self.batch.compile_seconds
        self._begin()

    def _begin(self) -> None:
        self.stream = Stream(self.model, self._settings, self.batch.lengths, self._seed)
        self._started = False

    @property
    def threshold(self) -> float | None:
        """May be changed at any time."""
        return self.stream.threshold

    @threshold.setter
    def threshold(self, value: float | None) -> None:
        self._settings = dataclasses.replace(self._settings, threshold=value)
        self.stream.threshold = value

    def reset(self) -> None:
        """Forgets the stream and starts another; nothing is compiled again."""
        self._begin()

    def ask(self, text: str) -> None:
        """Says something to the model; it is heard with the next frame.

        Raises:
            ValueError: for an empty text, one of more than MAX_QUERY characters, or one that fits into no window.
        """
        self.stream.ask(text)

    def see(self, frame: Frame) -> Event:
        """Watches the next frame and decides.

        Args:
            frame: image uint8 [H, W, 3] of any size, time in seconds.

        Returns:
            The decision, with the reply if there is one.

        Raises:
            CacheFullError: the stream has outgrown `capacity`; nothing has changed.
        """
        begin = time.perf_counter()
        if not self._started:
            self._fit_to(frame)
        sight = self.stream.look(frame)
        if self.batch.embeds:
            self.batch.embed([(0, sight)])
        turn, done = self.stream.see(sight), None
        while True:
            try:
                wish = turn.send(done)
            except StopIteration as end:
                return dataclasses.replace(end.value, latency=time.perf_counter() - begin)
            self._started = True
            done = self._do(wish)

    def _do(self, wish: Any) -> Any:
        return self.batch.do({0: wish})[0]

    def _fit_to(self, frame: Frame) -> None:
        """Takes the geometry of the first frame, where the tower has one for every aspect."""
        model = self.model.for_frames(*frame.image.shape[:2])
        if model.config != self.model.config:
            queries = self.stream.queries
            self._adopt(model)
            for query in queries:
                self.ask(query)
