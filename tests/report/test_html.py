"""The page as text: what it says, what it escapes, and that it is written whole."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import plotly.graph_objects as go
import polars as pl
import pytest
from synthetic import HOSTILE, png

from unisonde.report import write_report
from unisonde.report.figures_html import safe_json
from unisonde.report.samples import picture
from unisonde.runs import Run

Make = Callable[..., Run]


class Reader(HTMLParser):
    """Every tag with its attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.silent = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.silent = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.silent = False

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def written(make: Make, tmp_path: Path) -> tuple[Run, str]:
    run = make(items=6, models=(("twin/a & <b>", 3), ("twin/b", 2)))
    return run, write_report([run], tmp_path / "report.html", figures=False).read_text(encoding="utf-8")


def test_the_page_is_one_file_without_a_network(written: tuple[Run, str]) -> None:
    page = Reader(written[1])
    policy = next(attrs["content"] for tag, attrs in page.tags if tag == "meta" and attrs.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "embed", "base", "form")]
    for tag, attrs in page.tags:
        if attrs.get("src") is not None:
            assert (tag, str(attrs["src"])[:15]) == ("img", "data:image/png;")
        assert not [name for name in attrs if name.startswith("on")]
    assert sum(tag == "script" and "type" not in attrs for tag, attrs in page.tags) == 2  # plotly.js once, and ours


def test_the_page_says_what_was_measured(written: tuple[Run, str]) -> None:
    run, html = written
    text = Reader(html).text
    for name, value in run.identity["protocol"].items():
        assert re.search(rf"{name} {re.escape(str(value))}", text), name
    assert run.info["sessions"][0]["command"] in text
    assert "torch 2.13.0" in text
    assert "text → text: 5 items of" in text
    assert "15 of 75 rows rest on fewer than 8 tokens" in text
    assert "3 of 75 values are not finite" in text
    assert "questions beside 5 image prompts" in text
    assert "3 of 18 items failed" in text


def test_texts_of_a_run_are_shown_and_not_obeyed(written: tuple[Run, str]) -> None:
    _, html = written
    page = Reader(html)
    for said in (HOSTILE, "twin/a & <b>", "colours & <i>sizes</i>", "odd <b>flag</b>", "'tabletop & <more>'"):
        assert said in page.text
    assert HOSTILE not in html
    assert not [attrs for tag, attrs in page.tags if tag == "i" or "onerror" in attrs]


def test_json_cannot_end_its_script() -> None:
    words = "</script><!--<script>&\u2028\u2029"
    text = safe_json(go.Figure(go.Scatter(x=[1], y=[2], name=words)))
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text)["data"][0]["name"] == words


def test_values_in_the_page_are_plain_numbers(written: tuple[Run, str]) -> None:
    blocks = re.findall(r'<script type="application/json" data-figure="[^"]+">(.*?)</script>', written[1], re.DOTALL)
    assert len(blocks) == 4
    assert not [block for block in blocks if "bdata" in block]


def test_the_table_by_category(written: tuple[Run, str]) -> None:
    run, html = written
    # The mean of one category at layer 0, by a plain loop.
    values = [
        row["value"]
        for row in run.measurements().to_dicts()
        if row["model"] == "twin/b" and row["category"] == "places" and row["quantity"] == "entropy"
        if row["layer"] == 0 and row["modality"] == "image"
    ]
    section = html.split('id="model-2"')[1]
    row = next(row for row in re.findall("<tr>.*?</tr>", section) if "image → text" in row and ">places<" in row)
    assert f"<b>{sum(values) / len(values):.2f}</b>" in row
    assert f"<td>{len(values)}</td>" in row


def test_two_protocols_of_one_model_are_kept_apart(make: Make, tmp_path: Path) -> None:
    options = {"items": 3, "models": (("twin/a", 2),), "cells": (("text", "text"),)}
    runs = [make("one", **options), make("two", **options, protocol="fixed-bandwidth", units="nats")]
    html = write_report(runs, tmp_path / "report.html", figures=False).read_text(encoding="utf-8")
    for number, run in enumerate(runs, start=1):
        head = html.split(f'<h2 id="model-{number}">')[1].split("<figure>")[0]
        assert run.identity["protocol"]["digest"] in head
    assert "conditional entropy (nats)" in html


def test_a_run_in_which_everything_failed(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(items=6, models=(("twin/a", 2),))
    empty, failed = run.measurements().clear(), run.items().with_columns(error=pl.lit("no memory"))
    monkeypatch.setattr(run, "measurements", lambda: empty)
    monkeypatch.setattr(run, "items", lambda: failed)
    text = Reader(write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "Nothing of this model was measured" in text
    assert "18 of 18 items failed" in text


def test_folders_of_runs_are_opened(make: Make, tmp_path: Path) -> None:
    run = make(items=3, models=(("twin/a", 2),))
    assert write_report([run.folder], tmp_path / "new" / "report.html", figures=False) == tmp_path / "new" / "report.html"


def test_an_earlier_report_is_replaced_and_nothing_is_left_behind(make: Make, tmp_path: Path) -> None:
    run = make(items=3, models=(("twin/a", 2),))
    out = tmp_path / "out" / "report.html"
    out.parent.mkdir()
    out.write_text("the earlier one")
    write_report([run], out, figures=False)
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_refusals(make: Make, tmp_path: Path) -> None:
    run = make(items=3, models=(("twin/a", 2),))
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(ValueError, match="is a folder"):
        write_report([run], tmp_path)
    with pytest.raises(ValueError, match="is not a run"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")


@pytest.mark.parametrize("package", ["plotly", "matplotlib"])
def test_a_missing_package_is_one_sentence(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    run = make(items=3, models=(("twin/a", 2),))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*pip install 'unisonde\[report\]'"):
        write_report([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_room_can_be_entered_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("plotly", "matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("plotly", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("unisonde.report.figures_html", "unisonde.report.figures_print", "unisonde.report.html"):
        importlib.reload(sys.modules[name])


def test_pictures() -> None:
    tiny, large = picture(png(1), 'a "tiny" one'), picture(png(1, side=700), "large")
    assert 'class="tiny"' in tiny
    assert "a &quot;tiny&quot; one, 32 x 32 pixels" in tiny
    assert "tiny" not in large
    assert "700 x 700" in large
    assert picture(None, "") == ""
    refused = picture(b"<svg onload=alert(1)>", "not a picture")
    assert "cannot be shown" in refused
    assert "<svg" not in refused
    assert "21 bytes" in unescape(refused)
