"""The configs of published weights, read as the commands read them: for tests."""

import importlib.util
import pathlib

from jstream.config import TrainConfig, from_dict

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"


def published(name: str, size: str | None = None) -> TrainConfig:
    """The config of a file in configs/."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_dict(TrainConfig, (module.get_config(size) if size else module.get_config()).to_dict(), name)
