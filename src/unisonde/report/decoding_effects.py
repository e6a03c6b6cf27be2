"""What directions hold, what their removal does, what the bound of the paper says, and what training changes.

| grid | shows |
|---|---|
| `modes` | modality-specific share of variance by layer, and the spectrum at the adapter's output |
| `removals` | what removing directions does to loss and accuracy |
| `bounds` | the paper's product against the measured loss, and its transport distance |
| `interventions` | what changes of every attribute when the decoder learns one |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from unisonde.report.curves import number, percent
from unisonde.report.decoding_parts import (
    DECODER,
    PRESENT,
    QUIET,
    SPREAD,
    USABLE,
    attributes,
    layer_ticks,
    line,
    rows_of,
    short,
    spelled,
)
from unisonde.report.grid import Axes, Grid, Series
from unisonde.study import trajectories
from unisonde.study.decoding.results import Results

CONDITIONS = {
    "specific": "modality-\nspecific",
    "aligned by count": "text-aligned,\nby number",
    "aligned by variance": "text-aligned,\nby variance",
    "random": "random,\nby number",
}
"""What is removed, matched to the first in number or in variance, and what the axis says."""

SPREADS = {"recentred": USABLE, "raw": PRESENT}


# ---------------------------------------------------------------------------------------------------------------- directions


def modes(results: Results, name: str, title: str) -> Grid:
    """The modality-specific share of variance by layer of the decoder, and the spectrum where the adapter hands on."""
    table = results.tables["directions"]
    of_layer = table.unique("layer", keep="first").sort("layer")
    layers = of_layer["layer"].to_list()
    rows = [
        row | {key: _hundredfold(row[key]) for key in ("specific_share", "share_low", "share_high")} for row in of_layer.to_dicts()
    ]
    known = [row for row in rows if row["share_low"] is not None] or rows
    share = line(known, "specific_share", "", "share", PRESENT, _shared, ("share_low", "share_high"))
    if known[0]["share_low"] is None:
        share = Series("", "share", PRESENT, share.x, share.y, hover=share.hover)
    final = trajectories.final_layer(layers)
    by_layer = Axes(
        "share of the variance that texts lack",
        DECODER,
        "modality-specific share of variance (%)",
        (share,),
        layer_ticks(layers, final),
        () if final is None else (final - 0.5,),
        zero=True,
    )
    first = table.filter(pl.col("layer") == layers[0]).sort("mode")
    series = []
    for what, part, look, rows in (
        ("modality-specific modes", "specific", USABLE, first.filter("specific").to_dicts()),
        ("other modes", "aligned", SPREAD, first.filter(~pl.col("specific")).to_dicts()),
    ):
        if rows:
            x, y = tuple(row["mode"] + 1 for row in rows), tuple(row["variance"] for row in rows)
            series.append(Series(what, part, look, x, y, hover=tuple(map(_mode, rows)), kind="points"))
    along = tuple(max(value, 1e-30) for value in first["text_variance"])
    series.append(Series("texts along the same mode", "text", QUIET, tuple(k + 1 for k in first["mode"]), along, kind="rule"))
    numbers = layer_ticks([row + 1 for row in first["mode"]], None)
    where = "the adapter's output" if layers[0] == 0 else f"layer {layers[0]}"
    spectrum = Axes(
        f"modes at {where}", "mode, by variance", "variance (squared units of the state)", tuple(series), numbers, log_y=True
    )
    described = (
        f"The modality-specific share of variance of {results.model} by layer, and the spectrum of {results.data} at {where}"
    )
    return Grid(name, f"{title}: modality-specific directions", described, (by_layer, spectrum), 2)


def _hundredfold(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _shared(row: dict[str, Any]) -> str:
    edges = "" if row["share_low"] is None else f" ({number(row['share_low'], 1)} to {number(row['share_high'], 1)})"
    return f"layer {row['layer']}: {number(row['specific_share'], 1)} %{edges}, {row['specific_modes']} modes"


def _mode(row: dict[str, Any]) -> str:
    stable = "" if row["stability"] is None else f", stability {number(row['stability'])}"
    return f"mode {row['mode'] + 1}: {percent(row['share'])} of the variance; texts / modal {row['ratio']:.3g}{stable}"


# ------------------------------------------------------------------------------------------------------------------ ablation


def removals(results: Results, name: str, title: str) -> Grid:
    """Change of loss and of accuracy after removing spans, against the whole features."""
    table = results.tables["ablate"]
    axes = []
    for attribute in attributes(table):
        rows = [row for row in rows_of(table, attribute) if row["condition"] in CONDITIONS]
        axes.append(_changes(rows, attribute, "loss", 1.0, "loss of the response", "change of loss (nats a token)"))
        if any(row["accuracy"] is not None for row in rows):
            what = "change of accuracy (percentage points)"
            axes.append(_changes(rows, attribute, "accuracy", 100.0, "right answers", what))
    described = f"What removing directions from the adapter's output of {results.model} does to loss and accuracy"
    return Grid(name, f"{title}: removals", described, tuple(axes), 2 if len(axes) > 1 else 1)


def _changes(rows: Sequence[dict[str, Any]], attribute: str, column: str, unit: float, what: str, label: str) -> Axes:
    names = list(CONDITIONS)
    series = []
    for shift, (centring, look) in zip((-0.14, 0.14), SPREADS.items(), strict=True):
        mine = [row for row in rows if row["centring"] == centring]
        for drawn in (False, True):  # random spans are many, and have no intervals
            here = [row for row in mine if (row["condition"] == "random") == drawn]
            if not here:
                continue
            edges = ((), ()) if drawn else (tuple(unit * row[f"{column}_{edge}"] for row in here) for edge in ("low", "high"))
            low, high = edges
            spread = [0.02 * (row["draw"] % 7 - 3) if drawn else 0.0 for row in here]
            series.append(
                Series(
                    f"{centring}",
                    f"{centring} random" if drawn else centring,
                    look,
                    tuple(names.index(row["condition"]) + shift + step for row, step in zip(here, spread, strict=True)),
                    tuple(unit * row[f"{column}_change"] for row in here),
                    low,
                    high,
                    tuple(_removed(row, column, unit) for row in here),
                    "points",
                    dashed=drawn,
                )
            )
    places = tuple(float(k) for k in range(len(names)))
    return Axes(
        f"{short(attribute)}: {what}", "what is removed", label, tuple(series), (places, tuple(CONDITIONS.values())), zero=True
    )


def _removed(row: dict[str, Any], column: str, unit: float) -> str:
    edges = [row[f"{column}_low"], row[f"{column}_high"]]
    change = {"change": unit * row[f"{column}_change"], "change_low": unit * edges[0], "change_high": unit * edges[1]}
    digits = 3 if column == "loss" else 1
    held = f"{row['modes']} modes, {percent(row['share'])} of the variance"
    return f"{row['condition']}, {row['centring']} ({held}): {spelled(change, 'change', digits)}"


# --------------------------------------------------------------------------------------------------------------------- bound


def bounds(results: Results, name: str, title: str) -> Grid:
    """The paper's product against the measured loss of GMI, and the transport distance against that of halves of the texts."""
    table = results.tables["bound"]
    rows = table.to_dicts()
    points = Series(
        "",
        "lost",
        PRESENT,
        tuple(row["product"] for row in rows),
        tuple(row["lost"] for row in rows),
        tuple(row["lost_low"] for row in rows),
        tuple(row["lost_high"] for row in rows),
        tuple(f"{row['attribute']}: product {row['product']:.3g} bits, {spelled(row, 'lost')} bits lost" for row in rows),
        "points",
        tuple(short(row["attribute"]) for row in rows),
    )
    places = tuple(float(k) for k in range(len(rows)))
    between = Series(
        "modal and text vectors",
        "w1",
        PRESENT,
        places,
        tuple(row["w1"] for row in rows),
        tuple(row["w1_low"] for row in rows),
        tuple(row["w1_high"] for row in rows),
        tuple(f"{row['attribute']}: W1 {spelled(row, 'w1', 3)}" for row in rows),
        "points",
    )
    null = Series(
        "halves of the texts",
        "w1 null",
        QUIET,
        places,
        tuple(row["w1_null"] for row in rows),
        hover=tuple(f"{row['attribute']}: W1 of halves of the texts {number(row['w1_null'], 3)}" for row in rows),
        kind="points",
    )
    product = "sensitivity times W1 (bits)"
    some = all(row["product"] > 0 for row in rows)  # zero, where nothing can be used of words either, has no place on a log axis
    axes = (
        Axes("does the product predict the loss?", product, "GMI lost (bits)", (points,), zero=True, log_x=some),
        Axes(
            "transport distance",
            "attribute",
            "W1 (units of the state)",
            (between, null),
            (places, tuple(short(row["attribute"]) for row in rows)),
            zero=True,
        ),
    )
    described = (
        f"Sensitivity times transport distance of {results.model} against the measured loss, for {', '.join(attributes(table))}"
    )
    return Grid(name, f"{title}: the bound", described, axes, 2)


