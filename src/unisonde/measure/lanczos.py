"""Entropy of a large density matrix without all of its eigenvalues: deflation, exact traces, stochastic Lanczos quadrature.

What is estimated is tr f(A), with f(x) = x (x^(alpha - 1) - 1) near order one and x^alpha elsewhere. The naive estimate with
random probes is off by tens of bits at order 1.01, where an error in tr A^alpha counts a hundredfold. Three things bring it to
thousandths:

1. *Deflation.* The leading eigenpairs come from a block Krylov space; their part of the sum is exact, and what remains is small.
2. *Known traces.* tr 1, tr A and tr A^2 of the remainder are known exactly. The best quadratic in x under the remainder's own
   spectral density is taken out of f (a control variate), and only the residual is left to chance.
3. *Lanczos quadrature* (Ubaru, Chen and Saad 2017) takes the quadratic form of f with each probe, all probes in one product.

Products are float32: the remainder, taken in float64, is small, and so is its rounding. The standard error holds the spread over
probes, the change over the last steps of the quadrature, and the coupling between the deflated space and the rest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST = 512
"""Below this size exact eigenvalues are as fast, and the leading space would be a large part of the whole."""

CROSSOVER = 2048
"""From this size on `auto` estimates. Quadrature is faster from about 1000 on; up to here exact eigenvalues take under a second."""

BLOCK, POWERS, LARGEST = 64, 3, 96
PROBES, STEPS = 24, 16
# An eigenpair is deflated if its residual is below this share of its eigenvalue: its neglected coupling is then of second order.
_CONVERGED = 0.03
_TINY = torch.finfo(torch.float64).tiny


def renyi_lanczos(density: Tensor, alpha: float, seed: int = 0) -> tuple[float, float]:
    """The Rényi entropy of a density matrix `(n, n)`, symmetric, trace one, float64, and its standard error, in nats.

    About `BLOCK * POWERS + PROBES * STEPS` products of the matrix with a vector. Meant for orders of one and above: below one, tiny
    eigenvalues carry weight that no quadrature sees, and the standard error grows.
    """
    generator = torch.Generator(density.device).manual_seed(seed)
    f = _Function(alpha)
    single = density.float()
    space = _leading(single, generator)
    # Once more in float64: the traces of the remainder are differences from these eigenvalues.
    images = density @ space
    values, vectors = torch.linalg.eigh(_symmetric(space.mT @ images))
    space, images, values = space @ vectors, images @ vectors, values.clamp_min(_TINY)
    residuals = images - space * values
    known = torch.stack(
        [
            values.new_tensor(float(len(density) - len(values))),
            density.diagonal().sum() - values.sum(),
            torch.linalg.vector_norm(density).square() - values.square().sum() - 2 * residuals.square().sum(),
        ]
    )
    rest = single.addmm_((space * values).float(), space.float().mT, alpha=-1.0)
    mean, error = _remainder(rest, space.float(), known, f, generator)
    # What the coupling of the two parts may change, by second-order perturbation.
    curvature = (f.slope(values) - f.slope(values / 2)) / (values / 2)
    coupling = float((residuals.square().sum(dim=0) * curvature.abs()).sum())
    entropy, stderr = f.entropy(mean + float(f(values).sum()), math.hypot(error, coupling))
    return entropy, math.hypot(stderr, _rounding(density))


def _rounding(density: Tensor) -> float:
    """What float32 products may add, in nats: noise of this nuclear norm, spread over eigenvalues that should be zero."""
    norm = math.sqrt(len(density)) * float(torch.linalg.vector_norm(density))
    return -torch.finfo(torch.float32).eps * norm * math.log(torch.finfo(torch.float32).eps)


class _Function:
    """f, its derivative, and the entropy that a sum of f over the spectrum stands for."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.near_one = abs(alpha - 1.0) <= 0.5

    def __call__(self, x: Tensor) -> Tensor:
        logs = torch.where(x > 0, x, 1.0).log()
        if self.alpha == 1.0:
            return x * logs
        if self.near_one:
            return x * torch.expm1((self.alpha - 1.0) * logs)
        return torch.where(x > 0, (self.alpha * logs).exp(), 0.0)

    def slope(self, x: Tensor) -> Tensor:
        if self.alpha == 1.0:
            return x.log() + 1.0
        return self.alpha * x ** (self.alpha - 1.0) - (1.0 if self.near_one else 0.0)

    def entropy(self, total: float, error: float) -> tuple[float, float]:
        if self.alpha == 1.0:
            return -total, error
        power = max(1.0 + total if self.near_one else total, torch.finfo(torch.float64).tiny)
        return math.log(power) / (1.0 - self.alpha), error / power / abs(self.alpha - 1.0)


