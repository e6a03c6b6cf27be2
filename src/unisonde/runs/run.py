"""A run folder: the only state there is.

    first/
      run.json                      what was asked (identity) and who asked when (sessions)
      parts/00-image-00003/         one chunk of items, written whole
        measurements.parquet        the numbers
        items.parquet               the items, their responses, or the error that an item met
        states.safetensors          the states themselves, if they were asked for
        features.parquet            one vector an item at every layer, in a run that collects those (`unisonde.study.decoding`)

A part is written under a temporary name, flushed to the disk and renamed, so it is there whole or not at all; a run that is killed
goes on with the chunks that have no part. Nothing else is remembered anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
from filelock import FileLock, Timeout
from torch import Tensor

FORMAT = 1

MEASUREMENTS: dict[str, Any] = {
    "run": pl.String,
    "model": pl.String,
    "data": pl.String,
    "item": pl.String,
    "category": pl.String,
    "task": pl.String,
    "level": pl.String,
    "modality": pl.String,
    "quantity": pl.String,
    "stack": pl.String,
    "layer": pl.Int32,
    "step": pl.String,
    "value": pl.Float64,
    "ceiling": pl.Float64,
    "stderr": pl.Float64,
    "units": pl.String,
    "n_prompt": pl.Int32,
    "n_response": pl.Int32,
    "flags": pl.String,
    "protocol": pl.String,
    "reading": pl.String,
    "generation": pl.String,
    "seed": pl.Int64,
}
"""Columns of `measurements()`. All but `value, ceiling, stderr, flags` are the key; none of those is ever null."""

KEY = tuple(name for name in MEASUREMENTS if name not in ("value", "ceiling", "stderr", "flags"))

ITEMS: dict[str, Any] = {
    "model": pl.String,
    "data": pl.String,
    "task": pl.String,
    "item": pl.String,
    "category": pl.String,
    "modality": pl.String,
    "prompt": pl.String,
    "prompt_image": pl.Binary,
    "response_text": pl.String,
    "response_image": pl.Binary,
    "n_prompt": pl.Int32,
    "n_response": pl.Int32,
    "flags": pl.String,
    "seconds": pl.Float64,
    "error": pl.String,
}
"""Columns of `items()`. `error` is null for an item that was measured."""


@dataclass
class Part:
    """What one chunk of items gave, in memory: rows of the two tables, and states or feature vectors if they are kept."""

    measurements: list[dict[str, Any]] = field(default_factory=list)
    items: list[dict[str, Any]] = field(default_factory=list)
    states: dict[str, Tensor] = field(default_factory=dict)
    features: pl.DataFrame | None = None

    @property
    def failed(self) -> int:
        return sum(row["error"] is not None for row in self.items)


class Run:
    """A run folder, opened for reading, or begun or gone on with by `Run.begin`."""

    def __init__(self, folder: Path, info: dict[str, Any]) -> None:
        self.folder = folder
        self.info = info

    def __repr__(self) -> str:
        models = ", ".join(model["name"] for model in self.identity["models"])
        return f"Run({str(self.folder)!r}: {models} on {self.identity['data']['name']}, {len(self.parts())} parts)"

    @classmethod
    def open(cls, folder: Path | str) -> Run:
        """An existing run.

        Raises:
            ValueError: the folder is not a run, or was written by another version of the format.
        """
        folder = Path(folder)
        try:
            info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{folder} is not a run: it has no run.json; make one with `unisonde probe`") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{folder / 'run.json'} is damaged ({error}); the parts beside it are readable by polars") from None
        if info.get("format") != FORMAT:
            raise ValueError(f"{folder} has run format {info.get('format')}, this version of unisonde reads {FORMAT}")
        return cls(folder, info)

    @classmethod
    def begin(cls, folder: Path | str, identity: dict[str, Any], session: dict[str, Any]) -> Run:
        """Begin a run in `folder`, or go on with the one that is there if it asks for the same.

        Raises:
            ValueError: the folder holds another run (the sentence says what differs), or something that is no run.
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        identity = json.loads(json.dumps(identity))  # as it will be read back
        if (folder / "run.json").exists():
            run = cls.open(folder)
            differences = compare(run.identity, identity)
            if differences:
                raise ValueError(
                    f"{folder} holds a run with {'; '.join(differences[:4])}; name another folder with --out, or ask for the same again"
                )
        elif folder.exists() and not _unbegun(folder):
            raise ValueError(f"{folder} holds files that are no run; name another folder with --out")
        else:
            run = cls(folder, {"format": FORMAT, "identity": identity, "sessions": []})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "parts").mkdir(exist_ok=True)
        with run.lock():  # a session that is refused because another one writes is not recorded
            run.info["sessions"].append(session)
            write_whole(folder / "run.json", json.dumps(run.info, indent=1) + "\n")
        return run

    def lock(self) -> FileLock:
        """Held while a session writes: two at once would measure everything twice."""
        lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"another session is writing to {self.folder}; wait for it, or name another folder with --out"
            ) from None
        for stale in (self.folder / "parts").glob(".*.partial"):
            shutil.rmtree(stale, ignore_errors=True)
        return lock

    @property
    def identity(self) -> dict[str, Any]:
        return self.info["identity"]

    @property
    def id(self) -> str:
        """The name of the run in its rows: the folder's name and a hash of what was asked."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.folder.resolve().name}-{digest}"

    # --------------------------------------------------------------------------------------------------------------- parts

    def parts(self) -> list[Path]:
        """The parts that are whole, in order."""
        return sorted(p for p in (self.folder / "parts").glob("[!.]*") if p.is_dir())

    def has(self, name: str) -> bool:
        return (self.folder / "parts" / name).is_dir()

    def add(self, name: str, part: Part) -> None:
        """Write a part whole: all of it is there afterwards, or nothing.

        Raises:
            OSError: no space, or no permission; nothing is left behind.
        """
        final = self.folder / "parts" / name
        partial = final.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            pl.DataFrame(part.measurements, schema=MEASUREMENTS).write_parquet(partial / "measurements.parquet")
            pl.DataFrame(part.items, schema=ITEMS).write_parquet(partial / "items.parquet")
            if part.states:
                from safetensors.torch import save_file

                save_file(part.states, partial / "states.safetensors")
            if part.features is not None:
                part.features.write_parquet(partial / "features.parquet")
            for file in partial.iterdir():
                flush(file)
            flush(partial)
            partial.rename(final)
            flush(final.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def drop_failures(self) -> int:
        """Remove the parts in which an item failed, so that the next session measures them again. Returns their number."""
        failed = [part for part in self.parts() if pl.read_parquet(part / "items.parquet")["error"].is_not_null().any()]
        for part in failed:
            shutil.rmtree(part)
        return len(failed)

    # -------------------------------------------------------------------------------------------------------------- tables

    def scan(self) -> pl.LazyFrame:
        """The measurements, lazily."""
        return self._scan("measurements.parquet", MEASUREMENTS)

    def measurements(self) -> pl.DataFrame:
        """The measurements: one number a row, with everything that produced it (DESIGN.md, "Public interface")."""
        return self.scan().collect()

    def items(self) -> pl.DataFrame:
        """The items: prompt, response, token counts, seconds, and the error of those that failed."""
        return self._scan("items.parquet", ITEMS).collect()

    def _scan(self, file: str, schema: Mapping[str, Any]) -> pl.LazyFrame:
        files = [part / file for part in self.parts()]
        return pl.scan_parquet(files) if files else pl.LazyFrame(schema=schema)


def _unbegun(folder: Path) -> bool:
    """Whether a folder is empty, or holds only what a session leaves that ends before its run.json is written."""
    own = {"parts", ".lock", ".run.json.partial"}
    return {path.name for path in folder.iterdir()} <= own and not any(folder.glob("parts/*"))


def compare(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """What differs between two identities, one phrase each: `protocol.alpha = 1.01 where 2.0 is asked for`."""
    found: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if a == b:
            continue
        where = f"{path}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += compare(a, b, f"{where}.")
        elif isinstance(a, Sequence) and isinstance(b, Sequence) and len(a) == len(b) and isinstance(next(iter(a), None), Mapping):
            for k, (x, y) in enumerate(zip(a, b, strict=True)):
                found += compare(x, y, f"{where}[{k}].")
        else:
            found.append(f"{where} = {json.dumps(a)} where {json.dumps(b)} is asked for")
    # A digest says no more than the fields it stands for.
    return [f for f in found if "digest =" not in f] or found


def write_whole(path: Path, text: str) -> None:
    """Replace a small file: the old text or the new, never a part."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Make sure that a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
