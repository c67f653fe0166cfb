"""Published checkpoints: both layouts, both ways, and every way in which a folder can be wrong."""

import dataclasses
import json
import struct
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors

from jstream.config import ConfigError, DecoderConfig, LoraConfig, QwenVisionConfig, TrainConfig, WeightsConfig
from jstream.models.video_lm import abstract_params, run
from jstream.protocols import live as live_language
from jstream.training.lora import init_adapters, merge
from jstream.weights import hf
from jstream.weights.added_tokens import grow_embedding
from jstream.weights.checkpoint import CheckpointError
from jstream.weights.hf import flat, load_params, read_config, resolve, save_hf
from jstream.weights.peft import write_adapter
from jstream.weights.published import starting_tower
from jstream.weights.videollm_online import load_videollm_online

# ------------------------------------------------------------------------------- small folders in the published layouts

QWEN2_5 = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {"type": "mrope", "mrope_section": [0, 1, 1]},
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 32768,
    "vocab_size": 40,
    "vision_config": {
        "depth": 2, "fullatt_block_indexes": [1], "hidden_act": "silu", "hidden_size": 8, "in_chans": 3,
        "intermediate_size": 12, "num_heads": 2, "out_hidden_size": 16, "patch_size": 14, "spatial_merge_size": 2,
        "spatial_patch_size": 14, "temporal_patch_size": 2, "window_size": 112,
    },
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 16, "intermediate_size": 24,
        "model_type": "qwen3_vl_text", "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6, "rope_theta": 5000000, "vocab_size": 40,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    },
    "tie_word_embeddings": True,
    "vision_config": {
        "deepstack_visual_indexes": [0], "depth": 2, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 8,
        "in_channels": 3, "intermediate_size": 12, "num_heads": 2, "num_position_embeddings": 9,
        "out_hidden_size": 16, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
    },
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 40,
}
SIGLIP = {
    "architectures": ["SiglipModel"],
    "model_type": "siglip",
    "text_config": {"hidden_size": 8},
    "vision_config": {
        "hidden_size": 8, "image_size": 48, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 1,
    },
}  # fmt: skip
ADAPTER = {
    "peft_type": "LORA", "r": 3, "lora_alpha": 6, "lora_dropout": 0.05, "bias": "none", "fan_in_fan_out": False,
    "base_model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct", "modules_to_save": ["connector"],
    "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "use_dora": False, "layer_replication": None,
}  # fmt: skip


def linear(name, out, width, bias=True):
    return {f"{name}.weight": (out, width)} | ({f"{name}.bias": (out,)} if bias else {})


