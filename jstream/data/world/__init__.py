"""The world: synthetic videos of simple objects that do things, and dialogues about them."""

from jstream.data.world.draw import RGB, Renderer
from jstream.data.world.plan import make_world
from jstream.data.world.scene import (
    COLOURS,
    KINDS,
    SIZES,
    VERBS,
    Event,
    Object,
    Thing,
    World,
    WorldConfig,
    generator,
)
from jstream.data.world.tasks import DEFAULT_WEIGHTS, LESSONS, TASKS, make_dialogue, sample_dialogue
from jstream.data.world.write import WorldError, write_video, write_worlds

__all__ = [
    "COLOURS",
    "DEFAULT_WEIGHTS",
    "KINDS",
    "LESSONS",
    "RGB",
    "SIZES",
    "TASKS",
    "VERBS",
    "Event",
    "Object",
    "Renderer",
    "Thing",
    "World",
    "WorldConfig",
    "WorldError",
    "generator",
    "make_dialogue",
    "make_world",
    "sample_dialogue",
    "write_video",
    "write_worlds",
]
