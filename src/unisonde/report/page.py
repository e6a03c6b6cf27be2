"""The page around the report: its style, its script and its rules of security, none of which depend on a run."""

from __future__ import annotations

POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)
"""Content-Security-Policy: nothing is fetched from anywhere. `blob:` is memory of the page itself; saving a figure needs it."""

MARK = '<meta name="generator" content="unisonde report">'

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4;
  --page: #ffffff; --card: #f6f8fa; --link: #0a58ca; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa4af; --line: #343b44; --page: #14171b; --card: #1d2127; --link: #7ab3ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 1240px; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
a { color: var(--link); }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.45rem; margin: 3.2rem 0 .2rem; padding-top: 1.2rem; border-top: 2px solid var(--line); overflow-wrap: anywhere; }
h3 { font-size: 1.1rem; margin: 2rem 0 .3rem; }
h4 { font-size: .95rem; margin: 1rem 0 .3rem; }
p { margin: .4rem 0 .8rem; max-width: 78ch; }
small, .note, .kind, .subtitle, figcaption { color: var(--soft); }
.kicker { color: var(--soft); font-size: .85rem; letter-spacing: .06em; text-transform: uppercase; margin: 0; }
.subtitle { overflow-wrap: anywhere; max-width: none; }
.note, .kind, figcaption { font-size: .87rem; }
figure { margin: .6rem 0 1.2rem; overflow-x: auto; }
figcaption p { max-width: none; margin: .2rem 0; }
.plot { width: 100%; min-width: 720px; min-height: 430px; }
.table { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .55rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th[rowspan], thead tr:first-child th:first-child { text-align: left; }
thead th { vertical-align: bottom; font-weight: 600; white-space: nowrap; }
thead th[colspan] { text-align: center; }
tbody th { text-align: left; font-weight: 400; }
th[scope="rowgroup"] { overflow-wrap: anywhere; }
th[scope="rowgroup"] span { color: var(--soft); font-weight: 400; margin-left: .6rem; }
td small, th small { display: block; font-weight: 400; font-size: .78rem; }
th.cell, td, td small { white-space: nowrap; }
tr.all { background: var(--card); }
tr.all th { font-weight: 600; }
table.fields td, table.words td, table.words th { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.fields th { white-space: nowrap; color: var(--soft); }
table.words td:nth-child(2), table.words td:nth-child(3) { white-space: nowrap; }
.settings { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 2.5rem; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)); gap: 1rem; margin: .8rem 0; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem 1rem; min-width: 0;
  break-inside: avoid; }
article p { margin: .1rem 0; overflow-wrap: anywhere; }
article > div { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
article section { min-width: 0; }
article h4 { margin: .5rem 0 .3rem; font-size: .8rem; color: var(--soft); font-weight: 600; }
blockquote { margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 16rem; overflow-y: auto;
  font-size: .92rem; }
img { max-width: 100%; height: auto; border: 1px solid var(--line); display: block; }
img.tiny { image-rendering: pixelated; width: 128px; }
code, pre { font: .85rem ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.failures code { overflow-wrap: anywhere; white-space: pre-wrap; }
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --page: #fff; --card: #fff; --link: #000; }
  body { padding: 0; max-width: none; font-size: 11px; }
  h2 { break-before: page; }
  h2:first-of-type { break-before: auto; }
  figure, tr { break-inside: avoid; }
  figure { overflow: visible; }
  blockquote { max-height: none; }
  .table { overflow: visible; }
}
"""

# Figures are drawn from JSON blocks. The colours of text follow the page, also when the reader's preference changes;
# paper is white. The buttons are a list of our own: plotly's defaults include one that sends the data to a server.
SCRIPT = """
(function () {
  "use strict";
  var dark = window.matchMedia("(prefers-color-scheme: dark)");
  var plots = [];
  function colours(night) {
    return {
      "font.color": night ? "#e6e9ed" : "#1b1f24",
      "hoverlabel.bgcolor": night ? "#262b33" : "#ffffff",
      "hoverlabel.bordercolor": night ? "#4a525d" : "#c4ccd4",
      "hoverlabel.font.color": night ? "#e6e9ed" : "#1b1f24"
    };
  }
  function paint(night) { plots.forEach(function (plot) { Plotly.relayout(plot, colours(night)); }); }
  document.querySelectorAll("script[data-figure]").forEach(function (block) {
    var spec = JSON.parse(block.textContent);
    var plot = document.getElementById(block.dataset.figure);
    var name = plot.dataset.name || "figure";
    plots.push(plot);
    Plotly.newPlot(plot, spec.data, spec.layout, {
      responsive: true, displaylogo: false,
      modeBarButtons: [["toImage"], ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
      plotlyServerURL: "",
      toImageButtonOptions: { format: "svg", filename: name }
    });
  });
  paint(dark.matches);
  dark.addEventListener("change", function (event) { paint(event.matches); });
  window.addEventListener("beforeprint", function () { paint(false); });
  window.addEventListener("afterprint", function () { paint(dark.matches); });
})();
"""


def plot(key: str, name: str, described: str, data: str, caption: str, heading: str = "", height: int | None = None) -> str:
    """A figure of the page. All arguments are HTML, but `data`.

    Args:
        key: its id.
        name: of the file that a reader saves.
        described: what it shows, for those who cannot see it.
        data: its JSON, which must be safe inside a script (`figures_html.safe_json`).
        heading: stands over it, and stays with it in print.
        height: in pixels, where it is not that of the style.
    """
    tall = "" if height is None else f' style="min-height: {height}px"'
    return (
        f'<figure>{heading}<div class="plot" id="{key}" data-name="{name}" role="img" aria-label="{described}"{tall}></div>'
        f'<script type="application/json" data-figure="{key}">{data}</script>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def page(title: str, body: str, library: str) -> str:
    """A whole HTML document.

    Args:
        title: of the window, as HTML.
        body: as HTML.
        library: plotly.js, as it comes.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="referrer" content="no-referrer">\n'
        f"{MARK}\n<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{library}</script>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
