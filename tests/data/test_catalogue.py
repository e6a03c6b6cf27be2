"""The catalogue: names, splits and paths, what suits a task, and the digest of a data set."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import unisonde.data
from unisonde.data import catalogue, corebench, prompts
from unisonde.data.catalogue import DATA, DataSet, data_digest, open_data
from unisonde.data.item import TASKS, Item


def test_every_entry_is_complete() -> None:
    assert list(DATA) == ["tabletop", "textured", "t2i-corebench", "prompts", "fsdd", "emodb", "spoken"]
    for name, data in DATA.items():
        assert data.name == name and ":" not in name
        assert data.summary and "\n" not in data.summary and data.licence
        assert data.tasks and set(data.tasks) <= set(TASKS)
        assert data.loader.count(":") == 1
        json.dumps(dataclasses.asdict(data))


def test_listing_imports_no_reader() -> None:
    code = (
        "import sys, unisonde; before = set(sys.modules); import unisonde.data.catalogue as c; list(c.DATA);"
        "print(*(set(sys.modules) - before))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "unisonde.data.catalogue" in loaded
    heavy = {
        "torch",
        "transformers",
        "polars",
        "scipy",
        "unisonde.data.tabletop",
        "unisonde.data.corebench",
        "unisonde.data.prompts",
        "unisonde.data.speech",
        "unisonde.data.spoken",
        "soundfile",
    }
    assert not heavy & set(loaded)


def test_everything_is_reached_from_the_package() -> None:
    assert all(hasattr(unisonde.data, name) for name in unisonde.data.__all__)


def test_prompts_for_both_tasks() -> None:
    assert open_data("prompts") is DATA["prompts"]
    assert open_data("prompts").items("text") == open_data("prompts").items("image") == prompts.read()


def test_corebench(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(corebench.VARIABLE, str(shared / "data" / "t2i-corebench"))
    assert len(open_data("t2i-corebench").items("image")) == 1080


def test_folder_of_corebench(tmp_path: Path) -> None:
    entry = {"Main Class": "a", "Sub Class": "b", "Prompt": "p", "Checklist": [], "Remark": ""}
    (tmp_path / "R-RR.json").write_text(json.dumps({"R-RR-001": entry}))
    data = open_data(tmp_path)
    assert data.name == str(tmp_path) and data.summary == DATA["t2i-corebench"].summary
    assert [item.category for item in data.items("text")] == ["abductive"]


# Splits


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Puts a stand-in in the place of Tabletop's loader, and lists its calls."""
    calls: list[dict[str, Any]] = []

    def load(task: str, split: str = "test", seed: int = 0) -> list[Item]:
        calls.append({"task": task, "split": split, "seed": seed})
        return [Item("a", "c", "p"), Item("b", "c", "p", Image.new("RGB", (1, 1)))]

    monkeypatch.setattr(catalogue.DataSet, "_load", lambda self: load)
    return calls


def test_split_by_name_by_argument_and_by_default(drawn: list[dict[str, Any]]) -> None:
    open_data("tabletop").items("text")
    open_data("tabletop:compositional").items("image", seed=3)
    open_data("tabletop:compositional").items("text", split="train")
    assert drawn == [
        {"task": "text", "split": "test", "seed": 0},
        {"task": "image", "split": "compositional", "seed": 3},
        {"task": "text", "split": "train", "seed": 0},
    ]
    assert open_data("tabletop:compositional").name == "tabletop:compositional"


def test_task_image_takes_text_prompts_only(drawn: list[dict[str, Any]]) -> None:
    assert [item.id for item in DATA["tabletop"].items("image")] == ["a"]
    assert [item.id for item in DATA["tabletop"].items("text")] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tabletop:valid", "tabletop has no split 'valid'; it has test, train, compositional"),
        ("tabletop:", "tabletop has no split ''; it has"),
        ("prompts:test", "prompts has no splits, got 'test'; leave it out"),
    ],
)
def test_unknown_split(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_data(name)


def test_unknown_split_as_an_argument() -> None:
    with pytest.raises(ValueError, match="tabletop has no split 'dev'"):
        DATA["tabletop"].items("text", split="dev")
    with pytest.raises(ValueError, match="prompts has no splits"):
        DATA["prompts"].items("text", split="test")


def test_tabletop_splits_are_those_of_the_world() -> None:
    from unisonde.data.tabletop.scene import SPLITS

    assert set(DATA["tabletop"].splits) == set(SPLITS)


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match="the task must be one of text, image, got 'video'"):
        DATA["prompts"].items("video")  # type: ignore[arg-type]
    data = DataSet("x", "s", ("image",), "l", "unisonde.data.prompts:read")
    with pytest.raises(ValueError, match="x has no items for task 'text', only for image"):
        data.items("text")


