"""Figures on paper: the same points as `measurements()`, labelled, and real PDF and PNG files."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unisonde.report import write_report
from unisonde.report.curves import look, sections
from unisonde.report.figures_print import figure
from unisonde.runs import Run

Make = Callable[..., Run]


def test_points_are_those_of_the_measurements(make: Make) -> None:
    run = make(items=6, models=(("cost of $x^2 and $y", 3),))
    (section,) = sections([run])
    for panel in section.panels():
        axes = figure(section, panel).axes
        words = {"entropy": "prompt entropy (bits)", "conditional_entropy": "conditional entropy (bits)"}
        assert axes[0].get_ylabel() == words[panel.quantity]
        assert axes[1].get_ylabel() == "share of ceiling (%)"
        assert all(one.get_xlabel() == "layer (0: embedding)" for one in axes)
        for modality, task in (("text", "text"), ("text", "image"), ("image", "text")):
            values: dict[int, list[float]] = {}
            for row in run.measurements().to_dicts():
                mine = (row["quantity"], row["modality"], row["task"]) == (panel.quantity, modality, task)
                if mine and "question" not in row["flags"] and np.isfinite(row["value"]):
                    values.setdefault(row["layer"], []).append(row["value"])
            line = next(line for line in axes[0].lines if line.get_label() == f"{modality} → {task}")
            assert line.get_color() == look(f"{modality} → {task}").colour
            drawn = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
            assert drawn.keys() == set(range(4))  # 0..3; `final` is a point of its own
            for layer, y in drawn.items():
                assert y == pytest.approx(statistics.fmean(values[layer]), rel=1e-12)


def test_the_axis_holds_negative_values(make: Make) -> None:
    (section,) = sections([make(items=6, models=(("twin/a", 3),))])
    panel = section.panels()[1]
    assert min(point["mean"] for curve in panel.curves for point in curve.points) < 0
    bottom, _ = figure(section, panel).axes[0].get_ylim()
    assert bottom < min(point["mean"] - point["sd"] for curve in panel.curves for point in curve.points)


def test_files(make: Make, tmp_path: Path) -> None:
    run = make(items=3, models=(("twin/a", 2),), stacks=("mllm", "dit"))
    write_report([run], tmp_path / "report.html")
    folder = tmp_path / "report_figures"
    names = sorted(path.name for path in folder.iterdir())
    stems = [f"1-twin-a-{quantity}-{stack}" for quantity in ("conditional-entropy", "entropy") for stack in ("dit", "mllm")]
    assert names == sorted(stem + suffix for stem in stems for suffix in (".pdf", ".png"))
    for name in names:
        if name.endswith(".pdf"):
            assert (folder / name).read_bytes().startswith(b"%PDF-")
        else:
            with Image.open(folder / name) as image:
                assert image.size == (1400, 620)
                assert len(image.convert("RGB").getcolors(2**20) or []) > 10
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(f'href="report_figures/{name}"' in html for name in names)
