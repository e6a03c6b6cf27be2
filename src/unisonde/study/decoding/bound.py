"""The paper's bound (arXiv 2602.23136, theorem 2), with both of its factors taken in one space, against the measured loss of GMI.

    |GMI_M - GMI_T|  <=  (1 + exp(L D)) L E[W1(P_M(Z | C, Y), P_T(Z | C, Y))]

The texts are the items' labels in words, so that GMI_T and P_T are of the same items, and their difference is what is lost where an
attribute is heard or seen and not told. The space is that of one vector an item: the mean of what the decoder gets from the adapter,
or of a text's embeddings. A step in it moves all features of the item by one vector, so the sensitivity is the norm of the sum over
positions of the gradient of log q(right answer); GMI takes log q times its tilt s, and L is s times that norm. W1 is the exact
Euclidean transport distance of samples of equal size, within each label.

What it is not: the largest or mean norm of a gradient at some points is no Lipschitz constant, which is a supremum over all of
them, so the number called a bound here is a heuristic and may be exceeded. D is the largest distance in the samples; the
exponential is capped at the vocabulary's size, the paper's floor of the score. And W1 of few vectors in many dimensions is large
also between samples of one distribution: `w1_null` says how large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from unisonde.data.catalogue import data_digest
from unisonde.data.item import Item
from unisonde.measure import Interval
from unisonde.measure.estimate import p_value
from unisonde.models.bridged import Bridged
from unisonde.study.decoding.finding import Finding, Steps, interval, said, side_by_side, ticking
from unisonde.study.decoding.gmi import Loss

CHUNK = 16
"""Items between two ticks of progress."""

TELLING = 4
"""Attributes from which on an order can have p below 0.05."""

CAVEAT = "a gradient norm is no Lipschitz constant, so this is a heuristic and no guarantee"


@dataclass(frozen=True)
class Sensitivity:
    """Norms of the gradient of log q(right answer), nats a unit of the features, one an item.

    Attributes:
        shift: (n,) for a step that all positions take together: the norm of the sum over positions.
        whole: (n,) for the whole sequence of features: the Frobenius norm, which the published code takes.
        seconds: how long it took to take them.
    """

    shift: np.ndarray
    whole: np.ndarray
    seconds: float = 0.0


def sensitivity(
    model: Bridged, items: Sequence[Item], answers: Sequence[str], out: Path | str | None = None, progress: bool = True
) -> Sensitivity:
    """How steeply the score of each item's right answer changes with what the adapter hands on.

    Args:
        out: a folder in which finished items are kept, so that a killed call goes on.

    Raises:
        ValueError: there are more of one than of the other, an item holds neither sound nor picture, or an answer is empty.
    """
    if len(items) != len(answers) or not items:
        raise ValueError(f"there are {len(items)} items and {len(answers)} answers; give one answer to each item")

    def norms(pair: tuple[Item, str]) -> Tensor:
        item, answer = pair
        count = len(model.tokens_of(answer))
        prompted = model.ahead(model.prepare(item, count))
        if prompted.features is None:
            raise ValueError(f"item {item.id!r} has neither sound nor picture, so the adapter hands on nothing")
        with torch.enable_grad():
            features = prompted.features.detach().clone().requires_grad_()
            loss = model.loss_of(replace(prompted, features=features), answer) * count
            [gradient] = torch.autograd.grad(loss, features)
        gradient = gradient.double()[0]
        return torch.stack([gradient.sum(0).norm(), gradient.norm()])

    def norms_of(pairs: Sequence[tuple[Item, str]]) -> pl.DataFrame:
        found = torch.stack(side_by_side(norms, pairs, model.device)).cpu().numpy()
        return pl.DataFrame({"shift": found[:, 0], "whole": found[:, 1]})

    pairs = list(zip(items, answers, strict=True))
    settings: dict[str, Any] = {"model": model.identity(), "items": data_digest(items), "answers": list(answers), "chunk": CHUNK}
    steps = Steps(out, {"experiment": "sensitivity"} | settings)
    starts = ticking(range(0, len(pairs), CHUNK), "sensitivity", progress)
    table = pl.concat([steps.table(f"{k:05d}", partial(norms_of, pairs[k : k + CHUNK])) for k in starts])
    return Sensitivity(table["shift"].to_numpy(), table["whole"].to_numpy(), steps.seconds)


def wasserstein(x: np.ndarray, y: np.ndarray, seed: int = 0) -> float:
    """The 1-Wasserstein distance of two samples (n, d), (m, d): exact for equal sizes; of the larger one, as many are drawn."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    rng = np.random.default_rng(seed)
    size = min(len(x), len(y))
    x, y = (a if len(a) == size else a[rng.choice(len(a), size, replace=False)] for a in (x, y))
    distances = cdist(x.astype(np.float64), y.astype(np.float64))
    return float(distances[linear_sum_assignment(distances)].mean())


