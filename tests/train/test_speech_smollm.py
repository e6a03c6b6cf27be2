"""Training of speech-smollm: its two losses against independent ones, its figures, and the whole command on a tiny model of noise."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from unisonde.data import speech, spoken
from unisonde.data.item import Item
from unisonde.data.sound import Sound
from unisonde.models import smollm, speech_smollm
from unisonde.models.speech_smollm import SpeechSmolLM
from unisonde.train.loop import Schedule
from unisonde.train.projector import Encoded, Writer, project
from unisonde.train.speech_smollm import Recipe, Speller, draw, fit_projector, hear_all, plain, train, word_errors

from ..models.tiny_speech import CONFIG, make

WORDS = ("one", "two")
TOY = Recipe(
    sentences=2,
    held_out=1,
    projector=CONFIG,
    size=2,
    spell=Schedule(3, 1e-3, 1),
    write=Schedule(3, 1e-3, 1),
)


@pytest.fixture(scope="module")
def model() -> SpeechSmolLM:
    return make()


def recording(number: int, word: str, seconds: float = 0.3) -> Item:
    samples = np.random.default_rng(number).normal(0, 0.1, round(16_000 * seconds))
    return Item(str(number), word, "Hm?", labels={"digit": word, "sentence": f"{word} {word}"}, audio=Sound(samples, 16_000))


def heard(model: SpeechSmolLM, count: int = 6) -> list[Encoded]:
    items = [recording(k, WORDS[k % 2], 0.2 + 0.1 * k) for k in range(count)]
    return hear_all(model, items, [item.labels["digit"] for item in items], "noise")


# Losses


def test_spelling_is_the_sum_over_all_alignments() -> None:
    """Against every path of a small case: drop repeats, then blanks; what spells the transcript counts."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(7, 5, generator=generator)
    features = torch.randn(4, 5, generator=generator)
    speller = Speller(embeddings, [2, 5, 6], 3.0)
    centre = embeddings.mean(0)
    cosines = F.cosine_similarity((features - centre)[:, None], (embeddings[[2, 5, 6]] - centre)[None], dim=-1)
    logs = torch.cat([torch.full((4, 1), 0.75), 3.0 * cosines], 1).log_softmax(1)
    for words, spelt in (([5], [2]), ([5, 2], [2, 1]), ([6, 6], [3, 3]), ([2, 5, 6], [1, 2, 3])):
        total = 0.0
        for path in itertools.product(range(4), repeat=4):
            kept = [symbol for symbol, _ in itertools.groupby(path)]
            if [symbol for symbol in kept if symbol] == spelt:
                total += math.exp(sum(logs[k, symbol] for k, symbol in enumerate(path)))
        loss = speller.loss([features], [Encoded(features, [], words)])
        assert float(loss) == pytest.approx(-math.log(total) / len(words), rel=1e-5)


def test_what_cannot_be_spelt_costs_nothing() -> None:
    embeddings, features = torch.randn(7, 5), torch.randn(2, 5)
    assert float(Speller(embeddings, [2], 3.0).loss([features], [Encoded(features, [], [2, 2, 2])])) == 0.0


def test_writing_is_what_the_model_scores(model: SpeechSmolLM) -> None:
    """The template read once and rows padded, against a pass over each whole sequence by the model's own embedding."""
    items = [recording(k, WORDS[k % 2], 0.2 + 0.15 * k) for k in range(4)]
    texts = ["one", "two two", "o", "one two one"]
    batch = [hear_all(model, [item], [text], "noise")[0] for item, text in zip(items, texts, strict=True)]
    writer = Writer(model, model.prepare(items[0], 1), None)
    features = [feature.detach() for feature in project(model.network.projector, batch, None)]
    total, count = 0.0, 0
    for item, text in zip(items, texts, strict=True):
        ids = [*model.tokens_of(text), model.tokenizer.eos_token_id]
        with torch.inference_mode():
            logits = model._read(model.embed(model.prepare(item, len(ids)), ids), len(ids) + 1)[0, :-1]
        total, count = total + float(F.cross_entropy(logits, torch.tensor(ids), reduction="sum")), count + len(ids)
    assert writer.loss(features, batch).item() == pytest.approx(total / count, rel=1e-3)  # states are kept in float16


