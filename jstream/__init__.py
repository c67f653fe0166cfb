"""jstream: live video assistants in JAX. A model watches a stream frame by frame and decides when to speak."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jstream import sharding
    from jstream.data.video import Frame, VideoError, open_video
    from jstream.model import Model
    from jstream.models.cache import CacheFullError
    from jstream.streaming.engine import Engine, EngineFullError
    from jstream.streaming.event import Event
    from jstream.streaming.session import Session
    from jstream.weights.checkpoint import BUNDLED, CheckpointError
    from jstream.weights.published import load

__all__ = [
    "BUNDLED",
    "CacheFullError",
    "CheckpointError",
    "Engine",
    "EngineFullError",
    "Event",
    "Frame",
    "Model",
    "Session",
    "VideoError",
    "load",
    "open_video",
    "sharding",
]

# Where the names come from, imported when they are first asked for: JAX takes a second, and whoever decodes videos or
# scores predictions has no use for it.
_MODULES = {
    "BUNDLED": "weights.checkpoint",
    "CacheFullError": "models.cache",
    "CheckpointError": "weights.checkpoint",
    "Engine": "streaming.engine",
    "EngineFullError": "streaming.engine",
    "Event": "streaming.event",
    "Frame": "data.video",
    "Model": "model",
    "Session": "streaming.session",
    "VideoError": "data.video",
    "load": "weights.published",
    "open_video": "data.video",
}


def __getattr__(name: str) -> Any:
    if name == "sharding":
        return importlib.import_module("jstream.sharding")
    if name not in _MODULES:
        raise AttributeError(f"module 'jstream' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jstream.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
