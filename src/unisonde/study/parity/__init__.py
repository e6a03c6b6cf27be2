"""Parity: our models against recorded outputs of the official code, array by array. `unisonde verify FOLDER` is this room.

Each family has a file here with a function `check(fixture)` that builds our model from the official weights, runs our own prompt
assembly, masks, positions and samplers, and compares. A family is checked if its files are in the folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from math import isfinite
from pathlib import Path

from unisonde.study.parity.fixture import Difference, Fixture

FAMILIES: dict[str, str] = {
    name: f"unisonde.study.parity.{name}"
    for name in ("janus_pro", "janusflow", "showo", "showo_magvit", "showo2", "harmon", "bagel", "omnigen2")
}
"""Name of a fixture -> the module that checks it. A fixture without arrays of its own (an autoencoder) belongs to its family."""


@dataclass(frozen=True)
class Verdict:
    """What became of one fixture.

    Attributes:
        arrays: how many the file holds.
        inputs: how many were fed.
        compared: how many were compared.
        left: outputs that were not compared.
        wrong: comparisons outside the tolerance.
        largest: the largest difference of a floating-point output; None if one has none, for its shape or a number that is not finite.
        error: why the check could not be run to its end, if so.
    """

    name: str
    arrays: int
    inputs: int
    compared: int
    left: tuple[str, ...]
    wrong: tuple[Difference, ...]
    largest: float | None
    error: str = ""

    @property
    def ok(self) -> bool:
        return not (self.left or self.wrong or self.error) and self.compared > 0


def verify(folder: Path) -> list[Verdict]:
    """Check every family whose fixture is in `folder`.

    Raises:
        ValueError: there is none.
    """
    folder = Path(folder)
    found = [name for name in FAMILIES if (folder / f"{name}.npz").is_file()]
    if not found:
        raise ValueError(f"{folder} has no parity fixture: none of {', '.join(f'{name}.npz' for name in FAMILIES)} is there")
    return [_verdict(folder, name) for name in found]


def _verdict(folder: Path, name: str) -> Verdict:
    module = import_module(FAMILIES[name])
    fixture = Fixture(folder, name, module.INPUTS)
    arrays, error = 0, ""
    try:
        arrays = len(fixture.arrays)
        module.check(fixture)
    except Exception as problem:  # whatever is wrong with one fixture must not hide the other families
        error = f"{type(problem).__name__}: {problem}"
    differences = fixture.differences.values()
    largest = max((d.largest for d in differences if not d.exact), default=0.0)
    return Verdict(
        name,
        arrays,
        len(fixture.fed),
        len(differences),
        tuple(fixture.left) if arrays else (),
        tuple(d for d in differences if not d.ok),
        largest if isfinite(largest) else None,
        error,
    )
