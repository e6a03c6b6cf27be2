"""Intervals over items and paired permutation tests."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from unisonde.measure import Estimate, bootstrap, paired_permutation


def test_a_paired_test_agrees_with_scipy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=10) + 0.6, rng.normal(size=10)
    theirs = stats.permutation_test((a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf)
    ours = paired_permutation(a, b)
    assert ours.method == "exact" and ours.permutations == 1024
    assert ours.p == pytest.approx(theirs.pvalue, abs=1e-12)
    assert ours.value == pytest.approx(np.mean(a - b))


def test_many_items_are_sampled_with_a_seed() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=60) + 0.3, rng.normal(size=60)
    one, two = paired_permutation(a, b, 2500, seed=1), paired_permutation(a, b, 2500, seed=1)
    assert one == two and one.method == "permutation" and one.permutations == 2500
    assert one.p == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.03)


def test_no_difference_has_p_one() -> None:
    assert paired_permutation([1.0, 2.0], [1.0, 2.0]).p == 1.0
    assert paired_permutation(np.ones(40), np.ones(40), 100).p == 1.0


def test_false_positives_come_as_often_as_they_should() -> None:
    rng = np.random.default_rng(5)
    hits = sum(paired_permutation(rng.normal(size=12), rng.normal(size=12)).p <= 0.05 for _ in range(300))
    assert 3 <= hits <= 30


def test_an_interval_covers_the_mean_as_often_as_it_should() -> None:
    rng = np.random.default_rng(6)
    hits = 0
    for seed in range(100):
        i = bootstrap(rng.exponential(size=60), draws=300, seed=seed)
        assert i.low <= i.value <= i.high
        hits += i.low <= 1.0 <= i.high
    assert hits >= 85


def test_estimates_pairs_and_other_statistics() -> None:
    estimates = [Estimate(float(v)) for v in range(9)]
    assert bootstrap(estimates, np.median).value == 4.0
    pairs = np.arange(20.0).reshape(10, 2)
    i = bootstrap(pairs, lambda x: np.corrcoef(x.T)[0, 1], draws=50)
    assert i.value == pytest.approx(1.0)


def test_nothing_to_vary() -> None:
    i = bootstrap([2.0, 2.0, 2.0])
    assert (i.low, i.high, i.stderr) == (2.0, 2.0, 0.0)
    i = bootstrap([2.0])
    assert i.value == 2.0 and math.isnan(i.low)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        bootstrap([1.0, math.nan])
    with pytest.raises(ValueError, match="level"):
        bootstrap([1.0, 2.0], level=1.5)
    with pytest.raises(ValueError, match="one number an item"):
        bootstrap([])
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        paired_permutation([1.0, 2.0], [1.0, 2.0, 3.0])