def layer_norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def decoder_shapes(config, prefix="model.", qkv_bias=False, qk_norm=False, head_dim=4):
    """The keys of a Llama-like decoder, written out by hand."""
    c, shapes = config, {f"{prefix}embed_tokens.weight": (config["vocab_size"], config["hidden_size"])}
    width, hidden = c["hidden_size"], c["intermediate_size"]
    for i in range(c["num_hidden_layers"]):
        layer = f"{prefix}layers.{i}."
        for name, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"), ("v", "num_key_value_heads")):
            shapes |= linear(f"{layer}self_attn.{name}_proj", c[heads] * head_dim, width, qkv_bias)
        shapes |= linear(f"{layer}self_attn.o_proj", width, c["num_attention_heads"] * head_dim, False)
        if qk_norm:
            shapes |= {f"{layer}self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
        shapes |= {f"{layer}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        for name in ("gate", "up"):
            shapes |= linear(f"{layer}mlp.{name}_proj", hidden, width, False)
        shapes |= linear(f"{layer}mlp.down_proj", width, hidden, False)
    return shapes | {f"{prefix}norm.weight": (width,)}


def qwen_shapes(config, text="model.", visual="visual."):
    v, qwen3 = config["vision_config"], config is QWEN3 or config["model_type"] == "qwen3_vl"
    inner = config.get("text_config", config)
    shapes = decoder_shapes(inner, text, not qwen3, qwen3, 128 if qwen3 else 4)
    width, hidden, patch, out = v["hidden_size"], v["intermediate_size"], v["patch_size"], v["out_hidden_size"]
    shapes[f"{visual}patch_embed.proj.weight"] = (width, 3, 2, patch, patch)
    for i in range(v["depth"]):
        block = f"{visual}blocks.{i}."
        shapes |= linear(f"{block}attn.qkv", 3 * width, width) | linear(f"{block}attn.proj", width, width)
        if qwen3:
            shapes |= layer_norm(f"{block}norm1", width) | layer_norm(f"{block}norm2", width)
            shapes |= linear(f"{block}mlp.linear_fc1", hidden, width) | linear(f"{block}mlp.linear_fc2", width, hidden)
        else:
            shapes |= {f"{block}norm1.weight": (width,), f"{block}norm2.weight": (width,)}
            shapes |= linear(f"{block}mlp.gate_proj", hidden, width) | linear(f"{block}mlp.up_proj", hidden, width)
            shapes |= linear(f"{block}mlp.down_proj", width, hidden)
    if not qwen3:
        shapes |= {f"{visual}merger.ln_q.weight": (width,), "lm_head.weight": (inner["vocab_size"], 16)}
        return (
            shapes
            | linear(f"{visual}merger.mlp.0", 4 * width, 4 * width)
            | linear(f"{visual}merger.mlp.2", out, 4 * width)
        )
    shapes |= {f"{visual}patch_embed.proj.bias": (width,)}
    shapes |= {f"{visual}pos_embed.weight": (v["num_position_embeddings"], width)}
    for merger, norm in (("merger", width), ("deepstack_merger_list.0", 4 * width)):
        shapes |= layer_norm(f"{visual}{merger}.norm", norm) | linear(f"{visual}{merger}.linear_fc1", 32, 32)
        shapes |= linear(f"{visual}{merger}.linear_fc2", out, 32)
    return shapes


def siglip_shapes(prefix="vision_model."):
    shapes = linear(f"{prefix}head.attention.out_proj", 8, 8) | linear(f"{prefix}head.mlp.fc1", 12, 8)
    shapes |= linear(f"{prefix}head.mlp.fc2", 8, 12) | layer_norm(f"{prefix}head.layernorm", 8)
    shapes |= {f"{prefix}head.attention.in_proj_weight": (24, 8), f"{prefix}head.attention.in_proj_bias": (24,)}
    shapes |= {f"{prefix}head.probe": (1, 1, 8), f"{prefix}embeddings.position_embedding.weight": (9, 8)}
    shapes |= {f"{prefix}embeddings.patch_embedding.weight": (8, 3, 16, 16)}
    shapes |= {f"{prefix}embeddings.patch_embedding.bias": (8,)} | layer_norm(f"{prefix}post_layernorm", 8)
    layer = f"{prefix}encoder.layers.0."
    shapes |= layer_norm(f"{layer}layer_norm1", 8) | layer_norm(f"{layer}layer_norm2", 8)
    for name in ("q", "k", "v", "out"):
        shapes |= linear(f"{layer}self_attn.{name}_proj", 8, 8)
    return shapes | linear(f"{layer}mlp.fc1", 12, 8) | linear(f"{layer}mlp.fc2", 8, 12)


def random_tensors(shapes, dtype=ml_dtypes.bfloat16, seed=0):
    rng = np.random.default_rng(seed)
    return {key: rng.normal(size=shape).astype(dtype) for key, shape in shapes.items()}


def write(folder, config, tensors, name="model"):
    folder.mkdir(exist_ok=True)
    (folder / ("config.json" if name == "model" else "adapter_config.json")).write_text(json.dumps(config))
    safetensors.save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    return folder


def tensors_in(folder):
    """Every tensor of every safetensors file of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= safetensors.load_file(path)
    return found


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def checkpoint(request, tmp_path):
    """A family's name, its config and its folder in the layout it was published in."""
    if request.param == "qwen2_5_vl":
        return request.param, QWEN2_5, write(tmp_path / "hf", QWEN2_5, random_tensors(qwen_shapes(QWEN2_5)))
    shapes = qwen_shapes(QWEN3, "model.language_model.", "model.visual.")
    return request.param, QWEN3, write(tmp_path / "hf", QWEN3, random_tensors(shapes))


@pytest.fixture
def qwen(tmp_path):
    """The tensors of a Qwen2.5-VL, and a function that writes a folder with changed ones and loads it."""
    tensors = random_tensors(qwen_shapes(QWEN2_5))

    def load(tensors, config=QWEN2_5):
        folder = write(tmp_path / "hf", config, tensors)
        return load_params(folder, read_config(folder), jnp.bfloat16)

    return tensors, load


def fails(match):
    return pytest.raises(CheckpointError, match=match)


# ------------------------------------------------------------------------------------------------------------- configs


def test_a_published_config_gives_the_shapes_of_the_model(shared_data, tmp_path):
    source = shared_data / "tokenizers" / "qwen2_5_vl" / "config_7b.json"
    (tmp_path / "config.json").write_text(source.read_text())
    config = read_config(tmp_path)
    assert config.decoder == DecoderConfig(
        vocab_size=152064, width=3584, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128, mlp_dim=18944,
        rope_theta=1e6, norm_eps=1e-6, qkv_bias=True, mrope_section=(16, 24, 24),
    )  # fmt: skip
    assert config.vision == QwenVisionConfig(out_width=3584)  # else the defaults, which are Streamo's
    assert config.vision.tokens_per_frame == 120


def test_qwen3_has_its_own_positions_normalisation_and_deep_features(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    config = read_config(tmp_path)
    d, v = config.decoder, config.vision
    assert (d.head_dim, d.mrope_section, d.mrope_interleaved, d.rope_theta) == (128, (24, 20, 20), True, 5e6)
    assert d.qk_norm and not d.qkv_bias and d.tie_embeddings and d.deep_layers == 1
    assert v.tower == "qwen3" and v.deep_layers == (0,) and v.num_positions == 9 and v.window_size == 0
    assert v.image_mean == v.image_std == (0.5, 0.5, 0.5) and v.full_attention_layers == ()


def test_the_layout_of_transformers_5_gives_the_same_config(tmp_path):
    top = ("architectures", "model_type", "vision_config", "tie_word_embeddings")
    text = {key: value for key, value in QWEN2_5.items() if key not in (*top, "rope_scaling", "rope_theta")}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [0, 1, 1]}
    text["layer_types"] = ["full_attention"] * 2
    configs = []
    for i, record in enumerate((QWEN2_5, {key: QWEN2_5[key] for key in top} | {"text_config": text})):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "config.json").write_text(json.dumps(record))
        configs.append(read_config(tmp_path / f"{i}"))
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("name", "record", "pixels"),
    [
        ("preprocessor_config.json", {"min_pixels": 3136, "max_pixels": 12845056}, (3136, 12845056)),
        ("preprocessor_config.json", {"size": {"shortest_edge": 65536, "longest_edge": 16777216}}, (65536, 16777216)),
        ("processor_config.json", {"image_processor": {"min_pixels": 784, "max_pixels": 99999}}, (784, 99999)),
        ("preprocessor_config.json", {}, (3136, 100352)),
    ],
)
def test_the_preprocessor_gives_the_budget_and_the_normalisation(tmp_path, name, record, pixels):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_5))
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "patch_size": 14, "merge_size": 2}
    if "image_processor" in record:
        record = {"image_processor": record["image_processor"] | said}
    (tmp_path / name).write_text(json.dumps(said | record))
    vision = read_config(tmp_path).vision
    assert (vision.min_pixels, vision.max_pixels) == pixels
    assert vision.image_mean == (0.1, 0.2, 0.3) and vision.image_std == (0.4, 0.5, 0.6)
    smaller = read_config(tmp_path, max_pixels=50_000).vision
    assert smaller.max_pixels == 50_000 and smaller.min_pixels == min(pixels[0], 50_000)


