"""An intervention: the decoder learns to say one attribute. Does what it can use of that attribute rise, and of no other?

A low-rank change of the decoder (`unisonde.train.lora`) is trained on half of the items by one of two objectives of equal size (the
same items, steps and parameters):

- the attribute's own: asked for it, the decoder is to answer with it;
- the control: the decoder is to say something of the same items that does not need the attribute (what was said, what is seen).

On the other half, before and after, with several seeds, there is for every attribute: V-information of a probe where the answer is
read and of one of the mean over the features' positions, both after the decoder's last layer; and GMI of the decoder's own scores of
the answers (`unisonde.study.decoding.gmi`). Encoder and adapter are frozen, so what enters the decoder is the same throughout: what
changes is what it makes of it.

Changes are taken item by item; their intervals resample seeds and items (or whole groups) together, so they hold for other seeds and
other items. With few seeds that is rough, and each seed is in the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from unisonde.data.catalogue import data_digest
from unisonde.data.item import Item
from unisonde.measure import Interval
from unisonde.models.bridged import Bridged, Prompted
from unisonde.models.trace import hooked
from unisonde.study.decoding.finding import Finding, Steps, said, ticking
from unisonde.study.decoding.gmi import DOUBT, held_out
from unisonde.study.decoding.probes import predict, protocol
from unisonde.study.decoding.splits import Split, coded, splits
from unisonde.train.lora import Lesson, LoraRecipe, learn, require, tuned

BEFORE = "before"
QUANTITIES = {"v_information": "bits", "v_mean": "bits", "gmi": "bits", "accuracy": "share", "decoder_accuracy": "share"}
"""What is measured, item by item, and its unit: V-information at the answer and of the mean over features, GMI, the share that the
probe at the answer gets right, and the share that the decoder's likeliest answer gets right."""


@dataclass(frozen=True)
class Objective:
    """What the decoder learns.

    Attributes:
        name: of the label that holds the responses.
        items: to learn from, as they are asked.
        responses: what to write for each.
    """

    name: str
    items: Sequence[Item]
    responses: Sequence[str]


@dataclass(frozen=True)
class Question:
    """An attribute that is read before and after.

    Attributes:
        attribute: its name.
        items: to judge by, as they are asked.
        answers: the closed set.
        labels: the number of the right answer of each item, (n,).
        groups: what is kept together in folds and intervals, (n,); None if items stand for themselves.
    """

    attribute: str
    items: Sequence[Item]
    answers: Sequence[str]
    labels: Sequence[int]
    groups: Sequence[str] | None = None

    def splits(self, folds: int, seed: int) -> list[Split]:
        """As `splits` of the right answers."""
        return splits([self.answers[label] for label in self.labels], self.groups, folds, seed)


def lora(
    model: Bridged,
    objective: Objective,
    control: Objective,
    questions: Sequence[Question],
    *,
    seeds: int = 3,
    recipe: LoraRecipe | None = None,
    folds: int = 5,
    draws: int = 1000,
    seed: int = 0,
    out: Path | str | None = None,
    progress: bool = True,
) -> Finding:
    """Train the decoder by each objective with each seed, and read every attribute before and after.

    Args:
        objective: its name is that of the attribute that it is about, which is among the questions.
        questions: of other items than those that are learnt from.
        seeds: how many.
        out: a folder in which finished trainings and readings are kept, so that a killed call goes on.

    Returns:
        A table with one row an objective (`trained`: `attribute` or `control`), an attribute read, a quantity (`QUANTITIES`) and a
        seed, and one over all seeds (`seed` is null): `before`, `after`, `change`, and over all seeds `low` and `high` of the change,
        and how much `more` it is than after the control, with `more_low` and `more_high`.

    Raises:
        ValueError: items are learnt from and judged by, the attribute is not asked about, there are fewer than 2 seeds, a label is
            too rare, or peft is not installed.
    """
    recipe = recipe or LoraRecipe()
    _check(objective, control, questions, seeds)
    require()
    for question in questions:  # before anything is trained
        question.splits(folds, seed)
        model.tokens_of_answers(question.answers)
    settings: dict[str, Any] = {"experiment": "lora", "model": model.identity(), "recipe": asdict(recipe)}
    for what, one in (("objective", objective), ("control", control)):
        settings[what] = {"name": one.name, "items": data_digest(one.items), "responses": list(one.responses)}
    settings["questions"] = [
        {"attribute": q.attribute, "items": data_digest(q.items), "answers": list(q.answers), "labels": list(map(int, q.labels))}
        for q in questions
    ]
    groups = [list(question.groups or ()) for question in questions]
    steps = Steps(out, settings | {"folds": folds, "seed": seed, "groups": groups, "probe": protocol(), "doubt": DOUBT})
    work = _Work(model, recipe, objective, control, questions, folds, seed, steps.folder, progress)

    names = [(BEFORE, seed)] + [(which, seed + k) for k in range(seeds) for which in ("attribute", "control")]
    held = {(which, number): steps.table(f"{which}-{number}", partial(work.measured, which, number)) for which, number in names}
    table = _changes(held, questions, [seed + k for k in range(seeds)], draws, seed)
    constant = {"model": model.name, "attribute": objective.name, "control": control.name, "n": len(questions[0].items)}
    constant |= {"learnt_from": len(objective.items), "seeds": seeds, "steps": recipe.schedule.steps, "rank": recipe.rank}
    table = table.select(*(pl.lit(value).alias(name) for name, value in constant.items()), pl.all())
    used = {"judged": len(questions[0].items), "folds": folds, "seconds": steps.seconds}
    return Finding(table, *_sentence(table, questions), used)