# -------------------------------------------------------------------------------------------------------------- intervention


LEARNT = {"attribute": USABLE, "control": PRESENT}


def interventions(results: Results, name: str, title: str) -> Grid:
    """Change of usable and of present information of every attribute, after the decoder learnt one, and after the control."""
    table = results.tables["lora"]
    axes = []
    for attribute in attributes(table):
        rows = rows_of(table, attribute)
        for quantity, what in (("gmi", "usable"), ("v_information", "present where the answer is read")):
            mine = [row for row in rows if row["quantity"] == quantity]
            axes.append(_learnt(mine, f"{short(attribute)} is learnt: {what}"))
    described = (
        f"What of each attribute the decoder of {results.model} can use, before and after it learnt {', '.join(attributes(table))}"
    )
    return Grid(name, f"{title}: low-rank training of the decoder", described, tuple(axes), 2, shared=True)


def _learnt(rows: Sequence[dict[str, Any]], title: str) -> Axes:
    names = list(dict.fromkeys(row["read"] for row in rows))
    series = []
    for shift, (trained, look) in zip((-0.14, 0.14), LEARNT.items(), strict=True):
        for of_seed in (False, True):
            here = [row for row in rows if row["trained"] == trained and (row["seed"] is not None) == of_seed]
            if here:
                series.append(
                    Series(
                        f"trained on the {trained}",
                        f"{trained} seed" if of_seed else trained,
                        look,
                        tuple(names.index(row["read"]) + shift + (0.1 if of_seed else 0.0) for row in here),
                        tuple(row["change"] for row in here),
                        () if of_seed else tuple(row["low"] for row in here),
                        () if of_seed else tuple(row["high"] for row in here),
                        tuple(map(_changed, here)),
                        "points",
                        dashed=of_seed,
                    )
                )
    places = tuple(float(k) for k in range(len(names)))
    return Axes(
        title,
        "attribute that is read",
        "change of information (bits)",
        tuple(series),
        (places, tuple(map(short, names))),
        zero=True,
    )


def _changed(row: dict[str, Any]) -> str:
    which = "all seeds" if row["seed"] is None else f"seed {row['seed']}"
    change = spelled(row, "change", 2, "low", "high")
    return f"{row['read']}, {which}: {change} bits, from {number(row['before'])} to {number(row['after'])}"
