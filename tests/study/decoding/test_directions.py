"""Modality-specific directions: planted ones are found, in number, share and span."""

from __future__ import annotations

import numpy as np
import pytest
from known import folder_of

from unisonde.study.decoding.directions import compare_layers, directions, overlap, stability
from unisonde.study.decoding.features import Hook

WIDTH = 10


def planted(seed: int = 0, n: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Modal vectors of variances 16, 9, 4, then 1/4; of texts 1 along the first and third, 9 along the second, 1/4 elsewhere; a basis."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0].T
    modal, text = np.full(WIDTH, 0.5), np.full(WIDTH, 0.5)
    modal[:3], text[:3] = (4, 3, 2), (1, 3, 1)
    return (rng.normal(size=(n, WIDTH)) * modal) @ basis + 7, (rng.normal(size=(n, WIDTH)) * text) @ basis - 3, basis


def test_planted_directions_are_found() -> None:
    x, y, basis = planted()
    found = directions(x, y, modes=3)
    np.testing.assert_allclose(found.variances, [16, 9, 4], rtol=0.2)
    np.testing.assert_allclose(found.ratios, [1 / 16, 1, 1 / 4], rtol=0.3)
    assert found.specific.tolist() == [True, False, True]
    assert found.specific_share == pytest.approx(20 / 29, abs=0.05)
    assert found.total == pytest.approx(29 + 7 / 4, rel=0.1) and found.mean == pytest.approx(x.mean(0))
    assert overlap(found.vectors[found.specific], basis[[0, 2]]) > 0.97
    np.testing.assert_allclose(found.vectors @ found.vectors.T, np.eye(3), atol=1e-10)
    np.testing.assert_allclose(np.cov(x.T), np.cov(x.T) @ basis.T @ basis, atol=1e-9)  # the basis is one


def test_variances_are_those_of_the_covariances() -> None:
    x, y, _ = planted(1, 60)
    found = directions(x, y)
    values, vectors = np.linalg.eigh(np.cov(x.T))
    np.testing.assert_allclose(found.variances, values[::-1])
    for k, u in enumerate(vectors.T[::-1]):
        assert found.text_variances[k] == pytest.approx(u @ np.cov(y.T) @ u)


def test_scaling_makes_the_sizes_of_the_sets_irrelevant() -> None:
    x, y, _ = planted()
    assert directions(x, y / 100).specific.all() and not directions(x, y * 100).specific.any()
    plain, small = (directions(x, y * size, modes=5, scaled=True).specific for size in (1, 0.01))
    assert plain.tolist() == small.tolist() and plain[0] and not plain[1]


def test_few_items_have_few_modes() -> None:
    x, y, _ = planted()
    assert len(directions(x[:5], y).variances) == 4
    with pytest.raises(ValueError, match="all 4 modal vectors are equal"):
        directions(np.ones((4, 3)), y[:, :3])
    with pytest.raises(ValueError, match=r"\(400, 10\) and those of texts \(400, 9\)"):
        directions(x, y[:, :9])
    with pytest.raises(ValueError, match="3 vectors at least, got 2 modal ones and 400 of texts"):
        directions(x[:2], y)


def test_overlap_of_spans() -> None:
    eye = np.eye(6)
    assert overlap(eye[:2], eye[:3]) == 1.0 and overlap(eye[:2], eye[3:]) == 0.0 and overlap(eye[:2], eye[1:3]) == 0.5
    assert np.isnan(overlap(eye[:0], eye))
    rng = np.random.default_rng(0)
    drawn = [overlap(eye[:2], np.linalg.qr(rng.normal(size=(6, 3)))[0].T) for _ in range(400)]
    assert np.mean(drawn) == pytest.approx(3 / 6, abs=0.03)


def test_separate_modes_are_stable_and_alike_ones_are_not() -> None:
    x, y, _ = planted()
    found = directions(x, y)
    varied = stability(found, x, y, draws=12)
    assert varied.overlaps.mean() > 0.9 and varied.modes[:3].min() > 0.95
    assert varied.modes[3:8].max() < 0.9  # of one variance: no mode is any other's better
    assert varied.shares.min() < found.specific_share < varied.shares.max()


def test_groups_are_drawn_whole() -> None:
    """Sixteen copies of each item are no more than the item: what varies over draws is what varies over groups."""
    x, y, _ = planted(n=25)
    copies, groups = np.repeat(x, 16, axis=0), np.repeat(np.arange(25), 16)
    found = directions(copies, y)
    spreads = [stability(found, copies, y, draws=20, groups=of).shares.std() for of in (groups, None)]
    assert spreads[0] > 2 * spreads[1] > 0


def test_random_modes_overlap_less_than_those_of_a_planted_span() -> None:
    x, y, _ = planted()
    varied = stability(directions(x, y), x, y, draws=12)
    assert len(varied.chances) == 12 and varied.overlaps.mean() > varied.chances.mean() + 0.2


def test_layers_side_by_side(tmp_path) -> None:
    x, y, _ = planted(n=80)
    modal = folder_of(tmp_path / "m", {Hook("adapter", 1): x, Hook("llm", 0): x, Hook("llm", 1): y})
    text = folder_of(tmp_path / "t", {Hook("llm", 0): y, Hook("llm", 1): y})
    found = compare_layers(modal, text, modes=3, draws=5, out=tmp_path / "d", progress=False)
    assert found.table["layer"].to_list() == [0, 0, 0, 1, 1, 1]
    first, second = found.table.filter(layer=0), found.table.filter(layer=1)
    assert first["specific"].to_list() == [True, False, True] and not second["specific"].any()
    assert second["ratio"].to_list() == pytest.approx([1, 1, 1]) and second["overlap"].null_count() == 3
    assert found.interval.low <= found.interval.value <= found.interval.high
    assert found.sentence.startswith("At the adapter's output of synthetic, 2 of the 3 largest modes of made are modality-specific")
    assert compare_layers(modal, text, modes=3, draws=5, out=tmp_path / "d", progress=False).table.equals(found.table)
    other = folder_of(tmp_path / "o", {Hook("llm", 0): y}, model="another")
    with pytest.raises(ValueError, match="of synthetic and those of texts of another"):
        compare_layers(modal, other, progress=False)