def _check(objective: Objective, control: Objective, questions: Sequence[Question], seeds: int) -> None:
    if seeds < 2:
        raise ValueError(f"intervals over seeds take 2 or more, better 3; got {seeds}")
    if objective.name not in [question.attribute for question in questions]:
        raise ValueError(f"the attribute {objective.name!r} is learnt and not read; put it among the questions")
    for one in (objective, control):
        if not one.items or len(one.items) != len(one.responses):
            raise ValueError(f"there are {len(one.items)} items and {len(one.responses)} responses of {one.name}; give one to each")
    if [item.id for item in objective.items] != [item.id for item in control.items]:
        raise ValueError("objective and control learn from different items; give both the same, in the same order")
    judged = {item.id for question in questions for item in question.items}
    if both := [item.id for item in objective.items if item.id in judged]:
        raise ValueError(f"item {both[0]!r} is learnt from and judged by; give it one of them")
    if any(list(q.items[k].id for k in range(len(q.items))) != [i.id for i in questions[0].items] for q in questions):
        raise ValueError("the questions are about different items; ask the same of all")


@dataclass(frozen=True)
class _Work:
    """What all steps share."""

    model: Bridged
    recipe: LoraRecipe
    objective: Objective
    control: Objective
    questions: Sequence[Question]
    folds: int
    seed: int
    out: Path | None
    progress: bool
    features: dict[str, Tensor] = field(default_factory=dict)
    """By item: the same whatever is asked, and whatever the decoder has learnt."""

    def measured(self, which: str, number: int) -> pl.DataFrame:
        """Every quantity of every item, before or after a training."""
        if which == BEFORE:
            return self.read()
        one = self.objective if which == "attribute" else self.control
        checkpoint = None if self.out is None else self.out / f"{which}-{number}.pt"
        weights = self.learnt(one, number, checkpoint)
        with tuned(self.model, weights, self.recipe):
            table = self.read()
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
        return table

    def learnt(self, one: Objective, number: int, checkpoint: Path | None) -> Mapping[str, Tensor]:
        responses = [self.model.tokens_of(response) for response in one.responses]
        room = max(map(len, responses)) + 1
        lessons = [Lesson(self.ahead(item, room), ids) for item, ids in zip(one.items, responses, strict=True)]
        name = f"LoRA on {one.name}, seed {number}"
        with TemporaryDirectory() as folder:
            return learn(self.model, lessons, self.recipe, checkpoint or Path(folder) / "lora.pt", number, name)[0]

    def ahead(self, item: Item, room: int) -> Prompted:
        """A prompt with its features."""
        prompted = self.model.prepare(item, room)
        if item.id not in self.features:
            handed = self.model.ahead(prompted).features
            if handed is None:
                raise ValueError(f"item {item.id!r} has neither sound nor picture, so the adapter hands on nothing")
            self.features[item.id] = handed
        return replace(prompted, features=self.features[item.id], inputs={})

    def read(self) -> pl.DataFrame:
        return pl.concat([self.about(question) for question in self.questions])

    @torch.inference_mode()
    def about(self, question: Question) -> pl.DataFrame:
        """An attribute as the decoder is now."""
        room = max(len(self.model.tokens_of(answer)) for answer in question.answers)
        vectors, scores = [], []
        for item in ticking(question.items, f"reading {question.attribute}", self.progress):
            prompted = self.ahead(item, room)
            states: list[Tensor] = []
            final = self.model.llm.depth + (self.model.llm.norm is not None)

            def keep(layer: int, output: Tensor, states: list[Tensor] = states, final: int = final) -> None:
                if layer == final and not states:  # the prompt, and not the answers after it
                    states.append(output[0].float())

            with hooked(self.model.llm, keep):
                scores.append(self.model.scores_of(prompted, question.answers).double().cpu().numpy())
            [state] = states
            vectors.append(torch.stack([state[-1], state[prompted.slots].mean(0)]).cpu().numpy())
        labels = np.array(question.labels)
        groups = None if question.groups is None else coded(question.groups)[0]
        outer = question.splits(self.folds, self.seed)
        x, right = np.stack(vectors), np.stack(scores)
        at_answer, of_mean = (predict(x[:, k], labels, outer, groups, seed=self.seed) for k in (0, 1))
        return pl.DataFrame(
            {
                "read": question.attribute,
                "item": [item.id for item in question.items],
                "v_information": at_answer.bits,
                "v_mean": of_mean.bits,
                "gmi": held_out(right, labels, outer).bits,
                "accuracy": at_answer.hits,
                "decoder_accuracy": (right.argmax(1) == labels).astype(np.float64),
            }
        )


