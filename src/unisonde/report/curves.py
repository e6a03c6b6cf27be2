"""What a figure shows, before anything is drawn: one section a model and run, its panels, and the curves of each.

The figures of the page and those on paper are drawn from the same panels, so that they cannot disagree. Colours and marks belong
to a cell (`text → image`, ...) and are the same in every figure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from unisonde.study import trajectories
from unisonde.study.trajectories import CELLS

if TYPE_CHECKING:
    from unisonde.runs import Run

QUANTITIES: dict[str, str] = {"entropy": "Prompt entropy", "conditional_entropy": "Conditional entropy"}
"""The quantities that are drawn, and what their axes say."""

CROWDED = 24
"""With more layers than this, marks are small."""

QUESTION = "question → text"
"""The cell of the question beside an image prompt: counted, not drawn."""

# Okabe and Ito's palette, which colour-blind readers tell apart; the marks differ as well, for a grey print. Names of marks are
# plotly's first, matplotlib's second.
_LOOKS = (
    ("#0072B2", "circle", "o"),
    ("#D55E00", "square", "s"),
    ("#009E73", "diamond", "D"),
    ("#CC79A7", "triangle-up", "^"),
    ("#B58900", "cross", "P"),
    ("#56B4E9", "x", "X"),
)


@dataclass(frozen=True)
class Look:
    """Colour and mark of a cell: `symbol` as plotly calls it, `marker` as matplotlib does."""

    colour: str
    symbol: str
    marker: str


def look(cell: str) -> Look:
    """The look of a cell. Cells beyond the known three share what colours are left, by name."""
    place = CELLS.index(cell) if cell in CELLS else len(CELLS) + sum(cell.encode()) % (len(_LOOKS) - len(CELLS))
    return Look(*_LOOKS[place])


@dataclass(frozen=True)
class Curve:
    """One line of a figure: the points of `unisonde.study.trajectories.trajectory` for one cell and step, by layer.

    Other steps than the main one of a cell have its colour, and are drawn `dashed` with open marks.
    """

    name: str
    cell: str
    step: str
    dashed: bool
    points: tuple[dict[str, Any], ...]

    @property
    def look(self) -> Look:
        return look(self.cell)


@dataclass(frozen=True)
class Panel:
    """One figure: a quantity in one stack.

    Attributes:
        final: the layer that is the state after the last norm, if the stack has one.
        skipped: numbered sampling steps that were measured and are not drawn.
        questions: how many items have a question beside their image, measured and not drawn.
        n_rows, n_short: rows of the quantity in this stack that are drawn, and those of them that carry the flag `short`.
        n_left_out: rows among them whose value is not finite.
    """

    quantity: str
    stack: str
    units: str
    final: int | None
    curves: tuple[Curve, ...]
    skipped: int
    questions: int
    n_rows: int
    n_short: int
    n_left_out: int

    @property
    def label(self) -> str:
        return QUANTITIES[self.quantity]

    @property
    def layers(self) -> list[int]:
        return sorted({point["layer"] for curve in self.curves for point in curve.points})


@dataclass(frozen=True)
class Section:
    """One model in one run: everything that the report says of it."""

    number: int
    folder: Path
    model: dict[str, Any]
    identity: dict[str, Any]
    sessions: tuple[dict[str, Any], ...]
    frame: pl.DataFrame
    items: pl.DataFrame

    @property
    def name(self) -> str:
        return str(self.model.get("name", "a model without a name"))

    @property
    def data(self) -> str:
        return str((self.identity.get("data") or {}).get("name", "unnamed data"))

    @property
    def protocol(self) -> str:
        """Name and hash of the protocol, e.g. `default (b1946ac92492)`."""
        protocol = self.identity.get("protocol") or {}
        return f"{protocol.get('name') or 'unnamed'} ({protocol.get('digest', 'no hash')})"

    @property
    def slug(self) -> str:
        """Safe in a file name, and unlike that of any other section of the report."""
        words = re.sub(r"[^A-Za-z0-9]+", "-", self.name).strip("-").lower()[:60]
        return f"{self.number}-{words}" if words else str(self.number)

    @property
    def stacks(self) -> list[str]:
        return self.frame["stack"].unique(maintain_order=True).to_list()

    def layers(self, stack: str) -> list[int]:
        """Every layer of a stack that was measured, in order."""
        return self.frame.filter(pl.col("stack") == stack)["layer"].unique().sort().to_list()

    def panels(self) -> list[Panel]:
        """The figures of this section, by quantity, then stack; none for what was not measured."""
        found = []
        for quantity in QUANTITIES:
            rows = trajectories.with_cells(self.frame.filter(pl.col("quantity") == quantity))
            means = trajectories.trajectory(self.frame, quantity)
            for stack in rows["stack"].unique(maintain_order=True):
                here = pl.col("stack") == stack
                panel = self._panel(quantity, stack, rows.filter(here), means.filter(here))
                if panel.curves:
                    found.append(panel)
        return found

    def _panel(self, quantity: str, stack: str, rows: pl.DataFrame, means: pl.DataFrame) -> Panel:
        curves: list[Curve] = []
        shown = rows.clear()
        skipped = 0
        for cell in in_order(rows["cell"].unique().to_list()):
            if cell == QUESTION:
                continue
            steps = means.filter(pl.col("cell") == cell)["step"].unique().to_list()
            drawn = trajectories.drawn_steps(steps)
            skipped += len(steps) - len(drawn)
            for step in drawn:
                mine = (pl.col("cell") == cell) & (pl.col("step") == step)
                points = means.filter(mine & pl.col("mean").is_not_null()).sort("layer").to_dicts()
                shown = shown.vstack(rows.filter(mine))
                if points:
                    # A single step, and the last of a sampler, are what a reader expects; any other is named.
                    expected = len(drawn) == 1 and step in ("single", "final")
                    name = cell if expected else f"{cell}, step {step}"
                    curves.append(Curve(name, cell, step, step != drawn[0], tuple(points)))
        return Panel(
            quantity=quantity,
            stack=stack,
            units=str(rows["units"][0]),
            final=trajectories.final_layer(self.layers(stack)),
            curves=tuple(curves),
            skipped=skipped,
            questions=rows.filter(pl.col("cell") == QUESTION)["item"].n_unique(),
            n_rows=shown.height,
            n_short=shown.filter(trajectories.has_flag("short")).height,
            n_left_out=shown.filter(~pl.col("value").is_finite().fill_null(False)).height,
        )


def sections(runs: Sequence[Run]) -> list[Section]:
    """One section for each model of each run, in the order given."""
    found: list[Section] = []
    for run in runs:
        frame, items = run.measurements(), run.items()
        identity = run.info.get("identity") or {}
        for model in identity.get("models") or []:
            mine = pl.col("model") == model.get("name")
            found.append(
                Section(
                    number=len(found) + 1,
                    folder=Path(run.folder),
                    model=model,
                    identity=identity,
                    sessions=tuple(run.info.get("sessions") or ()),
                    frame=frame.filter(mine),
                    items=items.filter(mine),
                )
            )
    return found


def in_order(cells: Sequence[str]) -> list[str]:
    """Cells in the order of tables and legends: the known ones first, others by name."""
    return sorted(cells, key=lambda cell: (CELLS.index(cell) if cell in CELLS else len(CELLS), cell))


def ticks(layers: Sequence[int], final: int | None, most: int = 14) -> tuple[list[int], list[str]]:
    """Where an axis of layers has its ticks, and what they say: every k-th layer, and `final`."""
    stream = [layer for layer in layers if layer != final]
    stride = max(1, -(-len(stream) // most))
    places = stream[::stride]
    if final is None or final not in layers:
        return places, [str(layer) for layer in places]
    if stride > 1 and places and final - places[-1] < stride:
        places = places[:-1]  # its label would run into `final`
    return [*places, final], [*(str(layer) for layer in places), "final"]


def number(value: float | None, digits: int = 2) -> str:
    """A number for people, with a true minus sign; a dash if there is none."""
    if value is None:
        return "–"
    text = f"{value:.{digits}f}"
    # What rounds to zero has no sign.
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def percent(share: float | None) -> str:
    """A share of the ceiling in per cent, without decimals; a dash if there is none."""
    return "–" if share is None else f"{number(100 * share, 0)} %"
