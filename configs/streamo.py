"""Streamo: a Qwen video language model that decides after every second to be silent, to stand by or to respond.

    python -m jstream.stream --config=configs/streamo.py [--video=FILE] [--query="0:Tell me when the kettle boils."]
    python -m jstream.stream --config=configs/streamo.py:7b --checkpoint=FOLDER

Paper: "Streaming Video Instruction Tuning" (arXiv 2512.21334). Its weights are not published; what opens here by
default is the base model it was tuned from, with the three state tokens added and untrained: fit to be tuned, not to be
watched. A folder of tuned weights in the base model's format opens with --checkpoint.

    config   weights                       params   in bfloat16
    :3b      Qwen/Qwen2.5-VL-3B-Instruct   3.75 B    7.5 GB
    :7b      Qwen/Qwen2.5-VL-7B-Instruct   8.29 B   16.6 GB
    :4b      Qwen/Qwen3-VL-4B-Instruct     4.44 B    8.9 GB

Training starts from the same weights (docs/training.md):

    python -m jstream.train --config=configs/streamo.py --workdir=runs/streamo --config.dialogues=annotations.jsonl

Recipe: the paper, and where it is silent `train.sh` of its repository: the tower is frozen and its merger is not,
one pass, 512 samples a step, 1e-5 with a cosine, 32,768 tokens, focal loss with γ = 2 over the whole batch. Samples are
packed: 128 rows hold about as many. What neither says is as in ms-swift, which it trains with (weight decay, β₂, clip).

To that comes the cache: 0.04 MB a token for 3b, 0.06 for 7b, 0.15 for 4b. A second of 16:9 video is about 140 tokens
(113 for 4b), so a cache of 32,768 tokens, which the weights were trained with, holds four minutes: --memory=reprefill
keeps the newest 300 turns of a longer stream, as Streamo's own inference does.
"""

import ml_collections

from jstream.config import (
    ConfigError,
    DecoderConfig,
    ModelConfig,
    ObjectiveConfig,
    QwenVisionConfig,
    StageConfig,
    TrainConfig,
    WeightsConfig,
    to_dict,
)
from jstream.protocols.streamo import MAX_PIXELS, PUBLISHED


def qwen2_5_vl(**decoder) -> ModelConfig:
    decoder = DecoderConfig(
        head_dim=128, rope_theta=1e6, norm_eps=1e-6, qkv_bias=True, mrope_section=(16, 24, 24), **decoder
    )  # fmt: skip
    return ModelConfig(QwenVisionConfig(out_width=decoder.width, max_pixels=MAX_PIXELS), decoder)


def qwen3_vl_4b() -> ModelConfig:
    vision = QwenVisionConfig(
        tower="qwen3", frame_height=224, frame_width=416, patch_size=16, width=1024, num_layers=24, num_heads=16,
        mlp_dim=4096, out_width=2560, window_size=0, full_attention_layers=(), num_positions=2304,
        deep_layers=(5, 11, 17), image_mean=(0.5,) * 3, image_std=(0.5,) * 3, max_pixels=MAX_PIXELS,
    )  # fmt: skip
    decoder = DecoderConfig(
        vocab_size=151_936, width=2560, num_layers=36, num_heads=32, num_kv_heads=8, head_dim=128, mlp_dim=9728,
        rope_theta=5e6, norm_eps=1e-6, qk_norm=True, tie_embeddings=True, mrope_section=(24, 20, 20),
        mrope_interleaved=True, deep_layers=3,
    )  # fmt: skip
    return ModelConfig(vision, decoder)


def get_config(size: str = "3b") -> ml_collections.ConfigDict:
    if size == "3b":
        checkpoint = "Qwen/Qwen2.5-VL-3B-Instruct"
        model = qwen2_5_vl(
            vocab_size=151_936, width=2048, num_layers=36, num_heads=16, num_kv_heads=2, mlp_dim=11_008,
            tie_embeddings=True,
        )  # fmt: skip
    elif size == "7b":
        checkpoint = "Qwen/Qwen2.5-VL-7B-Instruct"
        model = qwen2_5_vl(
            vocab_size=152_064, width=3584, num_layers=28, num_heads=28, num_kv_heads=4, mlp_dim=18_944,
        )  # fmt: skip
    elif size == "4b":
        checkpoint, model = "Qwen/Qwen3-VL-4B-Instruct", qwen3_vl_4b()
    else:
        raise ConfigError(f"configs/streamo.py:{size}: expected 3b, 7b or 4b")
    stage = StageConfig(
        steps=0, epochs=1.0, rows=128, accumulate=16, frames=288, tokens=32_768, objective=ObjectiveConfig("focal"),
        learning_rate=1e-5, decay=1.0, final_rate=0.0, falling="cosine",
        freeze=("vision/(?!merger/|deepstack_).*",),
    )  # fmt: skip
    config = TrainConfig(
        model=model, protocol=PUBLISHED, weights=WeightsConfig(checkpoint=checkpoint), stages=(stage,),
        optimizer="adamw", weight_decay=0.1, beta2=0.95, warmup=0.05, compute_dtype="bfloat16", remat="layer",
        workers=8, log_every=5, save_every=100,
    )  # fmt: skip
    return ml_collections.ConfigDict(to_dict(config))
