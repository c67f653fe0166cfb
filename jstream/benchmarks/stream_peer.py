"""The decoder's step of a live stream beside torch and transformers: equal weights, cache, chunk and device.

`torch_eager` is VideoLLM-online's loop as published: adapters beside their kernels, a cache that grows by
concatenation. `torch_compile` is what one would make of it: adapters merged, a static cache, `torch.compile`. Frames
are given as their tokens, so the towers, which do the same work, are left out. Logits are compared before anything is
timed; then rounds of all take turns, so that whatever else the machine does falls on each.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jstream.benchmarks.report import Figure
from jstream.benchmarks.synthetic import bundled_protocol
from jstream.benchmarks.turn import OneStream
from jstream.config import ConfigError, SiglipConfig, TrainConfig
from jstream.models.video_lm import init_params
from jstream.protocols.live import Live
from jstream.streaming.step import Language
from jstream.training import lora
from jstream.weights.hf import flat, unflat

ROUNDS = 10
CLOSE = {"float32": 1e-3, "bfloat16": 1e-1}  # how far logits may be apart, of their spread


def measure(config: TrainConfig | None, slots: int, steps: int) -> list[Figure]:
    """Times a silent frame and a token of a reply, in all three.

    Args:
        slots: S of the cache; it is full but for the chunk.
        steps: of each, in ROUNDS rounds.

    Raises:
        ConfigError: torch is missing, the model is not written in torch here, or the logits are not the same.
    """
    if config is None or not config.lora.rank or config.protocol.name != "live":
        raise ConfigError("--mode=peer: expected a config of VideoLLM-online's make, e.g. configs/bench_125m.py")
    if not isinstance(config.model.vision, SiglipConfig):
        raise ConfigError("--mode=peer: expected a SigLIP tower, found Qwen's")
    try:
        from jstream.benchmarks.torch_stream import TorchStream
    except ImportError as error:
        raise ConfigError(f"--mode=peer: expected torch and transformers ({error}); pip install '.[parity]'") from None
    protocol = bundled_protocol(config)
    assert isinstance(protocol, Live)
    leaves, adapters = random_weights(config)
    merged = lora.merge(leaves, adapters, config.lora)
    rng, per_frame = np.random.default_rng(0), config.model.vision.tokens_per_frame
    width = config.model.decoder.width
    spread = float(jnp.std(leaves["decoder/embed_tokens/embedding"]))
    frames = lambda count: rng.normal(0, spread, (count * per_frame, width)).astype(np.float32)
    context, frame = frames((slots - per_frame - 1) // per_frame), frames(1)
    # a frame and the token that asks for the decision; a reply's token
    chunks = {"frame": [protocol.frame_id] * per_frame + [protocol.silence_id], "reply": [protocol.silence_id]}
    config = dataclasses.replace(config, remat="none")  # nothing is trained
    on_host = {path: np.asarray(x) for path, x in leaves.items()}
    no_lora = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=0))
    eager = TorchStream(config, on_host | {path: np.asarray(x) for path, x in adapters.items()}, context, slots)
    compiled = TorchStream(no_lora, {path: np.asarray(x) for path, x in merged.items()}, context, slots)
    params = jax.tree.map(lambda x: x.astype(config.compute_dtype), unflat(merged))
    words = np.asarray(merged["decoder/embed_tokens/embedding"])
    embeds = {"frame": np.concatenate([frame, words[[protocol.silence_id]]]), "reply": words[[protocol.silence_id]]}

    def ours(scores: Callable[[jax.Array], jax.Array]) -> tuple[OneStream, dict[str, Callable[[], np.ndarray]]]:
        language = Language(scores, protocol.frame_id, ())
        stream = OneStream(config.model, params, language, slots, config.compute_dtype)
        stream.fill(context.reshape(-1, per_frame, width))
        given = frame[None, None].astype(stream.dtype)
        return stream, {
            "frame": lambda: stream("turn", chunks["frame"], given),
            "reply": lambda: stream("text", chunks["reply"]),
        }

    peers = {"torch_eager": eager, "torch_compile": compiled}
    _, whole = ours(lambda logits: logits)
    expected = {kind: whole[kind]()[:-1] for kind in embeds}
    apart = farthest(expected, peers, embeds, CLOSE[config.compute_dtype])
    stream, steps_of_ours = ours(protocol.scores)
    figures = [
        Figure("params", sum(x.size for x in jax.tree.leaves(params["decoder"])), "{:,}"),
        Figure("cache_tokens", stream.place),
        Figure("max_logit_diff", apart, "{:.1e}"),
        Figure("logit_spread", float(np.std(expected["frame"])), "{:.2f}"),
        Figure("jstream_compile_seconds", stream.compile_seconds, "{:.1f}"),
    ]
    del whole
    for kind, chunk in embeds.items():
        runs: dict[str, Callable[[], Any]] = {"jstream": steps_of_ours[kind]}
        for name, peer in peers.items():
            given = peer.to_device(chunk)
            runs[name] = lambda peer=peer, given=given: peer.decide(given, protocol.silence_id)
        figures += compare("" if kind == "frame" else "reply_", runs, max(steps // ROUNDS, 1))
    return figures


def farthest(
    expected: Mapping[str, np.ndarray], peers: Mapping[str, Any], embeds: Mapping[str, np.ndarray], close: float
) -> float:
    """How far any logit of the peers is from ours.

    Args:
        expected: kind of chunk → our logits; `embeds` has the chunks.
        close: how far it may be, of the spread of ours.

    Raises:
        ConfigError: it is farther.
    """
    apart = {
        (name, kind): float(np.abs(peer.logits(peer.to_device(embeds[kind])).cpu().numpy() - ours).max())
        for kind, ours in expected.items()
        for name, peer in peers.items()
    }
    for (name, kind), far in apart.items():
        if far > close * float(np.std(expected[kind])):
            raise ConfigError(f"--mode=peer: expected equal logits of a {kind}, found {name} {far:.1e} apart")
    return max(apart.values())


def random_weights(config: TrainConfig) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Leaves of fresh params and of adapters, both halves of them, in f32: path → array."""
    key = jax.random.key(0)
    leaves = flat(jax.jit(lambda key: init_params(config.model, key))(key))
    adapters = lora.init_adapters(leaves, config.lora, key)
    filled = {
        path: jax.random.normal(jax.random.fold_in(key, number), x.shape) * 0.01 if path.endswith("/b") else x
        for number, (path, x) in enumerate(adapters.items())
    }
    return leaves, filled


def compare(prefix: str, runs: dict[str, Callable[[], Any]], steps: int) -> list[Figure]:
    """Milliseconds of each, medians over all steps, and ratios, medians over rounds that came one after the other."""
    spent: dict[str, list[list[float]]] = {name: [] for name in runs}
    with tqdm(total=(ROUNDS + 1) * len(runs), desc=f"{prefix}rounds", delay=2, dynamic_ncols=True) as bar:
        for number in range(ROUNDS + 1):  # the first warms up
            for name, once in runs.items():
                each = []
                for _ in range(steps):
                    began = time.perf_counter()
                    once()
                    each.append(time.perf_counter() - began)
                if number:
                    spent[name].append(each)
                bar.update()
    median = {name: [float(np.median(each)) for each in rounds] for name, rounds in spent.items()}
    found = [Figure(f"{prefix}{name}_ms", 1e3 * float(np.median(spent[name])), "{:.2f}") for name in runs]
    for name in ("eager", "compile"):
        ratio = np.median(np.divide(median["jstream"], median[f"torch_{name}"]))
        found.append(Figure(f"{prefix}ratio_{name}", float(ratio), "{:.2f}"))
    return found
