"""Folders of experiments for the tests of the report: made up, with the columns that `unisonde decode` writes.

The numbers follow a story and no model: words are there and become usable late, a speaker is there and never becomes usable, and
a third attribute has a name that must be shown and not obeyed. All layers and attributes differ.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from unisonde.measure import Interval
from unisonde.study.decoding import results
from unisonde.study.decoding.finding import Finding

ODD = 'mood <img src=x onerror="window.hacked=1"> & $x$'
LABELS = {"digit": 10, "speaker": 6, ODD: 4}
ABOUT = {"model": "speech-smollm <i>made up</i>", "data": "fsdd", "items": 300}
ASKED = {"folds": 5, "draws": 10, "seed": 3, "group": None, "texts": 64, "seconds": 12.5}
SESSION = {
    "started": "2026-01-02T03:04:05+0000",
    "command": "unisonde decode gmi speech-smollm --data 'fsdd:<recordings>'",
    "versions": {"unisonde": "0.1.0", "torch": "2.13.0"},
    "platform": "Linux x86_64",
    "device": "cpu",
    "threads": 2,
}


def about(attribute: str, value: float, seed: int) -> tuple[float, float, float]:
    """A value and an interval that is not symmetric."""
    rng = np.random.default_rng([seed, len(attribute)])
    return value, value - 0.05 - 0.1 * rng.random(), value + 0.05 + 0.1 * rng.random()


def named(name: str, triple: tuple[float, float, float], low: str = "low", high: str = "high") -> dict[str, float]:
    return {name: triple[0], f"{name}_{low}": triple[1], f"{name}_{high}": triple[2]}


def depth(layer: int, layers: int) -> float:
    return layer / (layers + 1)


def held(attribute: str, layer: int, layers: int) -> float:
    """Bits that a probe finds where the answer is read."""
    most = math.log2(LABELS[attribute])
    return most * (0.9 if attribute != ODD else 0.5) * (1 - math.exp(-5 * depth(layer, layers)))


def used(attribute: str, layer: int, layers: int) -> float:
    rising = 1 / (1 + math.exp(-14 * (depth(layer, layers) - 0.75)))
    return held(attribute, layer, layers) * rising * {"digit": 0.95, "speaker": 0.04, ODD: 0.3}[attribute]


def gmi_rows(attribute: str, layers: int) -> list[dict[str, Any]]:
    rows = []
    for layer in range(layers + 2):
        present = about(attribute, held(attribute, layer, layers), layer)
        usable = about(attribute, used(attribute, layer, layers), 100 + layer)
        row = {"model": ABOUT["model"], "data": "fsdd", "attribute": attribute, "group": "", "n": 300, "answers": LABELS[attribute]}
        row |= {"folds": 5, "seed": 3, "layer": layer} | named("v_information", present) | named("gmi", usable)
        row |= named("gap", about(attribute, present[0] - usable[0], 200 + layer))
        row |= {"gmi_at_one": usable[0] - 0.4, "calibration_loss": 0.4, "s": 0.3, "accuracy": 0.9, "decoder_accuracy": 0.2}
        rows.append(row | {"ceiling": math.log2(LABELS[attribute])})
    return rows


def probe_rows(attribute: str, layers: int) -> list[dict[str, Any]]:
    hooks = [("encoder", k, "mean") for k in range(4)] + [("adapter", k, "mean") for k in range(2)]
    hooks += [("llm", k, pool) for k in range(layers + 2) for pool in ("mean", "last")]
    rows = []
    for number, (stack, layer, pool) in enumerate(hooks):
        share = 0.95 - 0.005 * number if pool == "mean" else 0.9 * depth(layer, layers)
        row = {"model": ABOUT["model"], "data": "fsdd", "attribute": attribute, "group": "take" if attribute == "digit" else ""}
        row |= {"n": 300, "labels": LABELS[attribute], "folds": 5, "seed": 3, "stack": stack, "layer": layer, "pool": pool}
        row |= named("accuracy", about(attribute, share, number)) | {"uniform": 0.1, "chance": 0.2, "times": share / 0.2}
        bits = about(attribute, share * math.log2(LABELS[attribute]), 300 + number)
        row |= {"v_information": bits[0], "v_low": bits[1], "v_high": bits[2], "ceiling": math.log2(LABELS[attribute])}
        null = -0.02 * (1 + math.sin(number))
        row |= {"null_accuracy": 0.2, "null_v_information": null, "p": 1 / 6, "strength": 0.01, "retention": share}
        rows.append(row)
    return rows


def direction_rows(layers: int) -> list[dict[str, Any]]:
    rows = []
    for layer in range(layers + 2):
        share = about("share", 0.3 + 0.5 * depth(layer, layers), 400 + layer)
        for mode in range(20):
            variance = 10 * math.exp(-0.25 * mode)
            ratio = 0.1 if mode % 3 == 0 else 0.8 + 0.05 * mode
            row = {"model": ABOUT["model"], "data": "fsdd", "texts": "prompts", "n": 300, "n_texts": 64, "seed": 3, "layer": layer}
            row |= {"mode": mode, "variance": variance, "share": variance / 45, "text_variance": ratio * variance, "ratio": ratio}
            row |= {"specific": ratio < 0.5, "stability": 0.9, "specific_modes": 7, "specific_share": share[0]}
            row |= {"share_low": share[1], "share_high": share[2]}
            rows.append(row | named("overlap", about("overlap", 0.8, layer)) | {"overlap_random": 0.05})
    return rows


def ablation_rows(attribute: str) -> list[dict[str, Any]]:
    nothing = dict.fromkeys(("loss_change", "loss_low", "loss_high", "loss_p", "accuracy_change", "accuracy_low", "accuracy_high"))
    common = {
        "attribute": attribute,
        "response": attribute,
        "answers": LABELS[attribute],
        "model": ABOUT["model"],
        "n": 150,
        "seed": 3,
    }
    whole = {"condition": "whole", "centring": "", "draw": 0, "modes": 0, "share": 0.0, "loss": 0.7, "accuracy": 0.8}
    rows = [common | whole | nothing]
    for number, centring in enumerate(("raw", "recentred")):
        listed = [("specific", 0), ("aligned by count", 0), ("aligned by variance", 0), *(("random", k) for k in range(5))]
        for place, (condition, draw) in enumerate(listed):
            change = 0.3 - 0.07 * place + 0.1 * number
            row = {"condition": condition, "centring": centring, "draw": draw, "modes": 7, "share": 0.3 + 0.01 * draw}
            row |= {
                "loss": 0.7 + change,
                "loss_change": change,
                "loss_low": change - 0.04,
                "loss_high": change + 0.06,
                "loss_p": 0.01,
            }
            row |= {
                "accuracy": 0.8 - change,
                "accuracy_change": -change,
                "accuracy_low": -change - 0.05,
                "accuracy_high": -change + 0.03,
            }
            rows.append(common | row)
    return rows


def bound_row(attribute: str, place: int) -> dict[str, Any]:
    row: dict[str, Any] = {"attribute": attribute, "n": 300, "n_texts": 64, "seed": 3}
    row |= named("sensitivity", about(attribute, 0.5 + place, 500)) | {"sensitivity_p95": 2.0, "sensitivity_whole": 3.0}
    row |= named("w1", about(attribute, 11.0 + place, 501)) | {"w1_null": 5.0, "diameter": 30.0}
    row |= {"product": 10.0 ** (place + 1), "prefactor": 49153.0, "bound": 49153.0 * 10.0 ** (place + 1)}
    row |= {"gmi_words": 2.25 - 0.5 * place, "gmi": 0.25, "holds": True}
    return row | named("lost", about(attribute, 2.0 - 0.5 * place, 502))


def lora_rows(attribute: str) -> list[dict[str, Any]]:
    rows = []
    common = {"model": ABOUT["model"], "attribute": attribute, "control": "digit", "n": 150, "learnt_from": 150, "seeds": 3}
    for trained in ("attribute", "control"):
        for place, read in enumerate(LABELS):
            for number, quantity in enumerate(("v_information", "v_mean", "gmi", "accuracy")):
                risen = 1.0 if (trained, read, quantity) == ("attribute", attribute, "gmi") else 0.02 * place
                of = {"trained": trained, "read": read, "quantity": quantity, "before": 0.1 * number}
                for seed in (0, 1, 2, None):
                    change = risen + (0.0 if seed is None else 0.1 * (seed - 1))
                    row = common | of | {"seed": seed, "after": 0.1 * number + change, "change": change}
                    rows.append(
                        row
                        | dict(
                            zip(("low", "high"), (None, None) if seed is not None else (change - 0.2, change + 0.1), strict=True)
                        )
                    )
    return rows


def make_experiments(folder: Path, layers: int = 6, without: tuple[str, ...] = ()) -> Path:
    """A folder as `unisonde decode` leaves it, of all experiments but those named."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "probes": [probe_rows(attribute, layers) for attribute in LABELS],
        "directions": [direction_rows(layers)],
        "ablate": [ablation_rows("speaker")],
        "gmi": [gmi_rows(attribute, layers) for attribute in LABELS],
        "bound": [[bound_row(attribute, place)] for place, attribute in enumerate(LABELS)],
        "lora": [lora_rows("speaker")],
    }
    for name, tables in made.items():
        if name in without:
            continue
        told = Interval(0.5, 0.4, 0.6, math.nan, 0.95, 300)
        found = [Finding(pl.DataFrame(rows, infer_schema_length=None), f"{name} says it of {ODD}.", told) for rows in tables]
        results.add(folder, name, found, ABOUT, ASKED, SESSION)
    return folder
