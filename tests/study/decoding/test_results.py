"""Results of experiments in a folder: attribute by attribute, whole, and of one model and one set of items."""

from __future__ import annotations

import json
import math

import polars as pl
import pytest

from unisonde.measure import Interval
from unisonde.study.decoding import results
from unisonde.study.decoding.finding import Finding
from unisonde.study.decoding.results import Results

ABOUT = {"model": "tiny", "data": "made", "items": 8}


def finding(attribute: str, *values: float, sentence: str = "") -> Finding:
    table = pl.DataFrame({"attribute": [attribute] * len(values), "value": list(values)})
    return Finding(table, sentence or f"{attribute} has {len(values)}", Interval(values[0], 0.0, math.nan, math.nan, 0.95, 8))


def test_attributes_one_after_another(tmp_path) -> None:
    results.add(tmp_path, "gmi", [finding("shape", 1.0, 2.0), finding("size", 3.0)], ABOUT, {"group": "scene"}, {"started": "a"})
    table = results.add(tmp_path, "gmi", [finding("size", 4.0, 5), finding("count", 6.0)], ABOUT, {"group": None}, {"started": "b"})
    assert table.rows() == [("shape", 1.0), ("shape", 2.0), ("size", 4.0), ("size", 5.0), ("count", 6.0)]
    held = Results.open(tmp_path)
    assert held.tables["gmi"].equals(table) and (held.model, held.data, held.items) == ("tiny", "made", 8)
    assert [(f["attribute"], f["group"]) for f in held.findings("gmi")] == [("shape", "scene"), ("size", None), ("count", None)]
    assert held.findings("gmi")[1]["interval"] == {"value": 4.0, "low": 0.0, "high": None, "level": 0.95}
    assert [session["started"] for session in held.told["gmi"]["sessions"]] == ["a", "b"] and held.findings("probes") == []


def test_a_sentence_over_all_replaces_the_last_one(tmp_path) -> None:
    results.add(tmp_path, "bound", [finding("a", 1.0)], ABOUT, {}, {})
    for rho in (0.1, 0.2):
        both = pl.concat([finding("a", rho).table, finding("b", rho).table])
        results.tell(tmp_path, "bound", Finding(both, f"over all {rho}", Interval(rho, 0, 0, 0, 0.95, 2)))
    assert [f["sentence"] for f in Results.open(tmp_path).findings("bound")] == ["a has 1", "over all 0.2"]


def test_what_is_about_no_attribute_is_replaced(tmp_path) -> None:
    for layers in (1, 2):
        table = pl.DataFrame({"layer": list(range(layers))})
        results.add(tmp_path, "directions", [Finding(table, f"{layers} layers", Interval(0, 0, 0, 0, 0.95, 2))], ABOUT, {}, {})
    held = Results.open(tmp_path)
    assert len(held.tables["directions"]) == 2 and [f["sentence"] for f in held.findings("directions")] == ["2 layers"]


def test_another_model_or_other_items_are_refused(tmp_path) -> None:
    results.check(tmp_path, ABOUT)
    results.add(tmp_path, "gmi", [finding("shape", 1.0)], ABOUT, {}, {})
    results.check(tmp_path, ABOUT | {"anything": "else"})
    with pytest.raises(ValueError, match="holds gmi with items = 8 where 9 is asked for; name another folder"):
        results.check(tmp_path, ABOUT | {"items": 9})
    with pytest.raises(ValueError, match='model = "tiny" where "other"'):
        results.check(tmp_path, ABOUT | {"model": "other"})


def test_folders(tmp_path) -> None:
    assert not Results.are_in(tmp_path) and not Results.are_in(tmp_path / "nowhere")
    (tmp_path / "notes.json").write_text("{}")
    assert not Results.are_in(tmp_path)  # it has no table beside it
    results.add(tmp_path, "gmi", [finding("shape", 1.0)], ABOUT, {}, {})
    assert Results.are_in(tmp_path) and list(Results.open(tmp_path).tables) == ["gmi"]
    (tmp_path / "run.json").write_text("{}")
    assert not Results.are_in(tmp_path)  # a run is a run, whatever lies in it
    (tmp_path / "notes.parquet").touch()
    with pytest.raises(ValueError, match=r"notes\.json is no finding of `unisonde decode`"):
        results.check(tmp_path, ABOUT)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch) -> None:
    results.add(tmp_path, "gmi", [finding("shape", 1.0)], ABOUT, {}, {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("unisonde.study.decoding.finding.flush", lambda path: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError):
        results.add(tmp_path, "gmi", [finding("shape", 2.0)], ABOUT, {}, {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert json.loads(before["gmi.json"])["experiment"] == "gmi"
