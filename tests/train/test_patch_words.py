"""The first lesson of a twin's vision encoder: what it is to say of each patch, what it never sees, and that it learns it."""

from __future__ import annotations

import random

import pytest
import torch

from unisonde.data.tabletop.render import render_array
from unisonde.data.tabletop.scene import HELD_OUT, Scene, Thing
from unisonde.train.image_codes import patch_codes, pixels_of
from unisonde.train.janus_pro import joint_parts, learn_words, new_twin
from unisonde.train.loop import Schedule
from unisonde.train.patch_words import WORDS, directions, familiar_crowd, shown


def test_a_thing_is_named_in_all_of_its_patches_and_nowhere_else() -> None:
    scene = Scene((Thing(1, 2, "ring", "green", "small"), Thing(0, 0, "cross", "red", "large")), "grey")
    ring, cross = {"small", "green", "ring", "middle right"}, {"large", "red", "cross", "top left"}
    for patch, of_ring, of_cross in (
        (4, {30, 31, 38, 39}, {0, 1, 8, 9}),
        (8, {7, 11}, {0}),
    ):  # the ring: pixels 12 to 19 by 24 to 31
        named = [{word for word, is_there in zip(WORDS, row, strict=True) if is_there} for row in shown([scene], patch)[0]]
        assert {k for k, words in enumerate(named) if words == ring} == of_ring
        assert {k for k, words in enumerate(named) if words == cross} == of_cross
        assert sum(words == {"background", "grey"} for words in named) == (32 // patch) ** 2 - len(of_ring | of_cross)


@pytest.mark.parametrize("patch", [4, 8])
def test_patches_named_background_are_plain(patch) -> None:
    rng = random.Random(0)
    for _ in range(50):
        scene = familiar_crowd(rng)
        pixels, colour = render_array(scene), render_array(Scene((), scene.background))[0, 0]
        cut = pixels.reshape(32 // patch, patch, 32 // patch, patch, 3).swapaxes(1, 2).reshape(-1, patch * patch, 3)
        plain = (cut == colour).all((1, 2))
        background = shown([scene], patch)[0, :, WORDS.index("background")].bool().numpy()
        assert plain[background].all() and not plain[~background].any()  # every part of every thing shows something of it


def test_held_out_pairs_are_never_shown() -> None:
    rng = random.Random(1)
    scenes = [familiar_crowd(rng) for _ in range(300)]
    pairs = {(thing.shape, thing.colour) for scene in scenes for thing in scene.things}
    assert len(pairs) == 30 - len(HELD_OUT) and not pairs & set(HELD_OUT)
    assert {len(scene.things) for scene in scenes} == {0, 1, 2, 3, 9}


def test_words_are_read_back_from_features(tmp_path) -> None:
    model = new_twin(0)
    reader = torch.linalg.pinv(directions(160, 3))
    rng = random.Random("other pictures")
    scenes = [familiar_crowd(rng) for _ in range(20)]

    @torch.no_grad()
    def right() -> float:
        """Share of patches of which every word is read back, by least squares."""
        return float(((model.see(pixels_of(scenes)) @ reader > 0.5) == shown(scenes, 8).bool()).all(-1).float().mean())

    before = right()
    effort = learn_words(model, tmp_path / "vision.pt", 3, None, Schedule(300, 2e-3, 10, matrix_rate=0.02))
    assert before < 0.1 and right() > 0.9 and effort.seconds > 0


def test_the_vision_encoder_stays_as_it_is_in_joint_training() -> None:
    model = new_twin(0)
    trained = set(joint_parts(model).parameters())
    kept = {name.split(".")[1] for name, weight in model.network.named_parameters() if weight not in trained}
    assert kept == {"vqmodel", "vision_model", "aligner"}


def test_codes_begin_alike_where_their_patches_look_alike() -> None:
    look = torch.nn.functional.normalize(patch_codes().look(40), dim=1)
    model = new_twin(0).network.model
    apart = ~torch.eye(len(look), dtype=torch.bool)
    for codes in (model.generation_embeddings.weight, model.generation_head.vision_head.weight):
        known = torch.nn.functional.normalize(codes.detach().double(), dim=1)
        pairs = torch.stack([(table @ table.T)[apart] for table in (look, known)])
        assert torch.corrcoef(pairs)[0, 1] > 0.4
        assert torch.linalg.matrix_rank(known) == min(codes.shape)  # and each is set apart
