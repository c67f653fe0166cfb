"""The shapes and choices a model, a protocol and a training run are made from, as frozen dataclasses.

They are built once, at the edge: from a locked `ml_collections.ConfigDict` (`configs/*.py`) or from the `config.json`
of a checkpoint. Everything below receives plain frozen values and reads no flags.
"""

from jstream.config.checks import ConfigError
from jstream.config.model import (
    QWEN_TOWERS,
    DecoderConfig,
    ModelConfig,
    ProtocolConfig,
    QwenVisionConfig,
    SiglipConfig,
    VisionConfig,
)
from jstream.config.nested import from_dict, to_dict
from jstream.config.training import (
    LoraConfig,
    MeshConfig,
    ObjectiveConfig,
    StageConfig,
    TrainConfig,
    WeightsConfig,
)

__all__ = [
    "QWEN_TOWERS",
    "ConfigError",
    "DecoderConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "ProtocolConfig",
    "QwenVisionConfig",
    "SiglipConfig",
    "StageConfig",
    "TrainConfig",
    "VisionConfig",
    "WeightsConfig",
    "from_dict",
    "to_dict",
]
