"""The figures of mismatched decoding, from the tables of its experiments: `decoding_information` and `decoding_effects` make them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from unisonde.report import decoding_effects as effects
from unisonde.report import decoding_information as information
from unisonde.report.grid import Grid
from unisonde.study.decoding.results import Results


def grids(results: Results, number: int) -> dict[str, Grid]:
    """The figures of the experiments in a folder, by experiment. `number` sets their files apart from those of other folders."""
    made = {
        "gmi": information.present_and_usable,
        "probes": information.along_the_model,
        "directions": effects.modes,
        "ablate": effects.removals,
        "bound": effects.bounds,
        "lora": effects.interventions,
    }
    words = re.sub(r"[^A-Za-z0-9]+", "-", results.model).strip("-").lower()[:60]
    found: dict[str, Grid] = {}
    for name, make in made.items():
        if name in results.tables and len(results.tables[name]):
            title = f"{results.model} on {results.data}"
            found[name] = make(results, f"{number}-{words}-decoding-{name}", title)
    return found


def draw(folder: Path | str, experiment: str) -> list[Path]:
    """The figure of an experiment as PDF and PNG beside its table.

    Raises:
        ImportError: matplotlib is not installed.
    """
    grid = grids(Results.open(folder), 1)[experiment]
    try:
        from unisonde.report.grid_print import save

        return save(replace(grid, name=experiment), Path(folder))
    except ImportError:
        raise ImportError("matplotlib is needed: pip install 'unisonde[report]'") from None
