"""The work of a run, cut into chunks, and what one chunk gives.

A chunk is a model, a task and a few items that share a batch. `measure_chunk` is all that an engine calls, in this process or in
another; it depends on nothing but its arguments, so a chunk gives the same rows whenever and wherever it is measured.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from unisonde.data.item import Item, Task
from unisonde.measure import Protocol, eigen
from unisonde.models.base import Generation, Model
from unisonde.models.trace import Reading, Trace
from unisonde.runs.readout import Readout
from unisonde.runs.run import Part


@dataclass(frozen=True)
class Settings:
    """What is the same for every chunk of a run."""

    run: str
    data: str
    protocol: Protocol
    reading: Reading
    seed: int
    truncate: bool
    keep_states: bool


@dataclass(frozen=True)
class Chunk:
    """Items that are measured together. `name` is the name of their part."""

    name: str
    model: int
    task: Task
    items: tuple[Item, ...]
    generation: Generation


def chunks_of(model: int, task: Task, items: Sequence[Item], generation: Generation, batch_size: int) -> list[Chunk]:
    """Items in their order, `batch_size` at a time."""
    return [
        Chunk(f"{model:02d}-{task}-{number:05d}", model, task, tuple(items[start : start + batch_size]), generation)
        for number, start in enumerate(range(0, len(items), batch_size))
    ]


def measure_chunk(model: Model, chunk: Chunk, settings: Settings) -> Part:
    """Respond to the items of a chunk and measure every layer.

    Where the batch fails, its items are tried one by one, and one that fails by itself is recorded with its error.
    """
    try:
        return _measure(model, chunk, chunk.items, settings)
    except Exception as error:
        if len(chunk.items) == 1:
            return Part(items=[_failed(model, chunk, chunk.items[0], settings, error)])
    whole = Part()
    for item in chunk.items:
        try:
            part = _measure(model, chunk, (item,), settings)
        except Exception as error:
            part = Part(items=[_failed(model, chunk, item, settings, error)])
        whole.measurements += part.measurements
        whole.items += part.items
        whole.states |= part.states
    return whole


def _measure(model: Model, chunk: Chunk, items: Sequence[Item], settings: Settings) -> Part:
    constant = {
        "run": settings.run,
        "model": model.name,
        "data": settings.data,
        "task": chunk.task,
        "protocol": settings.protocol.digest(),
        "reading": settings.reading.digest(),
        "generation": chunk.generation.digest(),
        "seed": settings.seed,
    }
    readout = Readout(items, settings.protocol, settings.reading, constant, settings.keep_states)
    began = time.monotonic()
    # On a CPU matrices this small are measured faster one a thread than by all threads together.
    threads = torch.get_num_threads() if model.device.type == "cpu" else 1
    trace = Trace(readout, settings.reading, threads)
    with eigen.held(1) if threads > 1 else nullcontext():
        responses = model.respond(items, chunk.task, chunk.generation, settings.seed, trace, settings.truncate)
    seconds = (time.monotonic() - began) / len(items)
    part = Part(states=readout.states)
    for item, response, rows, lengths in zip(items, responses, readout.rows, readout.lengths, strict=True):
        flags = list(response.flags) + ([] if response.tokens else ["empty"])
        for row in rows:
            row["flags"] = ",".join(filter(None, [row["flags"], *flags]))
        part.measurements += rows
        row = _item_row(model, chunk, item, settings, seconds)
        row |= {"n_prompt": lengths[0], "n_response": response.tokens, "flags": ",".join(flags)}
        row |= {"response_text": response.text, "response_image": png(response.image)}
        part.items.append(row)
    return part


def _item_row(model: Model, chunk: Chunk, item: Item, settings: Settings, seconds: float) -> dict[str, Any]:
    return {
        "model": model.name,
        "data": settings.data,
        "task": chunk.task,
        "item": item.id,
        "category": item.category,
        "modality": item.modality,
        "prompt": item.prompt,
        "prompt_image": None,
        "response_text": None,
        "response_image": None,
        "n_prompt": None,
        "n_response": None,
        "flags": "",
        "seconds": seconds,
        "error": None,
    } | ({"prompt_image": _thumbnail(item)} if item.image is not None else {})


def _failed(model: Model, chunk: Chunk, item: Item, settings: Settings, error: Exception) -> dict[str, Any]:
    said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return _item_row(model, chunk, item, settings, 0.0) | {"error": said}


THUMBNAIL = 256
"""Longest side of the copy of an image prompt that a run keeps, in pixels."""


def _thumbnail(item: Item) -> bytes | None:
    try:
        picture = item.picture()
    except ValueError:
        return None
    assert picture is not None
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return png(picture)


def png(image: Image.Image | None) -> bytes | None:
    """A picture as the bytes of a PNG file."""
    if image is None:
        return None
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
