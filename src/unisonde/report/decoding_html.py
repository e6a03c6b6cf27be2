"""The section "Decoding" of the report: of each experiment its sentences, its figure, its table, and what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import polars as pl

from unisonde.report import grid_html, tables
from unisonde.report.curves import number, percent
from unisonde.report.decoding import grids
from unisonde.report.decoding_information import handed
from unisonde.report.decoding_parts import attributes, rows_of, spelled
from unisonde.report.figures_html import safe_json
from unisonde.report.grid import Grid
from unisonde.report.page import plot
from unisonde.study.decoding.results import Results

HOW_TO_READ = (
    "What an encoder hands on, a decoder need not be able to use. <b>Present</b> is the V-information of a linear probe, from below what "
    "the states hold of an attribute; <b>usable</b> is the generalised mutual information of the decoder's own scores of a closed "
    "set of answers, a rate that these scores provably support. Both are in bits, on items that neither probe nor scale has seen. "
    "Their difference is the <b>gap</b>; it is evidence where its interval lies above zero. All intervals are of 95 %."
)
HEADS = {
    "gmi": "Present against usable",
    "probes": "What probes find along the model",
    "directions": "Modality-specific directions",
    "ablate": "What is lost without them",
    "bound": "The bound of the paper",
    "lora": "Training the decoder to use it",
}
"""Experiments in the order of the page, and their headings."""

NOTES = {
    "gmi": (
        "Along the decoder, the probe reads the state at the last position of the prompt, where the answer is read, and the decoder's "
        "scores are taken there by the logit lens (last norm and head); <b>final</b> is the model itself. Dashed: a probe of the mean "
        "over the positions of the recording or picture, where probes were run, on prompts without the question. Grey area: the gap. "
        "Dotted: what the labels hold at most."
    ),
    "probes": (
        "Of each layer of encoder, adapter and decoder, the mean over the positions of the recording or picture; dashed: the last "
        "position of the prompt. Crosses: the same probes on shuffled labels, at the lower edge if they are below it (the table has "
        "their bits). Dotted: what the labels hold at most."
    ),
    "directions": (
        "A mode of the covariance of sounds or pictures is modality-specific if texts have less than half of its variance, at the "
        "same layer. Left: shaded, 95 % of bootstrap draws. Right: the modes where the adapter hands on; dotted, the variance of texts."
    ),
    "ablate": (
        "The loss is that of the response's own tokens. <b>Raw</b> removal also takes away the mean along a span, <b>recentred</b> "
        "removal what varies about it. Random spans are of modes, one open mark a draw."
    ),
    "bound": (
        "Sensitivity and transport distance are of one space, and the sensitivity is a mean gradient norm: no Lipschitz constant, so "
        "nothing here is guaranteed to bound anything. The loss is the GMI of the model's answers where the labels stand in words, less "
        "that where it hears or sees."
    ),
    "lora": (
        "Filled marks are means over seeds, with intervals over seeds and items; open marks are single seeds. The control learns "
        "as much, from the same items, of something that does not need the attribute. Encoder and adapter are the same throughout."
    ),
}


def section(results: Results, place: int, folder: Path | None) -> str:
    """The HTML of the experiments in one folder.

    Args:
        place: the number of the section.
        folder: where the figures are as PDF and PNG, beside the page; None if they were not written.
    """
    about = [f"data: {results.data}", f"{results.items} items", f"folder: {results.folder.name or results.folder}"]
    parts = [
        f'<h2 id="decoding-{place}">Decoding: {escape(results.model)}</h2>',
        f'<p class="subtitle">{escape(" · ".join(about))}</p>',
    ]
    drawn = grids(results, place)
    for name in in_order(results.told):
        parts.append(f"<h3>{escape(HEADS.get(name, name))}</h3>")
        parts += [f"<p>{escape(finding['sentence'])}</p>" for finding in results.findings(name)]
        if name in drawn:
            parts.append(_figure(drawn[name], f"decoding-{place}-{name}", name, folder))
        table = results.tables[name]
        parts.append(TABLES.get(name, _plain)(table) if len(table) else "")
        parts.append(f'<p class="note">{_asked(results.told[name])}</p>')
    parts.append(tables.sessions(_all_sessions(results)))
    return "\n".join(parts)


def in_order(names: Iterable[str]) -> list[str]:
    """Experiments in the order of the page: those with a heading first, others by name."""
    known = list(HEADS)
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def _figure(grid: Grid, key: str, name: str, folder: Path | None) -> str:
    notes = [NOTES[name]]
    if folder is not None:
        links = (f'<a href="{escape(folder.name)}/{grid.name}{suffix}">{suffix[1:].upper()}</a>' for suffix in (".pdf", ".png"))
        notes.append(f"The same as {' and '.join(links)}.")
    data = safe_json(grid_html.figure(grid))
    caption = f"<p>{' '.join(notes)}</p>"
    return plot(key, escape(grid.name), escape(grid.described), data, caption, height=grid_html.height_of(grid))


def _asked(told: dict[str, Any]) -> str:
    """Splits, seeds, counts and time, of each finding of an experiment; said once where all are alike."""
    texts = []
    for finding in told["findings"]:
        if "seed" not in finding:
            continue
        parts = [f"{told['items']} items"]
        if finding.get("failed"):
            parts.append(f"{finding['failed']} of them not taken")
        if finding.get("judged"):
            parts.append(f"{finding['judged']} of them judged")
        parts.append(f"seed {finding['seed']}")
        if finding.get("folds"):
            parts.append(f"{finding['folds']} folds" + (f" by {finding['group']}" if finding.get("group") else ""))
        elif finding.get("group"):
            parts.append(f"kept together by {finding['group']}")
        if finding.get("seconds") is not None:
            parts.append(f"{finding['seconds']:,.0f} s")
        texts.append((finding["attribute"], ", ".join(parts)))
    if len({text for _, text in texts}) == 1:
        return escape(texts[0][1]) + "."
    return escape("; ".join(f"{attribute}: {text}" if attribute else text for attribute, text in texts)) + ("." if texts else "")


def _all_sessions(results: Results) -> list[dict[str, Any]]:
    held = [session for told in results.told.values() for session in told.get("sessions", [])]
    return sorted(held, key=lambda session: str(session.get("started")))


# ------------------------------------------------------------------------------------------------------------------- tables


def _gmi(table: pl.DataFrame) -> str:
    """The last layer of each attribute: the model itself."""
    heads = (
        "attribute",
        "answers",
        "items",
        "present\n(bits)",
        "usable\n(bits)",
        "gap\n(bits)",
        "usable\nat s = 1",
        "s",
        "probe\nright",
        "decoder\nright",
        "ceiling\n(bits)",
    )
    body = []
    for attribute in attributes(table):
        row = max(rows_of(table, attribute), key=lambda row: row["layer"])
        body.append(
            (
                attribute,
                str(row["answers"]),
                str(row["n"]),
                spelled(row, "v_information"),
                spelled(row, "gmi"),
                spelled(row, "gap"),
                number(row["gmi_at_one"]),
                number(row["s"]),
                percent(row["accuracy"]),
                percent(row["decoder_accuracy"]),
                number(row["ceiling"]),
            )
        )
    return _table(heads, body)


def _probes(table: pl.DataFrame) -> str:
    """Each attribute where the encoder ends, where the adapter hands on, and where the decoder ends."""
    heads = ("attribute", "where", "right", "chance", "1 / K", "times\nchance", "retention", "bits", "bits,\nshuffled", "p")
    body = []
    for attribute in attributes(table):
        rows = rows_of(table, attribute)
        for where, row in _landmarks(rows):
            body.append(
                (
                    attribute,
                    where,
                    spelled(row, "accuracy"),
                    number(row["chance"]),
                    number(row["uniform"]),
                    number(row["times"], 1),
                    percent(row["retention"]),
                    f"{spelled(row, 'v_information', 2, 'v_low', 'v_high')} of {number(row['ceiling'])}",
                    number(row["null_v_information"]),
                    number(row["p"]),
                )
            )
    return _table(heads, body)


def _landmarks(rows: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    ends: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["pool"] == "mean" and row["stack"] != "adapter":
            ends["encoder's last layer" if row["stack"] == "encoder" else "decoder's last layer"] = row
    out = handed(rows)
    named = [("encoder's last layer", ends.get("encoder's last layer")), ("adapter's output", out)]
    named.append(("decoder's last layer", ends.get("decoder's last layer")))
    return [(where, row) for where, row in named if row is not None]


def _directions(table: pl.DataFrame) -> str:
    heads = ("layer", "modes", "specific", "share of variance", "overlap with a draw", "by chance")
    layers = table["layer"].unique().sort().to_list()
    body = []
    for layer in dict.fromkeys((layers[0], layers[len(layers) // 2], layers[-1])):
        rows = table.filter(pl.col("layer") == layer)
        row = rows.row(0, named=True)
        share = spelled(row, "specific_share", 2, "share_low", "share_high")
        overlap = "–" if row["overlap"] is None else spelled(row, "overlap")
        body.append((str(layer), str(len(rows)), str(row["specific_modes"]), share, overlap, number(row["overlap_random"])))
    return _table(heads, body)


def _ablate(table: pl.DataFrame) -> str:
    heads = (
        "attribute",
        "removed",
        "how",
        "modes",
        "of the\nvariance",
        "loss (nats\na token)",
        "change",
        "p",
        "right",
        "change\n(points)",
    )
    body = []
    for attribute in attributes(table):
        rows = rows_of(table, attribute)
        body += [_removed(row) for row in rows if row["condition"] != "random"]
        for centring in ("recentred", "raw"):
            drawn = [row for row in rows if (row["condition"], row["centring"]) == ("random", centring)]
            if drawn:
                body.append(_drawn(drawn))
    return _table(heads, body)


def _removed(row: dict[str, Any]) -> tuple[str, ...]:
    names = ("accuracy_change", "accuracy_low", "accuracy_high")
    points = {name: None if row[name] is None else 100 * row[name] for name in names}
    loss, accuracy = "–", "–"
    if row["loss_change"] is not None:
        loss = spelled(row, "loss_change", 3, "loss_low", "loss_high")
    if points["accuracy_change"] is not None:
        accuracy = spelled(points, "accuracy_change", 1, "accuracy_low", "accuracy_high")
    held = (row["attribute"], row["condition"], row["centring"], str(row["modes"]), percent(row["share"]))
    return (*held, number(row["loss"], 3), loss, number(row["loss_p"], 3), percent(row["accuracy"]), accuracy)


def _drawn(rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """All random draws of one kind: least and most."""

    def ends(name: str, digits: int, unit: float = 1.0) -> str:
        values = [unit * row[name] for row in rows if row[name] is not None]
        return f"{number(min(values), digits)} to {number(max(values), digits)}" if values else "–"

    first = rows[0]
    held = (
        first["attribute"],
        f"random, {len(rows)} draw{'s' if len(rows) > 1 else ''}",
        first["centring"],
        str(first["modes"]),
        f"{ends('share', 0, 100)} %",
    )
    return (*held, ends("loss", 3), ends("loss_change", 3), "–", f"{ends('accuracy', 0, 100)} %", ends("accuracy_change", 1, 100))


def _bound(table: pl.DataFrame) -> str:
    heads = (
        "attribute",
        "GMI\nin words",
        "GMI",
        "lost",
        "sensitivity",
        "W1",
        "W1, halves\nof texts",
        "product\n(bits)",
        "bound",
        "holds",
    )
    body = [
        (
            row["attribute"],
            number(row["gmi_words"]),
            number(row["gmi"]),
            spelled(row, "lost"),
            spelled(row, "sensitivity", 3),
            spelled(row, "w1"),
            number(row["w1_null"]),
            f"{row['product']:.3g}",
            f"{row['bound']:.3g}",
            "yes" if row["holds"] else "no",
        )
        for row in table.to_dicts()
    ]
    return _table(heads, body)


def _lora(table: pl.DataFrame) -> str:
    """Over all seeds, and of each attribute the three kinds of information."""
    heads = ("learnt", "trained on", "read", "quantity", "before", "after", "change")
    told = {
        "gmi": "usable (bits)",
        "v_information": "present where the answer is read (bits)",
        "v_mean": "present as a mean (bits)",
    }
    body = []
    for row in table.filter(pl.col("seed").is_null()).to_dicts():
        if row["quantity"] in told:
            trained = f"the control, {row['control']}" if row["trained"] == "control" else "the attribute"
            values = (number(row["before"]), number(row["after"]), spelled(row, "change", 2, "low", "high"))
            body.append((row["attribute"], trained, row["read"], told[row["quantity"]], *values))
    return _table(heads, body)


def _plain(table: pl.DataFrame) -> str:
    """A table as it is, of an experiment that has none of its own here."""
    shown = [
        [number(v, 3) if isinstance(v, float) else "–" if v is None else str(v) for v in row] for row in table.head(200).rows()
    ]
    return _table(table.columns, shown)


TABLES: dict[str, Callable[[pl.DataFrame], str]] = {
    "gmi": _gmi,
    "probes": _probes,
    "directions": _directions,
    "ablate": _ablate,
    "bound": _bound,
    "lora": _lora,
}


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(text).replace(chr(10), "<br>")}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(text)}</td>" for text in row[1:])}</tr>' for row in rows
    )
    return tables.wrap(f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>')
