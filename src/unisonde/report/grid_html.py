"""Grids as plotly figures."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING, Any

from unisonde.report.figures_html import FONT, GREY, faint
from unisonde.report.grid import Axes, Grid, Series

if TYPE_CHECKING:
    import plotly.graph_objects as go

ROW = 330
"""Pixels of a row of small figures."""
HEAD = 90
"""Pixels of legend and margins."""


def height_of(grid: Grid) -> int:
    """Of a figure, in pixels."""
    return HEAD + ROW * grid.rows


def figure(grid: Grid) -> go.Figure:
    """A grid as a plotly figure.

    Traces carry in `meta` what they are: `{"part", "axes"}`, the second the number of the small figure; a band of a series has the part
    `PART interval`. All values are plain lists, as given, not rounded.
    """
    import plotly.graph_objects as go

    fig = go.Figure(layout={"template": go.layout.Template()})
    fig.update_layout(
        height=height_of(grid),
        font={"family": FONT, "size": 13},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 64, "r": 16, "t": 64, "b": 56},
        hovermode=grid.hovered,
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "rgba(128, 128, 128, 0.6)", "activecolor": "rgba(128, 128, 128, 1)"},
        hoverlabel={"font": {"family": FONT, "size": 12}, "namelength": -1},
        legend={"orientation": "h", "x": 0, "y": 1 + 28 / (ROW * grid.rows), "yanchor": "bottom", "font": {"size": 13}},
    )
    named: set[str] = set()
    order = list(dict.fromkeys(series.name for axes in grid.axes for series in axes.series))
    for place, axes in enumerate(grid.axes):
        suffix = "" if place == 0 else str(place + 1)
        _place(fig, grid, axes, place, suffix)
        # Bands first, so that no band hides a line.
        for series in axes.series:
            if series.low and series.kind in ("line", "area"):
                fig.add_trace(_band(series, place, suffix, named, order.index(series.name)))
        size = 4 if axes.crowded else 7
        for series in axes.series:
            if series.kind != "area":
                fig.add_trace(_points(series, place, suffix, named, order.index(series.name), size))
    return fig


def _place(fig: go.Figure, grid: Grid, axes: Axes, place: int, suffix: str) -> None:
    """Where the axes are, what they say, and the lines that are not data."""
    row, column = divmod(place, grid.columns)
    width, gap = 1 / grid.columns, 0.05 if grid.columns > 2 else 0.09
    left = column * width + (gap / 2 if column else 0)
    right = (column + 1) * width - (gap / 2 if column < grid.columns - 1 else 0)
    above = 1 - row / grid.rows
    below = 1 - (row + 1) / grid.rows + (0.22 / grid.rows if row < grid.rows - 1 else 0)
    top = above - 0.08 / grid.rows
    line = {"showgrid": True, "gridcolor": GREY, "zeroline": False, "automargin": True, "ticks": "outside", "ticklen": 4}
    x: dict[str, Any] = {
        **line,
        "title": {"text": _shown(axes.x_label), "standoff": 6, "font": {"size": 13}},
        "showgrid": axes.log_x,
        "tickangle": 0,
    }
    x |= {"domain": [left, right], "anchor": f"y{suffix}", "spikethickness": 1, "spikecolor": "rgba(128, 128, 128, 0.8)"}
    x["range"] = list(axes.x_range)
    if axes.hover_title:
        x["unifiedhovertitle"] = {"text": axes.hover_title}
    if axes.ticks is not None:
        x |= {"tickvals": list(axes.ticks[0]), "ticktext": [_shown(label) for label in axes.ticks[1]]}
    if axes.log_x:
        x |= {"type": "log", "range": [math.log10(edge) for edge in axes.x_range], "exponentformat": "power", "dtick": 1}
    y: dict[str, Any] = {**line, "domain": [below, top], "anchor": f"x{suffix}"}
    if not (grid.shared and column):
        y["title"] = {"text": _shown(axes.y_label), "standoff": 6, "font": {"size": 13}}
    if axes.log_y:
        y |= {"type": "log", "exponentformat": "power", "dtick": 1}
    elif grid.shared:
        y["range"] = list(grid.y_range)
    fig.update_layout({f"xaxis{suffix}": x, f"yaxis{suffix}": y})
    where = {"xref": f"x{suffix} domain", "yref": f"y{suffix} domain"}
    fig.add_annotation(
        text=f"<b>{_shown(axes.title)}</b>", x=0, y=1, yshift=6, xanchor="left", yanchor="bottom", showarrow=False, **where
    )
    thin = {"color": GREY, "width": 1}
    for rule in axes.rules:
        fig.add_shape(type="line", xref=f"x{suffix}", yref=where["yref"], x0=rule, x1=rule, y0=0, y1=1, line=thin)
    if axes.zero:
        line = {"color": "rgba(128, 128, 128, 0.8)", "width": 1}
        fig.add_shape(type="line", xref=where["xref"], yref=f"y{suffix}", x0=0, x1=1, y0=0, y1=0, line=line)


def _points(series: Series, place: int, suffix: str, named: set[str], rank: int, size: int) -> Any:
    options: dict[str, Any] = {"mode": {"line": "lines+markers", "points": "markers", "rule": "lines"}[series.kind]}
    if series.kind != "rule":
        symbol = series.look.symbol + ("-open" if series.dashed else "")
        options["marker"] = {"color": series.look.colour, "symbol": symbol, "size": size}
    if series.kind != "points":
        dash = "dot" if series.kind == "rule" else "dash" if series.dashed else "solid"
        options["line"] = {"color": series.look.colour, "width": 1.8 if series.kind == "rule" else 2, "dash": dash}
    if series.kind == "points" and series.low:
        options["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": [high - y for y, high in zip(series.y, series.high, strict=True)],
            "arrayminus": [y - low for y, low in zip(series.y, series.low, strict=True)],
            "thickness": 1.2,
            "width": 3,
            "color": series.look.colour,
        }
    if series.labels:
        options |= {"mode": options["mode"] + "+text", "text": [_shown(label) for label in series.labels]}
        options |= {"textposition": "middle right"}
    if series.hover:
        options |= {"customdata": [_shown(text) for text in series.hover], "hovertemplate": "%{customdata}<extra></extra>"}
    else:
        options["hoverinfo"] = "skip"
    return _scatter(series, series.part, place, suffix, named, rank, x=list(series.x), y=list(series.y), **options)


def _band(series: Series, place: int, suffix: str, named: set[str], rank: int) -> Any:
    return _scatter(
        series,
        series.part if series.kind == "area" else f"{series.part} interval",
        place,
        suffix,
        named if series.kind == "area" else None,
        rank,
        x=[*series.x, *series.x[::-1]],
        y=[*series.high, *series.low[::-1]],
        mode="lines",
        line={"width": 0, "color": series.look.colour},
        fill="toself",
        fillcolor=faint(series.look.colour),
        hoverinfo="skip",
    )


def _scatter(series: Series, part: str, place: int, suffix: str, named: set[str] | None, rank: int, **options: Any) -> Any:
    """A trace; the first of a name has the legend's entry."""
    import plotly.graph_objects as go

    shown = named is not None and bool(series.name) and series.name not in named
    if named is not None:
        named.add(series.name)
    return go.Scatter(
        name=_shown(series.name),
        legendgroup=_shown(series.name) or None,
        legendrank=1000 + rank,
        showlegend=shown,
        meta={"part": part, "axes": place},
        xaxis=f"x{suffix}",
        yaxis=f"y{suffix}",
        connectgaps=False,
        **options,
    )


def _shown(text: str) -> str:
    """A text as plotly shows it as it is: it knows `&lt;`, `&gt;` and `&amp;`, and no other name of a character."""
    return escape(text, quote=False).replace("\n", "<br>")
