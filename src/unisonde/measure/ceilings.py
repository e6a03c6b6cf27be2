"""Ceilings: the largest entropy that lengths, block weights and the bandwidth rule allow, whatever the states are.

Raw entropy mostly counts tokens, so a number is read beside its ceiling. All bounds here use one fact: every Rényi entropy is
Schur-concave, so among the spectra that a constraint allows the most even one, in the order of majorisation, has the largest
entropy of every order. A spectrum is written as runs, pairs (eigenvalue, how many).

The diagonal constrains (Schur and Horn: eigenvalues majorise the diagonal), and so does the median rule: at least half of the pairs
lie within the median, their kernel is at least exp(-1 / 2 c^2) for sigma = c medians, and so the largest eigenvalue has a floor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from .protocol import Protocol

Runs = list[tuple[float, float]]


def entropy_ceiling(
    n: int, protocol: Protocol, *, by_rule: bool = True, rank: int | None = None, trace: float | None = None
) -> float:
    """The largest entropy of n states, in the units of `protocol`.

    Args:
        n: how many states.
        protocol: kernel, order, bandwidth rule, ridge, units.
        by_rule: whether the bandwidth was taken from these n states by the rule of the protocol. If it came from a larger set, only
            log n is implied.
        rank: for the linear kernel, the largest rank of the kernel without ridge.
        trace: for the linear kernel, the trace of K + ridge I, which the ridge is measured against.
    """
    runs: Runs = [(1.0 / n, n)]
    if protocol.kernel == "linear":
        runs = _of_rank(runs, n, protocol, rank, trace)
    elif by_rule and protocol.bandwidth == "median":
        runs = _with_floor([(n, 1.0)], protocol)
    return renyi_of_runs(runs, protocol.alpha) / protocol.unit


def joint_ceiling(
    n_prompt: int, n_response: int, protocol: Protocol, *, rank: int | None = None, trace: float | None = None
) -> float:
    """The largest joint entropy of a prompt and a response of these lengths, in the units of `protocol`.

    Under `trace` and `weighted` each part holds half of the trace (exactly so for `trace`, and for `weighted` with a Gaussian
    kernel); under `none`, and for the draws of `subsample`, every state weighs alike.
    """
    n = n_prompt + n_response
    balanced = protocol.length == "trace" or (protocol.length == "weighted" and protocol.kernel == "gaussian")
    # The weight of one state of each part; only their ratio matters.
    parts = [(n_prompt, n_response / n), (n_response, n_prompt / n)] if balanced else [(n, 1.0)]
    total = sum(count * weight for count, weight in parts)
    if protocol.kernel == "gaussian" and protocol.bandwidth == "median":
        runs = _with_floor(parts, protocol)
    else:
        runs = [(weight / total, count) for count, weight in parts]
    if protocol.kernel == "linear" and protocol.length in ("none", "subsample"):
        runs = _of_rank(runs, n, protocol, rank, trace)
    ceiling = renyi_of_runs(runs, protocol.alpha)
    if protocol.kernel == "linear" and protocol.ridge == 0.0 and rank is not None:
        ceiling = min(ceiling, math.log(max(rank, 1)))
    return ceiling / protocol.unit


def median_floor(n: int, scale: float = 1.0) -> float:
    """The least possible largest eigenvalue of the trace-normalised Gaussian kernel of n states with sigma = scale medians.

    With 1 the vector of ones, lambda_max >= 1^T A 1 / n, which counts every pair; papers.md 4.2 has the same bound.
    """
    return _floor([(n, 1.0)], scale, 0.0)


def renyi_of_runs(runs: Iterable[tuple[float, float]], alpha: float) -> float:
    """The Rényi entropy in nats of a spectrum written as runs (eigenvalue, how many)."""
    runs = [(value, count) for value, count in runs if value > 0 and count > 0]
    if alpha == 1.0:
        return -math.fsum(count * value * math.log(value) for value, count in runs)
    # sum(l^alpha) = 1 + sum(l (l^(alpha - 1) - 1)) keeps every digit near alpha = 1.
    excess = math.fsum(count * value * math.expm1((alpha - 1.0) * math.log(value)) for value, count in runs)
    if excess > -0.5:
        return -math.log1p(excess) / (alpha - 1.0)
    return math.log(math.fsum(count * value**alpha for value, count in runs)) / (1.0 - alpha)


def _with_floor(parts: list[tuple[int, float]], protocol: Protocol) -> Runs:
    """The most even spectrum with the diagonal of `parts` (count, weight) whose largest eigenvalue obeys the median rule.

    Its partial sums are the least concave majorant of those of the diagonal and of the floor.
    """
    total = sum(count * weight for count, weight in parts)
    diagonal = sorted(((weight / total, count) for count, weight in parts), reverse=True)
    floor = min(_floor(parts, protocol.bandwidth_scale, protocol.ridge), 1.0)
    if floor <= diagonal[0][0]:
        return list(diagonal)
    n = sum(count for _, count in diagonal)
    if n == 1:
        return [(1.0, 1)]
    runs: Runs = [(floor, 1)]
    heavy, count = diagonal[0]
    even = (1.0 - floor) / (n - 1)
    if len(diagonal) == 2 and count > 1:
        rest = (heavy * count - floor) / (count - 1)
        if rest > even:
            return [*runs, (rest, count - 1), diagonal[1]]
    return [*runs, (even, n - 1)]


def _floor(parts: list[tuple[int, float]], scale: float, ridge: float) -> float:
    """The floor of the largest eigenvalue, by the test vector W^(1/2) 1: at worst the close half of the pairs is the lightest."""
    n = sum(count for count, _ in parts)
    close = (n * (n - 1) // 2 + 1) // 2
    kinds = [(weight * weight, count * (count - 1) // 2) for count, weight in parts]
    if len(parts) == 2:
        (n_1, w_1), (n_2, w_2) = parts
        kinds.append((w_1 * w_2, n_1 * n_2))
    pairs = 0.0
    for weight, count in sorted(kinds):
        taken = min(count, close)
        pairs += weight * taken
        close -= taken
    total = sum(count * weight for count, weight in parts)
    squares = sum(count * weight * weight for count, weight in parts)
    return (squares * (1.0 + ridge) + 2.0 * pairs * math.exp(-0.5 / scale**2)) / (total * total * (1.0 + ridge))


def _of_rank(runs: Runs, n: int, protocol: Protocol, rank: int | None, trace: float | None) -> Runs:
    """The most even spectrum of a kernel of that rank plus a ridge; `runs` if the ridge outweighs the kernel."""
    if rank is None or rank >= n:
        return runs
    if rank < 1 or not trace:
        return [(1.0, 1)]
    tail = protocol.ridge / trace
    head = (1.0 - (n - rank) * tail) / rank
    return [(head, rank), (tail, n - rank)] if head > tail else runs
