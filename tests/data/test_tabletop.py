"""The Tabletop world: splits that do not overlap, prompts that a scene follows from, questions whose answers are right."""

from __future__ import annotations

import random
import re
from collections import Counter

import numpy as np
import pytest

from unisonde.data import open_data
from unisonde.data.tabletop import IMAGE_CATEGORIES, TEXT_CATEGORIES, Scene, Thing, grammar, items, judge, render
from unisonde.data.tabletop.scene import BACKGROUNDS, COLOURS, COLUMNS, HELD_OUT, ROWS, SHAPES, SIZES, SPLITS, draw_scene, places


def rng(*seed) -> random.Random:
    return random.Random(str(seed))


def test_the_world_is_large_enough() -> None:
    assert len(SHAPES) >= 5 and len(COLOURS) >= 6 and len(SIZES) >= 2 and len(HELD_OUT) == 4
    assert render(draw_scene(rng(0), "train", 3)).size == (32, 32)


def test_every_layout_is_in_one_split_whatever_its_background() -> None:
    for shape in SHAPES:
        for colour in COLOURS:
            for row, column in places():
                found = {Scene((Thing(row, column, shape, colour, "small"),), background).split for background in BACKGROUNDS}
                assert len(found) == 1
                assert ("compositional" in found) == ((shape, colour) in HELD_OUT)


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_are_drawn_from_their_split(split) -> None:
    source = rng(split)
    seen = Counter()
    for _ in range(300):
        scene = draw_scene(source, split, source.choice((1, 2, 3)))
        assert scene.split == split
        seen.update((thing.shape, thing.colour) for thing in scene.things)
    pairs = {(shape, colour) for shape in SHAPES for colour in COLOURS}
    if split == "compositional":
        assert set(HELD_OUT) <= set(seen)
    else:  # every pair that may be seen is seen, in test as in train
        assert set(seen) == pairs - set(HELD_OUT)


def test_things_share_no_cell() -> None:
    with pytest.raises(ValueError, match="two things in one cell"):
        Scene((Thing(0, 0, "ring", "red", "small"), Thing(0, 0, "cross", "red", "small")), "white")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("category", TEXT_CATEGORIES)
def test_prompts_belong_to_their_split_and_do_not_leak(split, category) -> None:
    source = rng(split, category)
    for _ in range(80):
        prompt = grammar.prompt(source, split, category)
        assert prompt.scene.split == split
        if split != "compositional":
            assert not any(f"{colour} {shape}" in prompt.text for shape, colour in HELD_OUT)
        assert prompt.background == (f"{prompt.scene.background} background" in prompt.text)
        assert re.fullmatch(r"[a-z ,.:]+", prompt.text)