# Paths


def test_jsonl_and_folder(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a"}\n{"image": "gone.png"}\n')
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.txt").write_text("a")
    assert [item.id for item in open_data(path).items("text")] == ["000001", "000002"]
    assert [item.id for item in open_data(str(path)).items("image")] == ["000001"]
    assert [item.id for item in open_data(tmp_path / "f").items("image")] == ["a.txt"]


def test_nothing_that_suits(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"all 1 items of .* have an image prompt; task 'image' needs text prompts"):
        open_data(tmp_path).items("image")
    (tmp_path / "b.wav").touch()
    with pytest.raises(ValueError, match=r"all 2 items of .* have an image prompt or an audio prompt; task 'image' needs"):
        open_data(tmp_path).items("image")


def test_the_folder_of_a_data_set_by_name(tmp_path: Path) -> None:
    entry = {"Main Class": "a", "Sub Class": "b", "Prompt": "p", "Checklist": [], "Remark": ""}
    (tmp_path / "R-RR.json").write_text(json.dumps({"R-RR-001": entry}))
    data = open_data(f"t2i-corebench:{tmp_path}")
    assert [item.id for item in data.items("image")] == ["R-RR-001"] and open_data(data.name) == data
    with pytest.raises(ValueError, match=r"'gone' is not a folder; give t2i-corebench:FOLDER with its files"):
        open_data("t2i-corebench:gone")
    with pytest.raises(ValueError, match="'' is not a folder"):
        open_data("t2i-corebench:")


@pytest.mark.parametrize("given", ["prompts", "./prompts", "with:colon", "tabletop:test", "tabletop:mine"])
def test_name_opens_the_same_path_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    """A Path is a path, even one that is called like a data set."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / given).mkdir()
    (tmp_path / given / "mine.txt").write_text("a")
    data = open_data(Path(given))
    assert data.path is not None and [item.id for item in data.items("text")] == ["mine.txt"]
    assert open_data(data.name) == data


def test_name_goes_before_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").mkdir()
    assert open_data("prompts") is DATA["prompts"]


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert open_data("~/mine").path == tmp_path / "mine"


@pytest.mark.parametrize(
    ("given", "guess"),
    [
        ("tabeltop", "the nearest name is tabletop"),
        ("Tabletop", "the nearest name is tabletop"),
        ("tabeltop:test", "the nearest name is tabletop"),
        ("corebench", "the nearest name is t2i-corebench"),
        ("prompt", "the nearest name is prompts"),
        ("zzz", "the names are tabletop, textured, t2i-corebench, prompts"),
        ("", "the names are"),
        ("no/such/file.jsonl", "no data set and no path"),
    ],
)
def test_unknown_name(given: str, guess: str) -> None:
    with pytest.raises(ValueError, match=f"{guess}.*") as raised:
        open_data(given)
    assert repr(given) in str(raised.value) and "path of a folder or a .jsonl file" in str(raised.value)


def test_wrong_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"a\.csv is neither a folder nor a \.jsonl file"):
        open_data(tmp_path / "a.csv")


# Digest


def test_digest_tells_data_apart() -> None:
    items = [Item("a", "c", "p"), Item("b", "c", "q")]
    assert data_digest(items) == data_digest(iter([Item("a", "c", "p"), Item("b", "c", "q")]))
    others = [items[::-1], items[:1], items * 2, [], [items[0], Item("b", "c", "Q")]]
    assert len({data_digest(other) for other in [items, *others]}) == 6


def test_digest_of_files_follows_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    before = data_digest(open_data(tmp_path).items("text"))
    (tmp_path / "a.png").write_bytes(b"x")
    assert data_digest(open_data(tmp_path).items("text")) != before
