"""Tables of the report, as HTML: the numbers in short, by category, token counts, flags, and settings field by field.

Every text that comes from a run passes `escape` here; nothing else in this file writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import polars as pl

from unisonde.report.curves import QUANTITIES, QUESTION, Section, in_order, number, percent
from unisonde.study import trajectories

FLAGS = {
    "short": f"the number rests on fewer than {trajectories.SHORT} tokens, where an entropy says next to nothing",
    "question": "the question that stands beside an image prompt: measured, in no curve",
    "cut": "the prompt was cut to the model's text window",
    "full": "the response ended because its token limit was reached",
}
"""What the known flags mean. Others are listed by name."""


@dataclass(frozen=True)
class Row:
    """One row of a table of landmarks: a cell of one model, of all its items or of one category.

    `points` holds, for each drawn quantity, the points of its trajectory at the landmark layers, None where there is none.
    """

    section: Section
    stack: str
    cell: str
    step: str
    category: str | None
    points: dict[str, list[dict[str, Any] | None]]

    def items(self) -> int:
        return max((point["n_items"] for points in self.points.values() for point in points if point), default=0)

    def tokens(self, quantity: str, column: str) -> float | None:
        """Mean token count over the items, at the first landmark that was measured."""
        return next((point[column] for point in self.points[quantity] if point), None)


def rows(section: Section, categories: bool) -> list[Row]:
    """The landmark rows of a section: by stack, cell and step; with `categories`, one for each category after that of all items."""
    means = {quantity: trajectories.trajectory(section.frame, quantity) for quantity in QUANTITIES}
    split = {quantity: trajectories.by_category(section.frame, quantity) for quantity in QUANTITIES} if categories else {}
    found: list[Row] = []
    for stack in section.stacks:
        layers = trajectories.landmarks(section.layers(stack))
        here = {quantity: frame.filter(pl.col("stack") == stack) for quantity, frame in means.items()}
        cells = {cell for frame in here.values() for cell in frame["cell"].unique()} - {QUESTION}
        for cell in in_order(list(cells)):
            steps = {q: _steps(frame, cell) for q, frame in here.items()}
            for step in steps["conditional_entropy"] or steps["entropy"]:
                # The prompt may have been read in another pass than the response, whose steps are named otherwise.
                of = {q: step if step in found_steps else next(iter(found_steps), "") for q, found_steps in steps.items()}
                found.append(Row(section, stack, cell, step, None, _points(means, stack, cell, of, layers)))
                if categories:
                    names = {c for frame in split.values() for c in _only(frame, stack, cell)["category"].unique()}
                    for name in sorted(names):
                        one = {q: frame.filter(pl.col("category") == name) for q, frame in split.items()}
                        found.append(Row(section, stack, cell, step, name, _points(one, stack, cell, of, layers)))
    return found


def summary(sections: Sequence[Section]) -> str:
    """The numbers in short: a row for each model and cell, at layer 0, the middle and `final`."""
    body = []
    for section in sections:
        mine = rows(section, categories=False)
        about = f"{escape(section.data)}, protocol {escape(section.protocol)}"
        if " or " in units(sections):
            about += f", {escape(units([section]))}"
        if not mine:
            about += ": nothing was measured"
        link = f'<a href="#model-{section.number}">{escape(section.name)}</a>'
        body.append(f'<tr class="all"><th scope="rowgroup" colspan="9">{link} <span>{about}</span></th></tr>')
        for row in mine:
            stack = f"<small>stack {escape(row.stack)}</small>" if len(section.stacks) > 1 else ""
            body.append(f"<tr>{_cell_name(row, stack)}{_numbers(row)}</tr>")
    return _landmark_table(("layer 0", "middle", "final"), units(sections), body)


def by_category(section: Section) -> str:
    """The same for each category of one model; one table a stack."""
    tables = []
    for stack in section.stacks:
        mine = [row for row in rows(section, categories=True) if row.stack == stack]
        if not mine:
            continue
        body = []
        for row in mine:
            name = "all categories" if row.category is None else row.category or "(no category)"
            kind = ' class="all"' if row.category is None else ""
            body.append(f'<tr{kind}>{_cell_name(row)}<th scope="row">{escape(name)}</th>{_numbers(row)}</tr>')
        layers = section.layers(stack)
        final = trajectories.final_layer(layers)
        heads = ["final" if layer == final else f"layer {layer}" for layer in trajectories.landmarks(layers)]
        if len(section.stacks) > 1:
            tables.append(f"<h4>Stack {escape(stack)}</h4>")
        tables.append(_landmark_table(heads, units([section]), body, "category"))
    return "".join(tables)


def counts(section: Section) -> str:
    """Items and tokens of each cell: asked, failed, measured; tokens a prompt and a response, the least, the most and the sum."""
    frame = trajectories.with_cells(section.frame)
    asked = section.items.with_columns(pl.concat_str("modality", pl.lit(" → "), "task").alias("cell"))
    body = []
    for cell in in_order(list({*frame["cell"].unique(), *asked["cell"].unique()})):
        of = asked.filter(pl.col("cell") == cell)
        failed = of["error"].is_not_null().sum()
        measured = frame.filter(pl.col("cell") == cell)
        texts = [
            "–" if cell == QUESTION else str(of.height),
            "–" if cell == QUESTION else str(failed),
            str(measured["item"].n_unique()),
            _tokens(measured.filter(pl.col("level") == "prompt"), "n_prompt"),
            _tokens(measured.filter(pl.col("level") == "response"), "n_response"),
        ]
        body.append(f'<tr><th scope="row">{escape(cell)}</th>' + "".join(f"<td>{text}</td>" for text in texts) + "</tr>")
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("shown → asked for", "items", "failed", "measured", "tokens of the prompt", "tokens of the response")
    )
    return wrap(f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>")


def flags(section: Section) -> str:
    """Every flag with the number of rows and items that carry it; empty if there is none."""
    exploded = section.frame.select("item", "task", pl.col("flags").fill_null("").str.split(",")).explode(
        "flags", empty_as_null=True
    )
    exploded = exploded.with_columns(pl.col("flags").str.strip_chars()).filter(pl.col("flags") != "")
    body = []
    for name in sorted(exploded["flags"].unique()):
        mine = exploded.filter(pl.col("flags") == name)
        items = mine.select("item", "task").unique().height
        texts = (f"{mine.height:,} of {section.frame.height:,}", str(items), escape(FLAGS.get(name, "–")))
        body.append(f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{text}</td>" for text in texts) + "</tr>")
    if not body:
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("flag", "rows", "items", "meaning"))
    return wrap(f'<table class="words"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>')


def fields(settings: Mapping[str, Any]) -> str:
    """Settings, one line a field; a field within a field is written `outer.inner`."""
    lines = "".join(f"<tr><th scope='row'>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in _flat(settings))
    return wrap(f'<table class="fields"><tbody>{lines}</tbody></table>') if lines else "<p>not recorded</p>"


def _flat(settings: Mapping[str, Any], outer: str = "") -> Iterable[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{outer}{name}.")
        elif isinstance(value, (list, tuple)):
            yield f"{outer}{name}", ", ".join(str(one) for one in value) or "none"
        elif isinstance(value, bool):
            yield f"{outer}{name}", "yes" if value else "no"
        elif isinstance(value, int) and abs(value) >= 10_000:
            yield f"{outer}{name}", f"{value:,}"
        else:
            yield f"{outer}{name}", "none" if value is None else str(value)


def _steps(frame: pl.DataFrame, cell: str) -> tuple[str, ...]:
    return trajectories.drawn_steps(frame.filter(pl.col("cell") == cell)["step"])


def _only(frame: pl.DataFrame, stack: str, cell: str) -> pl.DataFrame:
    return frame.filter((pl.col("stack") == stack) & (pl.col("cell") == cell))


def _points(
    frames: Mapping[str, pl.DataFrame], stack: str, cell: str, steps: Mapping[str, str], layers: Sequence[int]
) -> dict[str, list[dict[str, Any] | None]]:
    found: dict[str, list[dict[str, Any] | None]] = {}
    for quantity, frame in frames.items():
        mine = _only(frame, stack, cell).filter((pl.col("step") == steps[quantity]) & pl.col("mean").is_not_null())
        at = {point["layer"]: point for point in mine.to_dicts()}
        found[quantity] = [at.get(layer) for layer in layers]
    return found


def _cell_name(row: Row, note: str = "") -> str:
    step = "" if row.step in ("single", "final") else f"<small>step {escape(row.step)}</small>"
    return f'<th scope="row" class="cell">{escape(row.cell)}{note}{step}</th>'


def _numbers(row: Row) -> str:
    tokens = (row.tokens("entropy", "n_prompt"), row.tokens("conditional_entropy", "n_response"))
    texts = [str(row.items()), " + ".join(number(count, 1) for count in tokens)]
    for quantity in QUANTITIES:
        texts += [_value(point) for point in row.points[quantity]]
    return "".join(f"<td>{text}</td>" for text in texts)


def _value(point: dict[str, Any] | None) -> str:
    if point is None:
        return "–"
    spread = "" if point["sd"] is None else f" ± {number(point['sd'])}"
    return f"<b>{number(point['mean'])}</b>{spread}<small>{percent(point['share'])} of {number(point['ceiling'])}</small>"


def _landmark_table(layers: Sequence[str], unit: str, body: Sequence[str], *more: str) -> str:
    """A table with a head of two rows: shown → asked for, `more`, items, tokens, and each quantity at `layers`."""
    heads = ["shown →<br>asked for", *more, "items", "tokens: prompt<br>+ response"]
    first = "".join(f'<th scope="col" rowspan="2">{head}</th>' for head in heads)
    first += "".join(
        f'<th scope="colgroup" colspan="{len(layers)}">{label.lower()} ({escape(unit)})</th>' for label in QUANTITIES.values()
    )
    below = "".join(f'<th scope="col">{layer}</th>' for layer in layers) * len(QUANTITIES)
    head = f"<thead><tr>{first}</tr><tr>{below}</tr></thead>"
    return wrap(f'<table class="numbers">{head}<tbody>{"".join(body)}</tbody></table>')


def units(sections: Sequence[Section]) -> str:
    """The units of a table. Where runs differ, both: the rows' protocols tell which."""
    return " or ".join(sorted({unit for section in sections for unit in section.frame["units"].unique()})) or "bits"


