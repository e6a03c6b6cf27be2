"""The section "Decoding" in a real browser: what is drawn equals the experiments' tables, and nothing of them runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from chromium import opened
from decoded import LABELS, ODD, make_experiments

from unisonde.report import write_report
from unisonde.study.decoding.results import Results

pytestmark = pytest.mark.slow

FIGURES = ["gmi", "probes", "directions", "ablate", "bound", "lora"]


@pytest.fixture(scope="module")
def experiments(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results.open(make_experiments(tmp_path_factory.mktemp("runs") / "first"))


@pytest.fixture(scope="module")
def browser(experiments: Results, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    report = write_report([experiments.folder], tmp_path_factory.mktemp("report") / "report.html", figures=False)
    with opened(report, tmp_path_factory.mktemp("profile"), len(FIGURES)) as driver:
        yield driver


def points(browser: Any, figure: str, axes: int, part: str) -> list[list[float]]:
    script = """return Array.from(document.querySelectorAll('.js-plotly-plot')[arguments[0]].data)
        .filter(t => t.meta.axes == arguments[1] && t.meta.part == arguments[2])
        .flatMap(t => Array.from(t.x).map((x, k) => [x, t.y[k]]))"""
    return browser.execute_script(script, FIGURES.index(figure), axes, part)


def column(experiments: Results, table: str, name: str, **where: object) -> list[float]:
    return [row[name] for row in experiments.tables[table].to_dicts() if all(row[k] == v for k, v in where.items())]


@pytest.mark.parametrize("place", range(len(LABELS)))
def test_points_equal_the_tables(browser: Any, experiments: Results, place: int) -> None:
    attribute = list(LABELS)[place]
    present = column(experiments, "gmi", "v_information", attribute=attribute)
    usable = column(experiments, "gmi", "gmi", attribute=attribute)
    assert points(browser, "gmi", place, "present") == [[k, pytest.approx(y, rel=1e-12)] for k, y in enumerate(present)]
    assert points(browser, "gmi", place, "usable") == [[k, pytest.approx(y, rel=1e-12)] for k, y in enumerate(usable)]
    assert [y for _, y in points(browser, "gmi", place, "gap")] == pytest.approx([*present, *usable[::-1]], rel=1e-12)
    low, high = (column(experiments, "gmi", f"gmi_{edge}", attribute=attribute) for edge in ("low", "high"))
    assert [y for _, y in points(browser, "gmi", place, "usable interval")] == pytest.approx([*high, *low[::-1]], rel=1e-12)
    found = column(experiments, "probes", "v_information", attribute=attribute, pool="mean")
    assert [y for _, y in points(browser, "probes", place, "mean")] == pytest.approx(found, rel=1e-12)


def test_axes_are_labelled_and_compare(browser: Any) -> None:
    script = """return Array.from(document.querySelectorAll('.js-plotly-plot')).map(
        plot => Array.from(plot.querySelectorAll('text[class$=title]')).map(text => text.textContent).filter(text => text))"""
    titles = dict(zip(FIGURES, browser.execute_script(script), strict=True))
    assert sorted(titles["gmi"]) == ["information (bits)", *["layer of the decoder (0: embedding)"] * 3]
    assert "change of loss (nats a token)" in titles["ablate"] and "sensitivity times W1 (bits)" in titles["bound"]
    script = "return ['', '2', '3'].map(k => document.querySelectorAll('.js-plotly-plot')[0]._fullLayout['yaxis' + k].range)"
    assert len({tuple(edges) for edges in browser.execute_script(script)}) == 1


def test_hover_says_values_and_intervals(browser: Any, experiments: Results) -> None:
    script = """return document.querySelectorAll('.js-plotly-plot')[0].data
        .filter(t => t.meta.axes == 1 && t.meta.part == 'usable')[0].customdata[7]"""
    row = next(row for row in experiments.tables["gmi"].to_dicts() if (row["attribute"], row["layer"]) == ("speaker", 7))
    said = browser.execute_script(script).replace("−", "-")
    assert said.startswith(f"usable {row['gmi']:.2f} ({row['gmi_low']:.2f} to {row['gmi_high']:.2f}) bits")
    assert said.endswith(f"gap {row['gap']:.2f} ({row['gap_low']:.2f} to {row['gap_high']:.2f})")


def test_nothing_runs_and_nothing_is_cut(browser: Any) -> None:
    assert browser.execute_script("return typeof window.hacked") == "undefined"
    assert ODD in browser.execute_script("return document.body.innerText")
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0
    assert browser.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    wide = "return Array.from(document.querySelectorAll('.table')).filter(t => t.scrollWidth > t.clientWidth).length"
    assert browser.execute_script(wide) == 0
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_figures_can_be_saved(browser: Any) -> None:
    saved = browser.execute_async_script(
        "const done = arguments[0], plot = document.querySelector('.js-plotly-plot');"
        "Plotly.toImage(plot, {format: 'svg'}).then(done, e => done(String(e)))"
    )
    assert saved.startswith("data:image/svg+xml")
