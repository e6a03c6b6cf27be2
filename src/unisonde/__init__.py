"""unisonde: an instrument for looking inside unified multimodal models.

import unisonde

unisonde.entropy(states)                     # numbers from arrays
model = unisonde.load("twin/janus-pro")      # models
run = unisonde.probe(model, "tabletop", ("text", "image"), "runs/first", limit=50)
run.measurements()                           # a table

Names are imported when they are used, so that `import unisonde` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from unisonde.data import DATA, Item, open_data
    from unisonde.measure import Estimate, Protocol, conditional_entropy, entropy, gmi
    from unisonde.models import MODELS, Generation, Model, Reading, load
    from unisonde.models.watch import watch
    from unisonde.report import write_report
    from unisonde.runs import Run, probe
    from unisonde.study.score import score

_HOMES = {
    "DATA": "unisonde.data",
    "Item": "unisonde.data",
    "open_data": "unisonde.data",
    "Estimate": "unisonde.measure",
    "Protocol": "unisonde.measure",
    "conditional_entropy": "unisonde.measure",
    "entropy": "unisonde.measure",
    "gmi": "unisonde.measure",
    "MODELS": "unisonde.models",
    "Generation": "unisonde.models",
    "Model": "unisonde.models",
    "Reading": "unisonde.models",
    "load": "unisonde.models",
    "watch": "unisonde.models.watch",
    "write_report": "unisonde.report",
    "Run": "unisonde.runs",
    "probe": "unisonde.runs",
    "score": "unisonde.study.score",
}

__all__ = [
    "DATA",
    "MODELS",
    "Estimate",
    "Generation",
    "Item",
    "Model",
    "Protocol",
    "Reading",
    "Run",
    "conditional_entropy",
    "entropy",
    "gmi",
    "load",
    "open_data",
    "probe",
    "score",
    "watch",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unisonde' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