def _tokens(frame: pl.DataFrame, column: str) -> str:
    """Mean, range and sum of a token count over items; one layer of one stack stands for all, for they share the positions."""
    if frame.is_empty():
        return "–"
    one = frame.group_by("stack", "item", maintain_order=True).agg(pl.col(column).max())
    texts = []
    for stack in one["stack"].unique(maintain_order=True):
        n = [int(count) for count in one.filter(pl.col("stack") == stack)[column]]
        name = f"{escape(stack)}: " if one["stack"].n_unique() > 1 else ""
        texts.append(f"{name}{number(sum(n) / len(n), 1)} ({min(n)} to {max(n)}; {sum(n):,} in all)")
    return "<br>".join(texts)


def wrap(table: str) -> str:
    """A table that scrolls by itself where the page is narrow."""
    return f'<div class="table">{table}</div>'


def sessions(held: Sequence[Mapping[str, Any]]) -> str:
    """Who asked, when, and with what."""
    parts = ["<h4>Sessions</h4>"]
    for session in held:
        versions = ", ".join(f"{name} {version}" for name, version in (session.get("versions") or {}).items())
        where = [session.get("started"), versions, session.get("platform"), session.get("device")]
        if session.get("threads"):
            where.append(f"{session['threads']} threads")
        parts.append(f"<pre>{escape(str(session.get('command') or 'command not recorded'))}</pre>")
        parts.append(f'<p class="note">{escape("; ".join(str(part) for part in where if part))}</p>')
    return "".join(parts) if held else ""
