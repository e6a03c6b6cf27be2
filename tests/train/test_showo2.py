"""What a Show-o2 twin is shown, its losses and its autoencoder."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

import unisonde
from unisonde.data.item import Item
from unisonde.data.tabletop import grammar, judge, render, text_item
from unisonde.models.parts import wan_vae
from unisonde.models.showo2 import Showo2
from unisonde.train.image_codes import pixels_of
from unisonde.train.showo2 import SQUARE, collate, export, joint_loss, latent_loss, measure, new_twin
from unisonde.train.tabletop_batches import Example, example

ITEMS = [text_item("composition", "train", 0, k, 1 + k % 3) for k in range(16)]
SCENES = [item.labels["scene"] for item in ITEMS]
REQUEST = grammar.CAPTION_REQUESTS[0]
DRAWINGS = [Example("draw", item.prompt, scene, None) for item, scene in zip(ITEMS, SCENES, strict=True)]
CAPTIONS = [Example("caption", REQUEST, scene, grammar.describe(scene)) for scene in SCENES]


@pytest.fixture(scope="module")
def model() -> Showo2:
    return new_twin(0)


def test_batches_are_what_the_model_sees_in_use(model) -> None:
    rng = random.Random(0)
    for kind in ("draw", "infer", "caption", "answer"):
        made = [example(rng, kind) for _ in range(3)]
        batch = collate(model, made, rng, unconditional=0.0)
        item = Item("a", "", made[0].prompt, render(made[0].scene) if kind in ("caption", "answer") else None)
        asked = model.encode(item, "image" if kind == "draw" else "text", 96)
        assert batch.prompts[0].ids == asked.ids and batch.prompts[0].image == asked.image
        if asked.pixels is not None:
            assert torch.allclose(asked.pixels, pixels_of([made[0].scene])[0], atol=1e-6)
        if batch.responses is not None:
            assert batch.responses[0][-1] == model.marks.eos
            assert model.tokenizer.decode(batch.responses[0][:-1]) == made[0].response
    assert len(collate(model, [example(rng, "draw")], rng, unconditional=1.0).prompts[0].ids) == 2


def test_an_untrained_twin_moves_nothing(model) -> None:
    """The velocity begins at zero, so the loss is the mean square of what is to be followed."""
    batch = collate(model, DRAWINGS[:3], random.Random(0))
    assert batch.latents is not None and batch.noise is not None
    assert torch.allclose(joint_loss(model, batch), (batch.latents - batch.noise).square().mean())


def test_the_right_velocity_has_no_loss(model, monkeypatch) -> None:
    batch = collate(model, DRAWINGS[:3], random.Random(0))

    def told(self, ids, where, latents, t, mask):
        assert batch.latents is not None and batch.noise is not None
        assert torch.equal(where.sum(1), torch.full((3,), model.config.tokens + 1))
        # Seen from where the flow is, at its pace, data is reached at 1 and noise was left at 0.
        velocity = batch.latents - batch.noise
        now = t[:, None, None, None]
        assert torch.allclose(latents + (1 - now) * velocity, batch.latents, atol=1e-5)
        assert torch.allclose(latents - now * velocity, batch.noise, atol=1e-5)
        return velocity

    monkeypatch.setattr(type(model.network), "flow", told)
    assert joint_loss(model, batch) == 0


def test_latents_are_normalised_by_what_was_measured() -> None:
    vae = new_twin(1).vae
    pixels = pixels_of(SCENES)
    measure(vae, pixels)
    latents = wan_vae.encode(vae, pixels)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4 and (latents.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_the_loss_of_latents_is_that_of_the_decoder_in_use(model) -> None:
    """Without noise and within the range, what is trained is what `decode` gives."""
    pixels = pixels_of(SCENES[:2])
    posterior = model.vae.encode(pixels[:, :, None]).latent_dist
    with torch.no_grad():
        squares = model.vae.decoder(model.vae.post_quant_conv(posterior.mode()))
        trained = unpatchify(squares, SQUARE)[:, :, 0].clamp(-1, 1)
        assert torch.equal(trained, wan_vae.decode(model.vae, wan_vae.encode(model.vae, pixels)))
    assert latent_loss(model.vae, pixels, torch.Generator().manual_seed(0)).ndim == 0


@torch.inference_mode()
def test_an_autoencoder_begins_as_principal_components() -> None:
    """Untrained, it draws every picture of another split so that the judge finds nothing wrong."""
    vae = new_twin(0).vae
    scenes = [text_item("composition", "test", 1, k, 1 + k % 3).labels["scene"] for k in range(16)]
    pixels = pixels_of(scenes)
    latents = wan_vae.encode(vae, pixels)
    assert latents.shape == (16, 24, 8, 8) and 0.2 < latents.std() < 2
    decoded = ((wan_vae.decode(vae, latents) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert abs(decoded.astype(int) - pixels.add(1).mul(127.5).round().int().permute(0, 2, 3, 1).numpy()).mean() < 2
    assert all(judge(picture, scene, background=True).exact for picture, scene in zip(decoded, scenes, strict=True))


def test_a_written_twin_is_the_same_model(model, tmp_path) -> None:
    measure(model.vae, pixels_of(SCENES))
    export(model, tmp_path / "twin", {"seed": 0})
    loaded = unisonde.load(tmp_path / "twin")
    assert loaded.config == model.config and loaded.defaults("image") == model.defaults("image")
    assert list(loaded.vae.config.latents_std) == pytest.approx(list(model.vae.config.latents_std))
    item = ITEMS[0]
    settings = model.settings("image", steps=4)
    ours, theirs = (np.asarray(m.respond([item], "image", settings)[0].image, int) for m in (model, loaded))
    assert abs(ours - theirs).max() <= 2  # float16 on disk
    with pytest.raises(ValueError, match="already holds files"):
        export(model, tmp_path / "twin")
