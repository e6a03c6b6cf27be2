"""Figures and the HTML report. Needs the extra `unisonde[report]` (plotly and matplotlib)."""

from unisonde.report.html import write_report

__all__ = ["write_report"]
