"""What experiments leave in a folder, to be read by people and by the report.

    OUT/NAME.parquet      the table of an experiment
    OUT/NAME.json         its sentences with their intervals, what was asked, and who asked when

Attributes may be asked for one after another, each with a group of its own: what is measured again takes the place of what was there
of the same attribute, and all else stays.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from unisonde.runs.run import compare, write_whole
from unisonde.study.decoding.finding import Finding, write_table

ABOUT = ("model", "data", "items")
"""What all experiments of a folder have in common."""


@dataclass(frozen=True)
class Results:
    """The experiments of one model on one data set.

    Attributes:
        folder: where they are.
        tables: by experiment.
        told: what the `.json` files say, by experiment: `model`, `data`, `items`, `sessions`, and `findings`, each with `attribute`
            (empty if it is about none, or about all), `sentence`, `interval` and what was asked for.
    """

    folder: Path
    tables: dict[str, pl.DataFrame]
    told: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, folder: Path | str) -> Results:
        """Those of a folder.

        Raises:
            ValueError: it holds none, or a file of them is damaged.
        """
        folder = Path(folder)
        told = {path.stem: _read(path) for path in _files(folder)}
        if not told:
            raise ValueError(f"{folder} holds no experiments; make some with `unisonde decode`")
        return cls(folder, {name: pl.read_parquet(folder / f"{name}.parquet") for name in told}, told)

    @classmethod
    def are_in(cls, folder: Path | str) -> bool:
        """Whether a folder holds experiments, and is no run."""
        return not (Path(folder) / "run.json").exists() and bool(_files(Path(folder)))

    @property
    def model(self) -> str:
        return str(self._any["model"])

    @property
    def data(self) -> str:
        return str(self._any["data"])

    @property
    def items(self) -> int:
        return int(self._any["items"])

    @property
    def _any(self) -> dict[str, Any]:
        return next(iter(self.told.values()))

    def findings(self, name: str) -> list[dict[str, Any]]:
        """What an experiment found, in the order in which it was asked for; nothing if it was not run."""
        return self.told.get(name, {}).get("findings", [])


def check(out: Path, about: Mapping[str, Any]) -> None:
    """Raises ValueError if a folder holds experiments of another model or other items."""
    for path in _files(out):
        held = _read(path)
        if differences := compare({key: held.get(key) for key in ABOUT}, {key: about[key] for key in ABOUT}):
            raise ValueError(f"{out} holds {path.stem} with {'; '.join(differences)}; name another folder")


def add(
    out: Path,
    name: str,
    found: Sequence[Finding],
    about: Mapping[str, Any],
    asked: Mapping[str, Any],
    session: Mapping[str, Any],
) -> pl.DataFrame:
    """Write findings into a folder, beside those of other attributes. Returns the table of all of them.

    Args:
        about: `ABOUT`.
        asked: settings that stand with each finding, beside what it used.
        session: who asks, when.
    """
    told_path, table_path = out / f"{name}.json", out / f"{name}.parquet"
    table = pl.concat([finding.table for finding in found], how="diagonal_relaxed")
    told = {"experiment": name, **about, "sessions": [], "findings": []}
    new = {finding.attribute for finding in found}
    if told_path.is_file() and table_path.is_file():
        held = _read(told_path)
        told |= {"sessions": held.get("sessions", [])}
        told |= {"findings": [finding for finding in held.get("findings", []) if finding["attribute"] not in new]}
        kept = pl.read_parquet(table_path)
        if "attribute" in kept.columns and "attribute" in table.columns:
            kept = kept.filter(~pl.col("attribute").is_in(sorted(new)))
            table = pl.concat([kept, table], how="diagonal_relaxed")
    told["sessions"] = [*told["sessions"], dict(session)]
    told["findings"] = [*told["findings"], *(_told(finding) | dict(asked) | dict(finding.used) for finding in found)]
    write_table(table, table_path)
    write_whole(told_path, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    return table


def tell(out: Path, name: str, found: Finding) -> None:
    """Put a sentence over all attributes (its attribute is empty) in the place of an earlier one."""
    told = _read(out / f"{name}.json")
    told["findings"] = [*(finding for finding in told["findings"] if finding["attribute"]), _told(found)]
    write_whole(out / f"{name}.json", json.dumps(told, indent=1, ensure_ascii=False) + "\n")


def _told(found: Finding) -> dict[str, Any]:
    held = found.interval
    bounds = {key: getattr(held, key) for key in ("value", "low", "high", "level")}
    # JSON has no number for "none".
    bounds = {key: value if value == value else None for key, value in bounds.items()}
    return {"attribute": found.attribute, "sentence": found.sentence, "interval": bounds}


def _files(folder: Path) -> list[Path]:
    """The `.json` files that have a table beside them."""
    return [path for path in sorted(folder.glob("*.json")) if path.with_suffix(".parquet").is_file()]


def _read(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); run its experiment again") from None
    if not isinstance(told, dict) or "findings" not in told:
        raise ValueError(f"{path} is no finding of `unisonde decode`; move it elsewhere")
    return told
