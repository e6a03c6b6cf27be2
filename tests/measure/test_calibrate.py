"""The self-test passes, and fails for every estimator that is broken on purpose."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from unisonde.measure import calibrate
from unisonde.measure.estimate import Estimate

LINES = calibrate.checks()


@pytest.mark.parametrize("line", LINES, ids=[line.name for line in LINES])
def test_every_closed_form_is_met(line: calibrate.Line) -> None:
    assert line.ok, f"{line.name}: {line.measured!r} instead of {line.expected!r} ({line.source})"


def test_there_are_enough_lines_and_no_two_of_a_name() -> None:
    assert len(LINES) >= 40
    assert len({line.name for line in LINES}) == len(LINES)
    exact = [line for line in LINES if line.tolerance <= 1e-9]
    assert len(exact) >= 40


def test_a_line_without_a_number_fails() -> None:
    assert not calibrate.Line("x", 0.0, math.nan, 1.0, "").ok


ESTIMATORS = [
    *("entropy", "gram_entropy", "conditional_entropy", "layer_estimates", "sweep", "median_floor", "joint_ceiling"),
    *("gmi", "best_tilt", "information", "information_at_one", "calibration_loss", "v_information", "equation_3_as_printed"),
    *("dependence.paired_joint_entropy", "dependence.mutual_information", "dependence.paired_conditional_entropy"),
    *("dependence.dime", "alignment.cka", "alignment.mutual_knn", "alignment.mmd", "alignment.modality_gap"),
    *("rank.effective_rank", "rank.rankme", "rank.vendi", "rank.vendi_of_gram", "rank.erank", "rank.diff_erank"),
    *("rank.layer_by_layer_entropy", "rank.dataset_entropy", "rank.curvature", "rank.lidar", "rank.infonce", "rank.infonce_bound"),
    *("bounds.lemma_1", "bounds.corollary_1", "bounds.lemma_2", "bounds.theorem_1_as_printed", "bounds.theorem_1_valid_part"),
    *("bounds.pinching", "lanczos.renyi_lanczos", "resample.bootstrap", "resample.paired_permutation"),
]


def off(result: Any) -> Any:
    """The result with every number one part in fifty too large."""
    if isinstance(result, float):
        return result * 1.02 + 0.02
    if isinstance(result, torch.Tensor):
        return result * 1.02 + 0.02
    if isinstance(result, tuple):
        return tuple(off(part) for part in result)
    if isinstance(result, list):
        return [off(part) for part in result]
    if isinstance(result, dict):
        return {name: off(part) for name, part in result.items()}
    if isinstance(result, Estimate):
        return dataclasses.replace(result, value=off(result.value))
    numbers = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    return dataclasses.replace(result, **{k: v * 1.3 + 0.02 for k, v in numbers.items() if isinstance(v, float)})


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_wrong_estimator_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    *room, function = name.split(".")
    place = getattr(calibrate, room[0]) if room else calibrate
    right: Callable[..., Any] = getattr(place, function)
    monkeypatch.setattr(place, function, lambda *args, **kwargs: off(right(*args, **kwargs)))
    assert not all(line.ok for line in calibrate.checks()), name


def module(name: str) -> Any:
    # `unisonde.measure.entropy` as an attribute is the function; the module of that name is meant here.
    return sys.modules[f"unisonde.measure.{name}"]


STEPS: list[tuple[str, str, Callable[..., Any]]] = [
    ("spectrum", "median_distance", lambda right: lambda squared: 1.01 * right(squared)),
    ("spectrum", "median_distance", lambda right: lambda squared: float(squared.sqrt().median())),  # the diagonal counted in
    ("spectrum", "length_weights", lambda right: lambda diagonal, split, rule: None),
    (
        "spectrum",
        "length_weights",
        lambda right: lambda diagonal, split, rule: right(diagonal, split, "weighted") if split else None,
    ),
    ("spectrum", "normalised", lambda right: lambda values: values.clamp_min(0.0)),
    ("spectrum", "gram", lambda right: lambda x: right(x).abs()),  # an elementwise clamp is no kernel
    ("entropy", "renyi", lambda right: lambda values, alpha: right(values, 2.0)),
    ("entropy", "renyi", lambda right: lambda values, alpha: right(values, alpha) / math.log(2)),
    ("lanczos", "_remainder", lambda right: lambda *args: (0.0, 0.0)),
    ("alignment", "_debiased", lambda right: lambda matrix: module("alignment")._centred(matrix)),
]


@pytest.mark.parametrize(
    ("room", "function", "wrong"), STEPS, ids=[f"{room}.{name}.{i}" for i, (room, name, _) in enumerate(STEPS)]
)
def test_a_wrong_step_is_seen(room: str, function: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module(room), function, wrong(getattr(module(room), function)))
    assert not all(line.ok for line in calibrate.checks())
