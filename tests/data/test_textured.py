"""Textured Tabletop: textures that can be told from pixels, captions that never name them, and plain scenes that stay as they were."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from unisonde.data.catalogue import data_digest
from unisonde.data.tabletop import items as plain_items
from unisonde.data.tabletop import judge
from unisonde.data.tabletop.grammar import describe
from unisonde.data.tabletop.render import render_array
from unisonde.data.tabletop.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES, Scene, Thing, draw_scene
from unisonde.data.tabletop.textured import (
    LABELS,
    alike,
    caption,
    items,
    mixed,
    parse_caption,
    read_textured,
    read_textures,
)


def test_plain_scenes_are_what_they_were() -> None:
    """Pictures, words and splits from before there were textures."""
    known = {
        ("image", "test"): "b30542e52a7092b6",
        ("image", "train"): "1051fbb40a88ebbe",
        ("image", "compositional"): "e5df7fedb294e27f",
        ("text", "test"): "1fc06a6a327234b1",
        ("text", "train"): "f53055d1df1d0959",
        ("text", "compositional"): "f8d1658afe0a830f",
    }
    assert {key: data_digest(plain_items(*key, 0, 20))[:16] for key in known} == known  # type: ignore[arg-type]
    rng = random.Random(3)
    scenes = [draw_scene(rng, "train", rng.choice((1, 2, 3))) for _ in range(200)]
    assert all(thing.texture == "plain" for scene in scenes for thing in scene.things)
    pixels = hashlib.sha256(b"".join(render_array(scene).tobytes() for scene in scenes)).hexdigest()
    assert pixels[:16] == "d5fef82de1ffac43"


def test_a_texture_changes_pixels_and_nothing_else() -> None:
    thing = Thing(1, 2, "ring", "red", "small")
    for texture in TEXTURES[1:]:
        scene, other = Scene((thing,), "grey"), Scene((replace(thing, texture=texture),), "grey")
        assert scene.layout == other.layout and scene.split == other.split and describe(scene) == describe(other)
        assert caption(scene) == caption(other)
        assert not np.array_equal(render_array(scene), render_array(other))


def test_every_look_is_told_from_pixels() -> None:
    """Every shape, colour, size and texture on every background, in every cell of the picture in turn."""
    cells = itertools.cycle(itertools.product(range(3), range(3)))
    for shape, colour, size, texture, background in itertools.product(SHAPES, COLOURS, SIZES, TEXTURES, BACKGROUNDS):
        scene = Scene((Thing(*next(cells), shape, colour, size, texture),), background)
        assert read_textured(render_array(scene)) == scene


def test_random_scenes_are_told_from_pixels() -> None:
    rng = random.Random(0)
    scenes = [mixed(rng, "test") for _ in range(150)] + [alike(rng, "test", texture) for texture in TEXTURES for _ in range(20)]
    assert [read_textured(render_array(scene)) for scene in scenes] == scenes
    seen = read_textures([render_array(scene) for scene in scenes])
    assert seen == [{thing.cell: thing.texture for thing in scene.things} for scene in scenes]


def test_a_texture_is_to_be_seen_on_small_things() -> None:
    """Three or more pixels of the smallest things differ by 40 of 255 or more between any two textures."""
    for shape, colour, background in itertools.product(SHAPES, COLOURS, BACKGROUNDS):
        pictures = [
            render_array(Scene((Thing(0, 0, shape, colour, "small", texture),), background)).astype(int) for texture in TEXTURES
        ]
        for a, b in itertools.combinations(pictures, 2):
            assert (abs(a - b).max(-1) >= 40).sum() >= 3, (shape, colour, background)


def test_small_errors_are_read_and_large_ones_refused() -> None:
    rng, noise = random.Random(1), np.random.default_rng(1)
    for _ in range(40):
        scene = mixed(rng, "train")
        picture = render_array(scene)
        soft = (picture + noise.uniform(-12, 12, picture.shape)).clip(0, 255).round().astype(np.uint8)
        assert read_textured(soft) == scene
        spoilt = picture.copy()
        thing = scene.things[0]
        spoilt[12 * thing.row + 2 : 12 * thing.row + 6, 12 * thing.column + 2 : 12 * thing.column + 6] = (0, 255, 255)
        with pytest.raises(ValueError, match="no clean scene of textured things"):
            read_textured(spoilt)
    with pytest.raises(ValueError, match=r"of shape \(32, 32, 3\), got \(16, 16, 3\)"):
        read_textured(np.zeros((16, 16, 3), np.uint8))


def test_the_judge_of_plain_scenes_still_knows_them() -> None:
    """A plain scene of the textured world is an ordinary one; a texture makes the judge find fault."""
    rng = random.Random(2)
    for _ in range(20):
        scene = alike(rng, "test", "plain")
        assert judge(render_array(scene), scene, background=True).exact
        textured = replace(scene, things=tuple(replace(thing, texture="checked") for thing in scene.things))
        assert not judge(render_array(textured), scene).exact


# Captions


def test_captions_say_shape_colour_place_and_count_alone() -> None:
    rng = random.Random(4)
    for _ in range(300):
        scene = mixed(rng, "train")
        text = caption(scene)
        number, said = parse_caption(text)
        assert number == len(scene.things) and said == [(thing.colour, thing.shape, thing.place) for thing in scene.things]
        assert not set(re.findall(r"\w+", text)) & {*SIZES, *TEXTURES, *BACKGROUNDS}
    two = Scene((Thing(0, 0, "ring", "orange", "small", "dotted"), Thing(2, 1, "cross", "red", "large")), "white")
    assert caption(two) == "two shapes: an orange ring at the top left and a red cross at the bottom centre."
    assert parse_caption(" Two shapes: An orange ring at the top left") == (2, [("orange", "ring", "top left")])
    assert parse_caption("a picture") == (None, [])


# Items


def test_items_have_every_label_and_belong_to_their_split() -> None:
    made = items(count=240)
    assert len({item.id for item in made}) == 240
    for item in made:
        scene = item.labels["scene"]
        looks = {(thing.shape, thing.colour, thing.size, thing.texture) for thing in scene.things}
        assert looks == {tuple(item.labels[name] for name in ("shape", "colour", "size", "texture"))}
        assert item.labels["count"] == ("one", "two", "three")[len(scene.things) - 1]
        assert {thing.place.split()[1] for thing in scene.things} == {item.labels["position"]}
        assert item.labels["layout"] == scene.layout and scene.split == "test" and item.category == item.labels["texture"]
        assert item.labels["caption"] == caption(scene) and item.prompt == "Describe the picture."
        assert read_textured(np.asarray(item.picture())) == scene
    values = {name: Counter(item.labels[name] for item in made) for name in LABELS}
    assert {name: len(held) for name, held in values.items()} == {
        "shape": 5,
        "colour": 6,
        "size": 2,
        "texture": 4,
        "count": 3,
        "position": 3,
    }
    assert set(values["texture"].values()) == {60}
    # No label is rare, and each of the others stands with every texture.
    assert all(min(held.values()) >= 12 for held in values.values())
    for name in LABELS:
        pairs = {(item.labels[name], item.labels["texture"]) for item in made}
        assert len(pairs) == 4 * len(values[name]) or name == "texture"


def test_no_layout_is_in_two_splits_and_seeds_matter() -> None:
    test, train = ({item.labels["layout"] for item in items(split=split, count=200)} for split in ("test", "train"))
    assert not test & train
    first, again, other = items(count=8), items(count=8), items(seed=1, count=8)
    assert data_digest(first) == data_digest(again) != data_digest(other)
