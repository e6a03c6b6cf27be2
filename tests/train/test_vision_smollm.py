"""Training of the vision-smollm pair: both objectives against independent ones, the captions' losses, and the whole command, tiny."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from unisonde.data.tabletop.scene import TEXTURES, Scene, Thing
from unisonde.data.tabletop.textured import alike, caption, mixed
from unisonde.models import smollm, vision_smollm
from unisonde.models.vision_smollm import build_encoder
from unisonde.train import vision_encoder
from unisonde.train.loop import Schedule
from unisonde.train.projector import Encoded, Writer
from unisonde.train.vision_encoder import Aligned, Masked, pixels_of, scene, split, train_encoder, words
from unisonde.train.vision_smollm import Namer, Recipe, recipe_of, scores, see_all, train

from ..models.tiny_vision import CONFIG, make

TOY = Recipe(
    model=CONFIG,
    encoder=Schedule(3, 1e-3, 1, matrix_rate=0.02),
    pictures=4,
    scenes=6,
    held_out=2,
    size=2,
    name=Schedule(3, 1e-3, 1),
    write=Schedule(3, 1e-3, 1),
)


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [mixed(rng, "train") for _ in range(count)]


@pytest.fixture
def encoder() -> vision_smollm.SiglipVisionModel:
    made = build_encoder(CONFIG)
    vision_encoder.initialise(made, 0)
    return made


# Pictures and words


def test_training_pictures_are_textured_and_of_their_split() -> None:
    rng = random.Random(0)
    drawn = [scene(rng) for _ in range(200)]
    assert {one.split for one in drawn} == {"train"} and {one.split for one in (scene(rng, "test") for _ in range(30))} == {"test"}
    assert {thing.texture for one in drawn for thing in one.things} == set(TEXTURES)
    same = [len({(t.shape, t.colour, t.texture) for t in one.things}) == 1 for one in drawn if len(one.things) > 1]
    assert 0.3 < sum(same) / len(same) < 0.8


def test_the_vocabulary_holds_every_caption_and_no_more() -> None:
    rng = random.Random(1)
    said = {word for _ in range(2000) for word in split(caption(mixed(rng, "train")))}
    assert said == set(words()) and sorted(words().values()) == list(range(len(words())))
    longest = max(len(split(caption(mixed(rng, "train")))) for _ in range(500))
    assert longest <= vision_encoder.LONGEST


# Objectives


def test_contrast_is_both_ways_with_equal_captions_shared(encoder: vision_smollm.SiglipVisionModel) -> None:
    network = Aligned(encoder)
    network.beginning(0)
    batch = scenes(3)
    # The last has the caption of the first, and another look.
    batch.append(replace(batch[0], things=tuple(replace(t, texture="checked", size="large") for t in batch[0].things)))
    with torch.no_grad():
        loss = float(network.loss(batch, random.Random(0)))
        pictures, captions = network.pictures(pixels_of(batch)), network.captions([caption(one) for one in batch])
    assert torch.allclose(pictures.norm(dim=1), torch.ones(4)) and torch.allclose(captions[0], captions[3], atol=1e-6)
    logits = (math.exp(2.0) * pictures @ captions.T).double()
    mates = {0: (0, 3), 1: (1,), 2: (2,), 3: (0, 3)}
    wanted = 0.0
    for own, others in mates.items():
        for table in (logits, logits.T):
            row = table[own]
            wanted -= sum(float(row[k] - row.logsumexp(0)) for k in others) / len(others) / 8
    assert loss == pytest.approx(wanted, rel=1e-5)


def test_padding_does_not_change_a_caption(encoder: vision_smollm.SiglipVisionModel) -> None:
    network = Aligned(encoder)
    network.beginning(0)
    short, long = "one shape: a red ring at the top left.", caption(max(scenes(40), key=lambda one: len(one.things)))
    with torch.no_grad():
        alone, beside = network.captions([short])[0], network.captions([short, long])[0]
    assert torch.allclose(alone, beside, atol=1e-5)


def test_hidden_patches_are_hidden(encoder: vision_smollm.SiglipVisionModel) -> None:
    """What is made up does not depend on patches that are not shown, and does on those that are."""
    network = Masked(encoder)
    network.beginning(0)
    pixels = torch.rand(1, 3, 32, 32, requires_grad=True)
    shown = torch.tensor([[0, 9, 63, 20]])
    made = network.made_up(pixels, shown)
    assert made.shape == (1, 64, 48)
    [gradient] = torch.autograd.grad(made.square().sum(), pixels)
    patches = F.unfold(gradient, 4, stride=4)[0].abs().sum(0)
    assert set(patches.nonzero().flatten().tolist()) == {0, 9, 20, 63}


def test_the_order_of_what_is_shown_does_not_matter(encoder: vision_smollm.SiglipVisionModel) -> None:
    network = Masked(encoder)
    network.beginning(0)
    with torch.no_grad():
        first, again = (network.made_up(pixels_of(scenes(1)), torch.tensor([order])) for order in ([3, 40, 11], [11, 3, 40]))
    assert torch.allclose(first, again, atol=1e-5)


def test_the_masked_loss_is_over_what_was_not_shown(encoder: vision_smollm.SiglipVisionModel) -> None:
    network = Masked(encoder)
    network.beginning(0)
    batch, pixels = scenes(2), pixels_of(scenes(2))
    with torch.no_grad():
        loss = float(network.loss(batch, random.Random(5)))
        rng, total, count = random.Random(5), 0.0, 0
        for one in pixels:
            shown = rng.sample(range(64), vision_encoder.SHOWN)
            made = network.made_up(one[None], torch.tensor([shown]))[0]
            for number in set(range(64)) - set(shown):
                row, column = divmod(number, 8)
                patch = one[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(48)
                total, count = total + float((made[number] - patch).square().mean()), count + 1
    assert count == 2 * (64 - vision_encoder.SHOWN) and loss == pytest.approx(total / count, rel=1e-4)


def test_both_objectives_begin_alike_and_see_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: dict[str, dict[str, torch.Tensor]] = {}
    seen: dict[str, list[Scene]] = {}
    for objective, network in (("aligned", Aligned), ("masked", Masked)):

        def loss(self: Aligned | Masked, batch: list[Scene], rng: random.Random, objective: str = objective) -> torch.Tensor:
            begun[objective] = {key: value.clone() for key, value in self.encoder.state_dict().items()}
            seen[objective] = batch
            return self.encoder(pixels_of(batch)).last_hidden_state.square().mean()

        monkeypatch.setattr(network, "loss", loss)
        train_encoder(objective, build_encoder(CONFIG), Schedule(1, 1e-3, 1), tmp_path / f"{objective}.pt", 3, 1, "fp32", 7)
    assert seen["aligned"] == seen["masked"]
    assert all(torch.equal(value, begun["masked"][key]) for key, value in begun["aligned"].items())


@pytest.mark.parametrize("objective", ["aligned", "masked"])
def test_an_objective_can_be_learnt(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Four pictures by heart: the loss falls well below what it begins with."""
    network = {"aligned": Aligned, "masked": Masked}[objective]
    own, losses = network.loss, []

    def kept(self: Aligned | Masked, batch: list[Scene], rng: random.Random) -> torch.Tensor:
        losses.append(own(self, scenes(4), rng))  # type: ignore[arg-type]
        return losses[-1]

    monkeypatch.setattr(network, "loss", kept)
    schedule = Schedule(60, 3e-3, 5, matrix_rate=0.02)
    train_encoder(objective, build_encoder(CONFIG), schedule, tmp_path / "e.pt", 1, 1, "fp32", 0)
    first, last = float(losses[0].detach()), float(sum(loss.detach() for loss in losses[-5:])) / 5
    assert last < (0.2 if objective == "aligned" else 0.5) * first


