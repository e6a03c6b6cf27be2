"""Feature vectors: what every layer of a bridged model makes of labelled items, one vector an item, in a run folder.

Of each item and each layer of encoder, adapter and decoder there is the mean over the content positions that hold the item's
sound or picture (of an item of text alone, its words): pool `mean`. Of the decoder there is also the state at the last position
of the prompt, from which the first token of the answer is read: pool `last`. In the adapter, layer 0 is what enters it and layer
1 what the decoder gets; in encoder and decoder layer 0 is the embedding and the last layer follows the last norm, if there is one
(DESIGN.md, "state").

A run of features is a run folder like others: it goes on where it was, records the items that failed, and holds no measurements.
Its `features.parquet` has one row an item, the labels in columns `label:NAME` and the vectors in columns `STACK:LAYER:POOL`, so
that one layer is read without the others.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch

from unisonde.data.catalogue import data_digest
from unisonde.data.item import Item
from unisonde.models.bridged import Bridged
from unisonde.models.trace import LayerStates, Reading, Trace
from unisonde.runs.probe import session
from unisonde.runs.run import Part, Run
from unisonde.study.decoding.finding import ticking

Pool = Literal["mean", "last"]
LABEL = "label:"
CHUNK = 16
"""Items that are written together: what a killed run loses at most."""


@dataclass(frozen=True)
class Hook:
    """A place at which vectors are taken."""

    stack: str
    layer: int
    pool: Pool = "mean"

    @property
    def column(self) -> str:
        return f"{self.stack}:{self.layer}:{self.pool}"

    @classmethod
    def of(cls, column: str) -> Hook:
        stack, layer, pool = column.split(":")
        return cls(stack, int(layer), pool)  # type: ignore[arg-type]


ADAPTER_OUT = Hook("adapter", 1)
"""What the adapter hands to the decoder."""


class Features:
    """A run of features, for reading. Rows are items in the order in which they were given, without those that failed."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._files = [file for part in run.parts() if (file := part / "features.parquet").is_file()]
        if not self._files:
            raise ValueError(f"{run.folder} holds no feature vectors; collect them first")

    @classmethod
    def open(cls, folder: Path | str) -> Features:
        """Those of a folder.

        Raises:
            ValueError: it is no run, or holds no feature vectors.
        """
        return cls(Run.open(folder))

    @property
    def model(self) -> str:
        return self.run.identity["models"][0]["name"]

    @property
    def data(self) -> str:
        return self.run.identity["data"]["name"]

    @property
    def digest(self) -> str:
        """Of the items, as they were shown."""
        return self.run.identity["data"]["digest"]["text"]

    @cached_property
    def _columns(self) -> list[str]:
        return pl.scan_parquet(self._files[0]).collect_schema().names()

    @cached_property
    def table(self) -> pl.DataFrame:
        """The items: `item` and a column `label:NAME` for each label."""
        return self._read("item", *(c for c in self._columns if c.startswith(LABEL)))

    def __len__(self) -> int:
        return len(self.table)

    @property
    def hooks(self) -> list[Hook]:
        """Where vectors were taken, in the order in which a model runs."""
        return [Hook.of(column) for column in self._columns if column != "item" and not column.startswith(LABEL)]

    @property
    def attributes(self) -> list[str]:
        """The names of the labels."""
        return [column.removeprefix(LABEL) for column in self._columns if column.startswith(LABEL)]

    @property
    def last(self) -> Hook:
        """The decoder's last layer, after its last norm, by the mean."""
        return max((hook for hook in self.hooks if hook.stack == "llm" and hook.pool == "mean"), key=lambda hook: hook.layer)

    def at(self, hook: Hook) -> np.ndarray:
        """The vectors of a hook, (n, d) float32.

        Raises:
            ValueError: there are none.
        """
        if hook not in self.hooks:
            raise ValueError(
                f"{self.run.folder} has no vectors of {hook.column}; there are {', '.join(h.column for h in self.hooks)}"
            )
        return self._read(hook.column)[hook.column].to_numpy()

    def labels(self, attribute: str) -> np.ndarray:
        """The labels of an attribute, (n,) texts.

        Raises:
            ValueError: there is no such attribute, or an item lacks it.
        """
        if attribute not in self.attributes:
            raise ValueError(f"no item has a label {attribute!r}; there are {', '.join(self.attributes) or 'none'}")
        held = self.table[LABEL + attribute]
        if held.null_count():
            raise ValueError(f"item {self.table.filter(held.is_null())['item'][0]!r} has no label {attribute!r}; leave it out")
        return np.array(held.to_list())

    @property
    def seconds(self) -> float:
        """How long it took to take them."""
        return float(self.run.items()["seconds"].sum())

    @cached_property
    def kept(self) -> str:
        """A digest of the items that could be taken."""
        return hashlib.sha256("\n".join(self.table["item"]).encode()).hexdigest()[:16]

    def groups(self, group: str | None) -> np.ndarray | None:
        """The labels by which items are kept together, or None."""
        return None if group is None else self.labels(group)

    def _read(self, *columns: str) -> pl.DataFrame:
        return pl.scan_parquet(self._files).select(columns).collect()


