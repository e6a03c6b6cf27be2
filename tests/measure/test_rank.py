"""Measures of peers: against their formulas written out, and on hard inputs."""

from __future__ import annotations

import math

import numpy as np
import plain
import pytest

from unisonde.measure import (
    curvature,
    dataset_entropy,
    diff_erank,
    effective_rank,
    erank,
    infonce,
    infonce_bound,
    layer_by_layer_entropy,
    lidar,
    rankme,
    vendi,
)


def spread(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_ranks_by_their_formulas(shape: tuple[int, int], rng: np.random.Generator) -> None:
    x = rng.normal(size=shape) + 1
    sigma = np.linalg.svd(x, compute_uv=False)
    assert effective_rank(x).value == pytest.approx(spread(sigma / sigma.sum()), abs=1e-9)
    assert rankme(x).value == pytest.approx(spread(sigma / sigma.sum() + 1e-7), abs=1e-9)
    z = x - x.mean(0)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(z.T @ z / len(z))
    assert erank(x).value == pytest.approx(spread(values.clip(0)), abs=1e-8)
    assert diff_erank(z, x).value == pytest.approx(erank(x).value - erank(z).value, abs=1e-12)
    assert math.log(erank(x).value) == pytest.approx(layer_by_layer_entropy(x).value, abs=1e-9)
    for name, by in (("logN", math.log(shape[0])), ("logD", math.log(shape[1])), ("maxEntropy", math.log(min(shape)))):
        assert layer_by_layer_entropy(x, normalise=name).value == pytest.approx(layer_by_layer_entropy(x).value / by)
    with pytest.raises(ValueError, match="normalise must be one of"):
        layer_by_layer_entropy(x, normalise="log")


def test_ranks_of_nothing_are_one() -> None:
    zero = np.zeros((4, 3))
    for measure in (effective_rank, rankme, vendi, erank):
        assert measure(zero).value == pytest.approx(1.0)


def test_curvature_by_hand(rng: np.random.Generator) -> None:
    x = rng.normal(size=(9, 4))
    for step in (1, 2):
        v = np.diff(x, axis=0)
        angles = [math.acos(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(v[:-step], v[step:], strict=True)]
        assert curvature(x, step).value == pytest.approx(np.mean(angles), abs=1e-9)
    assert curvature(np.outer(np.arange(5.0), [1, 2])).value == pytest.approx(0.0, abs=1e-12)
    assert curvature([[0.0], [1.0], [0.0]]).value == pytest.approx(math.pi)
    assert curvature([[0.0], [0.0], [1.0], [2.0]]).value == pytest.approx(0.0)  # a standstill has no angle
    with pytest.raises(ValueError, match="more than 2 states"):
        curvature(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="direction"):
        curvature(np.zeros((4, 3)))


def test_lidar_by_its_formula(rng: np.random.Generator) -> None:
    views = rng.normal(size=(7, 1, 4)) * 2 + rng.normal(size=(7, 3, 4))
    means = views.mean(1)
    between = (means - means.mean(0)).T @ (means - means.mean(0)) / 7
    within = sum(np.outer(v - m, v - m) for m, vs in zip(means, views, strict=True) for v in vs) / 21 + 1e-4 * np.eye(4)
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    spectrum = np.linalg.eigvalsh(root @ between @ root)
    assert lidar(views).value == pytest.approx(spread(spectrum.clip(0) / spectrum.sum()), abs=1e-9)
    with pytest.raises(ValueError, match=r"\(7, 1, 4\)"):
        lidar(views[:, :1])


def test_infonce_by_its_formula(rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    z = np.concatenate([a, b])
    losses = []
    for i in range(12):
        s = np.exp(z @ z[i] / 0.1)
        losses.append(-math.log(s[(i + 6) % 12] / (s.sum() - s[i])))
    assert infonce(x, y).value == pytest.approx(np.mean(losses), abs=1e-9)
    e = infonce_bound(x, x, temperature=0.01)
    assert e.value <= e.ceiling == pytest.approx(math.log(6))
    assert e.value > math.log(6) - 0.01
    with pytest.raises(ValueError, match="temperature"):
        infonce(x, y, 0.0)


def test_dataset_entropy_is_that_of_the_means(rng: np.random.Generator) -> None:
    sequences = [rng.normal(size=(n, 5)) for n in (3, 1, 8, 4)]
    means = np.array([s.mean(0) for s in sequences])
    z = means - means.mean(0)
    assert dataset_entropy(sequences).value == pytest.approx(plain.renyi(plain.density(z @ z.T), 1.0, base=math.e), abs=1e-9)
    with pytest.raises(ValueError, match="one width"):
        dataset_entropy([np.zeros((2, 3)), np.zeros((2, 4))])
    with pytest.raises(ValueError, match="at least one"):
        dataset_entropy([])
