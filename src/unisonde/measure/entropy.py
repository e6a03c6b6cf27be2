"""Entropy of a sequence of states, and the conditional entropy of a response given its prompt.

The matrix-based Rényi entropy (Sanchez Giraldo, Rao and Principe 2015, eq. 8; "Pseudo-Unification", eq. 2) is

    H_alpha(A) = log(tr A^alpha) / (1 - alpha),    A = (K + ridge I) / tr(K + ridge I),

with K a kernel matrix of the n states; alpha = 1 is the von Neumann limit -tr(A log A). The conditional entropy is the proxy of the
paper (its eq. 3; supplement, eq. 6): the entropy of the kernel matrix of prompt and response together, less that of the prompt's
block. It measures how far the response extends the region that the prompt covers. It does not see which response state belongs to
which prompt state, and it may be negative; `dependence` has measures of paired samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .ceilings import entropy_ceiling, joint_ceiling
from .eigen import eigvalsh
from .estimate import Estimate
from .lanczos import CROSSOVER, LEAST, renyi_lanczos
from .protocol import DEFAULT, Protocol
from .spectrum import Spectrum, settle
from .states import Array, as_gram, as_pair, as_states

FEW = 8
"""Below this many states a median-rule entropy says nothing: at n = 2 it is a constant."""

# Exact numbers may leave their bounds by rounding, not by more.
_ROUNDING = 1e-9


def entropy(states: Array, protocol: Protocol = DEFAULT) -> Estimate:
    """The entropy of states `(n, d)` under `protocol`, between 0 and its ceiling.

    Raises:
        ValueError: the states are empty, not two-dimensional or not finite.
    """
    return _entropy(Spectrum.of(as_states(states), protocol), protocol)


def conditional_entropy(prompt: Array, response: Array, protocol: Protocol = DEFAULT) -> Estimate:
    """The entropy of a response `(n_r, d)` given its prompt `(n_p, d)` under `protocol`; may be negative.

    Raises:
        ValueError: one of them is empty, not two-dimensional or not finite, or their widths differ.
    """
    union, split = _union(prompt, response, protocol)
    return _response_level(union, split, protocol)["conditional_entropy"]


def layer_estimates(prompt: Array, response: Array | None = None, protocol: Protocol = DEFAULT) -> dict[str, Estimate]:
    """Every entropy of one layer at once, each product and spectrum taken once.

    Args:
        prompt: the prompt's states `(n_p, d)`.
        response: the response's states `(n_r, d)`, if there is one.
        protocol: the numeric choices.

    Returns:
        `entropy` of the prompt on its own (own bandwidth, own PCA) and, with a response, `joint_entropy`, `prompt_term` and
        `conditional_entropy`, which is the first less the second.

    Raises:
        ValueError: as `conditional_entropy`.
    """
    return sweep(prompt, response, [protocol])[0]


def sweep(prompt: Array, response: Array | None, protocols: Sequence[Protocol]) -> list[dict[str, Estimate]]:
    """`layer_estimates` under several protocols, in their order.

    Protocols that differ in order, units or ridge share their spectra, those that differ in bandwidth their distances.
    """
    unions: dict[tuple[str, int | None], tuple[Spectrum, Spectrum, int]] = {}
    results: list[dict[str, Estimate]] = []
    for protocol in protocols:
        key = (protocol.kernel, protocol.pca)
        if key not in unions:
            if response is None:
                alone = Spectrum.of(as_states(prompt, "prompt"), protocol)
                unions[key] = (alone, alone, alone.n)
            else:
                union, split = _union(prompt, response, protocol)
                unions[key] = (union, union.alone(slice(0, split)), split)
        union, alone, split = unions[key]
        result = {"entropy": _entropy(alone, protocol)}
        if response is not None:
            result |= _response_level(union, split, protocol, alone)
        results.append(result)
    return results


def gram_entropy(gram: Array, protocol: Protocol = DEFAULT) -> Estimate:
    """The entropy of a kernel matrix `(n, n)` made elsewhere; kernel, bandwidth and PCA of the protocol are not used.

    Raises:
        ValueError: not square, not symmetric, not finite, without a positive trace, or not positive semi-definite beyond rounding.
    """
    matrix = as_gram(gram)
    n = len(matrix)
    matrix.diagonal().add_(protocol.ridge)
    matrix /= matrix.diagonal().sum()
    ceiling = math.log(n) / protocol.unit
    if uses_lanczos(n, replace(protocol, kernel="gaussian")):
        value, stderr = renyi_lanczos(matrix, protocol.alpha, protocol.seed)
        return Estimate(value / protocol.unit, ceiling, stderr / protocol.unit, n, protocol.units, "lanczos")
    return _estimate(float(renyi(settle(eigvalsh(matrix)), protocol.alpha)) / protocol.unit, ceiling, n, protocol)


def renyi(eigenvalues: Tensor, alpha: float) -> Tensor:
    """The Rényi entropy in nats of spectra `(..., n)` that are not negative and sum to one; a spectrum of zeros has none."""
    positive = eigenvalues > 0
    logs = torch.where(positive, eigenvalues, 1.0).log()
    if alpha == 1.0:
        return -(eigenvalues * logs).sum(dim=-1)
    if abs(alpha - 1.0) <= 0.5:
        # sum(l^alpha) = 1 + sum(l (l^(alpha - 1) - 1)) keeps every digit near alpha = 1.
        return -torch.log1p((eigenvalues * torch.expm1((alpha - 1.0) * logs)).sum(dim=-1)) / (alpha - 1.0)
    largest = torch.where(positive, logs, -torch.inf).amax(dim=-1, keepdim=True)
    some = torch.isfinite(largest)
    power = torch.where(positive, (alpha * (logs - largest.where(some, 0.0))).exp(), 0.0).sum(dim=-1)
    value = (alpha * largest.squeeze(-1) + power.log()) / (1.0 - alpha)
    return torch.where(some.squeeze(-1), value, 0.0)


def _union(prompt: Array, response: Array, protocol: Protocol) -> tuple[Spectrum, int]:
    first, second = as_pair(prompt, response)
    return Spectrum.of(torch.cat([first, second]), protocol), len(first)


def _entropy(spectrum: Spectrum, protocol: Protocol) -> Estimate:
    """The entropy of one set with its own bandwidth."""
    ceiling = entropy_ceiling(spectrum.n, protocol, rank=_rank(spectrum), trace=_trace(spectrum, protocol))
    return _take(spectrum, spectrum.bandwidth(protocol), protocol, ceiling)


def _response_level(union: Spectrum, split: int, protocol: Protocol, alone: Spectrum | None = None) -> dict[str, Estimate]:
    """Joint entropy, prompt term and conditional entropy of a union whose first `split` states are the prompt."""
    if protocol.length == "subsample" and 2 * split != union.n:
        return _subsampled(union, split, protocol)
    sigma = union.bandwidth(protocol)
    if protocol.bandwidth_from == "own":
        term = _entropy(union.alone(slice(0, split)) if alone is None else alone, protocol)
    else:
        rows = slice(0, split)
        ceiling = entropy_ceiling(split, protocol, by_rule=False, rank=_rank(union, split), trace=_trace(union, protocol, rows))
        term = _take(union, sigma, protocol, ceiling, rows=rows)
    ceiling = joint_ceiling(split, union.n - split, protocol, rank=_rank(union), trace=_trace(union, protocol))
    joint = _take(union, sigma, protocol, ceiling, split=split)
    return {"joint_entropy": joint, "prompt_term": term, "conditional_entropy": _difference(joint, term)}


def _subsampled(union: Spectrum, split: int, protocol: Protocol) -> dict[str, Estimate]:
    """The mean of several draws of equally many states of prompt and response; one draw is a union of its own."""
    count = min(split, union.n - split)
    generator = torch.Generator().manual_seed(protocol.seed)
    draws: list[dict[str, Estimate]] = []
    for _ in range(protocol.draws):
        chosen = torch.cat([_draw(split, count, generator), split + _draw(union.n - split, count, generator)])
        drawn = union.alone(chosen.to(union.states.device))
        draws.append(_response_level(drawn, count, protocol))
    return {name: _mean([draw[name] for draw in draws]) for name in draws[0]}


def _draw(n: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(n, generator=generator)[:count].sort().values


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of draws; their spread is its standard error, and one draw has none to go by."""
    first, count = estimates[0], len(estimates)
    mean = math.fsum(e.value for e in estimates) / count
    spread = math.fsum((e.value - mean) ** 2 for e in estimates)
    stderr = math.sqrt(spread / (count - 1) / count) if count > 1 else math.nan
    ceiling = math.fsum(e.ceiling for e in estimates) / count
    return Estimate(mean, ceiling, stderr, first.n, first.units, first.method)


