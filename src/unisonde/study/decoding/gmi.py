"""The accessibility gap: what a probe finds of an attribute in the decoder, less what the decoder's own scores make of it there.

Items ask for an attribute, and the decoder scores a closed set of answers, at its end and, by the logit lens, at every layer. The
generalised mutual information of these scores (`unisonde.measure.gmi`) is held against the V-information of a linear probe of the
state from which the first token of the answer is read: the last position of the same prompt, at the same layer. Both are in bits,
held out on the same folds: the tilt s and the probe are fitted on the items of the other folds. Their difference, item by item,
is the gap

    Delta = I_V(Z -> A) - GMI(A | psi)            (arXiv 2602.23136, eq. 2, with a lower bound of I(Z; A) in its place)

GMI is a rate that the scores provably support, no upper bound on what a decoder could do with them, and a probe needs more items
than a tilt does: a gap is evidence where its interval lies above zero, and none where it does not.

Contents of a table of scores: one row an item, `item` and columns `0` to `L + 1`, each (K,) nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from unisonde.data.catalogue import data_digest
from unisonde.data.item import Item
from unisonde.measure import Interval
from unisonde.measure.gmi import best_tilt, information
from unisonde.models.bridged import Bridged
from unisonde.study.decoding.features import Features, Hook
from unisonde.study.decoding.finding import Finding, Steps, interval, said, ticking
from unisonde.study.decoding.probes import predict, protocol
from unisonde.study.decoding.splits import Split, splits

CHUNK = 16
"""Items that are scored between two writings."""

DOUBT = 1.0
"""Items of which nothing is known, beside those that a tilt is learnt from."""

LN2 = math.log(2)


@dataclass(frozen=True)
class Scores:
    """The decoder's scores of a closed set of answers.

    Attributes:
        values: (n, L + 2, K) nats; row k <= L by the logit lens from layer k, the last row the model itself.
        answers: the K answers.
        items: ids of the n items.
        digest: of the items, as they were shown.
        seconds: how long it took to take them.
    """

    values: np.ndarray
    answers: tuple[str, ...]
    items: tuple[str, ...]
    digest: str
    seconds: float = 0.0


def collect_scores(
    model: Bridged, items: Sequence[Item], answers: Sequence[str], out: Path | str | None = None, progress: bool = True
) -> Scores:
    """Score the answers to every item at every layer.

    Args:
        out: a folder in which finished items are kept, so that a killed call goes on.

    Raises:
        ValueError: an item cannot be taken, or an answer is empty or begins with another.
    """
    digest = data_digest(items)
    settings: dict[str, Any] = {"model": model.identity(), "items": digest, "answers": list(answers), "chunk": CHUNK}
    steps = Steps(out, {"experiment": "scores"} | settings)

    def score(some: Sequence[Item]) -> pl.DataFrame:
        with torch.inference_mode():
            values = model.answer_scores(some, answers, layers=True).double().cpu().numpy()
        columns = {str(k): pl.Series(values[:, k], dtype=pl.Array(pl.Float64, len(answers))) for k in range(values.shape[1])}
        return pl.DataFrame({"item": [item.id for item in some]} | columns)

    starts = ticking(range(0, len(items), CHUNK), "scores of answers", progress)
    table = pl.concat([steps.table(f"{k:05d}", partial(score, items[k : k + CHUNK])) for k in starts])
    values = np.stack([table[name].to_numpy() for name in table.columns[1:]], axis=1)
    return Scores(values, tuple(answers), tuple(table["item"]), digest, steps.seconds)


@dataclass(frozen=True)
class Information:
    """Held-out information of scores, item by item.

    Attributes:
        bits: (n,) at the tilt of the other folds.
        plain: (n,) at s = 1, the scores as they are.
        tilts: s of each fold.
    """

    bits: np.ndarray
    plain: np.ndarray
    tilts: tuple[float, ...]


def held_out(scores: np.ndarray, labels: np.ndarray, outer: Sequence[Split]) -> Information:
    """The information of log-scores (n, K) about numbered labels (n,), s fitted on the training part of each split.

    The prior is the shares of the labels, as for the V-information of a probe. Items are few, and some decoders make no mistake on those
    of a split, so s is fitted with one item more of which nothing is known.
    """
    values, right = torch.as_tensor(scores, dtype=torch.float64), torch.as_tensor(labels)
    log_prior = (torch.bincount(right, minlength=values.shape[1]).double() / len(right)).log()
    bits = torch.full((len(right),), math.nan, dtype=torch.float64)
    tilts = []
    for split in outer:
        train, test = torch.as_tensor(split.train), torch.as_tensor(split.test)
        tilts.append(best_tilt(values[train], right[train], log_prior, doubt=DOUBT))
        bits[test] = information(tilts[-1], values[test], right[test], log_prior)
    plain = information(1.0, values, right, log_prior)
    return Information((bits / LN2).numpy(), (plain / LN2).numpy(), tuple(tilts))


def gmi(
    features: Features,
    scores: Scores,
    attribute: str,
    answer_of: dict[str, str] | None = None,
    group: str | None = None,
    *,
    layers: Sequence[int] | None = None,
    folds: int = 5,
    draws: int = 1000,
    seed: int = 0,
    out: Path | str | None = None,
    progress: bool = True,
) -> Finding:
    """Present against usable, layer by layer.

    Args:
        features: of the items that were scored, with the prompts that they were scored with.
        answer_of: the answer that stands for each label; None if the labels are the answers, with or without a full stop.
        group: the label by which items are kept together.
        layers: of the decoder; all if None. Layer L + 1 is the model itself.

    Returns:
        A table with one row a layer: `v_information`, `gmi` and `gap`, each with `..._low` and `..._high`, `gmi_at_one` (the
        scores as they are), `calibration_loss` (what the tilt recovers), `s`, `accuracy` of the probe and of the decoder's
        likeliest answer (`decoder_accuracy`), `ceiling` (entropy of the labels); bits.

    Raises:
        ValueError: features and scores are not of the same items, a label has no answer, an answer has no item, or a label is too
            rare.
    """
    rows = _aligned(features, scores)
    labels = _numbered(features.labels(attribute), scores.answers, answer_of, attribute)
    groups = features.groups(group)
    outer = splits(features.labels(attribute), groups, folds, seed)
    count = scores.values.shape[1]
    places = list(range(count)) if layers is None else list(layers)
    settings: dict[str, Any] = {
        "run": features.run.id,
        "items": features.kept,
        "answers": list(scores.answers),
        "answer_of": answer_of,
    }
    settings |= {"attribute": attribute, "group": group, "folds": folds}
    settings |= {"scores": float(np.nan_to_num(scores.values, neginf=-1e9).sum())}
    steps = Steps(out, {"experiment": "gmi"} | settings | {"draws": draws, "seed": seed, "probe": protocol(), "doubt": DOUBT})
    constant = {"model": features.model, "data": features.data, "attribute": attribute, "group": group or "", "n": len(labels)}
    constant |= {"answers": len(scores.answers), "folds": folds, "seed": seed}

    def read(layer: int) -> pl.DataFrame:
        x = features.at(_place(features, layer))
        return pl.DataFrame([constant | _row(layer, x, scores.values[rows, layer], labels, groups, outer, draws, seed)])

    wanted = ticking(places, f"present and usable: {attribute}", progress)
    table = pl.concat([steps.table(f"layer-{layer:03d}", partial(read, layer)) for layer in wanted])
    used = {"group": group, "folds": folds, "seconds": steps.seconds + scores.seconds}
    return Finding(table, *_sentence(table.row(-1, named=True), last=places[-1] == count - 1), used)


@dataclass(frozen=True)
class Loss:
    """GMI of a model's scores about one attribute, in bits: told in words, heard or seen, and the difference, item by item.

    Attributes:
        tilt: s of the larger of the two, the scale at which their difference is bounded.
    """

    words: Interval
    modal: Interval
    lost: Interval
    tilt: float = 1.0


def lost(
    features: Features,
    scores: Scores,
    in_words: Scores,
    attribute: str,
    answer_of: dict[str, str] | None = None,
    group: str | None = None,
    *,
    folds: int = 5,
    draws: int = 1000,
    seed: int = 0,
) -> Loss:
    """What the model's own scores lose where an attribute is heard or seen and not told in words.

    Args:
        features: of the items that were scored.
        in_words: scores of the same answers to the same items, described in words in place of sound or picture.

    Raises:
        ValueError: as in `gmi`, or `in_words` is of other items or answers.
    """
    rows = _aligned(features, scores)
    if in_words.items != scores.items or in_words.answers != scores.answers:
        raise ValueError("the scores in words are of other items or answers; score the same answers to the same items")
    labels = _numbered(features.labels(attribute), scores.answers, answer_of, attribute)
    groups = features.groups(group)
    outer = splits(features.labels(attribute), groups, folds, seed)
    told, modal = (held_out(one.values[rows, -1], labels, outer) for one in (in_words, scores))
    words, heard, between = (interval(bits, groups, draws, seed) for bits in (told.bits, modal.bits, told.bits - modal.bits))
    return Loss(words, heard, between, float(np.median((told if between.value >= 0 else modal).tilts)))


def _aligned(features: Features, scores: Scores) -> list[int]:
    """The row of the scores that each row of the features belongs to."""
    if features.digest != scores.digest:
        raise ValueError("features and scores are of different items or prompts; collect both of the same")
    row_of = {item: row for row, item in enumerate(scores.items)}
    return [row_of[item] for item in features.table["item"]]


def _numbered(labels: np.ndarray, answers: Sequence[str], answer_of: dict[str, str] | None, attribute: str) -> np.ndarray:
    names = sorted(set(labels.tolist()))
    if answer_of is None:
        answer_of = {answer.strip().rstrip("."): answer for answer in answers}
    if lacking := [name for name in names if answer_of.get(name) not in answers]:
        raise ValueError(f"the label {lacking[0]!r} of {attribute} has no answer among {', '.join(map(repr, answers))}; say which")
    numbers = np.array([answers.index(answer_of[label]) for label in labels.tolist()])
    if empty := [answer for k, answer in enumerate(answers) if k not in numbers]:
        raise ValueError(f"no item has the answer {empty[0]!r}; leave it out")
    if len(set(answer_of[name] for name in names)) < len(names):
        raise ValueError(f"two labels of {attribute} have the same answer; give each its own")
    return numbers


def _place(features: Features, layer: int) -> Hook:
    """The decoder's state at the last position; where there is no last norm, the model itself reads layer L."""
    return Hook("llm", min(layer, features.last.layer), "last")


