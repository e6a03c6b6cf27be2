"""What an experiment gives (a table, a sentence, the interval that the sentence states), and its finished steps."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl
import torch
from rich.console import Console
from rich.progress import track

from unisonde.measure import Interval, bootstrap, paired_permutation
from unisonde.runs.run import flush, write_whole
from unisonde.study.decoding.splits import coded

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """The outcome of an experiment.

    Attributes:
        table: tidy, one row a measured thing.
        sentence: what was found, with its interval.
        interval: that interval.
        used: how it was found: `group`, `folds`, items `judged`, whatever there is of it, and `seconds`.
    """

    table: pl.DataFrame
    sentence: str
    interval: Interval
    used: Mapping[str, Any] = field(default_factory=dict)

    @property
    def attribute(self) -> str:
        """The attribute that it is about; empty if it is about none, or several."""
        held = self.table["attribute"].unique().to_list() if "attribute" in self.table.columns else []
        return str(held[0]) if len(held) == 1 else ""


def interval(
    values: Sequence[float] | np.ndarray, groups: Sequence[Any] | np.ndarray | None = None, draws: int = 1000, seed: int = 0
) -> Interval:
    """The mean of one number an item (n,), with its 95% bootstrap interval; groups are drawn whole, where there are any."""
    array = np.asarray(values, dtype=np.float64)
    if groups is None:
        return bootstrap(array, draws=draws, seed=seed)
    numbers, names = coded(groups)
    totals = np.stack([np.bincount(numbers, array, len(names)), np.bincount(numbers, minlength=len(names))], axis=1)
    found = bootstrap(totals, _ratio, draws=draws, seed=seed)
    return Interval(found.value, found.low, found.high, found.stderr, found.level, len(array))


def _ratio(totals: np.ndarray) -> Any:
    return totals[:, 0].sum() / totals[:, 1].sum()


def flipped(values: np.ndarray, groups: Sequence[Any] | np.ndarray | None = None, seed: int = 0) -> float:
    """p of a mean of differences (n,) against zero, by random signs of items, or of whole groups."""
    if groups is not None:
        numbers, names = coded(groups)
        values = np.bincount(numbers, values, len(names))
    return paired_permutation(values, np.zeros_like(values), seed=seed).p


def said(found: Interval, form: str = "{:.2f}") -> str:
    """`0.95 (0.91 to 0.98)`; what rounds to zero has no sign."""

    def one(value: float) -> str:
        text = form.format(value)
        return text.lstrip("+-") if float(text) == 0 else text

    return one(found.value) if math.isnan(found.low) else f"{one(found.value)} ({one(found.low)} to {one(found.high)})"


class Steps:
    """The finished steps of an experiment in a folder, each a table that is written whole; without a folder, nothing is kept.

    Steps of other settings have a folder of their own beside them, so that nothing old is taken for new.

    Args:
        folder: where they are, or None.
        settings: what was asked for.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path | str | None, settings: Mapping[str, Any]) -> None:
        self.seconds = 0.0
        """How long the steps of these settings took to make, in this call and earlier ones."""
        self.folder = None
        if folder is None:
            return
        written = json.dumps(settings, indent=1, sort_keys=True)
        self.folder = Path(folder) / hashlib.sha256(written.encode()).hexdigest()[:12]
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "settings.json").exists():
            write_whole(self.folder / "settings.json", written + "\n")
        if (self.folder / "seconds.json").exists():
            self.seconds = float(json.loads((self.folder / "seconds.json").read_text(encoding="utf-8")))

    def table(self, name: str, make: Callable[[], pl.DataFrame]) -> pl.DataFrame:
        """The table of a step: as it was kept, or made and kept now."""
        path = None if self.folder is None else self.folder / f"{name}.parquet"
        if path is not None and path.is_file():
            return pl.read_parquet(path)
        began = time.monotonic()
        made = make()
        self.seconds += time.monotonic() - began
        if path is not None:
            write_table(made, path)
            write_whole(path.with_name("seconds.json"), f"{self.seconds}\n")
        return made


def write_table(table: pl.DataFrame, path: Path) -> None:
    """Write or replace a table: what was there, or all of the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        table.write_parquet(partial)
        flush(partial)
        partial.replace(path)
        flush(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def side_by_side(function: Callable[[S], T], items: Sequence[S], device: torch.device) -> list[T]:
    """A function of every item, in order: on a processor one item a thread, where a small decoder makes little of several threads."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads, "items", torch.set_num_threads, (1,)) as pool:
        return list(pool.map(function, items))


def ticking(steps: Iterable[T], what: str, progress: bool, total: int | None = None) -> Iterator[T]:
    """The same steps, with a progress bar on stderr if it is wanted."""
    yield from track(steps, what, total, console=Console(stderr=True), disable=not progress)
