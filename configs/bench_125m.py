"""A decoder of 125 M params, of VideoLLM-online's make, to be measured beside torch on a CPU.

    python -m jstream.bench --mode=peer --config=configs/bench_125m.py

It has no weights: the benchmark gives it random ones, and adapters on every product as the published model has.
"""

import ml_collections

from jstream.config import DecoderConfig, LoraConfig, ModelConfig, SiglipConfig, TrainConfig, to_dict
from jstream.protocols.live import PUBLISHED


def get_config() -> ml_collections.ConfigDict:
    vision = SiglipConfig(
        image_size=96, patch_size=16, width=192, num_layers=4, num_heads=4, mlp_dim=768, grid=3, pooled_token=True
    )  # fmt: skip
    decoder = DecoderConfig(
        vocab_size=16_384, width=768, num_layers=12, num_heads=12, num_kv_heads=4, head_dim=64, mlp_dim=2944,
        rope_theta=5e5, norm_eps=1e-5,
    )  # fmt: skip
    lora = LoraConfig(rank=128, alpha=256.0)
    return ml_collections.ConfigDict(
        to_dict(TrainConfig(model=ModelConfig(vision, decoder), protocol=PUBLISHED, lora=lora))
    )
