"""The bound: transport distances in closed form, gradients by finite differences, and what order the product gives."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
import torch
from bridges import built
from known import recordings

from unisonde.data.item import Item
from unisonde.measure import Interval
from unisonde.study.decoding.bound import Sensitivity, bound, order, sensitivity, transport, wasserstein
from unisonde.study.decoding.gmi import Loss

RNG = np.random.default_rng(0)


def test_transport_in_closed_form() -> None:
    x = RNG.normal(size=(40, 3))
    assert wasserstein(x, x[::-1]) == pytest.approx(0.0, abs=1e-12)
    assert wasserstein(x, x + np.array([3.0, 0.0, 4.0])) == pytest.approx(5.0)  # a translation costs its length
    one, other = RNG.normal(size=(50, 1)), RNG.normal(size=(50, 1))
    assert wasserstein(one, other) == pytest.approx(np.abs(np.sort(one, 0) - np.sort(other, 0)).mean())  # on a line, by order


def test_within_labels_the_distance_is_no_smaller() -> None:
    labels = np.arange(60) % 2
    x = RNG.normal(size=(60, 2)) * 0.1 + labels[:, None] * 10
    same = transport(x, x.copy(), draws=3)
    assert same.w1.value == pytest.approx(0.0, abs=1e-9) and same.null > 0
    within = transport(x, x.copy(), labels, 1 - labels, draws=3).w1  # the texts' labels are the wrong way round
    assert [within.value, within.low, within.high] == pytest.approx([math.hypot(10, 10)] * 3, rel=0.02)
    # Halves of the texts are held against each other within labels too: not the ten units between them.
    assert transport(x, x.copy(), labels, labels, draws=3).null < 0.3 < 1 < transport(x[labels == 0], x, draws=3).w1.value
    with pytest.raises(ValueError, match=r"one width; got \(60, 2\) and \(60, 1\)"):
        transport(x, x[:, :1])


def test_the_interval_of_a_distance_holds_it() -> None:
    """W1 of few vectors is too large, of half as many larger still: the interval is about the value all the same."""
    x = RNG.normal(size=(80, 20))
    found = transport(x, RNG.normal(size=(80, 20)), draws=40)
    assert found.halves > found.w1.value + 0.2 and found.w1.low <= found.w1.value <= found.w1.high
    assert found.null == pytest.approx(found.halves, rel=0.05)  # one distribution, so halves of texts are as far apart
    groups = np.arange(80) // 20
    assert transport(x + 3.0 * groups[:, None], x, groups=groups, draws=40).w1.stderr > 2 * found.w1.stderr


def test_gradients_by_finite_differences(tmp_path_factory) -> None:
    model = built("ultravox", tmp_path_factory.getbasetemp())[0]
    [item] = recordings(1)
    found = sensitivity(model, [item], ["ann."], progress=False)
    width, step = model.language_model.config.hidden_size, 1e-2
    gradient = []
    for axis in range(width):
        scores = []
        for sign in (1, -1):
            with torch.no_grad(), model.edited(lambda z, a=axis, s=sign: z + s * step * torch.eye(width)[a]):  # type: ignore[misc]
                scores.append(float(model.answer_scores([item], ["ann.", "bob."])[0, 0]))
        gradient.append((scores[0] - scores[1]) / (2 * step))
    assert found.shift[0] == pytest.approx(np.linalg.norm(gradient), rel=0.02)
    assert found.whole[0] != pytest.approx(found.shift[0], rel=1e-3)
    with pytest.raises(ValueError, match="item 't' has neither sound nor picture"):
        sensitivity(model, [Item("t", "", "words")], ["a"], progress=False)
    with pytest.raises(ValueError, match="1 items and 2 answers"):
        sensitivity(model, [item], ["a", "b"], progress=False)


def one(attribute: str, size: float, lost: float, tilt: float = 1.0):
    x = np.random.default_rng(7).normal(size=(30, 3))
    gradients = Sensitivity(np.full(30, size), np.full(30, 2 * size))
    words, heard, between = (Interval(value, value - 0.1, value + 0.1, 0.05, 0.95, 30) for value in (lost + 0.2, 0.2, lost))
    return bound(attribute, gradients, x + np.array([1.0, 0, 0]), x, Loss(words, heard, between, tilt), 1000, draws=3)


def test_the_product_and_its_bound() -> None:
    found = one("pitch", 0.5, 0.3)
    row = found.table.row(0, named=True)
    assert row["w1"] == pytest.approx(1.0) and row["product"] == pytest.approx(0.5 / math.log(2))
    assert row["prefactor"] == pytest.approx(1 + math.exp(0.5 * row["diameter"])) and row["holds"]
    assert row["bound"] == pytest.approx(row["prefactor"] * row["product"])
    assert one("pitch", 9.0, 0.3).table["prefactor"][0] == 1001  # the vocabulary is the cap
    assert not one("pitch", 1e-6, 0.3).table["holds"][0]
    # Scores that are ten times too steep, undone by a tilt of a tenth, give the same bound.
    steep = one("pitch", 5.0, 0.3, tilt=0.1).table
    assert steep["product"][0] == pytest.approx(row["product"]) and steep["prefactor"][0] == pytest.approx(row["prefactor"])
    assert "a gradient norm is no Lipschitz constant" in found.sentence and "0.30 (0.20 to 0.40) bits are lost" in found.sentence
    assert "worth 0.50 (0.40 to 0.60) bits" in found.sentence and (row["gmi_words"], row["gmi"]) == (0.5, 0.2)


def test_orders() -> None:
    agreeing = order(pl.concat([one(str(k), k + 0.1, k).table for k in range(5)]))
    few = order(pl.concat([one(str(k), k + 0.1, k).table for k in range(3)]))
    alike = order(pl.concat([one(str(k), 0.1, k).table for k in range(5)]))
    assert "all are alike." in alike.sentence and math.isnan(alike.interval.value)
    assert "cannot be told" in few.sentence and "rank correlation 1.00, p = 0.17" in few.sentence
    assert agreeing.interval.value == pytest.approx(1.0) and agreeing.table["p"][0] == pytest.approx(1 / 120)
    assert "agrees with" in agreeing.sentence
    against = order(pl.concat([one(str(k), k + 0.1, -k).table for k in range(5)]))
    assert against.interval.value == pytest.approx(-1.0) and "is not shown" in against.sentence
    # Where the tilts alone make the order, the sentence says so.
    table = agreeing.table.drop("rank_correlation", "p").with_columns(product=pl.Series([1.0, 4.0, 9.0, 16.0, 25.0]))
    owed = order(table.with_columns(s=pl.Series([0.1, 0.5, 2.0, 8.0, 25.0])))
    assert "correlation 1.00, p = 0.01; without the tilts, which are fitted to the scores in question, -1.00." in owed.sentence
    assert "without" not in order(table.with_columns(s=pl.Series([0.0, 0.5, 2.0, 8.0, 25.0]))).sentence
    with pytest.raises(ValueError, match="3 attributes or more, got 2"):
        order(pl.concat([one("a", 1, 1).table, one("b", 2, 2).table]))
