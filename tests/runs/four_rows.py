"""A run of a few seconds whose rows can be dealt out to four devices, over tests/smallest.py."""

import dataclasses
import pathlib
import runpy

import ml_collections

from jstream.config import MeshConfig, ObjectiveConfig, TrainConfig, from_dict, to_dict


def get_config() -> ml_collections.ConfigDict:
    smallest = runpy.run_path(str(pathlib.Path(__file__).parent.parent / "smallest.py"))["get_config"]()
    config = from_dict(TrainConfig, smallest.to_dict())
    stage = dataclasses.replace(
        config.stages[1], steps=80, rows=8, objective=ObjectiveConfig("focal", words=0.1, happenings=0.1)
    )
    stages = (stage, dataclasses.replace(stage, steps=40, freeze=("vision/.*",)))
    config = dataclasses.replace(
        config, stages=stages, optimizer="adamw", mesh=MeshConfig(2, -1, 1), save_every=5, workers=0, validate_every=40,
        validation_rows=8,
    )  # fmt: skip
    return ml_collections.ConfigDict(to_dict(config))
