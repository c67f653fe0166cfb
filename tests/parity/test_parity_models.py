"""Random models of transformers, saved by it and loaded through our tables, compute the same: features of frames,
hidden states of every layer, logits, positions, replies."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from jstream.config import LoraConfig
from jstream.models import rope
from jstream.models.cache import View, empty_cache
from jstream.models.decoder import DecoderLayer
from jstream.models.video_lm import VideoLM, run
from jstream.training.lora import init_adapters
from jstream.weights import hf
from jstream.weights.hf import load_params, read_config, save_hf
from jstream.weights.peft import write_adapter
from jstream.weights.videollm_online import load_videollm_online

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

VOCABULARY, IMAGE, START, END = 200, 190, 192, 193
GRIDS = ((5, 6), (8, 4), (3, 3))  # cells of the images of the conversation: windows of four are cut off at the edges
REPLY = 64  # tokens
CLOSE = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


def loud(model):
    """Random weights in which everything matters, biases and norms too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                quiet = 0.2 if "lora_B" in name else 1.0
                parameter.copy_(quiet * torch.randn_like(parameter) * math.prod(parameter.shape[1:]) ** -0.5)
            else:
                parameter.copy_(0.3 * torch.randn_like(parameter) + ("norm" in name and name.endswith("weight")))
    return model.eval()


def qwen(kind, tied):
    """A Qwen model, small, with every feature of the large ones."""
    ids = dict(image_token_id=IMAGE, video_token_id=191, vision_start_token_id=START, vision_end_token_id=END)
    text = dict(
        hidden_size=64, num_hidden_layers=4, num_key_value_heads=2, intermediate_size=80, vocab_size=VOCABULARY,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    vision = dict(depth=4, hidden_size=32, num_heads=2, intermediate_size=40, out_hidden_size=64)
    ids["tie_word_embeddings"] = tied
    if kind == "qwen2_5":
        config = transformers.Qwen2_5_VLConfig(
            vision_config=vision | dict(fullatt_block_indexes=[1, 3]),
            text_config=text
            | dict(
                num_attention_heads=4,
                rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3]),
            ),
            **ids,
        )
        return loud(transformers.Qwen2_5_VLForConditionalGeneration(config))
    config = transformers.Qwen3VLConfig(
        vision_config=vision | dict(num_position_embeddings=36, deepstack_visual_indexes=[0, 2]),
        text_config=text
        | dict(
            num_attention_heads=6,
            head_dim=16,
            rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[4, 2, 2], mrope_interleaved=True),
        ),
        **ids,
    )
    return loud(transformers.Qwen3VLForConditionalGeneration(config))


@dataclasses.dataclass
class Conversation:
    """Several turns, each with text and an image of its own size."""

    tokens: np.ndarray  # [T]
    stretches: list[tuple[int, tuple[int, int] | None]]  # how many tokens, and of which grid where they are a frame's
    images: list[np.ndarray]  # uint8 [H, W, 3]

    @property
    def is_frame(self):
        return self.tokens == IMAGE


def conversation(cell, seed=0, grids=GRIDS):
    rng = np.random.default_rng(seed)
    tokens, stretches, images = [], [], []
    for rows, columns in grids:
        text = [*rng.integers(0, IMAGE, rng.integers(3, 9)), START]
        tokens += [*text, *[IMAGE] * (rows * columns), END, *rng.integers(0, IMAGE, 4)]
        stretches += [(len(text), None), (rows * columns, (rows, columns)), (5, None)]
        images.append(rng.integers(0, 256, (rows * cell, columns * cell, 3), np.uint8))
    return Conversation(np.array(tokens, np.int32), stretches, images)


def torch_inputs(talk, vision):
    """What a processor of transformers would give: normalised patches, cell by cell, each image twice in time."""
    mean, std = (np.array(values, np.float32) for values in (vision.image_mean, vision.image_std))
    patches = []
    for image in talk.images:
        x = (image / np.float32(255) - mean) / std
        p = vision.patch_size
        x = rearrange(x, "(r a p) (s b q) c -> (r s a b) c (p q)", a=2, b=2, p=p, q=p)
        patches.append(np.repeat(x[:, :, None], 2, axis=2).reshape(len(x), -1))
    grids = [[1, grid[0] * 2, grid[1] * 2] for _, grid in talk.stretches if grid]
    return dict(
        input_ids=torch.tensor(talk.tokens[None].astype(np.int64)),
        mm_token_type_ids=torch.tensor(talk.is_frame[None].astype(np.int32)),
        pixel_values=torch.tensor(np.concatenate(patches).astype(np.float32)),
        image_grid_thw=torch.tensor(grids),
    )


def positions_of(talk):
    """int32 [3, T] stretch by stretch, as a live stream goes on, and the position that comes next."""
    parts, place = [], 0
    for length, grid in talk.stretches:
        part, place = rope.rope_positions(np.full(length, grid is not None), grid or (1, 1), True, place)
        parts.append(part)
    return np.concatenate(parts, axis=1), int(place)


