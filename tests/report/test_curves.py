"""What the figures show: sections, panels, looks, ticks, and numbers as people read them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from unisonde.report.curves import look, number, percent, sections, ticks
from unisonde.runs import Run

Make = Callable[..., Run]


def test_a_section_a_model_and_a_panel_a_quantity(make: Make) -> None:
    found = sections([make("first", items=6), make("second", items=6, models=(("twin/janus-pro", 4),), protocol="fixed-bandwidth")])
    assert [section.name for section in found] == ["twin/janus-pro", "twin/harmon", "twin/janus-pro"]
    assert len({section.slug for section in found}) == 3
    assert found[0].protocol != found[2].protocol
    assert found[2].identity["protocol"]["digest"] in found[2].protocol
    for section in found:
        prompt, response = section.panels()
        assert (prompt.quantity, response.quantity) == ("entropy", "conditional_entropy")
        assert [curve.name for curve in prompt.curves] == ["text → text", "text → image", "image → text"]
        assert prompt.final == section.layers("llm")[-1]
        # Of six items in a cell the fifth failed.
        assert all(point["n_items"] <= 5 for curve in prompt.curves for point in curve.points)


def test_a_panel_counts_what_it_draws(make: Make) -> None:
    (section,) = sections([make(items=6, models=(("twin/a", 3),))])
    prompt, response = section.panels()
    # 5 layers (0..3 and final), 5 items in each of 3 cells; item 2 of each cell is short, item 5 is not finite at layer 2.
    assert (prompt.n_rows, prompt.n_short, prompt.n_left_out, prompt.questions) == (75, 15, 3, 5)
    assert (response.n_rows, response.questions) == (75, 0)


def test_numbered_steps_are_counted_and_others_named(make: Make) -> None:
    (section,) = sections([make(items=3, models=(("twin/a", 3),), steps=("0000", "0001", "clean", "final"))])
    response = section.panels()[1]
    names = [(curve.name, curve.dashed) for curve in response.curves if curve.cell == "text → image"]
    assert names == [("text → image, step final", False), ("text → image, step clean", True)]
    assert response.skipped == 2


def test_only_the_cells_that_are_there(make: Make) -> None:
    (section,) = sections([make(items=3, models=(("hf:some/text-model", 3),), cells=(("text", "text"),))])
    assert [[curve.name for curve in panel.curves] for panel in section.panels()] == [["text → text"], ["text → text"]]


def test_looks_are_constant_and_differ() -> None:
    cells = ("text → text", "text → image", "image → text", "image → image")
    looks = [look(cell) for cell in cells]
    assert len({one.colour for one in looks}) == len({one.symbol for one in looks}) == len({one.marker for one in looks}) == 4
    assert look("image → image") == looks[3]


@pytest.mark.parametrize("last", [1, 2, 9, 14, 25, 41, 81])
def test_ticks(last: int) -> None:
    places, labels = ticks(range(last + 1), last)
    assert (places[0], labels[-1], places[-1]) == (0, "final", last)
    assert len(places) <= 15
    assert all(label == str(place) for place, label in zip(places[:-1], labels[:-1], strict=True))
    gaps = [b - a for a, b in pairwise(places)]
    assert min(gaps) >= gaps[0] or gaps[0] == 1
    assert ticks([0, 1, 2], None) == ([0, 1, 2], ["0", "1", "2"])


def test_numbers_for_people() -> None:
    assert [number(x) for x in (None, 1.005, -0.001, -1.25, 0.0)] == ["–", "1.00", "0.00", "−1.25", "0.00"]
    assert [percent(x) for x in (None, 0.5, -0.004, -0.25, 1.204)] == ["–", "50 %", "0 %", "−25 %", "120 %"]
