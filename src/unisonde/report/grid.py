"""A grid of small figures, before anything is drawn: series of points with intervals on axes with labels and units.

The page (`grid_html`) and paper (`grid_print`) draw the same grid, so that they cannot disagree. What a grid of numbers means is said
where it is made (`decoding`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unisonde.report.curves import CROWDED, Look

Kind = Literal["line", "points", "rule", "area"]


@dataclass(frozen=True)
class Series:
    """Points of one kind.

    Attributes:
        name: in the legend; empty for none.
        part: what it is, for whoever reads the figure by machine: `present`, `usable`, ...
        x, y: the points; `area` needs no y.
        low, high: an interval of each point: a band about a `line`, bars on `points`, the edges of an `area`.
        hover: what is said of each point beside its value.
        kind: joined by a line; alone; a dotted line without marks; a filled area.
        labels: words beside the marks.
        dashed: the line is dashed and the marks are open.
    """

    name: str
    part: str
    look: Look
    x: tuple[float, ...]
    y: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    hover: tuple[str, ...] = ()
    kind: Kind = "line"
    labels: tuple[str, ...] = ()
    dashed: bool = False


@dataclass(frozen=True)
class Axes:
    """One small figure.

    Attributes:
        title: over it.
        x_label, y_label: with units.
        ticks: where the x axis has ticks, and what they say; None if that is left to whoever draws.
        rules: x of thin vertical lines, which part what does not belong together.
        zero: whether there is a line at y = 0.
        log_x, log_y: logarithmic axes.
        hover_title: over what is said of all series at one x, `%{x}` standing for it.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    ticks: tuple[tuple[float, ...], tuple[str, ...]] | None = None
    rules: tuple[float, ...] = ()
    zero: bool = False
    log_x: bool = False
    log_y: bool = False
    hover_title: str = ""

    @property
    def crowded(self) -> bool:
        """Whether there are so many points that their marks are small."""
        return max((len(series.x) for series in self.series), default=0) > CROWDED

    @property
    def x_range(self) -> tuple[float, float]:
        """Half a step beyond the points at either side; of a logarithmic axis, half an order of magnitude."""
        held = [x for series in self.series for x in series.x]
        low, high = (min(held), max(held)) if held else (0.0, 1.0)
        return (low / 3, high * 3) if self.log_x else (low - 0.5, high + 0.5)


@dataclass(frozen=True)
class Grid:
    """Small figures side by side, with one legend.

    Attributes:
        name: of its files, without a suffix.
        title: over it on paper.
        described: what it shows, in a sentence, for those who cannot see it.
        columns: figures in a row.
        shared: whether all have one y axis, so that heights compare.
    """

    name: str
    title: str
    described: str
    axes: tuple[Axes, ...]
    columns: int = 3
    shared: bool = False
    hovered: Literal["x unified", "closest"] = "closest"

    @property
    def rows(self) -> int:
        return -(-len(self.axes) // self.columns)

    @property
    def y_range(self) -> tuple[float, float]:
        """What holds all points and intervals, with a little room."""
        held = [y for axes in self.axes for series in axes.series for y in (*series.y, *series.low, *series.high)]
        low, high = (min(held), max(held)) if held else (0.0, 1.0)
        room = 0.04 * ((high - low) or 1.0)
        return low - room, high + room
