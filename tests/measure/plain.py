"""A second opinion: the measures written out in plain numpy, pair by pair, with nothing shared and nothing clever."""

from __future__ import annotations

import numpy as np


def distances(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    return np.array([[np.sqrt(((a - b) ** 2).sum()) for b in x] for a in x])


def median(x: np.ndarray) -> float:
    d = distances(x)
    return float(np.median(d[np.triu_indices(len(d), 1)]))


def pca(x: np.ndarray, k: int | None) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    x = x - x.mean(axis=0)
    if k is None:
        return x
    _, _, rows = np.linalg.svd(x, full_matrices=False)
    return x @ rows[: min(k, x.shape[1], len(x) - 1)].T


def gaussian(x: np.ndarray, sigma: float) -> np.ndarray:
    d = distances(x)
    return (d == 0).astype(float) if sigma == 0 else np.exp(-(d**2) / (2 * sigma**2))


def renyi(a: np.ndarray, alpha: float, base: float = 2.0) -> float:
    """Entropy of a density matrix by its eigenvalues."""
    values = np.linalg.eigvalsh(a)
    values = values[values > 0]
    values = values / values.sum()
    if alpha == 1:
        return float(-(values * np.log(values)).sum() / np.log(base))
    return float(np.log((values**alpha).sum()) / (1 - alpha) / np.log(base))


def density(k: np.ndarray, ridge: float = 0.0) -> np.ndarray:
    k = k + ridge * np.eye(len(k))
    return k / np.trace(k)


def entropy(x: np.ndarray, alpha: float = 1.01, ridge: float = 1e-6, k: int | None = 64, scale: float = 1.0) -> float:
    if len(x) == 1:
        return 0.0
    z = pca(x, k)
    return renyi(density(gaussian(z, scale * median(z)), ridge), alpha)


def conditional(
    p: np.ndarray, r: np.ndarray, rule: str = "trace", alpha: float = 1.01, ridge: float = 1e-6, k: int | None = 64
) -> tuple[float, float]:
    """Joint entropy and prompt term under a length rule, with one bandwidth and one PCA."""
    z = pca(np.concatenate([p, r]), k)
    n = len(p)
    kernel = gaussian(z, median(z)) + ridge * np.eye(len(z))
    term = renyi(density(kernel[:n, :n]), alpha)
    if rule == "trace":
        w = np.concatenate([np.full(n, 0.5 / np.trace(kernel[:n, :n])), np.full(len(r), 0.5 / np.trace(kernel[n:, n:]))])
    elif rule == "weighted":
        w = np.concatenate([np.full(n, 1 / n), np.full(len(r), 1 / len(r))])
    else:
        w = np.ones(len(z))
    return renyi(density(np.sqrt(w)[:, None] * kernel * np.sqrt(w)[None, :]), alpha), term
