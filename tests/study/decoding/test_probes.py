"""Linear probes of vectors with known answers: a planted label, none, one that a group gives away."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
from known import balanced, folder_of, recordings

from unisonde.study.decoding.features import ADAPTER_OUT, Hook
from unisonde.study.decoding.probes import STRENGTHS, Predictions, predict, probes, shuffled
from unisonde.study.decoding.splits import splits

LAST = Hook("llm", 3)


def planted(labels: np.ndarray, width: int, strength: float, seed: int = 0) -> np.ndarray:
    """Noise of unit variance, with the label's own axis moved by `strength`."""
    x = np.random.default_rng(seed).normal(size=(len(labels), width))
    x[np.arange(len(labels)), labels] += strength
    return x


def test_information_of_gaussian_classes_is_reached() -> None:
    """Two Gaussians at distance 2 delta: the mutual information by quadrature, which a linear probe reaches with many samples."""
    delta, n = 1.0, 2000
    labels = balanced(n, 2)
    x = np.random.default_rng(1).normal(size=(n, 3)) * [1.0, 5.0, 0.2]
    x[:, 0] += np.where(labels, delta, -delta)
    t = np.linspace(-9, 9, 20001)
    density = np.exp(-((t - delta) ** 2) / 2) / math.sqrt(2 * math.pi)
    information = 1 - np.trapezoid(density * np.log2(1 + np.exp(-2 * delta * t)), t)
    found = predict(x, labels, splits(labels, folds=4))
    error = found.bits.std() / math.sqrt(n)
    assert abs(found.bits.mean() - information) < 3 * error < 0.06
    assert abs(found.hits.mean() - 0.8413) < 3 * math.sqrt(0.84 * 0.16 / n)  # Phi(delta)


def test_wide_vectors_lose_nothing_by_the_rotation(monkeypatch) -> None:
    """With more dimensions than samples the fit runs in their span; padding with zeros to get there changes nothing."""
    labels = balanced(40, 2)
    x = planted(labels, 6, 2.0)
    outer = splits(labels, folds=2)
    narrow = predict(x, labels, outer, strengths=[0.1])
    wide = predict(np.pad(x, ((0, 0), (0, 60))), labels, outer, strengths=[0.1])
    np.testing.assert_allclose(narrow.log_probabilities, wide.log_probabilities, atol=2e-3)


def test_the_regularisation_follows_what_is_there() -> None:
    labels = balanced(90, 3)
    outer = splits(labels, folds=3)
    there = predict(planted(labels, 20, 6.0), labels, outer)
    nothing = predict(planted(labels, 20, 0.0), labels, outer)
    assert min(there.strengths) > max(nothing.strengths)
    assert there.bits.mean() > 1.2 and there.hits.mean() > 0.95
    assert abs(nothing.bits.mean()) < 0.05  # the strongest regularisation leaves the shares of the labels


