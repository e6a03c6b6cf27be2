"""Quadrature for long sequences: against known spectra, and what `auto` chooses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from unisonde.measure import Protocol, conditional_entropy, entropy, gram_entropy, renyi
from unisonde.measure.entropy import uses_lanczos
from unisonde.measure.lanczos import CROSSOVER, LEAST, renyi_lanczos


def hidden(values: np.ndarray, seed: int) -> torch.Tensor:
    """A symmetric matrix with these eigenvalues over their sum, in a basis that nothing can guess."""
    rng = np.random.default_rng(seed)
    matrix = np.diag(values / values.sum())
    for _ in range(3):
        v = rng.normal(size=len(values))
        v /= np.linalg.norm(v)
        matrix -= 2 * np.outer(v, v @ matrix)
        matrix -= 2 * np.outer(matrix @ v, v)
    return torch.from_numpy((matrix + matrix.T) / 2)


def spectrum(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "flat":
        return np.ones(n)
    if kind == "nearly flat":
        return 1 + 0.3 * rng.random(n)
    if kind == "power":
        return np.arange(1, n + 1) ** -rng.uniform(0.6, 2.2)
    if kind == "clustered":
        values = np.full(n, 1e-8)
        k = int(rng.integers(3, 300))
        values[:k] = rng.random(k) + 0.1
        return values
    if kind == "saturated":
        return np.concatenate([1 + 5 * rng.random(20), 1 + 0.02 * rng.normal(size=n - 20)])
    if kind == "median":
        values = np.exp(-np.arange(n) / rng.uniform(5, n / 8)) + 1e-6
        values[0] = values.sum() * 0.43
        return values
    return np.concatenate([[1.0], np.zeros(n - 1)])


@pytest.mark.parametrize("kind", ["flat", "nearly flat", "power", "clustered", "saturated", "median", "one"])
@pytest.mark.parametrize("alpha", [1.0, 1.01, 1.5, 3.0])
def test_errors_are_small_and_covered(kind: str, alpha: float) -> None:
    covered = []
    for seed in range(3):
        values = spectrum(kind, 640, np.random.default_rng(seed))
        exact = float(renyi(torch.from_numpy(values / values.sum()), alpha))
        estimate, stderr = renyi_lanczos(hidden(values, seed), alpha, seed)
        assert abs(estimate - exact) < 0.02 * math.log(2)
        covered.append(abs(estimate - exact) <= 4 * stderr)
    assert all(covered)


def test_a_seed_repeats_and_another_differs() -> None:
    a = hidden(np.arange(1, 601) ** -1.0, 0)
    assert renyi_lanczos(a, 1.01, 3) == renyi_lanczos(a, 1.01, 3)
    assert renyi_lanczos(a, 1.01, 3) != renyi_lanczos(a, 1.01, 4)


def test_states_by_both_methods(rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(600, 12)), rng.normal(size=(100, 12)) + 0.5
    exact, estimate = (entropy(x, Protocol(method=m)) for m in ("exact", "lanczos"))  # type: ignore[arg-type]
    assert (exact.method, estimate.method) == ("exact", "lanczos")
    assert exact.stderr == 0.0 < estimate.stderr < 0.02
    assert estimate.value == pytest.approx(exact.value, abs=5 * estimate.stderr)
    a, b = (conditional_entropy(y, x, Protocol(method=m)) for m in ("exact", "lanczos"))  # type: ignore[arg-type]
    assert b.method == "lanczos" and a.value == pytest.approx(b.value, abs=5 * b.stderr)
    gram = x @ x.T
    a, b = (gram_entropy(gram, Protocol(method=m, ridge=0)) for m in ("exact", "lanczos"))  # type: ignore[arg-type]
    assert b.method == "lanczos" and a.value == pytest.approx(b.value, abs=5 * b.stderr + 1e-4)


def test_auto_is_exact_below_the_crossover_and_where_quadrature_is_no_use() -> None:
    auto, wanted = Protocol(), Protocol(method="lanczos")
    assert not uses_lanczos(CROSSOVER - 1, auto)
    assert uses_lanczos(CROSSOVER, auto)
    assert not uses_lanczos(CROSSOVER, Protocol(alpha=0.5))
    assert not uses_lanczos(CROSSOVER, Protocol(alpha=2.0))
    assert not uses_lanczos(CROSSOVER, Protocol(kernel="linear"))
    assert not uses_lanczos(CROSSOVER, Protocol(method="exact"))
    assert uses_lanczos(LEAST, wanted) and not uses_lanczos(LEAST - 1, wanted)


@pytest.mark.slow
def test_auto_says_that_it_estimated(rng: np.random.Generator) -> None:
    e = entropy(rng.normal(size=(CROSSOVER, 8)))
    assert e.method == "lanczos" and e.stderr > 0
    assert e.value == pytest.approx(entropy(rng.normal(size=(CROSSOVER, 8)), Protocol(method="exact")).value, abs=0.2)