# Captions


def test_naming_is_by_the_nearest_feature() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(9, 5, generator=generator)
    features = torch.randn(4, 5, generator=generator)
    namer = Namer(embeddings, [1, 4, 8], 6.0)
    loss = float(namer.loss([features], [Encoded(features, [], [8, 1, 8])]))
    centre, total = embeddings.mean(0), 0.0
    for token, there in ((1, True), (4, False), (8, True)):
        cosines = [float(F.cosine_similarity(f - centre, embeddings[token] - centre, dim=0)) for f in features]
        score = math.log(sum(math.exp(6.0 * cosine) for cosine in cosines) / 4) - 0.75
        total += math.log1p(math.exp(-score if there else score))
    assert loss == pytest.approx(total / 3, rel=1e-5)


def test_writing_is_what_the_model_scores() -> None:
    """Through the cached states and the template read once, against the model's own embedding of item and caption."""
    from unisonde.train.projector import project
    from unisonde.train.vision_smollm import item_of

    model = make()
    batch = see_all(model, scenes(3))
    writer = Writer(model, model.prepare(item_of(Scene((), "white")), 1), None)
    loss = writer.loss([f.detach() for f in project(model.network.projector, batch, None)], batch).detach().item()
    total, count = 0.0, 0
    for one in scenes(3):
        ids = [*model.tokens_of(caption(one)), model.tokenizer.eos_token_id]
        with torch.inference_mode():
            logits = model._read(model.embed(model.prepare(item_of(one), len(ids)), ids), len(ids) + 1)[0, :-1]
        total, count = total + float(F.cross_entropy(logits, torch.tensor(ids), reduction="sum")), count + len(ids)
    assert loss == pytest.approx(total / count, rel=1e-3)  # states are kept in float16


