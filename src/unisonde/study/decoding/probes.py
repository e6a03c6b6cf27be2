"""Linear probes: which attributes of an item can be read, and how well, from each layer of a bridged model.

At every hook a multinomial logistic regression on standardised vectors is fitted and judged on items that it has not seen, by
folds that keep groups together. Its regularisation is chosen within the training part alone, by the loss on inner folds, and with it a
tilt, as the decoder's scores get one: few items and wide states make a probe far too sure, and a weight on its confidence, which leaves
it linear, keeps what it knows where regularisation alone would have to give it up. What it gives is

- its accuracy, and how many times that is what always answering the commonest label gets (`times`);
- retention: its accuracy above that chance, as a share of what it is at the adapter's output;
- the V-information of the linear family, H(A) less the cross-entropy on held-out items (Xu et al. 2020), in bits: an estimate
  from below of what is linearly there, in the unit in which the decoder's use of it is measured (`unisonde.study.decoding.gmi`);
- the same under shuffled labels;
- the share of the vectors' variance that the attribute explains. A probe sees standardised vectors and finds what is faint, too; a
  decoder takes them as they are.

The probes of "Modality Collapse as Mismatched Decoding" (arXiv 2602.23136) take one fixed regularisation, ungrouped splits and
1 / K for chance, and report ratios of accuracies; 1 / K is in the table too (`uniform`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from scipy.special import log_softmax

from unisonde.measure import Interval, v_information
from unisonde.measure.estimate import p_value
from unisonde.measure.gmi import best_tilt, information
from unisonde.study.decoding.features import ADAPTER_OUT, Features, Hook
from unisonde.study.decoding.finding import Finding, Steps, interval, said, ticking
from unisonde.study.decoding.splits import Split, coded, splits

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Inverse regularisations (scikit-learn's C) that are tried."""

STRONGEST = 1e-5
"""The one that is taken where there is nothing to choose by: it leaves little but the shares of the labels, and the order."""

INNER = 3
"""Inner folds, where the labels stand in enough groups."""


@dataclass(frozen=True)
class Predictions:
    """Held-out predictions of a probe.

    Attributes:
        log_probabilities: (n, K), normalised, of each item by the probe that has not seen it.
        labels: (n,) numbers from 0 to K - 1.
        strengths: the inverse regularisation of each fold.
        tilts: of each fold, how far the probe is believed: 1 as it is, 0 not at all.
    """

    log_probabilities: np.ndarray
    labels: np.ndarray
    strengths: tuple[float, ...]
    tilts: tuple[float, ...]

    @property
    def hits(self) -> np.ndarray:
        """(n,) ones where the likeliest label is right, else zeros."""
        return (self.log_probabilities.argmax(1) == self.labels).astype(np.float64)

    @property
    def bits(self) -> np.ndarray:
        """(n,) the pointwise V-information in bits against the shares of the labels; its mean is the V-information."""
        shares = np.log(np.bincount(self.labels) / len(self.labels))
        right = np.arange(len(self.labels))
        return (self.log_probabilities[right, self.labels] - shares[self.labels]) / math.log(2)


def protocol() -> dict[str, Any]:
    """What decides about a probe, beside items, labels and splits."""
    return {"strengths": list(STRENGTHS), "strongest": STRONGEST, "inner": INNER}


def predict(
    x: np.ndarray,
    labels: np.ndarray,
    outer: Sequence[Split],
    groups: np.ndarray | None = None,
    given: tuple[float, float] | None = None,
    seed: int = 0,
) -> Predictions:
    """Held-out predictions of numbered labels (n,) from vectors (n, d), one probe a split.

    Args:
        given: an inverse regularisation and a tilt; None chooses them within each training part, the former from `STRENGTHS`. Where the
            inner folds of a training part would leave a label out, the former is `STRONGEST`, and the latter 1.
    """
    classes = int(labels.max()) + 1
    held = np.empty((len(labels), classes))
    chosen = []
    for number, split in enumerate(outer):
        strength, tilt = given or _choose(x, labels, split.train, groups, seed + number)
        [predicted] = _fitted(x[split.train], labels[split.train], x[split.test], [strength])
        shares = np.bincount(labels[split.train], minlength=classes) / len(split.train)
        held[split.test] = log_softmax(tilt * predicted + (1 - tilt) * np.log(shares), axis=1)
        chosen.append((strength, tilt))
    strengths, tilts = zip(*chosen, strict=True)
    return Predictions(held, labels, strengths, tilts)


