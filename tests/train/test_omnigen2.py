"""An OmniGen2 twin learns sixteen Tabletop items by heart in both tasks: right positions, templates, states handed over and sampling."""

from __future__ import annotations

import random

import pytest
import torch

from unisonde.data.item import Item
from unisonde.data.tabletop import grammar, judge, render
from unisonde.train.image_codes import crowd, pixels_of
from unisonde.train.loop import Schedule, fit
from unisonde.train.omnigen2 import collate, figures, joint_loss, joint_parts, latents_of, new_twin, new_vae, train_vae
from unisonde.train.tabletop_batches import Example, example

from .sixteen import CAPTIONS, DRAWINGS, ITEMS, REQUEST, SCENES


def test_the_autoencoder_begins_as_the_identity() -> None:
    vae = new_vae(0)
    rng = random.Random(0)
    pixels = pixels_of([crowd(rng) for _ in range(8)])
    with torch.inference_mode():
        latents = vae.encode(pixels).latent_dist.mode()
        assert latents.shape == (8, 3, 32, 32) and (latents - pixels).abs().max() < 0.01
        assert (vae.decode(latents).sample - pixels).abs().max() < 0.01


def test_the_decoder_trains_on_crowds_and_latents_are_measured(tmp_path) -> None:
    vae = new_vae(0)
    before = {name: weight.clone() for name, weight in vae.named_parameters()}
    train_vae(vae, tmp_path / "vae.pt", 0, Schedule(2, 1e-3, 1))
    changed = [name for name, weight in vae.named_parameters() if not torch.equal(weight, before[name])]
    assert changed and all(name.startswith("decoder.") for name in changed) and not vae.training
    rng = random.Random(1)
    latents = latents_of(vae, pixels_of([crowd(rng) for _ in range(256)]))
    assert abs(float(latents.mean())) < 0.2 and float(latents.std()) == pytest.approx(1, abs=0.1)


def test_tokens_of_figures_count_more() -> None:
    [item] = ITEMS[:1]
    thing = SCENES[0].things[0]  # one, small: in a cell of 8 x 8 pixels
    pixels = pixels_of(SCENES[:1])
    drawn = figures(pixels)[0, 0]
    rows, columns = (drawn.any(axis).nonzero()[:, 0] for axis in (1, 0))
    assert (len(rows), len(columns)) == (6, 6) and int(rows[0]) == 12 * thing.row + 1 and int(columns[0]) == 12 * thing.column + 1
    batch = collate(new_twin(0), [Example("draw", item.prompt, SCENES[0], None)], random.Random(0), 0.0)
    assert batch.weights is not None and batch.weights.shape == (1, 1, 32, 32)
    cell = batch.weights[0, 0, 12 * thing.row :, 12 * thing.column :][:8, :8]
    assert (cell == 8).all() and batch.weights.sum() == 32 * 32 + 7 * 64


def test_every_parameter_learns() -> None:
    """All but those of reference images; matrices of all transformer layers are known as such."""
    model = new_twin(0)
    parts = joint_parts(model.network)
    assert {id(p) for p in parts.parameters()} == {id(p) for p in model.network.parameters()}
    with torch.no_grad():  # from here on the time says something, and what is said goes through it
        for name, weight in model.network.transformer.named_parameters():
            if "norm1.linear.weight" in name or "norm_out.linear_1.weight" in name:
                weight.normal_(std=0.05)
    rng = random.Random(0)
    total = sum(joint_loss(model, collate(model, [example(rng, kind)] * 2, rng, 0.0)) for kind in ("draw", "infer", "answer"))
    total.backward()
    still = [name for name, p in model.network.named_parameters() if p.grad is None or not p.grad.any()]
    # A key's bias adds the same to all logits of a query, which changes nothing.
    assert [n for n in still if "ref_image" not in n and "image_index" not in n and not n.endswith("k_proj.bias")] == []


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


@pytest.mark.slow
def test_sixteen_items_by_heart(tmp_path, one_thread) -> None:
    model = new_twin(0)
    assert 1e6 < sum(p.numel() for network in model.networks for p in network.parameters()) < 4e6
    train_vae(model.vae, tmp_path / "vae.pt", 0)
    latents = latents_of(model.vae, pixels_of(SCENES))
    shaken = latents + 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    assert all(judge(picture, scene).exact for picture, scene in zip(model.decode(shaken), SCENES, strict=True))

    def joint_step(step: int) -> torch.Tensor:
        rng = random.Random(f"joint/{step}")
        drawn, written = (collate(model, rng.sample(of, count), rng) for of, count in ((DRAWINGS, 12), (CAPTIONS, 4)))
        return joint_loss(model, drawn) + joint_loss(model, written)

    parts = joint_parts(model.network).train()
    fit("twin", parts, joint_step, Schedule(1600, 2e-3, 20, matrix_rate=0.02), tmp_path / "joint.pt", 16)
    model.network.eval()

    drawn = model.respond(ITEMS, "image", model.defaults("image"))
    verdicts = [judge(response.image, scene, background=True) for response, scene in zip(drawn, SCENES, strict=True)]
    assert [v.wrong for v in verdicts if not v.exact] == []
    shown = [Item(f"caption-{k}", "", REQUEST, render(scene)) for k, scene in enumerate(SCENES)]
    written = model.respond(shown, "text", model.defaults("text"))
    assert [response.text for response in written] == [grammar.describe(scene) for scene in SCENES]
    # It can fail: of another prompt another picture is drawn.
    [other] = model.respond(ITEMS[1:2], "image", model.defaults("image"))
    assert not judge(other.image, SCENES[0]).exact