def changed(record, **values):
    """A deep copy with `a__b` set to a value; None takes a key away."""
    record = json.loads(json.dumps(record))
    for key, value in values.items():
        *path, last = key.split("__")
        place = record
        for name in path:
            place = place[name]
        place[last] = value
    return record


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            changed(QWEN2_5, architectures=["Qwen2VLForConditionalGeneration"]),
            "expected one of Qwen2_5_VL.*found 'Qwen2VL",
        ),
        (changed(QWEN2_5, architectures=None, model_type="qwen3_vl_moe"), "found 'qwen3_vl_moe'"),
        (LLAMA, "found llama, a part of one"),
        (changed(QWEN2_5, hidden_act="gelu"), "hidden_act: expected 'silu', found 'gelu'"),
        (changed(QWEN2_5, vision_config__hidden_act="quick_gelu"), "hidden_act: expected 'silu', found 'quick_gelu'"),
        (changed(QWEN2_5, vision_config__in_chans=1), "in_chans: expected 3, found 1"),
        (changed(QWEN2_5, rope_scaling__type="yarn"), "rope_scaling: expected default or mrope .*yarn.*not supported"),
        (changed(QWEN2_5, rope_scaling=None), "expected mrope_section, found none"),
        (changed(QWEN2_5, rope_scaling__mrope_section=[1, 2, 3]), "expected mrope_section to sum to head_dim / 2"),
        (changed(QWEN2_5, rope_theta=None), "expected rope_theta, found none"),
        (changed(QWEN2_5, use_sliding_window=True), "use_sliding_window: expected False, found True"),
        (changed(QWEN2_5, layer_types=["full_attention", "sliding_attention"]), "expected full_attention"),
        (changed(QWEN2_5, quantization_config={"quant_method": "awq"}), "quantization_config: expected none, found"),
        (changed(QWEN2_5, num_hidden_layers="two"), "decoder.num_layers: expected int, found 'two'"),
        (changed(QWEN2_5, vision_config=None), "vision_config: expected an object, found NoneType"),
        (changed(QWEN2_5, vision_config__out_hidden_size=8), "expected vision.out_width to be the decoder's width 16"),
        (changed(QWEN3, text_config__attention_bias=True), "attention_bias: expected False, found True"),
        (changed(QWEN3, text_config__rope_scaling__mrope_interleaved=False), "mrope_interleaved: expected True"),
        (changed(QWEN3, vision_config__deepstack_visual_indexes=None), "expected deepstack_visual_indexes, found none"),
        ([], "expected a JSON object, found list"),
    ],
)
def test_a_config_that_is_not_computed_is_an_error_of_one_line(tmp_path, record, message):
    (tmp_path / "config.json").write_text(json.dumps(record))
    with fails(message) as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_a_preprocessor_of_another_model_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_5))
    (tmp_path / "preprocessor_config.json").write_text('{"patch_size": 16}')
    with fails("patch_size: expected 14, found 16"):
        read_config(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"rescale_factor": 1}')
    with fails("rescale_factor: expected 0.00392157, found 1"):
        read_config(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with fails("preprocessor_config.json: expected JSON, found"):
        read_config(tmp_path)


# ------------------------------------------------------------------------------------------------------------- loading


def test_both_published_layouts_give_the_same_params(checkpoint, tmp_path):
    _, record, folder = checkpoint
    config = read_config(folder)
    params = load_params(folder, config, jnp.bfloat16)
    layouts = ("model.", "visual."), ("model.language_model.", "model.visual.")
    tensors = tensors_in(folder)
    shapes = [qwen_shapes(record, *layout) for layout in layouts]
    there = next(keys for keys in shapes if set(keys) == set(tensors))
    other = next(keys for keys in shapes if set(keys) != set(tensors))
    renamed = {new: tensors[old] for old, new in zip(there, other, strict=True)}
    again = write(tmp_path / "other", record, renamed)
    assert read_config(again) == config
    same(load_params(again, config, jnp.bfloat16), params)
    images = np.zeros((1, *config.vision.frame_size, 3), np.uint8)
    assert jax.eval_shape(lambda p: run(config, p, images, method="embed_frames"), params).shape[0] == 1


def test_linear_kernels_are_transposed_and_patches_flattened_in_order(qwen):
    tensors, load = qwen
    params = load(tensors)
    np.testing.assert_array_equal(
        params["decoder"]["layers_1"]["mlp"]["up_proj"]["kernel"], tensors["model.layers.1.mlp.up_proj.weight"].T
    )
    patches = tensors["visual.patch_embed.proj.weight"]  # out, channel, time, row, column
    kernel = params["vision"]["patch_embed_kernel"].reshape(3, 2, 14, 14, 8)
    assert kernel[2, 1, 5, 7, 3] == patches[3, 2, 1, 5, 7]
    np.testing.assert_array_equal(params["decoder"]["norm"]["scale"], tensors["model.norm.weight"])


def test_shards_are_read_like_one_file_and_in_the_dtype_asked_for(checkpoint, tmp_path):
    _, record, folder = checkpoint
    config, tensors = read_config(folder), tensors_in(folder)
    expected = load_params(folder, config, jnp.float32)
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "config.json").write_text(json.dumps(record))
    names = [f"model-0000{1 + i % 3}-of-00003.safetensors" for i in range(len(tensors))]
    for name in set(names):
        safetensors.save_file({key: tensors[key] for key, at in zip(tensors, names) if at == name}, shards / name)
    index = {"metadata": {"total_size": 1}, "weight_map": dict(zip(tensors, names))}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    got = load_params(shards, config, jnp.float32)
    same(got, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}


