"""The experiments by name, end to end on a tiny random model: tables and sentences in a folder, and what is refused."""

from __future__ import annotations

import json

import polars as pl
import pytest
from bridges import built
from known import recordings

from unisonde.data.item import Item
from unisonde.study.decoding import experiments
from unisonde.study.decoding.experiments import decode

TEXTS = [Item(f"t{k}", "", words) for k, words in enumerate(("a red ring", "two dogs", "he left early", "why", "the sun is out"))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return built("ultravox", tmp_path_factory.getbasetemp())[0]


def given(folder, **changes):
    return {
        "items": recordings(8),
        "texts": TEXTS,
        "out": folder,
        "attributes": ("speaker",),
        "folds": 2,
        "draws": 1,
        "progress": False,
    } | changes


@pytest.fixture(autouse=True)
def few_strengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits are quick one by one, and there are many."""
    monkeypatch.setattr("unisonde.study.decoding.probes.STRENGTHS", (1e-3, 1e-1))


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("probes", lambda m: sum(s.depth + 1 + (s.norm is not None) for s in m.stacks) + m.llm.depth + 2),
        ("directions", lambda m: (m.llm.depth + 2) * 7),  # of 8 items, 7 modes
        ("gmi", lambda m: m.llm.depth + 2),
        ("bound", lambda m: 1),
    ],
)
def test_tables_and_sentences(model, tmp_path, name, rows) -> None:
    [found] = decode(name, model, given(tmp_path / "d"))
    table = pl.read_parquet(tmp_path / "d" / f"{name}.parquet")
    assert len(table) == len(found.table) == rows(model)
    told = json.loads((tmp_path / "d" / f"{name}.json").read_text())
    assert told["findings"] == [found.sentence] and told["items"] == 8 and told["seconds"] >= 0


def test_ablation_judges_other_items_than_it_takes_directions_from(model, tmp_path, monkeypatch) -> None:
    seen = {}

    def ablate(model, items, responses, found, **rest):
        seen.update(rest, items=items, responses=responses, modes=len(found.vectors))
        return experiments.Finding(pl.DataFrame({"x": [1]}), "said", None)

    monkeypatch.setattr(experiments, "ablate", ablate)
    decode("ablate", model, given(tmp_path / "d", group="take", response="take"))
    assert len(seen["items"]) == 4 == len({i.id for i in seen["items"]}) and seen["modes"] == 3
    assert seen["answers"] == ["ann.", "bob."] and seen["groups"] == seen["responses"] == [
        str(i.labels["take"]) for i in seen["items"]
    ]
    assert [seen["answers"][k] for k in seen["labels"]] == [f"{i.labels['speaker']}." for i in seen["items"]]
    assert {i.prompt for i in seen["asked"]} == {"What is the speaker? Answer with one of: ann, bob."}
    assert {i.prompt for i in seen["items"]} == {"who speaks?"}


def test_what_is_refused(model, tmp_path) -> None:
    with pytest.raises(ValueError, match="no experiment is called 'probe'; there are probes, directions, ablate, gmi, bound"):
        decode("probe", model, given(tmp_path))
    with pytest.raises(ValueError, match="gmi reads labels of the items; name one or more with --attribute"):
        decode("gmi", model, given(tmp_path, attributes=()))
    with pytest.raises(ValueError, match="item 'r0' has no label 'mood'; it has speaker, take"):
        decode("gmi", model, given(tmp_path, attributes=("mood",)))
    with pytest.raises(ValueError, match="needs texts"):
        decode("directions", model, given(tmp_path, texts=[]))

    class Other:
        name = "twin/janus-pro"

    with pytest.raises(ValueError, match="twin/janus-pro is not an encoder with an adapter and a text decoder"):
        decode("probes", Other(), given(tmp_path))  # type: ignore[arg-type]
