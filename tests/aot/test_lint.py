"""What a step must not do on an accelerator, read out of its program: copy the cache, or need room that grows with it.

VideoLLM-online's decoder with two of its layers; each behaves as all 32 do. Nothing runs.
"""

import dataclasses
import re

import jax
import pytest

from jstream.accelerators import abstract_devices
from jstream.protocols.live import SilenceScores
from jstream.sharding import make_mesh
from jstream.streaming.step import Language, Shape, compile_step
from tests.published_configs import published

TARGETS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "h200": "h200", "a100": "a100"}
LENGTHS = (1, 11, 144)  # a word of a reply, a frame of VideoLLM-online, one of Streamo
SLOTS = (2048, 8192, 32_768)


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_step_copies_no_cache_and_needs_little_room(target, tokens, slots):
    model = published("videollm_online").model
    decoder = dataclasses.replace(model.decoder, num_layers=2)
    model = dataclasses.replace(model, decoder=decoder)
    devices, _ = abstract_devices(TARGETS[target])
    language, shape = Language(SilenceScores(11), 5, ()), Shape(1, slots, tokens)
    dtype, mesh = jax.numpy.dtype("bfloat16"), make_mesh(tensor=1, devices=devices[:1])
    compiled = compile_step("text", model, language, shape, dtype, mesh)
    of_keys = rf"bf16\[1,{decoder.num_kv_heads},{slots},{decoder.head_dim}\]\S*"
    text, found = compiled.as_text(), compiled.memory_analysis()
    assert re.search(of_keys, text)  # it is there, under this shape
    copies = [line.strip()[:200] for line in text.splitlines() if re.search(rf"= {of_keys} (copy|transpose)\(", line)]
    assert not copies, copies
    cache = 2 * decoder.num_layers * slots * decoder.num_kv_heads * decoder.head_dim * 2
    positions = 4 * slots
    assert cache <= found.alias_size_in_bytes <= cache + 2 * positions + 4096
    scores = 4 * decoder.num_heads * tokens * slots  # f32, of a layer
    assert found.temp_size_in_bytes < 3 * scores + 64e6, found.temp_size_in_bytes / 1e6