def test_params_lie_where_the_shardings_say(checkpoint):
    _, _, folder = checkpoint
    config = read_config(folder)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    first = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = load_params(folder, config, jnp.bfloat16, everywhere)
    assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {everywhere}
    tree = jax.tree.map(lambda leaf: first if leaf.ndim == 2 else everywhere, params)
    placed = load_params(folder, config, jnp.bfloat16, tree)
    assert jax.tree.map(lambda leaf: leaf.sharding, placed) == tree
    same(placed, params)


def test_loading_streams(tmp_path):
    """Beside the params on the device the host holds at most three times the largest tensor, as numpy counts."""
    record = changed(QWEN2_5, vocab_size=200_000)
    tensors = random_tensors(qwen_shapes(record), np.float32)
    folder = write(tmp_path / "hf", record, tensors)
    config, largest = read_config(folder), max(tensor.nbytes for tensor in tensors.values())
    del tensors
    load_params(folder, config, jnp.bfloat16)  # what is imported and cached is not counted
    tracemalloc.start()
    load_params(folder, config, jnp.bfloat16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest == 200_000 * 16 * 4 and peak < 3 * largest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {"model.layers.0.self_attn.o_proj.bias": t["model.norm.weight"]},
            "1 unexpected: model.layers.0.self_attn.o_proj.bias",
        ),
        (
            lambda t: t | {f"extra.{i}": t["model.norm.weight"] for i in range(5)},
            "5 unexpected: extra.0, extra.1, extra.2 and 2 more",
        ),
        (lambda t: {k: v for k, v in t.items() if "layers.1.mlp" not in k}, "3 missing: model.layers.1.mlp.*"),
        (lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"}, "1 missing: lm_head.weight"),
        (
            lambda t: t | {"model.visual.merger.ln_q.weight": t["visual.merger.ln_q.weight"]},
            "1 twice there: .*merger.ln_q",
        ),
        (
            lambda t: t | {"model.norm.weight": t["model.norm.weight"][:7].copy()},
            r"model.norm.weight should be \[16\], is BF16 \[7\]",
        ),
        (lambda t: t | {"model.norm.weight": np.zeros(16, np.int8)}, r"should be \[16\], is I8 \[16\]"),
        (
            lambda t: t | {"model.embed_tokens.weight": np.zeros((41, 16), np.float32)},
            "vocab_size is 40, the embedding has 41 rows",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_counted_and_named(qwen, change, message):
    tensors, load = qwen
    with fails(message) as error:
        load(change(tensors))
    assert "\n" not in str(error.value)


def test_a_tied_head_may_be_absent_or_equal_and_nothing_else(qwen):
    tensors, load = qwen
    tied = changed(QWEN2_5, tie_word_embeddings=True)
    with fails("lm_head.weight should equal the embedding.*set tie_word_embeddings to false"):
        load(tensors, tied)
    equal = load(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, tied)
    absent = load({key: value for key, value in tensors.items() if key != "lm_head.weight"}, tied)
    assert "lm_head" not in equal["decoder"]
    same(equal, absent)


# ------------------------------------------------------------------------------------------------------- damaged files


def test_damaged_and_missing_files_are_named(checkpoint, tmp_path):
    _, _, folder = checkpoint
    config, path = read_config(folder), folder / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", struct.pack("<Q", 1 << 60) + whole[8:], whole[:8] + b"x" * 90):
        path.write_bytes(damaged)
        with fails(r"model.safetensors: truncated or damaged, download it again"):
            load_params(folder, config)
    path.unlink()
    with fails("expected model.safetensors or its index, found none"):
        load_params(folder, config)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with fails("found pytorch_model.bin; convert them to safetensors"):
        load_params(folder, config)
    with fails("config.json: expected a JSON file"):
        read_config(tmp_path / "nowhere")


def test_an_index_must_stay_inside_its_folder_and_be_complete(checkpoint, tmp_path):
    _, _, folder = checkpoint
    config, index = read_config(folder), folder / "model.safetensors.index.json"
    whole = folder / "model.safetensors"
    moved = whole.rename(folder / "a.safetensors")
    for outside in ("../hf/a.safetensors", "/etc/passwd", "..", str(moved), 3, "a.bin"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": outside}}))
        with fails("expected safetensors files of this folder, found"):
            load_params(folder, config)
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with fails("b.safetensors: the index names this shard and it is missing"):
        load_params(folder, config)
    (folder / "b.safetensors").write_bytes(moved.read_bytes())
    with fails("is in two shards, the second is b.safetensors"):
        load_params(folder, config)
    index.write_text(json.dumps({"metadata": {}}))
    with fails("expected a weight_map"):
        load_params(folder, config)


# ------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("shard", [5 << 30, 4000])
def test_there_and_back_is_the_same_bit_for_bit(checkpoint, tmp_path, shard):
    family, record, folder = checkpoint
    config = read_config(folder)
    params = load_params(folder, config, jnp.bfloat16)
    save_hf(tmp_path / "again", family, config, params, record, max_shard_bytes=shard)
    before, after = tensors_in(folder), tensors_in(tmp_path / "again")
    assert set(before) == set(after)
    for key in before:
        assert before[key].dtype == after[key].dtype and before[key].shape == after[key].shape
        assert before[key].tobytes() == after[key].tobytes()
    files = sorted(path.name for path in (tmp_path / "again").glob("*.safetensors"))
    if shard == 4000:
        assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 3
        index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(before) and set(index["weight_map"].values()) == set(files)
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.values())
    else:
        assert files == ["model.safetensors"]
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == record
    same(load_params(tmp_path / "again", config, jnp.bfloat16), params)


def test_params_of_two_dtypes_lie_aligned(checkpoint, tmp_path):
    family, record, folder = checkpoint
    config = read_config(folder)
    params = load_params(folder, config, jnp.bfloat16)
    params["decoder"]["norm"]["scale"] = params["decoder"]["norm"]["scale"].astype(jnp.float32)
    save_hf(tmp_path / "again", family, config, params, record)
    same(load_params(tmp_path / "again", config, jnp.bfloat16), load_params(folder, config, jnp.bfloat16))
    raw = (tmp_path / "again" / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    assert next(iter(header.values()))["dtype"] == "F32"


def test_a_folder_is_written_whole_or_not_at_all(checkpoint, tmp_path, monkeypatch):
    family, record, folder = checkpoint
    config = read_config(folder)
    params = load_params(folder, config, jnp.bfloat16)
    with fails("expected a new folder, found one"):
        save_hf(folder, family, config, params, record)
    with fails("hf_config: expected"):
        save_hf(tmp_path / "again", "llama", config, params, record)
    larger = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, vocab_size=41))
    with fails("where tokens were added set its vocab_size"):
        save_hf(tmp_path / "again", family, larger, params, record)
    with fails("params: expected those of the config.*decoder/norm/scale"):
        odd = {**params, "decoder": {**params["decoder"], "norm": {"scale": jnp.ones(3)}}}
        save_hf(tmp_path / "again", family, config, odd, record)

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(hf, "_write_safetensors", full)
    with pytest.raises(OSError, match="no space left"):
        save_hf(tmp_path / "again", family, config, params, record)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


# ----------------------------------------------------------------------------------------------------- VideoLLM-online

LORA_MODULES = [f"model.layers.{i}.{m}_proj" for i in range(2) for m in (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down",
)] + ["lm_head"]  # fmt: skip


def live_parts():
    """The tensors of the three parts: Llama, SigLIP with its text tower, and the adapter."""
    llama_shapes = decoder_shapes(LLAMA) | {"lm_head.weight": (40, 16)}
    adapter_shapes = linear("base_model.model.connector.0", 16, 8) | linear("base_model.model.connector.2", 16, 16)
    for module in LORA_MODULES:
        out, width = llama_shapes[f"{module}.weight"]
        adapter_shapes |= {f"base_model.model.{module}.lora_A.weight": (3, width)}
        adapter_shapes |= {f"base_model.model.{module}.lora_B.weight": (out, 3)}
    text = {"text_model.embeddings.token_embedding.weight": (4, 8), "logit_scale": (1,), "logit_bias": (1,)}
    return [
        random_tensors(llama_shapes, seed=0),
        random_tensors(siglip_shapes() | text, np.float32, seed=1),
        random_tensors(adapter_shapes, np.float32, seed=2),
    ]


@pytest.fixture
def live(tmp_path):
    """The tensors of the three parts, and a function that writes and loads them with some of them changed."""
    parts = live_parts()

    def load(llama=None, siglip=None, adapter=None, configs=(LLAMA, SIGLIP, ADAPTER), **options):
        given = [given or part for given, part in zip((llama, siglip, adapter), parts, strict=True)]
        folders = [
            write(tmp_path / f"part{i}", config, tensors, "adapter_model" if i == 2 else "model")
            for i, (config, tensors) in enumerate(zip(configs, given, strict=True))
        ]
        return load_videollm_online(*folders, **{"dtype": jnp.float32} | options)

    return *parts, load


def test_updates_are_merged_and_the_connector_is_the_projector(live):
    llama, siglip, adapter, load = live
    config, params = load()
    assert config.vision.tokens_per_frame == 10 and config.vision.patch_size == 16 and config.vision.stem_width == 0
    assert config.decoder.rope_theta == 5e5 and config.decoder.head_dim == 4 and not config.decoder.mrope_section
    for module, leaf in (
        ("model.layers.1.self_attn.k_proj", params["decoder"]["layers_1"]["self_attn"]["k_proj"]["kernel"]),
        ("lm_head", params["decoder"]["lm_head"]["kernel"]),
    ):
        a, b = (adapter[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
        expected = llama[f"{module}.weight"].astype(np.float32) + 2.0 * b @ a
        np.testing.assert_allclose(leaf, expected.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        params["projector"]["mlp"]["fc2"]["kernel"], adapter["base_model.model.connector.2.weight"].T
    )
    np.testing.assert_array_equal(
        params["decoder"]["embed_tokens"]["embedding"], llama["model.embed_tokens.weight"].astype(np.float32)
    )
    fused = siglip["vision_model.head.attention.in_proj_weight"]
    attention = params["vision"]["head"]["attention"]
    for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
        np.testing.assert_array_equal(attention[name]["kernel"], fused[8 * i : 8 * i + 8].T)
        bias = siglip["vision_model.head.attention.in_proj_bias"]
        np.testing.assert_array_equal(attention[name]["bias"], bias[8 * i : 8 * i + 8])
    patches = siglip["vision_model.embeddings.patch_embedding.weight"]  # out, channel, row, column
    kernel = params["vision"]["patch_embedding"]["kernel"].reshape(16, 16, 3, 8)
    assert kernel[5, 7, 2, 3] == patches[3, 2, 5, 7]


def test_the_tower_of_a_run_is_read_without_the_rest(live, tmp_path):
    *_, load = live
    config, params = load()
    parts = WeightsConfig(llm=str(tmp_path / "not there"), vision=str(tmp_path / "part1"))
    run = TrainConfig(dataclasses.replace(config, decoder=DecoderConfig()), live_language.PUBLISHED, weights=parts)
    jax.tree.map(np.testing.assert_array_equal, starting_tower(run), params["vision"])
    other = dataclasses.replace(run.model, vision=dataclasses.replace(config.vision, num_layers=3))
    with pytest.raises(ConfigError, match="model.vision.num_layers: expected that of the weights, 1, found 3"):
        starting_tower(dataclasses.replace(run, model=other))


def test_the_parts_can_be_written_back(live, tmp_path):
    llama, siglip, _, load = live
    config, params = load()
    save_hf(tmp_path / "siglip", "siglip", config, params, SIGLIP)
    for key, tensor in tensors_in(tmp_path / "siglip").items():
        np.testing.assert_array_equal(tensor, siglip[key])
    save_hf(tmp_path / "llama", "llama", config, params, LLAMA)
    assert set(tensors_in(tmp_path / "llama")) == set(llama)


def test_one_token_a_frame_and_a_tower_saved_by_itself(live):
    _, siglip, _, load = live
    bare = {key.removeprefix("vision_model."): value for key, value in siglip.items() if key.startswith("vision_")}
    alone = SIGLIP["vision_config"] | {"architectures": ["SiglipVisionModel"]}
    config, params = load(siglip=bare, configs=(LLAMA, alone, ADAPTER), grid=0)
    assert config.vision.tokens_per_frame == 1
    same(params, load()[1])
    frames = run(config, params, np.zeros((2, 48, 48, 3), np.uint8), method="embed_frames")
    assert frames.shape == (2, 1, 16)


def test_a_head_that_the_adapter_saved_takes_the_place_of_the_base_s(live):
    llama, _, adapter, load = live
    head = np.ones((40, 16), np.float32)
    _, params = load(adapter=adapter | {"base_model.model.lm_head.base_layer.weight": head})
    a, b = (adapter[f"base_model.model.lm_head.lora_{half}.weight"] for half in "AB")
    np.testing.assert_allclose(params["decoder"]["lm_head"]["kernel"], (1 + 2.0 * b @ a).T, rtol=1e-5, atol=1e-6)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_B.weight"},
            "q_proj.weight: expected lora_A and lora_B, found lora_A",
        ),
        (
            lambda t: t | {f"{Q}.lora_A.weight": np.zeros((3, 32), np.float32)},
            r"expected lora_A \[3, 16\] for this base, found \[3, 32\]; the adapter was trained on meta-llama",
        ),
        (lambda t: t | {f"{Q}.lora_A.weight": np.zeros((4, 16), np.float32)}, r"expected lora_A \[3, 16\]"),
        (
            lambda t: t | {f"{Q.replace('layers.0', 'layers.9')}.lora_A.weight": t[f"{Q}.lora_A.weight"]},
            "expected updates of the base's linear layers, found model.layers.9",
        ),
        (
            lambda t: t | {f"{Q}.lora_magnitude_vector": np.ones(16, np.float32)},
            "1 unexpected: model.layers.0.self_attn.q_proj.lora_magnitude",
        ),
        (
            lambda t: {k: v for k, v in t.items() if "connector.2" not in k},
            "2 missing: connector.2.weight, connector.2.bias",
        ),
        (
            lambda t: t | {"base_model.model.connector.modules_to_save.0.bias": np.ones(16, np.float32)},
            "are the same tensor",
        ),
        (
            lambda t: t | {"base_model.model.connector.0.weight": np.ones((16, 9), np.float32)},
            r"connector.0.weight should be \[16, 8\]",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_an_error_of_one_line(live, change, message):
    *_, adapter, load = live
    with fails(message) as error:
        load(adapter=change(adapter))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_rslora": True}, "use_rslora = True: not supported"),
        ({"use_dora": True}, "use_dora = True"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"r": None}, "expected r ≥ 1 and lora_alpha, found None and 6"),
        ({"lora_alpha": None}, "expected r ≥ 1 and lora_alpha, found 3 and None"),
        ({"peft_type": "IA3"}, "peft_type: expected LORA, found 'IA3'"),
    ],
)
def test_an_adapter_of_another_kind_is_an_error(live, values, message):
    with fails(message):
        live[-1](configs=(LLAMA, SIGLIP, ADAPTER | values))


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        (
            (changed(LLAMA, rope_scaling={"rope_type": "llama3", "factor": 8.0}), SIGLIP, ADAPTER),
            "rope_scaling: expected default.*llama3.*not supported",
        ),
        ((changed(LLAMA, mlp_bias=True), SIGLIP, ADAPTER), "mlp_bias: expected False, found True"),
        (
            (LLAMA, changed(SIGLIP, vision_config__hidden_act="gelu"), ADAPTER),
            "hidden_act: expected 'gelu_pytorch_tanh'",
        ),
        ((LLAMA, LLAMA, ADAPTER), "expected a siglip model, found llama"),
        ((SIGLIP, SIGLIP, ADAPTER), "expected a llama model, found siglip"),
    ],
)
def test_parts_of_another_kind_are_an_error(live, configs, message):
    with fails(message):
        live[-1](configs=configs)


