"""From states to eigenvalues: centring, PCA, distances, kernel, spectrum, each taken once and shared.

A `Spectrum` belongs to one set of states. Sweeps over the order share its eigenvalues, sweeps over the bandwidth its distances,
and the prompt's numbers use the prompt's block of what was computed for prompt and response together. Everything is float64 and
stays on the device of the states; only single numbers (a median, a trace) come to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from .eigen import eigvalsh, leading
from .protocol import Kernel, Protocol

Rows = slice | Tensor
ALL = slice(None)

# A squared distance taken from inner products is wrong by about eps (|x|^2 + |y|^2). Where the bandwidth is so small that this
# would reach the tenth digit of the kernel (of a typical pair, or the seventh of the worst), differences are taken one by one.
_TYPICAL, _WORST = 1e-6, 1e-9
# A bandwidth whose square cannot be divided by is zero.
_LIMIT = 1e-150
_LEAF = 128
_ULPS = 8.0


class Spectrum:
    """The states of one set `(n, d)` on their way to eigenvalues.

    Args:
        states: float64 `(n, d)`, finite (`states.as_states`).
        kernel: `gaussian` or `linear`.
        pca: keep at most so many principal components, k = min(pca, d, n - 1); None keeps all.
    """

    def __init__(self, states: Tensor, kernel: Kernel = "gaussian", pca: int | None = None) -> None:
        self.n, self.d = states.shape
        self.kernel_name: Kernel = kernel
        self.pca = pca
        self.states = states - states.mean(dim=0)
        self._given: Tensor | None = None
        self._scale: tuple[float, float] | None = None
        self._by_differences = False
        self._eigenvalues: dict[tuple[float, float, str, int, int], Tensor] = {}

    @classmethod
    def of(cls, states: Tensor, protocol: Protocol) -> Spectrum:
        """The spectrum of `states` with the kernel and the PCA of `protocol`."""
        return cls(states, protocol.kernel, protocol.pca)

    def alone(self, rows: Rows) -> Spectrum:
        """Some of the states as a set of their own: own centre, own PCA, own median; the inner products are not taken again."""
        child = Spectrum(self.states[rows], self.kernel_name, self.pca)
        if self.kernel_name == "gaussian" and not self.reduces:
            if not child.reduces:
                child.__dict__["squared_distances"] = _block(self.squared_distances, rows)
                child._scale, child._by_differences = self._norm_scale, self._by_differences
        elif child.reduces and self.n <= self.d:
            block = _block(self.inner, rows)
            means = block.mean(dim=0)
            child._given = block - means - means[:, None] + means.mean()
            child._scale = self._norm_scale
        return child

    # -- features -------------------------------------------------------------------------------------------------------------

    @property
    def reduces(self) -> bool:
        """Whether PCA changes anything: k = n - 1 or k = d components hold all of n centred states."""
        return self.pca is not None and self.pca < min(self.d, self.n - 1)

    @cached_property
    def inner(self) -> Tensor:
        """Inner products of the centred states `(n, n)`."""
        return gram(self.states) if self._given is None else self._given

    @cached_property
    def features(self) -> Tensor:
        """The centred states, or their first principal components `(n, k)`."""
        if not self.reduces:
            return self.states
        assert self.pca is not None
        return principal_components(self.states, self.pca, self.inner if self.n <= self.d else None)

    # -- distances ------------------------------------------------------------------------------------------------------------

    @cached_property
    def squared_distances(self) -> Tensor:
        """Squared distances `(n, n)` between features, zero on the diagonal."""
        if self.reduces:
            products = gram(self.features)
        else:
            # Without PCA nothing else needs the inner products, and for long sequences one matrix less counts.
            products = self.inner.clone() if "inner" in self.__dict__ else gram(self.states)
        norms = products.diagonal().clone()
        products.mul_(-2.0).add_(norms).add_(norms[:, None]).clamp_(min=0.0)
        products.fill_diagonal_(0.0)
        return products

    @cached_property
    def _norm_scale(self) -> tuple[float, float]:
        """Median and largest squared norm of what the distances were taken from: what their rounding is relative to."""
        if self._scale is not None:
            return self._scale
        norms = self.states.square().sum(dim=1)
        median, largest = torch.stack([norms.median(), norms.max()]).tolist()
        return median, largest

    @cached_property
    def median(self) -> float:
        """The median distance over all pairs i < j, exact; the mean of the two middle ones for an even count."""
        value = self._median()
        if self._too_small(value):
            self._take_differences()
            value = self._median()
        return value

    def _median(self) -> float:
        return median_distance(self.squared_distances)

    def _too_small(self, sigma: float) -> bool:
        if self._by_differences:
            return False
        typical, worst = self._norm_scale
        return sigma * sigma <= max(_TYPICAL * typical, _WORST * worst)

    def _refined(self, sigma: float) -> bool:
        """Take differences of the close pairs alone, if they are few: at a small bandwidth the others' kernel is zero anyway."""
        if self.reduces:
            return False
        near = 256.0 * sigma * sigma + 1e-12 * self._norm_scale[1]
        pairs = (self.squared_distances <= near).triu_(1).nonzero()
        if len(pairs) > 16 * self.n:
            return False
        for part in pairs.split(4096):
            rows, columns = part.unbind(dim=1)
            exact = (self.states[rows] - self.states[columns]).square().sum(dim=1)
            self.squared_distances[rows, columns] = exact
            self.squared_distances[columns, rows] = exact
        return True

    def _take_differences(self) -> None:
        """Squared distances by differences: slower, accurate at every scale, and exactly zero for equal states."""
        features = self.states
        if self.reduces:
            # Inner products square the condition number; the singular values of the states themselves do not.
            left, values, _ = torch.linalg.svd(self.states, full_matrices=False)
            features = (left * values)[:, : self.pca]
            # Equal states must stay equal after the projection, to the last bit.
            _, group = torch.unique(self.states, dim=0, return_inverse=True)
            order = torch.arange(self.n, device=group.device)
            first = torch.full_like(order, self.n).scatter_reduce(0, group, order, "amin")
            features = features[first[group]]
            self.__dict__["features"] = features
        distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
        self.__dict__["squared_distances"] = distances.square_()
        self._by_differences = True

    def bandwidth(self, protocol: Protocol) -> float:
        """sigma of the Gaussian kernel under `protocol`; 0 stands for the limit sigma -> 0."""
        if protocol.kernel == "linear" or self.n == 1:
            return 1.0
        if isinstance(protocol.bandwidth, float):
            return protocol.bandwidth
        return protocol.bandwidth_scale * self.median

    # -- kernel and eigenvalues -----------------------------------------------------------------------------------------------

    def kernel(self, sigma: float, rows: Rows = ALL) -> Tensor:
        """The kernel matrix of some of the states, new and without ridge.

        sigma = 0 is the limit: equal states are one, different states orthogonal.
        """
        if self.kernel_name == "linear":
            return gram(self._linear_features[rows])
        if self._too_small(sigma) and not self._refined(sigma):
            self._take_differences()
        squared = _block(self.squared_distances, rows)
        if sigma < _LIMIT:
            return (squared == 0.0).to(squared.dtype)
        return torch.mul(squared, -0.5 / (sigma * sigma)).exp_()

    @cached_property
    def _linear_features(self) -> Tensor:
        # Equal states centred by their mean leave rounding, which the trace would blow up to noise: they are zero.
        constant = (self.states == self.states[:1]).all()
        return torch.where(constant, torch.zeros((), dtype=torch.float64, device=self.states.device), self.features)

    def density(self, sigma: float, ridge: float, rule: str = "none", split: int = 0, rows: Rows = ALL) -> Tensor:
        """W^(1/2) (K + ridge I) W^(1/2) over its trace: what the entropies are taken of."""
        matrix = self.kernel(sigma, rows)
        matrix.diagonal().add_(self._ridge(ridge))
        weights = length_weights(matrix.diagonal(), split, rule)
        if weights is not None:
            root = weights.sqrt()
            matrix.mul_(root).mul_(root[:, None])
        return matrix.div_(matrix.diagonal().sum().clamp_min(torch.finfo(torch.float64).tiny))

    def eigenvalues(self, sigma: float, ridge: float, rule: str = "none", split: int = 0, rows: slice = ALL) -> Tensor:
        """Eigenvalues of `density` `(n,)`, ascending, none negative, sum one (or zero, if the kernel is)."""
        start, stop, _ = rows.indices(self.n)
        if split == 0 or (self.kernel_name == "gaussian" and 2 * split == self.n):
            rule = "none"
        key = (sigma, ridge, rule, start, stop)
        if key not in self._eigenvalues:
            self._eigenvalues[key] = self._take_eigenvalues(sigma, ridge, rule, split, rows)
        return self._eigenvalues[key]

    def _take_eigenvalues(self, sigma: float, ridge: float, rule: str, split: int, rows: slice) -> Tensor:
        if self.kernel_name == "linear":
            features = self._linear_features[rows]
            n, k = features.shape
            weights = length_weights(features.square().sum(dim=1) + self._ridge(ridge), split, rule)
            if k < n and (weights is None or ridge == 0.0):
                # The covariance has the same non-zero eigenvalues as the Gram matrix, and is smaller.
                if weights is not None:
                    features = features * weights.sqrt()[:, None]
                values = eigvalsh(gram(features.mT))
                values = torch.cat([values.new_zeros(n - k), values.clamp_min(0.0)])
                return normalised(values + self._ridge(ridge))
        return normalised(eigvalsh(self.density(sigma, ridge, rule, split, rows)))

    def _ridge(self, ridge: float) -> Tensor | float:
        if self.kernel_name == "gaussian" or ridge == 0.0:
            return ridge
        # Constant states have a zero kernel; a ridge would turn them into noise of the highest entropy.
        return ridge * (self._linear_features != 0).any().double()

    def trace(self, ridge: float, rows: slice = ALL) -> float:
        """The trace of K + ridge I."""
        if self.kernel_name == "gaussian":
            return len(range(*rows.indices(self.n))) * (1.0 + ridge)
        features = self._linear_features[rows]
        return float(features.square().sum() + len(features) * self._ridge(ridge))

    def purity(self, sigma: float, ridge: float, rule: str = "none", split: int = 0, rows: Rows = ALL) -> Tensor:
        """tr(A^2) of `density`: its squared Frobenius norm, no eigenvalues needed."""
        return self.density(sigma, ridge, rule, split, rows).square().sum()


