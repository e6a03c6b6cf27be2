"""Ceilings: the bound of the median rule, how tight it is, and that no states pass it."""

from __future__ import annotations

import math

import numpy as np
import plain
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unisonde.measure import Protocol, conditional_entropy, entropy, entropy_ceiling, joint_ceiling, layer_estimates, median_floor
from unisonde.measure.ceilings import renyi_of_runs

ONE = Protocol(alpha=1.0, ridge=0.0, pca=None)


@pytest.mark.parametrize(("n", "bits"), [(128, 5.72), (350, 6.76), (576, 7.26), (1024, 7.85), (2048, 8.55)])
def test_the_ceiling_of_the_median_rule(n: int, bits: float) -> None:
    assert entropy_ceiling(n, ONE) == pytest.approx(bits, abs=5e-3)
    l0 = 1 / n + math.exp(-0.5) / 2 * (n - 1) / n
    assert median_floor(n) == pytest.approx(l0, rel=2 / n**2)


def test_the_largest_eigenvalue_never_falls_below_the_floor() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        n, d = int(rng.integers(2, 12)), int(rng.integers(1, 12))
        x = rng.normal(size=(n, d)) * 10.0 ** rng.uniform(-2, 2, size=d)
        scale = float(rng.choice([0.3, 1.0, 3.0]))
        top = np.linalg.eigvalsh(plain.gaussian(x, scale * plain.median(x)) / n)[-1]
        assert top >= median_floor(n, scale) - 1e-12


def test_the_ceiling_is_nearly_reached_by_states_that_try() -> None:
    # Half of the pairs exactly at the median, the rest far away, and nothing close: two far cliques of equidistant states.
    half = 6
    x = np.zeros((2 * half, 2 * half + 1))
    x[:, :-1] = np.eye(2 * half)
    x[half:, -1] = 1.0
    assert entropy(x, ONE).value <= entropy_ceiling(2 * half, ONE) + 1e-12


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from([0.5, 1.0, 1.01, 2.0, 6.0]), st.sampled_from(["trace", "none"]))
def test_ceilings_are_ordered(n_p: int, n_r: int, alpha: float, rule: str) -> None:
    fixed = Protocol(alpha=alpha, bandwidth=1.0, ridge=0, pca=None, length=rule)  # type: ignore[arg-type]
    median = Protocol(alpha=alpha, ridge=0, pca=None, length=rule)  # type: ignore[arg-type]
    assert joint_ceiling(n_p, n_r, median) <= joint_ceiling(n_p, n_r, fixed) + 1e-12
    assert joint_ceiling(n_p, n_r, fixed) <= math.log2(n_p + n_r) + 1e-12
    assert entropy_ceiling(n_p, median) <= entropy_ceiling(n_p, fixed) + 1e-12
    assert entropy_ceiling(n_p, fixed) == pytest.approx(math.log2(n_p), abs=1e-12)


def test_the_conditional_ceiling_is_the_joint_ceiling_less_the_prompt_term(rng: np.random.Generator) -> None:
    out = layer_estimates(rng.normal(size=(5, 3)), rng.normal(size=(9, 3)))
    assert out["conditional_entropy"].ceiling == out["joint_entropy"].ceiling - out["prompt_term"].value
    saturated = np.eye(30) * 1e3
    e = conditional_entropy(saturated[:10], saturated[10:], Protocol(alpha=1, bandwidth=1.0, ridge=0, pca=None))
    assert e.ceiling == pytest.approx(e.value, abs=1e-9)
    assert e.value == pytest.approx(1 + (math.log2(20) - math.log2(10)) / 2, abs=1e-9)


def test_a_linear_kernel_of_low_rank_has_a_low_ceiling(rng: np.random.Generator) -> None:
    p = Protocol(alpha=1, kernel="linear", ridge=0, pca=None)
    assert entropy(rng.normal(size=(50, 4)), p).ceiling == pytest.approx(2.0)
    assert entropy(rng.normal(size=(5, 40)), p).ceiling == pytest.approx(2.0)
    assert entropy(rng.normal(size=(50, 40)), Protocol(alpha=1, kernel="linear", ridge=0, pca=8)).ceiling == pytest.approx(3.0)


def test_runs() -> None:
    assert renyi_of_runs([(0.25, 4)], 1.0) == pytest.approx(math.log(4))
    assert renyi_of_runs([(0.25, 4)], 9.0) == pytest.approx(math.log(4))
    assert renyi_of_runs([(0.5, 1), (0.125, 4), (0.0, 3)], 1.0) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(8))