def test_without_an_adapter_the_base_has_no_connector(live, tmp_path):
    llama, _, _, load = live
    load()
    config, params = load_videollm_online(tmp_path / "part0", tmp_path / "part1", None, jnp.float32)
    assert params.keys() == {"vision", "decoder"}
    head = params["decoder"]["lm_head"]["kernel"]
    np.testing.assert_array_equal(head, llama["lm_head.weight"].astype(np.float32).T)


def test_an_adapter_that_was_trained_is_written_as_it_opens(live, tmp_path):
    """In PEFT's format: opened beside its base it is what was trained, merged."""
    load = live[3]
    load()
    folders = tmp_path / "part0", tmp_path / "part1"
    config, base = load_videollm_online(*folders, None, jnp.float32)
    lora = LoraConfig(rank=3, alpha=12.0, dropout=0.0)
    abstract = flat(abstract_params(config))
    rng = np.random.default_rng(4)
    normal = lambda shape: jnp.asarray(rng.normal(0, 0.1, shape), jnp.float32)
    shapes = init_adapters(abstract, lora, jax.random.key(0))
    trained = {path: normal(x.shape) for path, x in shapes.items()}
    trained |= {path: normal(x.shape) for path, x in abstract.items() if path.startswith("projector/")}
    write_adapter(tmp_path / "adapter", config, trained, lora, "meta-llama/Meta-Llama-3-8B-Instruct")
    write_adapter(tmp_path / "adapter", config, trained, lora, "meta-llama/Meta-Llama-3-8B-Instruct")  # over the first
    record = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert record["modules_to_save"] == ["connector"] and record["r"] == 3
    keys = tensors_in(tmp_path / "adapter")
    assert keys.keys() == live_parts()[2].keys()
    _, opened = load_videollm_online(*folders, tmp_path / "adapter", jnp.float32)
    want = merge(flat(base), trained, lora) | {p: x for p, x in trained.items() if p.startswith("projector/")}
    found = flat(opened)
    assert found.keys() == want.keys()
    for path, x in want.items():
        np.testing.assert_allclose(found[path], x, rtol=1e-5, atol=1e-6, err_msg=path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "part0", "part1", "part2"]


