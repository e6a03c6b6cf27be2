"""Splits of labelled items into training and test parts, by label and by group, from a seed.

Items of one group (a speaker, a sentence, a scene) stay together, so that what a probe learns of the group is of no use in the
test. Each part of each split holds every label: a split that leaves one out is refused, for its accuracy would be about other
labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ATTEMPTS = 50
"""How often groups are dealt anew before it is said that no split holds every label."""


@dataclass(frozen=True)
class Split:
    """Numbers of the items to learn from, and of those to judge by."""

    train: np.ndarray
    test: np.ndarray


def coded(labels: Sequence[Any] | np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Labels as numbers (n,), and the names that the numbers stand for, sorted."""
    names, numbers = np.unique(np.asarray([str(label) for label in labels]), return_inverse=True)
    return numbers, names.tolist()


def splits(
    labels: Sequence[Any] | np.ndarray, groups: Sequence[Any] | np.ndarray | None = None, folds: int = 5, seed: int = 0
) -> list[Split]:
    """`folds` splits whose test parts are disjoint and cover all items; labels in like shares where the groups allow it.

    Args:
        labels: (n,), what is to be told apart.
        groups: (n,), what must not be in both parts of a split; None if items stand for themselves.

    Raises:
        ValueError: there is one label only, a label has one example, or one stands in fewer groups than there are folds, so that
            a split would leave it out.
    """
    numbers, names = coded(labels)
    if not isinstance(folds, int) or isinstance(folds, bool) or folds < 2:
        raise ValueError(f"there must be 2 or more folds, got {folds!r}")
    if groups is not None and len(groups) != len(numbers):
        raise ValueError(f"there are {len(numbers)} labels and {len(groups)} groups; give one of each to an item")
    if len(names) < 2:
        raise ValueError(f"all {len(numbers)} items have the same label ({', '.join(names)}), so there is nothing to tell apart")
    held = np.arange(len(numbers)) if groups is None else coded(groups)[0]
    for number, name in enumerate(names):
        examples, places = int((numbers == number).sum()), len(np.unique(held[numbers == number]))
        if examples == 1:
            raise ValueError(f"the label {name!r} has one example, which cannot be both learned from and tested; leave it out")
        if places < folds:
            what = "examples" if groups is None else "group" if places == 1 else "groups"
            remedy = f"take {places} folds" if places > 1 else "group by something else, or leave it out"
            raise ValueError(
                f"the label {name!r} is in {places} {what}, fewer than the {folds} folds, so a split would leave it out; {remedy}"
            )
    for attempt in range(ATTEMPTS):
        found = _dealt(numbers, None if groups is None else held, folds, seed * ATTEMPTS + attempt)
        if all(len(np.unique(numbers[part])) == len(names) for split in found for part in (split.train, split.test)):
            return found
    raise ValueError(
        f"no {folds} splits by these groups were found that all hold each of the {len(names)} labels; take fewer folds, or group by "
        "something else"
    )


def _dealt(numbers: np.ndarray, groups: np.ndarray | None, folds: int, seed: int) -> list[Split]:
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    dealt = kind(n_splits=folds, shuffle=True, random_state=seed).split(np.zeros(len(numbers)), numbers, groups)
    return [Split(train, test) for train, test in dealt]
