"""Planning a world: events are drawn one by one in order of their start, each only if the scene has a place for it.

A name (colour and kind) belongs to one object of the video alone, for good: "the red circle" can only ever mean one
object. No two events of a video end in the same frame, so no two replies fall into one turn.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jstream.data.world import scene
from jstream.data.world.scene import COLOURS, COVER, KINDS, OPPOSITE, REACH, SIDES, SIZES, Backdrop, Event, Speck


@dataclasses.dataclass
class Actor:
    """An object while the video is planned: its state after all events planned so far."""

    first: dict[str, Any]  # what scene.Object says of it at first
    colour: str
    kind: str
    size: str
    home: tuple[float, float]
    room: float  # the largest radius it has had: what others keep clear of
    free: int = 0  # the first frame at which a next event may start
    born: float = -math.inf
    gone: float = math.inf
    stays: bool = True  # at home, neither leaving nor passing through
    events: list[int] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def radius(self) -> float:
        return SIZES[self.size]


class Planner:
    """The state of one planning run; `make_world` drives it."""

    def __init__(self, rng, duration: int, config: scene.WorldConfig):
        self.rng, self.duration, self.config = rng, duration, config
        self.actors: list[Actor] = []
        self.events: list[Event] = []
        self.names: set[tuple[str, str]] = set()
        self.ends: set[int] = set()

    # ------------------------------------------------------------------------------------------- small draws

    def pick(self, options: Sequence):
        return options[int(self.rng.random() * len(options))]

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.rng.random())

    def shuffled(self, options: Sequence) -> list:
        return [options[i] for i in self.rng.permutation(len(options))]

    def span(self, start: int, lengths: Sequence[int]) -> dict[str, Any] | None:
        """Frames and seconds of an event that starts at frame `start` with one of these lengths in frames."""
        ends = [start + n for n in lengths if start + n < self.duration and start + n not in self.ends]
        if not ends:
            return None
        end = self.pick(ends)
        begin, finish = start - self.uniform(*scene.LEAD), end - self.uniform(*scene.LEAD)
        return dict(start_frame=start, end_frame=end, begin=begin, finish=finish)

    # ------------------------------------------------------------------------------------------- objects

    def present(self, frame: int) -> list[Actor]:
        return [a for a in self.actors if a.gone > frame - 1]

    def idle(self, frame: int) -> list[Actor]:
        return self.shuffled([a for a in self.actors if a.stays and a.free <= frame])

    def clear(self, home: tuple[float, float], radius: float, frame: int, but: Actor | None = None) -> bool:
        """Whether an object may rest there without touching another."""
        return all(a is but or math.dist(a.home, home) > 1.12 * (radius + a.room) + 0.015 for a in self.present(frame))

    def way_clear(self, actor: Actor, partner: Actor, point: tuple[float, float], frame: int) -> bool:
        """Whether the straight way from home to `point` leads past nobody but the partner."""
        (x, y), (dx, dy) = actor.home, (point[0] - actor.home[0], point[1] - actor.home[1])
        for other in self.present(frame):
            if other is not actor and other is not partner:
                along = ((other.home[0] - x) * dx + (other.home[1] - y) * dy) / (dx * dx + dy * dy)
                along = min(1.0, max(0.0, along))
                near = math.dist(other.home, (x + along * dx, y + along * dy))
                if near < actor.radius + other.room + 0.01:
                    return False
        return True

    def new_actor(self, frame: int, at_home: bool = True) -> Actor | None:
        """An object with a name not used before, at a free home; None where there is no room."""
        names = [(c, k) for c in COLOURS for k in KINDS if (c, k) not in self.names]
        if not names:
            return None
        colour, kind = self.pick(names)
        size = self.pick(("small", "small", "medium", "medium", "large"))
        home = (0.5, 0.5)
        for attempt in range(30 if at_home else 0):
            if attempt == 15:
                size = "small"
            edge = 1.15 * SIZES[size] + 0.02
            home = (self.uniform(edge, 1 - edge), self.uniform(edge, 1 - edge))
            if self.clear(home, SIZES[size], frame):
                break
        else:
            if at_home:
                return None
        first = dict(colour=colour, kind=kind, size=size, angle=self.uniform(-0.35, 0.35))
        return Actor(first, colour, kind, size, home, SIZES[size])

    def add(self, actor: Actor) -> int:
        self.actors.append(actor)
        self.names.add((actor.colour, actor.kind))
        return len(self.actors) - 1

    def outside(self, actor: Actor, side: str) -> tuple[tuple[float, float], float]:
        """The point outside the frame on that side of an object's home, and the way there."""
        off = 1.3 * actor.radius + 0.01
        x, y = actor.home
        point = {"left": (-off, y), "right": (1 + off, y), "top": (x, -off), "bottom": (x, 1 + off)}[side]
        return point, math.dist(point, actor.home)

    # ------------------------------------------------------------------------------------------- events
    # Each takes the start frame and returns whether it could add its event.

    def record(self, verb: str, actor: Actor, span: dict, partner: Actor | None = None, **rest) -> bool:
        subject = next(i for i, a in enumerate(self.actors) if a is actor)
        other = None if partner is None else next(i for i, a in enumerate(self.actors) if a is partner)
        actor.events.append(len(self.events))
        self.events.append(Event(verb, subject, actor.name, partner=other, **span, **rest))
        self.ends.add(span["end_frame"])
        for busy in (actor, partner):
            if busy is not None:
                busy.free = span["end_frame"] + scene.REST
        return True

    def enter(self, frame: int) -> bool:
        actor = self.new_actor(frame) if len(self.present(frame)) < self.config.max_objects else None
        if actor is None:
            return False
        side = self.pick(SIDES)
        point, way = self.outside(actor, side)
        span = self.span(frame, [n for n in range(2, 7) if n == 2 or way / n > scene.MIN_SPEED])
        if span is None:
            return False
        self.add(actor)
        actor.born = span["begin"]
        return self.record("enter", actor, span, detail=side, point=point)

    def leave(self, frame: int) -> bool:
        idle = self.idle(frame)
        if not idle or sum(a.stays and a.born < frame - 1 for a in self.actors) <= self.config.min_objects:
            return False
        side = self.pick(SIDES)
        point, way = self.outside(idle[0], side)
        span = self.span(frame, [n for n in range(2, 7) if n == 2 or way / n > scene.MIN_SPEED])
        if span is None:
            return False
        idle[0].stays, idle[0].gone = False, span["finish"]
        return self.record("leave", idle[0], span, detail=side, point=point)

    def cross(self, frame: int) -> bool:
        actor = self.new_actor(frame, at_home=False) if len(self.present(frame)) < self.config.max_objects else None
        span = self.span(frame, (3, 4, 5, 6))
        if actor is None or span is None:
            return False
        side = self.pick(SIDES)
        edge = actor.radius + 0.03
        actor.home = (self.uniform(edge, 1 - edge), self.uniform(edge, 1 - edge))
        point, _ = self.outside(actor, side)
        actor.home, _ = self.outside(actor, OPPOSITE[side])
        actor.born, actor.gone, actor.stays = span["begin"], span["finish"], False
        self.add(actor)
        return self.record("cross", actor, span, detail=f"{side} to {OPPOSITE[side]}", point=point)

    def collide(self, frame: int) -> bool:
        idle = self.idle(frame)
        for actor in idle:
            for partner in idle:
                far = math.dist(actor.home, partner.home)
                way = far - actor.radius - partner.radius
                lengths = [n for n in (4, 5, 6) if scene.MIN_REACH_SPEED < 2 * way / (n - scene.TOUCH) < 0.4]
                if actor is partner or not lengths:
                    continue
                part = way / far
                (x, y), (to_x, to_y) = actor.home, partner.home
                point = (x + part * (to_x - x), y + part * (to_y - y))
                span = self.span(frame, lengths) if self.way_clear(actor, partner, point, frame) else None
                if span is not None:
                    return self.record("collide", actor, span, partner, detail=partner.name, point=point)
        return False

    def hide(self, frame: int) -> bool:
        idle = self.idle(frame)
        for actor in idle:
            for partner in idle:
                covers = COVER[partner.kind] * partner.radius >= 0.9 * REACH[actor.kind] * actor.radius
                if actor is partner or not covers or not self.way_clear(actor, partner, partner.home, frame):
                    continue
                way = math.dist(actor.home, partner.home)
                span = self.span(frame, [n for n in (4, 5, 6) if 3 * way / n > scene.MIN_SPEED])
                if span is not None:
                    return self.record("hide", actor, span, partner, detail=partner.name, point=partner.home)
        return False

    def resize(self, verb: str, frame: int) -> bool:
        names = tuple(SIZES)
        for actor in self.idle(frame):
            old = names.index(actor.size)
            sizes = names[old + 1 :] if verb == "grow" else names[:old]
            sizes = [s for s in sizes if self.clear(actor.home, SIZES[s], frame, actor)]
            if not sizes:
                continue
            size = self.pick(sizes)
            # One step is a few pixels: only a quick one shows from frame to frame.
            lengths = (2,) if abs(names.index(size) - old) == 1 else (2, 3, 4)
            span = self.span(frame, lengths)
            if span is not None:
                before, actor.size = actor.size, size
                actor.room = max(actor.room, actor.radius)
                return self.record(verb, actor, span, before=before, after=size)
        return False

    def grow(self, frame: int) -> bool:
        return self.resize("grow", frame)

    def shrink(self, frame: int) -> bool:
        return self.resize("shrink", frame)

    def spin(self, frame: int) -> bool:
        idle, span = self.idle(frame), self.span(frame, (3, 4, 5, 6))
        if not idle or span is None:
            return False
        speed = math.radians(self.uniform(70, 110)) * self.pick((-1, 1))
        return self.record("spin", idle[0], span, amount=speed * (span["finish"] - span["begin"]))

    def colour(self, frame: int) -> bool:
        span = self.span(frame, (2, 3))  # slower, blue to purple would hardly show from frame to frame
        for actor in self.idle(frame):
            colours = [c for c in COLOURS if (c, actor.kind) not in self.names]
            if colours and span is not None:
                before, after = actor.colour, self.pick(colours)
                self.names.add((after, actor.kind))
                added = self.record("colour", actor, span, detail=after, before=before, after=after)
                actor.colour = after
                return added
        return False

    def jump(self, frame: int) -> bool:
        span = self.span(frame, (2, 3, 4))
        for actor in self.idle(frame):
            height = min(self.uniform(0.2, 0.3), actor.home[1] - 0.6 * actor.radius)
            if height > 0.14 and span is not None:
                hops = 1 if span["end_frame"] - frame == 2 else 2
                return self.record("jump", actor, span, amount=height, hops=hops)
        return False

    def add_event(self, frame: int) -> bool:
        """Adds an event that starts at `frame`: a verb by weight, another where the scene has no place for it."""
        verbs = {verb: weight for verb, (_, _, weight) in scene.VERBS.items()}
        while verbs:
            verb = scene.weighted(self.rng, verbs)
            if getattr(self, verb)(frame):
                return True
            del verbs[verb]
        return False


