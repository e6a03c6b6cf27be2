"""A Show-o twin learns sixteen Tabletop items by heart, in both tasks, which takes right masks, positions, templates and sampling."""

from __future__ import annotations

import random

import pytest
import torch

from unisonde.data.item import Item
from unisonde.data.tabletop import grammar, judge, render
from unisonde.data.tabletop.scene import Scene, Thing
from unisonde.models.parts.text import pad
from unisonde.models.showo import Drawing
from unisonde.train.image_codes import patch_codes, pixels_of
from unisonde.train.loop import Schedule, fit
from unisonde.train.showo import code_loss, code_names, codes_of, collate, covers, joint_loss, new_twin, train_codes
from unisonde.train.tabletop_batches import Example, example

from .sixteen import CAPTIONS, DRAWINGS, ITEMS, REQUEST, SCENES


def test_every_patch_has_a_code_of_its_own() -> None:
    names = code_names(11)
    assert len(names) == len(patch_codes()) == len(names.unique()) and names.min() >= 0 and names.max() < 2048
    with pytest.raises(ValueError, match=r"takes 2 \+ 3 \+ 6 bits, there are 10"):
        code_names(10)


def test_codes_say_background_colour_and_cover() -> None:
    """Two pictures that differ in their colour alone differ in the colour's signs alone, and so for the background."""

    def codes(shape: str, colour: str, background: str) -> torch.Tensor:
        return codes_of([Scene((Thing(0, 0, shape, colour, "small"),), background)], 11)[0]

    red, blue, black = codes("ring", "red", "grey"), codes("ring", "blue", "grey"), codes("ring", "red", "black")
    drawn = red % 64 != covers()[1][0]
    assert drawn.sum() == 4
    assert torch.equal(red % 64, blue % 64) and torch.equal(red // 512, blue // 512) and (red != blue)[drawn].all()
    assert torch.equal(red % 512, black % 512) and (red // 512 != black // 512).all()


def test_like_covers_have_like_numbers() -> None:
    """The first sign halves the covers: two of one half are nearer to each other than two of different halves."""
    shares, numbers = covers()
    assert len(numbers.unique()) == len(shares) and numbers.max() < 64
    high = numbers >= 32
    distance = torch.cdist(shares, shares)
    assert (distance[high][:, high].mean() + distance[~high][:, ~high].mean()) / 2 < 0.9 * distance[high][:, ~high].mean()


def test_batches_are_what_the_model_sees_in_use() -> None:
    model = new_twin(0)
    rng = random.Random(0)
    for kind in ("draw", "infer", "caption", "answer"):
        made = [example(rng, kind) for _ in range(3)]
        batch = collate(model, made, rng, unconditional=0.0)
        item = Item("a", "", made[0].prompt, render(made[0].scene) if kind in ("caption", "answer") else None)
        asked = model.encode(item, "image" if kind == "draw" else "text", 96)
        assert batch.prompts[0].ids == asked.ids and batch.prompts[0].everywhere == asked.everywhere
        if batch.responses is not None:
            assert batch.responses[0][-1] == model.eos_id
            assert model.tokenizer.decode(batch.responses[0][:-1]) == made[0].response
        loss = joint_loss(model, batch)
        assert loss.ndim == 0 and 4 < loss < 12  # about the logarithm of 2048 codes, or of 2163 tokens
    unconditional = collate(model, [example(rng, "draw")], rng, unconditional=1.0)
    assert len(unconditional.prompts[0].ids) == 3


def test_the_loss_sees_masked_codes_alone() -> None:
    """What is drawn right where it is not masked does not help, and hidden codes do not leak."""
    model = new_twin(0)
    batch = collate(model, [Example("draw", ITEMS[0].prompt, SCENES[0], None)], random.Random(1), 0.0)
    assert batch.codes is not None and batch.masked is not None and 0 < batch.masked.sum() < 64
    changed = torch.where(batch.masked, (batch.codes + 1) % 2048, batch.codes)
    with torch.inference_mode():
        drawing = Drawing(model.network, *pad([p.ids for p in batch.prompts], model.pad_id, "right"))
        drawing.read_prompts()
        assert torch.equal(drawing.step(batch.codes, batch.masked), drawing.step(changed, batch.masked))


def test_the_image_tokenizer_trains_on_crowds(tmp_path) -> None:
    model = new_twin(0)
    before = [p.clone() for p in model.image_codes.parameters()]
    train_codes(model.image_codes, tmp_path / "codes.pt", 0, Schedule(2, 1e-3, 1))
    assert any(not torch.equal(a, b) for a, b in zip(before, model.image_codes.parameters(), strict=True))
    assert not model.image_codes.training


@pytest.mark.slow
def test_sixteen_items_by_heart(tmp_path, one_thread) -> None:
    model = new_twin(0)
    count = sum(p.numel() for p in model.network.parameters()) + sum(p.numel() for p in model.image_codes.parameters())
    assert 1e6 < count < 4e6

    def codes_step(step: int) -> torch.Tensor:
        return code_loss(model.image_codes, SCENES[4 * (step % 4) :][:4])

    fit("image codes", model.image_codes.train(), codes_step, Schedule(800, 2e-3, 10, weight_decay=0.0), tmp_path / "codes.pt", 4)
    model.image_codes.eval()
    with torch.inference_mode():
        assert torch.equal(model.image_codes.encode(pixels_of(SCENES)), codes_of(SCENES, 11))

    def joint_step(step: int) -> torch.Tensor:
        rng = random.Random(f"joint/{step}")
        drawn, written = (collate(model, rng.sample(of, count), rng) for of, count in ((DRAWINGS, 6), (CAPTIONS, 2)))
        return joint_loss(model, drawn) + joint_loss(model, written)

    fit("twin", model.network.train(), joint_step, Schedule(480, 2e-3, 10, matrix_rate=0.02), tmp_path / "joint.pt", 8)
    model.network.eval()

    drawn = model.respond(ITEMS, "image", model.defaults("image"))
    verdicts = [judge(response.image, scene) for response, scene in zip(drawn, SCENES, strict=True)]
    assert [verdict.wrong for verdict in verdicts if not verdict.exact] == []
    shown = [Item(f"caption-{k}", "", REQUEST, render(scene)) for k, scene in enumerate(SCENES)]
    written = model.respond(shown, "text", model.defaults("text"))
    assert [response.text for response in written] == [grammar.describe(scene) for scene in SCENES]
