"""`Batch`: B streams on the devices. What their turns wish for is done for all of them at once.

It owns the cache and the compiled programs. Chunks of different lengths share a forward, padded to the longest; frames
are embedded together; the host reads one small array. A stream that wishes for nothing stays as it is.
"""

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jstream.model import Model
from jstream.models.cache import LIVE
from jstream.streaming.step import Inputs, Language, Shape, compile_embed, compile_rebase, compile_step, fresh_cache
from jstream.streaming.stream import Chunk, Lengths, Look, Rebase, Result, Wish

READS = 2048  # slots that a step reads at least, where it need not read all; then four times as many, and so on


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


class Batch:
    """The device's side of some streams.

    Args:
        model: whose params they share.
        lengths: of their chunks and of the cache.
        streams: B; with one, a frame is embedded in the same program that reads it.
        ring: whether all slots are in use for good, so that every step reads all.
        looks: whether frames are embedded by themselves (`Look`), to be read again.
        int8: whether the cache holds keys and values in int8.

    Attributes:
        compile_seconds: spent compiling; nothing is compiled after that.
    """

    def __init__(
        self,
        model: Model,
        lengths: Lengths,
        streams: int = 1,
        ring: bool = False,
        looks: bool = False,
        int8: bool = False,
    ):
        self.model, self.lengths, self.streams = model, lengths, streams
        begin = time.perf_counter()
        device = (jax.devices() if model.mesh is None else model.mesh.devices.flat)[0]
        self._reads = reads_for(device.platform, ring, lengths.slots)
        self._together = _steps_of_four(1, streams) if streams > 1 or looks else []
        language = Language(model.protocol.scores, model.protocol.frame_id, model.protocol.unspoken_ids)
        where = (model.dtype, model.mesh)
        shape = lambda tokens, reads=0: Shape(streams, lengths.slots, tokens, reads, lengths.sinks, int8)
        seen = "frame" if streams == 1 and not looks else "turn"
        kinds = [(seen, tokens) for tokens in lengths.turns] + [("text", tokens) for tokens in lengths.texts]
        self.programs: dict[tuple[str, int, int], Any] = {
            (kind, tokens, reads): compile_step(kind, model.config, language, shape(tokens, reads), *where)
            for kind, tokens in kinds
            for reads in self._reads
        }
        self.embeds = {count: compile_embed(model.config, count, *where) for count in self._together}
        self._rebase = compile_rebase(model.config, shape(1), *where) if ring else None
        self.cache = fresh_cache(model.config, shape(1), *where)
        self.compile_seconds = time.perf_counter() - begin

    def do(self, wishes: Mapping[int, Wish]) -> dict[int, Any]:
        """Does what streams wish for; those that want different things take turns, the quick ones first.

        Args:
            wishes: by the place of the stream in the batch.

        Returns:
            What comes of them, for those that it was done for: the others are still to be done.
        """
        if rebases := {place: wish for place, wish in wishes.items() if isinstance(wish, Rebase)}:
            return self._turn_back(rebases)
        if looks := {place: wish.clip for place, wish in wishes.items() if isinstance(wish, Look)}:
            embedded = self._embed(list(looks.values()))
            return {place: embedded[i : i + 1] for i, place in enumerate(looks)}
        return self._feed({place: wish for place, wish in wishes.items() if isinstance(wish, Chunk)})

    # ------------------------------------------------------------------------------------------------------ the steps

    def _feed(self, chunks: Mapping[int, Chunk]) -> dict[int, Result]:
        with_frames = [c.clip is not None or c.frame_tokens is not None for c in chunks.values()]
        lengths = self.lengths.turns if any(with_frames) else self.lengths.texts
        needed = max(len(chunk.tokens) for chunk in chunks.values())
        tokens = next(length for length in lengths if needed <= length)
        end = max(chunk.start for chunk in chunks.values()) + tokens
        reads = self._reads[0] if len(self._reads) == 1 else next(size for size in self._reads if end <= size)
        inputs = self._inputs(chunks, tokens)
        if not any(with_frames):
            program, rest = self.programs["text", tokens, reads], ()
        elif ("frame", tokens, reads) in self.programs:
            (chunk,) = chunks.values()
            assert chunk.clip is not None
            program, rest = self.programs["frame", tokens, reads], (chunk.clip[None],)
        else:
            program, rest = self.programs["turn", tokens, reads], (self._frame_tokens(chunks),)
        self.cache, result = program(self.model.params, self.cache, inputs, *rest)
        values = np.asarray(result)  # the one read of a step
        return {place: Result(values[place, :-1].tolist(), int(values[place, -1])) for place in chunks}

    def _inputs(self, chunks: Mapping[int, Chunk], tokens: int) -> Inputs:
        """Chunks laid out for the device; places without one write padding behind all that anyone reads."""
        batch = self.streams
        zeros = lambda *shape: np.zeros(shape, np.int32)
        every = lambda value: np.full(batch, value, np.int32)
        start, position = every(self.lengths.capacity), every(np.iinfo(np.int32).max)
        inputs = Inputs(
            zeros(batch, tokens), zeros(batch), zeros(3, batch, tokens), start, position, zeros(batch), zeros(batch),
            np.zeros(batch, np.float32), zeros(batch),
        )  # fmt: skip
        for place, chunk in chunks.items():
            count = len(chunk.tokens)
            inputs.tokens[place, :count], inputs.count[place] = chunk.tokens, count
            inputs.rope[:, place, :count] = chunk.rope
            for name in ("start", "position", "oldest", "gap", "temperature", "seed"):
                getattr(inputs, name)[place] = getattr(chunk, name)
        return inputs

    def _embed(self, clips: list[np.ndarray]) -> jax.Array:
        """Frame tokens [N, M, E] of clips, N at least their number."""
        count = next(count for count in self._together if len(clips) <= count)
        padded = np.zeros((count, *clips[0].shape), np.uint8)
        padded[: len(clips)] = clips
        return self.embeds[count](self.model.params, padded)

    def _frame_tokens(self, chunks: Mapping[int, Chunk]) -> jax.Array:
        """Frame tokens [B, M, E] of chunks, new frames embedded together; anything where a chunk has none."""
        clips = {place: chunk.clip for place, chunk in chunks.items() if chunk.clip is not None}
        kept = {place: chunk.frame_tokens for place, chunk in chunks.items() if chunk.frame_tokens is not None}
        if self.streams == 1:
            (only,) = kept.values()
            return only
        parts = [self._embed(list(clips.values()))] if clips else []
        first = len(parts[0]) if parts else 0
        order = np.zeros(self.streams, np.int32)
        order[list(clips)] = range(len(clips))
        order[list(kept)] = range(first, first + len(kept))
        together = jnp.concatenate([*parts, *kept.values()]) if kept else parts[0]
        return jnp.take(together, order, axis=0)

    def _turn_back(self, rebases: Mapping[int, Rebase]) -> dict[int, None]:
        distances = np.zeros(self.streams, np.int32)
        for place, rebase in rebases.items():
            distances[place] = rebase.distance
        assert self._rebase is not None
        self.cache = self._rebase(self.cache, distances)
        return dict.fromkeys(rebases)
