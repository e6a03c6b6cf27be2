"""What the figures of mismatched decoding share: looks, names of what is drawn, and readers of the tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from unisonde.report.curves import Look, number, ticks
from unisonde.report.grid import Series

PRESENT = Look("#0072B2", "circle", "o")
USABLE = Look("#D55E00", "square", "s")
SPREAD = Look("#009E73", "diamond", "D")
QUIET = Look("#7F7F7F", "x", "x")

BITS = "information (bits)"
DECODER = "layer of the decoder (0: embedding)"
HELD = "present over the whole recording or picture"
READ = "present where the answer is read"
USED = "usable by the decoder"
CEILING = "entropy of the labels"


def attributes(table: pl.DataFrame) -> list[str]:
    """The attributes of a table, in the order in which they were asked for."""
    return table["attribute"].unique(maintain_order=True).to_list()


def rows_of(table: pl.DataFrame, attribute: str) -> list[dict[str, Any]]:
    """The rows about an attribute."""
    return table.filter(pl.col("attribute") == attribute).to_dicts()


def short(attribute: str, most: int = 16) -> str:
    """The name of an attribute, cut where it would run into the next figure."""
    return attribute if len(attribute) <= most else attribute[: most - 1] + "…"


def spelled(row: dict[str, Any], name: str, digits: int = 2, low: str | None = None, high: str | None = None) -> str:
    """`0.95 (0.91 to 0.98)`, of a row with `NAME`, `NAME_low` and `NAME_high`."""
    edges = [row.get(low or f"{name}_low"), row.get(high or f"{name}_high")]
    text = number(row[name], digits)
    return text if None in edges or edges[0] != edges[0] else f"{text} ({number(edges[0], digits)} to {number(edges[1], digits)})"


def line(
    rows: Sequence[dict[str, Any]],
    column: str,
    name: str,
    part: str,
    look: Look,
    hover: Any,
    edges: tuple[str, str] | None = None,
    x: Sequence[float] | None = None,
    dashed: bool = False,
) -> Series:
    low, high = edges or (f"{column}_low", f"{column}_high")
    return Series(
        name,
        part,
        look,
        tuple(row["layer"] for row in rows) if x is None else tuple(x),
        tuple(row[column] for row in rows),
        tuple(row[low] for row in rows),
        tuple(row[high] for row in rows),
        tuple(hover(row) for row in rows),
        dashed=dashed,
    )


def layer_ticks(layers: Sequence[int], final: int | None, most: int = 7) -> tuple[tuple[float, ...], tuple[str, ...]]:
    places, labels = ticks(layers, final, most)
    return tuple(places), tuple(labels)
