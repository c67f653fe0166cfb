"""How the loss on state tokens changes what a model learns: one base model, tuned with each objective.

    python launch/ablation.py --out=runs/ablation

runs all of it and writes the table. By hand, the base, and then any objective from it:

    python -m jstream.train --config=configs/ablation.py:base --workdir=runs/ablation/base
    python -m jstream.train --config=configs/ablation.py:focal --config.seed=1 --workdir=runs/ablation/focal-1 \
        --config.weights.checkpoint=runs/ablation/base/model

The base has the vision tower, projector and word embeddings of the bundled model, and a fresh decoder that has learned
to say what happens and has never been told when to: its loss is that of replies alone. As in Streamo's own ablation
(arXiv 2512.21334), a model that knows what it sees then learns the three states; only the objective differs.
"""

import json

import ml_collections

from jstream.config import (
    ConfigError,
    ModelConfig,
    ObjectiveConfig,
    ProtocolConfig,
    StageConfig,
    TrainConfig,
    WeightsConfig,
    from_dict,
    to_dict,
)
from jstream.weights.checkpoint import BUNDLED

OBJECTIVES = {
    "ce": ObjectiveConfig("ce"),
    "fixed": ObjectiveConfig("fixed"),  # 0.3, 1.3, 2.0: the paper's
    "focal": ObjectiveConfig("focal"),
    "focal_released": ObjectiveConfig("focal_released", balance="sample"),
    "class_balanced": ObjectiveConfig("class_balanced"),
}


def get_config(name: str = "focal") -> ml_collections.ConfigDict:
    bundled = json.loads((BUNDLED / "config.json").read_text())
    frozen = ("vision/.*", "projector/.*")
    if name == "base":
        weights = WeightsConfig(str(BUNDLED), fresh=(r"decoder/layers_\d+/.*", "decoder/norm/.*"))
        mix = (
            ("event_caption", 3.0), ("action_caption", 0.5), ("forward_grounding", 2.0), ("narration", 2.0),
            ("tsqa", 2.0), ("quiz", 2.0),
        )  # fmt: skip
        stage = StageConfig(
            steps=800, rows=4, frames=32, tokens=960, min_seconds=10, max_seconds=30, seconds_per_event=4.0,
            learning_rate=2e-3, decay=0.4, final_rate=0.1, freeze=frozen, weights=mix,
            objective=ObjectiveConfig("fixed", fixed=(0.0, 0.0, 0.0), happenings=0.3),
        )  # fmt: skip
    elif name in OBJECTIVES:
        weights = WeightsConfig("runs/ablation/base/model")
        stage = StageConfig(
            steps=100, rows=4, frames=32, tokens=832, min_seconds=10, max_seconds=30, learning_rate=1e-3, decay=0.5,
            final_rate=0.05, freeze=frozen, objective=OBJECTIVES[name],
        )  # fmt: skip
    else:
        raise ConfigError(f"configs/ablation.py:{name}: expected base, {', '.join(OBJECTIVES)}")
    config = TrainConfig(
        model=from_dict(ModelConfig, bundled["model"]), protocol=from_dict(ProtocolConfig, bundled["protocol"]),
        stages=(stage,), weights=weights, seed=1, optimizer="muon", weight_decay=0.02, warmup=20.0, log_every=10,
        save_every=100,
    )  # fmt: skip
    return ml_collections.ConfigDict(to_dict(config))
