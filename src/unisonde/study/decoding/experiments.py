"""The experiments by name, from a model and items to tables in a folder: what `unisonde decode` calls.

    OUT/
      features/, asked-ATTRIBUTE/, texts/    runs of features: of the items, of the items with a question, of texts
      in-words-ATTRIBUTE/                    of the items' labels in words
      scores-ATTRIBUTE/, ...                 finished steps, from which a killed call goes on
      NAME.parquet, NAME.json                the table of an experiment; its sentences, and what was asked (`results`)

An attribute is a label of the items. A question about it lists its labels; the answers are the labels with a full stop, so that none of
them begins with another.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from unisonde.data.item import Item
from unisonde.models.base import Model
from unisonde.models.bridged import Bridged
from unisonde.runs.probe import session
from unisonde.study.decoding import results
from unisonde.study.decoding.ablate import ablate
from unisonde.study.decoding.bound import bound, order, sensitivity
from unisonde.study.decoding.directions import compare_layers, directions
from unisonde.study.decoding.features import Features, Hook, collect, labels_of
from unisonde.study.decoding.finding import Finding
from unisonde.study.decoding.gmi import Scores, collect_scores, gmi, lost
from unisonde.study.decoding.lora import Objective, Question, lora
from unisonde.study.decoding.probes import probes
from unisonde.study.decoding.splits import splits

PHRASES = ("The {0} is {1}.", "{0}: {1}.", "{1} is the {0}.", "Its {0} is {1}.", "There is a {0} here, and it is {1}.")
"""How an attribute is put into words, by lot."""


@dataclass(frozen=True)
class Setting:
    """What all experiments share.

    Attributes:
        model: a bridged one.
        items: with sound or picture, and labels.
        texts: items of text alone, for the covariance of texts.
        out: the folder.
        attributes: labels that are read.
        group: the label by which items are kept together, or one for each attribute that has one. It is not applied to the attribute
            that it is itself: no item of it could be held out.
        response: the label that holds what the model should say, the attribute itself if None; for `lora`, the control.
        name: of the data.
        retry: take items that failed in an earlier call again.
    """

    model: Bridged
    items: Sequence[Item]
    texts: Sequence[Item]
    out: Path
    attributes: tuple[str, ...]
    group: str | Mapping[str, str] | None = None
    response: str | None = None
    name: str = "items"
    folds: int = 5
    draws: int = 10
    seed: int = 0
    retry: bool = False
    progress: bool = True

    @cached_property
    def features(self) -> Features:
        return self._collected(self.items, "features", self.name)

    @cached_property
    def of_texts(self) -> Features:
        if not self.texts:
            raise ValueError("this experiment needs texts, for their covariance; name some data with --texts")
        return self._collected(self.texts, "texts", "texts")

    def label(self, item: Item, attribute: str) -> str:
        """The label of an item.

        Raises:
            ValueError: it has none.
        """
        held = labels_of(item)
        if attribute not in held:
            raise ValueError(f"item {item.id!r} has no label {attribute!r}; it has {', '.join(held) or 'none'}")
        return held[attribute]

    def answers(self, attribute: str) -> list[str]:
        """The answers to the question about an attribute, in order."""
        return [f"{name}." for name in sorted({self.label(item, attribute) for item in self.items})]

    def asked(self, attribute: str) -> list[Item]:
        """The items, with the question about an attribute for their prompt."""
        names = ", ".join(answer.rstrip(".") for answer in self.answers(attribute))
        return [replace(item, prompt=f"What is the {attribute}? Answer with one of: {names}.") for item in self.items]

    def question(self, attribute: str) -> Question:
        """The question about an attribute, with the right answers."""
        answers = self.answers(attribute)
        labels = [answers.index(f"{self.label(item, attribute)}.") for item in self.items]
        return Question(attribute, self.asked(attribute), answers, labels, self.groups(attribute))

    def group_of(self, attribute: str) -> str | None:
        """The label by which items are kept together when an attribute is read, if there is one."""
        group = self.group.get(attribute) if isinstance(self.group, Mapping) else self.group
        return None if group == attribute else group

    def groups(self, attribute: str) -> list[str] | None:
        """What each item is kept together with."""
        group = self.group_of(attribute)
        return None if group is None else [self.label(item, group) for item in self.items]

    def check(self, attribute: str, asked: bool) -> None:
        """Raises ValueError if an attribute cannot be read on held-out items, or (`asked`) not be asked for: before anything is run."""
        splits([self.label(item, attribute) for item in self.items], self.groups(attribute), self.folds, self.seed)
        if asked:
            self.model.tokens_of_answers(self.answers(attribute))

    def scored(self, attribute: str) -> tuple[Features, Scores]:
        """Features and scores of the items with that question."""
        items = self.asked(attribute)
        found = self._whole(items, f"asked-{attribute}")
        return found, collect_scores(self.model, items, self.answers(attribute), self.out / f"scores-{attribute}", self.progress)

    def in_words(self, attribute: str) -> list[Item]:
        """The items with an attribute in words in place of their sound or picture."""

        def said(item: Item) -> str:  # by lot, since items may stand in an order of their labels
            return random.Random(f"{self.seed}/{item.id}").choice(PHRASES).format(attribute, self.label(item, attribute))

        return [replace(item, prompt=said(item), audio=None, image=None) for item in self.items]

    def scored_in_words(self, attribute: str) -> tuple[Features, Scores]:
        """Features of these words, and scores of the answers to the question after them."""
        items = self.in_words(attribute)
        found = self._whole(items, f"in-words-{attribute}")
        pairs = zip(items, self.asked(attribute), strict=True)
        items = [replace(item, prompt=f"{item.prompt}\n{asked.prompt}") for item, asked in pairs]
        kept = self.out / f"scores-in-words-{attribute}"
        return found, collect_scores(self.model, items, self.answers(attribute), kept, self.progress)

    def _whole(self, items: Sequence[Item], folder: str) -> Features:
        """Features of items of which none may fail."""
        found = self._collected(items, folder, self.name)
        if len(found) < len(items):
            failed = found.run.items().drop_nulls("error").row(0, named=True)
            raise ValueError(f"item {failed['item']!r} could not be taken ({failed['error']}); leave it out")
        return found

    def _collected(self, items: Sequence[Item], folder: str, name: str) -> Features:
        return collect(self.model, items, self.out / folder, name=name, retry=self.retry, progress=self.progress)

    def halves(self, attribute: str) -> tuple[list[int], list[int]]:
        """Numbers of items to take directions from, and of others to judge by; groups stay together."""
        labels = [self.label(item, attribute) for item in self.items]
        split = splits(labels, self.groups(attribute), 2, self.seed)[0]
        return split.train.tolist(), split.test.tolist()


def _probes(given: Setting) -> list[Finding]:
    return [
        _of_features(
            given,
            probes(
                given.features,
                attribute,
                given.group_of(attribute),
                folds=given.folds,
                seed=given.seed,
                out=given.out / f"probes-{attribute}",
                progress=given.progress,
            ),
        )
        for attribute in given.attributes
    ]


def _directions(given: Setting) -> list[Finding]:
    kept, group = given.out / "directions", given.group
    assert not isinstance(group, Mapping), "decode refuses it"
    found = compare_layers(given.features, given.of_texts, group=group, seed=given.seed, out=kept, progress=given.progress)
    return [_of_features(given, found)]


def _of_features(given: Setting, found: Finding) -> Finding:
    """With what the features of the items took, and how many items have none."""
    failed = len(given.items) - len(given.features)
    return replace(found, used={**found.used, "failed": failed, "seconds": found.used.get("seconds", 0.0) + given.features.seconds})


def _ablate(given: Setting) -> list[Finding]:
    return [_ablated(given, attribute) for attribute in given.attributes]


def _ablated(given: Setting, attribute: str) -> Finding:
    fitted, judged = given.halves(attribute)
    groups = given.groups(attribute)
    place = Hook("llm", 0)
    rows = {name: row for row, name in enumerate(given.features.table["item"])}
    known = [rows[given.items[k].id] for k in fitted if given.items[k].id in rows]
    found = directions(given.features.at(place)[known], given.of_texts.at(place))
    said = given.response
    answers, asked = given.answers(attribute), given.asked(attribute)
    made = ablate(
        given.model,
        [given.items[k] for k in judged],
        None if said is None else [given.label(given.items[k], said) for k in judged],
        found,
        answers=answers,
        asked=[asked[k] for k in judged],
        labels=[answers.index(f"{given.label(given.items[k], attribute)}.") for k in judged],
        draws=given.draws,
        groups=None if groups is None else [groups[k] for k in judged],
        seed=given.seed,
        out=given.out / f"ablate-{attribute}",
        progress=given.progress,
    )
    about = {"attribute": attribute, "response": said or attribute, "answers": len(answers)}
    table = made.table.select(*(pl.lit(value).alias(name) for name, value in about.items()), pl.all())
    used = {**made.used, "group": given.group_of(attribute)}
    return _of_features(given, replace(made, table=table, used=used))


def _gmi(given: Setting) -> list[Finding]:
    found = []
    for attribute in given.attributes:
        features, scores = given.scored(attribute)
        one = gmi(
            features,
            scores,
            attribute,
            group=given.group_of(attribute),
            folds=given.folds,
            seed=given.seed,
            out=given.out / f"gmi-{attribute}",
            progress=given.progress,
        )
        found.append(replace(one, used={**one.used, "seconds": one.used["seconds"] + features.seconds}))
    return found


def _bound(given: Setting) -> list[Finding]:
    place, found = Hook("llm", 0), []
    vocabulary = given.model.language_model.get_input_embeddings().num_embeddings
    for attribute in given.attributes:
        group = given.group_of(attribute)
        features, scores = given.scored(attribute)
        words, in_words = given.scored_in_words(attribute)
        losses = lost(features, scores, in_words, attribute, group=group, folds=given.folds, seed=given.seed)
        right = [f"{given.label(item, attribute)}." for item in given.items]
        kept = given.out / f"sensitivity-{attribute}"
        gradients = sensitivity(given.model, given.asked(attribute), right, kept, given.progress)
        labels = features.labels(attribute)
        one = bound(
            attribute,
            gradients,
            features.at(place),
            words.at(place),
            losses,
            vocabulary,
            labels=labels,
            text_labels=labels,
            groups=features.groups(group),
            seed=given.seed,
        )
        seconds = one.used["seconds"] + features.seconds + words.seconds + scores.seconds + in_words.seconds
        found.append(replace(one, used={"group": group, "folds": given.folds, "seconds": seconds}))
    return found


def _lora(given: Setting) -> list[Finding]:
    """The first attribute is learnt, all are read. The control is the label `response`: asked for like an attribute if it is one that is
    read, else said to the item as it is."""
    attribute, control = given.attributes[0], given.response
    if control is None or control == attribute:
        raise ValueError(
            "lora needs a control: name with --response a label other than the attribute, for the decoder to learn from the same items"
        )
    learnt, judged = given.halves(attribute)
    rest = replace(given, items=[given.items[k] for k in judged])

    def objective(name: str) -> Objective:
        asked, end = (given.asked(name), ".") if name in given.attributes else (list(given.items), "")
        return Objective(name, [asked[k] for k in learnt], [given.label(given.items[k], name) + end for k in learnt])

    return [
        lora(
            given.model,
            objective(attribute),
            objective(control),
            [rest.question(name) for name in given.attributes],
            folds=given.folds,
            seed=given.seed,
            out=given.out / f"lora-{attribute}",
            progress=given.progress,
        )
    ]


def grouping(given: Sequence[str], attributes: Sequence[str]) -> str | dict[str, str] | None:
    """What the words of `--group` mean: `speaker` for all attributes, or `emotion=speaker speaker=sentence`, each its own.

    Raises:
        ValueError: there are several groups for one attribute, or one for an attribute that is not read.
    """
    named = [word.partition("=") for word in given]
    if len(given) < 2 and not any(sign for _, sign, _ in named):
        return given[0] if given else None
    whose = [attribute for attribute, _, _ in named]
    if not all(sign and label for _, sign, label in named) or len(set(whose)) < len(whose) or not set(whose) <= set(attributes):
        read = " and ".join(attributes) or "none"
        raise ValueError(
            f"--group takes one label, or ATTRIBUTE=LABEL once for any of the attributes that are read ({read}); got {' '.join(given)}"
        )
    return {attribute: label for attribute, _, label in named}


EXPERIMENTS: dict[str, Callable[[Setting], list[Finding]]] = {
    "probes": _probes,
    "directions": _directions,
    "ablate": _ablate,
    "gmi": _gmi,
    "bound": _bound,
    "lora": _lora,
}
"""Every experiment that has a name."""


def decode(name: str, model: Model, given: dict[str, Any]) -> list[Finding]:
    """Run an experiment and write its table and its sentences.

    Args:
        model: a bridged one.
        given: the other fields of `Setting`.

    Raises:
        ValueError: there is no such experiment, the model is not bridged, or what the experiment itself finds wrong.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"no experiment is called {name!r}; there are {', '.join(EXPERIMENTS)}")
    if not isinstance(model, Bridged):
        raise ValueError(
            f"{model.name} is not an encoder with an adapter and a text decoder, which decode reads; `unisonde models` lists "
            "families such as speech-smollm, ultravox and llava"
        )
    setting = Setting(model, **given)
    if not setting.attributes and name != "directions":
        raise ValueError(f"{name} reads labels of the items; name one or more with --attribute")
    if name == "directions" and isinstance(setting.group, Mapping):
        whose = " ".join(f"{attribute}={label}" for attribute, label in setting.group.items())
        raise ValueError(f"directions reads no attribute, so its items are kept together by one label, --group NAME; got {whose}")
    if name in ("probes", "gmi", "bound"):
        for attribute in setting.attributes:
            setting.check(attribute, asked=name != "probes")
    if name == "ablate":
        for attribute in setting.attributes:
            model.tokens_of_answers(setting.answers(attribute))
    about = {"model": model.name, "data": setting.name, "items": len(setting.items)}
    setting.out.mkdir(parents=True, exist_ok=True)
    results.check(setting.out, about)
    asked_by = session(model.device)
    found = EXPERIMENTS[name](setting)
    table = results.add(setting.out, name, found, about, {"seed": setting.seed}, asked_by)
    if name == "bound" and len(table) > 2:
        ordered = order(table)
        results.tell(setting.out, name, ordered)
        found = [*found, ordered]
    return found
