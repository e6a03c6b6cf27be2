"""The Tabletop judge: that it reads every scene, drawn or a little damaged; that it refuses garbage; that its verdicts are right.

Scenes are drawn by `render`, of which the judge knows nothing, so that each is a test of the other.
"""

from __future__ import annotations

import ast
import inspect
import io
import math
import random
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter

from unisonde.data.tabletop.judge import _KINDS, Seen, area, judge, read, read_all
from unisonde.data.tabletop.render import coverage, render, render_array
from unisonde.data.tabletop.scene import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    HELD_OUT,
    PITCH,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    Thing,
    draw_scene,
    places,
)

Damage = Callable[[np.ndarray], np.ndarray]

things = st.builds(
    Thing,
    st.integers(0, 2),
    st.integers(0, 2),
    st.sampled_from(SHAPES),
    st.sampled_from(list(COLOURS)),
    st.sampled_from(list(SIZES)),
)
scenes = st.builds(
    Scene, st.lists(things, max_size=9, unique_by=lambda thing: thing.cell).map(tuple), st.sampled_from(list(BACKGROUNDS))
)

ONES = [
    Scene((Thing(row, column, shape, colour, size),), background)
    for row, column in places()
    for shape in SHAPES
    for colour in COLOURS
    for size in SIZES
    for background in BACKGROUNDS
]
CENTRED = [scene for scene in ONES if scene.things[0].cell == (1, 1)]


def drawn_scenes(each: int) -> list[Scene]:
    rng = random.Random(0)
    return [draw_scene(rng, split, count) for split in SPLITS for count in (1, 2, 3) for _ in range(each)]


def crowded_scenes(count: int) -> list[Scene]:
    rng = random.Random(1)
    return [
        Scene(
            tuple(
                Thing(*cell, rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.choice(list(SIZES)))
                for cell in rng.sample(list(places()), rng.randint(0, 9))
            ),
            rng.choice(list(BACKGROUNDS)),
        )
        for _ in range(count)
    ]


# What is drawn is read


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("shape", "share"), [("square", 1), ("circle", math.pi / 4), ("triangle", 1 / 2), ("cross", 5 / 9), ("ring", 3 * math.pi / 16)]
)
def test_the_area_of_a_shape_is_the_closed_form(shape: str, size: str, share: float) -> None:
    assert area(shape, size).sum() == pytest.approx(share * SIZES[size] ** 2, rel=3e-4)


def test_the_judge_shares_no_code_with_the_renderer() -> None:
    source = inspect.getsource(sys.modules[judge.__module__])
    imported = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    assert {node.module for node in imported if (node.module or "").startswith("unisonde")} == {
        "unisonde.data.item",
        "unisonde.data.tabletop.scene",
    }
    for kind in _KINDS:  # the renderer counts 8 x 8 points a pixel
        np.testing.assert_allclose(area(*kind), coverage(*kind), atol=1 / 16)


def test_every_single_thing_is_read() -> None:
    seen = read_all(np.stack([render_array(scene) for scene in ONES]))
    assert [one.scene for one in seen] == ONES
    assert [one.background for one in seen] == [scene.background for scene in ONES]
    assert {pair for scene in ONES for pair in [(scene.things[0].shape, scene.things[0].colour)]} >= set(HELD_OUT)
    assert all(one.legible for one in seen) and max(one.residual for one in seen) < 0.3


def test_scenes_of_all_splits_and_up_to_nine_things_are_read() -> None:
    wanted = drawn_scenes(100) + crowded_scenes(600)
    seen = read_all([render(scene) for scene in wanted])
    assert all(judge(one, scene, background=True).exact for one, scene in zip(seen, wanted, strict=True))
    assert max(one.residual for one in seen) < 0.3


@given(scenes, scenes)
@settings(max_examples=60, deadline=None)
def test_a_drawing_is_exact_for_its_own_scene_and_no_other(drawn: Scene, wanted: Scene) -> None:
    picture = render(drawn)
    assert judge(picture, drawn, background=True).exact
    verdict = judge(picture, wanted)
    assert verdict.exact == (drawn.things == wanted.things) == (not verdict.wrong)
    assert judge(picture, wanted, background=True).exact == (drawn == wanted)
    assert len(drawn.things) - len(verdict.extra) == len(wanted.things) - len(verdict.missing)


