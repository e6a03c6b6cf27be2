"""Ablation: what is removed, how spans are matched, and the scores of a tiny model under edits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bridges import built
from known import recordings

from unisonde.study.decoding.ablate import ablate, conditions, matched, removal
from unisonde.study.decoding.directions import Directions, directions
from unisonde.study.decoding.features import ADAPTER_OUT, Hook, collect


def made(variances: list[float], specific: list[bool], width: int = 12, seed: int = 0) -> Directions:
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.normal(size=(width, width)))[0][: len(variances)]
    held = np.array(variances)
    return Directions(vectors, held, held, float(held.sum()), np.array(specific), rng.normal(size=width))


def test_removal_takes_the_span_away_and_nothing_else() -> None:
    found = made([3.0, 2.0], [True, False])
    z = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(0))
    span = torch.as_tensor(found.vectors).float()
    raw = removal(found.vectors)(z)
    torch.testing.assert_close(raw @ span.T, torch.zeros(1, 5, 2), atol=1e-6, rtol=0)
    whole = torch.linalg.qr(span.T, mode="complete")[0][:, 2:]
    torch.testing.assert_close(raw @ whole, z @ whole)
    about = removal(found.vectors, found.mean)(z)
    torch.testing.assert_close(about @ span.T, (torch.as_tensor(found.mean).float() @ span.T).expand(1, 5, 2))
    torch.testing.assert_close(about @ whole, z @ whole)
    torch.testing.assert_close(removal(found.vectors[:0])(z), z)
    assert removal(found.vectors)(z.bfloat16()).dtype == torch.bfloat16


def test_spans_are_matched() -> None:
    found = made([10.0, 8.0, 4.0, 3.0, 2.0, 1.0, 0.5], [True, False, True, False, False, False, False])
    listed = conditions(found, draws=4, seed=1)
    assert [(c.name, c.centring) for c in listed[:4]] == [
        ("whole", ""),
        ("specific", "raw"),
        ("aligned by count", "raw"),
        ("aligned by variance", "raw"),
    ]
    by = {c.name: c for c in listed if c.centring == "recentred"}
    assert by["specific"].modes == (0, 2) and by["aligned by count"].modes == (1, 3)
    # Of 8, 3, 2, 1 and 1/2, what comes nearest to 14.
    assert sum(found.variances[list(by["aligned by variance"].modes)]) == pytest.approx(14.0)
    drawn = [c.modes for c in listed if c.name == "random"]
    assert len(drawn) == 8 and drawn[:4] == drawn[4:] and len(set(drawn)) > 1 and all(len(set(m)) == 2 for m in drawn)
    assert len({c.step for c in listed}) == len(listed)
    # Where most modes are modality-specific, as many of them as there are others.
    most = {c.name: c for c in conditions(made([5.0, 4.0, 3.0, 2.0, 1.0], [True, True, True, True, False]), 1)}
    assert most["specific"].modes == (0,) and most["aligned by count"].modes == (4,) and len(most["random"].modes) == 1
    with pytest.raises(ValueError, match="0 of 2 modes are modality-specific, so there is nothing to compare"):
        conditions(made([2.0, 1.0], [False, False]))


@pytest.mark.parametrize(("wanted", "taken"), [(5.0, [0]), (6.0, [0, 2]), (0.4, []), (0.6, [2]), (99.0, [0, 1, 2]), (9.0, [0, 1])])
def test_the_nearest_variance(wanted: float, taken: list[int]) -> None:
    assert matched(np.array([5.0, 4.0, 1.0]), np.arange(3), wanted).tolist() == taken


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return built("ultravox", tmp_path_factory.getbasetemp())[0]


def test_on_a_tiny_model(model, tmp_path) -> None:
    items = recordings(4)
    found = collect(model, recordings(10), tmp_path / "f", progress=False)
    texts = np.random.default_rng(0).normal(size=(30, found.at(ADAPTER_OUT).shape[1])) * 0.05
    modes = directions(found.at(Hook("llm", 0)), texts, modes=4)
    split = Directions(modes.vectors, modes.variances, modes.text_variances, modes.total, np.array([1, 0, 0, 0], bool), modes.mean)
    answers, labels, responses = ["ann.", "bob."], [0, 1, 0, 1], ["ann", "bob", "ann", "bob"]

    def run():
        return ablate(
            model,
            items,
            responses,
            split,
            answers=answers,
            labels=labels,
            draws=2,
            resamples=50,
            out=tmp_path / "a",
            progress=False,
        )

    first = run()
    table = first.table
    assert table["condition"].to_list() == [
        "whole",
        *(["specific", "aligned by count", "aligned by variance", "random", "random"] * 2),
    ]
    losses = model.response_loss(items, responses).detach().numpy()
    assert table["loss"][0] == pytest.approx(losses.mean(), rel=1e-5) and table["loss_change"][0] is None
    # By hand: one item, its own features, one mode about the mean.
    with torch.no_grad(), model.edited(lambda z: z - ((z - torch.tensor(split.mean).float()) @ u)[..., None] * u):
        u = torch.tensor(split.vectors[0]).float()
        by_hand = model.response_loss(items, responses).numpy()
        right = model.answer_scores(items, answers).argmax(1).numpy() == labels
    row = table.filter(condition="specific", centring="recentred").row(0, named=True)
    assert row["loss"] == pytest.approx(by_hand.mean(), rel=1e-5) and row["accuracy"] == pytest.approx(right.mean())
    assert row["loss_change"] == pytest.approx((by_hand - losses).mean(), abs=1e-6) and abs(row["loss_change"]) > 1e-5
    assert row["loss_low"] <= row["loss_change"] <= row["loss_high"] and 0 < row["loss_p"] <= 1
    assert row["share"] == pytest.approx(split.variances[0] / split.total) and first.interval.value == row["loss_change"]
    raw = table.filter(condition="specific", centring="raw").row(0, named=True)
    assert raw["loss"] != pytest.approx(row["loss"], rel=1e-6)
    assert "changes the loss of the response by" in first.sentence and "in 2 draws" in first.sentence
    assert (
        f"Right answers go from {table['accuracy'][0]:.0%} to {row['accuracy']:.0%}; the commonest alone gets 50%."
        in first.sentence
    )
    assert table["chance"].unique().to_list() == [0.5]
    next((tmp_path / "a").rglob("random-raw-001.parquet")).unlink()
    assert run().table.equals(table)
    # Outside, the model is as before.
    torch.testing.assert_close(model.response_loss(items, responses).detach().numpy(), losses)


def test_without_answers_there_is_loss_alone(model) -> None:
    found = made([3.0, 2.0], [True, False], width=model.language_model.config.hidden_size)
    made_of = ablate(model, recordings(2), ["ann", "bob"], found, draws=0, resamples=20, progress=False)
    table = made_of.table
    assert "Right answers" not in made_of.sentence and table["chance"].null_count() == 7
    assert table["accuracy"].null_count() == len(table) == 7 and table["loss"].is_finite().all()


def test_without_responses_the_right_answer_is_the_response(model) -> None:
    found = made([3.0, 2.0], [True, False], width=model.language_model.config.hidden_size)
    items, answers, labels = recordings(3), ["ann.", "bob is here."], [0, 1, 0]
    table = ablate(model, items, None, found, answers=answers, labels=labels, draws=0, resamples=20, progress=False).table
    assert table["chance"].unique().to_list() == [pytest.approx(2 / 3)]
    by_hand = model.response_loss(items, [answers[label] for label in labels]).mean().item()
    assert table["loss"][0] == pytest.approx(by_hand, rel=1e-5) and table["accuracy"].null_count() == 0
    with pytest.raises(ValueError, match="nothing to score; give responses, or answers with labels"):
        ablate(model, items, None, found, progress=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"responses": ["a"]}, "2 items and 1 responses"),
        ({"answers": ["a.", "b."]}, "answers and labels go together"),
        ({"answers": ["a.", "b."], "labels": [0]}, "2 items and 1 labels"),
        ({"answers": ["a.", "b."], "labels": [0, 2]}, "a label is the number of an answer, 0 to 1; got 2"),
    ],
)
def test_what_does_not_fit(model, changes, said) -> None:
    given = {"responses": ["a", "b"]} | changes
    with pytest.raises(ValueError, match=said):
        ablate(model, recordings(2), given.pop("responses"), made([2.0, 1.0], [True, False]), progress=False, **given)
