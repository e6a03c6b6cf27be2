"""How a Harmon twin learns: its autoencoder, what it is shown, and what its losses count."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from unisonde.data.item import Item
from unisonde.data.tabletop import grammar, judge, render
from unisonde.data.tabletop.scene import Scene, Thing
from unisonde.models.harmon import Harmon
from unisonde.models.parts import kl16
from unisonde.models.parts.harmon_network import Drawing
from unisonde.models.parts.text import pad
from unisonde.models.parts.token_diffusion import TRAINED_STEPS, NoiseSchedule
from unisonde.train.harmon import (
    FIGURE,
    LOUDEST,
    OFF,
    REPEATS,
    collate,
    decoder_loss,
    denoising_loss,
    figures,
    joint_loss,
    joint_parts,
    new_twin,
    new_vae,
    train_latents,
)
from unisonde.train.image_codes import crowd, pixels_of
from unisonde.train.loop import Schedule, fit
from unisonde.train.tabletop_batches import Example, example

from .sixteen import CAPTIONS, DRAWINGS, ITEMS, REQUEST, SCENES


@pytest.fixture(scope="module")
def model() -> Harmon:
    """Untrained; tests leave it as it is."""
    return new_twin(0)


def pictures(seed: int, count: int) -> torch.Tensor:
    rng = random.Random(seed)
    return pixels_of([crowd(rng) for _ in range(count)])


@torch.no_grad()
def test_an_untrained_autoencoder_passes_pictures_on() -> None:
    pixels = pictures(0, 4)
    vae = new_vae(0)
    latents = kl16.encode(vae, pixels)
    assert latents.shape == pixels.shape and (latents - pixels).abs().max() < 0.02
    assert (kl16.decode(vae, latents) - pixels).abs().max() < 0.02


def test_the_autoencoder_is_scaled_and_its_decoder_trains(tmp_path) -> None:
    vae = new_vae(0)
    before = {name: p.clone() for name, p in vae.named_parameters()}
    shown = pictures(1, 4)
    train_latents(vae, tmp_path / "latents.pt", 0, Schedule(200, 2e-3, 20, weight_decay=0.0), lambda rng: shown)
    changed = {name.partition(".")[0] for name, p in vae.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"decoder", "post_quant_conv"} and not vae.training
    with torch.no_grad():
        assert float(kl16.encode(vae, shown).std()) == pytest.approx(1, abs=1e-4)
        trained, untrained = decoder_loss(vae, shown, torch.Generator().manual_seed(0)), new_vae(0)
        untrained.register_to_config(scaling_factor=vae.config.scaling_factor)
        assert trained < 0.8 * decoder_loss(untrained, shown, torch.Generator().manual_seed(0))


def test_figures_are_what_is_off_the_background(model) -> None:
    scene = Scene((Thing(0, 0, "square", "red", "large"),), "grey")
    pixels = pixels_of([scene]).flatten(2).transpose(1, 2)
    assert figures(pixels).unflatten(1, (32, 32))[0].nonzero().tolist() == [[y, x] for y in range(8) for x in range(8)]
    with torch.no_grad():
        tokens = model.tokens_of(pixels_of([scene]))
    assert figures(tokens).nonzero()[:, 1].tolist() == [0, 1, 8, 9]


def test_batches_are_what_the_model_sees_in_use(model) -> None:
    rng = random.Random(0)
    for kind in ("draw", "infer", "caption", "answer"):
        made = [example(rng, kind) for _ in range(3)]
        batch = collate(model, made, rng, unconditional=0.0)
        item = Item("a", "", made[0].prompt, render(made[0].scene) if kind in ("caption", "answer") else None)
        asked = model.encode(item, "image" if kind == "draw" else "text", 96)
        assert batch.prompts[0].ids == asked.ids and batch.prompts[0].picture == asked.picture
        if asked.pixels is not None:
            with torch.inference_mode():  # its channels carry a constant of 8, whose last float32 place is 1e-6
                assert torch.allclose(batch.tokens[:1], model.tokens_of(asked.pixels[None]), atol=5e-6)
        if batch.responses is not None:
            assert batch.responses[0][-1] == model.end_id
            assert model.tokenizer.decode(batch.responses[0][:-1]) == made[0].response
        loss = joint_loss(model, batch)
        assert loss.ndim == 0 and 0.5 < loss < 9
    unconditional = collate(model, [example(rng, "draw")], rng, unconditional=1.0)
    assert unconditional.prompts[0].ids == model.assemble(Item("", "", ""), "image").ids


def test_half_of_the_batches_have_the_prompt_alone(model) -> None:
    drawing = [Example("draw", ITEMS[0].prompt, SCENES[0], None)] * 2
    visible = torch.stack([collate(model, drawing, random.Random(k)).visible for k in range(200)])
    known = visible.sum(-1)
    assert torch.equal(known[:, 0], known[:, 1]) and known.max() < 64
    assert 80 < (known[:, 0] == 0).sum() < 120 and (known[:, 0] > 40).sum() > 10


@torch.inference_mode()
def test_the_loss_sees_hidden_tokens_alone(model) -> None:
    """What hidden tokens are does not leak into the vectors that they are drawn from."""
    drawing = [Example("draw", ITEMS[0].prompt, SCENES[0], None)]
    batch = next(b for b in (collate(model, drawing, random.Random(k), 0.0) for k in range(99)) if 20 < b.visible.sum() < 40)
    hidden = ~batch.visible
    assert len(batch.times) == len(batch.noise) == REPEATS * hidden.sum()
    assert 0.5 * OFF < (batch.near - batch.tokens).std() < 2 * OFF
    changed = torch.where(hidden[..., None], batch.near + 1, batch.near)
    vectors = []
    for near in (batch.near, changed):
        drawing = Drawing(model.network, *pad([p.ids for p in batch.prompts], model.end_id, "right"))
        drawing.read_prompts()
        vectors.append(drawing.vectors(near, batch.visible))
    assert torch.equal(*vectors)


@torch.no_grad()
def test_errors_count_as_they_show(model, monkeypatch) -> None:
    """In the token where there is more noise than token, in the noise where there is less; variances do not count."""
    head = model.network.mar.diffloss
    generator = torch.Generator().manual_seed(0)
    tokens, noise = torch.randn(2, 200, model.config.mar.channels, generator=generator)
    times = torch.randint(TRAINED_STEPS, (200,), generator=generator)

    def said(eps: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(head.net, "forward", lambda x, t, c: torch.cat([eps, torch.randn_like(eps)], -1))
        return denoising_loss(head, tokens, torch.zeros(200, model.config.mar.decoder_embed_dim), times, noise)

    assert torch.equal(said(noise), torch.zeros(200))
    kept = torch.from_numpy(NoiseSchedule.named(TRAINED_STEPS).kept)[times].float()[:, None]
    noisy = kept.sqrt() * tokens + (1 - kept).sqrt() * noise
    made = (noisy - (1 - kept).sqrt() * (noise + 0.1)) / kept.sqrt()  # the token that goes with such noise
    off = (made - tokens).square().mean(-1)
    inside = (off > 0.01) & (off < 0.01 * LOUDEST)
    assert inside.sum() > 50 and torch.allclose(said(noise + 0.1)[inside], off[inside], rtol=1e-3)
    assert torch.allclose(said(noise + 0.1), off.clamp(0.01, 0.01 * LOUDEST), rtol=1e-2)


@torch.inference_mode()
def test_an_untrained_head_passes_noise_on_and_takes_the_least_variance(model) -> None:
    net, channels = model.network.mar.diffloss.net, model.config.mar.channels
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, channels, generator=generator)
    vectors = torch.randn(200, model.config.mar.decoder_embed_dim, generator=generator)
    eps, share = net(noise, torch.arange(0, 1000, 5), vectors).chunk(2, -1)
    assert (eps - noise).abs().mean() < 0.1 and torch.equal(share, torch.full_like(share, -1.0))


@torch.no_grad()
def test_the_loss_of_a_drawing_the_long_way(model) -> None:
    """Token by token: hidden ones alone, each at its own steps, those of figures weighted."""
    batch = collate(
        model, [Example("draw", i.prompt, s, None) for i, s in zip(ITEMS[:2], SCENES[:2], strict=True)], random.Random(1), 0.0
    )
    drawing = Drawing(model.network, *pad([p.ids for p in batch.prompts], model.end_id, "right"))
    drawing.read_prompts()
    vectors = drawing.vectors(batch.near, batch.visible)
    hidden = (~batch.visible).nonzero().tolist()
    total = count = 0.0
    for k, (step, noise) in enumerate(zip(batch.times, batch.noise, strict=True)):
        row, place = hidden[k % len(hidden)]
        weight = FIGURE if figures(batch.tokens)[row, place] else 1.0
        one = (batch.tokens[row, place][None], vectors[row, place][None], step[None], noise[None])
        total += weight * float(denoising_loss(model.network.mar.diffloss, *one))
        count += weight
    assert float(joint_loss(model, batch)) == pytest.approx(total / count, rel=1e-4)
    # An untrained guess is zero, and off by the tokens themselves.
    weight = torch.where(figures(batch.tokens), FIGURE, 1.0)[~batch.visible]
    off = (batch.tokens.square().mean(-1)[~batch.visible] * weight).sum() / weight.sum()
    guessed = joint_loss(model, batch, joint_parts(model.network)["guess"])
    assert float(guessed) == pytest.approx(total / count + float(off), rel=1e-4)


def test_every_parameter_learns() -> None:
    """After a few steps, for what begins at zero hides what is behind it at first."""
    model = new_twin(0)
    rng = random.Random(0)
    made = {kind: [example(rng, kind) for _ in range(3)] for kind in ("draw", "caption")}
    before = {name: p.detach().clone() for name, p in model.network.named_parameters()}

    def loss(step: int) -> torch.Tensor:
        return sum(joint_loss(model, collate(model, examples, random.Random(step), 0.3)) for examples in made.values())

    optimizer = torch.optim.Adam(model.network.parameters(), 3e-4)
    losses = []
    for step in range(4):
        optimizer.zero_grad()
        losses.append(loss(step % 2))
        losses[-1].backward()
        optimizer.step()
    assert losses[2] + losses[3] < losses[0] + losses[1]
    still = [name for name, p in model.network.named_parameters() if torch.equal(p, before[name])]
    # A key's bias adds the same to all attention logits of a query, which changes nothing.
    assert [name for name in still if not name.endswith("k_proj.bias")] == []
    parts = joint_parts(model.network)
    assert {id(p) for p in parts.parameters()} == {id(p) for m in (model.network, parts["guess"]) for p in m.parameters()}
    assert all(p.grad is None for p in model.vae.parameters())


@pytest.mark.slow
def test_sixteen_items_by_heart(tmp_path, one_thread) -> None:
    model = new_twin(0)
    assert 1e6 < sum(p.numel() for network in model.networks for p in network.parameters()) < 4e6

    def shown(rng: random.Random) -> torch.Tensor:
        return pixels_of(rng.sample(SCENES, 4))

    train_latents(model.vae, tmp_path / "latents.pt", 0, Schedule(250, 2e-3, 20, weight_decay=0.0), shown)
    with torch.inference_mode():
        again = model.decode(model.tokens_of(pixels_of(SCENES)))
    assert all(judge(picture, scene, background=True).exact for picture, scene in zip(again, SCENES, strict=True))

    parts = joint_parts(model.network).train()

    def joint_step(step: int) -> torch.Tensor:
        rng = random.Random(f"joint/{step}")
        drawn = joint_loss(model, collate(model, rng.sample(DRAWINGS, 8), rng, 0.06), parts["guess"])
        if step % 2:
            return drawn
        return drawn + joint_loss(model, collate(model, rng.sample(CAPTIONS, 4), rng))

    fit("twin", parts, joint_step, Schedule(900, 4e-4, 10, matrix_rate=0.02), tmp_path / "joint.pt", 10)
    model.network.eval()

    # In two steps: what tokens are with most of the picture in sight is learnt last, and many steps end so.
    settings = replace(model.defaults("image"), guidance=1.0, steps=2)
    drawn = model.respond(ITEMS, "image", settings)
    verdicts = [judge(response.image, scene, background=True) for response, scene in zip(drawn, SCENES, strict=True)]
    assert [verdict.wrong for verdict in verdicts if not verdict.exact] == []
    pictures = [Item(f"caption-{k}", "", REQUEST, render(scene)) for k, scene in enumerate(SCENES)]
    written = model.respond(pictures, "text", model.defaults("text"))
    assert [response.text for response in written] == [grammar.describe(scene) for scene in SCENES]
    # It can fail: of another prompt it draws something else.
    [other] = model.respond(ITEMS[1:2], "image", settings)
    assert not judge(other.image, SCENES[0]).exact
