"""The section "Decoding": every drawn point and every number of its tables is one of the experiments' tables, on page and paper."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path

import polars as pl
import pytest
from decoded import ABOUT, LABELS, ODD, make_experiments
from PIL import Image

from unisonde.report import grid_html, grid_print, write_report
from unisonde.report.decoding import grids
from unisonde.report.decoding_html import section
from unisonde.report.grid import Axes, Grid, Series
from unisonde.study.decoding.results import Results

OTHERS = ("probes", "ablate", "bound", "directions", "lora")


@pytest.fixture
def experiments(tmp_path: Path) -> Results:
    return Results.open(make_experiments(tmp_path / "decoded"))


def part(axes: Axes, name: str) -> list[tuple[float, float, float | None, float | None]]:
    """The points of a part, from all of its series: x, y, and the edges of their intervals."""
    found = []
    for series in axes.series:
        if series.part == name:
            edges = zip(series.low, series.high, strict=True) if series.low else [(None, None)] * len(series.x)
            found += [(x, y, *pair) for x, y, pair in zip(series.x, series.y, edges, strict=True)]
    return found


def rows(results: Results, name: str, **where: object) -> list[dict]:
    """Rows of a table, by a plain loop."""
    return [row for row in results.tables[name].to_dicts() if all(row[key] == value for key, value in where.items())]


def test_present_and_usable_are_those_of_the_table(experiments: Results) -> None:
    grid = grids(experiments, 1)["gmi"]
    assert [axes.title.split(" (")[0] for axes in grid.axes[:2]] == ["digit", "speaker"] and grid.shared
    for attribute, axes in zip(LABELS, grid.axes, strict=True):
        found = rows(experiments, "gmi", attribute=attribute)
        for name, column in (("present", "v_information"), ("usable", "gmi")):
            wanted = [(row["layer"], row[column], row[f"{column}_low"], row[f"{column}_high"]) for row in found]
            assert part(axes, name) == wanted and len(wanted) == 8
        [gap] = [series for series in axes.series if series.part == "gap"]
        assert (gap.low, gap.high) == (tuple(row["gmi"] for row in found), tuple(row["v_information"] for row in found))
        means = rows(experiments, "probes", attribute=attribute, stack="llm", pool="mean")
        assert part(axes, "held") == [(row["layer"], row["v_information"], row["v_low"], row["v_high"]) for row in means]
        assert {y for _, y, *_ in part(axes, "ceiling")} == {math.log2(LABELS[attribute])}
        assert (axes.x_label, axes.y_label) == ("layer of the decoder (0: embedding)", "information (bits)")
        assert axes.ticks is not None and axes.ticks[1][-1] == "final" and axes.rules == (6.5,)
    low, high = grid.y_range
    assert low < min(row["gmi_low"] for row in rows(experiments, "gmi")) and high > math.log2(10)


def test_without_probes_that_line_is_missing(tmp_path: Path) -> None:
    results = Results.open(make_experiments(tmp_path / "d", without=("probes", "ablate")))
    assert list(grids(results, 1)) == ["gmi", "directions", "bound", "lora"]
    assert not any(part(axes, "held") for axes in grids(results, 1)["gmi"].axes)


def test_probes_stand_in_the_order_of_the_model(experiments: Results) -> None:
    for attribute, axes in zip(LABELS, grids(experiments, 1)["probes"].axes, strict=True):
        means = rows(experiments, "probes", attribute=attribute, pool="mean")
        points = part(axes, "mean")
        assert [point[1:] for point in points] == [(row["v_information"], row["v_low"], row["v_high"]) for row in means]
        x = [point[0] for point in points]
        assert x == sorted(x) and len(set(x)) == 4 + 2 + 8
        last = rows(experiments, "probes", attribute=attribute, pool="last")
        assert [(point[0], point[1]) for point in part(axes, "last")] == [
            (x[6 + row["layer"]], row["v_information"]) for row in last
        ]
        assert [y for _, y, *_ in part(axes, "null")] == [row["null_v_information"] for row in means]
        assert axes.ticks is not None and [label.strip() for label in axes.ticks[1][:3]] == ["encoder", "adapter", "0"]
        # A rule between stacks is between their points.
        assert x[3] < axes.rules[0] < x[4] and x[5] < axes.rules[1] < x[6]
    assert "held out by take" in grids(experiments, 1)["probes"].axes[0].title


def test_shuffled_labels_leave_the_others_room(experiments: Results) -> None:
    """A probe that is far too sure of shuffled labels is drawn at the edge, with its own number beside it."""
    table = experiments.tables["probes"].with_columns(null_v_information=pl.lit(-5.0))
    grid = grids(replace(experiments, tables={**experiments.tables, "probes": table}), 1)["probes"]
    assert -1 < grid.y_range[0] < 0
    for axes in grid.axes:
        for null in (series for series in axes.series if series.part == "null"):
            assert set(null.y) == {-0.15 * math.log2(10)} and set(null.hover) == {"shuffled labels: −5.00 bits"}


def test_modes_and_their_share(experiments: Results) -> None:
    share, spectrum = grids(experiments, 1)["directions"].axes
    found = rows(experiments, "directions", mode=0)
    assert part(share, "share") == [
        (row["layer"], *(pytest.approx(100 * row[key]) for key in ("specific_share", "share_low", "share_high"))) for row in found
    ]
    for name, specific in (("specific", True), ("aligned", False)):
        some = rows(experiments, "directions", layer=0, specific=specific)
        assert [point[:2] for point in part(spectrum, name)] == [(row["mode"] + 1, row["variance"]) for row in some]
    assert [y for _, y, *_ in part(spectrum, "text")] == [row["text_variance"] for row in rows(experiments, "directions", layer=0)]
    assert share.y_label.endswith("(%)") and spectrum.log_y


def test_removals_and_what_they_change(experiments: Results) -> None:
    loss, accuracy = grids(experiments, 1)["ablate"].axes
    assert (loss.y_label, accuracy.y_label) == ("change of loss (nats a token)", "change of accuracy (percentage points)")
    for axes, column, unit in ((loss, "loss", 1.0), (accuracy, "accuracy", 100.0)):
        for centring in ("raw", "recentred"):
            given = [row for row in rows(experiments, "ablate", centring=centring) if row["condition"] != "random"]
            points = part(axes, centring)
            assert [round(point[0]) for point in points] == [0, 1, 2]
            keys = (f"{column}_change", f"{column}_low", f"{column}_high")
            assert [point[1:] for point in points] == [tuple(pytest.approx(unit * row[key]) for key in keys) for row in given]
            drawn = rows(experiments, "ablate", centring=centring, condition="random")
            points = part(axes, f"{centring} random")
            assert [(round(x), y) for x, y, *_ in points] == [(3, pytest.approx(unit * row[keys[0]])) for row in drawn]
            assert len(points) == 5 and points[0][2] is None


def test_products_against_losses(experiments: Results) -> None:
    against, distance = grids(experiments, 1)["bound"].axes
    found = rows(experiments, "bound")
    assert part(against, "lost") == [(row["product"], row["lost"], row["lost_low"], row["lost_high"]) for row in found]
    assert [y for _, y, *_ in part(distance, "w1")] == [row["w1"] for row in found]
    assert [y for _, y, *_ in part(distance, "w1 null")] == [row["w1_null"] for row in found]
    assert against.log_x and against.x_label == "sensitivity times W1 (bits)"


def test_what_learning_changes(experiments: Results) -> None:
    usable, present = grids(experiments, 1)["lora"].axes
    for axes, quantity in ((usable, "gmi"), (present, "v_information")):
        for trained in ("attribute", "control"):
            given = rows(experiments, "lora", trained=trained, quantity=quantity, seed=None)
            assert [point[1:] for point in part(axes, trained)] == [(row["change"], row["low"], row["high"]) for row in given]
            assert [round(point[0]) for point in part(axes, trained)] == [0, 1, 2]
            seeds = [row for row in rows(experiments, "lora", trained=trained, quantity=quantity) if row["seed"] is not None]
            assert [(round(x), y) for x, y, *_ in part(axes, f"{trained} seed")] == [
                (list(LABELS).index(row["read"]), row["change"]) for row in seeds
            ]
    assert usable.title == "speaker is learnt: usable" and usable.y_label == "change of information (bits)"


def test_page_and_paper_draw_the_same_grid(experiments: Results) -> None:
    for grid in grids(experiments, 1).values():
        fig = grid_html.figure(grid)
        drawn = grid_print.figure(grid).axes
        for place, axes in enumerate(grid.axes):
            for series in axes.series:
                traces = [t for t in fig.data if t.meta == {"part": series.part, "axes": place}]
                lines = [line for line in drawn[place].lines if tuple(line.get_xdata()) == series.x]
                if series.kind == "area":
                    assert [tuple(t.y) for t in traces] == [(*series.high, *series.low[::-1])]
                    continue
                assert (series.x, series.y) in [(tuple(t.x), tuple(t.y)) for t in traces]
                assert series.y in [tuple(line.get_ydata()) for line in lines]
                if series.low and series.kind == "line":
                    bands = [t for t in fig.data if t.meta == {"part": f"{series.part} interval", "axes": place}]
                    assert (*series.high, *series.low[::-1]) in [tuple(t.y) for t in bands]
                if series.low and series.kind == "points":
                    [bars] = [t.error_y for t in traces if tuple(t.x) == series.x]
                    assert [y + up for y, up in zip(series.y, bars.array, strict=True)] == pytest.approx(list(series.high))
                    assert [y - down for y, down in zip(series.y, bars.arrayminus, strict=True)] == pytest.approx(list(series.low))
            suffix = "" if place == 0 else str(place + 1)
            assert drawn[place].get_xlabel() == axes.x_label == fig.layout[f"xaxis{suffix}"].title.text
            first = place % grid.columns == 0 or not grid.shared
            assert drawn[place].get_ylabel() == (axes.y_label if first else "")
            assert fig.layout[f"yaxis{suffix}"].title.text == (axes.y_label if first else None)
        named = {series.name for axes in grid.axes for series in axes.series if series.name}
        assert sorted(t.name for t in fig.data if t.showlegend) == sorted(named)


def test_a_grid_without_intervals_or_points() -> None:
    """One layer, one point: ranges are not empty."""
    one = Axes("a", "x", "y", (Series("n", "p", look := _look(), (0.0,), (0.0,)),))
    grid = Grid("n", "t", "d", (one, Axes("b", "x", "y", (Series("n", "p", look, (), ()),))), columns=2, shared=True)
    assert one.x_range == (-0.5, 0.5) and grid.y_range[0] < 0 < grid.y_range[1]
    assert len(grid_html.figure(grid).data) == 2 and len(grid_print.figure(grid).axes) == 2


def _look():
    from unisonde.report.decoding_parts import PRESENT

    return PRESENT


def cells(html: str, heading: str) -> list[list[str]]:
    """The rows of the first table after a heading, as texts."""
    table = html.split(f"<h3>{heading}</h3>")[1].split("<table")[1].split("</table>")[0]
    return [
        [unescape(re.sub("<[^>]+>", "", cell)) for cell in re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in re.findall("<tr>(.*?)</tr>", table)
    ]


def test_tables_hold_the_numbers(experiments: Results) -> None:
    html = section(experiments, 1, None)
    for row, attribute in zip(cells(html, "Present against usable")[1:], LABELS, strict=True):
        [end] = rows(experiments, "gmi", attribute=attribute, layer=7)
        triple = [f"{end[f'gap{edge}']:.2f}" for edge in ("", "_low", "_high")]
        assert row[:3] == [attribute, str(LABELS[attribute]), "300"]
        assert row[5].replace("−", "-") == "{} ({} to {})".format(*triple) and row[-1] == f"{end['ceiling']:.2f}"
    found = cells(html, "What probes find along the model")[1:]
    assert [row[1] for row in found[:3]] == ["encoder's last layer", "adapter's output", "decoder's last layer"]
    [handed] = rows(experiments, "probes", attribute="digit", stack="adapter", layer=1)
    assert found[1][2].startswith(f"{handed['accuracy']:.2f} ({handed['accuracy_low']:.2f}") and found[1][6] == "92 %"
    [first, *_] = cells(html, "Modality-specific directions")[1:]
    assert first[:3] == ["0", "20", "7"]
    lost = cells(html, "What is lost without them")[1:]
    assert [row[1] for row in lost] == [
        "whole",
        *["specific", "aligned by count", "aligned by variance"] * 2,
        *["random, 5 draws"] * 2,
    ]
    assert lost[1][6] == "0.300 (0.260 to 0.360)" and lost[1][9] == "−30.0 (−35.0 to −27.0)" and lost[0][6] == "–"
    assert lost[7][6] == "−0.090 to 0.190"  # recentred
    learnt = cells(html, "Training the decoder to use it")[1:]
    assert ["speaker", "the attribute", "speaker", "usable (bits)", "0.20", "1.20", "1.00 (0.80 to 1.10)"] in learnt and len(
        learnt
    ) == 18
    bound = cells(html, "The bound of the paper")[1:]
    assert [row[-1] for row in bound] == ["yes"] * 3
    assert bound[0][1:3] == ["2.25", "0.25"] and bound[0][3].startswith("2.00 (")


def test_what_was_asked_is_said(experiments: Results) -> None:
    html = section(experiments, 1, None)
    assert html.count("300 items, seed 3, 5 folds, 12 s.") == 6
    assert html.index("Present against usable") < html.index("What probes find") < html.index("The bound of the paper")
    for name in ("gmi", "probes", "directions", "ablate", "bound", "lora"):
        assert unescape(html).count(f"<p>{name} says it of {ODD}.</p>") == len(experiments.findings(name))
    assert "unisonde decode gmi speech-smollm" in html


def test_texts_are_shown_and_not_obeyed(experiments: Results, tmp_path: Path) -> None:
    html = write_report([experiments.folder], tmp_path / "r.html", figures=False).read_text(encoding="utf-8")
    assert "<img src=x" not in html and "<i>made up" not in html and ODD in unescape(html)
    assert html.count('<script type="application/json"') == 6 and "<h1>What the decoder can use: speech-smollm &lt;i&gt;" in html


def test_runs_and_experiments_in_one_report(make: Callable, experiments: Results, tmp_path: Path) -> None:
    run = make(items=3, models=(("twin/a", 2),))
    second = make_experiments(tmp_path / "second", without=OTHERS)
    html = write_report([experiments.folder, run, second], tmp_path / "r.html").read_text(encoding="utf-8")
    assert [html.count(f'id="{key}"') for key in ("model-1", "decoding-1", "decoding-2")] == [1, 1, 1]
    assert html.index('id="model-1"') < html.index('id="decoding-1"') < html.index('id="decoding-2"')
    assert "Layer-wise entropy of 2 models" in html
    files = sorted(path.name for path in (tmp_path / "r_figures").iterdir() if "decoding" in path.name)
    assert len(files) == 2 * (6 + 1) and all(f'href="r_figures/{name}"' in html for name in files)
    for name in files:
        if name.endswith(".png"):
            with Image.open(tmp_path / "r_figures" / name) as image:
                assert image.width == 1400 and len(image.convert("RGB").getcolors(2**20) or []) > 10
        else:
            assert (tmp_path / "r_figures" / name).read_bytes().startswith(b"%PDF-")


def test_an_experiment_without_a_picture_of_its_own(tmp_path: Path) -> None:
    folder = make_experiments(tmp_path / "d", without=OTHERS)
    table = pl.DataFrame({"attribute": ["x"], "gain": [1.23456], "none": [None]})
    table.write_parquet(folder / "novel.parquet")
    (folder / "novel.json").write_text(
        (folder / "gmi.json").read_text().replace('"gmi"', '"novel"').replace("gmi says", "novel says")
    )
    html = section(Results.open(folder), 1, None)
    assert "<h3>novel</h3>" in html and cells(html, "novel") == [["attribute", "gain", "none"], ["x", "1.235", "–"]]


def test_folders_that_hold_neither(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run"):
        write_report([tmp_path], tmp_path / "r.html")
    with pytest.raises(ValueError, match="holds no experiments; make some with `unisonde decode`"):
        Results.open(tmp_path)
    folder = make_experiments(tmp_path / "d")
    (folder / "gmi.json").write_text("{")
    with pytest.raises(ValueError, match=r"gmi\.json is damaged"):
        write_report([folder], tmp_path / "r.html")
    assert ABOUT["items"] == 300
