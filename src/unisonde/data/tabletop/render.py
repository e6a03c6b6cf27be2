"""Drawing a Tabletop scene: anti-aliased shapes, plain or textured, on a plain background, 32 x 32 RGB."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

from unisonde.data.tabletop.scene import BACKGROUNDS, CELL, COLOURS, PITCH, SHADE, SIDE, SIZES, Scene

_SUBPIXELS = 8  # each pixel is covered in proportion to how many of its 8 x 8 points lie inside the shape


@cache
def coverage(shape: str, size: str) -> np.ndarray:
    """How much of each pixel of a cell the shape covers: (CELL, CELL), 0 to 1."""
    centre = CELL / 2
    half = SIZES[size] / 2
    points = (np.arange(CELL * _SUBPIXELS) + 0.5) / _SUBPIXELS - centre
    y, x = np.meshgrid(points / half, points / half, indexing="ij")  # the shape's box is [-1, 1] x [-1, 1], y downwards
    radius = np.hypot(x, y)
    box = (abs(x) <= 1) & (abs(y) <= 1)
    inside = {
        "square": box,
        "circle": radius <= 1,
        "triangle": box & (abs(x) <= (y + 1) / 2),
        "cross": box & (np.minimum(abs(x), abs(y)) <= 1 / 3),
        "ring": (radius <= 1) & (radius >= 0.5),
    }[shape]
    return inside.reshape(CELL, _SUBPIXELS, CELL, _SUBPIXELS).mean((1, 3))


@cache
def brightness(texture: str) -> np.ndarray:
    """What a texture makes of the colour of each pixel of a cell: (CELL, CELL), 1 or `SHADE`."""
    y, x = np.indices((CELL, CELL))
    darker = {
        "plain": np.zeros((CELL, CELL), bool),
        "striped": y % 2 == 1,
        "dotted": (y % 2 == 1) & (x % 2 == 1),
        "checked": (y + x) % 2 == 1,
    }[texture]
    return np.where(darker, SHADE, 1.0)


def render_array(scene: Scene) -> np.ndarray:
    """The picture of a scene: (32, 32, 3) uint8."""
    picture = np.empty((SIDE, SIDE, 3))
    picture[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        top, left = PITCH * thing.row, PITCH * thing.column
        cell = picture[top : top + CELL, left : left + CELL]
        mask = coverage(thing.shape, thing.size)[:, :, None]
        colour = brightness(thing.texture)[:, :, None] * np.array(COLOURS[thing.colour])
        cell[:] = mask * colour + (1 - mask) * cell
    return picture.round().astype(np.uint8)


def render(scene: Scene) -> Image.Image:
    """The picture of a scene: 32 x 32 RGB."""
    return Image.fromarray(render_array(scene))