# -------------------------------------------------------------------------------------------------------- added tokens


@pytest.mark.parametrize("tied", [False, True])
def test_an_added_token_starts_as_the_mean_of_what_spells_it(tied):
    rng = np.random.default_rng(0)
    table, head = jnp.asarray(rng.normal(size=(6, 4))), jnp.asarray(rng.normal(size=(4, 6)))
    params = {"decoder": {"embed_tokens": {"embedding": table}, "norm": {"scale": jnp.ones(4)}}, "vision": {}}
    if not tied:
        params["decoder"]["lm_head"] = {"kernel": head}
    grown = grow_embedding(params, {5: [1, 2], 6: [0], 7: [3, 4, 5]})
    expected = np.concatenate([table[:5], np.stack([table[1:3].mean(0), table[0], table[3:6].mean(0)])])
    np.testing.assert_allclose(grown["decoder"]["embed_tokens"]["embedding"], expected, rtol=1e-6)
    assert ("lm_head" in grown["decoder"]) != tied
    if not tied:
        expected = np.concatenate(
            [head[:, :5], np.stack([head[:, 1:3].mean(1), head[:, 0], head[:, 3:6].mean(1)], 1)], 1
        )
        np.testing.assert_allclose(grown["decoder"]["lm_head"]["kernel"], expected, rtol=1e-6)
    assert params["decoder"]["embed_tokens"]["embedding"] is table  # those given stay as they are
    assert grow_embedding(params, {})["decoder"]["embed_tokens"]["embedding"] is table


