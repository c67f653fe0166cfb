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


def compiled_step(target, shape):
    """The step, and the shape of its keys in the text of its program."""
    model = published("videollm_online").model
    decoder = dataclasses.replace(model.decoder, num_layers=2)
    model = dataclasses.replace(model, decoder=decoder)
    devices, _ = abstract_devices(TARGETS[target])
    language, dtype = Language(SilenceScores(11), 5, ()), jax.numpy.dtype("bfloat16")
    mesh = make_mesh(tensor=1, devices=devices[:1])
    compiled = compile_step("text", model, language, shape, dtype, mesh)
    of_keys = rf"bf16\[{shape.batch},{decoder.num_kv_heads},{shape.slots},{decoder.head_dim}\]\S*"
    text = compiled.as_text()
    assert re.search(of_keys, text)  # it is there, under this shape
    copies = [line.strip()[:200] for line in text.splitlines() if re.search(rf"= {of_keys} (copy|transpose)\(", line)]
    assert not copies, copies
    cache = 2 * decoder.num_layers * shape.batch * shape.slots * decoder.num_kv_heads * decoder.head_dim * 2
    aliased = compiled.memory_analysis().alias_size_in_bytes
    assert cache <= aliased <= cache + 8 * shape.batch * shape.slots + 4096
    return compiled, decoder


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_step_copies_no_cache_and_needs_little_room(target, tokens, slots):
    compiled, decoder = compiled_step(target, Shape(1, slots, tokens))
    scores = 4 * decoder.num_heads * tokens * slots  # f32, of a layer
    found = compiled.memory_analysis()
    assert found.temp_size_in_bytes < 3 * scores + 64e6, found.temp_size_in_bytes / 1e6


@pytest.mark.parametrize("target", TARGETS)
def test_a_step_of_a_few_of_many_streams_copies_no_cache_but_theirs(target):
    compiled, decoder = compiled_step(target, Shape(16, 8192, 1, rows=4))
    theirs = 2 * 4 * 8192 * decoder.num_kv_heads * decoder.head_dim * 2  # of a layer
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * theirs + 64e6


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_the_kernel_of_tpus_writes_no_scores(target, slots):
    compiled, _ = compiled_step(target, Shape(1, slots, 144, attention="splash"))
    assert "tpu_custom_call" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 64e6 + 2 * 144 * slots


@pytest.mark.may_skip("cuDNN is half a gigabyte: pip install --no-deps nvidia-cudnn-cu13")
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("target", ["h200", "a100"])
def test_the_kernel_of_cards_reads_the_cache_where_it_lies(target, slots):
    pytest.importorskip("nvidia.cudnn", reason="cuDNN is not installed")
    compiled, _ = compiled_step(target, Shape(1, slots, 144, attention="cudnn"))
    assert "__cudnn$fmha" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 64e6 + 4 * 144 * slots
