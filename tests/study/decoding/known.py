"""Features with known answers, as the run folders in which models' features lie; and labelled items for tiny models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from bridges import picture, sound

from unisonde.data.item import Item
from unisonde.runs.run import Part, Run
from unisonde.study.decoding.features import LABEL, Features, Hook


def folder_of(
    folder: Path,
    vectors: Mapping[Hook, np.ndarray],
    labels: Mapping[str, Sequence[str]] | None = None,
    model: str = "synthetic",
    digest: str = "0",
) -> Features:
    """A run folder with these vectors, in two parts."""
    identity = {"models": [{"name": model}], "data": {"name": "made", "digest": {"text": digest}}, "tasks": ["text"]}
    run = Run.begin(folder, identity, {})
    count = len(next(iter(vectors.values())))
    for number, rows in enumerate((range(count // 2), range(count // 2, count))):
        columns: dict[str, pl.Series] = {"item": pl.Series([f"item-{k:03d}" for k in rows])}
        columns |= {LABEL + name: pl.Series([str(held[k]) for k in rows]) for name, held in (labels or {}).items()}
        for hook, x in vectors.items():
            columns[hook.column] = pl.Series(x[list(rows)].astype(np.float32), dtype=pl.Array(pl.Float32, x.shape[1]))
        run.add(f"00-features-{number:05d}", Part(features=pl.DataFrame(columns)))
    return Features(run)


def balanced(count: int, kinds: int, seed: int = 0) -> np.ndarray:
    """Numbers 0 to kinds - 1, each equally often, in random order."""
    return np.random.default_rng(seed).permutation(np.arange(count) % kinds)


SPEAKERS = ("ann", "bob")


def recordings(count: int) -> list[Item]:
    """Short tones of two "speakers"."""
    return [
        Item(
            f"r{k}", "c", "who speaks?", labels={"speaker": SPEAKERS[k % 2], "take": k // 2, "scene": object()}, audio=sound(0.2, k)
        )
        for k in range(count)
    ]


def pictures(count: int) -> list[Item]:
    return [Item(f"p{k}", "c", "what?", picture(12, 9, k), labels={"shape": ("ring", "disc")[k % 2]}) for k in range(count)]