def test_captions_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says all of the first picture, and of the others a wrong colour and no more."""
    model = make()
    shown: list[Scene] = []

    class Response:
        def __init__(self, text: str) -> None:
            self.text = text

    def respond(items: list, task: str, generation: object) -> list[Response]:
        rng = random.Random("0/held-out captions")
        scene_of = [scene(rng, "test") for _ in range(4)][len(shown)]
        shown.append(scene_of)
        if len(shown) == 1:
            return [Response(caption(scene_of).upper())]
        thing = scene_of.things[0]
        colour = "red" if thing.colour != "red" else "blue"
        return [Response(f"one shape: a {colour} {thing.shape} at the {thing.place}.")]

    monkeypatch.setattr(model, "respond", respond)
    made = scores(model, replace(TOY, held_out=4))
    things = [len(one.things) for one in shown]
    assert made["pictures"] == 4 and made["right"] == 0.25 and made["things"] == sum(things)
    assert made["counts"] == (1 + sum(n == 1 for n in things[1:])) / 4
    assert made["named"] == made["shapes"] == pytest.approx((things[0] + 3) / sum(things))
    assert made["colours"] == pytest.approx(things[0] / sum(things)) and len(made["wrong"]) == 3


# The whole command


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tiny decoder in place of the package's."""
    model = make()
    decoder = type("Decoder", (), {"network": model.language_model, "tokenizer": model.tokenizer, "source": tmp_path / "decoder"})
    monkeypatch.setattr(smollm, "load", lambda device, dtype: decoder)
    monkeypatch.setattr(vision_encoder, "HELD_OUT", 4)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("objective", ["aligned", "masked"])
def test_the_folder_loads_and_says_how_it_was_made(package: None, tmp_path: Path, objective: str) -> None:
    folder = train(tmp_path / "out", replace(TOY, model=replace(CONFIG, objective=objective)))
    loaded = vision_smollm.load(str(folder), None, "cpu")
    assert loaded.name == f"vision-smollm-{objective}" and loaded.config.objective == objective
    record, figures = (json.loads((folder / f"{name}.json").read_text()) for name in ("training", "scores"))
    assert set(record["effort"]) == {"encoder", "seeing", "name", "write"} and record["recipe"]["model"]["objective"] == objective
    assert figures["captions"]["pictures"] == 2 and figures["encoder"]["pictures"] == 4
    assert ("accuracy" in figures["encoder"]) == (objective == "aligned")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "training.json", "scores.json"}
    assert not folder.with_name("out.training").exists()


def test_the_same_seed_gives_the_same_weights(package: None, tmp_path: Path, one_thread: None) -> None:
    first, again, other = (train(tmp_path / str(k), replace(TOY, seed=seed)) for k, seed in enumerate((0, 0, 1)))
    assert weights(first) == weights(again) != weights(other)


def test_killed_it_goes_on_and_ends_alike(package: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    whole = train(tmp_path / "whole", TOY)
    loss, calls = Writer.loss, itertools.count()

    def stop(self: Writer, features: list, batch: list) -> torch.Tensor:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return loss(self, features, batch)

    monkeypatch.setattr(Writer, "loss", stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "out", TOY)
    monkeypatch.setattr(Writer, "loss", loss)
    with pytest.raises(ValueError, match="begun with another recipe"):
        train(tmp_path / "out", replace(TOY, seed=3))
    assert weights(train(tmp_path / "out", TOY)) == weights(whole)


def test_recipes_by_name() -> None:
    aligned, masked = recipe_of("vision-smollm-aligned", 4), recipe_of("vision-smollm-masked", 4, "fp32")
    assert replace(masked, precision="auto", model=replace(masked.model, objective="aligned")) == aligned
    assert aligned.model.objective == "aligned" and masked.seed == 4
    with pytest.raises(ValueError, match="no model of the pair is called 'vision-smollm'; there are vision-smollm-aligned and"):
        recipe_of("vision-smollm")


def test_no_caption_tells_textures_apart() -> None:
    """The one thing on which the study stands: the projector's texts are the same whatever the texture and the size."""
    thing = Thing(1, 1, "cross", "blue", "small")
    said = {
        caption(Scene((replace(thing, texture=t, size=z),), b))
        for t in TEXTURES
        for z in ("small", "large")
        for b in ("white", "black")
    }
    assert said == {"one shape: a blue cross at the middle centre."}
    assert caption(alike(random.Random(0), "train", "striped")).count("strip") == 0