def _choose(x: np.ndarray, labels: np.ndarray, train: np.ndarray, groups: np.ndarray | None, seed: int) -> tuple[float, float]:
    """The inverse regularisation and the tilt with the least loss on inner folds of the training part."""
    own, x, labels = None if groups is None else groups[train], x[train], labels[train]
    units = np.arange(len(labels)) if own is None else own
    fewest = min(len(np.unique(units[labels == label])) for label in np.unique(labels))
    try:
        inner = splits(labels, own, max(2, min(INNER, fewest)), seed)
    except ValueError:  # a label in one group, or groups that cannot be dealt: nothing to choose by
        return STRONGEST, 1.0
    shares = np.bincount(labels) / len(labels)
    held = np.empty((len(STRENGTHS), len(labels), len(shares)))
    for split in inner:
        held[:, split.test] = _fitted(x[split.train], labels[split.train], x[split.test], STRENGTHS)
    right, prior = torch.from_numpy(labels), torch.from_numpy(np.log(shares))
    best, found = -math.inf, (STRONGEST, 1.0)
    for strength, scores in zip(STRENGTHS, torch.from_numpy(held) - prior, strict=True):
        # A probe that is not sure enough is one for a weaker regularisation.
        tilt = min(1.0, best_tilt(scores, right, prior))
        if (bits := float(information(tilt, scores, right, prior).mean())) > best:
            best, found = bits, (strength, tilt)
    return found


