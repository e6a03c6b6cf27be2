"""Unified models, one file a family; capture of hidden states; spans; the registry."""

from unisonde.models.base import Generation, Model, Response
from unisonde.models.registry import FAMILIES, MODELS, load
from unisonde.models.trace import LayerStates, Reading, Row, Span, Stack, Trace

__all__ = [
    "FAMILIES",
    "MODELS",
    "Generation",
    "LayerStates",
    "Model",
    "Reading",
    "Response",
    "Row",
    "Span",
    "Stack",
    "Trace",
    "load",
]
