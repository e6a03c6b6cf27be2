"""The JanusFlow twin: what it is shown, its losses, its folder, and that it learns sixteen items by heart in both tasks."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import unisonde
from unisonde.data.item import Item
from unisonde.data.tabletop import grammar, judge, render
from unisonde.models.base import Generation
from unisonde.models.janusflow import JanusFlow
from unisonde.models.parts.flow_llama import Flow
from unisonde.train.image_codes import crowd, pixels_of
from unisonde.train.janusflow import (
    Drawing,
    Writing,
    autoencoder_loss,
    collate,
    export,
    joint_loss,
    latents_of,
    new_twin,
    train_autoencoder,
    velocity_of,
)
from unisonde.train.loop import Schedule, fit
from unisonde.train.tabletop_batches import Example, example

AUTOENCODER = Schedule(steps=400, rate=4e-3, warmup=20, weight_decay=0.0)
JOINT = Schedule(steps=600, rate=2e-3, warmup=20, weight_decay=0.0, matrix_rate=0.02)


@pytest.fixture(scope="module")
def model() -> JanusFlow:
    return new_twin(0)


def made(kind: str, count: int, seed: int = 3) -> list[Example]:
    rng = random.Random(seed)
    return [example(rng, kind) for _ in range(count)]  # type: ignore[arg-type]


def test_a_twin_is_small(model) -> None:
    parameters = sum(p.numel() for part in (model.network, model.autoencoder) for p in part.parameters())
    assert 1e6 < parameters < 4e6


def test_prompts_are_tokenised_as_in_use(model) -> None:
    for kind, task in (("draw", "image"), ("infer", "text"), ("answer", "text")):
        [one] = made(kind, 1)
        batch = collate(model, [one], random.Random(0), 0.0)
        encoded = model.encode(Item("x", "", one.prompt, render(one.scene) if kind == "answer" else None), task, 96)
        if isinstance(batch, Drawing):
            assert batch.prompts.ids[0].tolist() == encoded.ids and batch.prompts.mask.all()
            continue
        assert batch.ids[0, : len(encoded.ids)].tolist() == encoded.ids
        assert (batch.pixels is None) == (encoded.pixels is None)
        if encoded.pixels is not None:
            assert torch.allclose(encoded.pixels, batch.pixels[0], atol=1e-6)
            assert batch.where.sum() == 65


def test_labels_are_the_responses(model) -> None:
    batch = collate(model, made("caption", 4), random.Random(0), 0.0)
    assert isinstance(batch, Writing)
    for row, one in enumerate(made("caption", 4)):
        positions = (batch.next_token[row] != -100).nonzero()[:, 0]
        labels = batch.next_token[row, positions]
        assert labels[-1] == model.eos_id and model.tokenizer.decode(labels[:-1]) == one.response
        assert torch.equal(batch.ids[row, positions + 1], labels)


def test_drawings_without_a_prompt_are_masked_as_guidance_masks_them(model) -> None:
    examples = made("draw", 6)
    none, all_ = (collate(model, examples, random.Random(0), share) for share in (0.0, 1.0))
    flow = Flow(model.network, [model.encode(Item("x", "", one.prompt), "image", 65).ids for one in examples], model.pad_id, 2.0)
    conditional, unconditional = (half for half in zip(*(t.chunk(2) for t in vars(flow.branches).values()), strict=True))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(vars(none.prompts).values(), conditional, strict=True))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(vars(all_.prompts).values(), unconditional, strict=True))
    some = collate(model, examples * 30, random.Random(0), 0.1, none.latents.repeat(30, 1, 1, 1))
    assert 5 < (some.prompts.mask.sum(1) == 1).sum() < 35


def test_the_velocity_of_training_is_that_of_sampling(model) -> None:
    """One pass over prompts and latents, against a prompt that was run before."""
    examples = made("draw", 3)
    batch = collate(model, examples, random.Random(0), 0.0)
    flow = Flow(model.network, [model.encode(Item("x", "", one.prompt), "image", 65).ids for one in examples], model.pad_id, 1.0)
    with torch.inference_mode():
        flow.read()
        sampled = flow.velocity(batch.noise, 0.3)
        trained = velocity_of(model.network, batch.prompts, batch.noise, torch.full((3,), 0.3))
    assert (sampled - trained).abs().max() < 1e-5 * max(1.0, float(sampled.abs().max()))


def test_the_losses_the_long_way(model) -> None:
    batch = collate(model, made("draw", 3), random.Random(0), 0.0)
    with torch.no_grad():
        total = 0.0
        for k in range(3):
            t = float(batch.times[k])
            z = (1 - t) * batch.noise[k] + t * batch.latents[k]
            row = replace(batch.prompts, **{n: v[k : k + 1] for n, v in vars(batch.prompts).items()})
            error = velocity_of(model.network, row, z[None], batch.times[k : k + 1])[0] - (batch.latents[k] - batch.noise[k])
            total += float(error.square().mean()) / 3
        assert float(joint_loss(model, batch)) == pytest.approx(total, rel=1e-4)
        [one] = made("answer", 1)
        batch = collate(model, [one], random.Random(0), 0.0)
        encoded = model.encode(Item("x", "", one.prompt, render(one.scene)), "text", 96)
        response = [*model.tokenizer(one.response, add_special_tokens=False)["input_ids"], model.eos_id]
        states = model.read([encoded.ids + response], [encoded.spans], model.network.see(encoded.pixels[None]))[0]
        logits = model.network.language_model.lm_head(states[len(encoded.ids) - 1 : -1])
        expected = F.cross_entropy(logits, torch.tensor(response))
        assert float(joint_loss(model, batch)) == pytest.approx(float(expected), rel=1e-4)


def test_every_parameter_learns(model) -> None:
    network, autoencoder = model.network, model.autoencoder
    total = sum(joint_loss(model, collate(model, made(kind, 2), random.Random(0), 0.5)) for kind in ("draw", "infer", "answer"))
    total.backward()
    still = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # A key's bias adds the same to all attention logits of a query, which changes nothing.
    assert [name for name in still if not name.endswith("k_proj.bias")] == []
    network.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in autoencoder.parameters())


def test_the_folder_loads(model, tmp_path) -> None:
    export(model, tmp_path / "twin", {"seed": 0})
    loaded = unisonde.load(tmp_path / "twin")
    assert isinstance(loaded, JanusFlow) and loaded.system == "" and loaded.defaults("text").tokens == 96
    for part, tensors in (("network", model.network), ("autoencoder", model.autoencoder)):
        held = getattr(loaded, part).state_dict()
        assert all(torch.equal(held[name], tensor.half().float()) for name, tensor in tensors.state_dict().items())
    assert loaded.encode(Item("a", "", "a red ring"), "image", 65) == model.encode(Item("a", "", "a red ring"), "image", 65)


@pytest.mark.slow
def test_sixteen_items_by_heart(tmp_path: Path, one_thread) -> None:
    """Autoencoder, drawing and captioning from nothing: every picture judged identical, every caption exact."""
    model = new_twin(0)
    rng = random.Random(1)
    prompts = [grammar.prompt(rng, "train", "composition", 1 + k % 3) for k in range(16)]
    draws = [Example("draw", p.text, p.scene, None) for p in prompts]
    captions = [Example("caption", rng.choice(grammar.CAPTION_REQUESTS), p.scene, grammar.describe(p.scene)) for p in prompts]

    train_autoencoder(model, lambda rng: [crowd(rng) for _ in range(4)], AUTOENCODER, tmp_path / "autoencoder.pt")
    latents = latents_of(model, [p.scene for p in prompts])
    assert latents.std() == pytest.approx(1.0, abs=0.5)
    assert all(judge(picture, p.scene, background=True).exact for picture, p in zip(model.decode(latents), prompts, strict=True))

    def loss(step: int) -> torch.Tensor:
        rng = random.Random(f"joint/{step}")
        drawn, written = rng.sample(range(16), 16), rng.sample(range(16), 2)
        drawing = collate(model, [draws[k] for k in drawn], rng, 0.06, latents[drawn])
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return joint_loss(model, drawing) + joint_loss(model, collate(model, [captions[k] for k in written], rng, 0.0))

    # The middles of the U-ViT have matrices, too; `fit` knows the matrices of transformer layers by the name `layers`.
    middles = [half.mid_block.res_blocks for half in (model.network.vision_gen_enc_model, model.network.vision_gen_dec_model)]
    parts = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(middles), "network": model.network})
    fit("twin", parts.train(), loss, JOINT, tmp_path / "joint.pt", 18)
    model.network.eval()
    settings = replace(model.defaults("image"), guidance=1.2)
    drawn = model.respond([Item(str(k), "", p.text) for k, p in enumerate(prompts)], "image", settings)
    verdicts = [judge(r.image, p.scene, background=True) for r, p in zip(drawn, prompts, strict=True)]
    assert [v.wrong for v in verdicts if not v.exact] == []
    items = [Item(str(k), "", c.prompt, render(c.scene)) for k, c in enumerate(captions)]
    assert [r.text for r in model.respond(items, "text", model.defaults("text"))] == [c.response for c in captions]
    # It can fail: without its prompt the model draws something else.
    other = model.respond([Item("0", "", prompts[1].text)], "image", Generation(guidance=2.0, steps=30))
    assert not judge(other[0].image, prompts[0].scene, background=True).exact


def test_the_loss_of_the_autoencoder_falls(tmp_path) -> None:
    model = new_twin(0)
    scenes = [p.scene for p in (grammar.prompt(random.Random(k), "train", "composition", 2) for k in range(4))]
    before = float(autoencoder_loss(model.autoencoder, pixels_of(scenes), torch.Generator().manual_seed(0)).detach())
    train_autoencoder(model, lambda rng: scenes, Schedule(12, 2e-3, 2, weight_decay=0.0), tmp_path / "a.pt")
    after = float(autoencoder_loss(model.autoencoder, pixels_of(scenes), torch.Generator().manual_seed(0)).detach())
    assert after < 0.8 * before
    assert float(latents_of(model, scenes * 2).std()) == pytest.approx(1.0, abs=0.2)
