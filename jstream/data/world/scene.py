"""The script of a synthetic video: which objects are there, what they do and when, and where everything is at any time.

`plan` writes it, `draw` paints it and `tasks` talks about it. Lengths are fractions of the frame side with x to the
right and y down, times are seconds, angles radians. Integer times of events are frames at one frame a second.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

COLOURS = ("red", "yellow", "green", "blue", "purple", "white")
KINDS = ("circle", "square", "triangle", "star", "ring")
SIZES = {"small": 0.07, "medium": 0.10, "large": 0.14}  # radius
SIDES = ("left", "right", "top", "bottom")
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
TEXTURES = ("gradient", "noise", "stripes", "checker", "blobs")

# verb: (what it does, what it is asked about, how often it is drawn). {} is the side, the new colour or the partner.
VERBS = {
    "enter": ("enters from the {}", "enter from the {}", 1.3),
    "leave": ("leaves to the {}", "leave to the {}", 1.2),
    "cross": ("crosses from {}", "cross from {}", 1.0),
    "collide": ("collides with the {}", "collide with the {}", 1.4),
    "grow": ("grows", "grow", 1.1),
    "shrink": ("shrinks", "shrink", 1.1),
    "spin": ("spins", "spin", 1.2),
    "colour": ("turns {}", "turn {}", 1.2),
    "hide": ("hides behind the {}", "hide behind the {}", 2.0),
    "jump": ("jumps", "jump", 1.2),
}

# How far a kind reaches from its centre, and how large a disc it covers, in radii: who can hide behind whom.
REACH = {"circle": 1.0, "square": 1.26, "triangle": 1.24, "star": 1.2, "ring": 1.0}
COVER = {"circle": 1.0, "square": 0.89, "triangle": 0.62, "star": 0.55, "ring": 0.0}

LEAD = (0.6, 0.9)  # seconds that real motion runs ahead of its frames, so that a frame shows it clearly begun or over
REST = 2  # frames from the end of an event to the next of the same object: at least 1.7 s of real rest
MIN_SPEED = 0.14  # per second: motion that one frame to the next shows beyond doubt at 96 pixels
MIN_REACH_SPEED = 0.085  # the same on the short ways between two objects
TOUCH = 0.4  # seconds that a collision stays in contact, or a frame a second would seldom see it
MAX_AT_ONCE = 3


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """Limits of the videos: seconds long, seconds from one event to the next on average, objects at a time."""

    min_seconds: int = 20
    max_seconds: int = 120
    seconds_per_event: float = 6.0
    min_objects: int = 2
    max_objects: int = 5

    def __post_init__(self):
        if not 10 <= self.min_seconds <= self.max_seconds:
            found = f"{self.min_seconds} and {self.max_seconds}"
            raise ValueError(f"expected 10 ≤ min_seconds ≤ max_seconds, found {found}")
        if not self.seconds_per_event > 0:
            raise ValueError(f"expected seconds_per_event > 0, found {self.seconds_per_event}")
        if not 2 <= self.min_objects <= self.max_objects <= 5:
            found = f"{self.min_objects} and {self.max_objects}"
            raise ValueError(f"expected 2 ≤ min_objects ≤ max_objects ≤ 5, found {found}")


@dataclasses.dataclass(frozen=True)
class Event:
    """Something an object does.

    Attributes:
        verb: a key of `VERBS`.
        subject: index of the object; `name` is what it is called when the event starts ("red circle").
        partner: index of the object it collides with or hides behind, else None.
        detail: what fills the verb: a side, "left to right", the new colour, the partner's name; or "".
        start_frame, end_frame: the first frame that shows it in progress, the first that shows it over.
        begin, finish: seconds of the real motion.
        point: the far end of the way: outside the frame, at the touch, or behind the partner.
        before, after: colour or size, for events that change one.
        amount: radians turned (spin) or height of a hop (jump).
        hops: how many (jump).
    """

    verb: str
    subject: int
    name: str
    start_frame: int
    end_frame: int
    begin: float
    finish: float
    partner: int | None = None
    detail: str = ""
    point: tuple[float, float] = (0.0, 0.0)
    before: str = ""
    after: str = ""
    amount: float = 0.0
    hops: int = 0

    @property
    def start(self) -> int:
        """Schema time of the first turn in progress."""
        return self.start_frame + 1

    @property
    def end(self) -> int:
        """Schema time of the last turn in progress; the reply belongs to the turn after."""
        return self.end_frame

    @property
    def does(self) -> str:
        """What the subject does, as in "turns blue"."""
        return VERBS[self.verb][0].format(self.detail)

    @property
    def do(self) -> str:
        """The same as it is asked, as in "turn blue"."""
        return VERBS[self.verb][1].format(self.detail)

    @property
    def sentence(self) -> str:
        return f"The {self.name} {self.does}."

    @property
    def action(self) -> str:
        return f"{self.does[0].upper()}{self.does[1:]}."


@dataclasses.dataclass(frozen=True)
class Object:
    """An object as it is first seen.

    Attributes:
        colour, kind, size: at first; events change colour and size.
        home: where its centre rests (for one that only crosses: where its way ends, outside the frame).
        angle: at first.
        born, gone: seconds between which it is there.
        events: indices of the events it is the subject of, in order.
    """

    colour: str
    kind: str
    size: str
    home: tuple[float, float]
    angle: float
    born: float
    gone: float
    events: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Speck:
    """A dim streak that drifts by, never mentioned: place at time 0, velocity, half length, radius, level."""

    place: tuple[float, float]
    velocity: tuple[float, float]
    length: float
    radius: float
    level: float


@dataclasses.dataclass(frozen=True)
class Backdrop:
    """Everything in the picture that is no object.

    Attributes:
        texture: one of `TEXTURES`; it changes slowly between two states, there and back in `period` seconds.
        dark, light: RGB between which the texture moves, 0–255.
        shake: camera shake: amplitude, then radians a second and phase of two waves.
        lighting: relative amplitude, radians a second, phase.
        noise: standard deviation of the sensor noise, 0–255.
    """

    texture: str
    dark: tuple[float, float, float]
    light: tuple[float, float, float]
    period: float
    shake: tuple[float, float, float, float, float]
    lighting: tuple[float, float, float]
    noise: float
    specks: tuple[Speck, ...]


class Pose(NamedTuple):
    """An object at a time: `mix` is how far it is from colour `old` to `new`; `layer` 0 is behind, 2 in front."""

    x: float
    y: float
    radius: float
    angle: float
    old: str
    new: str
    mix: float
    layer: int


@dataclasses.dataclass(frozen=True)
class Thing:
    """What can be seen of an object: the label of auxiliary losses.

    Attributes:
        colour, kind, size: names; during an event that changes one, the colour before and the nearest size.
        x, y, radius, angle: as drawn, camera shake included.
        visible: about what fraction of it can be seen, in the frame and not behind the object it hides behind.
        event: index of the event it is the subject of, from the event's start frame to before its end frame.
        object: index of the object.
    """

    colour: str
    kind: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    visible: float
    event: int | None
    object: int


@dataclasses.dataclass(frozen=True)
class World:
    """A video before it is drawn; equal worlds draw equal frames."""

    seed: int
    index: int
    duration: int
    objects: tuple[Object, ...]
    events: tuple[Event, ...]
    backdrop: Backdrop

    def __hash__(self):
        return hash((self.seed, self.index, self.duration))

    def shift(self, time: float) -> tuple[float, float]:
        """Where the camera shake has moved the picture, (dx, dy)."""
        amplitude, fast, slow, p, q = self.backdrop.shake
        return (
            amplitude * (math.sin(fast * time + p) + math.sin(slow * time + q)) / 2,
            amplitude * (math.sin(fast * time + q) + math.sin(slow * time + p)) / 2,
        )

    def pose(self, index: int, time: float) -> Pose | None:
        """Object `index` at `time`, without camera shake; None when it is not there."""
        thing = self.objects[index]
        if not thing.born <= time < thing.gone:
            return None
        (x, y), radius, angle, layer = thing.home, SIZES[thing.size], thing.angle, 1
        old = new = thing.colour
        mix = 0.0
        for number in thing.events:
            event = self.events[number]
            if time < event.begin:
                break
            seconds = event.finish - event.begin
            done = min(1.0, (time - event.begin) / seconds)
            verb, away = event.verb, 0.0
            if verb in ("enter", "cross"):
                away = 1 - done
            elif verb == "leave":
                away = done
            elif verb == "collide":
                away = min(1.0, min(done, 1 - done) * 2 / (1 - TOUCH / seconds))
            elif verb == "hide":
                away = min(1.0, min(done, 1 - done) * 3)  # a third of the time hidden
            elif verb in ("grow", "shrink"):
                radius = SIZES[event.before] + done * (SIZES[event.after] - SIZES[event.before])
            elif verb == "spin":
                angle += done * event.amount
            elif verb == "colour":
                old, new, mix = event.before, event.after, done
            elif verb == "jump" and done < 1:
                hop = done * event.hops % 1
                y = thing.home[1] - event.amount * 4 * hop * (1 - hop)
            if away:
                x = thing.home[0] + away * (event.point[0] - thing.home[0])
                y = thing.home[1] + away * (event.point[1] - thing.home[1])
            if done < 1:
                layer = 0 if verb == "hide" else 2
        return Pose(x, y, radius, angle, old, new, mix, layer)

    def colour_at(self, index: int, time: float) -> str:
        """The colour an object goes by: a change counts from its end frame."""
        thing = self.objects[index]
        changes = (self.events[n] for n in thing.events if self.events[n].verb == "colour")
        return next((e.after for e in reversed([*changes]) if e.end_frame <= time), thing.colour)

    def event_at(self, index: int, time: float) -> int | None:
        """The event an object is the subject of, by frames: start_frame ≤ time < end_frame."""
        numbers = self.objects[index].events
        return next((n for n in numbers if self.events[n].start_frame <= time < self.events[n].end_frame), None)

    def things(self, time: float) -> list[Thing]:
        """All that can be seen at `time`, in order of objects."""
        dx, dy = self.shift(time)
        seen = []
        for index, thing in enumerate(self.objects):
            pose = self.pose(index, time)
            if pose is None:
                continue
            x, y, radius = pose.x + dx, pose.y + dy, pose.radius
            visible = _part(x + radius, radius) * _part(1 - x + radius, radius)
            visible *= _part(y + radius, radius) * _part(1 - y + radius, radius)
            if pose.layer == 0:
                hider = next(self.events[n].partner for n in reversed(thing.events) if self.events[n].begin <= time)
                assert hider is not None  # only who hides behind a partner is drawn on layer 0
                other = self.pose(hider, time)
                assert other is not None  # a partner stays while it is needed
                gap = math.hypot(pose.x - other.x, pose.y - other.y) - COVER[self.objects[hider].kind] * other.radius
                visible *= _part(gap + radius, radius)
            if visible > 0:
                size = min(SIZES, key=lambda name: abs(SIZES[name] - radius))
                colour, event = self.colour_at(index, time), self.event_at(index, time)
                seen.append(Thing(colour, thing.kind, size, x, y, radius, pose.angle, visible, event, index))
        return seen


def _part(length: float, radius: float) -> float:
    """What part of a diameter a length is, 0 to 1."""
    return min(1.0, max(0.0, length / (2 * radius)))


def weighted(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    """A key drawn by its weight."""
    sums = list(itertools.accumulate(weights.values()))
    return list(weights)[bisect.bisect_right(sums, rng.random() * sums[-1])]


def generator(*key: int) -> np.random.Generator:
    """The random numbers that belong to a key of non-negative integers, the same on every machine."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