def solve(category: str, text: str) -> set[Thing]:
    """The things that a reasoning prompt asks for, worked out from its words by other means than the grammar's own."""
    text = re.sub(r",? on an? \w+ background\.?", "", text)
    shape, colour, size = "|".join(SHAPES), "|".join(COLOURS), "|".join(SIZES)

    def at(place: str) -> tuple[int, int]:
        row, column = place.split()
        return ROWS.index(row), COLUMNS.index(column)

    if category == "deductive" and "every" in text:
        rules = dict(re.findall(rf"every ({shape}) is ({colour})", text))
        asked = re.findall(rf"an? ({size}) ({shape}) at the (\w+ \w+)", text)
        return {Thing(*at(place), kind, rules[kind], extent) for extent, kind, place in asked}
    if category == "deductive":
        rules = dict(re.findall(rf"shapes at the (top|bottom) are ({size})", text))
        asked = re.findall(rf"an? ({colour}) ({shape}) at the (\w+ \w+)", text)
        return {Thing(*at(place), kind, hue, rules[place.split()[0]]) for hue, kind, place in asked}
    if category == "inductive" and "turns" in text:
        before, after, start = re.findall(rf"an? ({size}) ({colour}) ({shape})", text)
        [place] = re.findall(r"at the (\w+ \w+)", text)
        end = [a if b != a else s for b, a, s in zip(before, after, start, strict=True)]
        return {Thing(*at(place), end[2], end[1], end[0])}
    if category == "inductive":
        first, second = re.findall(rf"an? ({size}) ({colour}) ({shape}) at the (\w+ \w+)", text)
        [place] = re.findall(r"one more shape at the (\w+ \w+)", text)
        return {Thing(*at(p), s, c, z) for z, c, s, p in (first, second, (*first[:3], place))}
    if "neither" in text:
        given = re.findall(rf"an? ({size}) ({colour}) ({shape}) at the (\w+ \w+)", text)
        [(extent, kind, place)] = re.findall(rf"an? ({size}) ({shape}) at the (\w+ \w+) that has", text)
        listed = re.search(r"the colour of (.*) that neither", text).group(1)
        [left] = set(re.findall(colour, listed)) - {c for _, c, _, _ in given}
        return {Thing(*at(p), s, c, z) for z, c, s, p in given} | {Thing(*at(place), kind, left, extent)}
    if "there is one" in text:
        [(extent, hue, place)] = re.findall(rf"one ({size}) ({colour}) shape at the (\w+ \w+)\.", text)
        [kind] = set(SHAPES) - set(re.findall(rf"not a ({shape})", text))
        return {Thing(*at(place), kind, hue, extent)}
    [(hue, kind, place)] = re.findall(rf"an? ({colour}) ({shape}) at the (\w+ \w+)", text)
    [extent] = set(SIZES) - set(re.findall(rf"not ({size})", text))
    return {Thing(*at(place), kind, hue, extent)}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("category", TEXT_CATEGORIES[1:])
def test_reasoning_prompts_follow_to_their_scene(split, category) -> None:
    source = rng("solve", split, category)
    for _ in range(150):
        prompt = grammar.prompt(source, split, category)
        assert solve(category, prompt.text) == set(prompt.scene.things), prompt.text


def test_composition_says_every_thing() -> None:
    source = rng("composition")
    for count in (1, 2, 3):
        for _ in range(60):
            prompt = grammar.prompt(source, "train", "composition", count)
            assert len(prompt.scene.things) == count
            words = Counter(re.findall(r"\w+", prompt.text))
            for group in ([t.shape for t in prompt.scene.things], [t.size for t in prompt.scene.things]):
                for word, times in Counter(group).items():
                    assert words[word] == times
            assert sum(f"the {t.place}" in prompt.text for t in prompt.scene.things) + prompt.text.count("just ") >= count


def evaluate(scene: Scene, question: grammar.Question) -> str | None:
    """The answer worked out from the scene by brute force, for the forms that say it plainly."""
    text, things = question.text, scene.things
    if text.startswith("what colour is the background"):
        return scene.background
    if text.startswith("how many shapes are there"):
        return ("none", "one", "two", "three")[len(things)]
    if found := re.fullmatch(r"what is at the (\w+ \w+)\?", text):
        [thing] = [t for t in things if t.place == found.group(1)]
        return f"{thing.size} {thing.colour} {thing.shape}"
    if found := re.fullmatch(r"if every (\w+)(?: shape)? were taken away, how many shapes would be left\?", text):
        left = [t for t in things if found.group(1) not in (t.shape, t.colour, t.size)]
        return ("none", "one", "two", "three")[len(left)]
    if found := re.fullmatch(r"is every shape (?:a )?(\w+)\?", text):
        return "yes" if all(found.group(1) in (t.shape, t.colour, t.size) for t in things) else "no"
    if found := re.fullmatch(r"how many shapes are (\w+)\?|how many (\w+?)(?:es|s) are there\?", text):
        value = found.group(1) or found.group(2)
        value = value if value in (*SHAPES, *COLOURS, *SIZES) else value + "e"
        return ("none", "one", "two", "three")[sum(value in (t.shape, t.colour, t.size) for t in things)]
    named = []
    for words in re.findall(r"the (shape at the \w+ \w+|(?:\w+ )?(?:shape|" + "|".join(SHAPES) + r"))", text):
        if words.startswith("shape at the "):
            fits = [t for t in things if t.place == words.removeprefix("shape at the ")]
        else:
            fits = [t for t in things if all(w in (t.shape, t.colour, t.size, "shape") for w in words.split())]
        assert len(fits) == 1, (text, words)
        named += fits
    if len(named) == 1:
        return {"what colour": named[0].colour, "what size i": named[0].size, "what kind o": named[0].shape}.get(
            text[:11], named[0].place
        )
    a, b = named
    for words, truth in (
        ("above", a.row < b.row),
        ("below", a.row > b.row),
        ("to the left of", a.column < b.column),
        ("to the right of", a.column > b.column),
        ("same colour", a.colour == b.colour),
        ("same size", a.size == b.size),
        ("same kind", a.shape == b.shape),
    ):
        if words in text:
            return "yes" if truth else "no"
    return None