def test_many_are_read_as_one() -> None:
    pictures = [render_array(scene) for scene in crowded_scenes(20)] + [np.full((32, 32, 3), 85, np.uint8)]
    for one, batched in zip(map(read, pictures), read_all(pictures), strict=True):
        assert (one.scene, one.background, one.faults) == (batched.scene, batched.background, batched.faults)
        assert one.residual == pytest.approx(batched.residual, abs=1e-9)
    assert read_all([]) == []


def test_any_mode_of_picture_is_read_and_other_sizes_are_refused() -> None:
    scene = CENTRED[0]
    assert read(render(scene).convert("RGBA")) == read(render(scene)) == read(render_array(scene))
    with pytest.raises(ValueError, match=r"\(32, 32, 3\) uint8, got \(64, 64, 3\)"):
        read(render(scene).resize((64, 64)))
    with pytest.raises(ValueError, match="float64"):
        read(render_array(scene) / 255)
    with pytest.raises(ValueError, match=r"got \(2, 32, 32, 3\)"):
        read(np.zeros((2, 32, 32, 3), np.uint8))


# What is a little damaged is read


def eight_bit(picture: np.ndarray) -> np.ndarray:
    return picture.round().clip(0, 255).astype(np.uint8)


def noise(sigma: float) -> Damage:
    rng = np.random.default_rng(0)
    return lambda picture: eight_bit(picture + rng.normal(0, sigma, picture.shape))


def blur(radius: float) -> Damage:
    return lambda picture: np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def both(radius: float, sigma: float) -> Damage:
    blurred, noisy = blur(radius), noise(sigma)
    return lambda picture: noisy(blurred(picture))


def tokenizer() -> Damage:
    """Smooth error of 4, and heavy-tailed error on single pixels: 4.3 on the mean, 25 and more on some."""
    rng = np.random.default_rng(0)

    def damage(picture: np.ndarray) -> np.ndarray:
        smooth = gaussian_filter(rng.normal(size=picture.shape), (1.5, 1.5, 0))
        return eight_bit(picture + 4 * smooth / smooth.std() + rng.laplace(0, 2.5, picture.shape))

    return damage


def jpeg(picture: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=85, subsampling="4:4:4")
    return np.asarray(Image.open(buffer))


@pytest.mark.parametrize(
    "damage",
    [noise(8), noise(13), blur(0.5), blur(0.6), blur(0.7), both(0.5, 8), both(0.6, 13), both(0.7, 13), tokenizer(), jpeg],
    ids=[
        "noise 8",
        "noise 13",
        "blur .5",
        "blur .6",
        "blur .7",
        "blur .5 noise 8",
        "blur .6 noise 13",
        "blur .7 noise 13",
        "tokens",
        "jpeg",
    ],
)
def test_a_damaged_picture_is_read(damage: Damage) -> None:
    wanted = drawn_scenes(15) + crowded_scenes(100) + random.Random(2).sample(ONES, 100)
    seen = read_all([damage(render_array(scene)) for scene in wanted])
    assert np.mean([one.scene == scene for one, scene in zip(seen, wanted, strict=True)]) >= 0.99
    assert np.mean([judge(one, scene, background=True).exact for one, scene in zip(seen, wanted, strict=True)]) >= 0.98


# Garbage is refused


def paint(scene: Scene, colour: tuple[int, int, int], ground: np.ndarray) -> np.ndarray:
    """The shapes of a scene in any colour, on any ground."""
    picture = np.array(ground, float)
    for thing in scene.things:
        cell = np.s_[PITCH * thing.row : PITCH * thing.row + CELL, PITCH * thing.column : PITCH * thing.column + CELL]
        mask = coverage(thing.shape, thing.size)[..., None]
        picture[cell] = mask * np.array(colour) + (1 - mask) * picture[cell]
    return eight_bit(picture)


def plain(scene: Scene) -> np.ndarray:
    return np.full((32, 32, 3), BACKGROUNDS[scene.background], np.uint8)


def refused(pictures: list[np.ndarray], wanted: list[Scene]) -> list[Seen]:
    seen = read_all(pictures)
    for one, scene in zip(seen, wanted, strict=True):
        assert not one.legible and one.residual > 1, (scene, one)
        assert not judge(one, scene).exact
    return seen


def test_noise_is_no_scene() -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (32, 32, 3)).astype(np.uint8) for _ in range(50)]
    seen = refused(pictures, CENTRED[:50])
    assert all(one.scene is None and one.background is None for one in seen)
    verdict = judge(pictures[0], CENTRED[0])
    assert verdict.wrong[-1] == "the background is not plain" and verdict.missing == CENTRED[0].things
    assert not any(verdict.scores.values())


