"""Present against usable: a label beside the readout, one along it, a badly tilted readout; and the scores of tiny models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from known import balanced, folder_of, recordings

from unisonde.measure import gmi as one_number
from unisonde.measure.gmi import best_tilt
from unisonde.study.decoding.features import Hook, collect
from unisonde.study.decoding.gmi import Scores, collect_scores, gmi, held_out, lost
from unisonde.study.decoding.splits import Split, splits

N, ANSWERS = 120, ("no.", "yes.")


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def scene(along: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, vectors whose first axis holds the label, and scores by a readout that sees it by `along` and noise beside it."""
    rng = np.random.default_rng(3)
    labels = balanced(N, 2)
    x = rng.normal(size=(N, 5))
    x[:, 0] += 3.0 * np.where(labels, 1, -1)
    logit = along * x[:, 0] + 2.0 * x[:, 1]
    return labels, x, log_softmax(np.stack([-logit, logit], 1) / 2)


def made(tmp_path, along: float):
    labels, x, scores = scene(along)
    vectors = {Hook("llm", k, pool): x for k in range(3) for pool in ("mean", "last")}
    names = np.where(labels, "yes", "no")
    features = folder_of(tmp_path / "f", vectors, {"male": names, "group": np.arange(N) // 2})
    # Layers 0 and 1 by the lens, of which 0 says nothing; 2 is the state after the norm, 2 in the scores the model itself.
    stacked = np.stack([np.full_like(scores, -1.0), scores, scores], 1)
    return features, Scores(stacked, ANSWERS, tuple(features.table["item"]), "0"), labels


def test_a_label_beside_the_readout_is_there_and_of_no_use(tmp_path) -> None:
    features, scores, _ = made(tmp_path, along=0.0)
    found = gmi(features, scores, "male", group="group", folds=3, draws=99, out=tmp_path / "g", progress=False)
    row = found.table.row(-1, named=True)
    assert row["v_information"] > 0.8 and row["v_information_low"] > 0.7
    assert abs(row["gmi"]) < 0.05 and row["gmi_at_one"] < -0.2  # confident for no reason; the tilt takes that away
    assert row["gap_low"] > 0.6 and row["gap"] == pytest.approx(row["v_information"] - row["gmi"])
    assert row["accuracy"] > 0.95 and row["decoder_accuracy"] < 0.65 and row["ceiling"] == pytest.approx(1.0)
    assert row["calibration_loss"] == pytest.approx(row["gmi"] - row["gmi_at_one"])
    assert found.interval.value == row["gap"] and "At its end, the decoder of synthetic uses" in found.sentence
    silent = found.table.row(0, named=True)
    assert silent["gmi"] == pytest.approx(0.0, abs=1e-9) and silent["gmi_at_one"] == pytest.approx(0.0, abs=1e-9)
    assert gmi(features, scores, "male", group="group", folds=3, draws=99, out=tmp_path / "g", progress=False).table.equals(
        found.table
    )


def test_a_label_along_the_readout_is_used(tmp_path) -> None:
    features, scores, labels = made(tmp_path, along=8.0)
    found = gmi(features, scores, "male", folds=3, draws=99, layers=[2], progress=False)
    row = found.table.row(-1, named=True)
    assert row["gmi"] > 0.8 and row["gap_low"] < 0.1 and row["decoder_accuracy"] > 0.95
    with pytest.raises(ValueError, match="the label '0' of group has no answer"):
        gmi(features, scores, "group", progress=False)
    assert len(labels) == row["n"]


def test_a_tilt_is_undone_and_an_inverted_readout_is_worth_nothing() -> None:
    labels, _, scores = scene(0.7)
    outer = splits(labels, folds=3)
    plain, sharp = held_out(scores, labels, outer), held_out(5 * scores, labels, outer)
    np.testing.assert_allclose(plain.bits, sharp.bits, atol=1e-6)
    assert np.median(plain.tilts) == pytest.approx(5 * np.median(sharp.tilts), rel=1e-4)
    assert sharp.plain.mean() < plain.plain.mean() < plain.bits.mean() + 0.05
    inverted = held_out(scores[:, ::-1].copy(), labels, outer)
    assert inverted.tilts == (0.0, 0.0, 0.0) and not inverted.bits.any()
    # The number of `measure`, which deals its own folds, up to their difference.
    assert plain.bits.mean() == pytest.approx(one_number(scores, labels, folds=3).value, abs=0.03)


def test_the_tilt_has_not_seen_what_it_is_judged_by() -> None:
    """Scores of noise: fitted on the same items, s would make a gain of every chance; held out, it gains nothing."""
    rng = np.random.default_rng(5)
    means = []
    for draw in range(30):
        labels, scores = balanced(40, 2, seed=draw), log_softmax(rng.normal(size=(40, 2)))
        outer = splits(labels, folds=4)
        found = held_out(scores, labels, outer)
        log_prior = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
        for split, tilt in zip(outer, found.tilts, strict=True):
            assert tilt == best_tilt(torch.tensor(scores[split.train]), torch.tensor(labels[split.train]), log_prior, doubt=1.0)
        means.append(found.bits.mean())
        seen = held_out(scores, labels, [Split(split.test, split.test) for split in outer]).bits.mean()
        assert seen >= found.bits.mean() and seen >= -1e-12
    assert np.mean(means) < 0 and min(means) < -0.01


def test_one_mistake_does_not_cost_all_that_is_known() -> None:
    """Where the items that a tilt is learnt from are all right, nothing says how far the scores can be believed."""
    labels = balanced(100, 4)
    said = labels.copy()
    said[17] = (said[17] + 1) % 4
    outer = splits(labels, folds=5)
    for steepness in (0.1, 1.0, 30.0):
        found = held_out(log_softmax(steepness * np.eye(4)[said]), labels, outer)
        assert 1.7 < found.bits.mean() < 2.0 and -8 < found.bits.min() == found.bits[17] < -3
    # Ruled out answers have no part in what is not known.
    ruled = np.where(np.eye(4)[labels] > 0, 0.0, -np.inf)
    assert held_out(ruled, labels, outer).bits == pytest.approx(2.0)


def test_a_binary_symmetric_channel() -> None:
    """1 - h(.11) bits whatever flip probability below 1/2 the scores believe in."""
    n, flip = 2000, 0.11
    labels = balanced(n, 2)
    seen = labels ^ (np.random.default_rng(0).random(n) < flip)
    exact = 1 + flip * math.log2(flip) + (1 - flip) * math.log2(1 - flip)
    for believed in (0.3, 0.02):
        scores = np.log(np.where(seen[:, None] == np.arange(2), 1 - believed, believed))
        bits = held_out(scores, labels, splits(labels, folds=4)).bits
        assert abs(bits.mean() - exact) < 3 * bits.std() / math.sqrt(n) < 0.1


def test_what_is_lost_between_words_and_sounds(tmp_path) -> None:
    features, heard, labels = made(tmp_path, along=0.0)
    # Three times as steep as they should be for how often they are right: 11 of 12.
    sure = log_softmax(3.0 * math.log(11.0) * np.eye(2)[np.where(np.arange(N) % 12, labels, 1 - labels)])
    told = Scores(np.stack([sure, sure, sure], 1), ANSWERS, heard.items, "as words")
    found = lost(features, heard, told, "male", group="group", folds=3, draws=99)
    assert 0.5 < found.words.value < 0.62 and abs(found.modal.value) < 0.05
    assert found.tilt == pytest.approx(1 / 3, abs=0.05)  # of the words, which are worth more
    assert found.lost.value == pytest.approx(found.words.value - found.modal.value)
    assert found.lost.low > 0.3 and found.words.n == N
    swapped = lost(features, Scores(told.values, ANSWERS, told.items, heard.digest), heard, "male", folds=3, draws=99)
    assert swapped.lost.value == pytest.approx(-found.lost.value, abs=0.05) and swapped.tilt == pytest.approx(1 / 3, abs=0.05)
    other = Scores(told.values, ANSWERS, told.items[::-1], "as words")
    with pytest.raises(ValueError, match="the scores in words are of other items or answers"):
        lost(features, heard, other, "male")


def test_what_does_not_fit(tmp_path) -> None:
    features, scores, _ = made(tmp_path, 1.0)
    with pytest.raises(ValueError, match="different items or prompts"):
        gmi(features, Scores(scores.values, ANSWERS, scores.items, "1"), "male", progress=False)
    with pytest.raises(ValueError, match=r"the label 'no' of male has no answer among 'never.', 'yes.'; say which"):
        gmi(features, Scores(scores.values, ("never.", "yes."), scores.items, "0"), "male", progress=False)
    three = Scores(np.pad(scores.values, ((0, 0), (0, 0), (0, 1))), (*ANSWERS, "both."), scores.items, "0")
    with pytest.raises(ValueError, match=r"no item has the answer 'both\.'"):
        gmi(features, three, "male", progress=False)
    with pytest.raises(ValueError, match=r"no item has the answer 'no\.'"):
        gmi(features, scores, "male", {"no": "yes.", "yes": "yes."}, progress=False)
    vectors = {Hook("llm", k, "last"): np.zeros((6, 2)) for k in range(3)}
    third = folder_of(tmp_path / "t", vectors, {"of": ["a", "b", "c"] * 2})
    scored = Scores(np.zeros((6, 3, 2)), ANSWERS, tuple(third.table["item"]), "0")
    with pytest.raises(ValueError, match="two labels of of have the same answer; give each its own"):
        gmi(third, scored, "of", {"a": "yes.", "b": "yes.", "c": "no."}, progress=False)


def test_scores_of_a_tiny_model(tmp_path, tmp_path_factory, monkeypatch) -> None:
    from bridges import built

    from unisonde.study.decoding import gmi as room

    monkeypatch.setattr(room, "CHUNK", 3)
    model = built("ultravox", tmp_path_factory.getbasetemp())[0]
    items = recordings(8)
    features = collect(model, items, tmp_path / "f", progress=False)
    scores = collect_scores(model, items, ["ann.", "bob."], tmp_path / "s", progress=False)
    assert scores.values.shape == (8, model.llm.depth + 2, 2)
    np.testing.assert_allclose(
        scores.values, model.answer_scores(items, ["ann.", "bob."], layers=True).detach(), rtol=1e-5, atol=1e-5
    )
    next((tmp_path / "s").rglob("00003.parquet")).unlink()
    again = collect_scores(model, items, ["ann.", "bob."], tmp_path / "s", progress=False)
    np.testing.assert_array_equal(again.values, scores.values)
    table = gmi(features, scores, "speaker", folds=2, draws=20, progress=False).table
    assert table["layer"].to_list() == list(range(model.llm.depth + 2)) and table["gap"].is_finite().all()
