"""Intervals over items and groups, and steps that are kept."""

from __future__ import annotations

import threading
import time
import warnings

import numpy as np
import polars as pl
import pytest
import torch

from unisonde.measure import Interval
from unisonde.study.decoding.finding import Steps, flipped, interval, said, side_by_side


def test_groups_are_drawn_whole() -> None:
    """Ten groups of ten equal items are ten items, and not a hundred."""
    of_group = np.random.default_rng(0).normal(size=10)
    values, groups = np.repeat(of_group, 10), np.repeat(np.arange(10), 10)
    alone, together, few = interval(values, draws=400), interval(values, groups, draws=400), interval(of_group, draws=400)
    assert alone.value == pytest.approx(values.mean()) == pytest.approx(together.value)
    assert together.n == 100 and together.stderr == pytest.approx(few.stderr, rel=0.15)
    assert alone.stderr < together.stderr / 2
    assert together.low < together.value < together.high
    assert said(Interval(-0.001, -0.2, 0.004, 0.1, 0.95, 9)) == "0.00 (-0.20 to 0.00)"
    assert said(Interval(0.0, -0.2, 0.2, 0.1, 0.95, 9), "{:+.1f}") == "0.0 (-0.2 to +0.2)"
    assert said(interval([0.5, 0.5]), "{:.1f}") == "0.5 (0.5 to 0.5)" and said(interval([0.5]), "{:.1f}") == "0.5"


def test_what_never_varies_is_its_own_interval_and_says_nothing_else() -> None:
    """Scores that are worth nothing at all: zero for each item, in groups of several sizes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = interval(np.zeros(9), ["a", "a", "b", "b", "b", "c", "d", "d", "d"])
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_groups_of_different_sizes_keep_the_mean_over_items() -> None:
    values, groups = [1.0, 2.0, 3.0, 10.0], ["a", "a", "a", "b"]
    assert interval(values, groups, draws=50).value == pytest.approx(4.0)


def test_steps_are_made_once_and_go_with_their_settings(tmp_path) -> None:
    made = []

    def make() -> pl.DataFrame:
        made.append(1)
        return pl.DataFrame({"x": [len(made)], "y": [None]}, schema={"x": pl.Int64, "y": pl.Float64})

    for _ in range(2):  # the second as after a kill
        steps = Steps(tmp_path / "probes", {"seed": 0, "strengths": (1, 2)})
        assert steps.table("one", make).rows() == [(1, None)]
    assert len(made) == 1 and steps.table("two", make)["x"][0] == 2
    other = Steps(tmp_path / "probes", {"seed": 1, "strengths": [1, 2]})
    assert other.table("one", make)["x"][0] == 3 and other.folder != steps.folder
    assert Steps(tmp_path / "probes", {"strengths": [1, 2], "seed": 0}).table("one", make)["x"][0] == 1  # both are kept
    assert Steps(None, {}).table("one", make)["x"][0] == 4


def test_a_step_that_fails_leaves_nothing(tmp_path, monkeypatch) -> None:
    steps = Steps(tmp_path / "s", {})
    monkeypatch.setattr("unisonde.study.decoding.finding.flush", lambda path: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError):
        steps.table("one", lambda: pl.DataFrame({"x": [1]}))
    assert steps.folder is not None and [path.name for path in steps.folder.iterdir()] == ["settings.json"]


def test_seconds_add_up_over_calls(tmp_path) -> None:
    for name in ("one", "two", "one"):
        steps = Steps(tmp_path / "s", {})
        before = steps.seconds
        steps.table(name, lambda: time.sleep(0.02) or pl.DataFrame({"x": [1]}))  # type: ignore[func-returns-value]
        assert (steps.seconds == before) == (name == "one" and before > 0)
    assert steps.seconds >= 0.04


def test_signs_of_whole_groups_are_flipped() -> None:
    """Ten groups of ten equal differences: as items, a chance difference looks certain."""
    rng = np.random.default_rng(1)
    few = [flipped(np.repeat(rng.normal(size=10), 10), np.repeat(np.arange(10), 10), seed=k) < 0.05 for k in range(40)]
    rng = np.random.default_rng(1)
    many = [flipped(np.repeat(rng.normal(size=10), 10), seed=k) < 0.05 for k in range(40)]
    assert sum(few) <= 6 < 15 < sum(many)
    assert flipped(np.array([1.0, 1.1, 0.9, 1.2, 1.0, 1.3, 0.8])) == pytest.approx(2 / 2**7)


def test_items_side_by_side_come_in_order() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        threads = side_by_side(lambda k: (k, torch.get_num_threads(), threading.get_ident()), range(9), torch.device("cpu"))
        assert [k for k, _, _ in threads] == list(range(9)) and {count for _, count, _ in threads} == {1}
        assert threading.get_ident() not in {thread for _, _, thread in threads} and torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert {thread for _, thread in side_by_side(lambda k: (k, threading.get_ident()), range(3), torch.device("cpu"))} == {
            threading.get_ident()
        }
    finally:
        torch.set_num_threads(before)