def test_gradients_reach_the_projector_alone(model: SpeechSmolLM) -> None:
    fresh = make()
    fresh.network.requires_grad_(False)
    fresh.network.projector.requires_grad_(True)
    batch = heard(fresh)
    writer = Writer(fresh, fresh.prepare(recording(0, "one"), 1), torch.bfloat16)
    speller = Speller(fresh.language_model.get_input_embeddings().weight.detach(), sorted({t for h in batch for t in h.words}), 9.0)
    for judge in (writer, speller):
        gradients = torch.autograd.grad(
            judge.loss(project(fresh.network.projector, batch, None), batch), list(fresh.network.projector.parameters())
        )
        assert all(gradient.abs().max() > 0 for gradient in gradients)


# Batches


def test_batches_are_of_one_length_and_follow_the_seed(model: SpeechSmolLM) -> None:
    pools = [heard(model, 4), [Encoded(torch.zeros(k + 1, 3), [k], [k]) for k in range(200)]]
    assert [len(one.joined) for one in pools[0]] == sorted(len(one.joined) for one in pools[0])
    first, again = (draw(random.Random(7), pools, 0.2, 8) for _ in range(2))
    assert [one.ids for one in first] == [one.ids for one in again] and len(first) == 8
    lengths = [[len(one.joined) for one in draw(random.Random(k), pools, 0.0, 8)] for k in range(100)]
    assert all(max(each) - min(each) < 64 and len(set(each)) == 8 for each in lengths)
    assert min(map(min, lengths)) < 20 < 180 < max(map(max, lengths))  # of all lengths in the end
    assert len(draw(random.Random(0), pools, 1.0, 8)) == 4  # a pool smaller than a batch
    shares = [len(draw(random.Random(k), pools, 0.2, 8)) == 4 for k in range(300)]
    assert 30 < sum(shares) < 90


# Figures


@pytest.mark.parametrize(
    ("said", "wanted", "errors"),
    [
        ("", "", 0),
        ("a", "", 1),
        ("", "a b", 2),
        ("a b c", "a b c", 0),
        ("a c", "a b c", 1),
        ("a x c", "a b c", 1),
        ("b a", "a b", 2),
    ],
)
def test_word_errors(said: str, wanted: str, errors: int) -> None:
    assert word_errors(said.split(), wanted.split()) == errors


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=5), st.lists(st.sampled_from("abc"), max_size=5))
def test_word_errors_are_the_fewest(said: list[str], wanted: list[str]) -> None:
    """As many as are left when the longest matching of equal words in order is kept, over all matchings."""

    def fewest(a: tuple[str, ...], b: tuple[str, ...]) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(fewest(a[1:], b) + 1, fewest(a, b[1:]) + 1, fewest(a[1:], b[1:]) + (a[0] != b[0]))

    assert word_errors(said, wanted) == fewest(tuple(said), tuple(wanted)) == word_errors(wanted, said)


def test_transcripts_are_compared_without_marks() -> None:
    assert plain(" The Red  dog,\nsleeps. ") == "the red dog sleeps" and plain("!?") == ""


