"""A run: items x models -> measurements, streamed, stored, resumable."""

from unisonde.runs.probe import probe
from unisonde.runs.run import Run

__all__ = ["Run", "probe"]
