"""The supplement's inequalities, as numbers: what is on either side, and whether it holds.

"Pseudo-Unification", supplement, section 2.3. Lemma 1, Corollary 1 and Lemma 2 are true. Theorem 1 as printed is not: when the
cross-block vanishes its right side is zero, while the proxy is 1 + (H_r - H_p) / 2 bits for parts of equal weight. The step that
fails absorbs the response's own block into a constant. What survives bounds the distance of the joint entropy to the entropy of the
block-diagonal matrix, and the factor alpha / (alpha - 1) makes it wide: 101 at order 1.01. Entropies here are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .eigen import eigvalsh
from .entropy import renyi
from .spectrum import settle
from .states import Array, as_gram

# Both sides come from eigenvalues in float64.
_ROUNDING = 1e-10


@dataclass(frozen=True)
class Inequality:
    """left <= right, claimed by `name`."""

    name: str
    left: float
    right: float

    @property
    def holds(self) -> bool:
        """Whether it does, up to rounding."""
        return self.left <= self.right + _ROUNDING * max(1.0, abs(self.right))

    @property
    def slack(self) -> float:
        """right - left."""
        return self.right - self.left


def lemma_1(a: Array, b: Array, alpha: float = 1.01) -> Inequality:
    """|tr A^alpha - tr B^alpha| <= alpha |A - B|_*, for kernel matrices `(n, n)` over their traces (eq. 8)."""
    first, second = _pair(a, b, alpha)
    return Inequality("lemma 1", abs(_power(first, alpha) - _power(second, alpha)), alpha * _nuclear(first - second))


def corollary_1(a: Array, b: Array, alpha: float = 1.01) -> Inequality:
    """|H(A) - H(B)| <= alpha / (alpha - 1) |A - B|_* / min(tr A^alpha, tr B^alpha) (eq. 11)."""
    first, second = _pair(a, b, alpha)
    least = min(_power(first, alpha), _power(second, alpha))
    right = alpha / (alpha - 1.0) * _nuclear(first - second) / least
    return Inequality("corollary 1", abs(_entropy(first, alpha) - _entropy(second, alpha)), right)


def lemma_2(joint: Array, n_prompt: int) -> Inequality:
    """|A - B|_* <= 2 |A_pr|_*, with B the block-diagonal part of the joint matrix A (eq. 12); an equality, in fact."""
    matrix, blocks, cross = _blocks(joint, n_prompt)
    return Inequality("lemma 2", _nuclear(matrix - blocks), 2.0 * _nuclear(cross))


def theorem_1_as_printed(joint: Array, n_prompt: int, alpha: float = 1.01) -> Inequality:
    """|H(A_joint) - H(A_pp)| <= alpha / (alpha - 1) 2 |A_pr|_* / c0 (eq. 13), c0 the smaller of both traces of powers. It fails."""
    _order(alpha)
    matrix, _, cross = _blocks(joint, n_prompt)
    prompt = _density(as_gram(joint)[:n_prompt, :n_prompt])
    least = min(_power(matrix, alpha), _power(prompt, alpha))
    right = alpha / (alpha - 1.0) * 2.0 * _nuclear(cross) / least
    return Inequality("theorem 1 as printed", abs(_entropy(matrix, alpha) - _entropy(prompt, alpha)), right)


def theorem_1_valid_part(joint: Array, n_prompt: int, alpha: float = 1.01) -> Inequality:
    """|H(A_joint) - H(B)| <= alpha / (alpha - 1) 2 |A_pr|_* / c0, with B the block-diagonal part: Corollary 1 with Lemma 2."""
    _order(alpha)
    matrix, blocks, cross = _blocks(joint, n_prompt)
    least = min(_power(matrix, alpha), _power(blocks, alpha))
    right = alpha / (alpha - 1.0) * 2.0 * _nuclear(cross) / least
    return Inequality("theorem 1, valid part", abs(_entropy(matrix, alpha) - _entropy(blocks, alpha)), right)


def pinching(joint: Array, n_prompt: int, alpha: float = 1.01) -> Inequality:
    """H(A_joint) <= H(B): coupling only ever lowers the joint entropy (B is a pinching of A and majorised by it). Any order."""
    matrix, blocks, _ = _blocks(joint, n_prompt)
    return Inequality("pinching", _entropy(matrix, alpha), _entropy(blocks, alpha))


def counter_example(n_prompt: int = 4, n_response: int = 12) -> tuple[Tensor, int]:
    """A joint kernel matrix on which Theorem 1 as printed fails, and the prompt's length: uncoupled and saturated, the identity.

    Its right side is 0; its left side is log(1 + n_response / n_prompt).
    """
    return torch.eye(n_prompt + n_response, dtype=torch.float64), n_prompt


def _pair(a: Array, b: Array, alpha: float) -> tuple[Tensor, Tensor]:
    _order(alpha)
    first, second = _density(as_gram(a, "a")), _density(as_gram(b, "b"))
    if first.shape != second.shape:
        raise ValueError(f"a {tuple(first.shape)} and b {tuple(second.shape)} must have one size")
    return first, second


def _blocks(joint: Array, n_prompt: int) -> tuple[Tensor, Tensor, Tensor]:
    matrix = _density(as_gram(joint, "joint"))
    if not 0 < n_prompt < len(matrix):
        raise ValueError(f"n_prompt must be between 1 and {len(matrix) - 1}, got {n_prompt}")
    blocks = matrix.clone()
    blocks[:n_prompt, n_prompt:] = 0.0
    blocks[n_prompt:, :n_prompt] = 0.0
    return matrix, blocks, matrix[:n_prompt, n_prompt:]


def _order(alpha: float) -> None:
    if not alpha > 1.0:
        raise ValueError(f"these bounds hold for orders above 1, got alpha = {alpha!r}")


def _density(matrix: Tensor) -> Tensor:
    return matrix / matrix.diagonal().sum()


def _power(density: Tensor, alpha: float) -> float:
    return float(settle(eigvalsh(density)).pow(alpha).sum())


def _entropy(density: Tensor, alpha: float) -> float:
    return float(renyi(settle(eigvalsh(density)), alpha))


def _nuclear(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix).sum())
