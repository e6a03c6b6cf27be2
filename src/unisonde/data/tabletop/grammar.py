"""The language of Tabletop: descriptions of scenes, prompts that a scene follows from, questions with answers.

Text prompts come in the four categories of T2I-CoReBench, questions about a picture in the six of MMBench:

| category | an example |
|---|---|
| composition | a large red circle at the top left and a small blue square just below it |
| deductive | every ring is green. draw a small ring at the top right. |
| inductive | a small red square turns into a large red square. a small blue ring turns in the same way: draw the result ... |
| abductive | ... and a small ring at the top left that has the colour of red, green and blue that neither of the two squares has |
| attribute | what colour is the circle? |
| logic | if every red shape were taken away, how many shapes would be left? |
| relation | is the circle above the square? |
| coarse | how many shapes are there? |
| single-instance | where is the red shape? |
| cross-instance | do the circle and the square have the same size? |

Every answer first says which things the question is about, or describes the picture where it is about all of it, and then concludes, so
that a response has 16 tokens and more; `parse` and `conclusion` read it back. Nothing here knows how a scene is drawn.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unisonde.data.tabletop.scene import (
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    HELD_OUT,
    ROWS,
    SHAPES,
    SIZES,
    Scene,
    Split,
    Thing,
    draw_scene,
)

NUMBERS = ("none", "one", "two", "three")
TEXT_CATEGORIES = ("composition", "deductive", "inductive", "abductive")
IMAGE_CATEGORIES = ("attribute", "logic", "relation", "coarse", "single-instance", "cross-instance")
CAPTION_REQUESTS = ("describe the picture.", "describe this image.", "what does the picture show?", "what is in the picture?")


@dataclass(frozen=True)
class Prompt:
    """A text that a scene follows from. `background` says whether the text names the background."""

    text: str
    category: str
    scene: Scene
    background: bool


@dataclass(frozen=True)
class Question:
    """A question about a scene, its answer, and the answers that it could have had by its form (for the chance level).

    `about` holds the things that one has to look at, in the order of the question; None stands for the picture as a whole.
    """

    text: str
    category: str
    answer: str
    options: tuple[str, ...]
    about: tuple[Thing, ...] | None = None


# ---------------------------------------------------------------------------------------------------------------- descriptions


def phrase(thing: Thing) -> str:
    """`a large red circle at the top left`."""
    return f"a {thing.size} {thing.colour} {thing.shape} at the {thing.place}"


def with_article(noun: str) -> str:
    """`a red circle`, `an orange circle`."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def listing(parts: Sequence[str]) -> str:
    """`x`, `x and y`, `x, y and z`."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def describe(scene: Scene, background: bool = True) -> str:
    """The full description of a scene, things in the order of their places; `background=False` leaves the background open."""
    number = len(scene.things)
    what = f"{NUMBERS[number]} shape{'' if number == 1 else 's'} on a {scene.background if background else 'plain'} background"
    return f"the picture shows {what}: {listing([phrase(thing) for thing in scene.things])}."


def answer(scene: Scene, question: Question) -> str:
    """What matters, then what follows: `at the top left there is a small red ring. so the answer is red.`

    Where the picture as a whole matters, its description takes the place of the things.
    """
    if question.about is None:
        seen = describe(scene)
    elif question.about:
        there = [f"at the {thing.place} there is a {thing.size} {thing.colour} {thing.shape}" for thing in question.about]
        seen = f"{listing(there)}."
    else:
        seen = "there is no such shape anywhere in this picture."
    return f"{seen} so the answer is {question.answer}."


_THING = re.compile(
    rf"\ba ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) at the ({'|'.join(ROWS)}) ({'|'.join(COLUMNS)})\b"
)
_BACKGROUND = re.compile(rf"\bon a ({'|'.join(BACKGROUNDS)}) background\b")
_CONCLUSION = re.compile(r"\bso the answer is ([a-z ]+?)\s*\.?\s*$")


def parse(text: str) -> tuple[tuple[Thing, ...], str | None]:
    """The things and the background that a description names; ((), None) where it names none."""
    things = (
        Thing(ROWS.index(row), COLUMNS.index(column), shape, colour, size)
        for size, colour, shape, row, column in _THING.findall(text)
    )
    found = _BACKGROUND.search(text)
    return tuple(sorted(things)), found.group(1) if found else None


def conclusion(text: str) -> str | None:
    """What an answer concludes, or None if it does not."""
    found = _CONCLUSION.search(text)
    return found.group(1) if found else None


# ----------------------------------------------------------------------------------------------------------------- text prompts


def prompt(rng: random.Random, split: Split, category: str, count: int | None = None) -> Prompt:
    """A random prompt of one category whose scene belongs to `split`.

    Args:
        count: the number of things, for `composition` alone; drawn if None.
    """
    while True:
        made = _composition(rng, split, count) if category == "composition" else rng.choice(_FORMS[category])(rng)
        if made is None:
            continue
        text, scene = made
        if scene.split != split or (split != "compositional" and _names_held_out(text)):
            continue
        background = rng.random() < 0.3
        return Prompt(_on(text, scene.background) if background else text, category, scene, background)


def _on(text: str, background: str) -> str:
    return text[:-1] + f", on a {background} background." if text.endswith(".") else f"{text}, on a {background} background"


def _names_held_out(text: str) -> bool:
    return any(f"{colour} {shape}" in text for shape, colour in HELD_OUT)


def _scene(rng: random.Random, things: Sequence[Thing]) -> Scene:
    return Scene(tuple(things), rng.choice(tuple(BACKGROUNDS)))


def _thing(rng: random.Random, taken: Sequence[Thing] = (), **fixed: Any) -> Thing:
    """A random thing in a free cell, some of its properties fixed."""
    while True:
        thing = Thing(rng.randrange(3), rng.randrange(3), rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(tuple(SIZES)))
        thing = replace(thing, **fixed)
        if thing.cell not in {other.cell for other in taken}:
            return thing


_STEPS = {(1, 0): "below", (-1, 0): "above", (0, 1): "to the right of", (0, -1): "to the left of"}


def _composition(rng: random.Random, split: Split, count: int | None) -> tuple[str, Scene]:
    scene = draw_scene(rng, split, count or rng.choices((1, 2, 3), (4, 4, 2))[0])
    things = rng.sample(scene.things, len(scene.things))
    parts = []
    for index, thing in enumerate(things):
        last = things[index - 1]
        step = (thing.row - last.row, thing.column - last.column)
        if index and step in _STEPS and rng.random() < 0.4:
            parts.append(f"a {thing.size} {thing.colour} {thing.shape} just {_STEPS[step]} it")
        else:
            form = rng.choice(("{a} at {p}", "{a} at {p}", "at {p} {a}", "{b}, {z}, at {p}"))
            z, c, s = thing.size, thing.colour, thing.shape
            parts.append(form.format(a=f"a {z} {c} {s}", b=with_article(f"{c} {s}"), z=z, p=f"the {thing.place}"))
    return rng.choice(("", "", "draw ", "a picture of ", "please draw ")) + listing(parts), scene


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _rule_of_shape(rng: random.Random) -> tuple[str, Scene]:
    things = [_thing(rng)]
    if rng.random() < 0.5:
        things.append(_thing(rng, things, shape=rng.choice([s for s in SHAPES if s != things[0].shape])))
    rules = [f"every {thing.shape} is {thing.colour}" for thing in things]
    asked = [f"a {thing.size} {thing.shape} at the {thing.place}" for thing in things]
    return f"{listing(rng.sample(rules, len(rules)))}. draw {listing(asked)}.", _scene(rng, things)


def _rule_of_row(rng: random.Random) -> tuple[str, Scene]:
    top, bottom = rng.sample(tuple(SIZES), 2)
    sizes = {0: top, 2: bottom}
    things: list[Thing] = []
    for _ in range(rng.choice((1, 2))):
        row = rng.choice((0, 2))
        things.append(_thing(rng, things, row=row, size=sizes[row]))
    asked = [f"{with_article(f'{thing.colour} {thing.shape}')} at the {thing.place}" for thing in things]
    return f"shapes at the top are {top} and shapes at the bottom are {bottom}. draw {listing(asked)}.", _scene(rng, things)


_PROPERTIES: dict[str, tuple[str, ...]] = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES)}


def _with(thing: Thing, name: str, value: Any) -> Thing:
    return replace(thing, **{name: value})


def _changed(rng: random.Random, thing: Thing, name: str) -> Thing:
    """The same thing with another shape, colour or size."""
    others = [value for value in _PROPERTIES[name] if value != getattr(thing, name)]
    return _with(thing, name, rng.choice(others))


def _pattern_in_line(rng: random.Random) -> tuple[str, Scene]:
    first = _thing(rng)
    second = _changed(rng, first, rng.choice(tuple(_PROPERTIES))) if rng.random() < 0.7 else first
    line = rng.randrange(3)
    cells = [(line, k) for k in range(3)] if rng.random() < 0.5 else [(k, line) for k in range(3)]
    if rng.random() < 0.5:
        cells.reverse()
    a, b, c = (replace(t, row=row, column=column) for t, (row, column) in zip((first, second, first), cells, strict=True))
    return f"{phrase(a)}, then {phrase(b)}, and the pattern goes on with one more shape at the {c.place}", _scene(rng, (a, b, c))


def _analogy(rng: random.Random) -> tuple[str, Scene]:
    name = rng.choice(tuple(_PROPERTIES))
    before = _thing(rng)
    after = _changed(rng, before, name)
    start = _with(_thing(rng), name, getattr(before, name))
    end = _with(start, name, getattr(after, name))
    say = [f"a {t.size} {t.colour} {t.shape}" for t in (before, after, start)]
    text = f"{say[0]} turns into {say[1]}. {say[2]} turns in the same way: draw the result at the {end.place}."
    return text, _scene(rng, (end,))


def _neither(rng: random.Random) -> tuple[str, Scene]:
    colours = rng.sample(tuple(COLOURS), 3)
    pair, other = rng.sample(SHAPES, 2)
    things: list[Thing] = []
    for shape, colour in zip((pair, pair, other), colours, strict=True):
        things.append(_thing(rng, things, shape=shape, colour=colour))
    a, b, c = things
    text = (
        f"{phrase(a)}, {phrase(b)} and a {c.size} {c.shape} at the {c.place} that has the colour of "
        f"{listing(rng.sample(colours, 3))} that neither of the two {_plural(pair)} has"
    )
    return text, _scene(rng, things)


def _elimination(rng: random.Random) -> tuple[str, Scene]:
    thing = _thing(rng)
    name = rng.choice(("shape", "shape", "size"))
    if name == "size":
        [other] = [size for size in SIZES if size != thing.size]
        text = f"there is {with_article(f'{thing.colour} {thing.shape}')} at the {thing.place}, and it is not {other}."
    else:
        others = rng.sample([f"not a {shape}" for shape in SHAPES if shape != thing.shape], len(SHAPES) - 1)
        text = f"there is one {thing.size} {thing.colour} shape at the {thing.place}. it is {listing(others)}."
    return text, _scene(rng, (thing,))


_FORMS: dict[str, tuple[Callable[[random.Random], tuple[str, Scene] | None], ...]] = {
    "deductive": (_rule_of_shape, _rule_of_row),
    "inductive": (_pattern_in_line, _analogy),
    "abductive": (_neither, _elimination),
}


# -------------------------------------------------------------------------------------------------------------------- questions


def _names(scene: Scene, thing: Thing, avoid: str | None = None) -> list[str]:
    """The ways to point at one thing of a scene that fit no other, none of which gives away the property `avoid`."""
    names = []
    for properties, name in (
        (("shape",), f"the {thing.shape}"),
        (("colour",), f"the {thing.colour} shape"),
        (("size",), f"the {thing.size} shape"),
        (("colour", "shape"), f"the {thing.colour} {thing.shape}"),
        (("size", "shape"), f"the {thing.size} {thing.shape}"),
        (("cell",), f"the shape at the {thing.place}"),
    ):
        same = [other for other in scene.things if all(getattr(other, p) == getattr(thing, p) for p in properties)]
        if len(same) == 1 and avoid not in properties:
            names.append(name)
    return names


def _attribute(rng: random.Random, scene: Scene) -> Question | None:
    name = rng.choice(tuple(_PROPERTIES))
    thing = rng.choice(scene.things)
    ways = _names(scene, thing, avoid=name)
    if not ways:
        return None
    target = rng.choice(ways)
    text = {"colour": f"what colour is {target}?", "size": f"what size is {target}?", "shape": f"what kind of shape is {target}?"}
    return Question(text[name], "attribute", getattr(thing, name), _PROPERTIES[name], (thing,))


_YES_NO = ("yes", "no")


def _yes_no(text: str, category: str, truth: bool, about: tuple[Thing, ...]) -> Question:
    return Question(text, category, "yes" if truth else "no", _YES_NO, about)


def _logic(rng: random.Random, scene: Scene) -> Question | None:
    name = rng.choice(tuple(_PROPERTIES))
    # Half of the time a value that occurs, so that the answer is not always "nothing changes".
    present = getattr(rng.choice(scene.things), name)
    value = present if rng.random() < 0.6 else rng.choice(_PROPERTIES[name])
    kind = value if name == "shape" else f"{value} shape"
    left = tuple(thing for thing in scene.things if getattr(thing, name) != value)
    if rng.random() < 0.5:
        text = f"if every {kind} were taken away, how many shapes would be left?"
        return Question(text, "logic", NUMBERS[len(left)], NUMBERS, left)
    return _yes_no(f"is every shape {'a ' if name == 'shape' else ''}{value}?", "logic", not left, left)


def _relation(rng: random.Random, scene: Scene) -> Question | None:
    if len(scene.things) < 2:
        return None
    a, b = rng.sample(scene.things, 2)
    ways = _names(scene, a), _names(scene, b)
    if not all(ways):
        return None
    relation, truth = rng.choice(
        (
            ("above", a.row < b.row),
            ("below", a.row > b.row),
            ("to the left of", a.column < b.column),
            ("to the right of", a.column > b.column),
        )
    )
    return _yes_no(f"is {rng.choice(ways[0])} {relation} {rng.choice(ways[1])}?", "relation", truth, (a, b))


def _coarse(rng: random.Random, scene: Scene) -> Question | None:
    if rng.random() < 0.5:
        return Question("what colour is the background?", "coarse", scene.background, tuple(BACKGROUNDS))
    return Question("how many shapes are there?", "coarse", NUMBERS[len(scene.things)], NUMBERS[1:])


def _single_instance(rng: random.Random, scene: Scene) -> Question | None:
    thing = rng.choice(scene.things)
    if rng.random() < 0.5:
        options = tuple(f"{size} {colour} {shape}" for size in SIZES for colour in COLOURS for shape in SHAPES)
        said = f"{thing.size} {thing.colour} {thing.shape}"
        return Question(f"what is at the {thing.place}?", "single-instance", said, options, (thing,))
    ways = _names(scene, thing, avoid="cell")
    if not ways:
        return None
    options = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
    return Question(f"where is {rng.choice(ways)}?", "single-instance", thing.place, options, (thing,))


def _cross_instance(rng: random.Random, scene: Scene) -> Question | None:
    name = rng.choice(tuple(_PROPERTIES))
    if rng.random() < 0.5:
        value = getattr(rng.choice(scene.things), name)
        same = tuple(thing for thing in scene.things if getattr(thing, name) == value)
        subject = f"how many {_plural(value)} are there?" if name == "shape" else f"how many shapes are {value}?"
        return Question(subject, "cross-instance", NUMBERS[len(same)], NUMBERS[1:], same)
    if len(scene.things) < 2:
        return None
    a, b = rng.sample(scene.things, 2)
    ways = _names(scene, a, avoid=name), _names(scene, b, avoid=name)
    if not all(ways):
        return None
    said = "are {} and {} of the same kind?" if name == "shape" else f"do {{}} and {{}} have the same {name}?"
    text = said.format(rng.choice(ways[0]), rng.choice(ways[1]))
    return _yes_no(text, "cross-instance", getattr(a, name) == getattr(b, name), (a, b))


_QUESTIONS: dict[str, Callable[[random.Random, Scene], Question | None]] = {
    "attribute": _attribute,
    "logic": _logic,
    "relation": _relation,
    "coarse": _coarse,
    "single-instance": _single_instance,
    "cross-instance": _cross_instance,
}


def question(rng: random.Random, split: Split, category: str, count: int | None = None) -> tuple[Scene, Question]:
    """A random scene of `split` and a question of one category about it that its picture answers."""
    while True:
        scene = draw_scene(rng, split, count or rng.choices((1, 2, 3), (3, 4, 3))[0])
        made = _QUESTIONS[category](rng, scene)
        if made is not None:
            return scene, made
