"""The figures of mismatched decoding, from the tables of its experiments: what of an attribute is present, and what is usable.

| grid | shows |
|---|---|
| `present_and_usable` | along the decoder, V-information of a probe against GMI of the decoder's scores, a small figure an attribute |
| `along_the_model` | V-information of probes from the encoder to the end, the same |
| `modes` | modality-specific share of variance by layer, and the spectrum at the adapter's output |
| `removals` | what removing directions does to loss and accuracy |
| `bounds` | the paper's product against the measured loss, and its transport distance |
| `interventions` | what changes of every attribute when the decoder learns one |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from unisonde.report.curves import Look, number, percent, ticks
from unisonde.report.grid import Axes, Grid, Series
from unisonde.study import trajectories
from unisonde.study.decoding.features import ADAPTER_OUT
from unisonde.study.decoding.results import Results

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

CONDITIONS = {
    "specific": "modality-\nspecific",
    "aligned by count": "text-aligned,\nsame number",
    "aligned by variance": "text-aligned,\nsame variance",
    "random": "random,\nsame number",
}
"""What is removed, and what the axis says."""

SPREADS = {"recentred": USABLE, "raw": PRESENT}


def grids(results: Results, number: int) -> dict[str, Grid]:
    """The figures of the experiments in a folder, by experiment. `number` sets their files apart from those of other folders."""
    made = {
        "gmi": present_and_usable,
        "probes": along_the_model,
        "directions": modes,
        "ablate": removals,
        "bound": bounds,
        "lora": interventions,
    }
    words = re.sub(r"[^A-Za-z0-9]+", "-", results.model).strip("-").lower()[:60]
    found: dict[str, Grid] = {}
    for name, make in made.items():
        if name in results.tables and len(results.tables[name]):
            title = f"{results.model} on {results.data}"
            found[name] = make(results, f"{number}-{words}-decoding-{name}", title)
    return found


def draw(folder: Path | str, experiment: str) -> list[Path]:
    """The figure of an experiment as PDF and PNG beside its table.

    Raises:
        ImportError: matplotlib is not installed.
    """
    grid = grids(Results.open(folder), 1)[experiment]
    try:
        from unisonde.report.grid_print import save

        return save(replace(grid, name=experiment), Path(folder))
    except ImportError:
        raise ImportError("matplotlib is needed: pip install 'unisonde[report]'") from None


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


# ------------------------------------------------------------------------------------------------------ present against usable


def present_and_usable(results: Results, name: str, title: str) -> Grid:
    """V-information against GMI along the decoder, with the gap between them; one y axis for all attributes."""
    table = results.tables["gmi"]
    axes = []
    for attribute in attributes(table):
        rows = sorted(rows_of(table, attribute), key=lambda row: row["layer"])
        layers = [row["layer"] for row in rows]
        series = [
            _line(rows, "v_information", READ, "present", PRESENT, _present),
            *_held(results, attribute, layers),
            _line(rows, "gmi", USED, "usable", USABLE, _usable),
            _gap(rows),
            _level(layers, rows[-1]["ceiling"]),
        ]
        final = trajectories.final_layer(layers)
        axes.append(
            Axes(
                title=f"{short(attribute)} ({rows[0]['answers']} answers, {rows[0]['n']} items)",
                x_label=DECODER,
                y_label=BITS,
                series=tuple(series),
                ticks=_ticks(layers, final),
                rules=() if final is None else (final - 0.5,),
                zero=True,
                hover_title="layer %{x}",
            )
        )
    ends = "; ".join(_end(rows_of(table, attribute)) for attribute in attributes(table))
    described = f"Present and usable information of {results.model} by layer of its decoder; at the end, {ends}"
    return Grid(name, f"{title}: present against usable", described, tuple(axes), min(3, len(axes)), True, "x unified")


def _end(rows: Sequence[dict[str, Any]]) -> str:
    row = max(rows, key=lambda row: row["layer"])
    return f"{row['attribute']}: {number(row['v_information'])} bits present, {number(row['gmi'])} usable"


def _gap(rows: Sequence[dict[str, Any]]) -> Series:
    low, high = tuple(row["gmi"] for row in rows), tuple(row["v_information"] for row in rows)
    return Series("gap", "gap", QUIET, tuple(row["layer"] for row in rows), low=low, high=high, kind="area")


def _held(results: Results, attribute: str, layers: Sequence[int]) -> list[Series]:
    """What probes of the mean over the positions of a recording or picture find, if they were run on this attribute."""
    table = results.tables.get("probes")
    if table is None or attribute not in attributes(table):
        return []
    there = [row for row in rows_of(table, attribute) if row["stack"] == "llm" and row["pool"] == "mean" and row["layer"] in layers]
    if not there:
        return []
    return [_line(there, "v_information", HELD, "held", SPREAD, _probed, ("v_low", "v_high"), dashed=True)]


def _line(
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


def _level(x: Sequence[float], value: float, name: str = CEILING, part: str = "ceiling") -> Series:
    edges = (min(x) - 0.5, max(x) + 0.5)
    return Series(name, part, QUIET, edges, (value, value), kind="rule")


def _present(row: dict[str, Any]) -> str:
    return f"present {spelled(row, 'v_information')} bits, a probe right {percent(row['accuracy'])}"


def _usable(row: dict[str, Any]) -> str:
    right = f"the decoder right {percent(row['decoder_accuracy'])}"
    untilted = f"at s = 1 {number(row['gmi_at_one'])}, s = {number(row['s'])}"
    return f"usable {spelled(row, 'gmi')} bits, {right}\n{untilted}; gap {spelled(row, 'gap')}"


def _probed(row: dict[str, Any]) -> str:
    place = f"{row['stack']} {row['layer']}, {'last position' if row['pool'] == 'last' else 'mean over positions'}"
    right = f"right {spelled(row, 'accuracy')}, {number(row['times'], 1)} times chance"
    return f"{place}: {spelled(row, 'v_information', 2, 'v_low', 'v_high')} bits\na probe is {right}"


def _ticks(layers: Sequence[int], final: int | None, most: int = 7) -> tuple[tuple[float, ...], tuple[str, ...]]:
    places, labels = ticks(layers, final, most)
    return tuple(places), tuple(labels)


# ------------------------------------------------------------------------------------------------------------ along the model


def along_the_model(results: Results, name: str, title: str) -> Grid:
    """V-information of probes, from the encoder's first layer to the decoder's last."""
    table = results.tables["probes"]
    axes = []
    for attribute in attributes(table):
        rows = rows_of(table, attribute)
        means = [row for row in rows if row["pool"] == "mean"]
        x, labels, rules = _row_of_stacks(means)
        stacks = list(dict.fromkeys(row["stack"] for row in means))
        series = []
        for stack in stacks:
            here = [row for row in means if row["stack"] == stack]
            places = [x[stack, row["layer"]] for row in here]
            series.append(_line(here, "v_information", "mean over positions", "mean", SPREAD, _probed, ("v_low", "v_high"), places))
            if None not in (nulls := [row["null_v_information"] for row in here]):
                said = tuple(f"shuffled labels: {number(bits)} bits" for bits in nulls)
                series.append(Series("shuffled labels", "null", QUIET, tuple(places), tuple(nulls), hover=said, kind="points"))
        last = [row for row in rows if row["pool"] == "last" and (row["stack"], row["layer"]) in x]
        if last:
            places = [x[row["stack"], row["layer"]] for row in last]
            series.append(
                _line(last, "v_information", "last position", "last", PRESENT, _probed, ("v_low", "v_high"), places, dashed=True)
            )
        series.append(_level(list(x.values()), rows[0]["ceiling"]))
        apart = f", held out by {rows[0]['group']}" if rows[0]["group"] else ""
        head = f"{short(attribute)} ({rows[0]['labels']} labels, {rows[0]['n']} items{apart})"
        axes.append(Axes(head, "encoder, adapter, layer of the decoder", BITS, tuple(series), labels, rules, zero=True))
    described = f"What linear probes find of {', '.join(attributes(table))} at every layer of {results.model}"
    return Grid(name, f"{title}: linear probes", described, tuple(axes), min(2, len(axes)), True)


Ticks = tuple[tuple[float, ...], tuple[str, ...]]


def _row_of_stacks(rows: Sequence[dict[str, Any]]) -> tuple[dict[tuple[str, int], float], Ticks, tuple[float, ...]]:
    """Where on one axis the layers of all stacks stand, one after another; its ticks; where a stack ends."""
    x: dict[tuple[str, int], float] = {}
    places, labels, rules, start = [], [], [], 0.0
    for stack in dict.fromkeys(row["stack"] for row in rows):
        layers = [row["layer"] for row in rows if row["stack"] == stack]
        if start:
            rules.append(start)
            start += 0.5
        x |= {(stack, layer): start + k for k, layer in enumerate(layers)}
        if stack == "llm":
            own_places, own_labels = ticks(layers, trajectories.final_layer(layers), 5)
            places += [x[stack, layer] for layer in own_places]
            labels += own_labels
        else:
            places.append(start + (len(layers) - 1) / 2)
            labels.append("\n" * len(labels) + stack)  # one below the other: they are short stacks
        start += len(layers) - 0.5
    return x, (tuple(places), tuple(labels)), tuple(rules)


def handed(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the adapter's output, if there is one."""
    return next((row for row in rows if (row["stack"], row["layer"], row["pool"]) == (ADAPTER_OUT.stack, 1, "mean")), None)


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
    share = _line(known, "specific_share", "", "share", PRESENT, _shared, ("share_low", "share_high"))
    if known[0]["share_low"] is None:
        share = Series("", "share", PRESENT, share.x, share.y, hover=share.hover)
    final = trajectories.final_layer(layers)
    by_layer = Axes(
        "share of the variance that texts lack",
        DECODER,
        "modality-specific share of variance (%)",
        (share,),
        _ticks(layers, final),
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
    numbers = _ticks([row + 1 for row in first["mode"]], None)
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
    axes = (
        Axes("does the product predict the loss?", product, "GMI lost (bits)", (points,), zero=True, log_x=True),
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
