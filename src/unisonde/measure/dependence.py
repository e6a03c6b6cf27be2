"""Dependence between paired samples: what the union-kernel proxy of the paper cannot see.

The proxy of `entropy.conditional_entropy` is the same whichever response state belongs to which prompt state. Here x and y are two
views of the same n samples, row by row (one vector an item over a data set, say), and the joint kernel matrix is the Hadamard
product of the two (Sanchez Giraldo, Rao and Principe 2015, section 3; Yu et al. 2020 for more views). With A and B the kernel
matrices of unit diagonal,

    H(x, y) = H(A o B),   H(x | y) = H(x, y) - H(y),   I(x; y) = H(x) + H(y) - H(x, y),

and max(H(x), H(y)) <= H(x, y). Each view has a bandwidth and a PCA of its own; widths may differ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .entropy import gram_entropy
from .estimate import Estimate, Tested, p_value
from .protocol import DEFAULT, Protocol
from .spectrum import Spectrum
from .states import Array, as_samples


def paired_estimates(x: Array, y: Array, protocol: Protocol = DEFAULT) -> dict[str, Estimate]:
    """Entropies and information of paired samples x `(n, d_x)`, y `(n, d_y)`.

    Returns:
        `entropy_x`, `entropy_y`, `joint_entropy`, `conditional_entropy` (of x given y) and `mutual_information`, in the units of
        the protocol. Ceilings: log n; H(x) for the conditional; the smaller entropy for the information.

    Raises:
        ValueError: empty, not finite, or different numbers of rows.
    """
    a, b = (_correlation(view, protocol) for view in as_samples(x, y))
    h_x, h_y, joint = (gram_entropy(gram, _given(protocol)) for gram in (a, b, a * b))
    error = math.hypot(h_x.stderr, h_y.stderr, joint.stderr)

    def derived(value: float, ceiling: float) -> Estimate:
        return Estimate(value, ceiling, error, joint.n, joint.units, joint.method)

    return {
        "entropy_x": h_x,
        "entropy_y": h_y,
        "joint_entropy": joint,
        "conditional_entropy": derived(joint.value - h_y.value, h_x.value),
        "mutual_information": derived(h_x.value + h_y.value - joint.value, min(h_x.value, h_y.value)),
    }


def paired_joint_entropy(x: Array, y: Array, protocol: Protocol = DEFAULT) -> Estimate:
    """H(x, y) of paired samples x `(n, d_x)`, y `(n, d_y)`."""
    return paired_estimates(x, y, protocol)["joint_entropy"]


def paired_conditional_entropy(x: Array, given: Array, protocol: Protocol = DEFAULT) -> Estimate:
    """H(x | given) = H(x, given) - H(given) of paired samples `(n, d_x)`, `(n, d_y)`; the second argument is the condition."""
    return paired_estimates(x, given, protocol)["conditional_entropy"]


def mutual_information(x: Array, y: Array, protocol: Protocol = DEFAULT) -> Estimate:
    """I(x; y) of paired samples x `(n, d_x)`, y `(n, d_y)`.

    Biased upwards for independent samples, by an amount that depends on bandwidth and n; `dime` takes the bias out.
    """
    return paired_estimates(x, y, protocol)["mutual_information"]


def dime(x: Array, y: Array, protocol: Protocol = DEFAULT, permutations: int = 99) -> Tested:
    """DiME, the difference of matrix-based entropies (Skean et al. 2023, eq. 6), with its permutation test.

    E_P[H(A o P B P^T)] - H(A o B): how much smaller the joint entropy is than for samples paired at random. Zero in expectation for
    independent samples. The standard error is that of the mean over permutations.

    Raises:
        ValueError: as `paired_estimates`, or fewer than one permutation.
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    a, b = (_correlation(view, protocol) for view in as_samples(x, y))
    exact = _given(protocol)
    joint = gram_entropy(a * b, exact)
    generator = torch.Generator().manual_seed(protocol.seed)
    shuffled: list[float] = []
    for _ in range(permutations):
        order = torch.randperm(len(b), generator=generator).to(b.device)
        shuffled.append(gram_entropy(a * b[order][:, order], exact).value)
    mean = math.fsum(shuffled) / permutations
    variance = math.fsum((h - mean) ** 2 for h in shuffled) / max(permutations - 1, 1)
    return Tested(
        value=mean - joint.value,
        ceiling=mean,
        stderr=math.sqrt(variance / permutations),
        n=joint.n,
        units=joint.units,
        method=joint.method,
        p=p_value(-joint.value, [-h for h in shuffled]),
        null_mean=0.0,
        null_std=math.sqrt(variance),
        permutations=permutations,
    )


def _correlation(view: Tensor, protocol: Protocol) -> Tensor:
    """The kernel matrix with ridge, scaled to n on the trace: for a Gaussian kernel, ones on the diagonal."""
    spectrum = Spectrum.of(view, protocol)
    return spectrum.density(spectrum.bandwidth(protocol), protocol.ridge) * spectrum.n


def _given(protocol: Protocol) -> Protocol:
    """The protocol for matrices that already have their ridge."""
    return Protocol(alpha=protocol.alpha, ridge=0.0, units=protocol.units, method=protocol.method, seed=protocol.seed)
