"""Splits by label and group: what they hold, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unisonde.study.decoding.splits import splits


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 4), st.integers(2, 4), st.integers(0, 99), st.booleans())
def test_parts_are_disjoint_and_hold_every_label(kinds: int, folds: int, seed: int, shared: bool) -> None:
    rng = np.random.default_rng(seed)
    # Each label in twice as many groups as there are folds, one to three items each; groups hold one label, or all of them.
    places = [(kind, group) for kind in range(kinds) for group in range(2 * folds) for _ in range(rng.integers(1, 4))]
    labels = np.array([kind for kind, _ in places])
    groups = np.array([group if shared else kind * 100 + group for kind, group in places])
    made = splits(labels, groups, folds, seed)
    assert len(made) == folds
    assert sorted(np.concatenate([split.test for split in made])) == list(range(len(labels)))
    for split in made:
        assert not set(split.train) & set(split.test) and len(split.train) + len(split.test) == len(labels)
        assert not set(groups[split.train]) & set(groups[split.test])
        assert set(labels[split.train]) == set(labels[split.test]) == set(range(kinds))


def test_the_seed_decides() -> None:
    labels = np.arange(40) % 2
    one, same, other = (splits(labels, None, 4, seed) for seed in (1, 1, 2))
    assert all((a.test == b.test).all() for a, b in zip(one, same, strict=True))
    assert any((a.test != b.test).any() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("labels", "groups", "folds", "said"),
    [
        (["a"] * 9, None, 3, "all 9 items have the same label .a."),
        (["a"] * 9 + ["b"], None, 2, "the label 'b' has one example, which cannot be both learned from and tested"),
        (["a"] * 9 + ["b"] * 2, None, 3, "the label 'b' is in 2 examples, fewer than the 3 folds.*take 2 folds"),
        (["a", "b"] * 6, ["x", "x", "y", "y"] * 3, 3, "'a' is in 2 groups, fewer than the 3 folds"),
        (["a"] * 6 + ["b"] * 6, ["x", "y", "z"] * 2 + ["w"] * 6, 2, "'b' is in 1 group.*group by something else"),
        (["a", "b"] * 3, ["x"] * 5, 2, "6 labels and 5 groups"),
        (["a", "b"] * 3, None, 1, "2 or more folds, got 1"),
        # Each label is in two groups, and yet x and y together hold all of them or none.
        (["a", "b", "a", "c", "b", "c"], ["x", "x", "y", "y", "z", "z"], 2, "no 2 splits by these groups"),
    ],
)
def test_what_is_refused(labels, groups, folds, said) -> None:
    with pytest.raises(ValueError, match=said):
        splits(labels, groups, folds)
