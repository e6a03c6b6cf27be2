"""Generalised mutual information: what a fixed decoder's scores are worth, after the best tilt.

For log-scores l(a, z) = log q(a | z) of a closed set of answers a, a prior P and the right answers,

    i_s(a; z) = s l(a, z) - log sum_a' P(a') exp(s l(a', z)),    GMI = sup over s >= 0 of E i_s

(Kaplan and Shamai 1993; Merhav et al. 1994; Scarlett et al. 2020, chapter 2): the rate that this score supports under random
coding, at most I(A; Z). E i_s is concave in s, so the search is one-dimensional and exact. It equals the V-information of the
family of tempered, prior-corrected decoders P(a) q(a | z)^s / Z. s is fitted on some folds and the information taken on the others:
fitted and taken on the same samples it is biased upwards. Held-out values may be negative and are not clamped.

Samples without a mistake have no best s, and believed without end, the first mistake among others costs hundreds of bits. Where samples
are few, `doubt` bounds s: it is fitted with so many samples more of which nothing is known.

The equation printed in "Modality Collapse as Mismatched Decoding" (eq. 3) draws its alternatives given the answer and fixes s = 1;
by Jensen's inequality it is never positive. It is here under a name that says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .estimate import Estimate, Tested, p_value
from .states import Array, as_float64

_LN2 = math.log(2.0)
# Scores that separate the answers perfectly have no best tilt: the information nears its supremum exponentially as s grows. The
# search ends where another factor of e would add less than this many nats; going on would only make held-out mistakes dearer.
_ARRIVED = 1e-9
_BARELY = 1e-12


@dataclass(frozen=True, repr=False)
class Gmi(Estimate):
    """Generalised mutual information in bits.

    Attributes:
        s: the tilt, fitted on all samples. 1 is a calibrated decoder; below 1 it is over-confident.
        folds: how many folds the value was crossed over; 1 if it was taken on the samples that s was fitted on.
        contributions: the information of each sample in bits, held out, whose mean the value is; `resample.bootstrap` takes them.
    """

    s: float = 1.0
    folds: int = 2
    contributions: tuple[float, ...] = ()

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, s={self.s:.4g})"


def gmi(
    log_scores: Array, labels: Array, prior: Array | str | None = None, folds: int = 2, seed: int = 0, doubt: float = 0.0
) -> Gmi:
    """The generalised mutual information of log-scores `(N, K)` and labels `(N,)`, in bits, cross-fitted.

    Args:
        log_scores: log q(a | z), any additive constant a row; -inf where an answer is ruled out.
        labels: the right answers, integers from 0 to K - 1.
        prior: P(a): None for the frequencies of `labels`, `uniform`, or K weights.
        folds: s is fitted on all but one fold and the information taken on that one. 1 fits and takes on the same samples.
        seed: of the division into folds, which hold each answer in equal parts.
        doubt: s is fitted with so many samples more of which nothing is known: scores like those of the others, and any answer right,
            by the prior. 0 is the plain estimate; 1 where s may be fitted on samples without a mistake.

    To take representations as codewords (alternatives z' for a fixed answer), pass the scores of answer i under representation j
    as row i, `labels = range(N)` and `prior="uniform"`.

    Raises:
        ValueError: shapes that do not fit, NaN or +inf scores, labels out of range, a prior that is no distribution, or too few
            samples for the folds.
    """
    scores, right, log_prior = _checked(log_scores, labels, prior)
    n = len(right)
    if isinstance(folds, bool) or not isinstance(folds, int) or not 1 <= folds <= n:
        raise ValueError(f"folds must be an integer from 1 to the number of samples ({n}), got {folds!r}")
    if not 0 <= doubt < math.inf:
        raise ValueError(f"doubt must be a number of samples, 0 or more, got {doubt!r}")
    fold = _deal(right, folds, seed)
    held = scores.new_empty(n)
    for index in range(folds):
        inside = fold == index
        fit = inside if folds == 1 else ~inside
        s = best_tilt(scores[fit], right[fit], log_prior, doubt=doubt)
        held[inside] = information(s, scores[inside], right[inside], log_prior)
    ceiling = float(-log_prior[right].mean()) / _LN2
    bits = held / _LN2
    return Gmi(
        value=float(bits.mean()),
        ceiling=ceiling,
        stderr=_standard_error(bits),
        n=n,
        units="bits",
        method="cross-fitted" if folds > 1 else "in-sample",
        s=best_tilt(scores, right, log_prior, doubt=doubt),
        folds=folds,
        contributions=tuple(bits.tolist()),
    )


def information_at_one(log_scores: Array, labels: Array, prior: Array | str | None = None) -> Estimate:
    """E i_1: the information of the scores as they are, in bits. Negative where over-confidence costs more than it tells."""
    scores, right, log_prior = _checked(log_scores, labels, prior)
    bits = information(1.0, scores, right, log_prior) / _LN2
    return Estimate(float(bits.mean()), float(-log_prior[right].mean()) / _LN2, _standard_error(bits), len(right), "bits", "exact")


def calibration_loss(
    log_scores: Array, labels: Array, prior: Array | str | None = None, folds: int = 2, seed: int = 0, doubt: float = 0.0
) -> Estimate:
    """What the best tilt recovers, GMI less the information at s = 1, in bits; zero for a calibrated decoder."""
    tilted = gmi(log_scores, labels, prior, folds, seed, doubt)
    scores, right, log_prior = _checked(log_scores, labels, prior)
    plain = information(1.0, scores, right, log_prior) / _LN2
    differences = torch.tensor(tilted.contributions, dtype=torch.float64) - plain.cpu()
    return Estimate(float(differences.mean()), math.inf, _standard_error(differences), tilted.n, "bits", tilted.method)


def gmi_test(
    log_scores: Array,
    labels: Array,
    prior: Array | str | None = None,
    folds: int = 2,
    seed: int = 0,
    permutations: int = 199,
    doubt: float = 0.0,
) -> Tested:
    """`gmi` against labels dealt anew to the scores, in bits."""
    observed = gmi(log_scores, labels, prior, folds, seed, doubt)
    _, right, log_prior = _checked(log_scores, labels, prior)
    generator = torch.Generator().manual_seed(seed)
    weights = log_prior.exp()
    null = [
        gmi(log_scores, right[torch.randperm(len(right), generator=generator).to(right.device)], weights, folds, seed, doubt).value
        for _ in range(permutations)
    ]
    mean = math.fsum(null) / len(null)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in null) / max(len(null) - 1, 1))
    p = p_value(observed.value, null)
    return Tested(
        observed.value, observed.ceiling, observed.stderr, observed.n, "bits", observed.method, p, mean, std, permutations
    )


def v_information(log_probabilities: Array, labels: Array, null: Array | str | None = None) -> Estimate:
    """V-information in bits of held-out predictions (Xu et al. 2020, definition 2): E[log q(y | x) - log q0(y)].

    Args:
        log_probabilities: `(N, K)`, normalised, of a predictor from the family V fitted on other samples.
        labels: `(N,)`.
        null: the best prediction without input: None for the frequencies of `labels`, `uniform`, or K weights.

    The mean of the pointwise V-information of Ethayarajh et al. 2022. May be negative.

    Raises:
        ValueError: as `gmi`, or rows that are no distributions.
    """
    scores, right, log_null = _checked(log_probabilities, labels, null)
    totals = torch.logsumexp(scores, dim=1)
    if float(totals.abs().max()) > 1e-4:
        raise ValueError(
            "log_probabilities must be normalised in each row; pass them through log_softmax, or use gmi for raw scores"
        )
    bits = (scores.gather(1, right[:, None])[:, 0] - log_null[right]) / _LN2
    return Estimate(float(bits.mean()), float(-log_null[right].mean()) / _LN2, _standard_error(bits), len(right), "bits", "exact")


def equation_3_as_printed(log_scores: Array, groups: Array) -> Estimate:
    """Equation 3 of "Modality Collapse as Mismatched Decoding" as printed, in nats: never positive.

    E[l(C, Z, Y) - log E_Z' exp l(C, Z', Y)] with Z' drawn given the same context and the same answer as Z.

    Args:
        log_scores: `(N,)`: l of the right answer of each sample.
        groups: `(N,)`: an integer for each pair of context and answer.
    """
    scores, index = as_float64(log_scores, "log_scores"), _integers(groups, "groups")
    if scores.ndim != 1 or scores.shape != index.shape or len(scores) == 0:
        raise ValueError(f"log_scores {tuple(scores.shape)} and groups {tuple(index.shape)} must both have the shape (N,)")
    _, index = torch.unique(index.to(scores.device), return_inverse=True)
    values = scores.clone()
    for group in range(int(index.max()) + 1):
        inside = index == group
        values[inside] -= torch.logsumexp(scores[inside], dim=0) - math.log(int(inside.sum()))
    return Estimate(float(values.mean()), 0.0, _standard_error(values), len(values), "nats", "exact")


def _deal(labels: Tensor, folds: int, seed: int) -> Tensor:
    """The fold of each sample `(N,)`: at random, but each answer in equal parts, so that no fold has a prior of its own."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    order = order[labels[order].argsort(stable=True)]
    fold = torch.empty_like(labels)
    fold[order] = torch.arange(len(labels), device=labels.device) % folds
    return fold


