"""Linear probes of vectors with known answers: a planted label, none, one that a group gives away."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
from known import balanced, folder_of, recordings
from scipy.stats import f_oneway

from unisonde.study.decoding.features import ADAPTER_OUT, Hook
from unisonde.study.decoding.probes import STRENGTHS, STRONGEST, Predictions, explained, predict, probes, shuffled
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


def test_wide_vectors_lose_nothing_by_the_rotation() -> None:
    """With more dimensions than samples the fit runs in their span; padding with zeros to get there changes nothing."""
    labels = balanced(40, 2)
    x = planted(labels, 6, 2.0)
    outer = splits(labels, folds=2)
    narrow = predict(x, labels, outer, given=(0.1, 1.0))
    wide = predict(np.pad(x, ((0, 0), (0, 60))), labels, outer, given=(0.1, 1.0))
    np.testing.assert_allclose(narrow.log_probabilities, wide.log_probabilities, atol=2e-3)


def test_the_regularisation_follows_what_is_there() -> None:
    labels = balanced(90, 3)
    outer = splits(labels, folds=3)
    there = predict(planted(labels, 20, 6.0), labels, outer)
    nothing = predict(planted(labels, 20, 0.0), labels, outer)
    assert min(there.strengths) > min(STRENGTHS) and min(there.tilts) > max(nothing.tilts)
    assert there.bits.mean() > 1.2 and there.hits.mean() > 0.95
    assert abs(nothing.bits.mean()) < 0.05 and max(nothing.tilts) < 0.3  # what is left are the shares of the labels


def test_a_probe_that_is_too_sure_is_tilted() -> None:
    """A label that is faint beside what moves all dimensions: at every regularisation the probe costs bits, and there are some."""
    rng = np.random.default_rng(3)
    labels = rng.permutation(np.repeat([0, 1, 2], [60, 60, 120]))
    x = planted(labels, 200, 1.0, 3) + 10 * rng.normal(size=(240, 8)) @ rng.normal(size=(8, 200))
    outer = splits(labels, folds=4)
    found = predict(x, labels, outer)
    plain = [predict(x, labels, outer, given=(strength, 1.0)).bits.mean() for strength in (1e-5, *STRENGTHS)]
    assert found.bits.mean() > 0.01 > max(plain) and 0 < min(found.tilts) <= max(found.tilts) < 0.8
    assert np.allclose(np.exp(found.log_probabilities).sum(1), 1)
    # A tilt is P(a)^(1 - s) q(a)^s: none of the probe is left at 0, all of it at 1; in between its logits and the shares' are mixed.
    whole, half, none = (predict(x, labels, outer, given=(1.0, tilt)).log_probabilities for tilt in (1.0, 0.5, 0.0))
    assert np.allclose(np.exp(none), [0.25, 0.25, 0.5])
    mixed = np.sqrt(np.exp(whole) * [0.25, 0.25, 0.5])
    assert np.allclose(np.exp(half), mixed / mixed.sum(1, keepdims=True))


def test_the_tilt_is_chosen_where_the_probe_is_not_judged() -> None:
    """The items of a fold have no part in the tilt, nor in the regularisation, by which they are judged."""
    labels = balanced(60, 2)
    x, outer = planted(labels, 40, 1.0), splits(labels, folds=3)
    found = predict(x, labels, outer)
    changed, dealt = x.copy(), labels.copy()
    changed[outer[0].test] += 3.0
    dealt[outer[0].test] = 1 - dealt[outer[0].test]
    again = predict(changed, dealt, outer)
    assert (again.strengths[0], again.tilts[0]) == (found.strengths[0], found.tilts[0])
    assert again.tilts[1:] != found.tilts[1:]


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
    assert Predictions(same, labels, (1.0,), (1.0,)).bits == pytest.approx(np.zeros(4))
    assert Predictions(same, labels, (1.0,), (1.0,)).hits.tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("seed", range(3))
def test_the_variance_that_labels_explain_is_that_of_the_f_test(seed: int) -> None:
    """Of one dimension, omega squared follows from scipy's F; of many, it is that of their sums of squares."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([[0, 1, 2, 2], rng.integers(3, size=30)])
    x = rng.normal(size=(34, 4)) * [1.0, 3.0, 0.1, 1e-3] + 1e3 + 0.5 * labels[:, None]
    for column in x.T:
        between = 2 * (f_oneway(*(column[labels == k] for k in range(3))).statistic - 1)
        assert explained(column[:, None], labels) == pytest.approx(between / (between + 34), rel=1e-9)
    assert explained(x * 7 - 3, labels) == pytest.approx(explained(x, labels), rel=1e-9)
    assert explained(np.tile(x[:, :1], 5), labels) == pytest.approx(explained(x[:, :1], labels), rel=1e-9)
    # Axes count by their variance: the second has nearly all of it.
    assert explained(x * [1, 100, 1, 1], labels) == pytest.approx(explained(x[:, 1:2], labels), rel=0.02)


def test_labels_of_no_account_explain_nothing() -> None:
    labels = balanced(24, 3)
    dealt = [explained(planted(labels, 50, 0.0, seed), labels) for seed in range(200)]
    assert abs(np.mean(dealt)) < 4 * np.std(dealt) / math.sqrt(200) < 0.005 and min(dealt) < 0 < max(dealt)
    assert explained(np.ones((24, 5)), labels) == 0.0
    assert explained(np.eye(3, 7)[labels], labels) == pytest.approx(1.0)


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
    assert adapter["explained"] > 0.5 > first["explained"] > 0.1 > abs(last["explained"])
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
    # In wide states, too, that costs nothing.
    wide = predict(planted(labels, 600, 0.3), labels, splits(labels, folds=2))
    assert set(wide.strengths) == {STRONGEST} and abs(wide.bits.mean()) < 0.05
    assert set(found.strengths) == {STRONGEST} and set(found.tilts) == {1.0} and np.isfinite(found.log_probabilities).all()


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
