"""The Tabletop world: what there is, and which scenes belong to which split.

A scene is one to three coloured shapes on a 3 x 3 grid, on a plain background. The shapes are plain, too, unless a texture is asked
for (`textured`). This file holds the facts of the world (words, colours, geometry) and nothing that draws, reads or writes about it:
`render` draws, `judge` reads pixels, `grammar` speaks.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

RGB = tuple[int, int, int]

SHAPES = ("square", "circle", "triangle", "cross", "ring")
COLOURS: dict[str, RGB] = {
    "red": (215, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (245, 220, 60),
    "green": (40, 160, 70),
    "blue": (45, 90, 215),
    "purple": (150, 60, 180),
}
SIZES: dict[str, int] = {"small": 6, "large": 8}
"""Side of the box that a shape fills, in pixels."""
TEXTURES = ("plain", "striped", "dotted", "checked")
"""Striped: every second row of pixels is darker; dotted: every second pixel of these rows; checked: every second pixel of each row."""
SHADE = 0.5
"""Brightness of the darker pixels of a texture, as a share of the thing's colour."""
BACKGROUNDS: dict[str, RGB] = {"white": (250, 250, 250), "grey": (150, 150, 150), "black": (20, 20, 20)}
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")

SIDE = 32
"""Side of a picture, in pixels."""
CELL = 8
"""Side of a grid cell, in pixels. Cells begin at 0, 12 and 24; a shape stands in the middle of its cell."""
PITCH = 12

HELD_OUT: tuple[tuple[str, str], ...] = (("square", "yellow"), ("circle", "purple"), ("triangle", "blue"), ("cross", "orange"))
"""Shape-colour pairs that occur in the `compositional` split alone. The image tokenizer, which learns no words, sees them too."""

Split = Literal["train", "test", "compositional"]
SPLITS: tuple[Split, ...] = ("train", "test", "compositional")
TEST_SHARE = 8
"""One layout in this many belongs to `test`."""


@dataclass(frozen=True, order=True)
class Thing:
    """One shape on the table. Ordered by place: row, then column. Its texture is named by no text of the grammar."""

    row: int
    column: int
    shape: str
    colour: str
    size: str
    texture: str = "plain"

    @property
    def cell(self) -> tuple[int, int]:
        return self.row, self.column

    @property
    def place(self) -> str:
        """`top left`, `middle centre`, ..."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows: things in the order of their places, one a cell, on a plain background."""

    things: tuple[Thing, ...]
    background: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "things", tuple(sorted(self.things)))
        if len({thing.cell for thing in self.things}) != len(self.things):
            raise ValueError(f"two things in one cell: {[(t.shape, t.place) for t in self.things]}")

    @property
    def layout(self) -> str:
        """The scene without background and textures, as text: scenes with one layout are told apart by nothing a prompt must say."""
        return ";".join(f"{t.row}{t.column} {t.size} {t.colour} {t.shape}" for t in self.things)

    @property
    def split(self) -> Split:
        """The split that this scene belongs to: a function of its layout alone, so that no layout is in two splits."""
        if any((thing.shape, thing.colour) in HELD_OUT for thing in self.things):
            return "compositional"
        drawn = int.from_bytes(hashlib.sha256(self.layout.encode()).digest()[:8], "big")
        return "test" if drawn % TEST_SHARE == 0 else "train"


def places() -> Iterable[tuple[int, int]]:
    """Every cell of the grid, row by row."""
    return ((row, column) for row in range(len(ROWS)) for column in range(len(COLUMNS)))


def draw_scene(rng: random.Random, split: Split, count: int) -> Scene:
    """A random scene of `count` things that belongs to `split`."""
    cells = list(places())
    while True:
        things = tuple(
            Thing(row, column, rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(tuple(SIZES)))
            for row, column in rng.sample(cells, count)
        )
        scene = Scene(things, rng.choice(tuple(BACKGROUNDS)))
        if scene.split == split:
            return scene