# The whole command


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tiny encoder and decoder in place of the packages', noise in place of speech."""
    model = make()
    decoder = type("Decoder", (), {"network": model.language_model, "tokenizer": model.tokenizer, "source": tmp_path / "decoder"})
    monkeypatch.setattr(speech_smollm, "load_encoder", lambda device, dtype: model.network.encoder)
    monkeypatch.setattr(speech_smollm, "find_weights", lambda: tmp_path / "model.bin")
    monkeypatch.setattr(smollm, "load", lambda device, dtype: decoder)
    monkeypatch.setattr(spoken, "check_program", lambda: None)
    counts = {"train": 4, "test": 2}
    starts = {"train": 0, "test": 50}
    monkeypatch.setattr(speech, "fsdd", lambda split: [recording(starts[split] + k, WORDS[k % 2]) for k in range(counts[split])])
    monkeypatch.setattr(
        spoken, "items", lambda task, split, seed, n: [recording(100 + starts[split] + k, WORDS[k % 2], 0.6) for k in range(n)]
    )


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_folder_loads_and_says_how_it_was_made(packages: None, tmp_path: Path) -> None:
    folder = train(tmp_path / "out", TOY)
    loaded = speech_smollm.load(str(folder), "mine", "cpu")
    [response] = loaded.respond([recording(0, "one")], "text", loaded.defaults("text"))
    assert loaded.name == "mine" and isinstance(response.text, str)
    record, figures = (json.loads((folder / f"{name}.json").read_text()) for name in ("training", "scores"))
    assert record["recipe"]["seed"] == 0 and record["effort"]["write"]["processor_seconds"] > 0
    assert record["recordings"]["digits"] == 4 and record["recordings"]["sentences"] == 2
    assert figures["digits"]["n"] == 2 and figures["sentences"]["words"] == 2 and 0 <= figures["digits"]["accuracy"] <= 1
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "training.json", "scores.json"}
    assert not folder.with_name("out.training").exists()


def test_the_same_seed_gives_the_same_weights(packages: None, tmp_path: Path, one_thread: None) -> None:
    first, again, other = (train(tmp_path / str(k), replace(TOY, seed=seed)) for k, seed in enumerate((0, 0, 1)))
    assert weights(first) == weights(again) != weights(other)


def test_what_stands_there_is_not_overwritten(packages: None, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ValueError, match="already holds files"):
        train(tmp_path / "out", TOY)


def test_killed_it_goes_on_and_ends_alike(
    packages: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    whole = train(tmp_path / "whole", TOY)
    loss = Writer.loss
    calls = itertools.count()

    def stop(self: Writer, features: list, batch: list) -> torch.Tensor:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return loss(self, features, batch)

    monkeypatch.setattr(Writer, "loss", stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "out", TOY)
    monkeypatch.setattr(Writer, "loss", loss)
    with pytest.raises(ValueError, match="begun with another recipe"):
        train(tmp_path / "out", replace(TOY, seed=3))
    assert weights(train(tmp_path / "out", TOY)) == weights(whole)


def test_without_espeak_nothing_is_begun(packages: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ValueError("no espeak-ng")

    monkeypatch.setattr(spoken, "check_program", missing)
    with pytest.raises(ValueError, match="no espeak-ng"):
        train(tmp_path / "out", TOY)
    assert not (tmp_path / "out.training").exists()


def test_noise_can_be_learnt_by_heart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Both stages bring their loss down; what is wrong in batches, template or targets keeps them from that."""
    fresh = make()
    fresh.network.requires_grad_(False)
    batch = heard(fresh, 4)
    schedule = Schedule(80, 1e-2, 5)
    recipe = replace(TOY, digits=1.0, size=4, batches=1, precision="fp32", spell=schedule, write=schedule)
    losses: dict[str, list[float]] = {"Speller": [], "Writer": []}

    def kept(judge: type[Speller] | type[Writer]) -> Callable[..., torch.Tensor]:
        own = judge.loss

        def loss(self: Any, features: Sequence[torch.Tensor], batch: Sequence[Encoded]) -> torch.Tensor:
            value = own(self, features, batch)
            losses[judge.__name__].append(value.item())
            return value

        return loss

    for judge in (Speller, Writer):
        monkeypatch.setattr(judge, "loss", kept(judge))
    fit_projector(fresh, [batch, batch], recipe, fresh.prepare(recording(0, "one"), 1), tmp_path)
    assert losses["Speller"][-1] < 0.5 * losses["Speller"][0]
    assert losses["Writer"][-1] < losses["Writer"][0] - 0.8  # a frozen decoder of noise can be led so far
