"""The report in a real browser: what is drawn equals `measurements()`, axes have units, no script fails, no prompt runs.

The figures' data are read back out of the page after plotly has drawn it, and compared with means taken here by plain loops.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

import pytest
from chromium import opened
from synthetic import HOSTILE, make_run

from unisonde.report import write_report
from unisonde.report.curves import look
from unisonde.runs import Run

pytestmark = pytest.mark.slow

MODELS = (("twin/janus-pro", 4), ("twin/harmon", 3))
FIGURES = [(model, quantity) for model, _ in MODELS for quantity in ("entropy", "conditional_entropy")]
CELLS = {"text → text": ("text", "text"), "text → image": ("text", "image"), "image → text": ("image", "text")}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("runs") / "first", models=MODELS, items=7)


@pytest.fixture(scope="module")
def browser(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The browser with the report open and its figures drawn."""
    report = write_report([run], tmp_path_factory.mktemp("report") / "report.html", figures=False)
    with opened(report, tmp_path_factory.mktemp("profile"), len(FIGURES)) as driver:
        yield driver


def values(run: Run, model: str, quantity: str, cell: str, column: str = "value") -> dict[int, list[float]]:
    """The finite values of one curve by layer, by a plain loop over the rows."""
    modality, task = CELLS[cell]
    found: dict[int, list[float]] = {}
    for row in run.measurements().to_dicts():
        if (row["model"], row["quantity"], row["modality"], row["task"]) != (model, quantity, modality, task):
            continue
        if "question" in row["flags"].split(",") or not math.isfinite(row["value"]):
            continue
        found.setdefault(row["layer"], []).append(row[column])
    return found


def traces(browser: Any, figure: int) -> list[dict[str, Any]]:
    script = """return Array.from(document.querySelectorAll('.js-plotly-plot')[arguments[0]].data).map(t => ({
        meta: t.meta, x: Array.from(t.x), y: Array.from(t.y), colour: t.line && t.line.color, dash: t.line && t.line.dash,
        error: t.error_y && t.error_y.array, hover: t.customdata || null }))"""
    return browser.execute_script(script, figure)


def points(browser: Any, figure: int, cell: str, *parts: str) -> dict[int, float]:
    drawn: dict[int, float] = {}
    for trace in traces(browser, figure):
        if trace["meta"]["cell"] == cell and trace["meta"]["part"] in parts:
            assert trace["colour"] == look(cell).colour
            for x, y in zip(trace["x"], trace["y"], strict=True):
                if x is not None and x == int(x):
                    drawn[int(x)] = y
    return drawn


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("figure", range(len(FIGURES)))
def test_points_equal_the_measurements(browser: Any, run: Run, figure: int, cell: str) -> None:
    model, quantity = FIGURES[figure]
    found = values(run, model, quantity, cell)
    ceilings = values(run, model, quantity, cell, "ceiling")
    assert set(found) == set(range(dict(MODELS)[model] + 2))
    assert {len(items) for items in found.values()} == {5, 6}  # one of seven failed, one is not finite at one layer
    means = {layer: statistics.fmean(items) for layer, items in found.items()}
    tops = {layer: statistics.fmean(items) for layer, items in ceilings.items()}
    assert points(browser, figure, cell, "mean", "final") == pytest.approx(means, rel=1e-12)
    assert points(browser, figure, cell, "ceiling") == pytest.approx(tops, rel=1e-12)
    shares = {layer: 100 * means[layer] / tops[layer] for layer in means}
    assert points(browser, figure, cell, "share", "share final") == pytest.approx(shares, rel=1e-12)


@pytest.mark.parametrize("figure", range(len(FIGURES)))
def test_spread_is_the_standard_deviation(browser: Any, run: Run, figure: int) -> None:
    model, quantity = FIGURES[figure]
    for cell in CELLS:
        found = values(run, model, quantity, cell)
        final = max(found)
        parts = {trace["meta"]["part"]: trace for trace in traces(browser, figure) if trace["meta"]["cell"] == cell}
        band = parts["spread"]
        half = len(band["x"]) // 2
        upper = dict(zip(band["x"][:half], band["y"][:half], strict=True))
        lower = dict(zip(band["x"][half:], band["y"][half:], strict=True))
        for layer in range(final):
            mean, sd = statistics.fmean(found[layer]), statistics.stdev(found[layer])
            assert (lower[layer], upper[layer]) == pytest.approx((mean - sd, mean + sd), rel=1e-10)
        assert parts["final"]["error"] == pytest.approx([statistics.stdev(found[final])], rel=1e-10)
        assert parts["ceiling"]["dash"] == "dot"