def gram(x: Tensor, out: Tensor | None = None) -> Tensor:
    """x x^T `(n, n)`, exactly symmetric, for little more than half the work of the full product."""
    n = x.shape[0]
    if out is None:
        out = x.new_empty(n, n)
    if n <= _LEAF:
        block = x @ x.mT
        out.copy_(block.tril()).add_(block.tril(-1).mT)
        return out
    half = (n // 2 + 7) // 8 * 8
    gram(x[:half], out[:half, :half])
    gram(x[half:], out[half:, half:])
    corner = x[half:] @ x[:half].mT
    out[half:, :half] = corner
    out[:half, half:] = corner.mT
    return out


def principal_components(centred: Tensor, k: int, inner: Tensor | None = None) -> Tensor:
    """The first k principal components `(n, k)` of centred states `(n, d)`: by the covariance, or by `inner` = x x^T if given."""
    if inner is not None:
        values, vectors = leading(inner, k)
        return vectors * values.clamp_min(0.0).sqrt()
    _, vectors = leading(gram(centred.mT), k)
    return centred @ vectors


def median_distance(squared: Tensor) -> float:
    """The median of the distances i < j from their squares `(n, n)`; 0 for a single state."""
    n = squared.shape[0]
    if n < 2:
        return 0.0
    upper = torch.ones(n, n, dtype=torch.bool, device=squared.device).triu_(1)
    pairs = squared[upper]
    middle = (len(pairs) + 1) // 2
    low = torch.kthvalue(pairs, middle).values
    if len(pairs) % 2:
        return float(low.sqrt())
    # The next one up is `low` again if it occurs often enough, else the smallest above it.
    above = torch.where(pairs > low, pairs, torch.inf).min()
    high = torch.where((pairs <= low).sum() > middle, low, above)
    return float((low.sqrt() + high.sqrt()) / 2)


def length_weights(diagonal: Tensor, split: int, rule: str) -> Tensor | None:
    """The diagonal of W `(n,)` for a joint kernel matrix whose first `split` states are the prompt; None if all weigh alike."""
    n = len(diagonal)
    if rule == "none" or split in (0, n):
        return None
    parts: list[Tensor] = []
    weigh: dict[str, Callable[[Tensor], Tensor]] = {
        "trace": lambda block: torch.where(block.sum() > 0, 0.5 / block.sum(), 0.0),
        "weighted": lambda block: torch.full_like(block[0], 1.0 / len(block)),
    }
    for block in (diagonal[:split], diagonal[split:]):
        parts.append(weigh[rule](block).expand(len(block)))
    return torch.cat(parts)


def normalised(values: Tensor) -> Tensor:
    """Eigenvalues with those below zero set to zero and the sum brought to one; a sum of zero stays.

    An eigenvalue is known to a few units in the last place of the largest. What is smaller than that is zero too: orders below one
    would otherwise count rounding of either sign, and rounding only has a chance of being negative.
    """
    info = torch.finfo(values.dtype)
    floor = _ULPS * info.eps * values.amax(dim=-1, keepdim=True)
    values = torch.where(values > floor, values, 0.0)
    return values / values.sum(dim=-1, keepdim=True).clamp_min(info.tiny)


def settle(values: Tensor, what: str = "gram") -> Tensor:
    """`normalised`, for a matrix from outside: negative eigenvalues are rounding or an error.

    Raises:
        ValueError: an eigenvalue is below zero by more than rounding explains.
    """
    least, largest = torch.stack([values.min(), values.max()]).tolist()
    if least < -1e-8 * max(abs(largest), abs(least)):
        raise ValueError(
            f"{what} {(len(values), len(values))} must be positive semi-definite; its eigenvalues are {least:.3g} to {largest:.3g}"
        )
    return normalised(values)


def _block(matrix: Tensor, rows: Rows) -> Tensor:
    if isinstance(rows, slice):
        return matrix[rows, rows]
    return matrix[rows][:, rows]
