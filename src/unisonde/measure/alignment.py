"""Alignment: how alike two representations of the same items are, and how far two sets of states lie apart.

For paired samples: debiased centred kernel alignment and mutual nearest neighbours, each with what chance gives, since width and
depth raise the raw scores. For sets without pairing: maximum mean discrepancy and the modality gap.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .estimate import Estimate, Tested, p_value
from .protocol import DEFAULT, Protocol
from .spectrum import Spectrum, gram
from .states import Array, as_pair, as_samples


def cka(x: Array, y: Array, debiased: bool = True, permutations: int = 0, seed: int = 0) -> Tested:
    """Linear centred kernel alignment of paired samples x `(n, d_x)`, y `(n, d_y)`: HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y)).

    Debiased, HSIC is the U-statistic of Song et al. 2012, eq. 5, so that independent samples score zero in expectation also for
    n << d, where the usual estimate (Kornblith et al. 2019) nears one. It may be negative.

    Raises:
        ValueError: not paired, or fewer than 4 samples (2, if not debiased).
    """
    first, second = as_samples(x, y)
    least = 4 if debiased else 2
    if len(first) < least:
        raise ValueError(f"this alignment needs at least {least} paired samples, got {len(first)}")
    prepare = _debiased if debiased else _centred
    a, b = (prepare(gram(view - view.mean(dim=0))) for view in (first, second))
    # The prepared matrices make both forms of HSIC an inner product, so that permutations cost no product of matrices.
    norm = torch.sqrt((a * a).sum() * (b * b).sum())

    def score(order: Tensor | None) -> float:
        other = b if order is None else b[order][:, order]
        return float(torch.where(norm > 0, (a * other).sum() / norm, 0.0))

    return _against_pairing(score, len(first), permutations, seed, ceiling=1.0, units="alignment", device=a.device)


def mutual_knn(x: Array, y: Array, k: int = 10, permutations: int = 99, seed: int = 0) -> Tested:
    """Mutual k-nearest-neighbour alignment of paired samples (Huh et al. 2024, eq. 11): the mean share of common neighbours.

    Neighbours by cosine similarity, as there. Chance gives k / (n - 1).

    Raises:
        ValueError: not paired, or k not between 1 and n - 1.
    """
    first, second = as_samples(x, y)
    n = len(first)
    if not 1 <= k <= n - 1:
        raise ValueError(f"k must be between 1 and n - 1 = {n - 1}, got {k}")
    a, b = _neighbours(first, k), _neighbours(second, k)

    def score(order: Tensor | None) -> float:
        other = b if order is None else b[order][:, order]
        return float((a & other).sum()) / (n * k)

    return _against_pairing(score, n, permutations, seed, ceiling=1.0, units="share", device=a.device)


def mmd(x: Array, y: Array, protocol: Protocol = DEFAULT, permutations: int = 99) -> Tested:
    """Squared maximum mean discrepancy between two sets of states `(n_x, d)`, `(n_y, d)`, unbiased (Gretton et al. 2012, eq. 3).

    The kernel, its bandwidth and its PCA are those of the protocol on the union. Zero in expectation for equal distributions, and
    so possibly negative. Permutations deal the states to the two sets anew.

    Raises:
        ValueError: different widths, or fewer than 2 states in a set.
    """
    first, second = as_pair(x, y, ("x", "y"))
    n_x, n_y = len(first), len(second)
    if min(n_x, n_y) < 2:
        raise ValueError(f"each set needs at least 2 states, got {n_x} and {n_y}")
    union = Spectrum.of(torch.cat([first, second]), protocol)
    kernel = union.kernel(union.bandwidth(protocol))
    diagonal = kernel.diagonal().clone()
    kernel.fill_diagonal_(0.0)
    n = n_x + n_y

    def score(order: Tensor | None) -> float:
        inside = torch.zeros(n, dtype=kernel.dtype, device=kernel.device)
        inside[slice(n_x) if order is None else order[:n_x]] = 1.0
        outside = 1.0 - inside
        within_x, within_y, across = inside @ kernel @ inside, outside @ kernel @ outside, inside @ kernel @ outside
        return float(within_x / (n_x * (n_x - 1)) + within_y / (n_y * (n_y - 1)) - 2 * across / (n_x * n_y))

    ceiling = 2.0 if protocol.kernel == "gaussian" else 4.0 * float(diagonal.max())
    return _against_pairing(score, n, permutations, protocol.seed, ceiling=ceiling, units="mmd2", device=kernel.device)


def modality_gap(x: Array, y: Array) -> Estimate:
    """The distance between the means of two sets of unit vectors `(n_x, d)`, `(n_y, d)` (Liang et al. 2022, section 2).

    Between 0 and 2. An offset of the centres alone; `mmd` sees every difference between the sets.
    """
    first, second = as_pair(x, y, ("x", "y"))
    gap = _unit(first).mean(dim=0) - _unit(second).mean(dim=0)
    return Estimate(float(torch.linalg.vector_norm(gap)), 2.0, 0.0, len(first) + len(second), "distance", "exact")


def _centred(matrix: Tensor) -> Tensor:
    means = matrix.mean(dim=0)
    return matrix - means - means[:, None] + means.mean()


def _debiased(matrix: Tensor) -> Tensor:
    """The U-centred matrix (Székely and Rizzo 2014, eq. 2.8): <U(K), U(L)> / n (n - 3) is the U-statistic of HSIC."""
    n = len(matrix)
    matrix = matrix.clone().fill_diagonal_(0.0)
    rows = matrix.sum(dim=0) / (n - 2)
    matrix = matrix - rows - rows[:, None] + matrix.sum() / ((n - 1) * (n - 2))
    return matrix.fill_diagonal_(0.0)


def _neighbours(states: Tensor, k: int) -> Tensor:
    similarity = gram(_unit(states)).fill_diagonal_(-torch.inf)
    chosen = torch.topk(similarity, k, dim=1).indices
    return torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, chosen, True)


def _unit(states: Tensor) -> Tensor:
    return states / torch.linalg.vector_norm(states, dim=1, keepdim=True).clamp_min(torch.finfo(states.dtype).tiny)


def _against_pairing(
    score: Callable[[Tensor | None], float], n: int, permutations: int, seed: int, ceiling: float, units: str, device: torch.device
) -> Tested:
    """A score beside its values under random permutations of n."""
    if permutations < 0:
        raise ValueError(f"permutations must not be negative, got {permutations}")
    value = score(None)
    generator = torch.Generator().manual_seed(seed)
    null = [score(torch.randperm(n, generator=generator).to(device)) for _ in range(permutations)]
    mean = math.fsum(null) / len(null) if null else math.nan
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in null) / (len(null) - 1)) if len(null) > 1 else math.nan
    p = p_value(value, null) if null else math.nan
    return Tested(value, ceiling, 0.0, n, units, "exact", p, mean, std, permutations)