def _row(
    layer: int,
    x: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None,
    outer: Sequence[Split],
    draws: int,
    seed: int,
) -> dict[str, Any]:
    probe = predict(x, labels, outer, groups, seed=seed)
    used = held_out(scores, labels, outer)
    row: dict[str, Any] = {"layer": layer}
    for name, bits in (("v_information", probe.bits), ("gmi", used.bits), ("gap", probe.bits - used.bits)):
        found = interval(bits, groups, draws, seed)
        row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    shares = np.bincount(labels) / len(labels)
    return row | {
        "gmi_at_one": float(used.plain.mean()),
        "calibration_loss": float((used.bits - used.plain).mean()),
        "s": float(np.median(used.tilts)),
        "accuracy": float(probe.hits.mean()),
        "decoder_accuracy": float((scores.argmax(1) == labels).mean()),
        "ceiling": float(-(shares * np.log2(shares)).sum()),
    }


def _sentence(row: dict[str, Any], last: bool) -> tuple[str, Interval]:
    gap, v, usable = (
        Interval(row[name], row[f"{name}_low"], row[f"{name}_high"], math.nan, 0.95, row["n"])
        for name in ("gap", "v_information", "gmi")
    )
    place = "At its end" if last else f"At layer {row['layer']}"
    return (
        f"{place}, the decoder of {row['model']} uses {said(usable)} of the {said(v)} bits about {row['attribute']} that a linear probe "
        f"finds in the same state (of {row['ceiling']:.2f}): a gap of {said(gap)} bits over {row['n']} items.",
        gap,
    )
