"""Painting a world: signed distances in bounding boxes, over a precomputed background.

A frame depends on the world, the size and the time alone: any process can draw any frame at any size, in any order.
"""

import math

import numpy as np

from jstream.data.world.scene import Pose, World, generator

RGB = {
    "red": (224, 38, 38),
    "yellow": (248, 214, 32),
    "green": (36, 180, 60),
    "blue": (40, 92, 240),
    "purple": (158, 52, 206),
    "white": (246, 246, 246),
}
_RGB = {name: np.array(value, np.float32) for name, value in RGB.items()}
_NOTCH = np.array((16, 16, 16), np.float32)
# Where the dark dot sits that lets a spin show, and its radius, in radii.
NOTCH = {
    "circle": (0.62, 0.25),
    "square": (0.56, 0.25),
    "triangle": (0.58, 0.24),
    "star": (0.46, 0.25),
    "ring": (0.76, 0.25),
}
EXTENT = 1.3  # half the bounding box, in radii: the farthest corner of any kind
MARGIN = 0.03  # background beyond the frame, for the camera shake
NOISE_FIELDS = 1 << 12  # extra noise values: frames start at different ones


def distance(kind: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to the edge of a kind, negative inside; x [.., W], y [H, ..] from the centre, y down."""
    if kind == "circle":
        return np.sqrt(x * x + y * y) - radius
    if kind == "ring":
        return np.abs(np.sqrt(x * x + y * y) - 0.74 * radius) - 0.26 * radius
    if kind == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.89 * radius
    if kind == "triangle":
        return np.maximum(np.abs(x) * 0.8660254 - 0.5 * y, y) - 0.62 * radius
    # A star folds onto half of one of its five points, where its edge is a straight line.
    outer, inner = 1.2 * radius, 0.55 * radius
    x, y = np.abs(x), -y
    for kx, ky in ((0.809017, -0.587785), (-0.809017, -0.587785)):
        fold = 2 * np.maximum(kx * x + ky * y, 0)
        x, y = x - fold * kx, y - fold * ky
    x = np.abs(x)
    ax, ay = inner * 0.587785, inner * 0.809017 - outer
    return (ax * (y - outer) - ay * x) / math.hypot(ax, ay)


def _texture(name: str, u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Two states of a texture, each [H, W] in about -1..1, on coordinates u [1, W] and v [H, 1]."""
    angle, frequency, sharp = rng.uniform(0, 2 * np.pi), rng.uniform(2, 5), rng.uniform(1, 4)
    phase = rng.uniform(0, 2 * np.pi, 2)
    states = []
    for state in range(2):
        a = angle + 0.5 * state
        along, across = u * np.cos(a) + v * np.sin(a), v * np.cos(a) - u * np.sin(a)
        if name == "gradient":
            values = 1.4 * (along - np.cos(a) / 2 - np.sin(a) / 2)
        elif name == "stripes":
            values = np.tanh(sharp * np.sin(2 * np.pi * frequency * along + phase[state]))
        elif name == "checker":
            waves = [np.sin(2 * np.pi * frequency * c + p) for c, p in ((along, phase[state]), (across, phase[0]))]
            values = np.tanh(sharp * 2 * waves[0] * waves[1])
        elif name == "blobs":
            x, y, r, sign = rng.random((4, 8, 1, 1))
            bumps = np.exp(-((u - x) ** 2 + (v - y) ** 2) / (0.08 + 0.1 * r) ** 2)
            values = np.tanh((bumps * np.sign(sign - 0.5)).sum(0))
        else:
            grid = rng.uniform(-1.4, 1.4, (6, 6))
            away = [np.clip(np.arange(6) - 5 * c.reshape(-1, 1), -1, 1) for c in (v, u)]
            rows, columns = (np.cos(a * np.pi / 2) ** 2 for a in away)
            values = rows @ grid @ columns.T
        states.append(values)
    return states


class Renderer:
    """Draws frames of one world at one size; holds its background and noise.

    Args:
        world: what to draw.
        size: side of the frames in pixels.
    """

    def __init__(self, world: World, size: int):
        if size < 1:
            raise ValueError(f"expected a frame size of at least 1 pixel, found {size}")
        self.world, self.size = world, size
        rng = generator(world.seed, world.index, 1)
        backdrop = world.backdrop
        self._margin = math.ceil(MARGIN * size)
        coordinates = (np.arange(-self._margin, size + self._margin) + 0.5) / size
        dark, light = np.array(backdrop.dark), np.array(backdrop.light)
        first, second = (
            (dark + (light - dark) * (values[..., None] + 1) / 2).astype(np.float32)
            for values in _texture(backdrop.texture, coordinates[None, :], coordinates[:, None], rng)
        )
        self._base, self._change = first, second - first
        noise = rng.standard_normal(size * size * 3 + NOISE_FIELDS, np.float32)
        self._noise = noise * np.float32(backdrop.noise) + np.float32(0.5)  # the half rounds
        self._pixels = np.arange(size, dtype=np.float32) + np.float32(0.5)

    def __call__(self, time: float) -> np.ndarray:
        """The picture at `time` seconds: uint8 [size, size, 3]."""
        world, size, backdrop = self.world, self.size, self.world.backdrop
        dx, dy = world.shift(time)
        top, left = self._margin - round(dy * size), self._margin - round(dx * size)
        crop = np.s_[top : top + size, left : left + size]
        image = self._change[crop] * np.float32(0.5 - 0.5 * math.cos(2 * math.pi * time / backdrop.period))
        image += self._base[crop]

        for speck in backdrop.specks:
            # Specks wrap round a little outside the frame.
            x, y = ((p + v * time + 0.1) % 1.2 - 0.1 for p, v in zip(speck.place, speck.velocity))
            self._speck(image, (x + dx) * size, (y + dy) * size, speck)
        poses = [(world.pose(i, time), thing.kind) for i, thing in enumerate(world.objects)]
        there = [(pose, kind) for pose, kind in poses if pose is not None]
        for pose, kind in sorted(there, key=lambda p: p[0].layer):
            self._object(image, kind, pose, (pose.x + dx) * size, (pose.y + dy) * size)

        amplitude, speed, phase = backdrop.lighting
        image *= np.float32(1 - amplitude * (0.5 + 0.5 * math.sin(speed * time + phase)))
        # Frames take the noise from different places: a generator per frame would cost more than all the drawing.
        moment = round(1000 * time)
        offset = (moment * 2654435761 + world.index * 40503 + world.seed) % 4294967296 * NOISE_FIELDS >> 32
        image += self._noise[offset : offset + image.size].reshape(image.shape)
        np.maximum(image, 0, out=image)
        np.minimum(image, 255, out=image)
        return image.astype(np.uint8)

    def _box(self, x: float, y: float, reach: float):
        """The part of the frame within `reach` pixels of (x, y) and its pixel centres from there; None if outside."""
        x0, x1 = max(0, math.floor(x - reach)), min(self.size, math.ceil(x + reach))
        y0, y1 = max(0, math.floor(y - reach)), min(self.size, math.ceil(y + reach))
        if x0 >= x1 or y0 >= y1:
            return None
        return np.s_[y0:y1, x0:x1], self._pixels[None, x0:x1] - np.float32(x), self._pixels[y0:y1, None] - np.float32(y)

    def _speck(self, image: np.ndarray, x: float, y: float, speck) -> None:
        length, radius = speck.length * self.size, speck.radius * self.size
        box = self._box(x, y, length + radius + 1)
        if box is not None:
            where, px, py = box
            speed = math.hypot(*speck.velocity) or 1.0
            ux, uy = speck.velocity[0] / speed, speck.velocity[1] / speed
            along = np.clip(px * ux + py * uy, -length, length)
            alpha = np.clip(radius + 0.5 - np.hypot(px - along * ux, py - along * uy), 0, 1)
            image[where] += (alpha * np.float32(speck.level))[..., None]

    def _object(self, image: np.ndarray, kind: str, pose: Pose, x: float, y: float) -> None:
        radius = pose.radius * self.size
        box = self._box(x, y, EXTENT * radius + 1)
        if box is None:
            return
        where, px, py = box
        cos, sin = math.cos(pose.angle), math.sin(pose.angle)
        qx, qy = px * cos + py * sin, py * cos - px * sin
        body = np.clip(0.5 - distance(kind, qx, qy, radius), 0, 1)
        place, dot = NOTCH[kind]
        qy += place * radius
        notch = np.clip(dot * radius + 0.5 - np.sqrt(qx * qx + qy * qy), 0, 1)
        colour = _RGB[pose.old] + np.float32(pose.mix) * (_RGB[pose.new] - _RGB[pose.old])
        paint = colour + notch[..., None] * (_NOTCH - colour)
        paint -= image[where]
        paint *= body[..., None]
        image[where] += paint
