"""Trajectories: against means taken by hand and by plain loops, and what must never enter one mean."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unisonde.study.trajectories import (
    KEY,
    by_category,
    drawn_steps,
    final_layer,
    has_flag,
    landmarks,
    trajectory,
    with_cells,
)

ROW: dict[str, Any] = {
    "run": "first-0123abcd",
    "model": "twin/a",
    "data": "tabletop",
    "item": "a",
    "category": "shapes",
    "task": "text",
    "level": "prompt",
    "modality": "text",
    "quantity": "entropy",
    "stack": "llm",
    "layer": 0,
    "step": "single",
    "value": 1.0,
    "ceiling": 4.0,
    "stderr": 0.0,
    "units": "bits",
    "n_prompt": 10,
    "n_response": 0,
    "flags": "",
    "protocol": "p" * 12,
    "reading": "r" * 12,
    "generation": "g" * 12,
    "seed": 0,
}


def frame(*rows: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame([ROW | row for row in rows], schema_overrides={"value": pl.Float64, "ceiling": pl.Float64})


def items(values: list[float], **more: Any) -> list[dict[str, Any]]:
    return [{"item": f"i{place}", "value": value, **more} for place, value in enumerate(values)]


def only(table: pl.DataFrame) -> dict[str, Any]:
    assert table.height == 1
    return table.to_dicts()[0]


def test_statistics_by_hand() -> None:
    rows = items([1.0, 2.0, 4.0, 9.0])
    for row, ceiling, tokens in zip(rows, (4.0, 4.0, 8.0, 16.0), (4, 10, 20, 30), strict=True):
        row |= {"ceiling": ceiling, "n_prompt": tokens, "n_response": 2 * tokens}
    rows[0]["flags"] = "short,full"
    found = only(trajectory(frame(*rows), "entropy"))
    assert found["n_items"] == 4
    assert found["mean"] == 4.0
    assert found["sd"] == pytest.approx(math.sqrt((9 + 4 + 0 + 25) / 3), rel=1e-15)
    # Positions 0.75, 1.5 and 2.25 between the order statistics 1, 2, 4, 9.
    assert (found["q1"], found["median"], found["q3"]) == (1.75, 3.0, 5.25)
    assert found["ceiling"] == 8.0
    assert found["share"] == 0.5  # the ratio of the means; the mean of the ratios is 0.4531
    assert (found["n_prompt"], found["n_response"]) == (16.0, 32.0)
    assert (found["n_short"], found["n_left_out"], found["units"]) == (1, 0, "bits")


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan) | st.just(math.inf) | st.none(), min_size=1, max_size=12))
def test_statistics_against_numpy(values: list[float | None]) -> None:
    found = only(trajectory(frame(*items(values)), "entropy"))  # type: ignore[arg-type]
    finite = [value for value in values if value is not None and math.isfinite(value)]
    assert (found["n_items"], found["n_left_out"]) == (len(finite), len(values) - len(finite))
    if not finite:
        assert all(found[name] is None for name in ("mean", "sd", "q1", "median", "q3", "ceiling", "share", "n_prompt"))
        return
    close = {"rel": 1e-9, "abs": 1e-9}
    assert found["mean"] == pytest.approx(statistics.fmean(finite), **close)
    expected = np.quantile(finite, [0.25, 0.5, 0.75])
    assert [found["q1"], found["median"], found["q3"]] == pytest.approx(list(expected), **close)
    if len(finite) == 1:
        assert found["sd"] is None
    else:
        assert found["sd"] == pytest.approx(float(np.std(finite, ddof=1)), rel=1e-9, abs=1e-6)


def test_a_ceiling_that_is_infinite_leaves_the_value_in_the_mean_and_out_of_the_share() -> None:
    rows = items([1.0, 5.0])
    rows[1]["ceiling"] = math.inf
    found = only(trajectory(frame(*rows), "entropy"))
    assert (found["mean"], found["ceiling"], found["share"]) == (3.0, 4.0, 0.25)


@pytest.mark.parametrize("ceiling", [0.0, -1.0, math.inf, math.nan])
def test_no_share_of_a_ceiling_that_is_not_above_zero(ceiling: float) -> None:
    assert only(trajectory(frame(*items([1.0, 2.0], ceiling=ceiling)), "entropy"))["share"] is None


def test_negative_values_stay_negative() -> None:
    found = only(trajectory(frame(*items([-1.0, -3.0], quantity="conditional_entropy")), "conditional_entropy"))
    assert (found["mean"], found["share"]) == (-2.0, -0.5)


def test_the_question_beside_an_image_is_in_no_curve_of_text_prompts() -> None:
    rows = [
        {"item": "t", "value": 1.0},
        {"item": "i", "modality": "image", "value": 2.0},
        {"item": "i", "value": 100.0, "flags": "short, question"},
        {"item": "t", "task": "image", "value": 3.0, "flags": "questionable"},
    ]
    found = {row["cell"]: row["mean"] for row in trajectory(frame(*rows), "entropy").to_dicts()}
    assert found == {"text → text": 1.0, "image → text": 2.0, "question → text": 100.0, "text → image": 3.0}
    assert with_cells(frame(*rows)).select(has_flag("short"))["flags"].to_list() == [False, False, True, False]


def test_rows_are_keyed_and_sorted() -> None:
    rows = [
        {"model": model, "stack": stack, "layer": layer, "step": step, "value": layer}
        for layer in (10, 9, 0)
        for step in ("final", "0000")
        for stack in ("llm", "dit")
        for model in ("twin/b", "twin/a")
    ]
    found = trajectory(frame(*rows, {"quantity": "prompt_term"}), "entropy")
    assert found.columns[: len(KEY)] == list(KEY)
    assert found.height == len(rows)
    keys = found.select(KEY).rows()
    assert keys == sorted(keys)
    assert found["mean"].to_list() == [float(row[KEY.index("layer")]) for row in keys]


def test_by_category() -> None:
    rows = items([1.0, 2.0, 6.0])
    rows[2]["category"] = "colours"
    found = {row["category"]: (row["mean"], row["n_items"]) for row in by_category(frame(*rows), "entropy").to_dicts()}
    assert found == {"shapes": (1.5, 2), "colours": (6.0, 1)}


def test_a_quantity_that_was_not_measured_gives_an_empty_table() -> None:
    empty = trajectory(frame({}), "conditional_entropy")
    assert empty.is_empty()
    assert empty.columns == trajectory(frame({}), "entropy").columns


@pytest.mark.parametrize(
    ("column", "other"),
    [
        ("run", "second"),
        ("level", "response"),
        ("units", "nats"),
        ("protocol", "q" * 12),
        ("reading", "s" * 12),
        ("generation", "h" * 12),
        ("seed", 1),
    ],
)
def test_settings_are_not_mixed(column: str, other: Any) -> None:
    mixed = frame({"item": "a"}, {"item": "b", column: other})
    with pytest.raises(ValueError, match=rf"mix several values of {column} .*{other}"):
        trajectory(mixed, "entropy")
    assert trajectory(mixed, "entropy", by=(*KEY, column)).height == 2


def test_an_item_counts_once() -> None:
    with pytest.raises(ValueError, match="several rows of entropy"):
        trajectory(frame({}, {"n_prompt": 11}), "entropy")


def test_an_unknown_column_is_named() -> None:
    with pytest.raises(ValueError, match="no column flavour"):
        trajectory(frame({}), "entropy", by=("flavour",))


def test_landmarks() -> None:
    # L = 8 layers: states 0..8 and final at 9; the middle is 8 // 2.
    assert (final_layer(range(10)), landmarks(range(10))) == (9, (0, 4, 9))
    assert (final_layer([0, 1]), landmarks([0, 1])) == (None, (0, 1))
    assert (final_layer([]), landmarks([])) == (None, ())


def test_drawn_steps() -> None:
    assert drawn_steps(["0000", "0001", "clean", "final"]) == ("final", "clean")
    assert drawn_steps(["0000", "0010", "0001"]) == ("0010",)
    assert drawn_steps(["single", "single"]) == ("single",)
    assert drawn_steps([]) == ()
