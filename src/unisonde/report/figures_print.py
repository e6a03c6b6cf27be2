"""Figures on paper: the panels of the page as PDF and PNG, drawn with matplotlib in the same colours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from unisonde.report.curves import CROWDED, Curve, Panel, Section, ticks
from unisonde.report.figures_html import LAYER_AXIS, SHARE_AXIS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # TrueType: text in the PDF stays text, which journals ask for
    "savefig.facecolor": "white",
    "text.usetex": False,
}


def figure(section: Section, panel: Panel) -> Figure:
    """A panel as a matplotlib figure of 7 x 3.1 inches: left the value with its ceiling, right the share of the ceiling."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(7.0, 3.1), layout="constrained")
        value, share = fig.subplots(1, 2, width_ratios=[2, 1])
        for curve in panel.curves:
            _draw(value, share, panel, curve)
        value.set_ylabel(f"{panel.label.lower()} ({panel.units})")
        share.set_ylabel(SHARE_AXIS)
        for axes, most in ((value, 14), (share, 7)):
            _finish(axes, panel, most)
        where = f", stack {panel.stack}" if len(section.stacks) > 1 else ""
        # A dollar sign in a name is not mathematics.
        title = f"{section.name} on {section.data}{where}, protocol {section.protocol}".replace("$", r"\$")
        fig.suptitle(title, fontsize=9, x=0.01, ha="left", wrap=True)
        handles, labels = value.get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), fontsize=8)
    return fig


def save(section: Section, folder: Path) -> list[Path]:
    """Every panel of a section as PDF and PNG in `folder`, which is made if it is missing. Returns the files, PDFs first."""
    import matplotlib

    files: list[Path] = []
    for panel in section.panels():
        with matplotlib.rc_context(STYLE):
            files += write(figure(section, panel), folder, file_name(section, panel))
    return sorted(files, key=lambda path: path.suffix)


def write(fig: Figure, folder: Path, name: str) -> list[Path]:
    """A figure as PDF and PNG in `folder`, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for suffix, options in ((".pdf", {"metadata": {"CreationDate": None}}), (".png", {"dpi": 200})):
        files.append(folder / (name + suffix))
        fig.savefig(files[-1], **options)  # type: ignore[arg-type]
    return files


def file_name(section: Section, panel: Panel) -> str:
    """The name of a panel's files, without the suffix: `1-twin-harmon-entropy`, with the stack if there are several."""
    words = [section.slug, panel.quantity.replace("_", "-")]
    if len(section.stacks) > 1:
        words.append("".join(c if c.isalnum() else "-" for c in panel.stack))
    return "-".join(words)


def _draw(value: Axes, share: Axes, panel: Panel, curve: Curve) -> None:
    colour, marker = curve.look.colour, curve.look.marker
    for final in (False, True):
        points = [point for point in curve.points if (point["layer"] == panel.final) == final]
        if not points:
            continue
        x = [point["layer"] for point in points]
        mean = [point["mean"] for point in points]
        spread = [point["sd"] or 0.0 for point in points]
        ceiling = [float("nan") if point["ceiling"] is None else point["ceiling"] for point in points]
        percent = [float("nan") if point["share"] is None else 100 * point["share"] for point in points]
        mark: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "markersize": 5.0 if final else 3.5 if len(x) <= CROWDED else 2.0,
        }
        if curve.dashed:
            mark["markerfacecolor"] = "white"
        line = "--" if curve.dashed else "-"
        if final:
            value.errorbar(x, mean, yerr=spread, capsize=2, elinewidth=0.8, linestyle="none", **mark)
            value.hlines(ceiling, x[0] - 0.3, x[0] + 0.3, color=colour, linestyle=":", linewidth=1.2)
        else:
            lower, upper = zip(*((m - s, m + s) for m, s in zip(mean, spread, strict=True)), strict=True)
            value.fill_between(x, lower, upper, color=colour, alpha=0.15, linewidth=0)
            value.plot(x, mean, label=curve.name, linewidth=1.4, linestyle=line, **mark)
            value.plot(x, ceiling, color=colour, linestyle=":", linewidth=1.2)
        share.plot(x, percent, linestyle="none" if final else line, linewidth=1.4, **mark)


def _finish(axes: Axes, panel: Panel, most: int) -> None:
    places, labels = ticks(panel.layers, panel.final, most)
    axes.set_xticks(places, labels)
    axes.set_xlim(panel.layers[0] - 0.5, panel.layers[-1] + 0.5)
    axes.set_xlabel(LAYER_AXIS)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    if panel.final in panel.layers and panel.final is not None:
        axes.axvline(panel.final - 0.5, color="0.85", linewidth=0.8)
    if axes.get_ylim()[0] < 0:
        axes.axhline(0.0, color="0.6", linewidth=0.8)
