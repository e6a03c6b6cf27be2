"""Ablation: what the decoder loses when directions are removed from what the adapter hands it.

From every feature z (one position of sound or picture) its part within a span U is taken away, in one of two ways:

- `raw`: z - U'U z, which also takes away what all features share along the span, as the paper's code does;
- `recentred`: z - U'U (z - m), which keeps the mean m of the features and removes what varies about it.

The spans are the modality-specific modes, as many of them as there are text-aligned ones if those are fewer; text-aligned ones
matched in count, and text-aligned ones matched in variance, as far as they hold it; and, many times, as many modes drawn at random
from all of them. What is measured is the loss of given responses, on the response's
tokens alone (the published code of arXiv 2602.23136 scores tokens of the prompt), and whether the right one of a closed set of
answers is the likeliest, item by item, so that each condition is held against the whole features pairwise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from unisonde.data.catalogue import data_digest
from unisonde.data.item import Item
from unisonde.measure import Interval
from unisonde.models.bridged import Bridged, Prompted
from unisonde.study.decoding.directions import Directions
from unisonde.study.decoding.finding import Finding, Steps, flipped, interval, said, side_by_side, ticking

WHOLE = "whole"
CENTRINGS = ("raw", "recentred")


@dataclass(frozen=True)
class Condition:
    """What is removed.

    Attributes:
        name: `whole`, `specific`, `aligned by count`, `aligned by variance` or `random`.
        centring: `raw` or `recentred`; empty for `whole`.
        draw: which of the random draws; 0 of others.
        modes: numbers of the removed modes.
    """

    name: str
    centring: str
    draw: int
    modes: tuple[int, ...]

    @property
    def step(self) -> str:
        return f"{self.name.replace(' ', '-')}{'-' + self.centring if self.centring else ''}-{self.draw:03d}"


def conditions(found: Directions, draws: int = 10, seed: int = 0) -> list[Condition]:
    """All that is removed, the whole features first. Spans are of one number of modes, those of the larger variances first.

    Raises:
        ValueError: no mode is modality-specific, or none is text-aligned, so there is nothing to compare.
    """
    specific, aligned = np.flatnonzero(found.specific), np.flatnonzero(~found.specific)
    if not len(specific) or not len(aligned):
        raise ValueError(
            f"{len(specific)} of {len(found.specific)} modes are modality-specific, so there is nothing to compare; "
            "take other texts with --texts"
        )
    specific = specific[: len(aligned)]
    spans = {
        "specific": specific,
        "aligned by count": aligned[: len(specific)],
        "aligned by variance": matched(found.variances, aligned, float(found.variances[specific].sum())),
    }
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(len(found.specific), len(specific), replace=False) for _ in range(draws)]
    listed = [Condition(WHOLE, "", 0, ())]
    for centring in CENTRINGS:
        listed += [Condition(name, centring, 0, tuple(map(int, modes))) for name, modes in spans.items()]
        listed += [Condition("random", centring, k, tuple(map(int, np.sort(modes)))) for k, modes in enumerate(drawn)]
    return listed


def matched(variances: np.ndarray, among: np.ndarray, wanted: float) -> np.ndarray:
    """Modes whose variances sum to nearly what is wanted: the largest first, each if it fits, then one more if that is nearer."""
    taken: list[int] = []
    total = 0.0
    for mode in among:
        if total + variances[mode] <= wanted:
            taken.append(int(mode))
            total += variances[mode]
    left = [int(mode) for mode in among if int(mode) not in taken]
    if left:
        nearest = min(left, key=lambda mode: abs(total + variances[mode] - wanted))
        if abs(total + variances[nearest] - wanted) < abs(total - wanted):
            taken.append(nearest)
    return np.array(sorted(taken), dtype=int)


def removal(vectors: np.ndarray, mean: np.ndarray | None = None, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
    """An edit of features (1, n, d) on a device that removes the span of orthonormal rows (k, d); with a mean (d,), about it.

    It is computed in float32 at least.
    """
    span = torch.as_tensor(np.ascontiguousarray(vectors)).to(device)
    centre = torch.zeros(vectors.shape[1], device=device) if mean is None else torch.as_tensor(mean).to(device)

    def edit(features: Tensor) -> Tensor:
        kind = torch.promote_types(features.dtype, torch.float32)
        basis, held = span.to(kind), features.to(kind)
        along = (held - centre.to(kind)) @ basis.T
        return (held - along @ basis).to(features.dtype)

    return edit


def ablate(
    model: Bridged,
    items: Sequence[Item],
    responses: Sequence[str] | None,
    found: Directions,
    *,
    answers: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    asked: Sequence[Item] | None = None,
    draws: int = 10,
    groups: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    out: Path | str | None = None,
    progress: bool = True,
) -> Finding:
    """Remove spans at the adapter's output and score the decoder.

    Args:
        items: with sound or picture; their prompts ask for the response.
        responses: one an item, what the model should say; None for the right one of the answers to the question.
        found: directions at the adapter's output, taken on other items than these.
        answers: a closed set of answers, for the task's accuracy, with `labels`, the number of each item's right one. None: loss
            alone.
        asked: the items with the question that these answers answer; `items` if None.
        draws: random spans.
        groups: what keeps items together in the bootstrap.
        out: a folder in which finished conditions are kept, so that a killed call goes on.

    Returns:
        A table with one row a condition: `modes` (how many are removed), `share` of the variance that they hold, `loss` (nats a
        token), `loss_change` against the whole features with `loss_low`, `loss_high` and `loss_p` (signs flipped); with answers
        `accuracy`, `accuracy_change`, `accuracy_low`, `accuracy_high` and `chance` (share of the commonest label), else nulls.

    Raises:
        ValueError: items do not fit responses or labels, or there is nothing to compare (`conditions`).
    """
    asked = items if asked is None else asked
    _check(items, responses, asked, answers, labels)
    listed = conditions(found, draws, seed)
    settings: dict[str, Any] = {"model": model.identity(), "items": data_digest(items), "asked": data_digest(asked)}
    settings |= {"responses": None if responses is None else list(responses)}
    settings |= {"answers": list(answers or []), "labels": [int(label) for label in labels] if labels is not None else []}
    settings |= {"directions": _digest(found), "draws": draws, "seed": seed}
    steps = Steps(out, {"experiment": "ablate"} | settings)

    @cache
    def tasks() -> list[_Task]:  # encoder and adapter run once, and not at all if every condition was kept
        said = [None] * len(items) if responses is None else responses
        numbers = [None] * len(items) if labels is None else labels
        return [_task(model, *one, answers) for one in zip(items, said, asked, numbers, strict=True)]

    def score(condition: Condition) -> pl.DataFrame:
        return _scored(model, tasks(), found, condition, answers)

    scored = {c: steps.table(c.step, partial(score, c)) for c in ticking(listed, "ablation", progress)}
    whole = scored[listed[0]]
    rows = []
    for c, own in scored.items():
        row: dict[str, Any] = {
            "model": model.name,
            "condition": c.name,
            "centring": c.centring,
            "draw": c.draw,
            "modes": len(c.modes),
        }
        row |= {"share": float(found.variances[list(c.modes)].sum() / found.total), "n": len(items), "seed": seed}
        rows.append(row | _changes(own, whole, c.name == WHOLE, groups, resamples, seed))
    chance = None if labels is None else float(np.bincount(labels).max() / len(labels))
    table = pl.DataFrame(rows, infer_schema_length=None).with_columns(pl.lit(chance, dtype=pl.Float64).alias("chance"))
    return Finding(table, *_sentence(table), {"judged": len(items), "draws": draws, "seconds": steps.seconds})


def _check(
    items: Sequence[Item],
    responses: Sequence[str] | None,
    asked: Sequence[Item],
    answers: Sequence[str] | None,
    labels: Sequence[int] | None,
) -> None:
    if not items or (responses is not None and len(items) != len(responses)):
        raise ValueError(f"there are {len(items)} items and {len(responses or ())} responses; give one response to each item")
    if responses is None and answers is None:
        raise ValueError("there is nothing to score; give responses, or answers with labels")
    if text := [item.id for item in items if item.modality == "text"]:
        raise ValueError(f"item {text[0]!r} has neither sound nor picture, so the adapter hands on nothing to remove from")
    if [item.id for item in asked] != [item.id for item in items]:
        raise ValueError("the items that are asked about are not those that have responses; give the same, in the same order")
    if (answers is None) != (labels is None):
        raise ValueError("answers and labels go together; give both, or neither")
    if answers is not None and labels is not None:
        if len(labels) != len(items):
            raise ValueError(f"there are {len(items)} items and {len(labels)} labels; give one label to each item")
        if wrong := [label for label in labels if not 0 <= label < len(answers)]:
            raise ValueError(f"a label is the number of an answer, 0 to {len(answers) - 1}; got {wrong[0]}")


def _digest(found: Directions) -> str:
    arrays = (found.vectors, found.variances, found.specific, found.mean)
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:16]


@dataclass(frozen=True)
class _Task:
    """What is scored of an item: the loss of a response, whether the right answer is the likeliest, or both."""

    item: str
    prompted: Prompted | None
    response: str
    asked: Prompted | None
    label: int


def _task(model: Bridged, item: Item, said: str | None, asked: Item, label: int | None, answers: Sequence[str] | None) -> _Task:
    prompted = question = None
    if said is not None:
        prompted = model.ahead(model.prepare(item, len(model.tokens_of(said))))
    if answers is not None:
        question = model.ahead(model.prepare(asked, max(len(model.tokens_of(answer)) for answer in answers)))
    return _Task(item.id, prompted, said or "", question, -1 if label is None else label)


def _scored(
    model: Bridged, tasks: Sequence[_Task], found: Directions, condition: Condition, answers: Sequence[str] | None
) -> pl.DataFrame:
    """Loss and hit of each item under one condition."""
    vectors = found.vectors[list(condition.modes)]
    edit = removal(vectors, found.mean if condition.centring == "recentred" else None, model.device)

    @torch.inference_mode()
    def score(task: _Task) -> Tensor:
        """Loss and hit; the hit is no number where there are no answers."""
        hit = torch.tensor(math.nan, device=model.device)
        if task.asked is not None and answers is not None:
            scores = model.scores_of(task.asked, answers)
            hit = (scores.argmax() == task.label).float()
            loss = -scores[task.label] / len(model.tokens_of(answers[task.label]))
        if task.prompted is not None:
            loss = model.loss_of(task.prompted, task.response)
        return torch.stack([loss, hit])

    with model.edited(edit):
        losses, hits = torch.stack(side_by_side(score, tasks, model.device)).T.tolist()
    held = {"item": [task.item for task in tasks], "loss": losses, "hit": [None if hit != hit else hit for hit in hits]}
    return pl.DataFrame(held, schema={"item": pl.String, "loss": pl.Float64, "hit": pl.Float64})


def _changes(
    own: pl.DataFrame, whole: pl.DataFrame, same: bool, groups: Sequence[str] | None, resamples: int, seed: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"loss": own["loss"].mean()}
    names = ("loss_change", "loss_low", "loss_high")
    differences = (own["loss"] - whole["loss"]).to_numpy()
    row |= dict.fromkeys((*names, "loss_p"), None) if same else _interval(names, differences, groups, resamples, seed)
    if not same:
        row["loss_p"] = flipped(differences, groups, seed)
    names = ("accuracy_change", "accuracy_low", "accuracy_high")
    if own["hit"].null_count():
        return row | {"accuracy": None} | dict.fromkeys(names, None)
    row["accuracy"] = own["hit"].mean()
    if same:
        return row | dict.fromkeys(names, None)
    return row | _interval(names, (own["hit"] - whole["hit"]).to_numpy(), groups, resamples, seed)


def _interval(
    names: tuple[str, str, str], values: np.ndarray, groups: Sequence[str] | None, resamples: int, seed: int
) -> dict[str, Any]:
    found = interval(values, groups, resamples, seed)
    return dict(zip(names, (found.value, found.low, found.high), strict=True))


def _sentence(table: pl.DataFrame) -> tuple[str, Interval]:
    recentred = table.filter(pl.col("centring") == "recentred")
    row = recentred.filter(pl.col("condition") == "specific").row(0, named=True)
    change = Interval(row["loss_change"], row["loss_low"], row["loss_high"], math.nan, 0.95, row["n"])
    others = []
    for name in ("aligned by count", "aligned by variance"):
        [other] = recentred.filter(pl.col("condition") == name).to_dicts()
        if name == "aligned by variance" and other["share"] < 0.5 * row["share"]:
            others.append("no text-aligned ones hold as much")
        else:
            others.append(
                f"{other['modes']} text-aligned ones matched {name.removeprefix('aligned ')} ({other['share']:.1%}) "
                f"{other['loss_change']:+.3f}"
            )
    drawn = recentred.filter(pl.col("condition") == "random")["loss_change"].to_list()
    if drawn:
        others.append(f"random ones {min(drawn):+.3f} to {max(drawn):+.3f} in {len(drawn)} draw{'s' if len(drawn) > 1 else ''}")
    answered = ""
    if row["accuracy"] is not None:
        before = table["accuracy"][0]
        answered = f" Right answers go from {before:.0%} to {row['accuracy']:.0%}; the commonest alone gets {row['chance']:.0%}."
    return (
        f"Removing the variation along the {row['modes']} modality-specific directions of {row['model']} ({row['share']:.0%} of the "
        f"variance) changes the loss of the response by {said(change, '{:+.3f}')} nats a token; {', '.join(others)}.{answered}",
        change,
    )