def _leading(single: Tensor, generator: torch.Generator) -> Tensor:
    """Leading eigenvectors `(n, k)` as far as a block Krylov space has them, k from 0 to `LARGEST`; orthonormal, float64."""
    block = _orthonormal(torch.randn(len(single), BLOCK, generator=generator, device=single.device).double())
    basis, images = block, (single @ block.float()).double()
    for _ in range(POWERS - 1):
        block = images[:, -BLOCK:]
        # Where the space is exhausted the new block is rounding; a second pass keeps it orthogonal all the same.
        for _ in range(2):
            block = _orthonormal(block - basis @ (basis.mT @ block))
        basis = torch.cat([basis, block], dim=1)
        images = torch.cat([images, (single @ block.float()).double()], dim=1)
    values, vectors = torch.linalg.eigh(_symmetric(basis.mT @ images))
    values, vectors = values[-LARGEST:], vectors[:, -LARGEST:]
    ritz = basis @ vectors
    residuals = torch.linalg.vector_norm(images @ vectors - ritz * values, dim=0)
    return ritz[:, residuals <= _CONVERGED * values]


def _remainder(rest: Tensor, space: Tensor, known: Tensor, f: _Function, generator: torch.Generator) -> tuple[float, float]:
    """tr f over the complement of the deflated space, and its standard error."""
    nodes, weights = _quadrature(rest, space, generator)
    estimates = [_estimate(f, *_gauss(nodes, weights, steps), known) for steps in (STEPS, STEPS * 3 // 4)]
    (mean, spread), (coarse, _) = ((float(e.mean()), float(e.std()) / math.sqrt(PROBES)) for e in estimates)
    return mean, math.hypot(spread, mean - coarse)


def _quadrature(rest: Tensor, space: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Diagonals `(PROBES, STEPS)` and off-diagonals `(PROBES, STEPS - 1)` of the Lanczos matrices of random probes."""
    v = torch.randn(len(rest), PROBES, generator=generator, device=rest.device)
    for _ in range(2):
        v = v - space @ (space.mT @ v)
    v = v / torch.linalg.vector_norm(v, dim=0)
    before, beta = torch.zeros_like(v), v.new_zeros(PROBES)
    diagonal: list[Tensor] = []
    off: list[Tensor] = []
    for _ in range(STEPS):
        w = rest @ v
        w = w - space @ (space.mT @ w) - beta * before
        diagonal.append((v * w).sum(dim=0))
        w = w - diagonal[-1] * v
        beta = torch.linalg.vector_norm(w, dim=0)
        # An exhausted space ends the recurrence: what would follow is rounding.
        alive = beta > 1e-6 * diagonal[0].abs()
        beta = torch.where(alive, beta, 0.0)
        off.append(beta)
        before, v = v, torch.where(alive, w / beta, 0.0)
    return torch.stack(diagonal, dim=1).double(), torch.stack(off, dim=1).double()


def _gauss(diagonal: Tensor, off: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights `(PROBES, steps)` of the Gauss rule of the first steps."""
    matrix = torch.diag_embed(diagonal[:, :steps])
    matrix += torch.diag_embed(off[:, : steps - 1], 1) + torch.diag_embed(off[:, : steps - 1], -1)
    nodes, vectors = torch.linalg.eigh(matrix)
    return nodes.clamp_min(0.0), vectors[:, 0, :].square()


def _estimate(f: _Function, nodes: Tensor, weights: Tensor, known: Tensor) -> Tensor:
    """One estimate of tr f per probe `(PROBES,)`, less what the known traces explain."""
    powers = torch.stack([torch.ones_like(nodes), nodes, nodes.square()], dim=-1)
    scale = powers.amax(dim=(0, 1)).clamp_min(torch.finfo(torch.float64).tiny)
    powers, values = powers / scale, f(nodes)
    # Least squares under the pooled spectral density, by the pseudo-inverse: a flat remainder has one node only.
    design = (powers * weights.sqrt()[..., None]).reshape(-1, 3)
    fit = torch.linalg.pinv(design, rtol=1e-12) @ (values * weights.sqrt()).reshape(-1)
    return (fit * known / scale).sum() + known[0] * (weights * (values - powers @ fit)).sum(dim=1)


def _orthonormal(block: Tensor) -> Tensor:
    return torch.linalg.qr(block).Q


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