def test_a_group_that_gives_the_label_away_is_of_no_use() -> None:
    """Vectors say who the group is, and the label is of the group by chance: ungrouped splits read it, grouped ones cannot."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(24), 6)
    of_group = np.arange(24) % 2
    labels = of_group[groups]
    x = rng.normal(size=(24, 40))[groups] + 0.1 * rng.normal(size=(len(groups), 40))
    leaking = predict(x, labels, splits(labels, None, 3))
    apart = predict(x, labels, splits(labels, groups, 3), groups)
    assert leaking.hits.mean() > 0.95 and apart.hits.mean() < 0.75 and apart.bits.mean() < 0.1


def test_shuffled_labels_keep_groups_whole() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(list("abcdefgh"), 3)
    outer = splits(np.repeat([0, 1] * 4, 3), groups, 2)
    whole = shuffled(np.repeat([0, 1] * 4, 3), groups, outer, rng)
    assert all(len(set(whole[groups == g])) == 1 for g in "abcdefgh") and whole.sum() == 12
    within = balanced(24, 2)
    free = shuffled(within, groups, outer, rng)
    assert sorted(free) == sorted(within) and (free != within).any()


def test_bits_are_against_the_shares_of_the_labels() -> None:
    labels = np.array([0, 0, 0, 1])
    same = np.log(np.tile([0.75, 0.25], (4, 1)))
    assert Predictions(same, labels, (1.0,)).bits == pytest.approx(np.zeros(4))
    assert Predictions(same, labels, (1.0,)).hits.tolist() == [1, 1, 1, 0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    labels = balanced(60, 3)
    vectors = {ADAPTER_OUT: planted(labels, 8, 8.0), Hook("llm", 0): planted(labels, 8, 2.5, 1), LAST: planted(labels, 8, 0.0, 2)}
    names = np.array(["low", "mid", "high"])[labels]
    return folder_of(
        tmp_path_factory.mktemp("made") / "f", vectors, {"pitch": names, "group": np.arange(60) // 2, "one": ["x"] * 60}
    )


def test_the_table_of_a_planted_label(made, tmp_path) -> None:
    found = probes(made, "pitch", "group", folds=3, shuffles=2, draws=99, out=tmp_path / "p", progress=False)
    adapter, first, last = found.table.to_dicts()
    assert (adapter["stack"], first["layer"], last["layer"]) == ("adapter", 0, 3)
    assert adapter["accuracy"] > 0.95 and adapter["times"] == pytest.approx(3 * adapter["accuracy"]) and adapter["retention"] == 1.0
    assert adapter["ceiling"] == pytest.approx(math.log2(3)) and adapter["uniform"] == adapter["chance"] == pytest.approx(1 / 3)
    assert adapter["v_low"] > first["v_information"] > last["v_information"] and abs(last["v_information"]) < 0.15
    assert 0.3 < first["retention"] < 1.0 > 0.4 > last["retention"]
    assert (
        abs(adapter["null_accuracy"] - 1 / 3) < 0.2 and adapter["null_v_information"] < 0.1 and adapter["p"] == pytest.approx(1 / 3)
    )
    assert found.interval.value == last["v_information"] and found.interval.low <= found.interval.value <= found.interval.high
    assert found.sentence.startswith(
        "At layer 3 of llm of synthetic, a linear probe reads pitch (3 labels, 60 items, held out by group)"
    )
    # Asked again, every hook is read from where it was kept; a hook that is missing alone is made again, to the same numbers.
    next((tmp_path / "p").rglob("llm-0-mean.parquet")).unlink()
    assert probes(made, "pitch", "group", folds=3, shuffles=2, draws=99, out=tmp_path / "p", progress=False).table.equals(
        found.table
    )
    other = probes(made, "pitch", "group", folds=3, shuffles=2, draws=99, seed=1, out=tmp_path / "p", progress=False).table
    assert not other.equals(found.table) and other["seed"].unique().to_list() == [1]


def test_a_label_in_one_inner_group_is_read_all_the_same() -> None:
    """Two examples, one a fold: the training part has one, so there is nothing to choose the regularisation by."""
    labels = np.array([0] * 10 + [1] * 2)
    found = predict(np.eye(2)[labels] + 0.01 * np.arange(24).reshape(12, 2), labels, splits(labels, folds=2))
    assert set(found.strengths) == {min(STRENGTHS)} and np.isfinite(found.log_probabilities).all()


def test_what_cannot_be_probed(made) -> None:
    with pytest.raises(ValueError, match="all 60 items have the same label"):
        probes(made, "one", progress=False)
    with pytest.raises(ValueError, match="no item has a label 'mood'"):
        probes(made, "pitch", "mood", progress=False)


def test_on_a_tiny_model(tmp_path, tmp_path_factory) -> None:
    from bridges import built

    from unisonde.study.decoding.features import collect

    model = built("ultravox", tmp_path_factory.getbasetemp())[0]
    found = collect(model, recordings(8), tmp_path / "f", progress=False)
    some = [Hook("encoder", 0), ADAPTER_OUT, Hook("llm", 1, "last"), found.last]
    table = probes(found, "speaker", hooks=some, folds=2, shuffles=0, draws=20, progress=False).table
    assert len(table) == 4 and table["v_information"].is_finite().all() and table["p"].null_count() == len(table)
    assert table.schema["retention"] == pl.Float64
