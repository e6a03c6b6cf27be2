"""The examples of the documentation run, page by page, in the order in which they stand."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import unisonde
from unisonde.data.catalogue import DATA

ROOT = Path(__file__).parents[2]
PAGES = sorted(page for page in (ROOT / "docs").rglob("*.md") if "```python" in page.read_text())


def prepare(page: str) -> None:
    """What the reader of a page has done before."""
    if page == "runs":
        unisonde.probe("twin/janus-pro", "tabletop", ("text", "image"), "runs/first", limit=10, progress=False)
    if page == "data":
        Path("my-prompts.jsonl").write_text('{"id": "a", "prompt": "a red ring"}\n{"id": "b", "prompt": "a blue ring"}\n')


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run(page: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    prepare(page.stem)
    scope: dict = {"__name__": page.stem}
    before = set(sys.modules)
    try:
        for block in blocks(page):
            if said := re.match(r'"""(\w+): ', block):  # a file of its own, which later examples import
                (tmp_path / f"{said.group(1)}.py").write_text(block)
            exec(compile(block, str(page), "exec"), scope)
        for name, test in [(n, f) for n, f in scope.items() if n.startswith("test_")]:
            print(name)
            test()
    finally:
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
                del sys.modules[name]


def test_the_page_on_data_lists_the_data_sets_that_there_are() -> None:
    text = (ROOT / "docs" / "data.md").read_text()
    [table] = re.findall(r"^\| name \| items for .*?(?=^$)", text, re.S | re.M)
    named = {name.partition(":")[0] for row in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])}
    assert named == set(DATA)