def test_hover_says_items_and_tokens(browser: Any, run: Run) -> None:
    hover = next(trace["hover"] for trace in traces(browser, 1) if trace["meta"] == meta("mean", "text → image"))
    found = values(run, MODELS[0][0], "conditional_entropy", "text → image")
    tokens = values(run, MODELS[0][0], "conditional_entropy", "text → image", "n_prompt")
    assert hover[0][0].replace("−", "-").startswith(f"{statistics.fmean(found[0]):.3f} ± {statistics.stdev(found[0]):.2f}")
    assert hover[0][4] == f"6 items, {statistics.fmean(tokens[0]):.1f} prompt + 64.0 response tokens"


def meta(part: str, cell: str) -> dict[str, str]:
    return {"part": part, "cell": cell, "step": "final" if cell == "text → image" else "single"}


def test_axes_are_labelled_with_units(browser: Any) -> None:
    script = """return Array.from(document.querySelectorAll('.js-plotly-plot')).map(
        plot => Array.from(plot.querySelectorAll(arguments[0])).map(text => text.textContent))"""
    for (_, quantity), titles in zip(FIGURES, browser.execute_script(script, ".xtitle, .ytitle, .x2title, .y2title"), strict=True):
        label = "prompt entropy (bits)" if quantity == "entropy" else "conditional entropy (bits)"
        assert sorted(titles) == sorted(["layer (0: embedding)", label, "layer (0: embedding)", "share of ceiling (%)"])
    assert browser.execute_script(script, ".xtick text")[0] == ["0", "1", "2", "3", "4", "final"]


def test_negative_means_are_inside_the_axis(browser: Any) -> None:
    low, high = browser.execute_script("return document.querySelectorAll('.js-plotly-plot')[1]._fullLayout.yaxis.range")
    drawn = [y for cell in CELLS for y in points(browser, 1, cell, "mean", "final", "ceiling").values()]
    assert low < min(drawn) < 0 < max(drawn) < high


def test_no_prompt_runs(browser: Any) -> None:
    assert browser.execute_script("return typeof window.hacked") == "undefined"
    assert HOSTILE in browser.execute_script("return document.body.innerText")
    assert browser.execute_script("return document.querySelectorAll('img[onerror], [onload], blockquote *').length") == 0


def test_pictures_are_shown_with_hard_pixels(browser: Any) -> None:
    script = """return Array.from(document.querySelectorAll('img')).map(
        i => [i.complete && i.naturalWidth, getComputedStyle(i).imageRendering, i.src.slice(0, 5)])"""
    shown = browser.execute_script(script)
    assert len(shown) > 4
    assert all(one == [32, "pixelated", "data:"] for one in shown)


def test_no_button_sends_data_anywhere_and_saving_works(browser: Any) -> None:
    titles = browser.execute_script("return Array.from(document.querySelectorAll('.modebar-btn')).map(b => b.dataset.title)")
    assert titles
    assert not [title for title in titles if "loud" in title or "hare" in title]
    saved = browser.execute_async_script(
        "const done = arguments[0], plot = document.querySelector('.js-plotly-plot');"
        "Plotly.toImage(plot, {format: 'png'}).then(done, e => done(String(e)))"
    )
    assert saved.startswith("data:image/png;base64,")


def test_nothing_is_cut_or_wider_than_the_page(browser: Any) -> None:
    assert browser.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    wide = "return Array.from(document.querySelectorAll('.table')).filter(t => t.scrollWidth > t.clientWidth).length"
    assert browser.execute_script(wide) == 0


def test_the_policy_forbids_the_network(browser: Any) -> None:
    outcome = browser.execute_async_script(
        "const done = arguments[0]; fetch('http://127.0.0.1:9/').then(() => done('fetched'), e => done(String(e)));"
    )
    assert outcome != "fetched"
    messages = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    # The attempt above is refused by the page's own rules, and is the only thing that went wrong while the page was open.
    assert messages, "the page's rules refused nothing"
    assert all("127.0.0.1:9" in message for message in messages), messages
