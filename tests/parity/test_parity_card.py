"""In bfloat16, as models are served: the logits of transformers on the same device, at a small size and at published
sizes with random weights.

The published sizes need a GPU that both frameworks see, or patience (`JSTREAM_REAL_SIZES=1`): the folder that
transformers writes and both models take three times the bytes of the params.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jstream.models.attention import implementation_for
from jstream.models.video_lm import VideoLM, run
from jstream.weights.hf import load_params, read_config
from tests.parity.test_parity_models import END, IMAGE, START, conversation, positions_of, qwen, torch_inputs
from tests.published_configs import published

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GRIDS = ((8, 15),) * 6  # frames of Streamo's pixel budget, a turn each
DEVICE = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
RELATIVE_ERROR = 2e-2  # of the logits


def real_size(name, size):
    """A model of a published size, with random weights, in bfloat16 on the device."""
    model = published(name, size).model
    vision, decoder = model.vision, model.decoder
    ids = dict(image_token_id=IMAGE, video_token_id=191, vision_start_token_id=START, vision_end_token_id=END)
    ids["tie_word_embeddings"] = decoder.tie_embeddings
    rope = dict(rope_type="default", rope_theta=decoder.rope_theta, mrope_section=list(decoder.mrope_section))
    text = dict(
        hidden_size=decoder.width, num_hidden_layers=decoder.num_layers, num_attention_heads=decoder.num_heads,
        num_key_value_heads=decoder.num_kv_heads, intermediate_size=decoder.mlp_dim, vocab_size=decoder.vocab_size,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    tower = dict(depth=vision.num_layers, hidden_size=vision.width, num_heads=vision.num_heads,
                 intermediate_size=vision.mlp_dim, out_hidden_size=vision.out_width)  # fmt: skip
    with torch.device(DEVICE):
        if vision.tower == "qwen2_5":
            tower |= dict(fullatt_block_indexes=list(vision.full_attention_layers))
            config = transformers.Qwen2_5_VLConfig(
                vision_config=tower, text_config=text | dict(rope_parameters=rope), **ids
            )
            kind = transformers.Qwen2_5_VLForConditionalGeneration
        else:
            tower |= dict(num_position_embeddings=vision.num_positions, deepstack_visual_indexes=[*vision.deep_layers])
            text |= dict(head_dim=decoder.head_dim, rope_parameters=rope | dict(mrope_interleaved=True))
            config = transformers.Qwen3VLConfig(vision_config=tower, text_config=text, **ids)
            kind = transformers.Qwen3VLForConditionalGeneration
        return kind._from_config(config, dtype=torch.bfloat16).eval()


def logits_of(config, params, talk):
    """f32 [T, V] of a whole conversation."""
    backend = implementation_for(jax.default_backend(), config.decoder.head_dim, jnp.bfloat16)
    frames = run(config, params, np.stack(talk.images), method="embed_frames")
    embeds = run(
        config, params, talk.tokens[None], talk.is_frame[None], frames.reshape(1, -1, frames.shape[-1]),
        method="embed_tokens",
    )  # fmt: skip
    positions = np.arange(len(talk.tokens), dtype=np.int32)[None]

    @jax.jit
    def whole(params, embeds, positions, rope_positions):
        forward = lambda model, *args: model.logits(model.hidden(*args)[0])
        return VideoLM(config, attention=backend).apply(
            {"params": params}, embeds, positions, rope_positions, jnp.zeros_like(positions), method=forward
        )

    return np.asarray(whole(params, embeds, positions, positions_of(talk)[0][:, None])[0], np.float32)


ON_A_CARD = [
    pytest.mark.may_skip("the published sizes in bfloat16 need a GPU, or patience"),
    pytest.mark.skipif(DEVICE == "cpu" and not os.environ.get("JSTREAM_REAL_SIZES"), reason="no GPU for both"),
]


@pytest.mark.parametrize(
    ("make", "same_argmax"),
    [
        # weights of these make every rounding matter, and 200 words come close to each other
        pytest.param(lambda: qwen("qwen2_5", True).bfloat16(), 0.95, id="small qwen2_5"),
        pytest.param(lambda: qwen("qwen3", False).bfloat16(), 0.95, id="small qwen3"),
        pytest.param(lambda: real_size("streamo", "3b"), 0.98, id="streamo-3b", marks=ON_A_CARD),
        pytest.param(lambda: real_size("streamo", "7b"), 0.98, id="streamo-7b", marks=ON_A_CARD),
        pytest.param(lambda: real_size("joyai", None), 0.98, id="joyai-8b", marks=ON_A_CARD),
    ],
)
def test_logits_in_bfloat16_are_those_of_transformers(tmp_path, make, same_argmax):
    torch.set_num_threads(os.cpu_count())
    llm = make().to(DEVICE)
    llm.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    talk = conversation(config.vision.cell, grids=GRIDS)
    height, width, _ = talk.images[0].shape
    vision = dataclasses.replace(config.vision, frame_height=height, frame_width=width)
    config = dataclasses.replace(config, vision=vision)
    inputs = {key: x.to(DEVICE) for key, x in torch_inputs(talk, config.vision).items()}
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad():
        expected = llm(**inputs).logits[0].float().cpu().numpy()
    del llm
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    found = logits_of(config, load_params(tmp_path, config, jnp.bfloat16), talk)
    rounding, chosen = np.sqrt(np.mean((found - expected) ** 2)), found.argmax(-1)[:, None]
    behind = expected.max(-1) - np.take_along_axis(expected, chosen, -1)[:, 0]  # what is chosen, behind the best
    assert behind.max() <= 6 * rounding, (behind.max(), rounding)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    same = np.mean(found.argmax(-1) == expected.argmax(-1))
    print(f"{DEVICE}: relative error of the logits {error:.2e}, same argmax {same:.3f} of {len(expected)} positions")
    assert error <= RELATIVE_ERROR and same >= same_argmax
