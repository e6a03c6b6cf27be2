"""LoRA on a decoder: what is learnt brings the loss down, leaves the model as it was, and goes on after a kill."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unisonde.data.item import Item
from unisonde.data.sound import Sound
from unisonde.models.speech_smollm import SpeechSmolLM
from unisonde.train import lora
from unisonde.train.loop import Schedule
from unisonde.train.lora import Lesson, LoraRecipe, learn, tuned

from ..models.tiny_speech import make

pytest.importorskip("peft")

TOY = LoraRecipe(rank=4, alpha=8, size=4, precision="fp32", schedule=Schedule(steps=30, rate=1e-2, warmup=2))
WORDS = ("yes.", "no.")


@pytest.fixture(scope="module")
def model() -> SpeechSmolLM:
    return make()


def recording(number: int) -> Item:
    samples = np.random.default_rng(number).normal(0, 0.1, 3200 + 400 * (number % 3))
    return Item(str(number), "", "Hm?", audio=Sound(samples, 16_000))


def lessons(model: SpeechSmolLM, count: int = 6) -> list[Lesson]:
    return [Lesson(model.ahead(model.prepare(recording(k), 8)), model.tokens_of(WORDS[k % 2])) for k in range(count)]


def test_ahead_is_what_would_have_been(model: SpeechSmolLM) -> None:
    prompted = model.prepare(recording(1), 8)
    with torch.inference_mode():
        wanted = model.embed(prompted, [5, 6])
        ahead = model.ahead(prompted)
        assert ahead.inputs == {} and torch.equal(model.embed(ahead, [5, 6]), wanted)
        with model.edited(torch.zeros_like):
            assert not model.embed(ahead)[0, prompted.slots].any()
        assert torch.equal(model.scores_of(ahead, WORDS), model.answer_scores([recording(1)], WORDS)[0])
    text = model.prepare(Item("t", "", "Hm?"), 8)
    assert model.ahead(text) is text


def test_the_loss_is_that_of_the_model(model: SpeechSmolLM) -> None:
    """Rows padded to one length, against a pass over each whole sequence."""
    batch = lessons(model, 4)
    total, count = 0.0, 0
    with torch.inference_mode():
        for one in batch:
            ids = [*one.ids, model.tokenizer.eos_token_id]
            logits = model._read(model.embed(one.prompted, ids), len(ids) + 1)[0, :-1]
            total, count = total + float(F.cross_entropy(logits, torch.tensor(ids), reduction="sum")), count + len(ids)
        assert float(lora._written(model, model.language_model, batch)) == pytest.approx(total / count, rel=1e-5)


def test_what_is_learnt_changes_the_decoder_for_a_while(model: SpeechSmolLM, tmp_path: Path, one_thread: None) -> None:
    batch = lessons(model)
    before = {key: value.clone() for key, value in model.network.state_dict().items()}
    asked = [recording(k) for k in range(6)]
    right = torch.tensor([k % 2 for k in range(6)])
    plain = model.answer_scores(asked, WORDS)
    first = float(lora._written(model, model.language_model, batch).detach())
    weights, effort = learn(model, batch, TOY, tmp_path / "c.pt")
    assert effort.seconds > 0 and all("lora_" in key for key in weights)
    # Two matrices for each of four maps of each layer.
    assert len(weights) == 2 * 4 * model.llm.depth
    with tuned(model, weights, TOY):
        assert float(lora._written(model, model.language_model, batch)) < first - 0.5
        after = model.answer_scores(asked, WORDS)
        assert not torch.equal(after, plain)
        assert F.cross_entropy(after, right) < F.cross_entropy(plain, right)
    assert torch.equal(model.answer_scores(asked, WORDS), plain)
    assert {key: value.shape for key, value in model.network.state_dict().items()} == {k: v.shape for k, v in before.items()}
    assert all(torch.equal(value, before[key]) for key, value in model.network.state_dict().items())
    assert not any("lora" in name for name, _ in model.network.named_modules())


def test_what_may_learn_is_as_before(model: SpeechSmolLM, tmp_path: Path) -> None:
    fresh = make()
    fresh.network.requires_grad_(False)
    fresh.network.projector.requires_grad_(True)
    flags = {name: parameter.requires_grad for name, parameter in fresh.network.named_parameters()}
    recipe = replace(TOY, schedule=Schedule(1, 1e-2, 1))
    weights, _ = learn(fresh, lessons(fresh, 2), recipe, tmp_path / "c.pt")
    with tuned(fresh, weights, recipe):
        pass
    assert {name: parameter.requires_grad for name, parameter in fresh.network.named_parameters()} == flags


def test_seeds_differ_and_a_kill_does_not(
    model: SpeechSmolLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    recipe = replace(TOY, dropout=0.2, schedule=Schedule(6, 1e-2, 1))
    batch = lessons(model)
    whole, _ = learn(model, batch, recipe, tmp_path / "a.pt", seed=1)
    other, _ = learn(model, batch, recipe, tmp_path / "b.pt", seed=2)
    assert any(not torch.equal(value, other[key]) for key, value in whole.items())
    own, calls = lora._written, []

    def stop(*given: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return own(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(lora, "_written", stop)
    with pytest.raises(KeyboardInterrupt):
        learn(model, batch, recipe, tmp_path / "c.pt", seed=1)
    monkeypatch.setattr(lora, "_written", own)
    again, _ = learn(model, batch, recipe, tmp_path / "c.pt", seed=1)
    assert all(torch.equal(value, again[key]) for key, value in whole.items())


def test_every_lesson_is_taken_once_a_round() -> None:
    drawn = [k for number in range(7) for k in lora._drawn(10, 4, number, 3)]
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10)) and drawn[:10] != drawn[10:20]
    assert drawn[:8] != [k for number in range(2) for k in lora._drawn(10, 4, number, 4)]


def test_what_is_refused(model: SpeechSmolLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="nothing to learn from"):
        learn(model, [], TOY, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="q_strange"):
        learn(model, lessons(model, 2), replace(TOY, targets=("q_strange",)), tmp_path / "c.pt")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'unisonde\[lora\]'"):
        learn(model, lessons(model, 2), TOY, tmp_path / "c.pt")