def collect(
    model: Bridged,
    items: Sequence[Item],
    out: Path | str,
    *,
    name: str = "items",
    truncate: bool = False,
    retry: bool = False,
    progress: bool = True,
) -> Features:
    """Take the vectors of items; go on where an earlier call stopped.

    Args:
        items: of one modality. Labels that are texts or numbers are kept.
        out: the run folder.
        name: of the data.
        truncate: cut prompts and recordings that are too long, and flag them; otherwise they fail.
        retry: take items that failed in an earlier session again.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: there are no items, two have one id, they are of several modalities, the folder holds another run, or every
            item failed.
        OSError: the folder cannot be written.
    """
    _check(items)
    labels = [labels_of(item) for item in items]
    names = sorted({name for held in labels for name in held})
    identity = {
        "models": [model.identity()],
        "data": {
            "name": name,
            "items": {"text": len(items)},
            "digest": {"text": data_digest(items)},
            "labels": hashlib.sha256(json.dumps(labels, sort_keys=True).encode()).hexdigest()[:16],
        },
        "tasks": ["text"],
        "features": names,
        "truncate": truncate,
    }
    run = Run.begin(out, identity, session(model.device))
    with run.lock():
        if retry:
            run.drop_failures()
        starts = range(0, len(items), CHUNK)
        for start in ticking(starts, f"features of {name}", progress):
            part_name = f"00-features-{start // CHUNK:05d}"
            if not run.has(part_name):
                run.add(part_name, _part(model, items[start : start + CHUNK], labels[start : start + CHUNK], names, name, truncate))
    if not any((part / "features.parquet").is_file() for part in run.parts()):
        raise ValueError(f"none of the {len(items)} items could be taken: {run.items()['error'][0]}")
    return Features(run)


def _check(items: Sequence[Item]) -> None:
    if not items:
        raise ValueError("there are no items to take features of")
    if len({item.id for item in items}) < len(items):
        raise ValueError("two items have the same id; give each its own")
    if len(kinds := sorted({item.modality for item in items})) > 1:
        raise ValueError(f"items have prompts of {' and '.join(kinds)}; take the features of each kind into a folder of its own")


def labels_of(item: Item) -> dict[str, str]:
    """The labels of an item that are texts, numbers or truth values, as texts."""
    return {name: str(value) for name, value in item.labels.items() if isinstance(value, (str, int, float, bool))}


def _part(
    model: Bridged, items: Sequence[Item], labels: Sequence[dict[str, str]], names: Sequence[str], data: str, truncate: bool
) -> Part:
    part = Part()
    rows: list[dict[str, Any]] = []
    for item, held in zip(items, labels, strict=True):
        began = time.monotonic()
        row: dict[str, Any] = {"model": model.name, "data": data, "task": "text", "item": item.id, "category": item.category}
        row |= {"modality": item.modality, "prompt": item.prompt, "flags": ""}
        try:
            vectors = _Vectors(item)
            [flags] = model.show([item], Trace(vectors), truncate)
            row |= {"flags": ",".join(flags), "n_prompt": vectors.positions}
            rows.append({"item": item.id} | {LABEL + name: held.get(name) for name in names} | vectors.read())
        except (MemoryError, torch.OutOfMemoryError):  # of the machine, not of the item
            raise
        except Exception as error:  # one item that fails is recorded, and the others go on
            row["error"] = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        part.items.append(row | {"seconds": time.monotonic() - began})
    if rows:
        part.features = pl.DataFrame([_column(key, [row[key] for row in rows]) for key in rows[0]])
    return part


def _column(name: str, values: list[Any]) -> pl.Series:
    if isinstance(values[0], np.ndarray):
        return pl.Series(name, np.stack(values), dtype=pl.Array(pl.Float32, len(values[0])))
    return pl.Series(name, values, dtype=pl.String)


class _Vectors:
    """Observes the states of one item and keeps one vector a hook, where the states are."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self.taken: dict[Hook, torch.Tensor] = {}
        self.positions = 0
        """Of the decoder over which the mean was taken."""

    def __call__(self, seen: LayerStates) -> None:
        held = seen.select("prompt", Reading(), self.item.modality)
        self.taken[Hook(seen.stack, seen.layer)] = held.double().mean(0).float()
        if seen.stack == "llm":
            self.positions = len(held)
            # A copy: a view would keep the states of all positions.
            self.taken[Hook(seen.stack, seen.layer, "last")] = seen.states[-1].float().clone()

    def read(self) -> dict[str, np.ndarray]:
        """By column: all vectors of one width leave their device together."""
        widths: dict[int, list[Hook]] = {}
        for hook, vector in self.taken.items():
            widths.setdefault(len(vector), []).append(hook)
        together = [torch.stack([self.taken[hook] for hook in hooks]).cpu().numpy() for hooks in widths.values()]
        found = {
            hook: row for hooks, rows in zip(widths.values(), together, strict=True) for hook, row in zip(hooks, rows, strict=True)
        }
        for hook in self.taken:
            if not np.isfinite(found[hook]).all():
                raise ValueError(f"the states of item {self.item.id!r} at {hook.column} are not finite")
        return {hook.column: found[hook] for hook in self.taken}
