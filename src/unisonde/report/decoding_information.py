"""What of an attribute is present and what is usable, in bits: along the decoder, and along the whole model.

| grid | shows |
|---|---|
| `present_and_usable` | along the decoder, V-information of a probe against GMI of the decoder's scores, a small figure an attribute |
| `along_the_model` | V-information of probes from the encoder to the end, the same |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unisonde.report.curves import number, percent, ticks
from unisonde.report.decoding_parts import (
    BITS,
    CEILING,
    DECODER,
    HELD,
    PRESENT,
    QUIET,
    READ,
    SPREAD,
    USABLE,
    USED,
    attributes,
    layer_ticks,
    line,
    rows_of,
    short,
    spelled,
)
from unisonde.report.grid import Axes, Grid, Series
from unisonde.study import trajectories
from unisonde.study.decoding.features import ADAPTER_OUT
from unisonde.study.decoding.results import Results

# ------------------------------------------------------------------------------------------------------ present against usable


def present_and_usable(results: Results, name: str, title: str) -> Grid:
    """V-information against GMI along the decoder, with the gap between them; one y axis for all attributes."""
    table = results.tables["gmi"]
    axes = []
    for attribute in attributes(table):
        rows = sorted(rows_of(table, attribute), key=lambda row: row["layer"])
        layers = [row["layer"] for row in rows]
        series = [
            line(rows, "v_information", READ, "present", PRESENT, _present),
            *_held(results, attribute, layers),
            line(rows, "gmi", USED, "usable", USABLE, _usable),
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
                ticks=layer_ticks(layers, final),
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
    return [line(there, "v_information", HELD, "held", SPREAD, _probed, ("v_low", "v_high"), dashed=True)]


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


# ------------------------------------------------------------------------------------------------------------ along the model

BELOW = 0.15
"""How far below zero shuffled labels are drawn at most, as a share of the largest entropy of labels."""


def along_the_model(results: Results, name: str, title: str) -> Grid:
    """V-information of probes, from the encoder's first layer to the decoder's last. Shuffled labels that cost a probe many bits are
    drawn at the lower edge, so that they leave the others room."""
    table = results.tables["probes"]
    lowest = -BELOW * max(table["ceiling"])
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
            series.append(line(here, "v_information", "mean over positions", "mean", SPREAD, _probed, ("v_low", "v_high"), places))
            if None not in (nulls := [row["null_v_information"] for row in here]):
                said = tuple(f"shuffled labels: {number(bits)} bits" for bits in nulls)
                drawn = tuple(max(bits, lowest) for bits in nulls)
                series.append(Series("shuffled labels", "null", QUIET, tuple(places), drawn, hover=said, kind="points"))
        last = [row for row in rows if row["pool"] == "last" and (row["stack"], row["layer"]) in x]
        if last:
            places = [x[row["stack"], row["layer"]] for row in last]
            series.append(
                line(last, "v_information", "last position", "last", PRESENT, _probed, ("v_low", "v_high"), places, dashed=True)
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
