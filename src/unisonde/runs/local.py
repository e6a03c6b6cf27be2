"""The engine of this process: chunks one after another, one model in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from unisonde.models.base import Model
from unisonde.runs.run import Part
from unisonde.runs.work import Chunk, Settings, measure_chunk


def measure_locally(chunks: Iterable[Chunk], models: Callable[[int], Model], settings: Settings) -> Iterator[tuple[Chunk, Part]]:
    """Measure chunks in their order, each as it is asked for.

    Args:
        models: gives the model of a number; it is asked once for each run of chunks of one model, so that it can let the last one go.
    """
    number, model = -1, None
    for chunk in chunks:
        if model is None or chunk.model != number:
            model = None  # let go of the last model before the next one is loaded
            number, model = chunk.model, models(chunk.model)
        yield chunk, measure_chunk(model, chunk, settings)
