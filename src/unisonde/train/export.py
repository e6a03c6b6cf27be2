"""How a trained twin becomes a folder that `unisonde.load` opens: written beside its place, and moved there when it is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from unisonde.models.base import Model
from unisonde.models.parts.pretrained import OWN


@contextmanager
def new_folder(out: Path, *inside: str) -> Iterator[Path]:
    """A folder to write into, with the folders `inside` it; it becomes `out` at the end, and not if anything fails before.

    Raises:
        ValueError: `out` already holds files.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} already holds files; name another folder, or remove it")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for folder in ("", *inside):
        (partial / folder).mkdir(parents=True, exist_ok=True)
    yield partial
    if out.exists():
        out.rmdir()
    partial.rename(out)


def save_hub_layout(model: Any, folder: Path) -> None:
    """A network of `transformers` as the hub has it: configuration, weights, tokenizer, image processor."""
    for part in (model.network.config, model.tokenizer, model.image_processor):
        part.save_pretrained(folder)
    save_weights(model.network.state_dict(), folder / "model.safetensors")


def save_weights(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Weights as safetensors, what is not whole numbers in float16."""
    halved = {key: (t.half() if t.is_floating_point() else t).contiguous() for key, t in tensors.items()}
    save_file(halved, file, metadata={"format": "pt"})


def save_json(held: Any, file: Path) -> None:
    """An object as JSON, a line for each entry."""
    file.write_text(json.dumps(held, indent=1) + "\n")


def save_own(model: Model, folder: Path, record: Mapping[str, Any] | None = None, **more: Any) -> None:
    """What is the twin's own beside the published layout: its settings and `more` of them, and the record of its training."""
    settings = {"family": model.family, "generation": {task: asdict(model.defaults(task)) for task in model.tasks}}
    save_json(settings | more, folder / OWN)
    if record is not None:
        save_json(record, folder / "training.json")