@dataclass(frozen=True)
class Transport:
    """Distances of modal vectors and those of texts.

    Attributes:
        w1: of all of them.
        halves: of halves of both, on average.
        null: of the two halves of the texts.
    """

    w1: Interval
    halves: float
    null: float


def transport(
    modal: np.ndarray,
    text: np.ndarray,
    labels: np.ndarray | None = None,
    text_labels: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    draws: int = 20,
    seed: int = 0,
) -> Transport:
    """W1 of modal vectors (n, d) and those of texts (m, d), and W1 between random halves of the texts; within each label if both have
    labels.

    W1 of fewer vectors is larger, so the interval is that of W1 on random halves of both, moved to where the whole sets have theirs
    and narrowed by the square root of 2; halves are random items, or random groups of modal items. W1 of the halves of the texts is
    to be held against `halves`, the mean of W1 on these.

    Raises:
        ValueError: the widths differ, or there are fewer than 4 vectors of a kind.
    """
    if modal.ndim != 2 or text.ndim != 2 or modal.shape[1] != text.shape[1] or min(len(modal), len(text)) < 4:
        raise ValueError(f"W1 takes 4 vectors or more of one width; got {modal.shape} and {text.shape}")
    rng = np.random.default_rng(seed)
    if labels is None or text_labels is None:
        labels, text_labels = np.zeros(len(modal)), np.zeros(len(text))

    def within(x: np.ndarray, of_x: np.ndarray, y: np.ndarray, of_y: np.ndarray) -> float:
        parts = [(x[of_x == label], y[of_y == label]) for label in np.unique(of_x)]
        known = [(len(a), wasserstein(a, b, seed)) for a, b in parts if len(a) and len(b)]
        return sum(n * w for n, w in known) / sum(n for n, _ in known) if known else math.nan

    def halves(n: int, together: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        whose = np.arange(n) if together is None else np.unique(together, return_inverse=True)[1]
        order = rng.permutation(whose.max() + 1)
        return np.flatnonzero(np.isin(whose, order[: len(order) // 2])), np.flatnonzero(np.isin(whose, order[len(order) // 2 :]))

    value = within(modal, labels, text, text_labels)
    pairs = [(halves(len(modal), groups)[0], halves(len(text))[0]) for _ in range(draws)]
    drawn = np.array([within(modal[i], labels[i], text[j], text_labels[j]) for i, j in pairs])
    drawn = drawn[np.isfinite(drawn)]
    mean, low, high = (drawn.mean(), *np.quantile(drawn, [0.025, 0.975])) if len(drawn) else (math.nan,) * 3
    low, high = (value + (end - mean) / math.sqrt(2) for end in (low, high))
    spread = float(drawn.std()) / math.sqrt(2) if len(drawn) else math.nan
    one, other = halves(len(text))
    null = within(text[one], text_labels[one], text[other], text_labels[other])
    return Transport(Interval(value, float(low), float(high), spread, 0.95, len(modal)), float(mean), null)


def bound(
    attribute: str,
    gradients: Sensitivity,
    modal: np.ndarray,
    text: np.ndarray,
    losses: Loss,
    vocabulary: int,
    *,
    labels: np.ndarray | None = None,
    text_labels: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    draws: int = 20,
    seed: int = 0,
) -> Finding:
    """Sensitivity times transport distance, and the bound made of them, beside the measured loss of GMI of one attribute.

    Args:
        gradients: at the right answers of this attribute.
        modal, text: (n, d), (m, d) at the decoder's layer 0.
        losses: GMI in words, of sounds or pictures, and their difference.
        vocabulary: tokens of the decoder.

    Returns:
        A table of one row: `sensitivity` (mean, times the tilt `s`) with its interval, `sensitivity_p95`, `w1` with its interval,
        `w1_halves` and `w1_null` (`Transport`),
        `product` in bits, `prefactor`, `bound` in bits, `gmi_words`, `gmi`, `lost` with its interval, `holds`.
    """
    slope = interval(losses.tilt * gradients.shift, groups, draws=500, seed=seed)
    moved = transport(modal, text, labels, text_labels, groups, draws, seed)
    distance = moved.w1
    largest = _diameter(np.concatenate([modal, text]))
    prefactor = 1.0 + min(math.exp(min(slope.value * largest, 700.0)), vocabulary)
    product = slope.value * distance.value / math.log(2)
    row = {"attribute": attribute, "n": len(modal), "n_texts": len(text), "seed": seed, "s": losses.tilt}
    row |= {"sensitivity": slope.value, "sensitivity_low": slope.low, "sensitivity_high": slope.high}
    row |= {"sensitivity_p95": float(np.quantile(losses.tilt * gradients.shift, 0.95))}
    row |= {"sensitivity_whole": float(losses.tilt * gradients.whole.mean())}
    row |= {"w1": distance.value, "w1_low": distance.low, "w1_high": distance.high, "diameter": largest}
    row |= {"w1_halves": moved.halves, "w1_null": moved.null}
    row |= {"product": product, "prefactor": prefactor, "bound": prefactor * product}
    lost = losses.lost
    row |= {"gmi_words": losses.words.value, "gmi": losses.modal.value}
    row |= {"lost": lost.value, "lost_low": lost.low, "lost_high": lost.high, "holds": abs(lost.value) <= prefactor * product}
    sentence = (
        f"Told in words, {attribute} is worth {said(losses.words)} bits of GMI to the decoder, and {said(losses.modal)} from the "
        f"adapter: {said(lost)} bits are lost. Sensitivity {slope.value:.3g} nats a unit times W1 {distance.value:.3g} is "
        f"{product:.3g} bits, with its prefactor {prefactor * product:.3g}; {CAVEAT}."
    )
    return Finding(pl.DataFrame([row]), sentence, lost, {"seconds": gradients.seconds})


def _diameter(vectors: np.ndarray) -> float:
    """The largest distance of two vectors (n, d)."""
    from scipy.spatial.distance import pdist

    return float(pdist(vectors.astype(np.float64)).max())


def order(table: pl.DataFrame) -> Finding:
    """Whether the product orders attributes (or models), one a row, as the measured loss does: Spearman's rank correlation.

    The tilt in the product is fitted to scores that the loss is taken from, so it may order alone; the correlation of the products
    without it is said too.

    Raises:
        ValueError: there are fewer than 3 to order.
    """
    from scipy.stats import spearmanr

    if len(table) < 3:
        raise ValueError(f"an order takes 3 attributes or more, got {len(table)}")
    products, lost = table["product"].to_numpy(), table["lost"].to_numpy()
    alike = len(np.unique(products)) == 1 or len(np.unique(lost)) == 1
    rho = math.nan if alike else float(spearmanr(products, lost).statistic)
    p = _permuted(products, lost, rho)
    agree = Interval(rho, math.nan, math.nan, math.nan, 0.95, len(table))
    if alike:
        word = "cannot be told to be that of the losses, or not, for all are alike"
    elif len(table) < TELLING:
        word = "cannot be told to be that of the losses, or not, for they are too few"
    else:
        word = "agrees with that of the losses" if rho > 0 and p < 0.05 else "is not shown to be that of the losses"
    numbers = "" if alike else f": rank correlation {rho:.2f}, p = {p:.2f}"
    tilts = table["s"].to_numpy()
    bare = products / np.where(tilts > 0, tilts, np.nan)
    if not alike and np.isfinite(bare).all() and len(np.unique(bare)) > 1:
        numbers += f"; without the tilts, which are fitted to the scores in question, {spearmanr(bare, lost).statistic:.2f}"
    sentence = f"Over {len(table)} attributes the order of the products {word}{numbers}."
    return Finding(table.with_columns(rank_correlation=pl.lit(rho), p=pl.lit(p)), sentence, agree)


def _permuted(a: np.ndarray, b: np.ndarray, observed: float, draws: int = 5000) -> float:
    """One-sided p of a rank correlation: over all orders where they are few, over random ones otherwise."""
    from scipy.stats import rankdata

    if math.isnan(observed):
        return math.nan
    few = len(a) <= 7
    rng = np.random.default_rng(0)
    orders = [list(o) for o in permutations(range(len(a)))] if few else [rng.permutation(len(a)) for _ in range(draws)]
    ranks, others = rankdata(a), rankdata(b)
    null = [float(np.corrcoef(ranks, others[o])[0, 1]) for o in orders]
    # The observed order is among all orders; among random ones it is added.
    return float(np.mean(np.array(null) >= observed - 1e-9)) if few else p_value(observed, null)