def decoder_forward(config, params, embeds, rope_positions):
    """Hidden states of every decoder layer, and the logits."""
    model = VideoLM(config)
    positions = np.arange(embeds.shape[1], dtype=np.int32)[None]

    def whole(model, embeds, positions, rope_positions):
        return model.logits(model.hidden(embeds, positions, rope_positions)[0])

    logits, state = model.apply(
        {"params": params}, embeds, positions, rope_positions[:, None], method=whole,
        capture_intermediates=lambda module, name: isinstance(module, DecoderLayer) and name == "__call__",
    )  # fmt: skip
    layers = state["intermediates"]["decoder"]
    return [layers[f"layers_{i}"]["__call__"][0][0] for i in range(config.decoder.num_layers)], logits


def torch_layers(layers, forward):
    """Outputs of the layers while `forward` runs, and what it returns."""
    outputs = []
    hooks = [layer.register_forward_hook(lambda m, i, out: outputs.append(out)) for layer in layers]
    with torch.no_grad():
        result = forward()
    for hook in hooks:
        hook.remove()
    return [np.asarray(out[0] if isinstance(out, tuple) else out) for out in outputs], result


@pytest.fixture(
    params=[("qwen2_5", False), ("qwen2_5", True), ("qwen3", False), ("qwen3", True)], scope="module", ids=str
)
def pair(request, tmp_path_factory):
    """A model of transformers, and ours with its weights: untied and tied."""
    kind, tied = request.param
    folder = tmp_path_factory.mktemp(kind)
    torch.manual_seed(0)
    model = qwen(kind, tied)
    model.save_pretrained(folder)
    config = read_config(folder)
    params = load_params(folder, config, jnp.float32)
    assert config.decoder.tie_embeddings == tied and ("lm_head" in params["decoder"]) != tied
    talk = conversation(config.vision.cell)
    frames = []
    for image in talk.images:  # one stream has one size; here every image is a stream's
        vision = dataclasses.replace(config.vision, frame_height=image.shape[0], frame_width=image.shape[1])
        frames.append(run(dataclasses.replace(config, vision=vision), params, image[None], method="embed_frames")[0])
    return model, config, params, talk, jnp.concatenate(frames)


def embeds_of(config, params, talk, frames):
    return run(config, params, talk.tokens[None], talk.is_frame[None], frames[None], method="embed_tokens")


def test_frames_of_several_sizes_have_the_features_of_transformers(pair):
    model, config, _, talk, frames = pair
    inputs = torch_inputs(talk, config.vision)
    with torch.no_grad():
        out = model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"])
    expected = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
    assert frames.shape[1] == 64 * (1 + config.decoder.deep_layers) and np.std(frames) > 0.1
    CLOSE(frames, np.concatenate([np.asarray(x) for x in expected], axis=-1))


def test_positions_are_those_of_transformers(pair):
    model, config, _, talk, _ = pair
    inputs = torch_inputs(talk, config.vision)
    del inputs["pixel_values"]
    expected, delta = model.model.get_rope_index(**inputs)
    got, place = positions_of(talk)
    np.testing.assert_array_equal(got, expected[:, 0])
    assert place == len(talk.tokens) + int(delta)


def test_hidden_states_and_logits_are_those_of_transformers(pair):
    model, config, params, talk, frames = pair
    inputs = torch_inputs(talk, config.vision)
    expected, out = torch_layers(model.model.language_model.layers, lambda: model(**inputs))
    hidden, logits = decoder_forward(config, params, embeds_of(config, params, talk, frames), positions_of(talk)[0])
    assert len(hidden) == len(expected) == 4
    for got, want in zip(hidden, expected, strict=True):
        CLOSE(got, want)
    assert np.std(logits) > 0.3
    CLOSE(logits, out.logits)


def test_greedy_replies_are_those_of_transformers(pair):
    model, config, params, talk, frames = pair
    inputs = torch_inputs(talk, config.vision)
    everything = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        out = model.generate(
            **inputs, attention_mask=everything, do_sample=False, max_new_tokens=REPLY, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip

    @jax.jit
    def step(embeds, positions, rope_positions, cache):
        start = positions[:, 0]
        view = View(start, start, jax.numpy.zeros_like(start))
        hidden, cache = run(config, params, embeds, positions, rope_positions, None, cache, view, method="hidden")
        return run(config, params, hidden[:, -1], method="logits"), cache

    rope_positions, place = positions_of(talk)
    used = len(talk.tokens)
    cache = empty_cache(config.decoder, 1, used + REPLY)
    embeds = embeds_of(config, params, talk, frames)
    logits, cache = step(embeds, np.arange(used, dtype=np.int32)[None], rope_positions[:, None], cache)
    reply, scores = [int(logits[0].argmax())], [logits]
    embed = jax.jit(lambda token: run(config, params, token, method="embed_text"))
    while len(reply) < REPLY:
        here = np.full((3, 1, 1), place + len(reply) - 1, np.int32)
        embeds = embed(np.array([reply[-1:]]))
        logits, cache = step(embeds, np.full((1, 1), used + len(reply) - 1, np.int32), here, cache)
        reply.append(int(logits[0].argmax()))
        scores.append(logits)
    assert reply == out.sequences[0, used:].tolist()
    CLOSE(np.stack(scores), torch.stack(out.logits))


def test_transformers_opens_what_we_write(pair, tmp_path):
    model, config, params, _, _ = pair
    family = "qwen2_5_vl" if config.vision.tower == "qwen2_5" else "qwen3_vl"
    save_hf(tmp_path / "ours", family, config, params, model.config.to_dict(), max_shard_bytes=100_000)
    again, report = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())


