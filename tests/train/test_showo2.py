"""What a Show-o2 twin is shown, its losses, its autoencoder, and that it learns sixteen items by heart in both tasks."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import unisonde
from unisonde.data.item import Item
from unisonde.data.tabletop import judge, render, text_item
from unisonde.data.tabletop.scene import BACKGROUNDS
from unisonde.models.parts import wan_vae
from unisonde.models.showo2 import Showo2
from unisonde.train import showo2
from unisonde.train.image_codes import crowd, pixels_of
from unisonde.train.loop import Schedule, fit
from unisonde.train.showo2 import FIGURE, collate, decoder_loss, export, joint_loss, joint_parts, measure, new_twin, train_latents
from unisonde.train.tabletop_batches import example

from .sixteen import CAPTIONS, DRAWINGS, ITEMS, REQUEST, SCENES

DECODER = Schedule(steps=250, rate=2e-3, warmup=20, weight_decay=0.0)
JOINT = Schedule(steps=800, rate=2e-3, warmup=20, weight_decay=0.0, matrix_rate=0.02)


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


def test_figures_count_more_than_background(model) -> None:
    batch = collate(model, DRAWINGS, random.Random(0))
    assert batch.weights is not None
    squares = torch.from_numpy(np.stack([np.asarray(render(scene)) for scene in SCENES])).unfold(1, 4, 4).unfold(2, 4, 4)
    ground = torch.tensor([BACKGROUNDS[scene.background] for scene in SCENES])[:, None, None, :, None, None]
    plain = (squares == ground).all((3, 4, 5))
    assert torch.equal(batch.weights[:, 0], torch.where(plain, 1.0, FIGURE)) and 0.5 < plain.float().mean() < 0.95


def test_an_untrained_twin_lets_noise_through(model) -> None:
    """The velocity begins as what has to go: of the loss at the start, what is to come is left."""
    batch = replace(collate(model, DRAWINGS[:3], random.Random(0)), times=torch.zeros(3))
    assert batch.latents is not None and batch.weights is not None
    coming = (batch.latents.square().mean(1, keepdim=True) * batch.weights).sum() / batch.weights.sum()
    assert float(joint_loss(model, batch).detach()) == pytest.approx(float(coming), rel=0.2)


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
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4 and abs(latents.square().mean() - 1) < 1e-3


def test_latents_are_the_larger_the_more_they_change_a_picture() -> None:
    """Deviations go as the square root of what a channel adds to pictures, so as what a unit of it changes."""
    vae = new_twin(1).vae
    rng = random.Random(5)
    pixels = pixels_of([crowd(rng) for _ in range(100)])
    measure(vae, pixels)
    latents = wan_vae.encode(vae, pixels)
    plain, one = torch.zeros(1, 24, 8, 8), 0.01 * torch.eye(24)[:, :, None, None].expand(24, 24, 8, 8)
    with torch.no_grad():
        change = (wan_vae.decode(vae, plain + one) - wan_vae.decode(vae, plain)).square().mean((1, 2, 3)).sqrt()
    shares = change / latents.std((0, 2, 3))
    assert (shares / shares.mean() - 1).abs().max() < 0.25
    assert change.max() > 5 * change.min()


def test_the_loss_of_the_decoder_is_that_of_pictures(model, monkeypatch) -> None:
    """Latents that do not tremble are decoded as in use; those that do, worse."""
    pixels, generator = pixels_of(SCENES[:2]), torch.Generator().manual_seed(0)
    measure(model.vae, pixels)
    with torch.no_grad():
        trembling = decoder_loss(model.vae, pixels, generator)
        monkeypatch.setattr(showo2, "TREMOR", 0.0)
        still = decoder_loss(model.vae, pixels, generator)
        error = wan_vae.decode(model.vae, wan_vae.encode(model.vae, pixels)) - pixels
    weight = torch.where((pixels != pixels[:, :, :1, 9:10]).any(1, keepdim=True), FIGURE, 1.0).expand_as(pixels)
    expected = ((error.abs() + error.square()) * weight).sum() / weight.sum()
    assert float(still) == pytest.approx(float(expected), rel=1e-3)
    assert trembling > 2 * still


def test_the_decoder_is_trained_and_the_encoder_stays(tmp_path) -> None:
    vae, pixels = new_twin(0).vae, pixels_of(SCENES[:4])
    encoder, decoder = ([p.detach().clone() for p in half.parameters()] for half in (vae.encoder, vae.decoder))
    train_latents(vae, tmp_path / "latents.pt", 0, Schedule(3, 2e-4, 2, 0.0), lambda rng: pixels)
    assert all(torch.equal(was, now) for was, now in zip(encoder, vae.encoder.parameters(), strict=True))
    assert not all(torch.equal(was, now) for was, now in zip(decoder, vae.decoder.parameters(), strict=True))
    assert vae.config.latents_std[0] != 1 and not vae.training


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


@pytest.mark.slow
def test_sixteen_items_by_heart(tmp_path: Path, one_thread) -> None:
    """Every caption to the letter, every picture judged identical, its background too."""
    model = new_twin(0)
    train_latents(model.vae, tmp_path / "latents.pt", 0, DECODER)

    def loss(step: int) -> torch.Tensor:
        rng = random.Random(f"joint/{step}")
        drawings, captions = collate(model, DRAWINGS, rng, 0.0), collate(model, rng.sample(CAPTIONS, 2), rng)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return joint_loss(model, drawings) + joint_loss(model, captions)

    fit("twin", joint_parts(model.network).train(), loss, JOINT, tmp_path / "joint.pt", 18)
    model.network.eval()

    settings = replace(model.defaults("image"), guidance=1.0)
    drawn = model.respond(ITEMS, "image", settings)
    verdicts = [judge(r.image, scene, background=True) for r, scene in zip(drawn, SCENES, strict=True)]
    assert [v.wrong for v in verdicts if not v.exact] == []
    asked = [Item(f"caption-{k}", "", REQUEST, render(scene)) for k, scene in enumerate(SCENES)]
    assert [r.text for r in model.respond(asked, "text", model.defaults("text"))] == [made.response for made in CAPTIONS]

    # The prompt is what decides: the first item's noise under another prompt gives the other's picture.
    [other] = model.respond([Item(ITEMS[0].id, "", ITEMS[1].prompt)], "image", settings)
    assert judge(other.image, SCENES[1], background=True).exact