@pytest.mark.parametrize("rows", [{7: [0]}, {6: []}, {6: [6]}, {-1: [0]}, {3: [-1]}])
def test_added_tokens_need_a_spelling_and_leave_no_gap(rows):
    params = {"decoder": {"embed_tokens": {"embedding": jnp.ones((6, 4))}}}
    with pytest.raises(ValueError, match="new_rows: expected ids up to 5, or from 6 on without a gap"):
        grow_embedding(params, rows)


# ------------------------------------------------------------------------------------------------------------- the hub


def test_a_folder_is_used_as_it_is(tmp_path):
    assert resolve(tmp_path) == tmp_path and resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("source", ["nowhere", "./nowhere/x", "/nowhere/x", "a/b/c", "a/"])
def test_what_is_no_folder_and_no_hub_id_is_an_error(source):
    with fails("expected a folder or a hub id like org/name, found nothing"):
        resolve(source)


def test_a_hub_id_needs_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with fails(r"pip install 'jstream\[hub\]', or download its files elsewhere and pass their folder"):
        resolve("org/name")


def test_a_hub_id_is_fetched_without_code_or_pickles(monkeypatch, tmp_path):
    asked = {}

    class Hub:
        @staticmethod
        def snapshot_download(repo_id, **options):
            asked.update(options, repo_id=repo_id)
            if repo_id == "org/unknown":
                raise RuntimeError("404 Client Error.\nRepository Not Found")
            return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert resolve("org/name") == tmp_path and asked["repo_id"] == "org/name"
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["allow_patterns"])
    with fails("found: 404 Client Error; check the id, the network and the login, or download") as error:
        resolve("org/unknown")
    assert "\n" not in str(error.value)