@pytest.mark.parametrize("half", [np.s_[12:20, 12:16], np.s_[12:20, 16:20], np.s_[12:16, 12:20], np.s_[16:20, 12:20]])
def test_half_a_thing_is_refused(half: tuple[slice, slice]) -> None:
    pictures = [render_array(scene).copy() for scene in CENTRED]
    for picture, scene in zip(pictures, CENTRED, strict=True):
        picture[half] = BACKGROUNDS[scene.background]
    refused(pictures, CENTRED)


@pytest.mark.parametrize("colour", [(0, 200, 200), (75, 75, 75), (220, 40, 160), (130, 70, 30), (150, 220, 40), (240, 150, 180)])
def test_a_foreign_colour_is_refused(colour: tuple[int, int, int]) -> None:
    wanted = [scene for scene in CENTRED if np.abs(np.subtract(colour, BACKGROUNDS[scene.background])).max() > 75]
    assert wanted
    refused([paint(scene, colour, plain(scene)) for scene in wanted], wanted)


def test_a_shade_between_two_colours_is_refused_even_in_a_thin_shape() -> None:
    wanted = [Scene((Thing(1, 1, "ring", "orange", "small"),), background) for background in BACKGROUNDS]
    for one in refused([paint(scene, (245, 172, 36), plain(scene)) for scene in wanted], wanted):
        (fault,) = one.faults
        assert fault.startswith("the ring at middle centre has the colour (2") and fault.endswith("which is not orange")


def test_a_pale_thing_is_refused() -> None:
    """A sharp disc in half its colour is much like a blurred small ring in full colour: that must not be read."""
    refused([eight_bit(0.5 * render_array(scene) + 0.5 * plain(scene)) for scene in CENTRED], CENTRED)


@pytest.mark.parametrize("radius", [1.5, 2.0])
def test_a_smear_is_refused(radius: float) -> None:
    refused([blur(radius)(render_array(scene)) for scene in CENTRED], CENTRED)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shift", [2, 4, 6])
def test_a_thing_between_the_places_is_refused(axis: int, shift: int) -> None:
    refused([np.roll(render_array(scene), shift, axis) for scene in CENTRED], CENTRED)


def test_two_colours_in_one_thing_are_refused() -> None:
    wanted, pictures = [], []
    for scene in CENTRED:
        (thing,) = scene.things
        for other in set(COLOURS) - {thing.colour}:
            picture = render_array(scene).copy()
            picture[:, 16:] = render_array(Scene((Thing(1, 1, thing.shape, other, thing.size),), scene.background))[:, 16:]
            wanted.append(scene)
            pictures.append(picture)
    refused(pictures, wanted)


@pytest.mark.parametrize("ends", [(250, 20), (250, 150), (150, 20), (250, 210)])
def test_a_gradient_is_no_background(ends: tuple[int, int]) -> None:
    ramp = np.linspace(*ends, 32)[:, None, None] * np.ones((32, 32, 3))
    refused([paint(scene, COLOURS["red"], ramp) for scene in CENTRED], CENTRED)


def test_a_texture_is_no_background() -> None:
    checks = 45.0 * (1 - 2 * (np.indices((32, 32)).sum(0) % 2))[..., None]
    refused([eight_bit(plain(scene) + checks) for scene in CENTRED[:3]], [Scene((), "grey")] * 3)


def test_a_foreign_background_is_named_and_what_stands_on_it_is_read() -> None:
    scene = Scene((Thing(0, 2, "ring", "blue", "large"), Thing(2, 0, "square", "red", "small")), "white")
    picture = render_array(scene).copy()
    picture[(picture == 250).all(-1)] = (200, 220, 255)
    seen = read(picture)
    assert seen.background is None and not seen.legible
    assert "the background has the colour (200, 220, 255), which is none of white, grey, black" in seen.faults
    assert judge(seen, scene).scores["shapes"] == 1 and not judge(seen, scene).exact


@pytest.mark.parametrize("radius", [1.5, 3.0, 6.0])
def test_a_blob_is_refused(radius: float) -> None:
    y, x = np.indices((32, 32))
    blob = np.hypot(y - 10.2, x - 9.7) < radius
    pictures = [render_array(scene).copy() for scene in CENTRED]
    for picture in pictures:
        picture[blob] = (90, 10, 200)
    refused(pictures, CENTRED)


