"""Tabletop: a rendered world of coloured shapes on which twins are trained and judged exactly.

`scene` holds the facts, `render` draws, `grammar` speaks, `judge` reads pixels; `items` makes the data set. `textured` is a data set of
its own, of things that are plain, striped, dotted or checked.
"""

from __future__ import annotations

import random

from unisonde.data.item import Item, Task
from unisonde.data.tabletop import grammar
from unisonde.data.tabletop.grammar import IMAGE_CATEGORIES, TEXT_CATEGORIES
from unisonde.data.tabletop.judge import judge, read
from unisonde.data.tabletop.render import render
from unisonde.data.tabletop.scene import Scene, Split, Thing

PER_CATEGORY = 100

__all__ = ["IMAGE_CATEGORIES", "TEXT_CATEGORIES", "Scene", "Split", "Thing", "grammar", "items", "judge", "read", "render"]


def items(task: Task, split: Split = "test", seed: int = 0, per_category: int = PER_CATEGORY) -> list[Item]:
    """Random items of a split, category after category.

    Task `image`: text prompts. Task `text`: the same kinds of text prompts, whose answer describes the scene, and pictures with a
    question. Labels: `scene`, `background` (whether the text names it), and for questions `answer` and `chance`.
    """
    made = [text_item(category, split, seed, k) for category in TEXT_CATEGORIES for k in range(per_category)]
    if task == "text":
        made += [question_item(category, split, seed, k) for category in IMAGE_CATEGORIES for k in range(per_category)]
    return made


def text_item(category: str, split: Split, seed: int, number: int, count: int | None = None) -> Item:
    """A text prompt. `count`: the number of things, for `composition` alone."""
    name = f"{category}-{seed}-{number:04d}" if count is None else f"{category}{count}-{seed}-{number:04d}"
    prompt = grammar.prompt(random.Random(f"{split}/{name}"), split, category, count)
    return Item(name, category, prompt.text, labels={"scene": prompt.scene, "background": prompt.background})


def question_item(category: str, split: Split, seed: int, number: int) -> Item:
    """A picture with a question."""
    name = f"{category}-{seed}-{number:04d}"
    scene, question = grammar.question(random.Random(f"{split}/{name}"), split, category)
    labels = {"scene": scene, "answer": question.answer, "chance": 1 / len(question.options)}
    return Item(name, category, question.text, render(scene), labels)
