"""The experiments by name, end to end on a tiny random model: tables and sentences in a folder, and what is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from html import unescape

import polars as pl
import pytest
from bridges import built
from known import recordings

from unisonde.data.item import Item
from unisonde.measure import Interval
from unisonde.report.decoding import draw
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
    [only] = told["findings"]
    assert only["sentence"] == found.sentence and only["seconds"] > 0 and told["items"] == 8
    assert only.get("folds") == (None if name == "directions" else 2) and only["group"] is None
    assert only["attribute"] == found.attribute == ("" if name == "directions" else "speaker")
    drawn = draw(tmp_path / "d", name)
    assert drawn == [tmp_path / "d" / f"{name}.pdf", tmp_path / "d" / f"{name}.png"] and all(path.stat().st_size for path in drawn)


def test_each_attribute_may_have_a_group_of_its_own(model, tmp_path) -> None:
    asked = given(tmp_path / "d", items=with_parity(8), attributes=("speaker", "parity"))
    decode("probes", model, asked | {"group": experiments.grouping(["speaker=take"], ("speaker", "parity"))})
    told = json.loads((tmp_path / "d" / "probes.json").read_text())["findings"]
    assert {one["attribute"]: one["group"] for one in told} == {"speaker": "take", "parity": None}
    assert experiments.grouping([], ("speaker",)) is None and experiments.grouping(["take"], ("speaker",)) == "take"
    wrong = (
        ["take", "speaker"],
        ["speaker=take", "take"],
        ["speaker=take", "speaker=parity"],
        ["mood=take"],
        ["speaker="],
        ["=take"],
    )
    for words in wrong:
        with pytest.raises(
            ValueError, match=rf"--group takes one label, or ATTRIBUTE=LABEL .*\(speaker and parity\); got {words[0]}"
        ):
            experiments.grouping(words, ("speaker", "parity"))
    with pytest.raises(ValueError, match=r"directions reads no attribute, .* got speaker=take"):
        decode("directions", model, given(tmp_path / "e", group={"speaker": "take"}))
    assert not (tmp_path / "e").exists()


def test_what_was_used_is_told_and_asking_otherwise_replaces_it(model, tmp_path) -> None:
    """A group that is the attribute itself can keep nothing together; another group is another answer to the same question."""
    folder = tmp_path / "d"
    seconds = []
    for group, used in (("take", "take"), ("speaker", None), ("take", "take")):
        decode("probes", model, given(folder, group=group))
        [told] = json.loads((folder / "probes.json").read_text())["findings"]
        assert told["group"] == used and pl.read_parquet(folder / "probes.parquet")["group"].unique().to_list() == [used or ""]
        seconds.append(told["seconds"])
    assert seconds[0] == seconds[2] != seconds[1]  # what was kept was not made again, and its time is told all the same


def test_items_that_cannot_be_taken_are_counted_and_taken_again(model, tmp_path, monkeypatch) -> None:
    items = with_parity(12)
    show = type(model).show

    def failing(self, some, *rest):
        if some[0].id == "r3":
            raise ValueError("a bad sector")
        return show(self, some, *rest)

    monkeypatch.setattr(type(model), "show", failing)
    [found] = decode("probes", model, given(tmp_path / "d", items=items))
    assert found.used["failed"] == 1 and found.table["n"].unique().to_list() == [11]
    with pytest.raises(ValueError, match=r"item 'r3' could not be taken \(a bad sector\); leave it out"):
        decode("gmi", model, given(tmp_path / "d", items=items))
    monkeypatch.undo()
    monkeypatch.setattr("unisonde.study.decoding.probes.STRENGTHS", (1e-3, 1e-1))
    [found] = decode("probes", model, given(tmp_path / "d", items=items))
    assert found.used["failed"] == 1  # as it was left
    [found] = decode("probes", model, given(tmp_path / "d", items=items, retry=True))
    assert found.used["failed"] == 0 and found.table["n"].unique().to_list() == [12]


def test_without_matplotlib_the_table_stands(model, tmp_path, monkeypatch) -> None:
    decode("gmi", model, given(tmp_path))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'unisonde\[report\]'"):
        draw(tmp_path, "gmi")
    assert (tmp_path / "gmi.parquet").is_file()


def test_attributes_and_experiments_side_by_side_in_a_report(model, tmp_path) -> None:
    """What real experiments write is what the report reads; a second attribute stands beside the first."""
    from unisonde.report import write_report
    from unisonde.study.decoding.results import Results

    folder = tmp_path / "d"
    asked = [("probes", "speaker"), ("probes", "parity"), ("gmi", "speaker"), ("gmi", "parity"), ("directions", "speaker")]
    asked += [("ablate", "speaker"), ("bound", "speaker")]
    for name, attribute in asked:
        decode(name, model, given(folder, attributes=(attribute,), items=with_parity(12)))
    held = Results.open(folder)
    assert sorted(held.told) == sorted({name for name, _ in asked})
    assert [f["attribute"] for f in held.findings("gmi")] == ["speaker", "parity"]
    assert held.tables["gmi"]["attribute"].unique(maintain_order=True).to_list() == ["speaker", "parity"]
    html = write_report([folder], tmp_path / "r.html").read_text(encoding="utf-8")
    assert html.count('<script type="application/json"') == 5 and len(list((tmp_path / "r_figures").iterdir())) == 10
    assert all(finding["sentence"] in unescape(html) for name in held.told for finding in held.findings(name))
    with pytest.raises(ValueError, match="items = 12 where 8 is asked for; name another folder"):
        decode("gmi", model, given(folder))


def test_what_is_lost_is_held_against_the_labels_in_words(model, tmp_path, monkeypatch) -> None:
    seen = {}
    real = experiments.collect_scores

    def collect_scores(model, items, answers, out, progress):
        seen[out.name] = items
        return real(model, items, answers, out, progress)

    monkeypatch.setattr(experiments, "collect_scores", collect_scores)
    [found, _] = decode("bound", model, given(tmp_path / "d", items=with_parity(8), attributes=("speaker", "parity")))
    told = seen["scores-in-words-speaker"]
    assert {item.modality for item in told} == {"text"} and {item.modality for item in seen["scores-speaker"]} == {"audio"}
    question = "What is the speaker? Answer with one of: ann, bob."
    assert all(item.prompt.endswith(f"\n{question}") for item in told)
    assert seen["scores-speaker"][1].prompt == question
    row = found.table.row(0, named=True)
    assert row["lost"] == pytest.approx(row["gmi_words"] - row["gmi"]) and row["n_texts"] == 8


def test_phrasings_do_not_go_with_labels(model, tmp_path) -> None:
    """Items often stand in the order of their labels: ten digits, five phrasings."""
    items = [replace(recordings(1)[0], id=f"i{k}", labels={"digit": f"d{k % 10}"}) for k in range(80)]
    setting = experiments.Setting(model, items, (), tmp_path, ("digit",))
    phrasings: dict[str, set[str]] = {}
    for item in setting.in_words("digit"):
        label = str(item.labels["digit"])
        assert item.modality == "text" and label in item.prompt
        phrasings.setdefault(label, set()).add(item.prompt.replace(label, "_"))
    assert len(phrasings) == 10 and all(len(held) >= 3 for held in phrasings.values())


def test_an_order_takes_three_attributes(model, tmp_path) -> None:
    folder = tmp_path / "d"
    items = [replace(item, labels=item.labels | {"third": ("a", "b", "b")[k % 3]}) for k, item in enumerate(with_parity(12))]
    assert len(decode("bound", model, given(folder, attributes=("speaker", "parity"), items=items))) == 2
    found = decode("bound", model, given(folder, attributes=("third",), items=items))
    assert len(found) == 2 and found[-1].sentence.startswith("Over 3 attributes the order")
    told = json.loads((folder / "bound.json").read_text())["findings"]
    assert [finding["attribute"] for finding in told] == ["speaker", "parity", "third", ""]


def with_parity(count: int) -> list[Item]:
    """Recordings with a second label of their take."""
    return [replace(item, labels=item.labels | {"parity": ("even", "odd")[item.labels["take"] % 2]}) for item in recordings(count)]


def test_ablation_judges_other_items_than_it_takes_directions_from(model, tmp_path, monkeypatch) -> None:
    seen = {}

    def ablate(model, items, responses, found, **rest):
        seen.update(rest, items=items, responses=responses, modes=len(found.vectors))
        return experiments.Finding(pl.DataFrame({"x": [1]}), "said", Interval(0.1, 0.0, 0.2, 0.05, 0.95, 4))

    monkeypatch.setattr(experiments, "ablate", ablate)
    decode("ablate", model, given(tmp_path / "d", group="take", response="take"))
    assert len(seen["items"]) == 4 == len({i.id for i in seen["items"]}) and seen["modes"] == 3
    assert seen["answers"] == ["ann.", "bob."] and seen["groups"] == seen["responses"] == [
        str(i.labels["take"]) for i in seen["items"]
    ]
    assert [seen["answers"][k] for k in seen["labels"]] == [f"{i.labels['speaker']}." for i in seen["items"]]
    assert {i.prompt for i in seen["asked"]} == {"What is the speaker? Answer with one of: ann, bob."}
    assert {i.prompt for i in seen["items"]} == {"who speaks?"}
    decode("ablate", model, given(tmp_path / "e", group="speaker", response="take"))
    assert seen["groups"] is None  # as it is told: a group that is the attribute keeps nothing together


def test_learning_judges_other_items_than_it_learns_from(model, tmp_path, monkeypatch) -> None:
    seen = {}

    def lora(model, objective, control, questions, **rest):
        seen.update(rest, objective=objective, control=control, questions=questions)
        return experiments.Finding(pl.DataFrame({"attribute": ["speaker"]}), "said", Interval(0.1, 0.0, 0.2, 0.05, 0.95, 4))

    monkeypatch.setattr(experiments, "lora", lora)
    items = with_parity(12)
    by_id = {item.id: item for item in items}
    asked = given(tmp_path / "d", items=items, attributes=("speaker", "parity"), response="parity", group="take")
    decode("lora", model, asked)
    learnt, judged = ([item.id for item in one.items] for one in (seen["objective"], seen["questions"][0]))
    assert len(learnt) == len(judged) == 6 and not {*learnt} & {*judged}
    # Both speakers of a take are on one side.
    assert not {by_id[i].labels["take"] for i in learnt} & {by_id[i].labels["take"] for i in judged}
    assert seen["objective"].responses == [f"{by_id[i].labels['speaker']}." for i in learnt]
    assert seen["control"].responses == [f"{by_id[i].labels['parity']}." for i in learnt]
    assert [item.prompt for item in seen["control"].items] == ["What is the parity? Answer with one of: even, odd."] * 6
    for question, name in zip(seen["questions"], ("speaker", "parity"), strict=True):
        assert [question.answers[k] for k in question.labels] == [f"{by_id[i].labels[name]}." for i in judged]
        assert list(question.groups) == [str(by_id[i].labels["take"]) for i in judged]
    # A control that is no attribute is said to the item as it is.
    decode("lora", model, asked | {"out": tmp_path / "e", "response": "take"})
    assert {item.prompt for item in seen["control"].items} == {"who speaks?"}
    assert seen["control"].responses == [str(by_id[i].labels["take"]) for i in learnt]
    for response in (None, "speaker"):
        with pytest.raises(ValueError, match="lora needs a control: name with --response a label other than the attribute"):
            decode("lora", model, asked | {"out": tmp_path / "f", "response": response})


def test_what_is_refused(model, tmp_path) -> None:
    with pytest.raises(ValueError, match="no experiment is called 'probe'; there are probes, directions, ablate, gmi, bound, lora"):
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
