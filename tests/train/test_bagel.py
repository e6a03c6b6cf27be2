"""A BAGEL twin learns sixteen Tabletop items by heart in both tasks: right masks, places, experts, templates and sampling."""

from __future__ import annotations

import random

import pytest
import torch

from unisonde.data.item import Item
from unisonde.data.tabletop import grammar, judge, render
from unisonde.models.bagel import BEGIN_IMAGE, END_IMAGE, Encoded, normals
from unisonde.models.parts import flux_vae
from unisonde.models.parts.bagel_flow import Canvas, Context
from unisonde.train.bagel import (
    collate,
    joint_loss,
    joint_parts,
    measure,
    new_twin,
    train_autoencoder,
    velocity_of,
)
from unisonde.train.image_codes import crowd, pixels_of
from unisonde.train.loop import Schedule, fit
from unisonde.train.tabletop_batches import example

from .sixteen import CAPTIONS, DRAWINGS, ITEMS, REQUEST, SCENES


def test_a_new_twin() -> None:
    model = new_twin(0)
    count = sum(p.numel() for part in (model.network, model.vae) for p in part.parameters())
    assert 1e6 < count < 4e6
    trained = sum(p.numel() for p in joint_parts(model.network).parameters())
    assert trained == sum(p.numel() for p in model.network.parameters() if p.requires_grad)
    for name, weight in model.network.named_parameters():
        if "_moe_gen" in name:  # the experts begin alike
            assert torch.equal(weight, model.network.get_parameter(name.replace("_moe_gen", "")))
    [response] = model.respond(ITEMS[:1], "image", model.settings("image", steps=2))
    assert response.image.size == (32, 32)


def test_batches_are_what_the_model_sees_in_use() -> None:
    model = new_twin(0)
    rng = random.Random(0)
    for kind in ("draw", "infer", "caption", "answer"):
        made = [example(rng, kind) for _ in range(3)]
        batch = collate(model, made, rng, unconditional=0.0)
        item = Item("a", "", made[0].prompt, render(made[0].scene) if kind in ("caption", "answer") else None)
        asked = model.encode(item, "image" if kind == "draw" else "text", 96)
        assert batch.prompts[0].ids == asked.ids and batch.prompts[0].spans == asked.spans
        if batch.responses is not None:
            assert batch.responses[0][-1] == model.marks.eos
            assert model.tokenizer.decode(batch.responses[0][:-1]) == made[0].response
        if batch.pixels is not None:
            assert asked.pixels is not None and torch.equal(batch.pixels[0], asked.pixels)
        loss = joint_loss(model, batch)
        assert loss.ndim == 0 and 1 < loss < 8
    unconditional = collate(model, [example(rng, "draw")], rng, unconditional=1.0)
    assert unconditional.prompts == [Encoded([], ())]
    assert BEGIN_IMAGE in model.tokenizer.get_vocab() and END_IMAGE in model.tokenizer.get_vocab()


@torch.no_grad()
def test_what_is_learnt_is_what_is_drawn_with() -> None:
    """One pass over prompts and pictures gives the velocities of the sampler, with a prompt and without one."""
    model = new_twin(0)
    torch.nn.init.normal_(model.network.llm2vae.weight, 0, 0.1, generator=torch.Generator().manual_seed(0))
    prompts = [model.encode(item, "image") for item in ITEMS[:2]]
    latents = normals([1, 2], (64, 64))
    canvas = Canvas(model.network, model.marks.begin_image, model.marks.end_image, model.grid)
    t = torch.tensor(0.7)
    empty = velocity_of(model, [Encoded([], ())] * 2, latents, t.expand(2))
    assert torch.allclose(empty, canvas.velocity(latents, t, Context.nothing(2, torch.device("cpu"))), atol=1e-5)
    entered = []
    hook = model.network.language_model.model.layers[0].register_forward_hook(
        lambda module, args, out: entered.append(args[0].shape)
    )
    told = velocity_of(model, prompts, latents, t.expand(2))
    hook.remove()
    assert entered[0][1] == max(len(p.ids) for p in prompts) + 66 and not torch.allclose(told, empty, atol=1e-3)


def test_an_untrained_autoencoder_is_nearly_linear() -> None:
    model = new_twin(0)
    pixels = pixels_of([crowd(random.Random(k)) for k in range(24)])
    with torch.no_grad():
        measure(model.vae, pixels)
        latents = flux_vae.encode(model.vae, pixels)
        assert latents.std() == pytest.approx(1, abs=1e-3) and latents.mean() == pytest.approx(0, abs=1e-3)
        assert (flux_vae.decode(model.vae, latents) - pixels).abs().max() < 0.05


@pytest.mark.slow
def test_sixteen_items_by_heart(tmp_path, one_thread) -> None:
    model = new_twin(0)

    def scenes(rng: random.Random) -> list:
        return rng.sample(SCENES, 4)

    train_autoencoder(model, scenes, Schedule(250, 2e-3, 20, weight_decay=0.0), tmp_path / "autoencoder.pt")
    with torch.inference_mode():
        pictures = [model.decode(latents) for latents in flux_vae.encode(model.vae, pixels_of(SCENES))]
    assert all(judge(picture, scene).exact for picture, scene in zip(pictures, SCENES, strict=True))

    def joint_step(step: int) -> torch.Tensor:
        rng = random.Random(f"joint/{step}")
        drawn = joint_loss(model, collate(model, rng.sample(DRAWINGS, 12), rng))
        if step % 4:
            return drawn
        return drawn + joint_loss(model, collate(model, rng.sample(CAPTIONS, 8), rng))

    parts = joint_parts(model.network).train()
    fit("twin", parts, joint_step, Schedule(700, 2e-3, 20, matrix_rate=0.02), tmp_path / "joint.pt", 14)
    model.network.eval()

    drawn = model.respond(ITEMS, "image", model.defaults("image"))
    assert all(judge(response.image, scene).exact for response, scene in zip(drawn, SCENES, strict=True))
    shown = [Item(f"caption-{k}", "", REQUEST, render(scene)) for k, scene in enumerate(SCENES)]
    written = model.respond(shown, "text", model.defaults("text"))
    assert [response.text for response in written] == [grammar.describe(scene) for scene in SCENES]
