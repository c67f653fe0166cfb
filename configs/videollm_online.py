"""VideoLLM-online-8B-v1+: Llama 3 and SigLIP, joined by an adapter, watching at two frames a second.

    python -m jstream.stream --config=configs/videollm_online.py --fps=2 [--video=FILE] [--query="0:What do I do?"]
    python -m jstream.stream --config=configs/videollm_online.py --fps=2 --checkpoint=ADAPTER_FOLDER \
        --config.weights.llm=LLAMA_FOLDER --config.weights.vision=SIGLIP_FOLDER

Paper: "VideoLLM-online: Online Video Large Language Model for Streaming Video" (arXiv 2406.11816). Weights: the adapter
chenjoya/videollm-online-8b-v1plus over meta-llama/Meta-Llama-3-8B-Instruct (gated: its licence has to be accepted on
the hub) and google/siglip-large-patch16-384; merged when they are opened. Memory: 8.37 B params, 16.7 GB in bfloat16,
and 0.13 MB a token of cache; a frame is 11 tokens.

Training starts from the base models, with a connector of its own and adapters that are written in PEFT's format
(docs/training.md):

    python -m jstream.train --config=configs/videollm_online.py --workdir=runs/live --config.dialogues=chats.jsonl

As its tower is frozen, what it makes of the videos can be computed once, which is how it was trained:
`python -m jstream.features --config=configs/videollm_online.py --annotations=chats.jsonl --out=FOLDER`, and then
--config.dialogues=FOLDER.

Rows of 16,384 tokens are for a node. `configs/videollm_online.py:8k` has shorter ones for one large card, and `:24gb`
still shorter ones and smaller optimizer states for a small one; docs/memory.md has the bytes.

Recipe: `scripts/ego4d/live1+.sh` of its repository: 2 fps, up to 1200 frames, two passes, 64 samples a step, 2e-4 with
a cosine; samples are packed, 32 rows hold about as many.

It speaks where p(silence) falls below 0.725, as in the published demo, or another token is more probable;
--threshold=0.4 puts p(speak) ≥ 0.4 in the place of the former.
"""

import dataclasses

import ml_collections

from jstream.config import (
    ConfigError,
    DecoderConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    SiglipConfig,
    StageConfig,
    TrainConfig,
    WeightsConfig,
    to_dict,
)
from jstream.protocols.live import PUBLISHED

SHORTER = {  # shorter rows, for one card; most tokens of a row are those of its frames
    "8k": dict(stage=dict(rows=16, accumulate=8, frames=640, tokens=8192)),
    "24gb": dict(stage=dict(rows=1, accumulate=1, frames=160, tokens=2048), optimizer="adamw_8bit"),
}


def get_config(size: str = "") -> ml_collections.ConfigDict:
    vision = SiglipConfig(
        image_size=384, patch_size=16, width=1024, num_layers=24, num_heads=16, mlp_dim=4096, grid=3, pooled_token=True
    )  # fmt: skip
    decoder = DecoderConfig(
        vocab_size=128_256, width=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, mlp_dim=14_336,
        rope_theta=5e5, norm_eps=1e-5,
    )  # fmt: skip
    weights = WeightsConfig(
        checkpoint="chenjoya/videollm-online-8b-v1plus",
        llm="meta-llama/Meta-Llama-3-8B-Instruct",
        vision="google/siglip-large-patch16-384",
    )
    stage = StageConfig(
        steps=0, epochs=2.0, rows=32, accumulate=4, frames=1280, tokens=16_384, objective=ObjectiveConfig("live"),
        learning_rate=2e-4, decay=1.0, final_rate=0.0, falling="cosine", freeze=("vision/.*", "decoder/.*"),
    )  # fmt: skip
    config = TrainConfig(
        model=ModelConfig(vision, decoder), protocol=PUBLISHED, weights=weights, stages=(stage,),
        lora=LoraConfig(rank=128, alpha=256.0, dropout=0.05), fps=2.0, optimizer="adamw", weight_decay=0.0, beta2=0.999,
        warmup=0.05, compute_dtype="bfloat16", remat="layer", workers=16, log_every=10,
    )  # fmt: skip
    if size:
        if size not in SHORTER:
            raise ConfigError(f"configs/videollm_online.py:{size}: expected nothing, {' or '.join(SHORTER)}")
        changes = dict(SHORTER[size])
        config = dataclasses.replace(config, stages=(dataclasses.replace(stage, **changes.pop("stage")),), **changes)
    return ml_collections.ConfigDict(to_dict(config))
