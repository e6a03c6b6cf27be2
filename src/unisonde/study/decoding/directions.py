"""Modality-specific directions: where what comes of sounds or pictures varies and what comes of words does not, at one layer.

The modes u_k of the covariance of the modal vectors, with variances lambda_k, are held against the covariance S of the vectors of
texts: ratio_k = u_k' S u_k / lambda_k (arXiv 2602.23136, where it is called alpha-tilde). A mode is modality-specific below 1/2.
It is a ratio of variances, without an upper bound, and it depends on how large the two sets of vectors are; `scaled` divides each
covariance by its trace first.

There the modal covariance is taken at the adapter and that of texts in the middle of the decoder, two spaces with nothing in
common; here both are of one layer: the adapter's output is the decoder's layer 0, where texts have the mean of their embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from unisonde.measure import Interval
from unisonde.study.decoding.features import Features, Hook
from unisonde.study.decoding.finding import Finding, Steps, said, ticking

THRESHOLD = 0.5
MODES = 100
"""Modes that are looked at, at most: those of the largest variance."""

_EMPTY = 1e-10
"""Modes below this share of the largest variance are rounding."""


@dataclass(frozen=True)
class Directions:
    """The modes of modal vectors at one place, the largest variance first.

    Attributes:
        vectors: (k, d), orthonormal rows.
        variances: (k,) of the modal vectors along them.
        text_variances: (k,) of the texts' vectors along them.
        total: the variance of the modal vectors in all directions.
        specific: (k,) whether a mode is modality-specific.
        mean: (d,) of the modal vectors.
    """

    vectors: np.ndarray
    variances: np.ndarray
    text_variances: np.ndarray
    total: float
    specific: np.ndarray
    mean: np.ndarray

    @property
    def ratios(self) -> np.ndarray:
        """(k,) variance of the texts over that of the modal vectors."""
        return self.text_variances / self.variances

    @property
    def shares(self) -> np.ndarray:
        """(k,) of the total variance."""
        return self.variances / self.total

    @property
    def specific_share(self) -> float:
        """The share of the variance of these modes that is modality-specific (the paper's "MS var")."""
        return float(self.variances[self.specific].sum() / self.variances.sum())


def directions(
    modal: np.ndarray, text: np.ndarray, modes: int = MODES, threshold: float = THRESHOLD, scaled: bool = False
) -> Directions:
    """The modes of modal vectors (n, d), held against the vectors of texts (m, d).

    Args:
        scaled: compare shares of variance in place of variances.

    Raises:
        ValueError: the widths differ, there are fewer than 3 vectors of a kind, or the modal ones do not vary.
    """
    x, y = np.asarray(modal, dtype=np.float64), np.asarray(text, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"modal vectors {x.shape} and those of texts {y.shape} must be (n, d) and (m, d), of one layer")
    if min(len(x), len(y)) < 3:
        raise ValueError(f"a covariance takes 3 vectors at least, got {len(x)} modal ones and {len(y)} of texts")
    mean = x.mean(0)
    x, y = x - mean, y - y.mean(0)
    _, scales, vectors = np.linalg.svd(x, full_matrices=False)
    variances = scales**2 / (len(x) - 1)
    total = float(variances.sum())
    if not total > 0:
        raise ValueError(f"all {len(x)} modal vectors are equal, so they have no directions")
    held = min(modes, int((variances > _EMPTY * variances[0]).sum()))
    vectors, variances = vectors[:held], variances[:held]
    text_variances = ((y @ vectors.T) ** 2).sum(0) / (len(y) - 1)
    ratios = text_variances / variances
    if scaled:
        text_total = float((y**2).sum() / (len(y) - 1))
        ratios = ratios * total / text_total if text_total > 0 else ratios
    return Directions(vectors, variances, text_variances, total, ratios < threshold, mean)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """How far one span of orthonormal rows lies in another: the mean squared cosine of their principal angles, between 0 and 1.

    (k, d), (l, d); of a span of k of d dimensions and a random one it is max(k, l) / d on average. NaN if one is empty.
    """
    return float((a @ b.T).__pow__(2).sum() / min(len(a), len(b))) if len(a) and len(b) else float("nan")


@dataclass(frozen=True)
class Stability:
    """How directions vary over items: bootstrap of both sets.

    Attributes:
        overlaps: (draws,) of the modality-specific span with that of the items themselves.
        chances: (draws,) the same of as many modes of each, taken at random among all modes.
        shares: (draws,) the modality-specific share of variance.
        modes: (k,) the mean over draws of the squared length of each mode within the modes of the draw up to its own number: near
            1 for a mode that always comes in its place.
    """

    overlaps: np.ndarray
    chances: np.ndarray
    shares: np.ndarray
    modes: np.ndarray


def stability(
    found: Directions,
    modal: np.ndarray,
    text: np.ndarray,
    draws: int = 30,
    seed: int = 0,
    threshold: float = THRESHOLD,
    scaled: bool = False,
    groups: np.ndarray | None = None,
) -> Stability:
    """The same directions, from items drawn with replacement, or from whole groups (n,) of them."""
    rng = np.random.default_rng(seed)
    members = (
        [np.array([k]) for k in range(len(modal))] if groups is None else [np.flatnonzero(groups == g) for g in np.unique(groups)]
    )
    overlaps, chances, shares = [], [], []
    modes = np.zeros(len(found.vectors))

    def any_of(vectors: np.ndarray, count: int) -> np.ndarray:
        return vectors[rng.choice(len(vectors), count, replace=False)]

    for _ in range(draws):
        some = directions(
            modal[np.concatenate([members[k] for k in rng.integers(len(members), size=len(members))])],
            text[rng.integers(len(text), size=len(text))],
            len(found.vectors),
            threshold,
            scaled,
        )
        overlaps.append(overlap(found.vectors[found.specific], some.vectors[some.specific]))
        drawn = any_of(some.vectors, int(some.specific.sum()))
        chances.append(overlap(any_of(found.vectors, int(found.specific.sum())), drawn))
        shares.append(some.specific_share)
        inside = (found.vectors @ some.vectors.T) ** 2
        modes += [inside[k, : k + 1].sum() for k in range(len(modes))]
    return Stability(np.array(overlaps), np.array(chances), np.array(shares), modes / max(draws, 1))


def compare_layers(
    modal: Features,
    text: Features,
    *,
    layers: Sequence[int] | None = None,
    modes: int = MODES,
    threshold: float = THRESHOLD,
    scaled: bool = False,
    draws: int = 30,
    group: str | None = None,
    seed: int = 0,
    out: Path | str | None = None,
    progress: bool = True,
) -> Finding:
    """Modal against text covariance at each layer of the decoder, layer 0 being the adapter's output.

    Args:
        modal: features of sounds or pictures.
        text: features of texts, by the same model.
        layers: of the decoder; all if None.
        draws: bootstrap draws, of both sets.
        group: the label by which modal items are drawn together.
        out: a folder in which finished layers are kept, so that a killed call goes on.

    Returns:
        A table with one row a mode of a layer: `variance`, `share` (of the layer's variance), `text_variance`, `ratio`,
        `specific`, `stability`; and of the layer `specific_modes`, `specific_share` with `share_low`, `share_high` (percentiles),
        `overlap` of the specific span with that of a draw with `overlap_low`, `overlap_high`, and `overlap_random`, that of as many
        modes taken at random.

    Raises:
        ValueError: the features are of two models, or a layer has none.
    """
    if modal.run.identity["models"] != text.run.identity["models"]:
        raise ValueError(f"the modal features are of {modal.model} and those of texts of {text.model}; take both of one model")
    there = [hook for hook in modal.hooks if hook.stack == "llm" and hook.pool == "mean"]
    places = there if layers is None else [Hook("llm", layer) for layer in layers]
    settings: dict[str, Any] = {"modal": modal.run.id, "items": modal.kept, "text": text.run.id, "texts": text.kept, "group": group}
    settings |= {"modes": modes, "threshold": threshold, "scaled": scaled}
    steps = Steps(out, {"experiment": "directions"} | settings | {"draws": draws, "seed": seed})
    constant = {"model": modal.model, "data": modal.data, "texts": text.data, "n": len(modal), "n_texts": len(text), "seed": seed}

    def read(hook: Hook) -> pl.DataFrame:
        return _rows(
            modal.at(hook), text.at(hook), hook.layer, constant, modes, threshold, scaled, draws, seed, modal.groups(group)
        )

    wanted = ticking(places, "directions", progress)
    table = pl.concat([steps.table(f"llm-{hook.layer}", partial(read, hook)) for hook in wanted])
    return Finding(table, *_sentence(table, places[0].layer), {"group": group, "seconds": steps.seconds})


def _rows(
    x: np.ndarray,
    y: np.ndarray,
    layer: int,
    constant: dict[str, Any],
    modes: int,
    threshold: float,
    scaled: bool,
    draws: int,
    seed: int,
    groups: np.ndarray | None,
) -> pl.DataFrame:
    found = directions(x, y, modes, threshold, scaled)
    varied = stability(found, x, y, draws, seed, threshold, scaled, groups)
    count = int(found.specific.sum())
    of_layer: dict[str, Any] = {"specific_modes": count, "specific_share": found.specific_share}
    of_layer |= dict(zip(("share_low", "share_high"), _percentiles(varied.shares), strict=True))
    known = varied.overlaps[np.isfinite(varied.overlaps)]
    of_layer |= {"overlap": float(known.mean()) if len(known) else None}
    of_layer |= dict(zip(("overlap_low", "overlap_high"), _percentiles(known), strict=True))
    chances = varied.chances[np.isfinite(varied.chances)]
    of_layer |= {"overlap_random": float(chances.mean()) if len(chances) else None}
    return pl.DataFrame(
        [
            constant
            | {
                "layer": layer,
                "mode": k,
                "variance": float(found.variances[k]),
                "share": float(found.shares[k]),
                "text_variance": float(found.text_variances[k]),
                "ratio": float(found.ratios[k]),
                "specific": bool(found.specific[k]),
                "stability": float(varied.modes[k]) if draws else None,
            }
            | of_layer
            for k in range(len(found.variances))
        ],
        schema_overrides={
            name: pl.Float64
            for name in ("share_low", "share_high", "overlap", "overlap_low", "overlap_high", "overlap_random", "stability")
        },
    )


def _percentiles(values: np.ndarray) -> tuple[float | None, float | None]:
    if not len(values):
        return None, None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _sentence(table: pl.DataFrame, layer: int) -> tuple[str, Interval]:
    row = table.filter(pl.col("layer") == layer).row(0, named=True)
    modes = len(table.filter(pl.col("layer") == layer))
    nan = float("nan")
    low, high = (nan if row[name] is None else row[name] for name in ("share_low", "share_high"))
    share = Interval(row["specific_share"], low, high, nan, 0.95, row["n"])
    place = "the adapter's output" if layer == 0 else f"layer {layer} of the decoder"
    stable = (
        ""
        if row["overlap"] is None
        else f"; drawn anew, their span overlaps with itself by {row['overlap']:.2f} (as many modes at random: "
        f"{row['overlap_random']:.2f})"
    )
    return (
        f"At {place} of {row['model']}, {row['specific_modes']} of the {modes} largest modes of {row['data']} are modality-specific "
        f"against the covariance of {row['n_texts']} texts at the same layer, with {said(share)} of their variance{stable}.",
        share,
    )
