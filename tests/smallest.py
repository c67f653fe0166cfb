"""The smallest training run that still goes through every part: for tests."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 3
    config.model = dict(
        vision=dict(
            image_size=24, patch_size=12, stem_width=4, temporal_patch_size=2, width=16, num_layers=1, num_heads=2,
            mlp_dim=16, grid=2, pooled_token=False,
        ),
        decoder=dict(
            vocab_size=640, width=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=32,
            rope_theta=10_000.0, tie_embeddings=True,
        ),
    )  # fmt: skip
    config.protocol = dict(
        system="", user_open="<|user|>", user_close="", assistant_open="<|assistant|>", assistant_close="<|end|>",
        frame_open="", frame_close="", frame_token="<|frame|>",
    )  # fmt: skip
    auxiliary = dict(words=0.1, happenings=0.1)
    config.stages = (
        dict(steps=4, rows=2, frames=8, tokens=0, objective=dict(replies=0.0, words=1.0)),
        dict(steps=8, rows=2, frames=16, tokens=320, min_seconds=10, max_seconds=16, objective=auxiliary),
    )
    config.optimizer = "muon"
    config.warmup = 2
    config.workers = 0
    config.log_every = 1
    config.save_every = 2
    return config