def _backdrop(planner: Planner) -> Backdrop:
    uniform = planner.uniform
    level, contrast = uniform(45, 95), uniform(8, 26)
    tint = [uniform(-14, 14) for _ in range(3)]
    specks = tuple(
        Speck(
            place=(uniform(0, 1), uniform(0, 1)),
            velocity=(uniform(-0.05, 0.05), uniform(-0.05, 0.05)),
            length=uniform(0, 0.03),
            radius=uniform(0.005, 0.009),
            level=uniform(15, 40) * planner.pick((-1, 1)),
        )
        for _ in range(int(uniform(0, 6)))
    )
    return Backdrop(
        texture=planner.pick(scene.TEXTURES),
        dark=(level - contrast + tint[0], level - contrast + tint[1], level - contrast + tint[2]),
        light=(level + contrast + tint[0], level + contrast + tint[1], level + contrast + tint[2]),
        period=uniform(40, 120),
        shake=(uniform(0, 0.012), uniform(2, 5), uniform(0.5, 1.5), uniform(0, 6.28), uniform(0, 6.28)),
        lighting=(uniform(0, 0.1), uniform(0.05, 0.4), uniform(0, 6.28)),
        noise=uniform(1, 5),
        specks=specks,
    )


def make_world(seed: int, index: int, config: scene.WorldConfig | None = None) -> scene.World:
    """Plans a video without drawing it, in well under a millisecond.

    Args:
        seed: names a series of videos, at least 0.
        index: the video within the series, at least 0.
        config: limits; the defaults if None.

    Returns:
        The world; the same arguments always give an equal one.
    """
    config = config or scene.WorldConfig()
    rng = scene.generator(seed, index)
    span = math.log(config.max_seconds + 1) - math.log(config.min_seconds)
    duration = min(config.max_seconds, int(config.min_seconds * math.exp(span * rng.random())))
    planner = Planner(rng, duration, config)
    backdrop = _backdrop(planner)

    for _ in range(planner.pick(range(config.min_objects, config.max_objects + 1))):
        actor = planner.new_actor(0)
        if actor is not None:
            planner.add(actor)

    pace = config.seconds_per_event * math.exp(planner.uniform(-0.7, 0.7))  # calm and busy videos
    frame = 2 + int(rng.exponential(pace) * 0.7)
    while frame < duration - 2:
        running = sum(e.end_frame >= frame for e in planner.events)
        added = running < scene.MAX_AT_ONCE and planner.add_event(frame)
        frame += max(1, round(rng.exponential(pace))) if added else 1

    objects = tuple(
        scene.Object(**a.first, home=a.home, born=a.born, gone=a.gone, events=tuple(a.events)) for a in planner.actors
    )
    return scene.World(seed, index, duration, objects, tuple(planner.events), backdrop)
