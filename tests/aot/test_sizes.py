"""The published sizes compile, one turn against a cache of 8,192 tokens, and fit the accelerators they are meant for.

The compilers' own count of bytes is checked: params, cache and the compiler's temporaries on each device. Nothing runs.
"""

import dataclasses

import jax
import pytest

from jstream.accelerators import GIB, abstract_devices
from jstream.config import QwenVisionConfig, TrainConfig
from jstream.protocols.live import SilenceScores
from jstream.protocols.streamo import StateScores
from jstream.sharding import make_mesh
from jstream.streaming.step import Language, Shape, compile_step
from jstream.training.compiled import foretold
from tests.published_configs import published

CAPACITY = 8192
SLICES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}


def turn_of(config: TrainConfig) -> tuple:
    """The scores of a config's protocol, and the longest chunk of a turn with a question, rounded up."""
    if config.protocol.name == "live":
        return SilenceScores(11), 64
    vision = config.model.vision
    assert isinstance(vision, QwenVisionConfig)
    return StateScores((7, 8, 9)), -(-(vision.tokens_per_frame + 64) // 8) * 8


@pytest.mark.parametrize(
    ("name", "size", "accelerator", "tensor"),
    [
        ("streamo", "3b", "v5e", 1),
        ("streamo", "3b", "v6e", 1),
        ("streamo", "7b", "v5e", 4),
        ("streamo", "7b", "v6e", 1),
        ("joyai", None, "v5e", 4),
        ("joyai", None, "v6e", 1),
        ("videollm_online", None, "v5e", 4),
        ("videollm_online", None, "v6e", 1),
        ("streamo", "3b", "a100", 1),
        ("streamo", "7b", "a100", 1),
        ("streamo", "3b", "h200", 1),
        ("streamo", "7b", "h200", 1),
        ("joyai", None, "a100", 1),
        ("joyai", None, "h200", 1),
        ("videollm_online", None, "a100", 1),
        ("videollm_online", None, "h200", 1),
    ],
)
def test_a_turn_fits(name, size, accelerator, tensor):
    config = published(name, size)
    devices, memory = abstract_devices(SLICES.get(accelerator, accelerator))
    scores, length = turn_of(config)
    model = config.model
    if isinstance(model.vision, QwenVisionConfig):  # a stream of 16:9
        model = dataclasses.replace(model, vision=model.vision.for_frames(720, 1280))
    mesh = make_mesh(tensor=tensor, devices=devices)
    language, shape = Language(scores, 5, ()), Shape(1, CAPACITY, length)
    compiled = compile_step("frame", model, language, shape, jax.numpy.dtype("bfloat16"), mesh)
    found = compiled.memory_analysis()
    held = foretold(compiled)
    print(
        f"{name} {size or ''} {accelerator} × {tensor}: {held / GIB:.2f} GiB, "
        f"of which temporary {found.temp_size_in_bytes / GIB:.2f}"
    )
    assert found.alias_size_in_bytes >= cache_bytes(model, tensor)  # the cache is donated, all of it
    assert held < 0.95 * memory


def cache_bytes(model, tensor: int) -> int:
    c = model.decoder
    heads = c.num_kv_heads // tensor if c.num_kv_heads % tensor == 0 else c.num_kv_heads
    return 2 * c.num_layers * CAPACITY * heads * c.head_dim * 2


@pytest.mark.parametrize(("accelerator", "tensor"), [("v5e", 4), ("v6e", 1), ("h200", 1)])
def test_a_word_of_a_reply_fits(accelerator, tensor):
    devices, memory = abstract_devices(SLICES.get(accelerator, accelerator))
    model = published("videollm_online").model
    mesh = make_mesh(tensor=tensor, devices=devices)
    language, shape = Language(SilenceScores(11), 5, ()), Shape(1, CAPACITY, 1)
    compiled = compile_step("text", model, language, shape, jax.numpy.dtype("bfloat16"), mesh)
    found = compiled.memory_analysis()
    assert found.alias_size_in_bytes >= cache_bytes(model, tensor)
    assert found.argument_size_in_bytes + found.temp_size_in_bytes < 0.95 * memory
