"""The report: one self-contained HTML file of one or several runs and experiments, and the same figures as PDF and PNG beside it.

The file opens without a network and forbids itself any. It holds plotly.js once, and each figure as data.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unisonde.report import decoding, decoding_html, figures_html, figures_print, grid_print, samples, tables
from unisonde.report.curves import QUESTION, Panel, Section, number, sections
from unisonde.report.page import page, plot
from unisonde.study.decoding.results import Results

if TYPE_CHECKING:
    from unisonde.runs import Run

HOW_TO_READ = (
    "Each curve follows one number through the layers of a model, as the mean over items, in {units}: how many directions the "
    "hidden states of a prompt fill (prompt entropy), or how much the states of the response add to those of the prompt "
    "(conditional entropy, which may be negative). Raw entropy mostly counts tokens, so read each value beside its "
    "<b>ceiling</b>, the dotted line of the same colour: the largest value that so many tokens allow."
)
CELLS = (
    "Curves are named by what the model was shown → what it was asked for: <b>text → image</b> is a text prompt answered by an "
    "image. Layer 0 is the embedding, <b>final</b> the state after the last norm."
)
SUMMARY_NOTE = (
    "Mean ± standard deviation over items; below it the share of the ceiling, and the mean ceiling. "
    "Middle is half-way through the layers."
)
FIGURE_NOTE = "Left: mean over items, ± one standard deviation shaded, ceiling dotted. Right: mean value / mean ceiling."
ABOUT = {
    "entropy": "The entropy of the states of the prompt alone: text prompts against image prompts.",
    "conditional_entropy": (
        "The joint entropy of prompt and response less that of the prompt: text responses against image responses."
    ),
}


def write_report(runs: Sequence[Run | Path | str], out: Path | str, figures: bool = True) -> Path:
    """Write the report of one or several runs, and of experiments of mismatched decoding.

    Args:
        runs: runs, or their folders, or folders of `unisonde decode`, in the order in which they are to appear; experiments follow runs.
        out: the HTML file; one that is there is replaced. Missing folders are made.
        figures: also write every figure as PDF and PNG into the folder `<name of out>_figures` beside it.

    Returns:
        The path of the HTML file.

    Raises:
        ValueError: there is no run, a folder is not a run, a run names no model, or `out` is a folder.
        ImportError: plotly, or for `figures` matplotlib, is not installed.
    """
    out = Path(out)
    if not runs:
        raise ValueError("a report needs at least one run; name the folder of one")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name the HTML file to write, e.g. {out / 'report.html'}")
    _require("plotly")
    if figures:
        _require("matplotlib")
    experiments = [Results.open(run) for run in runs if isinstance(run, (str, Path)) and Results.are_in(run)]
    opened = [_opened(run) for run in runs if not (isinstance(run, (str, Path)) and Results.are_in(run))]
    found = sections(opened)
    if opened and not found:
        raise ValueError(f"no model is named in the run.json of {', '.join(str(run.folder) for run in opened)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f"{out.stem}_figures") if figures else None
    if folder is not None:
        for section in found:
            figures_print.save(section, folder)
        for place, results in enumerate(experiments, start=1):
            for grid in decoding.grids(results, place).values():
                grid_print.save(grid, folder)
    _write_whole(out, render(found, folder, experiments))
    return out


def render(found: Sequence[Section], folder: Path | None = None, experiments: Sequence[Results] = ()) -> str:
    """The HTML of a report.

    Args:
        found: its sections.
        folder: where the figures are as PDF and PNG, beside the page; None if they were not written.
        experiments: of mismatched decoding; there is one section, or one set of experiments, at least.
    """
    from plotly.offline import get_plotlyjs

    names = list(dict.fromkeys([*(section.name for section in found), *(results.model for results in experiments)]))
    data = list(dict.fromkeys([*(section.data for section in found), *(results.data for results in experiments)]))
    what = "Layer-wise entropy of" if found else "What the decoder can use:"
    title = f"{what} {names[0]}" if len(names) == 1 else f"{what} {len(names)} models"
    body = [
        '<header><p class="kicker">unisonde report</p>',
        f"<h1>{escape(title)}</h1>",
        f'<p class="subtitle">{escape(", ".join(names))}, on {escape(", ".join(data))}</p>',
        *([f"<p>{HOW_TO_READ.format(units=escape(tables.units(found)))}</p><p>{CELLS}</p>"] if found else []),
        *([f"<p>{decoding_html.HOW_TO_READ}</p>"] if experiments else []),
        "</header>",
        *(["<h3>The numbers in short</h3>", tables.summary(found), f'<p class="note">{SUMMARY_NOTE}</p>'] if found else []),
        "<noscript><p>The figures of this page need JavaScript.</p></noscript>",
        *(_section(section, folder) for section in found),
        *(decoding_html.section(results, place, folder) for place, results in enumerate(experiments, start=1)),
    ]
    return page(escape(title), "\n".join(body), get_plotlyjs())


def _section(section: Section, folder: Path | None) -> str:
    identity = section.identity
    parameters = section.model.get("parameters")
    about = [
        f"family {section.model['family']}" if section.model.get("family") else "",
        f"{_count(parameters)} parameters" if isinstance(parameters, int) else "",
        f"data: {section.data}",
        f"protocol: {section.protocol}",
        f"run: {section.folder.name or section.folder}",
    ]
    parts = [
        f'<h2 id="model-{section.number}">{escape(section.name)}</h2>',
        f'<p class="subtitle">{escape(" · ".join(part for part in about if part))}</p>',
    ]
    panels = section.panels()
    if not panels:
        parts.append("<p>Nothing of this model was measured.</p>")
    for place, panel in enumerate(panels):
        parts.append(_figure(section, panel, place, folder))
    parts += ["<h3>Items and tokens</h3>", tables.counts(section)]
    flags = tables.flags(section)
    if flags:
        parts += ["<h3>Flags</h3>", flags]
    if panels:
        parts += ["<h3>By category</h3>", tables.by_category(section)]
    shown, failed = samples.samples(section), samples.failures(section)
    if shown:
        parts += ["<h3>Samples</h3>", shown]
    if failed:
        parts += ["<h3>Items that failed</h3>", failed]
    generation = (identity.get("generation") or {}).get(section.model.get("name")) or {}
    rest: dict[str, Any] = {key: identity[key] for key in ("tasks", "limit", "seed", "batch_size", "truncate") if key in identity}
    parts += [
        '<h3>How it was measured</h3><div class="settings">',
        f"<div><h4>Protocol</h4>{tables.fields(identity.get('protocol') or {})}</div>",
        f"<div><h4>Reading</h4>{tables.fields(identity.get('reading') or {})}",
        f"<h4>Generation</h4>{tables.fields(generation)}",
        f"<h4>Run</h4>{tables.fields(rest)}</div>",
        f"<div><h4>Model</h4>{tables.fields(section.model)}",
        f"<h4>Data</h4>{tables.fields(identity.get('data') or {})}</div>",
        "</div>",
        tables.sessions(section.sessions),
    ]
    return "\n".join(parts)


def _figure(section: Section, panel: Panel, place: int, folder: Path | None) -> str:
    name = figures_print.file_name(section, panel)
    key = f"figure-{section.number}-{place}"
    stack = f", stack {panel.stack}" if len(section.stacks) > 1 else ""
    notes = [
        f"{ABOUT[panel.quantity]} {FIGURE_NOTE}</p><p>{_who(panel)}",
    ]
    if panel.n_short:
        notes.append(f"{panel.n_short:,} of {panel.n_rows:,} rows rest on fewer than 8 tokens; they are included.")
    if panel.n_left_out:
        notes.append(f"{panel.n_left_out:,} of {panel.n_rows:,} values are not finite and left out.")
    if panel.questions:
        notes.append(f"The questions beside {panel.questions:,} image prompts are measured ({escape(QUESTION)}), and in no curve.")
    if panel.skipped:
        notes.append(f"{panel.skipped} earlier sampling steps are among the measurements and not drawn.")
    if folder is not None:
        links = (f'<a href="{escape(folder.name)}/{name}{suffix}">{suffix[1:].upper()}</a>' for suffix in (".pdf", ".png"))
        notes.append(f"The same as {' and '.join(links)}.")
    caption = f"<p>{' '.join(notes)}</p>"
    label = escape(_alternative(section, panel))
    data = figures_html.safe_json(figures_html.figure(panel))
    return plot(key, escape(name), label, data, caption, f"<h3>{panel.label}{escape(stack)}</h3>")


def _who(panel: Panel) -> str:
    """How many items and tokens each curve rests on, at its first layer."""
    texts = []
    for curve in panel.curves:
        first = curve.points[0]
        tokens = f"{number(first['n_prompt'], 1)} prompt tokens"
        if panel.quantity != "entropy":
            tokens += f" and {number(first['n_response'], 1)} response tokens"
        texts.append(f"{escape(curve.name)}: {first['n_items']} items of {tokens} on average")
    return "; ".join(texts) + "."


def _alternative(section: Section, panel: Panel) -> str:
    ends = (
        f"{curve.name} from {number(curve.points[0]['mean'])} to {number(curve.points[-1]['mean'])} {panel.units}"
        for curve in panel.curves
    )
    return f"{panel.label} of {section.name} by layer: {'; '.join(ends)}"


def _count(parameters: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M")):
        if parameters >= size:
            return f"{parameters / size:.3g} {letter}"
    return f"{parameters:,}"


def _opened(run: Any) -> Run:
    if isinstance(run, (str, Path)):
        from unisonde.runs import Run

        return Run.open(Path(run))
    return run


def _require(package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError:
        raise ImportError(f"a report needs {package}, which is not installed; pip install 'unisonde[report]'") from None


def _write_whole(path: Path, text: str) -> None:
    """Replace the file in one step: whoever opens it finds the old report or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
