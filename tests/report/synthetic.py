"""Runs for the tests of the report: made up, but shaped like real ones, with everything in them that a report must survive.

The numbers follow no model: a bump over the layers, below a ceiling of log2 n. What matters is that every cell, flag and kind of
failure occurs, that layers, items and cells all differ, and that prompts try to break out of the page.
"""

from __future__ import annotations

import io
import math
import random
from pathlib import Path
from typing import Any

from PIL import Image

from unisonde.measure import PROTOCOLS
from unisonde.runs import Run
from unisonde.runs.run import Part

HOSTILE = '<script>window.hacked=1</script><img src=x onerror="window.hacked=1">'
CATEGORIES = ("shapes", "colours & <i>sizes</i>", "places")
CELLS = (("text", "text"), ("text", "image"), ("image", "text"))


def png(seed: int, side: int = 32) -> bytes:
    rng = random.Random(seed)
    image = Image.new("RGB", (side, side), (250, 250, 250))
    colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
    image.paste(colour, (side // 8, side // 8, side // 2, side // 2))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class Maker:
    """Writes the rows of one model: items with responses, and their measurements."""

    def __init__(self, run: Run, model: str, layers: int, protocol: str, units: str, seed: int) -> None:
        self.run, self.model, self.layers, self.protocol, self.units = run, model, layers, protocol, units
        self.rng = random.Random(seed)
        self.part = Part()

    def item(self, number: int, modality: str, task: str, stacks: tuple[str, ...], steps: tuple[str, ...]) -> None:
        rng = self.rng
        category = CATEGORIES[number % len(CATEGORIES)]
        name = f"{category[:3]}-{number:03d}"
        prompt = HOSTILE if number == 1 else f"Place {number + 1} red circles above a large blue square, on a grey table."
        failed = number == 4
        n_prompt = 6 if number == 2 else rng.randrange(10, 24) + (56 if modality == "image" else 0)
        n_response = 64 if task == "image" else rng.randrange(12, 40)
        flags = ["short"] * (n_prompt < 8) + ["full", "odd <b>flag</b>"] * (number == 3)
        self.part.items.append(
            {
                "model": self.model,
                "data": self.run.identity["data"]["name"],
                "task": task,
                "item": name,
                "category": category,
                "modality": modality,
                "prompt": prompt,
                "prompt_image": png(number) if modality == "image" else None,
                "response_text": None
                if failed or task == "image"
                else f"There are {number + 1}: {HOSTILE if number == 1 else 'yes'}",
                "response_image": None if failed or task == "text" else png(number + 100),
                "n_prompt": n_prompt,
                "n_response": 0 if failed else n_response,
                "flags": ",".join(flags),
                "seconds": 0.5,
                "error": f"RuntimeError: out of memory {HOSTILE}" if failed else None,
            }
        )
        if failed:
            return
        shift = 0.05 * rng.gauss(0, 1)
        for stack in stacks:
            for layer in range(self.layers + 2):
                depth = layer / (self.layers + 1)
                share = 0.55 + 0.3 * math.sin(math.pi * depth) * (1.1 if task == "image" else 0.9) + shift
                share += 0.01 * rng.gauss(0, 1) - (0.12 if modality == "image" else 0)
                common = (name, category, modality, task, stack, layer, flags)
                self.rows(common, "prompt", "single", {"entropy": share}, n_prompt, 0)
                for step in steps:
                    answer = {"joint_entropy": share + 0.1, "prompt_term": share, "conditional_entropy": 0.45 - 1.0 * depth + shift}
                    self.rows(common, "response", step, answer, n_prompt, n_response)
                if modality == "image":
                    question = (name, category, "text", task, stack, layer, ["question", "short"])
                    self.rows(question, "prompt", "single", {"entropy": 0.9}, 7, 0)

    def rows(
        self, common: tuple[Any, ...], level: str, step: str, shares: dict[str, float], n_prompt: int, n_response: int
    ) -> None:
        name, category, modality, task, stack, layer, flags = common
        unit = 1.0 if self.units == "bits" else math.log(2)
        for quantity, share in shares.items():
            ceiling = unit * math.log2(n_prompt + n_response if quantity == "joint_entropy" else max(n_response, n_prompt))
            if quantity == "conditional_entropy":
                ceiling = unit * 1.4
            self.part.measurements.append(
                {
                    "run": self.run.id,
                    "model": self.model,
                    "data": self.run.identity["data"]["name"],
                    "item": name,
                    "category": category,
                    "task": task,
                    "level": level,
                    "modality": modality,
                    "quantity": quantity,
                    "stack": stack,
                    "layer": layer,
                    "step": step,
                    "value": float("nan") if name.endswith("005") and layer == 2 else share * ceiling,
                    "ceiling": ceiling,
                    "stderr": 0.0,
                    "units": self.units,
                    "n_prompt": n_prompt,
                    "n_response": n_response,
                    "flags": ",".join(flags),
                    "protocol": self.protocol,
                    "reading": "aaaa00001111",
                    "generation": f"{task}-0123456789"[:12],
                    "seed": 0,
                }
            )


def make_run(
    folder: Path,
    models: tuple[tuple[str, int], ...] = (("twin/janus-pro", 8), ("twin/harmon", 8)),
    cells: tuple[tuple[str, str], ...] = CELLS,
    items: int = 12,
    protocol: str = "default",
    units: str = "bits",
    stacks: tuple[str, ...] = ("llm",),
    steps: tuple[str, ...] = ("final",),
) -> Run:
    """A run folder as `unisonde probe` leaves it: `models` are pairs of a name and a number of layers."""
    chosen = PROTOCOLS[protocol]
    identity = {
        "models": [
            {"name": name, "family": name.split("/")[-1], "parameters": 1_234_567, "dtype": "float32", "weights": "f00d" * 3}
            for name, _ in models
        ],
        "data": {
            "name": "tabletop",
            "summary": "coloured shapes on a grid",
            "licence": "MIT",
            "digest": "0123456789ab",
            "items": {"text": 2 * items, "image": items},
        },
        "tasks": sorted({task for _, task in cells}),
        "limit": items,
        "protocol": {"name": protocol, "digest": chosen.digest(), **chosen.to_dict(), "units": units},
        "reading": {"spans": "content", "step": "final", "digest": "aaaa00001111"},
        "generation": {
            name: {task: {"tokens": 64, "temperature": 0.0, "guidance": None, "steps": None, "digest": task} for _, task in cells}
            for name, _ in models
        },
        "seed": 0,
        "batch_size": 8,
        "truncate": False,
    }
    session = {
        "started": "2026-01-02T03:04:05+00:00",
        "command": "unisonde probe twin/janus-pro --data 'tabletop & <more>' --out " + folder.name,
        "versions": {"unisonde": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
        "platform": "Linux",
        "device": "cpu",
        "threads": 2,
    }
    run = Run.begin(folder, identity, session)
    for place, (name, layers) in enumerate(models):
        maker = Maker(run, name, layers, chosen.digest(), units, seed=place)
        for modality, task in cells:
            for number in range(items):
                maker.item(number, modality, task, stacks, steps if task == "image" else ("single",))
        run.add(f"{place:02d}-all-00000", maker.part)
    return run
