"""The LoRA experiment: intervals over seeds and items, what is compared with what, and the whole of it on a tiny random model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from bridges import built
from known import recordings

from unisonde.models.bridged import Bridged
from unisonde.study.decoding import lora as experiment
from unisonde.study.decoding.lora import BEFORE, QUANTITIES, Objective, Question, crossed, lora
from unisonde.train.loop import Schedule
from unisonde.train.lora import LoraRecipe

RECIPE = LoraRecipe(rank=4, alpha=8, size=4, precision="fp32", schedule=Schedule(steps=12, rate=1e-2, warmup=2))
ANSWERS = ("ann.", "bob.")


@pytest.fixture(autouse=True)
def few_strengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unisonde.study.decoding.probes.STRENGTHS", (1e-3, 1e-1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Bridged:
    return built("ultravox", tmp_path_factory.getbasetemp())[0]


def parts(n: int = 8) -> tuple[Objective, Objective, list[Question]]:
    """Two halves; of the second, two attributes that halve it in different ways."""
    items = recordings(2 * n)
    first, second = items[:n], items[n:]
    objective = Objective("speaker", [replace(i, prompt="who?") for i in first], [f"{i.labels['speaker']}." for i in first])
    control = Objective("words", first, ["la la"] * n)
    questions = [
        Question("speaker", [replace(i, prompt="who?") for i in second], ANSWERS, [k % 2 for k in range(n)]),
        Question("take", [replace(i, prompt="which?") for i in second], ("x.", "y."), [k // 2 % 2 for k in range(n)]),
    ]
    return objective, control, questions


# Intervals


def test_an_interval_over_seeds_and_items() -> None:
    """Against the variance of a mean over two crossed factors, each drawn anew."""
    rng = np.random.default_rng(0)
    of_seed, of_item = rng.normal(0, 0.5, 8), rng.normal(0, 1.0, 400)
    values = 1.0 + of_seed[:, None] + of_item[None]
    found = crossed(values, draws=4000)
    stderr = np.sqrt(of_seed.var() / 8 + of_item.var() / 400)
    assert found.value == pytest.approx(values.mean()) and found.n == 400
    assert found.stderr == pytest.approx(stderr, rel=0.06)
    assert found.low == pytest.approx(found.value - 1.96 * stderr, abs=0.12 * stderr + 0.03)
    assert found.high == pytest.approx(found.value + 1.96 * stderr, abs=0.12 * stderr + 0.03)


def test_groups_are_drawn_whole() -> None:
    rng = np.random.default_rng(1)
    of_group = rng.normal(0, 1.0, 10)
    groups = [str(k % 10) for k in range(300)]
    values = np.stack([of_group[[k % 10 for k in range(300)]]] * 3)
    apart, together = crossed(values, None, 3000), crossed(values, groups, 3000)
    assert together.stderr == pytest.approx(of_group.std() / np.sqrt(10), rel=0.06) and apart.stderr < 0.3 * together.stderr


# Changes


def table_of(v: float, gmi: float, other: float, n: int = 40, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)

    def scattered(mean: float) -> np.ndarray:
        noise = rng.normal(0, 0.02, n)
        return mean + noise - noise.mean()

    tables = []
    for name, bits in (("speaker", gmi), ("take", other)):
        held = {q: scattered({"gmi": bits, "v_information": v}.get(q, 0.0)) for q in QUANTITIES}
        tables.append(pl.DataFrame({"read": name, "item": [str(k) for k in range(n)]} | held))
    return pl.concat(tables)


def known(monkeypatch: pytest.MonkeyPatch, after: dict[str, float], others: dict[str, float]) -> None:
    """What is measured, without a model: numbers with a mean that is known, and scatter about it."""

    def measured(self: object, which: str, number: int) -> pl.DataFrame:
        before = which == BEFORE
        return table_of(0.8, 0.1 if before else after[which], 0.3 if before else others[which], 8, number + 10 * len(which))

    monkeypatch.setattr(experiment._Work, "measured", measured)


def test_only_the_trained_one_rises(model: Bridged, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, {"attribute": 0.7, "control": 0.1}, {"attribute": 0.3, "control": 0.3})
    found = lora(model, *parts(), recipe=RECIPE, folds=2, progress=False)
    assert found.attribute == "speaker" and found.interval.value == pytest.approx(0.6, abs=0.03)
    assert found.interval.low > 0.5 and "rises for speaker alone" in found.sentence and "the control, words" in found.sentence
    table = found.table
    assert len(table) == 2 * 2 * len(QUANTITIES) * 4 and table["seed"].null_count() == 2 * 2 * len(QUANTITIES)
    over = table.filter(pl.col("seed").is_null() & (pl.col("quantity") == "gmi"))
    assert over.select("trained", "read").rows() == [
        ("attribute", "speaker"),
        ("attribute", "take"),
        ("control", "speaker"),
        ("control", "take"),
    ]
    row = over.row(0, named=True)
    assert row["after"] - row["before"] == pytest.approx(row["change"]) and row["low"] < row["change"] < row["high"]
    each = table.filter((pl.col("trained") == "attribute") & (pl.col("read") == "speaker") & (pl.col("quantity") == "gmi"))
    assert each["change"][:3].mean() == pytest.approx(row["change"]) and each["low"][:3].null_count() == 3


def test_another_that_rises_is_said(model: Bridged, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, {"attribute": 0.7, "control": 0.1}, {"attribute": 0.5, "control": 0.3})
    assert "rises for speaker and take" in lora(model, *parts(), recipe=RECIPE, folds=2, progress=False).sentence
    known(monkeypatch, {"attribute": 0.1, "control": 0.1}, {"attribute": 0.3, "control": 0.3})
    assert "rises for none" in lora(model, *parts(), recipe=RECIPE, folds=2, progress=False).sentence


# The whole


def test_on_a_tiny_model(model: Bridged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    before = {key: value.clone() for key, value in model.network.state_dict().items()}
    given = {"recipe": RECIPE, "seeds": 2, "folds": 2, "draws": 50, "out": tmp_path / "l", "progress": False}
    found = lora(model, *parts(), **given)  # type: ignore[arg-type]
    [folder] = (tmp_path / "l").iterdir()
    kept = {path.name for path in folder.iterdir()}
    assert kept == {"settings.json", "seconds.json", "before-0.parquet"} | {
        f"{w}-{k}.parquet" for w in ("attribute", "control") for k in (0, 1)
    }
    assert all(torch.equal(value, before[key]) for key, value in model.network.state_dict().items())

    # What is measured before is what the other experiments measure.
    first = pl.read_parquet(folder / "before-0.parquet").filter(pl.col("read") == "speaker")
    _, _, [question, _] = parts()
    scores = model.answer_scores(question.items, ANSWERS)
    hits = (scores.argmax(1) == torch.tensor(question.labels)).double()
    assert first["decoder_accuracy"].to_list() == hits.tolist()

    # Nothing is trained twice, and a finished part is not measured again.
    monkeypatch.setattr(experiment, "learn", None)
    again = lora(model, *parts(), **given)  # type: ignore[arg-type]
    assert again.table.equals(found.table) and again.sentence == found.sentence
    with pytest.raises(TypeError):  # other settings are another experiment, which has to be learnt
        lora(model, *parts(), **given | {"recipe": replace(RECIPE, rank=2)})  # type: ignore[arg-type]


def test_states_are_those_of_the_prompt(model: Bridged, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors at the answer and of the mean over features, against the run of features."""
    from unisonde.models.trace import Trace
    from unisonde.study.decoding.features import _Vectors

    taken: list[np.ndarray] = []

    def predict(x: np.ndarray, *rest: object, **more: object) -> object:
        taken.append(x)
        return type("P", (), {"bits": np.zeros(len(x)), "hits": np.zeros(len(x))})

    monkeypatch.setattr(experiment, "predict", predict)
    objective, control, questions = parts()
    work = experiment._Work(model, RECIPE, objective, control, questions, 2, 0, None, False)
    work.about(questions[0])
    for k, item in enumerate(questions[0].items):
        vectors = _Vectors(item)
        model.show([item], Trace(vectors))
        final = model.llm.depth + 1
        assert np.allclose(taken[0][k], vectors.read()[f"llm:{final}:last"], atol=1e-5)
        assert np.allclose(taken[1][k], vectors.read()[f"llm:{final}:mean"], atol=1e-5)


# What is refused


def test_what_is_refused(model: Bridged) -> None:
    objective, control, questions = parts()
    for given, sentence in (
        ((objective, control, questions[1:]), "'speaker' is learnt and not read"),
        ((objective, replace(control, items=control.items[1:], responses=control.responses[1:]), questions), "different items"),
        ((objective, replace(control, responses=["la"]), questions), "8 items and 1 responses of words"),
        ((replace(objective, items=questions[0].items), replace(control, items=questions[0].items), questions), "'r8' is learnt"),
        ((objective, control, [questions[0], replace(questions[1], items=questions[1].items[1:])]), "ask the same of all"),
    ):
        with pytest.raises(ValueError, match=sentence):
            lora(model, *given, recipe=RECIPE, progress=False)
    with pytest.raises(ValueError, match="2 or more, better 3; got 1"):
        lora(model, objective, control, questions, seeds=1, progress=False)
