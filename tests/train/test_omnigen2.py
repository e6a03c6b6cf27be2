"""What an OmniGen2 twin is shown, its losses and its autoencoder."""

from __future__ import annotations

import random

import pytest
import torch

from unisonde.data.item import Item
from unisonde.data.tabletop import grammar, render, text_item
from unisonde.train.image_codes import crowd, pixels_of
from unisonde.train.loop import Schedule
from unisonde.train.omnigen2 import collate, joint_loss, latents_of, new_twin, new_vae, train_vae
from unisonde.train.tabletop_batches import example

ITEMS = [text_item("composition", "train", 0, k, 1 + k % 3) for k in range(16)]
SCENES = [item.labels["scene"] for item in ITEMS]
REQUEST = grammar.CAPTION_REQUESTS[0]


def test_the_autoencoder_begins_as_the_identity() -> None:
    vae = new_vae(0)
    rng = random.Random(0)
    pixels = pixels_of([crowd(rng) for _ in range(8)])
    with torch.inference_mode():
        latents = vae.encode(pixels).latent_dist.mode()
        assert latents.shape == (8, 3, 32, 32) and (latents - pixels).abs().max() < 0.01
        assert (vae.decode(latents).sample - pixels).abs().max() < 0.01


def test_the_autoencoder_trains_on_crowds_and_measures_its_latents(tmp_path) -> None:
    vae = new_vae(0)
    before = [p.clone() for p in vae.parameters()]
    train_vae(vae, tmp_path / "vae.pt", 0, Schedule(2, 1e-3, 1))
    assert any(not torch.equal(a, b) for a, b in zip(before, vae.parameters(), strict=True)) and not vae.training
    rng = random.Random(1)
    latents = latents_of(vae, pixels_of([crowd(rng) for _ in range(64)]))
    assert abs(float(latents.mean())) < 0.2 and float(latents.std()) == pytest.approx(1, abs=0.1)


def test_batches_are_what_the_model_sees_in_use() -> None:
    model = new_twin(0)
    rng = random.Random(0)
    for kind in ("draw", "infer", "caption", "answer"):
        made = [example(rng, kind) for _ in range(3)]
        batch = collate(model, made, rng, unconditional=0.0)
        item = Item("a", "", made[0].prompt, render(made[0].scene) if kind in ("caption", "answer") else None)
        asked = model.encode(item, "image" if kind == "draw" else "text", 96)
        assert (batch.prompts[0].ids, batch.prompts[0].spans) == (asked.ids, asked.spans)
        if batch.pictures is not None:
            assert torch.equal(batch.pictures["pixel_values"][:64], asked.picture["pixel_values"])
        if batch.responses is not None:
            assert batch.responses[0][-1] in model.ends
            assert model.tokenizer.decode(batch.responses[0][:-1]) == made[0].response
        loss = joint_loss(model, batch)
        loss.backward()
        assert loss.ndim == 0 and 0.5 < loss < 8  # about the latents' variance and the noise's, or the logarithm of 116 words
    # Drawing teaches the language model, too, since nothing else would teach it to say what is to be drawn.
    model.network.zero_grad()
    for weight in model.network.transformer.norm_out.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    joint_loss(model, collate(model, [example(rng, "draw")], rng, 0.0)).backward()
    gradient = model.network.mllm.model.language_model.layers[0].mlp.up_proj.weight.grad
    assert gradient is not None and gradient.abs().max() > 0
    unconditional = collate(model, [example(rng, "draw")], rng, unconditional=1.0)
    assert len(unconditional.prompts[0].ids) == 5
