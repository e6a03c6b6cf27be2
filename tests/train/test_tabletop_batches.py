"""What a twin is shown: only training scenes, its own templates, and labels where a response is."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from unisonde.data.tabletop import grammar, render
from unisonde.data.tabletop.scene import BACKGROUNDS, HELD_OUT, SPLITS, Scene
from unisonde.models.janus_pro import BEGIN_IMAGE
from unisonde.train.image_codes import patch_codes, pixels_of
from unisonde.train.janus_pro import FIGURE, Recipe, collate, joint_loss, new_twin
from unisonde.train.tabletop_batches import KINDS, example


@pytest.fixture(scope="module")
def model():
    return new_twin(0)


@pytest.mark.parametrize("kind", KINDS)
def test_only_training_scenes_are_shown(kind) -> None:
    rng = random.Random(1)
    for _ in range(300):
        made = example(rng, kind)
        assert made.scene.split == "train"
        assert not any(f"{colour} {shape}" in f"{made.prompt} {made.response}" for shape, colour in HELD_OUT)


def test_the_vocabulary_holds_every_word_of_every_split(model) -> None:
    rng = random.Random(2)
    for split in SPLITS:
        for kind in KINDS:
            for _ in range(150):
                made = example(rng, kind, split)
                for text in (made.prompt, made.response or ""):
                    assert model.tokenizer.unk_token_id not in model.tokenizer(text)["input_ids"]


def test_texts_come_back_from_tokens(model) -> None:
    rng = random.Random(3)
    for _ in range(200):
        text = example(rng, "answer").response
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert model.tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_the_responses(model, kind) -> None:
    rng = random.Random(4)
    made = [example(rng, kind) for _ in range(5)]
    batch = collate(model, made, rng, 0.0)
    for row, one in enumerate(made):
        labels = batch.next_token[row][batch.next_token[row] != -100]
        first = int((batch.next_token[row] != -100).nonzero()[0])
        if kind == "draw":
            assert (labels == model.image_id).all() and len(labels) == 64
            assert batch.ids[row, first] == model.tokenizer.convert_tokens_to_ids(BEGIN_IMAGE)
        else:
            assert labels[-1] == model.eos_id and model.tokenizer.decode(labels[:-1]) == one.response
        # A label is the token that follows.
        positions = (batch.next_token[row] != -100).nonzero()[:, 0]
        assert torch.equal(batch.ids[row, positions + 1], batch.next_token[row, positions])


def test_prompts_are_tokenised_as_in_use(model) -> None:
    """What training shows before the response is what `encode` makes for `respond`."""
    from unisonde.data.item import Item

    rng = random.Random(5)
    for kind, task in (("draw", "image"), ("infer", "text"), ("answer", "text")):
        made = example(rng, kind)
        batch = collate(model, [made], rng, 0.0)
        item = Item("x", "", made.prompt, render(made.scene) if kind == "answer" else None)
        encoded = model.encode(item, task, 64)
        assert batch.ids[0, : len(encoded.ids)].tolist() == encoded.ids
        if encoded.pixels is not None:
            assert torch.equal(encoded.pixels, batch.pixels[0])


def test_dropping_the_prompt_keeps_its_ends(model) -> None:
    rng = random.Random(6)
    batch = collate(model, [example(rng, "draw")], rng, 1.0)
    first = int((batch.next_token[0] != -100).nonzero()[0])
    assert batch.ids[0, 0] == model.bos_id and (batch.ids[0, 1:first] == model.pad_id).all()


def is_plain(code: int, scene: Scene) -> bool:
    """Whether a code stands for a patch of nothing but the background."""
    return (patch_codes().patches[code].reshape(16, 3) == BACKGROUNDS[scene.background]).all()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_loss_is_the_mean_over_response_tokens(model, kind) -> None:
    """The same by the long way: each example by itself, without padding, token by token; codes of figures count more."""
    rng = random.Random(7)
    made = [example(rng, kind) for _ in range(3)]
    losses = []
    weights = []
    for one in made:
        batch = collate(model, [one], rng, 0.0)
        features = None
        if kind == "draw":
            features = model.code_features(batch.codes)
        elif batch.pixels is not None:
            features = model.see(batch.pixels)
        states = model.network.model.language_model(inputs_embeds=model.embed(batch.ids, features)).last_hidden_state[0]
        head = model.network.model.generation_head if kind == "draw" else model.network.lm_head
        codes = iter(batch.codes[0].tolist()) if kind == "draw" else None
        for position, label in enumerate(batch.next_token[0].tolist()):
            if label != -100:
                label = next(codes) if codes else label
                losses.append(-float(head(states[position]).log_softmax(-1)[label]))
                weights.append(1 if kind != "draw" or is_plain(label, one.scene) else FIGURE)
    together = joint_loss(model, collate(model, made, rng, 0.0))
    assert together.item() == pytest.approx(np.average(losses, weights=weights), abs=1e-4)


def test_every_patch_has_a_code(model) -> None:
    codes = patch_codes()
    assert len(codes) == model.network.config.vq_config.num_embeddings
    rng = random.Random(8)
    scenes = [grammar.prompt(rng, split, "composition").scene for split in SPLITS for _ in range(30)]
    numbers = codes.of(scenes)
    assert numbers.shape == (90, 64)
    # The code of a patch is the patch: put together again they are the picture.
    patches = torch.from_numpy(codes.patches)[numbers].reshape(-1, 8, 8, 4, 4, 3).transpose(2, 3).reshape(-1, 32, 32, 3)
    assert torch.equal(patches.permute(0, 3, 1, 2).float() / 127.5 - 1, pixels_of(scenes))


def test_the_recipe_mixes_every_kind() -> None:
    assert set(Recipe().mix) == set(KINDS)
