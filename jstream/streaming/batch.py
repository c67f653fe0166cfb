"""`Batch`: B streams on the devices. What their turns wish for is done for all of them at once.

It owns the cache, the kept frames and the compiled programs. Chunks of different lengths share a forward, padded to the
longest; those of a few streams have a smaller one. Nothing here waits for the device: results are read by whoever needs
them. A stream that wishes for nothing stays as it is.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jstream.config import ModelConfig
from jstream.model import Model
from jstream.models.attention import implementation_for_cache
from jstream.models.cache import LIVE
from jstream.streaming.step import (
    Inputs,
    Language,
    Shape,
    compile_embed,
    compile_rebase,
    compile_step,
    empty_inputs,
    fresh_state,
)
from jstream.streaming.stream import Chunk, Lengths, Rebase, Result, Results, Sight, Wish

READS = 2048  # slots that a step reads at least, where it need not read all; then four times as many, and so on
AHEAD = 2  # words of a reply that are dispatched before one is read: more is more to throw away at its end
ROWS = 4  # streams that a step advances at least, where there are many; then four times as many, and so on


def _steps_of_four(first: int, last: int) -> list[int]:
    """first, 4 · first, … up to half of last, then last."""
    steps = []
    while 2 * first <= last:
        steps.append(first)
        first *= 4
    return [*steps, last]


def reads_for(platform: str, ring: bool, slots: int) -> list[int]:
    """The `View.reads` that steps are compiled for. A loop over what is live would cost an accelerator more than it
    saves there, so that its programs read fixed numbers of slots."""
    return [LIVE] if platform == "cpu" else [0] if ring else _steps_of_four(READS, slots)


def with_kernel(shape: Shape, config: ModelConfig, dtype: Any, platform: str) -> Shape:
    """The shape with the attention that suits a platform, on one device."""
    if shape.int8 or shape.sinks:  # kernels know nothing of these
        return shape
    slots = shape.reads or shape.slots
    how = implementation_for_cache(platform, config.decoder.head_dim, dtype, shape.tokens, slots)
    return dataclasses.replace(shape, attention=how)


def default_ahead(model: Model) -> int:
    """`Settings.ahead` where nothing is said."""
    return 0 if model.device.platform == "cpu" else AHEAD


def _compiled(wanted: Mapping[Any, Callable[[], Any]], progress: Callable[[int, int], object]) -> dict[Any, Any]:
    """Programs, two at a time: one is traced, which takes a third of the time, while the compiler is at another."""
    programs = {}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        under_way = {pool.submit(make): name for name, make in wanted.items()}
        for done, program in enumerate(concurrent.futures.as_completed(under_way), start=1):
            programs[under_way[program]] = program.result()
            progress(done, len(wanted))
    return programs


class _Key(NamedTuple):
    """Of a program: `compile_step`'s kind, and what tells shapes apart."""

    kind: str
    tokens: int
    rows: int
    reads: int


