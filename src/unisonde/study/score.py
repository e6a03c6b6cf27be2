"""How well a model does what it is asked on Tabletop, judged exactly, with chance levels and intervals.

A drawing is right when the judge reads from its pixels every wanted thing with its shape, colour, size and place, and nothing else.
An answer is right when its conclusion is; a description is right when it names exactly the things that are there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl
from scipy.stats import binomtest

from unisonde.data.item import Item, Task
from unisonde.data.tabletop import IMAGE_CATEGORIES, TEXT_CATEGORIES, Scene, Split, grammar, judge, question_item, text_item
from unisonde.data.tabletop.scene import COLOURS, COLUMNS, ROWS, SHAPES, SIZES
from unisonde.models.base import Model, Response

BATCH_SIZE = 50


@dataclass(frozen=True)
class Row:
    """One row of the table: what is asked, by which items."""

    name: str
    task: Task
    items: list[Item]


def rows_of(split: Split, count: int, seed: int) -> Iterator[Row]:
    """The rows of the table, `count` items each. Direct descriptions are split by their number of things."""
    for things, word in ((1, "one"), (2, "two"), (3, "three")):
        made = [text_item("composition", split, seed, k, things) for k in range(count)]
        yield Row(f"draw: composition, {word} object{'s' * (things > 1)}", "image", made)
    for category in TEXT_CATEGORIES[1:]:
        yield Row(f"draw: {category}", "image", [text_item(category, split, seed, k) for k in range(count)])
    for category in TEXT_CATEGORIES:
        yield Row(f"infer: {category}", "text", [text_item(category, split, seed, k) for k in range(count)])
    captions = [question_item("attribute", split, seed, k) for k in range(count)]
    yield Row(
        "describe: picture", "text", [Item(i.id, "caption", grammar.CAPTION_REQUESTS[0], i.image, i.labels) for i in captions]
    )
    for category in IMAGE_CATEGORIES:
        yield Row(f"answer: {category}", "text", [question_item(category, split, seed, k) for k in range(count)])


def right(item: Item, response: Response) -> bool:
    """Whether a response is exactly what its item asks for."""
    scene: Scene = item.labels["scene"]
    if response.image is not None:
        return judge(response.image, scene, background=item.labels["background"]).exact
    text = response.text or ""
    if "answer" in item.labels and item.category != "caption":
        return grammar.conclusion(text) == item.labels["answer"]
    things, background = grammar.parse(text)
    named = item.labels.get("background", True)
    return things == scene.things and (not named or background == scene.background)


def chance(item: Item) -> float:
    """The probability that a uniform guess is right: among the answers of a question's form, or among all scenes of as many things."""
    if "chance" in item.labels and item.category != "caption":
        return item.labels["chance"]
    count = len(item.labels["scene"].things)
    return 1 / (math.comb(len(ROWS) * len(COLUMNS), count) * (len(SHAPES) * len(COLOURS) * len(SIZES)) ** count)


def score(
    model: Model, split: Split = "test", count: int = 200, seed: int = 0, batch_size: int = BATCH_SIZE, only: str = ""
) -> pl.DataFrame:
    """The table of one model on one split.

    Args:
        count: items a row.
        seed: of the items and of the sampling.
        only: keep the rows whose name begins with this.

    Returns:
        Columns `model, split, row, seed, n, right, share, low, high, chance`; `low` and `high` are the 95% Wilson interval.
    """
    table = []
    for row in rows_of(split, count, seed):
        if row.task not in model.tasks or not row.name.startswith(only):
            continue
        settings = model.settings(row.task)
        hits = 0
        for start in range(0, count, batch_size):
            items = row.items[start : start + batch_size]
            hits += sum(map(right, items, model.respond(items, row.task, settings, seed)))
        interval = binomtest(hits, count).proportion_ci(method="wilson")
        guess = sum(map(chance, row.items)) / count
        figures = {"n": count, "right": hits, "share": hits / count, "low": interval.low, "high": interval.high, "chance": guess}
        table.append({"model": model.name, "split": split, "row": row.name, "seed": seed} | figures)
    return pl.DataFrame(table)


def scores(models: Sequence[Model], splits: Sequence[Split], count: int = 200, seed: int = 0) -> pl.DataFrame:
    """The tables of several models and splits, one below the other."""
    return pl.concat([score(model, split, count, seed) for model in models for split in splits])
