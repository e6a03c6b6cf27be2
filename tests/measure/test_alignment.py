"""Alignment of paired samples and distances of sets."""

from __future__ import annotations

import math

import numpy as np
import pytest

from unisonde.measure import Protocol, cka, mmd, modality_gap, mutual_knn


def hsic_u(k: np.ndarray, m: np.ndarray) -> float:
    """Song et al. 2012, eq. 5, term by term."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    total = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    return float(total / (n * (n - 3)))


def test_debiased_cka_is_the_u_statistic(rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(12, 5)) + 4, rng.normal(size=(12, 8)) - 2
    k, m = x @ x.T, y @ y.T
    assert cka(x, y).value == pytest.approx(hsic_u(k, m) / math.sqrt(hsic_u(k, k) * hsic_u(m, m)), abs=1e-9)
    h = np.eye(12) - 1 / 12
    a, b = h @ k @ h, h @ m @ h
    assert cka(x, y, debiased=False).value == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-9)


def test_few_samples_of_many_channels_look_alike_unless_debiased(rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(20, 2000)), rng.normal(size=(20, 2000))
    assert cka(x, y, debiased=False).value > 0.9
    assert abs(cka(x, y).value) < 0.3


def test_unpaired_rows_have_no_alignment(rng: np.random.Generator) -> None:
    x = rng.normal(size=(60, 5))
    y = x + 0.1 * rng.normal(size=(60, 5))
    paired, shuffled = cka(x, y, permutations=19), cka(x, rng.permutation(y), permutations=19)
    assert paired.value > 0.9 and paired.p == pytest.approx(0.05)
    assert abs(shuffled.value) < 0.2 and shuffled.p > 0.05


def test_mutual_neighbours_by_hand_and_by_chance(rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(40, 6)), rng.normal(size=(40, 6))
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y)]
    similarity = [u @ u.T - 9 * np.eye(40) for u in unit]
    sets = [[set(np.argsort(-row)[:5]) for row in s] for s in similarity]
    expected = np.mean([len(a & b) / 5 for a, b in zip(*sets, strict=True)])
    e = mutual_knn(x, y, 5, permutations=60)
    assert e.value == pytest.approx(expected, abs=1e-12)
    assert e.null_mean == pytest.approx(5 / 39, abs=0.02)
    assert mutual_knn(x, x @ np.diag([1, 1, 1, 1, 1, 1.0]), 5, permutations=19).p == pytest.approx(0.05)


def test_mmd_by_hand(rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(9, 3)) + 1

    def mean(a: np.ndarray, b: np.ndarray, same: bool) -> float:
        values = [math.exp(-((p - q) ** 2).sum() / 2) for i, p in enumerate(a) for j, q in enumerate(b) if not (same and i == j)]
        return float(np.mean(values))

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert mmd(x, y, Protocol(bandwidth=1.0, pca=None), 0).value == pytest.approx(expected, abs=1e-12)


def test_mmd_tells_sets_apart_and_not_halves_of_one(rng: np.random.Generator) -> None:
    x = rng.normal(size=(60, 4))
    assert mmd(x[:30], x[30:] + 2.0, permutations=19).p == pytest.approx(0.05)
    assert mmd(x[:30], x[30:], permutations=19).p > 0.05
    # The same mean, another spread: no gap of centres, and still a difference.
    assert mmd(x[:30], 4 * x[30:], permutations=19).p == pytest.approx(0.05)


def test_modality_gap(rng: np.random.Generator) -> None:
    x = rng.normal(size=(50, 8))
    assert modality_gap(x, 7 * x).value == pytest.approx(0.0, abs=1e-12)
    assert modality_gap(np.ones((3, 4)), -np.ones((2, 4))).value == pytest.approx(2.0)


def test_bad_input_is_refused() -> None:
    x = np.zeros((3, 2))
    with pytest.raises(ValueError, match="at least 4"):
        cka(x, x)
    with pytest.raises(ValueError, match="k must be between 1 and n - 1 = 2"):
        mutual_knn(x, x, 3)
    with pytest.raises(ValueError, match="at least 2 states"):
        mmd(x[:1], x)
    with pytest.raises(ValueError, match="width"):
        modality_gap(x, np.zeros((3, 3)))
    with pytest.raises(ValueError, match="not be negative"):
        mutual_knn(x, x, 1, permutations=-1)
