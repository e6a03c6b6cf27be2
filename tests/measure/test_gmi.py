"""Generalised mutual information: laws, held-out honesty, and the printed equation that is never positive."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from unisonde.measure import (
    calibration_loss,
    equation_3_as_printed,
    gmi,
    gmi_test,
    information_at_one,
    v_information,
)
from unisonde.measure.gmi import best_tilt


def sample(n: int, k: int, strength: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(k, size=n)
    scores = rng.normal(size=(n, k))
    scores[np.arange(n), labels] += strength
    return scores, labels


def by_hand(scores: np.ndarray, labels: np.ndarray, s: float) -> float:
    k = scores.shape[1]
    prior = np.bincount(labels, minlength=k) / len(labels)
    with np.errstate(divide="ignore"):
        values = s * scores[np.arange(len(labels)), labels] - logsumexp(s * scores + np.log(prior), axis=1)
    return float(values.mean() / math.log(2))


@settings(deadline=None, max_examples=40)
@given(st.integers(5, 60), st.integers(2, 5), st.floats(-1, 2), st.integers(0, 10**6))
def test_the_supremum_is_that_of_a_library(n: int, k: int, strength: float, seed: int) -> None:
    scores, labels = sample(n, k, strength, seed)
    ours = gmi(scores, labels, folds=1)
    best = minimize_scalar(lambda s: -by_hand(scores, labels, s), bounds=(0, 60), method="bounded", options={"xatol": 1e-10})
    assert ours.value >= -best.fun - 1e-7
    assert ours.value == pytest.approx(by_hand(scores, labels, ours.s), abs=1e-9)
    assert -1e-12 <= ours.value <= ours.ceiling + 1e-9


@settings(deadline=None, max_examples=30)
@given(st.floats(0.1, 10), st.integers(0, 10**6))
def test_scaling_and_shifting_a_score_changes_nothing(a: float, seed: int) -> None:
    scores, labels = sample(40, 3, 1.0, seed)
    shift = np.random.default_rng(seed).normal(size=(40, 1)) * 5
    assert gmi(a * scores + shift, labels).value == pytest.approx(gmi(scores, labels).value, abs=1e-7)
    assert gmi(a * scores, labels).s == pytest.approx(gmi(scores, labels).s / a, rel=1e-6)


def test_a_score_that_ignores_the_input_is_worth_nothing() -> None:
    labels = np.arange(60) % 3
    scores = np.tile(np.log([0.5, 0.3, 0.2]), (60, 1))
    assert gmi(scores, labels).value == pytest.approx(0.0, abs=1e-9)
    assert gmi(scores, labels).s == pytest.approx(0.0, abs=1e-12)


def test_a_calibrated_score_has_tilt_one_and_no_loss() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(40000, 3))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (rng.random((40000, 1)) > probabilities.cumsum(1)).sum(1)
    e = gmi(np.log(probabilities), labels, "uniform")
    assert e.s == pytest.approx(1.0, abs=0.05)
    assert abs(calibration_loss(np.log(probabilities), labels, "uniform").value) < 1e-3


def test_cross_fitting_is_honest_about_noise() -> None:
    inside, outside = [], []
    for seed in range(60):
        scores, labels = sample(30, 4, 0.0, seed)
        inside.append(gmi(scores, labels, folds=1).value)
        outside.append(gmi(scores, labels).value)
    assert np.mean(inside) > 0.005
    assert np.mean(outside) < 0.0
    assert min(outside) < 0.0  # held-out values are not clamped


def test_the_cross_fit_by_hand() -> None:
    scores, labels = sample(21, 3, 1.0, 5)
    e = gmi(scores, labels, "uniform", folds=3, seed=2)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(2)).numpy()
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(21, dtype=int)
    fold[order] = np.arange(21) % 3
    held = np.empty(21)
    for index in range(3):
        s = gmi(scores[fold != index], labels[fold != index], "uniform", folds=1).s
        rows = np.flatnonzero(fold == index)
        held[rows] = (s * scores[rows, labels[rows]] - logsumexp(s * scores[rows] - math.log(3), axis=1)) / math.log(2)
    assert e.value == pytest.approx(held.mean(), abs=1e-9)
    assert e.stderr == pytest.approx(held.std(ddof=1) / math.sqrt(21), abs=1e-9)
    assert e.contributions == pytest.approx(tuple(held), abs=1e-9)
    assert e.s == pytest.approx(gmi(scores, labels, "uniform", folds=1).s)


def test_a_perfect_score_reaches_the_entropy_of_the_answers() -> None:
    labels = np.arange(90) % 3
    scores = np.eye(3)[labels]
    e = gmi(scores, labels)
    assert e.value == pytest.approx(math.log2(3), abs=1e-6)
    assert math.isfinite(e.s)
    ruled_out = np.where(np.eye(3)[labels] > 0, 0.0, -np.inf)
    assert gmi(ruled_out, labels).value == pytest.approx(math.log2(3), abs=1e-9)


@pytest.mark.parametrize(("n", "k", "strength", "doubt"), [(12, 3, 1.0, 1.0), (40, 5, 0.3, 2.5), (6, 2, 8.0, 1.0)])
def test_doubt_is_items_of_which_nothing_is_known(n: int, k: int, strength: float, doubt: float) -> None:
    """The same as further rows, one an answer, that weigh what the prior says."""
    scores, labels = (torch.from_numpy(x) for x in sample(n, k, strength, 3))
    scores[0, (labels[0] + 1) % k] = -math.inf
    prior = torch.arange(1.0, k + 1, dtype=torch.float64) / sum(range(1, k + 1))
    unknown = torch.where(scores.isfinite(), doubt * prior / n, 0.0)
    rows, right = torch.cat([scores, scores.repeat_interleave(k, 0)]), torch.cat([labels, torch.arange(k).repeat(n)])
    weights = torch.cat([torch.ones(n, dtype=torch.float64), unknown.reshape(-1)])
    found = best_tilt(scores, labels, prior.log(), doubt=doubt)
    assert 0 < found == pytest.approx(best_tilt(rows, right, prior.log(), weights), rel=1e-9)
    assert found < best_tilt(scores, labels, prior.log())


def test_of_many_items_the_unknown_one_is_of_no_account() -> None:
    scores, labels = sample(60, 4, 1.0, 0)
    best = gmi(scores, labels, folds=1).s
    assert 0.8 * best < gmi(scores, labels, folds=1, doubt=1.0).s < best
    assert gmi(np.tile(scores, (50, 1)), np.tile(labels, 50), folds=1, doubt=1.0).s == pytest.approx(best, rel=5e-3)


@pytest.mark.parametrize("steepness", [0.1, 1.0, 30.0])
def test_with_doubt_one_mistake_does_not_cost_all_that_is_known(steepness: float) -> None:
    """The fold without the mistake has no best tilt: without doubt, the other pays for it."""
    said = np.arange(100) % 4
    labels = said.copy()
    labels[17] = (labels[17] + 1) % 4
    scores = steepness * np.eye(4)[said]
    plain, doubted = gmi(scores, labels, folds=5), gmi(scores, labels, folds=5, doubt=1.0)
    assert min(plain.contributions) < -20 and -8 < min(doubted.contributions) < -3
    assert plain.value < 1.75 and 1.7 < doubted.value < 2.0
    assert gmi_test(scores, labels, folds=5, permutations=3, doubt=1.0).value == doubted.value
    lost = calibration_loss(scores, labels, folds=5, doubt=1.0).value
    assert lost == pytest.approx(doubted.value - information_at_one(scores, labels).value)


@pytest.mark.parametrize(("n", "k", "doubt"), [(12, 3, 1.0), (100, 4, 0.5), (5, 2, 3.0)])
def test_the_tilt_of_items_without_a_mistake_is_as_sure_as_they_are_many(n: int, k: int, doubt: float) -> None:
    """By hand: n items right and d unknown are right in (n + d / K) of n + d, which is where e^s = 1 + nK / d."""
    labels = np.arange(n) % k
    assert gmi(2.0 * np.eye(k)[labels], labels, "uniform", folds=1, doubt=doubt).s == pytest.approx(math.log(1 + n * k / doubt) / 2)


def test_doubt_where_every_wrong_answer_was_ruled_out() -> None:
    """Nothing else is possible, so nothing is unknown, whatever number the right answer has."""
    labels = np.arange(9) % 3
    ruled_out = np.where(np.eye(3)[labels] > 0, -3.7, -np.inf)
    assert gmi(ruled_out, labels, folds=3, doubt=1.0).value == pytest.approx(math.log2(3), abs=1e-9)


def test_a_right_answer_that_was_ruled_out() -> None:
    scores = np.array([[0.0, -np.inf], [0.0, -np.inf], [-np.inf, 0.0]])
    e = gmi(scores, [0, 1, 1], folds=1)
    assert (e.value, e.s) == (0.0, 0.0)
    assert information_at_one(scores, [0, 1, 1]).value == -math.inf


def test_the_permutation_null_is_at_zero_and_tells_signal_from_noise() -> None:
    scores, labels = sample(80, 3, 1.5, 0)
    test = gmi_test(scores, labels, permutations=49)
    assert test.p == pytest.approx(1 / 50)
    assert abs(test.null_mean) < 0.05
    scores, labels = sample(80, 3, 0.0, 0)
    assert gmi_test(scores, labels, permutations=49).p > 0.05


def test_v_information_is_a_difference_of_cross_entropies() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, 4))
    log_p = logits - logsumexp(logits, axis=1, keepdims=True)
    labels = rng.integers(4, size=50)
    prior = np.bincount(labels, minlength=4) / 50
    expected = (log_p[np.arange(50), labels] - np.log(prior[labels])).mean() / math.log(2)
    assert v_information(log_p, labels).value == pytest.approx(expected, abs=1e-9)
    with pytest.raises(ValueError, match="normalised in each row"):
        v_information(logits, labels)


def test_gmi_is_the_v_information_of_the_tilted_decoder() -> None:
    scores, labels = sample(70, 4, 1.0, 3)
    e = gmi(scores, labels, folds=1)
    prior = np.bincount(labels, minlength=4) / 70
    tilted = np.log(prior) + e.s * scores
    tilted -= logsumexp(tilted, axis=1, keepdims=True)
    assert v_information(tilted, labels).value == pytest.approx(e.value, abs=1e-9)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.floats(-20, 0), st.integers(0, 3)), min_size=1, max_size=30))
def test_equation_3_as_printed_is_never_positive(samples: list[tuple[float, int]]) -> None:
    scores, groups = zip(*samples, strict=True)
    assert equation_3_as_printed(list(scores), list(groups)).value <= 1e-9


@pytest.mark.parametrize(
    ("scores", "labels", "options", "says"),
    [
        (np.zeros(4), [0] * 4, {}, r"\(N, K\)"),
        (np.zeros((0, 2)), [], {}, r"\(0, 2\)"),
        (np.zeros((3, 2)), [0, 1], {}, r"\(3,\)"),
        (np.zeros((2, 2)), [0, 2], {}, "from 0 to 1"),
        (np.zeros((2, 2)), [0, 0.5], {}, "integers"),
        (np.array([[np.nan, 0.0], [0, 0]]), [0, 1], {}, "NaN"),
        (np.array([[np.inf, 0.0], [0, 0]]), [0, 1], {}, r"\+inf"),
        (np.zeros((2, 2)), [0, 1], {"prior": [1.0]}, "2 weights"),
        (np.zeros((2, 2)), [0, 1], {"prior": [2.0, -1.0]}, "2 weights"),
        (np.zeros((2, 2)), [0, 1], {"prior": "flat"}, "uniform"),
        (np.zeros((2, 2)), [0, 1], {"folds": 3}, "folds"),
        (np.zeros((2, 2)), [0, 1], {"folds": 0}, "folds"),
        (np.zeros((2, 2)), [0, 1], {"doubt": -1.0}, "doubt must be a number of samples, 0 or more, got -1.0"),
        (np.zeros((2, 2)), [0, 1], {"doubt": math.nan}, "got nan"),
    ],
)
def test_bad_input_is_refused(scores: np.ndarray, labels: list[float], options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        gmi(scores, labels, **options)  # type: ignore[arg-type]