def named_in(said: str) -> tuple[Thing, ...] | None:
    """The things that an answer looks at before it concludes; None if it describes the picture."""
    if said.startswith("the picture shows "):
        return None
    assert said.startswith(("at the ", "there is no such shape"))
    things = re.findall(r"at the (\w+) (\w+) there is a (\w+) (\w+) (\w+)", said)
    return tuple(Thing(ROWS.index(row), COLUMNS.index(column), s, c, z) for row, column, z, c, s in things)


def enough(question: grammar.Question) -> bool:
    """The answer follows from the things that the question is about."""
    about, answer = question.about, question.answer
    if question.category == "coarse":
        return about is None
    if question.category in ("attribute", "single-instance"):
        [thing] = about
        return answer in grammar.phrase(thing)
    if answer in grammar.NUMBERS:
        return len(about) == grammar.NUMBERS.index(answer)
    return answer == ("no" if about else "yes") if question.category == "logic" else len(about) == 2


@pytest.mark.parametrize("category", IMAGE_CATEGORIES)
def test_answers_are_right_and_among_the_options(category) -> None:
    source = rng(category)
    answers = Counter()
    for _ in range(300):
        scene, question = grammar.question(source, "test", category)
        assert scene.split == "test" and question.answer in question.options
        assert evaluate(scene, question) == question.answer, (question.text, scene)
        answers[question.answer] += 1
        said = grammar.answer(scene, question)
        assert grammar.conclusion(said) == question.answer
        assert grammar.parse(grammar.describe(scene)) == (scene.things, scene.background)
        if question.about is None:
            assert said.startswith(grammar.describe(scene)) and grammar.parse(said) == (scene.things, scene.background)
        assert len(re.findall(r"\w+|[.,:]", said)) >= 16
        assert named_in(said) == question.about
        assert enough(question)
    assert answers.most_common(1)[0][1] < 0.7 * sum(answers.values())


def test_parse_reads_nothing_into_nonsense() -> None:
    assert grammar.parse("a large red large ring") == ((), None)
    assert grammar.conclusion("so the answer is") is None and grammar.conclusion("the answer is red.") is None


@pytest.mark.parametrize("split", SPLITS)
def test_items_are_fixed_by_split_and_seed(split) -> None:
    first, again, other = items("text", split, 0, 5), items("text", split, 0, 5), items("text", split, 1, 5)
    assert [i.digest() for i in first] == [i.digest() for i in again] != [i.digest() for i in other]
    assert len({i.id for i in first}) == len(first) == 5 * 10
    assert [i.category for i in items("image", split, 0, 5)] == [c for c in TEXT_CATEGORIES for _ in range(5)]
    for item in first:
        if item.image is not None:
            assert judge(item.picture(), item.labels["scene"], background=True).exact


def test_the_catalogue_opens_it() -> None:
    data = open_data("tabletop:compositional")
    assert data.items("image")[0].labels["scene"].split == "compositional"
    assert len(open_data("tabletop").items("text")) == 1000


def test_pictures_are_what_they_say() -> None:
    """A few pixels by hand: a large square fills its cell, everything else is the background."""
    picture = np.asarray(render(Scene((Thing(1, 2, "square", "red", "large"),), "grey")))
    assert (picture[12:20, 24:32] == COLOURS["red"]).all()
    picture = picture.copy()
    picture[12:20, 24:32] = BACKGROUNDS["grey"]
    assert (picture == BACKGROUNDS["grey"]).all()