def _fitted(x: np.ndarray, labels: np.ndarray, new: np.ndarray, strengths: Sequence[float]) -> list[np.ndarray]:
    """Log-probabilities of new vectors from probes of several strengths, each begun where the last one ended."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, spread = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    spread[spread < 1e-9 * max(1e-30, spread.max())] = 1.0
    x, new = (x - mean) / spread, (new - mean) / spread
    if x.shape[1] > len(x):
        # The weights of a ridge-penalised fit lie in the span of the samples, so this rotation loses nothing.
        basis = np.linalg.svd(x, full_matrices=False)[2]
        x, new = x @ basis.T, new @ basis.T
    probe = LogisticRegression(C=strengths[0], warm_start=True, max_iter=200)
    made = []
    for strength in strengths:
        probe.set_params(C=strength)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a weak probe is judged like any other, on held-out items
            probe.fit(x, labels)
        logits = probe.decision_function(new)  # of two labels, the second's against the first's
        made.append(log_softmax(np.stack([np.zeros_like(logits), logits], 1) if logits.ndim == 1 else logits, axis=1))
    return made


def shuffled(labels: np.ndarray, groups: np.ndarray | None, outer: Sequence[Split], rng: np.random.Generator) -> np.ndarray:
    """Labels dealt anew: to items, or to whole groups where each group has one label; every training part still holds each label.

    Raises:
        ValueError: a label is too rare for that.
    """
    first, of_item = (np.unique(groups, return_index=True, return_inverse=True)[1:]) if groups is not None else (None, None)
    whole = first is not None and bool((labels[first][of_item] == labels).all())
    for _ in range(1000):
        dealt = rng.permutation(labels[first])[of_item] if whole else rng.permutation(labels)
        if all(len(np.unique(dealt[split.train])) == len(np.unique(labels)) for split in outer):
            return dealt
    raise ValueError("a label is too rare to be dealt anew to the splits; leave it out")


def explained(x: np.ndarray, labels: np.ndarray) -> float:
    """The share of the variance of vectors (n, d), summed over dimensions, that numbered labels (n,) explain, less what chance explains.

    Omega squared (Hays, Statistics for Psychologists, 1963), with traces in place of squares: near zero, on either side, where labels
    explain nothing.
    """
    x = x - x.mean(0, dtype=np.float64)
    n, k = len(x), int(labels.max()) + 1
    sizes = np.bincount(labels, minlength=k)
    sums = np.zeros((k, x.shape[1]))
    np.add.at(sums, labels, x)
    total, between = float((x**2).sum()), float(((sums**2).sum(1) / sizes).sum())
    if total == 0.0:
        return 0.0
    within = (total - between) / (n - k)
    return (between - (k - 1) * within) / (total + within)


def probes(
    features: Features,
    attribute: str,
    group: str | None = None,
    *,
    hooks: Sequence[Hook] | None = None,
    folds: int = 5,
    shuffles: int = 5,
    draws: int = 1000,
    seed: int = 0,
    out: Path | str | None = None,
    progress: bool = True,
) -> Finding:
    """Read one attribute at every hook.

    Args:
        group: the label by which items are kept together.
        hooks: where; everywhere if None.
        shuffles: how often labels are dealt anew for the null, at the regularisation and the tilt chosen for the true ones.
        draws: resamples of the intervals, over items or whole groups.
        out: a folder in which finished hooks are kept, so that a killed call goes on.

    Returns:
        A table with one row a hook: `accuracy`, `accuracy_low`, `accuracy_high`, `uniform` (1 / K), `chance` (share of the
        commonest label), `times`, `retention` (null where there is no adapter, or it is at chance), `v_information` with `v_low`,
        `v_high`, `ceiling` (the entropy of the labels) in bits, `null_accuracy`, `null_v_information`, `p` of the accuracy
        against the null, `strength`, `tilt`, `explained` (share of the variance).

    Raises:
        ValueError: the attribute or the group is unknown, or a label is too rare (`splits`).
    """
    labels, names = coded(features.labels(attribute))
    groups = features.groups(group)
    outer = splits(features.labels(attribute), groups, folds, seed)
    places = features.hooks if hooks is None else list(hooks)
    settings: dict[str, Any] = {
        "run": features.run.id,
        "items": features.kept,
        "attribute": attribute,
        "group": group,
        "folds": folds,
    }
    settings |= {"shuffles": shuffles, "draws": draws, "seed": seed}
    steps = Steps(out, {"experiment": "probes"} | settings | protocol())
    constant: dict[str, Any] = {"model": features.model, "data": features.data, "attribute": attribute, "group": group or ""}
    constant |= {"n": len(labels), "labels": len(names), "folds": folds, "seed": seed}

    def read(hook: Hook) -> pl.DataFrame:
        return pl.DataFrame([constant | _row(features.at(hook), hook, labels, groups, outer, shuffles, draws, seed)])

    wanted = ticking(places, f"probes of {attribute}", progress)
    table = pl.concat([steps.table(hook.column.replace(":", "-"), partial(read, hook)) for hook in wanted])
    shares = [explained(features.at(hook), labels) for hook in places]
    table = _with_retention(table).with_columns(pl.Series("explained", shares, dtype=pl.Float64))
    last = features.last if features.last in places else places[-1]
    return Finding(table, *_sentence(table, last, names, group), {"group": group, "folds": folds, "seconds": steps.seconds})


def _row(
    x: np.ndarray,
    hook: Hook,
    labels: np.ndarray,
    groups: np.ndarray | None,
    outer: Sequence[Split],
    shuffles: int,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    found = predict(x, labels, outer, groups, seed=seed)
    hits = interval(found.hits, groups, draws, seed)
    bits = interval(found.bits, groups, draws, seed)
    chance = float(np.bincount(labels).max() / len(labels))
    strength, tilt = float(np.median(found.strengths)), float(np.median(found.tilts))
    rng = np.random.default_rng(seed)
    null = [predict(x, shuffled(labels, groups, outer, rng), outer, groups, (strength, tilt)) for _ in range(shuffles)]
    return {
        "stack": hook.stack,
        "layer": hook.layer,
        "pool": hook.pool,
        "accuracy": hits.value,
        "accuracy_low": hits.low,
        "accuracy_high": hits.high,
        "uniform": 1.0 / (int(labels.max()) + 1),
        "chance": chance,
        "times": hits.value / chance,
        "v_information": bits.value,
        "v_low": bits.low,
        "v_high": bits.high,
        "ceiling": v_information(found.log_probabilities, labels).ceiling,
        "null_accuracy": float(np.mean([n.hits.mean() for n in null])) if null else None,
        "null_v_information": float(np.mean([n.bits.mean() for n in null])) if null else None,
        "p": p_value(hits.value, [float(n.hits.mean()) for n in null]) if null else None,
        "strength": strength,
        "tilt": tilt,
    }


def _with_retention(table: pl.DataFrame) -> pl.DataFrame:
    handed = table.filter((pl.col("stack") == ADAPTER_OUT.stack) & (pl.col("layer") == ADAPTER_OUT.layer))
    above = handed["accuracy"][0] - handed["chance"][0] if len(handed) else 0.0
    kept = (pl.col("accuracy") - pl.col("chance")) / above if above > 0 else pl.lit(None, dtype=pl.Float64)
    return table.with_columns(kept.alias("retention"))


def _sentence(table: pl.DataFrame, last: Hook, names: Sequence[str], group: str | None) -> tuple[str, Interval]:
    [row] = table.filter(
        (pl.col("stack") == last.stack) & (pl.col("layer") == last.layer) & (pl.col("pool") == last.pool)
    ).to_dicts()
    accuracy = Interval(row["accuracy"], row["accuracy_low"], row["accuracy_high"], math.nan, 0.95, row["n"])
    bits = Interval(row["v_information"], row["v_low"], row["v_high"], math.nan, 0.95, row["n"])
    apart = f"held out by {group}" if group else "held out"
    kept = f"; it keeps {row['retention']:.0%} of what is above chance at the adapter" if row["retention"] is not None else ""
    return (
        f"At layer {row['layer']} of {last.stack} of {row['model']}, a linear probe reads {row['attribute']} ({len(names)} labels, "
        f"{row['n']} items, {apart}) with accuracy {said(accuracy)}, {row['times']:.1f} times chance, and {said(bits)} of "
        f"{row['ceiling']:.2f} bits{kept}.",
        bits,
    )
