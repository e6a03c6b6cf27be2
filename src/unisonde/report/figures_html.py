"""Figures of the page: panels as plotly figures, and as JSON that is safe inside HTML.

A figure has two parts side by side: the value with its ceiling, and the value as a share of the ceiling. The state after the last
norm (`final`) stands apart from the residual stream, joined to it by no line.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from unisonde.report.curves import CROWDED, Curve, Panel, number, percent, ticks

if TYPE_CHECKING:
    import plotly.graph_objects as go

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
LAYER_AXIS = "layer (0: embedding)"
SHARE_AXIS = "share of ceiling (%)"
GREY = "rgba(128, 128, 128, 0.25)"


def figure(panel: Panel) -> go.Figure:
    """A panel as a plotly figure.

    Traces carry in `meta` what they are: `{"part": "mean" | "final" | "ceiling" | "spread" | "share" | "share final", "cell",
    "step"}`. All values are plain lists, as stored, not rounded.
    """
    import plotly.graph_objects as go

    traces: list[Any] = []
    for curve in panel.curves:
        stream = [point for point in curve.points if point["layer"] != panel.final]
        final = [point for point in curve.points if point["layer"] == panel.final]
        # Bands first, so that no band hides a line.
        traces += [_band(curve, stream), _ceiling(curve, stream, final)]
        traces += [_mean(panel, curve, stream), _final(panel, curve, final), *_shares(curve, stream, final)]
    traces = [trace for trace in traces if trace is not None]
    # A figure without a template carries none of plotly's several kilobytes of defaults.
    fig = go.Figure(layout={"template": go.layout.Template()})
    fig.add_traces(sorted(traces, key=lambda trace: trace.meta["part"] != "spread"))
    axis = {"showgrid": True, "gridcolor": GREY, "zeroline": False, "automargin": True, "ticks": "outside", "ticklen": 4}
    layers = {**axis, "title": {"text": LAYER_AXIS}, "showgrid": False, "tickangle": 0, "unifiedhovertitle": {"text": "layer %{x}"}}
    layers |= {"spikethickness": 1, "spikecolor": "rgba(128, 128, 128, 0.8)"}
    edges = [panel.layers[0] - 0.5, panel.layers[-1] + 0.5]
    fig.update_layout(
        height=430,
        font={"family": FONT, "size": 13},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 64, "r": 16, "t": 48, "b": 56},
        hovermode="x unified",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "rgba(128, 128, 128, 0.6)", "activecolor": "rgba(128, 128, 128, 1)"},
        hoverlabel={"font": {"family": FONT, "size": 12}},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "tracegroupgap": 0, "font": {"size": 13}},
        xaxis={**layers, **_ticks(panel, 14), "domain": [0.0, 0.62], "range": edges, "anchor": "y"},
        xaxis2={**layers, **_ticks(panel, 7), "domain": [0.71, 1.0], "range": edges, "anchor": "y2"},
        yaxis={**axis, "title": {"text": f"{panel.label.lower()} ({escape(panel.units)})"}, "anchor": "x"},
        yaxis2={**axis, "title": {"text": SHARE_AXIS}, "anchor": "x2"},
    )
    _rule_zero(fig, panel)
    if panel.final is not None and panel.final in panel.layers:
        for column in ("", "2"):
            fig.add_shape(
                type="line",
                xref=f"x{column}",
                yref=f"y{column} domain",
                x0=panel.final - 0.5,
                x1=panel.final - 0.5,
                y0=0,
                y1=1,
                line={"color": GREY, "width": 1},
            )
    return fig


def safe_json(fig: go.Figure) -> str:
    """The figure as JSON that may stand inside a `<script>` element: no text in it can end the element or begin another."""
    text = fig.to_json()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _ticks(panel: Panel, most: int) -> dict[str, Any]:
    places, labels = ticks(panel.layers, panel.final, most)
    return {"tickvals": places, "ticktext": labels}


def _mean(panel: Panel, curve: Curve, points: list[dict[str, Any]]) -> Any:
    return _values(panel, curve, points, "mean", mode="lines+markers", showlegend=True)


def _final(panel: Panel, curve: Curve, points: list[dict[str, Any]]) -> Any:
    trace = _values(panel, curve, points, "final", mode="markers", showlegend=False)
    if trace is not None:
        trace.error_y = {"type": "data", "array": [point["sd"] or 0.0 for point in points], "thickness": 1.2, "width": 3}
        trace.marker.size = 9
    return trace


def _values(panel: Panel, curve: Curve, points: list[dict[str, Any]], part: str, **options: Any) -> Any:
    if not points:
        return None
    return _scatter(
        curve,
        part,
        x=[point["layer"] for point in points],
        y=[point["mean"] for point in points],
        customdata=[_hover(panel, point) for point in points],
        hovertemplate=(
            f"<b>{escape(curve.name)}</b> %{{customdata[0]}} of %{{customdata[1]}} {escape(panel.units)} (%{{customdata[2]}})"
            "<br>quartiles %{customdata[3]}; %{customdata[4]}<extra></extra>"
        ),
        line=_line(curve),
        **options,
    )


def _hover(panel: Panel, point: dict[str, Any]) -> list[str]:
    """What the hover says of a point: mean ± sd, ceiling, share, quartiles, items and tokens."""
    spread = "" if point["sd"] is None else f" ± {number(point['sd'])}"
    tokens = f"{number(point['n_prompt'], 1)} prompt"
    if panel.quantity != "entropy":
        tokens += f" + {number(point['n_response'], 1)} response"
    return [
        number(point["mean"], 3) + spread,
        number(point["ceiling"], 3),
        percent(point["share"]),
        f"{number(point['q1'])} | {number(point['median'])} | {number(point['q3'])}",
        f"{point['n_items']} items, {tokens} tokens",
    ]


def _ceiling(curve: Curve, stream: list[dict[str, Any]], final: list[dict[str, Any]]) -> Any:
    # A gap before `final`, as in the curve itself; a dotted line needs two points, so `final` gets a dash of its own.
    x: list[float | None] = [point["layer"] for point in stream]
    y: list[float | None] = [point["ceiling"] for point in stream]
    for point in final:
        x += [None, point["layer"] - 0.3, point["layer"], point["layer"] + 0.3]
        y += [None, point["ceiling"], point["ceiling"], point["ceiling"]]
    if all(value is None for value in y):
        return None
    line = {"color": curve.look.colour, "width": 1.8, "dash": "dot"}
    return _scatter(curve, "ceiling", x=x, y=y, mode="lines", line=line, hoverinfo="skip", showlegend=False)


def _band(curve: Curve, points: list[dict[str, Any]]) -> Any:
    spread = [point for point in points if point["sd"] is not None]
    if not spread:
        return None
    layers = [point["layer"] for point in spread]
    upper = [point["mean"] + point["sd"] for point in spread]
    lower = [point["mean"] - point["sd"] for point in spread]
    return _scatter(
        curve,
        "spread",
        x=layers + layers[::-1],
        y=upper + lower[::-1],
        mode="lines",
        line={"width": 0, "color": curve.look.colour},
        fill="toself",
        fillcolor=faint(curve.look.colour),
        hoverinfo="skip",
        showlegend=False,
    )


def _shares(curve: Curve, stream: list[dict[str, Any]], final: list[dict[str, Any]]) -> list[Any]:
    traces = []
    for part, points, mode in (("share", stream, "lines+markers"), ("share final", final, "markers")):
        points = [point for point in points if point["share"] is not None]
        if points:
            trace = _scatter(
                curve,
                part,
                x=[point["layer"] for point in points],
                y=[100 * point["share"] for point in points],
                mode=mode,
                line=_line(curve),
                hovertemplate=f"<b>{escape(curve.name)}</b> %{{y:.1f}} % of the ceiling<extra></extra>",
                showlegend=False,
                xaxis="x2",
                yaxis="y2",
            )
            trace.marker.size = 9 if part == "share final" else trace.marker.size - 1
            traces.append(trace)
    return traces


def _scatter(curve: Curve, part: str, **options: Any) -> Any:
    import plotly.graph_objects as go

    symbol = curve.look.symbol + ("-open" if curve.dashed else "")
    mark = None
    if "markers" in options["mode"]:
        mark = {"color": curve.look.colour, "symbol": symbol, "size": 7 if len(curve.points) <= CROWDED else 4}
    return go.Scatter(
        name=escape(curve.name),
        legendgroup=escape(curve.name),
        meta={"part": part, "cell": curve.cell, "step": curve.step},
        marker=mark,
        connectgaps=False,
        **options,
    )


def _line(curve: Curve) -> dict[str, Any]:
    return {"color": curve.look.colour, "width": 2, "dash": "dash" if curve.dashed else "solid"}


def _rule_zero(fig: go.Figure, panel: Panel) -> None:
    """A line at zero where values fall below it: a negative conditional entropy must not look like a small one."""
    lowest = min(point["mean"] - (point["sd"] or 0.0) for curve in panel.curves for point in curve.points)
    if lowest < 0:
        for column in ("", "2"):
            line = {"color": "rgba(128, 128, 128, 0.8)", "width": 1}
            fig.add_shape(type="line", xref=f"x{column} domain", yref=f"y{column}", x0=0, x1=1, y0=0, y1=0, line=line)


def faint(colour: str) -> str:
    """A colour, nearly transparent."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.15)"
