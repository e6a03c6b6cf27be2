"""Uncertainty over items: bootstrap intervals, and paired permutation tests between two sets of numbers.

An `Estimate` says how exact one number is given its states. How it would vary over other items of the same kind is said here, from
one number an item. The resampling itself is scipy's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .estimate import Estimate, Tested, p_value
from .states import Array, as_float64


@dataclass(frozen=True)
class Interval:
    """A number with its bootstrap interval.

    Attributes:
        value: the statistic on the items themselves.
        low, high: the ends of the interval.
        stderr: standard deviation over resamples.
        level: its nominal coverage.
        n: how many items.
    """

    value: float
    low: float
    high: float
    stderr: float
    level: float
    n: int


def bootstrap(
    values: Array | list[Estimate],
    statistic: Callable[..., np.ndarray] = np.mean,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """A bias-corrected and accelerated bootstrap interval (Efron 1987) of a statistic over items.

    Args:
        values: one number or `Estimate` an item, `(n,)`; or `(n, m)`, m numbers an item that stay together.
        statistic: a function of an array with the items on the first axis, e.g. `np.mean` or `np.median`. A statistic of several
            numbers an item gets an array `(n, m)`.
        level: nominal coverage.
        draws: resamples.
        seed: of the resampling.

    Raises:
        ValueError: no items, values that are not finite, or a level that is not between 0 and 1.
    """
    array = _numbers(values, "values")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be between 0 and 1, got {level!r}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws!r}")
    n = len(array)
    value = float(statistic(array) if array.ndim == 2 else statistic(array, axis=0))
    if n == 1 or (array == array[0]).all():
        # Nothing varies: the interval is the point (one item says nothing of others, and has no interval to give).
        spread = (math.nan, math.nan) if n == 1 else (value, value)
        return Interval(value, *spread, math.nan if n == 1 else 0.0, level, n)
    from scipy import stats

    def of_rows(rows: np.ndarray) -> float:
        return float(statistic(array[rows]) if array.ndim == 2 else statistic(array[rows], axis=0))

    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # seen to below
        result = stats.bootstrap(
            (np.arange(n),),
            of_rows,
            confidence_level=level,
            n_resamples=draws,
            vectorized=False,
            method="BCa",
            rng=np.random.default_rng(seed),
        )
    low, high = float(result.confidence_interval.low), float(result.confidence_interval.high)
    if math.isnan(low) or math.isnan(high):
        # A statistic that hardly moves has no acceleration; the percentiles still stand.
        low, high = (float(q) for q in np.quantile(result.bootstrap_distribution, [(1 - level) / 2, (1 + level) / 2]))
    return Interval(value, low, high, float(result.standard_error), level, n)


def paired_permutation(a: Array | list[Estimate], b: Array | list[Estimate], permutations: int = 9999, seed: int = 0) -> Tested:
    """A two-sided sign-flip test of mean(a - b) = 0 for two numbers an item, `(n,)` each, in the same order of items.

    All 2^n flips are tried when they are no more than `permutations`, and then p is exact. The value is the mean difference.

    Raises:
        ValueError: different lengths, no items, or values that are not finite.
    """
    first, second = _numbers(a, "a"), _numbers(b, "b")
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"a {first.shape} and b {second.shape} must be one number an item, in the same order")
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations!r}")
    differences = first - second
    n = len(differences)
    exhaustive = n < 63 and 2**n <= permutations
    if exhaustive:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        null = signs @ differences / n
    else:
        rng = np.random.default_rng(seed)
        null = np.concatenate(
            [
                rng.choice([-1.0, 1.0], size=(min(1000, permutations - start), n)) @ differences / n
                for start in range(0, permutations, 1000)
            ]
        )
    value = float(differences.mean())
    slack = 1e-12 * max(1.0, float(np.abs(differences).max()))
    # The observed signs are among all flips; among random ones they are added.
    p = float((np.abs(null) >= abs(value) - slack).mean()) if exhaustive else p_value(abs(value), np.abs(null).tolist())
    error = float(differences.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    method = "exact" if exhaustive else "permutation"
    return Tested(value, math.inf, error, n, "difference", method, p, float(null.mean()), float(null.std()), len(null))


def _numbers(values: Array | list[Estimate], name: str) -> np.ndarray:
    if isinstance(values, (list, tuple)) and values and all(isinstance(v, Estimate) for v in values):
        values = [float(v) for v in values]
    array = as_float64(values, name).cpu().numpy()
    if array.ndim not in (1, 2) or len(array) == 0:
        raise ValueError(f"{name} must hold one number an item, (n,) or (n, m), got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} {array.shape} hold values that are not finite")
    return array
