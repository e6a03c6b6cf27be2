"""Measures that peers report layer by layer, on the same states, each by its own formula.

They answer neighbouring questions with other kernels and other normalisations, so they are here to be compared with, not to be
mixed. What is easily confused is said in each docstring: singular values or their squares, centred or not, nats or exponentials.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .eigen import eigvalsh
from .entropy import entropy, gram_entropy, renyi
from .estimate import Estimate
from .protocol import Protocol
from .spectrum import gram, normalised
from .states import Array, as_float64, as_samples, as_states

LINEAR = Protocol(alpha=1.0, kernel="linear", ridge=0.0, pca=None, units="nats")
"""The linear von Neumann entropy of centred states, in nats: what most peers build on."""


def effective_rank(states: Array) -> Estimate:
    """exp of the entropy of the singular values of states `(n, d)` over their sum (Roy and Vetterli 2007).

    Singular values, not their squares; states as they are, not centred. Between 1 and min(n, d).
    """
    matrix = as_states(states)
    values = torch.linalg.svdvals(matrix)
    return _exponential(renyi(normalised(values), 1.0), min(matrix.shape), len(matrix))


def rankme(states: Array, epsilon: float = 1e-7) -> Estimate:
    """RankMe (Garrido et al. 2023, eq. 1): exp of -sum p log p with p = sigma / |sigma|_1 + epsilon, sigma the singular values.

    `effective_rank` with a constant added, which raises the value of low-rank states. States of zero have none and give 1.
    """
    matrix = as_states(states)
    values = torch.linalg.svdvals(matrix)
    total = values.sum()
    p = values / total.clamp_min(torch.finfo(torch.float64).tiny) + epsilon
    h = torch.where(total > 0, -(p * p.log()).sum(), 0.0)
    return _exponential(h, math.inf, len(matrix))


def vendi(states: Array, q: float = 1.0) -> Estimate:
    """The Vendi score (Friedman and Dieng 2023; order q: Pasarkar and Dieng 2024): exp H_q(K / n), K the cosine similarities.

    States are scaled to unit length, not centred. A zero state is like nothing else and counts as nothing.
    """
    matrix = as_states(states)
    lengths = torch.linalg.vector_norm(matrix, dim=1, keepdim=True)
    unit = matrix / lengths.clamp_min(torch.finfo(torch.float64).tiny)
    return _exponential(_linear_entropy(unit, q), min(matrix.shape), len(matrix))


def vendi_of_gram(similarity: Array, q: float = 1.0) -> Estimate:
    """The Vendi score of a similarity matrix `(n, n)`, positive semi-definite, usually with ones on the diagonal."""
    e = gram_entropy(similarity, Protocol(alpha=q, ridge=0.0, units="nats", method="exact"))
    return Estimate(math.exp(e.value), float(e.n), 0.0, e.n, "states", "exact")


def erank(states: Array) -> Estimate:
    """The effective rank behind Diff-eRank (Wei et al. 2024, definition 3): exp of the von Neumann entropy of the covariance.

    States are centred, then scaled to unit length. Squared singular values, unlike `effective_rank`.
    """
    matrix = _centred_unit(as_states(states))
    return _exponential(_linear_entropy(matrix, 1.0), min(matrix.shape), len(matrix))


def diff_erank(trained: Array, untrained: Array) -> Estimate:
    """Diff-eRank (Wei et al. 2024, definition 4): `erank` of the untrained model's states less that of the trained one's."""
    after, before = erank(trained), erank(untrained)
    return Estimate(before.value - after.value, before.ceiling - 1.0, 0.0, after.n, "dimensions", "exact")


def layer_by_layer_entropy(states: Array, alpha: float = 1.0, normalise: str = "raw") -> Estimate:
    """The prompt entropy of "Layer by Layer" (Skean et al. 2025, eq. 1), of states `(n, d)`.

    States are centred, then scaled to unit length; linear kernel; nats. `normalise` divides by log n (`logN`), log d (`logD`),
    their product (`logNlogD`) or log min(n, d) (`maxEntropy`). Negative entries of the Gram matrix stay: without them it is no
    kernel.
    """
    matrix = _centred_unit(as_states(states))
    n, d = matrix.shape
    by = {
        "raw": 1.0,
        "logN": math.log(n),
        "logD": math.log(d),
        "logNlogD": math.log(n) * math.log(d),
        "maxEntropy": math.log(min(n, d)),
    }
    if normalise not in by:
        raise ValueError(f"normalise must be one of {', '.join(by)}, got {normalise!r}")
    value, ceiling = float(_linear_entropy(matrix, alpha)), math.log(min(n, d))
    # One state, or one channel, has no entropy under any normalisation; log 1 must not divide it.
    scale = by[normalise] or 1.0
    return Estimate(value / scale, ceiling / scale, 0.0, n, "nats" if normalise == "raw" else "share", "exact")


def dataset_entropy(sequences: Sequence[Array], protocol: Protocol = LINEAR) -> Estimate:
    """The entropy over a data set of the mean states of its sequences, each `(n_i, d)` (Skean et al. 2025, section 3).

    Raises:
        ValueError: no sequences, or widths that differ.
    """
    if len(sequences) == 0:
        raise ValueError("a data-set entropy needs at least one sequence of states, got none")
    means = [as_states(states, f"sequence {index}").mean(dim=0) for index, states in enumerate(sequences)]
    widths = {len(mean) for mean in means}
    if len(widths) > 1:
        raise ValueError(f"the sequences must share one width, got {sorted(widths)}")
    return entropy(torch.stack(means), protocol)


def curvature(states: Array, step: int = 1, of: Literal["differences", "states"] = "differences") -> Estimate:
    """The mean angle in radians along a sequence of states `(n, d)` (Hosseini and Fedorenko 2023, eq. 2).

    Between successive differences z_(i+1) - z_i and z_(i+step+1) - z_(i+step), as defined; `of="states"` takes the angle between
    the states z_i and z_(i+step) themselves, as the code of "Layer by Layer" does. Pairs with a zero vector have no angle and are
    left out.

    Raises:
        ValueError: too few states for one angle, or none with a direction.
    """
    if of not in ("differences", "states"):
        raise ValueError(f"of must be 'differences' or 'states', got {of!r}")
    matrix = as_states(states)
    vectors = matrix.diff(dim=0) if of == "differences" else matrix
    if step < 1 or len(vectors) <= step:
        raise ValueError(f"a curvature over step {step} of {of} needs more than {len(matrix)} states, and a step of at least 1")
    lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    unit = vectors / lengths.clamp_min(torch.finfo(torch.float64).tiny)
    a, b = unit[:-step], unit[step:]
    some = (lengths[:-step, 0] > 0) & (lengths[step:, 0] > 0)
    if not bool(some.any()):
        raise ValueError(f"no two {of} of these {len(matrix)} states have a direction")
    # arccos loses half its digits near 0 and pi; the half-angle form does not.
    angles = 2.0 * torch.atan2(torch.linalg.vector_norm(a - b, dim=1), torch.linalg.vector_norm(a + b, dim=1))
    chosen = angles[some]
    error = float(chosen.std()) / math.sqrt(len(chosen)) if len(chosen) > 1 else 0.0
    return Estimate(float(chosen.mean()), math.pi, error, len(matrix), "radians", "exact")


def lidar(views: Array, delta: float = 1e-4) -> Estimate:
    """LiDAR (Thilak et al. 2024, eqs. 1-4): exp of the entropy of the spectrum of S_w^(-1/2) S_b S_w^(-1/2).

    Args:
        views: `(n, q, d)`: q views (augmentations) of n items.
        delta: added to the within-item scatter.

    Between 1 and min(n - 1, d).

    Raises:
        ValueError: not three-dimensional, or fewer than 2 items or 2 views.
    """
    tensor = as_float64(views, "views")
    if tensor.ndim != 3 or tensor.shape[0] < 2 or tensor.shape[1] < 2 or tensor.shape[2] < 1:
        raise ValueError(
            f"views must have the shape (items, views, d) with at least 2 items and 2 views, got {tuple(tensor.shape)}"
        )
    if not delta > 0:
        raise ValueError(f"delta must be above zero, got {delta!r}")
    n, q, d = as_states(tensor.reshape(-1, tensor.shape[2]), "views").reshape(tensor.shape).shape
    means = tensor.mean(dim=1)
    between = means - means.mean(dim=0)
    within = (tensor - means[:, None]).reshape(n * q, d)
    scatter = gram(within.mT) / (n * q)
    scatter.diagonal().add_(delta)
    # The eigenvalues of S_w^(-1/2) S_b S_w^(-1/2) are the squared singular values of L^-1 (mu_i - mu)^T, with S_w = L L^T.
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(scatter), between.mT, upper=False)
    return _exponential(renyi(normalised(torch.linalg.svdvals(white).square()), 1.0), min(n - 1, d), n)


def infonce(x: Array, y: Array, temperature: float = 0.1) -> Estimate:
    """The InfoNCE loss in nats of paired samples `(n, d)`, both directions, as SimCLR has it (Chen et al. 2020, eq. 1).

    States are scaled to unit length. Each of the 2 n states has its partner as the positive and the 2 n - 2 others as negatives.

    Raises:
        ValueError: not paired, different widths, fewer than 2 samples, or a temperature that is not positive.
    """
    a, b = _unit_views(x, y, temperature)
    n = len(a)
    scores = gram(torch.cat([a, b])) / temperature
    scores.fill_diagonal_(-torch.inf)
    partner = torch.cat([torch.arange(n, 2 * n), torch.arange(n)]).to(scores.device)
    losses = torch.logsumexp(scores, dim=1) - scores.gather(1, partner[:, None])[:, 0]
    return Estimate(float(losses.mean()), math.inf, _standard_error(losses), n, "nats", "exact")


def infonce_bound(x: Array, y: Array, temperature: float = 0.1) -> Estimate:
    """log n - loss, a lower bound of the mutual information in nats that never passes log n (van den Oord et al. 2018, eq. 5).

    Scores are cosine similarities over the temperature; the loss is the mean of both directions.
    """
    a, b = _unit_views(x, y, temperature)
    scores = a @ b.mT / temperature
    right = scores.diagonal()
    losses = (torch.logsumexp(scores, dim=1) + torch.logsumexp(scores, dim=0)) / 2 - right
    n = len(a)
    return Estimate(math.log(n) - float(losses.mean()), math.log(n), _standard_error(losses), n, "nats", "exact")


def _unit_views(x: Array, y: Array, temperature: float) -> tuple[Tensor, Tensor]:
    a, b = as_samples(x, y)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"x {tuple(a.shape)} and y {tuple(b.shape)} must share one width to be compared by cosine")
    if len(a) < 2:
        raise ValueError(f"a contrast needs at least 2 paired samples, got {len(a)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above zero, got {temperature!r}")
    return _unit(a), _unit(b)


def _unit(matrix: Tensor) -> Tensor:
    return matrix / torch.linalg.vector_norm(matrix, dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def _centred_unit(matrix: Tensor) -> Tensor:
    # Equal states centred leave rounding, which unit length would blow up to a direction.
    constant = (matrix == matrix[:1]).all()
    return _unit(torch.where(constant, 0.0, matrix - matrix.mean(dim=0)))


def _linear_entropy(matrix: Tensor, alpha: float) -> Tensor:
    """The Rényi entropy in nats of x x^T over its trace, by the smaller of x x^T and x^T x."""
    smaller = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    return renyi(normalised(eigvalsh(gram(smaller))), alpha)


def _exponential(nats: Tensor, ceiling: float, n: int) -> Estimate:
    return Estimate(float(nats.exp()), float(max(ceiling, 1)), 0.0, n, "dimensions", "exact")


def _standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))
