"""The reader of T2I-CoReBench: on the published files where they are present, and on small ones of the same form."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from unisonde.data import corebench


def entry(**changes: Any) -> dict[str, Any]:
    check = {"question": "Is there a pear?", "tags": ["pos"]}
    return {
        "Main Class": "Composition",
        "Sub Class": "Multi-Instance",
        "Prompt": "Two pears.",
        "Checklist": [check],
        "Remark": "me",
    } | changes


def write(folder: Path, dimension: str, entries: Any) -> None:
    (folder / f"{dimension}.json").write_text(json.dumps(entries), encoding="utf-8")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the variable nor the folder nearby is set, unless a test does so."""
    monkeypatch.delenv(corebench.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


# The published files


def test_published_counts(shared: Path) -> None:
    items = corebench.read(shared / "data" / "t2i-corebench")
    assert len(items) == len({item.id for item in items}) == 1080
    assert Counter(item.category for item in items) == {"composition": 360, "deductive": 360, "inductive": 180, "abductive": 180}
    assert set(Counter(item.labels["dimension"] for item in items).values()) == {90}
    assert sum(len(item.labels["checklist"]) for item in items) == 13_536
    assert all(item.modality == "text" and item.prompt.strip() for item in items)
    # An entry's name says its dimension, and its main class agrees with the first letter.
    assert all(item.id.startswith(item.labels["dimension"] + "-") for item in items)
    assert {(item.id[0], item.labels["main_class"]) for item in items} == {("C", "Composition"), ("R", "Reasoning")}


def test_published_order(shared: Path) -> None:
    items = corebench.read(shared / "data" / "t2i-corebench")
    assert list(dict.fromkeys(item.labels["sub_class"] for item in items)) == [
        "Multi-Instance",
        "Multi-Attribute",
        "Multi-Relation",
        "Text Rendering",
        "Logical Reasoning",
        "Behavioral Reasoning",
        "Hypothetical Reasoning",
        "Procedural Reasoning",
        "Generalization Reasoning",
        "Analogical Reasoning",
        "Commonsense Reasoning",
        "Reconstructive Reasoning",
    ]
    assert [item.id for item in items[:2]] == ["C-MI-001", "C-MI-002"] and items[-1].id == "R-RR-090"


def test_published_entry_matches_the_file(shared: Path) -> None:
    folder = shared / "data" / "t2i-corebench"
    raw = json.loads((folder / "R-GR.json").read_text(encoding="utf-8"))
    read = {item.id: item for item in corebench.read(folder)}
    assert all(read[name].prompt == entry["Prompt"] for name, entry in raw.items())
    assert [check["question"] for check in read["R-GR-007"].labels["checklist"]] == [
        check["question"] for check in raw["R-GR-007"]["Checklist"]
    ]


def test_found_nearby(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "project"
    here.mkdir()
    (tmp_path / "shared").symlink_to(shared.resolve(), target_is_directory=True)
    monkeypatch.chdir(here)
    assert len(corebench.read()) == 1080


# Small files


def test_labels(tmp_path: Path) -> None:
    write(tmp_path, "C-MI", {"C-MI-001": entry()})
    (item,) = corebench.read(tmp_path)
    assert (item.id, item.category, item.prompt, item.image) == ("C-MI-001", "composition", "Two pears.", None)
    assert item.labels == {
        "dimension": "C-MI",
        "main_class": "Composition",
        "sub_class": "Multi-Instance",
        "checklist": ({"question": "Is there a pear?", "tags": ["pos"]},),
        "remark": "me",
    }


def test_partial_folder_keeps_the_published_order(tmp_path: Path) -> None:
    for dimension in ("R-AR", "C-MA", "R-LR", "C-MI"):
        write(tmp_path, dimension, {f"{dimension}-002": entry(), f"{dimension}-001": entry()})
    write(tmp_path, "other", {"x": "passed over"})
    read = [(item.id, item.category) for item in corebench.read(tmp_path)]
    assert read[::2] == [
        ("C-MI-002", "composition"),
        ("C-MA-002", "composition"),
        ("R-LR-002", "deductive"),
        ("R-AR-002", "inductive"),
    ]
    assert read[1] == ("C-MI-001", "composition")  # within a file, the file's order


def test_argument_goes_before_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, given = tmp_path / "named", tmp_path / "given"
    for folder, prompt in ((named, "by variable"), (given, "by argument")):
        folder.mkdir()
        write(folder, "C-MI", {"C-MI-001": entry(Prompt=prompt)})
    monkeypatch.setenv(corebench.VARIABLE, str(named))
    assert [item.prompt for item in corebench.read()] == ["by variable"]
    assert [item.prompt for item in corebench.read(given)] == ["by argument"]


def test_variable_goes_before_the_folder_nearby(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, near = tmp_path / "here", tmp_path / "shared" / "data" / "t2i-corebench"
    here.mkdir()
    near.mkdir(parents=True)
    write(near, "C-MI", {"C-MI-001": entry(Prompt="nearby")})
    monkeypatch.chdir(here)
    assert [item.prompt for item in corebench.read()] == ["nearby"]
    monkeypatch.setenv(corebench.VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"gone \(named by UNISONDE_COREBENCH\) is not a folder"):
        corebench.read()


def test_absent_files_say_where_to_get_them() -> None:
    with pytest.raises(ValueError, match=r"KwaiVGI/T2I-CoReBench .* UNISONDE_COREBENCH"):
        corebench.read()


def test_wrong_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds none of the files.*KwaiVGI/T2I-CoReBench"):
        corebench.read(tmp_path)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        corebench.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a JSON file"),
        (b'{"C-MI-001": ', "is not a JSON file"),
        (b'{"C-MI-001": "\xff"}', "is not a JSON file"),
        (b"[1]", "must hold a JSON object of entries, not a list"),
        (b"{}", "must hold a JSON object of entries, not an empty object"),
    ],
)
def test_malformed_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "C-MI.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"C-MI\.json {message}"):
        corebench.read(tmp_path)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("text", "must be an object, not text"),
        ({}, "`Prompt` must be text, not missing"),
        (entry(Prompt=3), "`Prompt` must be text, not a number"),
        (entry(Prompt=" \n"), "`Prompt` is empty"),
        (entry(Checklist=None), "`Checklist` must be a list, not missing"),
        (entry(Checklist=[{"question": "Is it?", "tags": []}, {"question": "Is it?"}]), "number 2 of `Checklist`"),
        (entry(Checklist=["Is it?"]), "number 1 of `Checklist`"),
        (entry(**{"Sub Class": True}), "`Sub Class` must be text, not true or false"),
    ],
)
def test_malformed_entry(tmp_path: Path, bad: Any, message: str) -> None:
    write(tmp_path, "C-MI", {"C-MI-001": entry(), "C-MI-002": bad})
    with pytest.raises(ValueError, match=rf"C-MI\.json, entry C-MI-002: {message}"):
        corebench.read(tmp_path)


def test_one_entry_in_two_files(tmp_path: Path) -> None:
    write(tmp_path, "C-MI", {"C-MI-001": entry()})
    write(tmp_path, "C-MA", {"C-MI-001": entry()})
    with pytest.raises(ValueError, match=r"C-MA\.json: entry C-MI-001 is already in C-MI\.json"):
        corebench.read(tmp_path)
