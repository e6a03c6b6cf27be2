"""Eigenvalues and leading eigenvectors: the same on every road."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from threadpoolctl import ThreadpoolController

from unisonde.measure import Protocol, conditional_entropy, eigen


@pytest.mark.parametrize("n", [1, 2, 7, 64, 150])
def test_the_eigenvalues_are_those_of_torch(n: int, rng: np.random.Generator) -> None:
    x = torch.from_numpy(rng.normal(size=(n, 40)))
    matrix = x @ x.mT
    before = matrix.clone()
    expected = torch.linalg.eigvalsh(matrix)
    assert torch.allclose(eigen.eigvalsh(matrix), expected, atol=1e-12 * float(expected[-1]), rtol=0)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("rank", [3, 10, 60])
@pytest.mark.parametrize("k", [1, 8, 16, 17, 64])
def test_leading_pairs_solve_the_equation_and_are_orthonormal(k: int, rank: int, rng: np.random.Generator) -> None:
    x = torch.from_numpy(rng.normal(size=(64, rank)))
    matrix = x @ x.mT
    values, vectors = eigen.leading(matrix, k)
    expected = torch.linalg.eigvalsh(matrix)
    assert values.shape == (k,) and vectors.shape == (64, k)
    assert torch.allclose(values, expected[-k:], atol=1e-12 * float(expected[-1]), rtol=0)
    assert torch.allclose(matrix @ vectors, vectors * values, atol=1e-11 * float(expected[-1]), rtol=0)
    assert torch.allclose(vectors.mT @ vectors, torch.eye(k, dtype=torch.float64), atol=1e-12)


def test_the_road_off_the_cpu_gives_the_same_entropy(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rng.normal(size=(80, 120)), rng.normal(size=(150, 120))
    protocol = Protocol(pca=16)
    here = conditional_entropy(x, y, protocol).value
    monkeypatch.setattr(eigen, "_on_cpu", lambda matrix: False)
    assert conditional_entropy(x, y, protocol).value == pytest.approx(here, abs=1e-10)


def test_scipy_keeps_to_the_threads_of_torch() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with eigen.held(torch.get_num_threads()):
            counts = [library["num_threads"] for library in eigen._libraries().info() if library["user_api"] == "blas"]
        assert counts and set(counts) == {1}
    finally:
        torch.set_num_threads(before)


def test_threads_within_a_hold_use_one_each_and_leave_the_library_as_it_was(rng: np.random.Generator) -> None:
    def blas() -> set[int]:
        return {library["num_threads"] for library in ThreadpoolController().info() if library["user_api"] == "blas"}

    x = torch.from_numpy(rng.normal(size=(120, 130)))
    matrix = x @ x.mT
    expected = eigen.eigvalsh(matrix)

    def measured(_: int) -> tuple[bool, set[int]]:
        found = eigen.eigvalsh(matrix)
        return torch.allclose(found, expected, atol=1e-12 * float(expected[-1]), rtol=0), blas()

    with eigen.held(2):
        with eigen.held(1), ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            assert list(pool.map(measured, range(100))) == [(True, {1})] * 100
        assert blas() == {2}
