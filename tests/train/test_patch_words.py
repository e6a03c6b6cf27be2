"""The first lesson of a twin's vision encoder: what it is to say of each patch, what it never sees, and that it learns it."""

from __future__ import annotations

import random

import torch

from unisonde.data.tabletop.render import render_array
from unisonde.data.tabletop.scene import HELD_OUT, Scene, Thing
from unisonde.train.image_codes import patch_codes, patches_of, pixels_of
from unisonde.train.janus_pro import learn_words, new_twin
from unisonde.train.loop import Schedule
from unisonde.train.patch_words import SIZE, WORDS, familiar_crowd, shown


def test_a_thing_is_named_in_all_of_its_patches_and_nowhere_else() -> None:
    scene = Scene((Thing(1, 2, "ring", "green", "small"), Thing(0, 0, "cross", "red", "large")), "grey")
    named = [{word for word, is_there in zip(WORDS, patch, strict=True) if is_there} for patch in shown([scene])[0]]
    ring, cross = {"small", "green", "ring", "middle", "right"}, {"large", "red", "cross", "top", "left"}
    assert {k for k, words in enumerate(named) if words == ring} == {30, 31, 38, 39}  # rows 3 and 4, columns 6 and 7
    assert {k for k, words in enumerate(named) if words == cross} == {0, 1, 8, 9}
    assert sum(words == {"background", "grey"} for words in named) == 64 - 8


def test_patches_named_background_are_plain() -> None:
    rng = random.Random(0)
    for _ in range(50):
        scene = familiar_crowd(rng)
        patches = patches_of(render_array(scene)[None])[0].reshape(64, -1, 3)
        plain = (patches == patches[:, :1]).all((1, 2)) & (patches[:, 0] == render_array(Scene((), scene.background))[0, 0]).all(1)
        background = shown([scene])[0, :, WORDS.index("background")].bool().numpy()
        assert plain[background].all() and not plain[~background].any()  # every quarter of every thing shows something of it


def test_held_out_pairs_are_never_shown() -> None:
    rng = random.Random(1)
    scenes = [familiar_crowd(rng) for _ in range(300)]
    pairs = {(thing.shape, thing.colour) for scene in scenes for thing in scene.things}
    assert len(pairs) == 30 - len(HELD_OUT) and not pairs & set(HELD_OUT)
    assert {len(scene.things) for scene in scenes} == {0, 1, 2, 3, 9}


def test_words_are_read_back_from_features(tmp_path) -> None:
    model = new_twin(0)
    words = (
        model.network.model.language_model.embed_tokens.weight[model.tokenizer.convert_tokens_to_ids(list(WORDS))].detach().clone()
    )
    rng = random.Random("other pictures")
    scenes = [familiar_crowd(rng) for _ in range(20)]

    @torch.no_grad()
    def right() -> float:
        """Share of patches of which every word is read back, by least squares."""
        read = model.see(pixels_of(scenes)) / SIZE @ torch.linalg.pinv(words)
        return float(((read > 0.5) == shown(scenes).bool()).all(-1).float().mean())

    before = right()
    effort = learn_words(model, tmp_path / "vision.pt", 0, None, Schedule(160, 2e-3, 10, matrix_rate=0.02))
    assert before < 0.1 and right() > 0.9 and effort.seconds > 0
    assert torch.equal(
        model.network.model.language_model.embed_tokens.weight[model.tokenizer.convert_tokens_to_ids(list(WORDS))], words
    )


def test_codes_begin_alike_where_their_patches_look_alike() -> None:
    look = torch.nn.functional.normalize(patch_codes().look(40), dim=1)
    model = new_twin(0).network.model
    apart = ~torch.eye(len(look), dtype=torch.bool)
    for codes in (model.generation_embeddings.weight, model.generation_head.vision_head.weight):
        known = torch.nn.functional.normalize(codes.detach().double(), dim=1)
        pairs = torch.stack([(table @ table.T)[apart] for table in (look, known)])
        assert torch.corrcoef(pairs)[0, 1] > 0.4
        assert torch.linalg.matrix_rank(known) == min(codes.shape)  # and each is set apart
