"""The smallest training run that still goes through every part: for tests."""

import ml_collections

from jstream.config import (
    DecoderConfig,
    ModelConfig,
    ObjectiveConfig,
    ProtocolConfig,
    SiglipConfig,
    StageConfig,
    TrainConfig,
    to_dict,
)


def get_config() -> ml_collections.ConfigDict:
    vision = SiglipConfig(
        image_size=24, patch_size=12, stem_width=4, temporal_patch_size=2, width=16, num_layers=1, num_heads=2,
        mlp_dim=16, grid=2, pooled_token=True,
    )  # fmt: skip
    decoder = DecoderConfig(
        vocab_size=640, width=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=32,
        rope_theta=10_000.0, tie_embeddings=True,
    )  # fmt: skip
    protocol = ProtocolConfig(
        user_open="<|user|>", user_close="", assistant_open="<|assistant|>", assistant_close="<|end|>",
        frame_open="", frame_close="", frame_token="<|frame|>",
    )  # fmt: skip
    stages = (
        StageConfig(steps=4, rows=2, frames=8, tokens=0, objective=ObjectiveConfig(replies=0.0, words=1.0)),
        StageConfig(
            steps=8, rows=2, frames=16, tokens=320, min_seconds=10, max_seconds=16,
            objective=ObjectiveConfig(words=0.1, happenings=0.1),
        ),
    )  # fmt: skip
    config = TrainConfig(
        model=ModelConfig(vision, decoder), protocol=protocol, stages=stages, seed=3, optimizer="muon", warmup=2,
        workers=0, log_every=1, save_every=2,
    )  # fmt: skip
    return ml_collections.ConfigDict(to_dict(config))