def information(s: float, scores: Tensor, labels: Tensor, log_prior: Tensor) -> Tensor:
    """i_s `(N,)` in nats of log-scores `(N, K)`; zero at s = 0 whatever the scores."""
    if s == 0.0:
        return scores.new_zeros(len(labels))
    return s * scores.gather(1, labels[:, None])[:, 0] - torch.logsumexp(s * scores + log_prior, dim=1)


def best_tilt(scores: Tensor, labels: Tensor, log_prior: Tensor, weights: Tensor | None = None, doubt: float = 0.0) -> float:
    """The s >= 0 that maximises the (weighted) mean of `information`: the root of its derivative, which falls in s.

    `doubt` is the number of further samples of which nothing is known: scores like those of the others, any answer that is not ruled
    out right, by the prior.
    """
    weights = torch.full_like(scores[:, 0], 1.0 / len(scores)) if weights is None else weights / weights.sum()
    counted = weights > 0
    scores, labels, weights = scores[counted], labels[counted], weights[counted]
    right = scores.gather(1, labels[:, None])[:, 0]
    if not bool(torch.isfinite(right).all()):
        # A right answer that was ruled out costs infinitely much at every s but 0.
        return 0.0
    possible = torch.isfinite(scores) & torch.isfinite(log_prior)
    gaps = torch.where(torch.isfinite(scores), scores - right[:, None], 0.0)
    unknown = torch.where(possible, log_prior.exp(), 0.0) * (doubt / len(scores))
    rows, rewarded = 1.0 + unknown.sum(dim=1), (unknown * gaps).sum(dim=1)

    def slope(s: float) -> float:
        tilted = torch.softmax(torch.where(possible, s * gaps + log_prior, -torch.inf), dim=1)
        # An answer of prior zero is no alternative; if none is left, nothing competes.
        return float(weights @ (rewarded - rows * (tilted.nan_to_num(0.0) * gaps).sum(dim=1)))

    if slope(0.0) <= 0.0:
        # Where wrong answers were ruled out, the information jumps at s = 0 and the supremum is the limit from above.
        return 0.0 if bool(torch.isfinite(scores).all()) else _BARELY
    low, high = 0.0, 1.0 / float(gaps.abs().max())
    while (rise := slope(high)) > 0.0:
        if rise * high < _ARRIVED:
            return high
        low, high = high, 2.0 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if slope(middle) > 0.0 else (low, middle)
    return (low + high) / 2