class Batch:
    """The device's side of some streams.

    Args:
        model: whose params they share.
        lengths: of their chunks and of the cache, and how many frames are kept.
        streams: B.
        ring: whether all slots are in use for good, so that every step reads all.
        int8: whether the cache holds keys and values in int8.
        together: frames that are embedded at once, where they are kept: at most so many.
        progress: told how many programs are compiled, of how many.

    Attributes:
        compile_seconds: spent compiling; nothing is compiled after that.
    """

    def __init__(
        self,
        model: Model,
        lengths: Lengths,
        streams: int = 1,
        ring: bool = False,
        int8: bool = False,
        together: int = 1,
        progress: Callable[[int, int], object] = lambda done, total: None,
    ):
        self.model, self.lengths, self.streams = model, lengths, streams
        begin = time.perf_counter()
        self._reads = reads_for(model.device.platform, ring, lengths.slots)
        self._shape = Shape(streams, lengths.slots, 1, 0, lengths.sinks, int8, 0, lengths.frames)
        self._seen = "turn" if lengths.frames else "frame"
        language = Language(model.protocol.scores, model.protocol.frame_id, model.protocol.unspoken_ids)
        where = (model.dtype, model.mesh)
        kinds = [(self._seen, tokens) for tokens in lengths.turns] + [("text", tokens) for tokens in lengths.texts]
        self._shapes = {
            key: self._shape_of(key)
            for kind, tokens in kinds
            for key in [_Key(kind, tokens, *rest) for rest in itertools.product(self._rows(tokens), self._reads)]
        }
        sizes = _steps_of_four(1, together) if lengths.frames else []
        wanted: dict[Any, Callable[[], Any]] = {
            key: functools.partial(compile_step, key.kind, model.config, language, shape, *where)
            for key, shape in self._shapes.items()
        }
        for count in sizes:
            wanted[count] = functools.partial(compile_embed, model.config, self._shape, count, *where)
        if ring:
            wanted["rebase"] = functools.partial(compile_rebase, model.config, self._shape, *where)
        programs = _compiled(wanted, progress)
        self.programs: dict[_Key, Any] = {key: programs[key] for key in self._shapes}
        self.embeds = {count: programs[count] for count in sizes}
        self._rebase = programs.get("rebase")
        self.cache, self.results, self.frames = fresh_state(model.config, language, self._shape, *where)
        if self._rebase is not None:  # hours before it is due: what it needs of memory is taken now
            self.cache = self._rebase(self.cache, np.zeros(streams, np.int32))
        self.compile_seconds = time.perf_counter() - begin

    def _shape_of(self, key: _Key) -> Shape:
        shape = dataclasses.replace(self._shape, tokens=key.tokens, rows=key.rows, reads=key.reads)
        if self.model.mesh is not None:
            return shape
        return with_kernel(shape, self.model.config, self.model.dtype, self.model.device.platform)

    def _rows(self, tokens: int) -> list[int]:
        """Of the programs for chunks of a length. Words of replies and silent frames are nearly all there is, so that
        these have some for a few streams."""
        often = tokens in (self.lengths.texts[0], self.lengths.turns[0])
        return _steps_of_four(ROWS, self.streams) if often else [self.streams]

    def embed(self, sights: Sequence[tuple[int, Sight]]) -> None:
        """Frames of streams, by their places, into the frames that are kept."""
        most = max(self.embeds)
        for first in range(0, len(sights), most):
            some = sights[first : first + most]
            count = next(count for count in self.embeds if len(some) <= count)
            clips = np.zeros((count, *some[0][1].clip.shape), np.uint8)
            row, slot = np.full(count, self.streams, np.int32), np.zeros(count, np.int32)
            for index, (place, sight) in enumerate(some):
                clips[index], row[index], slot[index] = sight.clip, place, sight.slot
            self.frames = self.embeds[count](self.model.params, self.frames, clips, row, slot)

    def do(self, wishes: Mapping[int, Wish], on_done: Callable[[], object] | None = None) -> dict[int, Any]:
        """Does what streams wish for; those that want different things take turns, the quick ones first.

        Args:
            wishes: by the place of the stream in the batch. Where frames are kept, those of chunks have been embedded.
            on_done: never needed: what is told here is told at once.

        Returns:
            What comes of them, for those that it was done for: the others are still to be done.
        """
        if rebases := {place: wish for place, wish in wishes.items() if isinstance(wish, Rebase)}:
            return self._turn_back(rebases)
        chunks = {place: wish for place, wish in wishes.items() if isinstance(wish, Chunk)}
        return self._feed(chunks)

    def ready(self, places: Iterable[int]) -> bool:
        """Whether there is something to do for one of these places."""
        return any(True for _ in places)

    def leave(self, place: int) -> None:
        """What is under way of a stream may end as it likes: whoever is next begins with an empty cache."""

    # ------------------------------------------------------------------------------------------------------ the steps

    def _feed(self, chunks: Mapping[int, Chunk]) -> dict[int, Result]:
        sights = [chunk.sight for chunk in chunks.values() if chunk.sight is not None]
        needed = max(len(chunk.tokens) for chunk in chunks.values())
        tokens = next(n for n in (self.lengths.turns if sights else self.lengths.texts) if needed <= n)
        rows = next(n for n in self._rows(tokens) if len(chunks) <= n)
        end = max(chunk.start for chunk in chunks.values()) + tokens
        reads = self._reads[0] if len(self._reads) == 1 else next(size for size in self._reads if end <= size)
        rest = []
        if sights:
            rest = [self.frames if self._seen == "turn" else np.stack([sight.clip for sight in sights])]
        key = _Key(self._seen if sights else "text", tokens, rows, reads)
        inputs = self._inputs(chunks, self._shapes[key])
        self.cache, self.results = self.programs[key](self.model.params, self.cache, self.results, inputs, *rest)
        results = Results(self.results)
        return {place: Result(results, place) for place in chunks}

    def _inputs(self, chunks: Mapping[int, Chunk], shape: Shape) -> Inputs:
        """Chunks laid out for the device; streams without one write padding behind all that anyone reads."""
        inputs = empty_inputs(shape)
        inputs.start[:], inputs.position[:] = self.lengths.capacity, np.iinfo(np.int32).max
        if shape.chunks < self.streams:
            others = [place for place in range(self.streams) if place not in chunks]
            inputs.row[:] = [*chunks, *others][: shape.chunks]
        for index, place in enumerate(inputs.row.tolist()):
            chunk = chunks.get(place)
            if chunk is None:
                continue
            count = len(chunk.tokens)
            inputs.tokens[index, :count], inputs.count[index] = chunk.tokens, count
            inputs.rope[:, index, :count] = chunk.rope
            inputs.frame[index] = 0 if chunk.sight is None else chunk.sight.slot
            for name in ("start", "position", "oldest", "gap", "temperature", "seed"):
                getattr(inputs, name)[index] = getattr(chunk, name)
        return inputs

    def _turn_back(self, rebases: Mapping[int, Rebase]) -> dict[int, None]:
        distances = np.zeros(self.streams, np.int32)
        for place, rebase in rebases.items():
            distances[place] = rebase.distance
        assert self._rebase is not None
        self.cache = self._rebase(self.cache, distances)
        return dict.fromkeys(rebases)
