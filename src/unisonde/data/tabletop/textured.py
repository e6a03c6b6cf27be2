"""Textured Tabletop: scenes whose things are plain, striped, dotted or checked, and captions that never say so.

For the study of what a decoder can use of a picture (`unisonde.study.decoding`): the captions, from which a model may learn, name
shape, colour, place and count; texture, size and background are in the picture alone. An item's things are all alike and stand in one
column, so that every item has every label:

| label | its values |
|---|---|
| `shape`, `colour`, `size`, `texture` | what all its things are |
| `count` | one, two, three |
| `position` | the column: left, centre, right |
| `layout` | all of it but texture and background; items of one layout are kept together (`group`) |

Splits are those of the world, and know no texture: no layout of `test` occurs in `train`. Textures are opted into here; whatever
else draws Tabletop scenes draws plain ones.

`read_textured` reads a scene back from pixels. Like the judge of plain scenes, it shares the facts of `scene` with the renderer and no
code: shapes are known by their chords, textures by the picture of one cell.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Literal

import numpy as np

from unisonde.data.item import Item, Task
from unisonde.data.tabletop.grammar import NUMBERS, listing, with_article
from unisonde.data.tabletop.judge import area
from unisonde.data.tabletop.render import render
from unisonde.data.tabletop.scene import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    COLUMNS,
    PITCH,
    ROWS,
    SHADE,
    SHAPES,
    SIDE,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    draw_scene,
    places,
)

REQUEST = "Describe the picture."
"""What is asked of every picture."""

ITEMS = 400
LABELS = ("shape", "colour", "size", "texture", "count", "position")

Part = Literal["train", "test"]


def items(task: Task = "text", split: Part = "test", seed: int = 0, count: int = ITEMS) -> list[Item]:
    """Pictures of textured things that are alike, with the request to describe them.

    The category is the texture. Labels: those above; `caption`, what there is to say; `scene`.
    """
    made = []
    for number in range(count):
        name = f"textured-{seed}-{number:04d}"
        scene = alike(random.Random(f"{split}/{name}"), split, TEXTURES[number % len(TEXTURES)])
        thing = scene.things[0]
        labels = {"shape": thing.shape, "colour": thing.colour, "size": thing.size, "texture": thing.texture}
        labels |= {"count": NUMBERS[len(scene.things)], "position": COLUMNS[thing.column]}
        labels |= {"layout": scene.layout, "caption": caption(scene)}
        made.append(Item(name, thing.texture, REQUEST, render(scene), {**labels, "scene": scene}))
    return made


def alike(rng: random.Random, split: Part, texture: str) -> Scene:
    """One to three things of one look in one column."""
    while True:
        shape, colour, size = rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(tuple(SIZES))
        column, rows = rng.randrange(len(COLUMNS)), rng.sample(range(len(ROWS)), rng.choice((1, 2, 3)))
        scene = Scene(tuple(Thing(row, column, shape, colour, size, texture) for row in rows), rng.choice(tuple(BACKGROUNDS)))
        if scene.split == split:
            return scene


def mixed(rng: random.Random, split: Part) -> Scene:
    """One to three things of any look anywhere, each with a texture of its own."""
    scene = draw_scene(rng, split, rng.choice((1, 2, 3)))
    return replace(scene, things=tuple(replace(thing, texture=rng.choice(TEXTURES)) for thing in scene.things))


# ---------------------------------------------------------------------------------------------------------------------- captions


def caption(scene: Scene) -> str:
    """`two shapes: a red circle at the top left and an orange ring at the middle left.` Neither texture nor size is said."""
    number = len(scene.things)
    said = [f"{with_article(f'{thing.colour} {thing.shape}')} at the {thing.place}" for thing in scene.things]
    return f"{NUMBERS[number]} shape{'' if number == 1 else 's'}: {listing(said)}."


_NUMBER = re.compile(rf"\s*({'|'.join(NUMBERS[1:])}) shapes?\b", re.IGNORECASE)
_SAID = re.compile(
    rf"\ban? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) at the ({'|'.join(ROWS)}) ({'|'.join(COLUMNS)})\b", re.IGNORECASE
)


def parse_caption(text: str) -> tuple[int | None, list[tuple[str, str, str]]]:
    """The number that a caption states, None if it states none, and colour, shape and place of each thing that it names."""
    number = _NUMBER.match(text)
    said = [(colour, shape, f"{row} {column}") for colour, shape, row, column in _SAID.findall(text.lower())]
    return (NUMBERS.index(number.group(1).lower()) if number else None), said


# ----------------------------------------------------------------------------------------------------------------------- reading

_PICTURES = {
    "plain": ("........", "........"),
    "striped": ("........", "########"),
    "dotted": ("........", ".#.#.#.#"),
    "checked": (".#.#.#.#", "#.#.#.#."),
}
"""The first two rows of a cell of each texture, which repeat: `#` is darker."""

_TOLERATED = 24
"""How far a pixel may be from the scene that was read, redrawn, in any channel."""

_LOOKS = tuple(itertools.product(SHAPES, COLOURS, SIZES, TEXTURES))


@cache
def _cells() -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel of a cell each look covers, (looks, 8, 8, 1), and with which colour, (looks, 8, 8, 3)."""
    assert set(_PICTURES) == set(TEXTURES)
    covered = np.stack([area(shape, size) for shape, _, size, _ in _LOOKS])[..., None]
    darker = {name: np.array([list(row) for row in rows * (CELL // 2)]) == "#" for name, rows in _PICTURES.items()}
    colours = [
        np.where(darker[texture][..., None], SHADE, 1.0) * np.array(COLOURS[colour], float) for _, colour, _, texture in _LOOKS
    ]
    return covered, np.stack(colours)


def read_textured(picture: np.ndarray) -> Scene:
    """The scene that explains a picture (32, 32, 3) best, by least squares.

    Raises:
        ValueError: the picture is of another shape, or is no clean picture of textured things on a plain background.
    """
    if picture.shape != (SIDE, SIDE, 3):
        raise ValueError(f"a Tabletop picture is of shape ({SIDE}, {SIDE}, 3), got {picture.shape}")
    pixels = picture.astype(np.float64)
    between = np.arange(SIDE) % PITCH >= CELL
    level = np.median(pixels[between[:, None] | between], axis=0)
    background = min(BACKGROUNDS, key=lambda name: abs(level - BACKGROUNDS[name]).max())
    ground = np.array(BACKGROUNDS[background], float)
    covered, colours = _cells()
    drawn = covered * colours + (1 - covered) * ground
    left = pixels - ground
    things = []
    for row, column in places():
        here = np.s_[PITCH * row : PITCH * row + CELL, PITCH * column : PITCH * column + CELL]
        errors = ((drawn - pixels[here]) ** 2).sum((1, 2, 3))
        best = int(errors.argmin())
        if errors[best] < (left[here] ** 2).sum():
            shape, colour, size, texture = _LOOKS[best]
            things.append(Thing(row, column, shape, colour, size, texture))
            left[here] = pixels[here] - drawn[best]
    if (worst := abs(left).max()) > _TOLERATED:
        raise ValueError(f"the picture is no clean scene of textured things: a pixel is {worst:.0f} of 255 from the nearest one")
    return Scene(tuple(things), background)


def read_textures(pictures: Sequence[np.ndarray]) -> list[dict[tuple[int, int], str]]:
    """The texture in each occupied cell, (row, column), of pictures (32, 32, 3)."""
    return [{thing.cell: thing.texture for thing in read_textured(picture).things} for picture in pictures]