def _difference(joint: Estimate, term: Estimate) -> Estimate:
    stderr = math.hypot(joint.stderr, term.stderr)
    method = joint.method if joint.method == term.method else "lanczos"
    return Estimate(joint.value - term.value, joint.ceiling - term.value, stderr, joint.n, joint.units, method)


def _take(
    spectrum: Spectrum, sigma: float, protocol: Protocol, ceiling: float, *, split: int = 0, rows: slice = slice(None)
) -> Estimate:
    """The entropy of a set, with the length rule if it has parts, or of its first rows."""
    n = len(range(*rows.indices(spectrum.n)))
    rule = protocol.length if split and protocol.length != "subsample" else "none"
    if uses_lanczos(n, protocol):
        value, stderr = renyi_lanczos(spectrum.density(sigma, protocol.ridge, rule, split, rows), protocol.alpha, protocol.seed)
        # An estimate outside what is possible is brought to the nearest possible value, which can only be nearer the truth.
        value = min(max(value / protocol.unit, 0.0), ceiling)
        return Estimate(value, ceiling, stderr / protocol.unit, n, protocol.units, "lanczos")
    if protocol.alpha == 2.0 and protocol.kernel == "gaussian":
        # tr A^2 is a Frobenius norm; no eigenvalue is needed.
        value = -math.log(float(spectrum.purity(sigma, protocol.ridge, rule, split, rows)))
    else:
        value = float(renyi(spectrum.eigenvalues(sigma, protocol.ridge, rule, split, rows), protocol.alpha))
    return _estimate(value / protocol.unit, ceiling, n, protocol)