# ----------------------------------------------------------------------------------------------------- VideoLLM-online


class LiveLlama(transformers.LlamaForCausalLM):
    """Llama with a connector, which the adapter saves whole."""

    def __init__(self, config):
        super().__init__(config)
        self.connector = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))


def siglip_tokens(tower, images):
    """The pooled token, then 3 × 3 averages of the patches row by row: [N, 10, width]."""
    out = tower((torch.tensor(images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
    side = math.isqrt(out.last_hidden_state.shape[1])
    patches = out.last_hidden_state.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    averages = torch.nn.functional.adaptive_avg_pool2d(patches, 3).flatten(2).transpose(1, 2)
    return torch.cat([out.pooler_output[:, None], averages], dim=1)


@pytest.mark.parametrize("whole_siglip", [False, True])
def test_videollm_online_from_its_parts_is_the_adapted_model(tmp_path, whole_siglip):
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=8
    )
    if whole_siglip:
        text = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
        siglip = loud(transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)))
    else:
        siglip = loud(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision)))
    tower = siglip.vision_model if whole_siglip else siglip
    llama_config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, rms_norm_eps=1e-5, rope_parameters=dict(rope_type="default", rope_theta=5e5),
    )  # fmt: skip
    live = loud(LiveLlama(llama_config))
    base = transformers.LlamaForCausalLM(llama_config)
    base.load_state_dict({key: value for key, value in live.state_dict().items() if "connector" not in key})
    base.save_pretrained(tmp_path / "llama")
    siglip.save_pretrained(tmp_path / "siglip")
    modules = "model.*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)|lm_head$"
    adapted = peft.get_peft_model(
        live,
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules, modules_to_save=["connector"], lora_dropout=0.05),
    )
    adapted = loud(adapted)  # base weights change as well, so they are put back
    with torch.no_grad():
        for key, value in base.state_dict().items():
            module = adapted.base_model.model.get_submodule(key.rpartition(".")[0])
            getattr(module, "base_layer", module).weight.copy_(value)
    adapted.save_pretrained(tmp_path / "adapter")

    config, params = load_videollm_online(
        tmp_path / "llama", tmp_path / "siglip", tmp_path / "adapter", dtype=jnp.float32
    )
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 56, 56, 3), np.uint8)
    is_frame = np.concatenate([np.repeat([False, True], [n, 10]) for n in (7, 1, 5)] + [np.zeros(6, bool)])
    tokens = np.where(is_frame, VOCABULARY, rng.integers(0, VOCABULARY, len(is_frame)))  # <v> is past the table

    with torch.no_grad():
        features = adapted.base_model.model.connector(siglip_tokens(tower, images))
        embeds = live.get_input_embeddings()(torch.tensor(tokens).clamp(max=VOCABULARY - 1))
        embeds[torch.tensor(is_frame)] = features.flatten(0, 1)
        layers = adapted.base_model.model.model.layers
        expected, out = torch_layers(layers, lambda: adapted(inputs_embeds=embeds[None]))
        plain = base(inputs_embeds=embeds[None]).logits

    frames = run(config, params, images, method="embed_frames")
    CLOSE(frames, features)
    ours = run(config, params, tokens[None], is_frame[None], frames.reshape(1, -1, 64), method="embed_tokens")
    CLOSE(ours[0], embeds)
    positions = np.broadcast_to(np.arange(len(tokens), dtype=np.int32), (3, len(tokens)))
    hidden, logits = decoder_forward(config, params, ours, positions)
    for got, want in zip(hidden, expected, strict=True):
        CLOSE(got, want)
    CLOSE(logits, out.logits)
    assert np.abs(np.asarray(out.logits - plain)).max() > 0.5  # the adapter matters

    # and the other way round: an adapter that was trained here opens in PEFT
    lora = LoraConfig(rank=4, alpha=8.0)
    leaves = hf.flat(params)
    normal = lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32)
    trained = {path: normal(x) for path, x in init_adapters(leaves, lora, jax.random.key(0)).items()}
    trained |= {path: normal(x) for path, x in leaves.items() if path.startswith("projector/")}
    write_adapter(tmp_path / "ours", config, trained, lora, "llama")
    fresh = LiveLlama(llama_config)
    fresh.load_state_dict(base.state_dict(), strict=False)
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    _, params = load_videollm_online(tmp_path / "llama", tmp_path / "siglip", tmp_path / "ours", dtype=jnp.float32)
    with torch.no_grad():
        features = theirs.base_model.model.connector(siglip_tokens(tower, images))
        CLOSE(run(config, params, images, method="embed_frames"), features)
        CLOSE(decoder_forward(config, params, ours, positions)[1], theirs(inputs_embeds=embeds[None]).logits)
