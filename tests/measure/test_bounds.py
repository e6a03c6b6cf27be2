"""The supplement's inequalities on thousands of random kernel matrices, and the one that fails."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from unisonde.measure import (
    corollary_1,
    counter_example,
    lemma_1,
    lemma_2,
    pinching,
    theorem_1_as_printed,
    theorem_1_valid_part,
)


def random_gram(rng: np.random.Generator, n: int) -> np.ndarray:
    kind = rng.integers(3)
    x = rng.normal(size=(n, int(rng.integers(1, 2 * n)))) * 10.0 ** rng.uniform(-1, 1)
    if kind == 0:
        return x @ x.T + 1e-9 * np.eye(n)
    d2 = ((x[:, None] - x[None]) ** 2).sum(-1)
    return np.exp(-d2 / (2 * 10.0 ** rng.uniform(-1, 1)))


def test_the_valid_bounds_hold_on_thousands_of_random_grams() -> None:
    rng = np.random.default_rng(7)
    for _ in range(1500):
        n = int(rng.integers(2, 9))
        alpha = float(rng.choice([1.001, 1.01, 1.1, 1.5, 2.0, 3.0]))
        n_prompt = int(rng.integers(1, n))
        a, b = random_gram(rng, n), random_gram(rng, n)
        for inequality in (
            lemma_1(a, b, alpha),
            corollary_1(a, b, alpha),
            lemma_2(a, n_prompt),
            theorem_1_valid_part(a, n_prompt, alpha),
            pinching(a, n_prompt, alpha),
        ):
            assert inequality.holds, (inequality, n, n_prompt, alpha)


def test_lemma_2_is_an_equality() -> None:
    rng = np.random.default_rng(8)
    for _ in range(50):
        assert lemma_2(random_gram(rng, 6), 2).slack == pytest.approx(0.0, abs=1e-12)


def test_theorem_1_as_printed_fails_where_nothing_couples() -> None:
    joint, n_prompt = counter_example(4, 12)
    printed = theorem_1_as_printed(joint, n_prompt)
    assert not printed.holds
    assert printed.right == 0.0
    assert printed.left == pytest.approx(math.log(4), abs=1e-12)
    assert theorem_1_valid_part(joint, n_prompt).holds


def test_theorem_1_as_printed_fails_for_ordinary_states_too(rng: np.random.Generator) -> None:
    p, r = rng.normal(size=(10, 3)), rng.normal(size=(40, 3)) + 60
    z = np.concatenate([p, r])
    joint = np.exp(-((z[:, None] - z[None]) ** 2).sum(-1) / 2)
    assert not theorem_1_as_printed(joint, 10).holds
    assert theorem_1_valid_part(joint, 10).holds


def test_a_bound_can_fail() -> None:
    # The property test above means something only if `holds` can be false for the valid ones' own sides.
    inequality = lemma_1(np.eye(3), np.ones((3, 3)), 2.0)
    assert inequality.holds and not type(inequality)("reversed", inequality.right, inequality.left).holds


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="orders above 1"):
        lemma_1(np.eye(2), np.eye(2), 1.0)
    with pytest.raises(ValueError, match="n_prompt must be between 1 and 2"):
        lemma_2(torch.eye(3), 3)
    with pytest.raises(ValueError, match="one size"):
        lemma_1(np.eye(2), np.eye(3))
    with pytest.raises(ValueError, match="positive semi-definite"):
        pinching(np.array([[1.0, 3.0], [3.0, 1.0]]), 1)