def test_a_stray_pixel_is_refused_and_found() -> None:
    picture = render_array(CENTRED[0]).copy()
    picture[9, 27] = 255 - picture[9, 27]
    assert read(picture).faults == ("there is a stray mark beside top right",)
    picture = render_array(CENTRED[0]).copy()
    picture[27, 3] = 255 - picture[27, 3]
    assert read(picture).faults == ("what is at bottom left is no known thing",)


# Verdicts

RED = Thing(0, 0, "square", "red", "large")
RING = Thing(1, 1, "ring", "green", "small")
CROSS = Thing(2, 2, "cross", "purple", "large")
WANTED = Scene((RED, RING, CROSS), "white")


def test_an_exact_picture_scores_one_everywhere() -> None:
    verdict = judge(render(WANTED), WANTED, background=True)
    assert verdict.exact and verdict.seen.scene == WANTED and set(verdict.scores.values()) == {1.0}
    assert verdict.wrong == verdict.missing == verdict.extra == ()


@pytest.mark.parametrize(
    ("drawn", "lost", "sentence"),
    [
        (Thing(0, 0, "circle", "red", "large"), "shapes", "the circle at top left should be a square"),
        (Thing(0, 0, "square", "blue", "large"), "colours", "the square at top left is blue, wanted red"),
        (Thing(0, 0, "square", "red", "small"), "sizes", "the square at top left is small, wanted large"),
        (Thing(2, 0, "square", "red", "large"), "places", "the large red square is at bottom left, wanted at top left"),
    ],
)
def test_one_wrong_attribute_costs_that_attribute_alone(drawn: Thing, lost: str, sentence: str) -> None:
    verdict = judge(render(Scene((drawn, RING, CROSS), "white")), WANTED)
    assert not verdict.exact and verdict.wrong == (sentence,) and verdict.missing == verdict.extra == ()
    assert verdict.scores == {name: 1.0 for name in verdict.scores} | {"exact": 0.0, lost: 2 / 3}


def test_a_thing_is_missing() -> None:
    verdict = judge(render(Scene((RED, CROSS), "white")), WANTED)
    assert verdict.missing == (RING,) and verdict.wrong == ("there is no small green ring at middle centre",)
    assert verdict.scores == dict.fromkeys(("shapes", "colours", "sizes", "places"), 2 / 3) | {
        "exact": 0.0,
        "count": 0.0,
        "background": 1.0,
        "legible": 1.0,
    }


def test_a_thing_is_extra() -> None:
    extra = Thing(0, 2, "triangle", "yellow", "small")
    verdict = judge(render(Scene((RED, RING, CROSS, extra), "white")), WANTED)
    assert verdict.extra == (extra,) and verdict.wrong == ("there is an extra small yellow triangle at top right",)
    assert not verdict.exact and not verdict.count and verdict.shapes == 1


def test_swapped_things_are_in_the_wrong_places_only() -> None:
    drawn = Scene((Thing(1, 1, "square", "red", "large"), Thing(0, 0, "ring", "green", "small"), CROSS), "white")
    verdict = judge(render(drawn), WANTED)
    assert (verdict.shapes, verdict.colours, verdict.sizes, verdict.places) == (1, 1, 1, 1 / 3)
    assert len(verdict.wrong) == 2 and not verdict.exact


def test_the_background_counts_if_it_is_asked_for() -> None:
    picture = render(Scene(WANTED.things, "black"))
    assert judge(picture, WANTED).exact and not judge(picture, WANTED).background
    strict = judge(picture, WANTED, background=True)
    assert not strict.exact and strict.wrong == ("the background is black, wanted white",)


def test_an_empty_table() -> None:
    empty = Scene((), "grey")
    assert judge(render(empty), empty, background=True).exact
    assert judge(render(WANTED), empty).extra == WANTED.things
    assert judge(render(empty), WANTED).missing == WANTED.things


def test_a_clean_thing_beside_a_spoilt_one_keeps_its_score() -> None:
    picture = render_array(WANTED).copy()
    picture[24:32, 24:28] = 250
    verdict = judge(picture, WANTED)
    assert not verdict.exact and verdict.missing == (CROSS,) and verdict.shapes == 2 / 3
    assert "what is at bottom right is no known thing" in verdict.wrong
