"""Grids on paper: PDF and PNG, drawn with matplotlib in the same colours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from unisonde.report.figures_print import STYLE, write
from unisonde.report.grid import Axes, Grid, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Drawn
    from matplotlib.figure import Figure

WIDTH = 7.0
"""Inches: a text of two columns."""


def figure(grid: Grid) -> Figure:
    """A grid as a matplotlib figure, 7 inches wide."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(WIDTH, 0.6 + 2.4 * grid.rows), layout="constrained")
        drawn = fig.subplots(grid.rows, grid.columns, squeeze=False, sharey=grid.shared).flatten()
        entries: dict[str, Any] = {}
        for place, (axes, one) in enumerate(zip(grid.axes, drawn, strict=False)):
            for series in axes.series:
                handle = _draw(one, series, 2.0 if axes.crowded else 3.5)
                if series.name:
                    entries.setdefault(series.name, handle)
            _finish(one, axes, first=place % grid.columns == 0 or not grid.shared)
            if grid.shared:
                one.set_ylim(*grid.y_range)
        for one in drawn[len(grid.axes) :]:
            one.set_visible(False)
        fig.suptitle(_plain(grid.title), fontsize=9, x=0.01, ha="left", wrap=True)
        if entries:
            columns = min(len(entries), 3)
            fig.legend(entries.values(), map(_plain, entries), loc="outside lower center", ncols=columns, fontsize=8)
    return fig


def save(grid: Grid, folder: Path) -> list[Path]:
    """A grid as PDF and PNG in `folder`, which is made if it is missing."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return write(figure(grid), folder, grid.name)


def _draw(axes: Drawn, series: Series, size: float) -> Any:
    colour = series.look.colour
    if series.kind == "area":
        return axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.15, linewidth=0)
    if series.kind == "rule":
        return axes.plot(series.x, series.y, color=colour, linestyle=":", linewidth=1.2)[0]
    mark: dict[str, Any] = {"color": colour, "marker": series.look.marker, "markersize": size}
    if series.dashed:
        mark["markerfacecolor"] = "white"
    if series.kind == "points":
        [line] = axes.plot(series.x, series.y, linestyle="none", **mark)
        if series.low:
            axes.vlines(series.x, series.low, series.high, color=colour, linewidth=0.9)
    else:
        if series.low:
            axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.15, linewidth=0)
        [line] = axes.plot(series.x, series.y, linestyle="--" if series.dashed else "-", linewidth=1.4, **mark)
    for x, y, label in zip(series.x, series.y, series.labels, strict=False):
        axes.annotate(_plain(label), (x, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=7)
    return line


def _finish(drawn: Drawn, axes: Axes, first: bool) -> None:
    drawn.set_title(_plain(axes.title), loc="left", fontsize=8)
    drawn.set_xlabel(axes.x_label, fontsize=7.5)
    if first:
        drawn.set_ylabel(axes.y_label, fontsize=7.5)
    if axes.log_x:
        drawn.set_xscale("log")
    if axes.log_y:
        drawn.set_yscale("log")
    if axes.ticks is not None:
        drawn.set_xticks(list(axes.ticks[0]), [_plain(label) for label in axes.ticks[1]])
    drawn.tick_params(labelsize=7)
    drawn.set_xlim(*axes.x_range)
    drawn.grid(axis="y", color="0.9", linewidth=0.6)
    drawn.set_axisbelow(True)
    for rule in axes.rules:
        drawn.axvline(rule, color="0.85", linewidth=0.8)
    if axes.zero:
        drawn.axhline(0.0, color="0.6", linewidth=0.8)


def _plain(text: str) -> str:
    """A dollar sign in a name is not mathematics."""
    return text.replace("$", r"\$")
