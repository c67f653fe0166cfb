"""One stream's forward at a given length of what it has seen: a silent frame, or a token of a reply.

The program is the one that a live stream runs, the vision tower included, and every step ends when the host has read
its result. Beside the time stands the floor: the bytes that have to be read once, or the products that have to be made,
whichever takes the device longer.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jstream.accelerators import peak_bandwidth, peak_flops
from jstream.benchmarks.report import Figure
from jstream.benchmarks.streams import model_of
from jstream.config import ConfigError, ModelConfig, TrainConfig
from jstream.models.cache import LIVE
from jstream.protocols.protocol import SILENCE, Turn
from jstream.streaming.batch import reads_for, with_kernel
from jstream.streaming.step import Language, Shape, compile_step, empty_inputs, fresh_state
from jstream.training.flops import forward_flops
from jstream.weights.hf import flat

WARM_UP = 10  # steps


class OneStream:
    """The compiled steps of a stream whose cache holds `place` tokens; each reads a chunk behind them, always the same.

    Attributes:
        compile_seconds: of the program that took longest.
    """

    def __init__(self, config: ModelConfig, params: Any, language: Language, slots: int, dtype: Any):
        self.config, self.params, self.language, self.slots = config, params, language, slots
        self.dtype, self._shape = jnp.dtype(dtype), Shape(1, slots, 1, frames=1)
        self.cache, self.results, _ = fresh_state(config, language, self._shape, dtype)
        self.place, self.programs, self.compile_seconds = 0, {}, 0.0
        self._platform = jax.devices()[0].platform
        self._reads = reads_for(self._platform, False, slots)

    def __call__(self, kind: str, tokens: Sequence[int], *rest: Any) -> np.ndarray:
        """What the language makes of the logits behind a chunk, and the next token.

        Args:
            kind: of `compile_step`; `rest` is what it takes beside params, cache, results and inputs.
        """
        count = len(tokens)
        reads = next(size for size in self._reads if size == LIVE or size >= self.place + count)
        shape = dataclasses.replace(self._shape, tokens=count, reads=reads)
        shape = with_kernel(shape, self.config, self.dtype, self._platform)
        if (kind, count, reads) not in self.programs:
            began = time.perf_counter()
            self.programs[kind, count, reads] = compile_step(kind, self.config, self.language, shape, self.dtype)
            self.compile_seconds = max(self.compile_seconds, time.perf_counter() - began)
        inputs = empty_inputs(shape)
        inputs.tokens[0], inputs.count[0] = tokens, count
        inputs.rope[:] = self.place + np.arange(count, dtype=np.int32)
        inputs.start[0] = inputs.position[0] = self.place
        program = self.programs[kind, count, reads]
        self.cache, self.results = program(self.params, self.cache, self.results, inputs, *rest)
        return np.asarray(self.results)[0]

    def fill(self, frame_tokens: np.ndarray) -> None:
        """Reads frames [F, M, E], so that they are what the stream has seen."""
        for frame in tqdm(frame_tokens, desc="filling the cache", delay=2, leave=False):
            self("turn", [self.language.frame_id] * len(frame), frame[None, None].astype(self.dtype))
            self.place += len(frame)


def measure(config: TrainConfig | None, kind: str, slots: int, steps: int, seen: int = 0) -> list[Figure]:
    """Times steps behind what a stream has seen.

    Args:
        kind: `frame`, with the tokens that a silent turn has, or `reply`, one token.
        slots: S of the cache.
        seen: tokens in it with the chunk; 0 fills it.
    """
    model = model_of(config)
    protocol, vision, width = model.protocol, model.config.vision, model.config.decoder.width
    silent = [*protocol.close_turn(SILENCE), *protocol.open_turn(Turn(1.0, 2.0))]
    chunk = silent if kind == "frame" else [protocol.end_id]
    deep = width * (1 + model.config.decoder.deep_layers)
    frames = ((seen or slots) - len(chunk)) // vision.tokens_per_frame
    if frames < 1 or seen > slots:
        raise ConfigError(
            f"--slots, --seen: expected room for two frames of {vision.tokens_per_frame} tokens, and no more tokens "
            f"than slots, found {slots} and {seen}"
        )
    language = Language(protocol.scores, protocol.frame_id, protocol.unspoken_ids)
    stream, rng = OneStream(model.config, model.params, language, slots, model.dtype), np.random.default_rng(0)
    stream.fill(rng.normal(0, 0.02, (frames, vision.tokens_per_frame, deep)).astype(np.float32))
    clip = rng.integers(0, 256, (1, *vision.frame_size, 3 * vision.num_images), np.uint8)
    program, rest = ("frame", [clip]) if kind == "frame" else ("text", [])
    spent = []
    for _ in tqdm(range(WARM_UP + steps), desc=f"{kind}s", delay=2, dynamic_ncols=True):
        began = time.perf_counter()
        stream(program, chunk, *rest)
        spent.append(time.perf_counter() - began)
    compiled = next(compiled for (named, *_), compiled in stream.programs.items() if named == program)
    median = float(np.median(spent[WARM_UP:]))
    bound = floor(model.config, model.params, stream, len(chunk), kind == "frame")
    return [
        Figure("tokens", len(chunk)),
        Figure("slots", slots),
        Figure("cache_tokens", stream.place),
        Figure("steps", steps),
        Figure("ms_median", 1e3 * median, "{:.2f}"),
        Figure("ms_p99", 1e3 * float(np.percentile(spent[WARM_UP:], 99)), "{:.2f}"),
        Figure("compile_seconds", stream.compile_seconds, "{:.1f}"),
        Figure("temporary_mib", compiled.memory_analysis().temp_size_in_bytes / 2**20, "{:.1f}"),
        *bound,
        Figure("fraction_of_floor", next(f.value for f in bound if f.key == "floor_ms") / (1e3 * median), "{:.0%}"),
    ]


def floor(config: ModelConfig, params: Any, stream: OneStream, tokens: int, with_frame: bool) -> list[Figure]:
    """What a step cannot be faster than on this device, by data sheet, or as measured where there is none."""
    leaves = flat(params)
    used = {
        path: x
        for path, x in leaves.items()
        if (with_frame or path.startswith("decoder/"))
        and (config.decoder.tie_embeddings or path != "decoder/embed_tokens/embedding")
    }
    live = (stream.place + tokens) / stream.slots  # of keys and values
    read = sum(x.nbytes for x in used.values())
    read += live * sum(x.nbytes for x in jax.tree.leaves((stream.cache.keys, stream.cache.values)))
    pairs = tokens * stream.place + tokens * (tokens + 1) / 2
    products = forward_flops(config, used, tokens, with_frame, pairs, decided=1)
    kind = jax.devices()[0].device_kind
    bandwidth, flops, source = peak_bandwidth(kind), peak_flops(kind), "data sheet"
    if bandwidth is None or flops is None:
        bandwidth, flops, source = *measured_peaks(), "measured here"
    return [
        Figure("bytes", read, "{:.4g}"),
        Figure("flops", products, "{:.4g}"),
        Figure("bandwidth_and_flops", source),
        Figure("bytes_per_second_peak", bandwidth, "{:.3g}"),
        Figure("flops_per_second_peak", flops, "{:.3g}"),
        Figure("floor_ms", 1e3 * max(read / bandwidth, products / flops), "{:.2f}"),
    ]


def measured_peaks() -> tuple[float, float]:
    """Bytes/s of a sum over 512 MiB, and FLOP/s of a product of f32 matrices: the best of five."""

    def best(step: Any, *arguments: jax.Array) -> float:
        compiled, spent = jax.jit(step).lower(*arguments).compile(), []
        for _ in range(6):
            began = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            spent.append(time.perf_counter() - began)
        return min(spent)

    size, side = 1 << 27, 2048
    square = jnp.ones((side, side), jnp.float32)
    bandwidth = 4 * size / best(jnp.sum, jnp.ones(size, jnp.float32))
    return bandwidth, 2 * side**3 / best(jnp.matmul, square, square)