# ------------------------------------------------------------------------------------------------------------------- changes


def _changes(
    held: Mapping[tuple[str, int], pl.DataFrame], questions: Sequence[Question], seeds: Sequence[int], draws: int, seed: int
) -> pl.DataFrame:
    rows: list[dict[str, Any]] = []
    for which in ("attribute", "control"):
        for question in questions:
            own = pl.col("read") == question.attribute
            first = held[BEFORE, seed].filter(own)
            for quantity in QUANTITIES:
                before = first[quantity].to_numpy()
                after = np.stack([held[which, number].filter(own)[quantity].to_numpy() for number in seeds])
                row: dict[str, Any] = {"trained": which, "read": question.attribute, "quantity": quantity}
                row |= {"before": float(before.mean())}
                for number, values in zip(seeds, after, strict=True):
                    rows.append(row | {"seed": number, "after": float(values.mean()), "change": float((values - before).mean())})
                change = crossed(after - before, question.groups, draws, seed)
                rows.append(row | {"seed": None, "after": float(after.mean()), "change": change.value})
                rows[-1] |= {"low": change.low, "high": change.high}
                if which == "attribute":  # what is owed to the objective, and not to learning anything at all
                    control = np.stack([held["control", number].filter(own)[quantity].to_numpy() for number in seeds])
                    more = crossed(after - control, question.groups, draws, seed)
                    rows[-1] |= {"more": more.value, "more_low": more.low, "more_high": more.high}
    schema: dict[str, Any] = {"seed": pl.Int64}
    schema |= dict.fromkeys(("low", "high", "more", "more_low", "more_high"), pl.Float64)
    return pl.DataFrame(rows, schema_overrides=schema, infer_schema_length=None)


def crossed(values: np.ndarray, groups: Sequence[str] | None = None, draws: int = 1000, seed: int = 0) -> Interval:
    """The mean of numbers (seeds, n), with a 95% percentile interval over seeds and items (or whole groups), both drawn anew."""
    numbers = np.arange(values.shape[1]) if groups is None else coded(groups)[0]
    count = int(numbers.max()) + 1
    totals = np.stack([np.bincount(numbers, row, count) for row in values])
    sizes = np.bincount(numbers, minlength=count)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        some = rng.integers(count, size=count)
        drawn.append(totals[rng.integers(len(values), size=len(values))][:, some].mean(0).sum() / sizes[some].sum())
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high), float(np.std(drawn)), 0.95, values.shape[1])


def _sentence(table: pl.DataFrame, questions: Sequence[Question]) -> tuple[str, Interval]:
    def change(which: str, attribute: str, quantity: str = "gmi", of: str = "") -> Interval:
        chosen = (pl.col("trained") == which) & (pl.col("read") == attribute) & (pl.col("quantity") == quantity)
        [row] = table.filter(chosen & pl.col("seed").is_null()).to_dicts()
        value, low, high = (row[f"{of}_{end}" if of and end != "change" else of or end] for end in ("change", "low", "high"))
        return Interval(value, low, high, math.nan, 0.95, row["n"])

    first = table.row(0, named=True)
    attribute, form = first["attribute"], "{:+.2f}"
    own, other = change("attribute", attribute), change("control", attribute)
    present = change("attribute", attribute, "v_information")
    rest = {q.attribute: change("attribute", q.attribute) for q in questions if q.attribute != attribute}
    risen = [name for name, interval in {attribute: own, **rest}.items() if interval.low > 0]
    verdict = f"rises for {' and '.join(risen)}" if risen else "rises for none"
    if risen == [attribute] and rest:
        verdict = f"rises for {attribute} alone"
    others = "".join(f"; of {name} {said(interval, form)}" for name, interval in rest.items())
    more = change("attribute", attribute, of="more")
    owed = "which the objective did" if more.low > 0 else "so it is not shown that the objective did it"
    return (
        f"After LoRA of rank {first['rank']} on {attribute} ({first['learnt_from']} items, {first['seeds']} seeds), what the decoder "
        f"of {first['model']} uses {verdict}: on {first['n']} other items GMI of {attribute} changes by {said(own, form)} bits (a probe "
        f"of the same state by {said(present, form)}){others}. After the control, {first['control']}, that of {attribute} changes by "
        f"{said(other, form)}, {said(more, form)} less" + (f", {owed}." if attribute in risen else "."),
        own,
    )
