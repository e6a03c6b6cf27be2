"""An Emu3 twin learns sixteen Tabletop items by heart, in both tasks, which takes right templates, codes, marks and sampling."""

from __future__ import annotations

import random

import pytest
import torch

from unisonde.data.item import Item
from unisonde.data.tabletop import grammar, judge, render
from unisonde.models.emu3 import END_ROW, code_word
from unisonde.train.emu3 import (
    FIGURE,
    code_loss,
    collate,
    drawn,
    joint_loss,
    joint_parts,
    latents,
    new_twin,
    settle,
    train_codes,
)
from unisonde.train.image_codes import patch_codes, pixels_of
from unisonde.train.loop import Schedule, fit
from unisonde.train.tabletop_batches import Example, example

from .sixteen import CAPTIONS, DRAWINGS, ITEMS, REQUEST, SCENES


def test_the_twin_is_small_and_knows_every_patch() -> None:
    model = new_twin(0)
    assert 1e6 < sum(p.numel() for p in model.network.parameters()) < 4e6
    assert len(model.code_ids) == len(patch_codes()) and (model.side, model.codes) == (8, 64)


@torch.inference_mode()
def test_what_is_trained_is_what_is_used() -> None:
    """The tokenizer as the losses run it, against the encoder and decoder of `transformers`."""
    model = new_twin(0)
    vq, pixels, codes = model.network.model.vqmodel, pixels_of(SCENES[:3]), patch_codes().of(SCENES[:3])
    used = vq.encode(pixels, torch.tensor([[32, 32]] * 3)).image_tokens
    book = vq.quantize.embedding.weight
    assert torch.equal(torch.cdist(latents(vq, pixels), book.expand(3, -1, -1)).argmin(-1), torch.stack(used).flatten(1))
    assert (drawn(vq, book[codes]) - model.pixels_of(codes.view(3, 8, 8))).abs().max() < 1e-5
    # A picture file goes the same way.
    assert torch.equal(model.codes_of(render(SCENES[0])), used[0])


def test_batches_are_what_the_model_sees_in_use() -> None:
    model = new_twin(0)
    rng = random.Random(0)
    for kind in ("draw", "infer", "caption", "answer"):
        made = [example(rng, kind) for _ in range(3)]
        batch = collate(model, made, rng, unconditional=0.0)
        codes = patch_codes().of([made[0].scene]).view(8, 8)
        item = Item("a", "", made[0].prompt)
        text = "".join(
            s.text
            for s in model.segments(item, "image" if kind == "draw" else "text", codes if kind in ("caption", "answer") else None)
        )
        start = len(asked(model, text))
        row = batch.ids[0].tolist()
        assert row[:start] == asked(model, text)
        learnt = batch.next_token[0] != -100
        following = [token for token in batch.next_token[0].tolist() if token != -100]
        assert torch.equal(batch.ids[0].roll(-1)[learnt], batch.next_token[0][learnt])
        if kind == "draw":
            assert following == model.code_ids[codes.flatten()].tolist()
            assert set(batch.weights[0][learnt].tolist()) <= {1.0, FIGURE}
        else:
            assert following[-1] == model.eos_id and model.tokenizer.decode(following[:-1]) == made[0].response
        loss = joint_loss(model, batch)
        assert loss.ndim == 0 and 4 < loss < 10  # about the logarithm of 772 words
    unconditional = collate(model, [example(rng, "draw")], rng, unconditional=1.0)
    assert unconditional.ids[0].tolist()[:4] == model.unconditional()


def asked(model, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_pictures_of_captions_are_the_codes_of_their_scenes() -> None:
    model = new_twin(0)
    batch = collate(model, [Example("caption", REQUEST, SCENES[0], grammar.describe(SCENES[0]))], random.Random(0))
    words = model.tokenizer.convert_ids_to_tokens(batch.ids[0].tolist())
    rows = patch_codes().of(SCENES[:1]).view(8, 8).tolist()
    assert words[6 : 6 + 72] == [word for row in rows for word in [*map(code_word, row), END_ROW]]


def test_the_image_tokenizer_trains_on_crowds(tmp_path) -> None:
    vq = new_twin(0).network.model.vqmodel
    before = {name: p.clone() for name, p in vq.state_dict().items()}
    train_codes(vq, tmp_path / "codes.pt", 0, Schedule(2, 1e-3, 1))
    changed = {name for name, p in vq.state_dict().items() if not torch.equal(p, before[name])}
    assert changed and not any("running" in name for name in changed) and not vq.training
    assert torch.allclose(vq.quantize.embedding.weight.norm(dim=-1), torch.ones(len(patch_codes())))


@pytest.mark.slow
def test_sixteen_items_by_heart(tmp_path, one_thread) -> None:
    model = new_twin(0)
    vq = model.network.model.vqmodel

    def codes_step(step: int) -> torch.Tensor:
        return code_loss(vq, SCENES[4 * (step % 4) :][:4])

    fit("image codes", vq, codes_step, Schedule(400, 2e-3, 10, weight_decay=0.0), tmp_path / "codes.pt", 4)
    settle(vq)
    codes = patch_codes().of(SCENES).view(-1, 8, 8)
    assert torch.equal(torch.stack([model.codes_of(render(scene)) for scene in SCENES]), codes)
    assert all(judge(picture, scene).exact for picture, scene in zip(model.decode(codes), SCENES, strict=True))

    def joint_step(step: int) -> torch.Tensor:
        rng = random.Random(f"joint/{step}")
        draws, written = (collate(model, rng.sample(of, count), rng) for of, count in ((DRAWINGS, 8), (CAPTIONS, 4)))
        return joint_loss(model, draws) + joint_loss(model, written)

    fit("twin", joint_parts(model).train(), joint_step, Schedule(160, 2e-3, 10, matrix_rate=0.02), tmp_path / "joint.pt", 12)
    model.network.eval()

    pictures = model.respond(ITEMS, "image", model.defaults("image"))
    verdicts = [judge(r.image, scene, background=True) for r, scene in zip(pictures, SCENES, strict=True)]
    assert [v.wrong for v in verdicts if not v.exact] == []
    shown = [Item(f"caption-{k}", "", REQUEST, render(scene)) for k, scene in enumerate(SCENES)]
    texts = [response.text for response in model.respond(shown, "text", model.defaults("text"))]
    assert texts == [grammar.describe(scene) for scene in SCENES]
    # It can fail: another prompt is another picture, and another picture another caption.
    assert not any(judge(r.image, SCENES[k - 1], background=True).exact for k, r in enumerate(pictures))
    assert len(set(texts)) == len({grammar.describe(scene) for scene in SCENES}) > 8
