"""A live stream's step beside torch: the benchmark's logits are equal, and it notices when they are not."""

import dataclasses

import pytest

from jstream.benchmarks import stream_peer
from jstream.config import ConfigError
from tests.published_configs import published

pytest.importorskip("torch")


def small():
    config = published("bench_125m")
    vision = dataclasses.replace(config.model.vision, image_size=48, width=32, num_layers=1, mlp_dim=32)
    decoder = dataclasses.replace(
        config.model.decoder,
        vocab_size=1024,
        width=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=96,
    )
    model = dataclasses.replace(config.model, vision=vision, decoder=decoder)
    return dataclasses.replace(config, model=model, lora=dataclasses.replace(config.lora, rank=8, alpha=16.0))


def test_a_streams_step_is_that_of_torch_merged_and_unmerged():
    figures = {figure.key: figure.value for figure in stream_peer.measure(small(), slots=128, steps=10)}
    assert figures["cache_tokens"] == 110  # eleven frames; the twelfth is the chunk
    assert figures["max_logit_diff"] < 1e-4 * figures["logit_spread"]
    for prefix in ("", "reply_"):
        times = [figures[f"{prefix}{name}_ms"] for name in ("jstream", "torch_eager", "torch_compile")]
        assert min(times) > 0 and figures[f"{prefix}ratio_eager"] > 0 and figures[f"{prefix}ratio_compile"] > 0


def test_other_logits_are_noticed(monkeypatch):
    merge = stream_peer.lora.merge
    monkeypatch.setattr(
        stream_peer.lora,
        "merge",
        lambda leaves, adapters, config: merge(leaves, adapters, dataclasses.replace(config, alpha=config.alpha + 1)),
    )
    with pytest.raises(ConfigError, match="torch_eager .* apart"):
        stream_peer.measure(small(), slots=128, steps=10)
