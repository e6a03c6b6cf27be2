"""Trajectories: a quantity followed through the layers, averaged over items.

A trajectory is what a curve in a figure shows: for each layer of a stack, the mean over items of one quantity, with its spread,
its ceiling and the token counts it rests on. It is computed from stored measurements alone and knows nothing of models.

Curves are told apart by cell, the pair of what was shown and what was asked for: `text → text`, `text → image`,
`image → text`. The question that stands beside an image prompt is text, but no text prompt of its own; it has the cell
`question → text`, so that it never enters the curve of the text prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import polars as pl

CELLS = ("text → text", "text → image", "image → text")
"""The cells that every unified model can have, in the order of tables and legends."""

KEY = ("model", "data", "cell", "stack", "step", "layer")
"""What one row of a trajectory stands for."""

SETTINGS = ("run", "level", "units", "protocol", "reading", "generation", "seed")
"""Columns that must not vary inside one mean: numbers under different settings are different quantities."""

SHORT = 8
"""Below this many tokens an entropy under the median rule says next to nothing; such rows carry the flag `short`."""


def with_cells(frame: pl.DataFrame) -> pl.DataFrame:
    """The measurements with a column `cell`, e.g. `text → image`: the modality of the prompt and the task."""
    shown = pl.when(has_flag("question")).then(pl.lit("question")).otherwise(pl.col("modality"))
    return frame.with_columns(pl.concat_str(shown, pl.lit(" → "), pl.col("task")).alias("cell"))


def has_flag(name: str) -> pl.Expr:
    """Whether a row carries that flag. `flags` is a comma-separated string, empty if there are none."""
    return pl.col("flags").fill_null("").str.split(",").list.eval(pl.element().str.strip_chars()).list.contains(name)


def trajectory(frame: pl.DataFrame, quantity: str, by: Sequence[str] = KEY) -> pl.DataFrame:
    """One quantity layer by layer, over items: one row for each combination of `by`, sorted by it.

    Only finite values count; a row whose values are all left out has `n_items` 0 and null statistics.

    Columns beside those of `by`:
        n_items: how many finite values the statistics rest on, one an item.
        mean: arithmetic mean over items, in `units`.
        sd: sample standard deviation over items (divisor n - 1); null for a single item. It is the spread of items, not the
            uncertainty of the mean.
        q1, median, q3: quartiles over items, interpolated linearly between order statistics.
        ceiling: mean over the same items of those ceilings that are finite; null if none is.
        share: mean value / mean ceiling, both over the items that have a finite ceiling; null unless that mean is above zero.
            The ratio of the means, and not the mean of the ratios, so that an item whose ceiling is nearly zero counts little.
        n_prompt, n_response: mean token counts over the same items.
        n_short: how many of the items carry the flag `short`.
        n_left_out: how many values are not finite.
        units: of `mean`, `sd`, the quartiles and `ceiling`.

    Args:
        frame: measurements (DESIGN.md, columns of `measurements()`), of any quantities.
        quantity: which of them to follow, e.g. `entropy`.
        by: the columns that tell rows apart; `cell` is made here.

    Raises:
        ValueError: `by` names a column that does not exist, an item counts twice in one mean, or the rows of one mean were
            measured under different settings (see `SETTINGS`).
    """
    rows = with_cells(frame.filter(pl.col("quantity") == quantity))
    missing = [name for name in by if name not in rows.columns]
    if missing:
        raise ValueError(f"the measurements have no column {', '.join(missing)}; there are {', '.join(rows.columns)}")
    _refuse_mixtures(rows, quantity, by)

    rows = rows.with_columns(pl.col("value", "ceiling", "n_prompt", "n_response").cast(pl.Float64))
    good = pl.col("value").is_finite().fill_null(False)
    value = pl.col("value").filter(good)
    bounded = good & pl.col("ceiling").is_finite().fill_null(False)
    ceiling = pl.col("ceiling").filter(bounded)
    statistics = {
        "n_items": good.sum().cast(pl.Int64),
        "mean": value.mean(),
        "sd": value.std(ddof=1),
        "q1": value.quantile(0.25, interpolation="linear"),
        "median": value.median(),
        "q3": value.quantile(0.75, interpolation="linear"),
        "ceiling": ceiling.mean(),
        "share": pl.when(ceiling.mean() > 0).then(pl.col("value").filter(bounded).mean() / ceiling.mean()),
        "n_prompt": pl.col("n_prompt").filter(good).mean(),
        "n_response": pl.col("n_response").filter(good).mean(),
        "n_short": (good & has_flag("short")).sum().cast(pl.Int64),
        "n_left_out": (~good).sum().cast(pl.Int64),
        "units": pl.col("units").first(),
    }
    # A column that tells rows apart needs no statistic.
    wanted = [statistic.alias(name) for name, statistic in statistics.items() if name not in by]
    return rows.group_by(list(by)).agg(wanted).sort(list(by))


def by_category(frame: pl.DataFrame, quantity: str) -> pl.DataFrame:
    """As `trajectory`, with the items of each category apart: one row more finely keyed, by `category` as well."""
    return trajectory(frame, quantity, by=(*KEY, "category"))


def final_layer(layers: Iterable[int]) -> int | None:
    """Which of a stack's layers is `final`, the state after the last norm: the last one, L + 1.

    None for a stack of fewer than three layers, which cannot be a residual stream with a final norm behind it.
    """
    last = max(layers, default=0)
    return last if last >= 2 else None


def landmarks(layers: Iterable[int]) -> tuple[int, ...]:
    """The few layers that a table can hold: 0, the middle of the residual stream (L // 2) and `final` (L + 1)."""
    present = sorted(set(layers))
    final = final_layer(present)
    if final is None:
        return tuple(present)
    return 0, (final - 1) // 2, final


def drawn_steps(steps: Iterable[str]) -> tuple[str, ...]:
    """Which steps of one curve a figure draws, the main one first: all but the numbered ones; if there are only those, the last.

    The numbered steps `0000`, `0001`, ... of a sampler are stages on the way to `final`, and would hide it.
    """
    present = sorted(set(steps), key=lambda step: (step != "final", step))
    named = tuple(step for step in present if not step.isdigit())
    return named or tuple(present[-1:])


def _refuse_mixtures(rows: pl.DataFrame, quantity: str, by: Sequence[str]) -> None:
    """Raise if one mean would mix settings, or count an item twice."""
    settings = [name for name in SETTINGS if name in rows.columns and name not in by]
    counts = rows.group_by(list(by)).agg([pl.col(name).n_unique() for name in settings] + [pl.col("item").n_unique(), pl.len()])
    for name in settings:
        if (counts[name] > 1).any():
            values = ", ".join(str(value) for value in rows[name].unique().sort().to_list())
            raise ValueError(
                f"one mean of {quantity} would mix several values of {name} ({values}); filter by {name}, or add it to `by`"
            )
    if (counts["len"] > counts["item"]).any():
        raise ValueError(
            f"an item has several rows of {quantity} in one mean over {', '.join(by)}; add the column that tells them apart to `by`"
        )
