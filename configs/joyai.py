"""JoyAI-VL-Interaction: open weights that decide after every second to be silent, to respond, or to hand a task over.

    python -m jstream.stream --config=configs/joyai.py --max_new_tokens=256 [--video=FILE] [--query="0:Watch the pot."]
    python -m jstream.stream --config=configs/joyai.py --checkpoint=FOLDER --video=FILE

Paper: "JoyAI-VL-Interaction: Real-Time Vision-Language Interaction Intelligence" (arXiv 2606.14777). Weights:
jdopensource/JoyAI-VL-Interaction-Preview, of the Qwen3-VL-8B family. Memory: 8.77 B params, 17.5 GB in bfloat16, and
0.15 MB a token of cache; a second of 16:9 video is about 270 tokens, 2.4 GB a minute. --memory=reprefill:100 keeps the
newest 100 turns, the window with which its server is started.

A task that the model hands over stands in its reply, behind `</delegation>`
(`jstream.protocols.joyai.split_delegation`).
"""

import ml_collections

from jstream.config import DecoderConfig, ModelConfig, QwenVisionConfig, TrainConfig, WeightsConfig, to_dict
from jstream.protocols.joyai import MAX_PIXELS, PUBLISHED


def get_config() -> ml_collections.ConfigDict:
    vision = QwenVisionConfig(
        tower="qwen3", frame_height=384, frame_width=672, patch_size=16, width=1152, num_layers=27, num_heads=16,
        mlp_dim=4304, out_width=4096, window_size=0, full_attention_layers=(), num_positions=2304,
        deep_layers=(8, 16, 24), image_mean=(0.5,) * 3, image_std=(0.5,) * 3, max_pixels=MAX_PIXELS,
    )  # fmt: skip
    decoder = DecoderConfig(
        vocab_size=151_936, width=4096, num_layers=36, num_heads=32, num_kv_heads=8, head_dim=128, mlp_dim=12_288,
        rope_theta=5e6, norm_eps=1e-6, qk_norm=True, mrope_section=(24, 20, 20), mrope_interleaved=True, deep_layers=3,
    )  # fmt: skip
    weights = WeightsConfig(checkpoint="jdopensource/JoyAI-VL-Interaction-Preview")
    config = TrainConfig(model=ModelConfig(vision, decoder), protocol=PUBLISHED, weights=weights)
    return ml_collections.ConfigDict(to_dict(config))