def uses_lanczos(n: int, protocol: Protocol) -> bool:
    """Whether the entropy of n states is estimated by quadrature instead of by all eigenvalues.

    `auto` does so from `CROSSOVER` states on, for orders of one and above, and never for order 2, which needs no eigenvalues.
    `lanczos` does so wherever the method is defined; fewer than `LEAST` states are exact under every method.
    """
    if n < LEAST or protocol.alpha == 2.0 or protocol.method == "exact" or protocol.kernel == "linear":
        return False
    return protocol.method == "lanczos" or (n >= CROSSOVER and protocol.alpha >= 1.0)


def _rank(spectrum: Spectrum, n: int | None = None) -> int | None:
    """The largest rank of a linear kernel: n centred states span n - 1 dimensions; some of a larger set span n."""
    if spectrum.kernel_name == "gaussian":
        return None
    width = spectrum.pca if spectrum.reduces and spectrum.pca else spectrum.d
    return min(width, spectrum.n - 1 if n is None else min(n, spectrum.n - 1))


def _trace(spectrum: Spectrum, protocol: Protocol, rows: slice = slice(None)) -> float | None:
    return None if spectrum.kernel_name == "gaussian" else spectrum.trace(protocol.ridge, rows)


def _estimate(value: float, ceiling: float, n: int, protocol: Protocol) -> Estimate:
    if -_ROUNDING < value < 0.0:
        value = 0.0
    elif ceiling < value < ceiling + _ROUNDING:
        value = ceiling
    return Estimate(value, ceiling, 0.0, n, protocol.units, "exact")
