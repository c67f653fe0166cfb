"""Labels for auxiliary losses: what each part of a frame shows and what happens, in the world's words."""

import numpy as np

from jstream.data.world.scene import COLOURS, KINDS, SIDES, SIZES, VERBS, Thing, World

WORDS = (
    *COLOURS,
    *KINDS,
    *SIZES,
    *(verb[0].split()[0] for verb in VERBS.values()),
    *SIDES,
)
MOVED = 0.03  # of the frame side, about three pixels


def scene_labels(world: World, frame: int, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """What a frame shows and what happens in it.

    Args:
        frame: second of the video.
        grid: cells to a side.

    Returns:
        uint8 [grid², W]: the words for the things whose centre lies in each cell: colour, kind, size, which way they
        have moved since the frame before, and what they are doing; and uint8 [2, W]: the words of the sentences of all
        events in progress, and of those just over.
    """
    words = np.zeros((grid * grid, len(WORDS)), np.uint8)
    for thing in world.things(float(frame)):
        if thing.visible < 0.3:
            continue
        column, row = (min(max(int(c * grid), 0), grid - 1) for c in (thing.x, thing.y))
        said = [thing.colour, thing.kind, thing.size, *_motion(world, thing, frame)]
        if thing.event is not None:
            said.append(world.events[thing.event].does.split()[0])
        words[row * grid + column, [WORDS.index(word) for word in said]] = 1
    happenings = np.zeros((2, len(WORDS)), np.uint8)
    for event in world.events:
        said = [WORDS.index(word) for word in event.sentence.rstrip(".").split() if word in WORDS]
        if event.start_frame <= frame < event.end_frame:
            happenings[0, said] = 1
        elif event.end_frame == frame:
            happenings[1, said] = 1
    return words, happenings


def _motion(world: World, thing: Thing, frame: int) -> list[str]:
    """Which way a thing has moved since the frame before: what two frames show, whatever the event turns out to be."""
    before, now = world.pose(thing.object, frame - 1.0), world.pose(thing.object, float(frame))
    if before is None or now is None:
        return []
    right, down = now.x - before.x, now.y - before.y
    ways = []
    if abs(right) > MOVED:
        ways.append("right" if right > 0 else "left")
    if abs(down) > MOVED:
        ways.append("bottom" if down > 0 else "top")
    return ways
