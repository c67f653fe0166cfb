"""jstream: live video assistants in JAX. A model watches a stream frame by frame and decides when to speak."""

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
