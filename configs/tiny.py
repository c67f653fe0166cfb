"""The bundled model, trained from scratch on the world.

    python -m jstream.train --config=configs/tiny.py --workdir=runs/tiny

A Streamo model of 3 M parameters: 96 px frames, 10 tokens a frame, 1 fps. Seventeen stages: the vision tower learns to
name what two frames show; the decoder learns on short videos, then on longer ones, then everything together at full
length; stages of lessons, twice interrupted by one of everything together, teach it to look things up in what it has
seen, from many questions about few frames; at last come all tasks and lessons while the rate falls. The first nine were
trained with rope_theta = 10,000. How long it takes and what comes out: jstream/assets/tiny/README.md.
"""

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
        image_size=96, patch_size=12, stem_width=48, temporal_patch_size=2, width=128, num_layers=4, num_heads=4,
        mlp_dim=384, grid=3, pooled_token=True, token_positions=True,
    )  # fmt: skip
    decoder = DecoderConfig(
        vocab_size=640, width=192, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=48, mlp_dim=512,
        rope_theta=1_000_000.0, tie_embeddings=True,
    )  # fmt: skip
    protocol = ProtocolConfig(
        user_open="<|user|>", user_close="", assistant_open="<|assistant|>", assistant_close="<|end|>",
        frame_open="", frame_close="", frame_token="<|frame|>",
    )  # fmt: skip
    mix = (
        ("narration", 2.0), ("event_caption", 3.0), ("action_caption", 1.0), ("forward_grounding", 2.5),
        ("backward_grounding", 2.0), ("tsqa", 3.0), ("mixed", 1.5),
    )  # fmt: skip
    last_mix = (  # more of what is hardest
        ("narration", 2.0), ("event_caption", 2.5), ("action_caption", 1.0), ("forward_grounding", 2.5),
        ("backward_grounding", 3.5), ("tsqa", 5.0), ("mixed", 1.5),
    )  # fmt: skip
    lessons = (
        ("quiz", 5.0), ("narration", 1.0), ("event_caption", 1.5), ("action_caption", 2.0), ("forward_grounding", 2.5),
        ("backward_grounding", 0.5), ("tsqa", 1.0), ("mixed", 0.5),
    )  # fmt: skip
    more_lessons = (
        ("quiz", 7.0), ("narration", 1.0), ("event_caption", 1.0), ("action_caption", 2.0), ("forward_grounding", 2.5),
        ("backward_grounding", 0.5), ("tsqa", 1.0), ("mixed", 0.5),
    )  # fmt: skip
    all_lessons = (
        ("drill", 3.0), ("quiz", 2.5), ("narration", 1.0), ("event_caption", 1.5), ("action_caption", 2.0),
        ("forward_grounding", 2.0), ("backward_grounding", 0.5), ("tsqa", 1.5), ("mixed", 0.5),
    )  # fmt: skip
    drills = (("drill", 8.0), ("forward_grounding", 1.0), ("event_caption", 0.5), ("action_caption", 0.5))
    recalls = (
        ("recall", 6.0), ("drill", 2.0), ("forward_grounding", 1.0), ("event_caption", 0.5), ("action_caption", 0.5),
        ("tsqa", 0.5),
    )  # fmt: skip
    more_recalls = (
        ("recall", 6.0), ("drill", 1.5), ("narration", 0.5), ("event_caption", 0.5), ("action_caption", 0.5),
        ("forward_grounding", 1.0), ("tsqa", 1.5),
    )  # fmt: skip
    at_last = (
        ("recall", 2.0), ("drill", 1.0), ("quiz", 1.5), ("narration", 1.0), ("event_caption", 1.5),
        ("action_caption", 1.0), ("forward_grounding", 2.0), ("backward_grounding", 1.5), ("tsqa", 3.0), ("mixed", 0.5),
    )  # fmt: skip
    everything = ObjectiveConfig(states="ce", words=0.1, happenings=0.3)
    stages = (
        StageConfig(
            steps=1700, rows=4, frames=30, tokens=0, learning_rate=3e-3, decay=0.25,
            objective=ObjectiveConfig(replies=0.0, words=1.0),
        ),
        StageConfig(
            steps=1200, rows=4, frames=32, tokens=736, min_seconds=10, max_seconds=30, learning_rate=2e-3,
            freeze=("vision/.*",), objective=everything,
        ),
        StageConfig(
            steps=800, rows=3, frames=48, tokens=1088, min_seconds=20, max_seconds=48, learning_rate=1.5e-3,
            freeze=("vision/.*",), objective=everything, weights=mix,
        ),
        StageConfig(
            steps=640, rows=2, frames=128, tokens=2944, min_seconds=20, max_seconds=120, learning_rate=1e-3,
            decay=0.8, final_rate=0.02, objective=everything, weights=last_mix,
        ),
        StageConfig(
            steps=2000, rows=4, frames=40, tokens=1024, min_seconds=12, max_seconds=40, learning_rate=2e-3,
            decay=0.3, final_rate=0.4, freeze=("vision/.*",), objective=everything, weights=lessons,
        ),
        StageConfig(
            steps=460, rows=4, frames=48, tokens=1216, min_seconds=12, max_seconds=48, seconds_per_event=3.5,
            learning_rate=1.5e-3, freeze=("vision/.*",), objective=everything, weights=more_lessons,
        ),
        StageConfig(
            steps=1300, rows=6, frames=20, tokens=736, min_seconds=10, max_seconds=20, seconds_per_event=2.5,
            learning_rate=2e-3, decay=0.3, final_rate=0.5, freeze=("vision/.*",), objective=everything,
            weights=drills,
        ),
        StageConfig(
            steps=300, rows=4, frames=48, tokens=1408, min_seconds=12, max_seconds=48, seconds_per_event=3.5,
            learning_rate=1e-3, freeze=("vision/.*",), objective=everything, weights=all_lessons,
        ),
        StageConfig(
            steps=540, rows=2, frames=128, tokens=3584, min_seconds=20, max_seconds=120, seconds_per_event=5.0,
            learning_rate=9e-4, decay=0.85, final_rate=0.02, objective=everything, weights=all_lessons,
        ),
        StageConfig(
            steps=1000, rows=6, frames=20, tokens=736, min_seconds=10, max_seconds=20, seconds_per_event=2.5,
            learning_rate=1.2e-3, decay=0.5, final_rate=0.1, freeze=("vision/.*",), objective=everything,
            weights=drills,
        ),
        StageConfig(
            steps=700, rows=5, frames=48, tokens=1760, min_seconds=10, max_seconds=48, seconds_per_event=3.0,
            learning_rate=1e-3, decay=0.4, final_rate=0.5, freeze=("vision/.*",), objective=everything,
            weights=drills,
        ),
        StageConfig(
            steps=600, rows=2, frames=128, tokens=3584, min_seconds=20, max_seconds=120, seconds_per_event=4.5,
            learning_rate=9e-4, freeze=("vision/.*",), objective=everything, weights=all_lessons,
        ),
        StageConfig(
            steps=900, rows=2, frames=128, tokens=3584, min_seconds=20, max_seconds=120, seconds_per_event=5.0,
            learning_rate=9e-4, decay=0.85, final_rate=0.02, objective=everything, weights=all_lessons,
        ),
        StageConfig(
            steps=900, rows=4, frames=64, tokens=2112, min_seconds=20, max_seconds=60, seconds_per_event=3.0,
            learning_rate=1e-3, freeze=("vision/.*",), objective=everything, weights=recalls,
        ),
        StageConfig(
            steps=560, rows=2, frames=128, tokens=4096, min_seconds=20, max_seconds=120, seconds_per_event=3.5,
            learning_rate=9e-4, freeze=("vision/.*",), objective=everything, weights=more_recalls,
        ),
        StageConfig(
            steps=480, rows=2, frames=128, tokens=4096, min_seconds=20, max_seconds=120, seconds_per_event=3.5,
            learning_rate=8e-4, decay=1.0, final_rate=0.08, freeze=("vision/.*",), objective=everything,
            weights=more_recalls,
        ),
        StageConfig(
            steps=320, rows=2, frames=128, tokens=3584, min_seconds=20, max_seconds=120, seconds_per_event=5.0,
            learning_rate=3.5e-4, decay=1.0, final_rate=0.03, freeze=("vision/.*",), objective=everything,
            weights=at_last,
        ),
    )  # fmt: skip
    config = TrainConfig(
        model=ModelConfig(vision, decoder), protocol=protocol, stages=stages, seed=1, optimizer="muon",
        weight_decay=0.02,
    )  # fmt: skip
    return ml_collections.ConfigDict(to_dict(config))
