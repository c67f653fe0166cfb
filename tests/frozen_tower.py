"""A run behind a frozen vision tower, over tests/smallest.py: adapters and the projector learn from dialogues."""

import dataclasses
import pathlib
import runpy

import ml_collections

from jstream.config import LoraConfig, ObjectiveConfig, TrainConfig, from_dict, to_dict


def get_config() -> ml_collections.ConfigDict:
    smallest = runpy.run_path(str(pathlib.Path(__file__).parent / "smallest.py"))["get_config"]()
    config = from_dict(TrainConfig, smallest.to_dict())
    stage = dataclasses.replace(
        config.stages[1], steps=4, frames=30, tokens=760, learning_rate=1e-2, freeze=("vision/.*", "decoder/.*"),
        objective=ObjectiveConfig(),
    )  # fmt: skip
    lora = LoraConfig(rank=3, alpha=6.0, dropout=0.0, modules=("q_proj", "v_proj", "o_proj", "down_proj"))
    config = dataclasses.replace(
        config, stages=(stage,), lora=lora, optimizer="adamw", warmup=0.0, workers=1, save_every=4, validate_every=2,
        validation_rows=2,
    )  # fmt: skip
    return ml_collections.ConfigDict(to_dict(config))