def _checked(log_scores: Array, labels: Array, prior: Array | str | None) -> tuple[Tensor, Tensor, Tensor]:
    scores, right = as_float64(log_scores, "log_scores"), _integers(labels, "labels")
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"log_scores must have the shape (N, K), one row a sample, got {tuple(scores.shape)}")
    n, k = scores.shape
    if right.shape != (n,):
        raise ValueError(f"labels must have the shape ({n},) to go with log_scores {(n, k)}, got {tuple(right.shape)}")
    if bool((torch.isnan(scores) | (scores == torch.inf)).any()):
        raise ValueError(f"log_scores {(n, k)} must be finite or -inf, but some are NaN or +inf")
    if int(right.min()) < 0 or int(right.max()) >= k:
        raise ValueError(f"labels must be from 0 to {k - 1}, got some from {int(right.min())} to {int(right.max())}")
    right = right.to(scores.device)
    if prior is None:
        p = torch.bincount(right, minlength=k).double()
    elif isinstance(prior, str):
        if prior != "uniform":
            raise ValueError(f"prior must be None, 'uniform' or {k} weights, got {prior!r}")
        p = torch.ones(k, dtype=torch.float64, device=scores.device)
    else:
        p = as_float64(prior, "prior").to(scores.device)
        if p.shape != (k,) or not bool(torch.isfinite(p).all()) or float(p.min()) < 0 or float(p.sum()) <= 0:
            raise ValueError(f"prior must be {k} weights, none negative and not all zero, got {p.tolist()}")
    return scores, right, (p / p.sum()).log()


def _integers(values: Array, name: str) -> Tensor:
    tensor = as_float64(values, name)
    if not bool((tensor == tensor.round()).all()):
        raise ValueError(f"{name} must be integers")
    return tensor.long()


def _standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
