"""How the pair `vision-smollm-aligned` and `vision-smollm-masked` is made: an encoder by its objective, then a projector by captions.

1. The encoder (`unisonde.train.vision_encoder`), which is the only thing that differs.
2. The projector between it and SmolLM2-135M, both frozen, on captions that name shape, colour, place and count of textured things, and
   never texture, size or background. Two stages, by the same recipe for both:

| stage | the loss | runs |
|---|---|---|
| name | which words the caption has (each is to be near one feature at least, as embeddings of words are) | projector |
| write | cross-entropy of the caption, as the decoder writes it after features and request | projector and decoder |

Naming costs a two-hundredth of writing a step and brings features to where the decoder's words are. It is kept short, since features
that are asked to be words become little else: after 2,000 steps of it the texture that the masked encoder holds was gone from them.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from unisonde.data.item import Item
from unisonde.data.tabletop.render import render
from unisonde.data.tabletop.scene import Scene
from unisonde.data.tabletop.textured import REQUEST, caption, parse_caption
from unisonde.models.parts.projected import Projector
from unisonde.models.vision_smollm import Trained, VisionConfig, VisionSmolLM, assemble, build_encoder, join
from unisonde.train.loop import Schedule, autocast_dtype
from unisonde.train.projector import Encoded, Stage, Writer, export, fit_stages, initialise, record_of, workshop
from unisonde.train.vision_encoder import pixels_of, scene, train_encoder

NAMES = ("vision-smollm-aligned", "vision-smollm-masked")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out.

    Attributes:
        precision: `auto`, `bf16` or `fp32`, in training.
        model: sizes, and the objective of the encoder.
        encoder: schedule of the encoder.
        pictures: in a batch of the encoder, of which there are `batches` in a step.
        scenes: different pictures that the projector learns from.
        held_out: held-out pictures whose captions are judged.
        size: pictures in a batch of the projector.
        batches: batches in a step.
        sharpness: of naming, what the cosine of a feature and an embedding is multiplied by.
    """

    seed: int = 0
    precision: str = "auto"
    model: VisionConfig = field(default_factory=VisionConfig)
    encoder: Schedule = field(
        default_factory=lambda: Schedule(steps=600, rate=2e-3, matrix_rate=0.02, warmup=60, weight_decay=0.02)
    )
    pictures: int = 64
    scenes: int = 6000
    held_out: int = 100
    size: int = 16
    batches: int = 2
    sharpness: float = 20.0
    name: Schedule = field(default_factory=lambda: Schedule(steps=300, rate=1e-3, warmup=50, weight_decay=0.01))
    write: Schedule = field(default_factory=lambda: Schedule(steps=240, rate=1e-3, warmup=20, weight_decay=0.01))


class Namer:
    """Features as words: whether a caption has a word, by the nearest of the features to the word's embedding, both centred."""

    def __init__(self, embeddings: Tensor, words: Sequence[int], sharpness: float) -> None:
        self.centre = embeddings.mean(0)
        self.table = F.normalize(embeddings[list(words)] - self.centre, dim=1)
        self.number = {token: k for k, token in enumerate(words)}
        self.sharpness = sharpness

    def loss(self, features: Sequence[Tensor], batch: Sequence[Encoded]) -> Tensor:
        """Mean nats a word of the vocabulary: features (n, D) each, as many of every item."""
        cosines = F.normalize(torch.stack(list(features)).float() - self.centre, dim=-1) @ self.table.T
        # A smooth maximum over features. One that is four words at once (colour, shape, row, column) has a cosine of 1/2 with each.
        scores = (self.sharpness * cosines).logsumexp(1) - math.log(cosines.shape[1]) - self.sharpness / 8
        wanted = torch.zeros_like(scores)
        for row, one in zip(wanted, batch, strict=True):
            row[[self.number[token] for token in one.words]] = 1.0
        return F.binary_cross_entropy_with_logits(scores, wanted)


@torch.inference_mode()
def see_all(model: VisionSmolLM, scenes: Sequence[Scene]) -> list[Encoded]:
    """Pictures through the encoder, with their captions."""
    seen = []
    for start in track(range(0, len(scenes), 64), "seeing pictures", console=Console(stderr=True)):
        some = list(scenes[start : start + 64])
        joined = join(model.network.encoder(pixels_of(some)).last_hidden_state, model.config.grid).half()
        texts = [caption(one) for one in some]
        seen += [Encoded(x, model.tokens_of(t), model.tokens_of(f" {t}")) for x, t in zip(joined, texts, strict=True)]
    return seen


def train(out: Path, recipe: Recipe | None = None) -> Path:
    """Make an encoder and its projector and write them to the folder `out`; go on where an earlier call with the same recipe was
    killed.

    Raises:
        ValueError: `out` holds files, or the beginnings of another recipe; the package with the decoder's weights is missing.
    """
    recipe = recipe or Recipe()
    trained = Trained(build_encoder(recipe.model), Projector(recipe.model))
    model = assemble(trained, recipe.model, device="cpu", dtype=torch.float32)
    with workshop(out, recipe) as work:
        effort, figures = train_encoder(
            recipe.model.objective,
            trained.encoder,
            recipe.encoder,
            work / "encoder.pt",
            recipe.pictures,
            recipe.batches,
            recipe.precision,
            recipe.seed,
        )
        started = time.monotonic()
        rng = random.Random(f"{recipe.seed}/scenes")
        seen = see_all(model, [scene(rng) for _ in range(recipe.scenes)])
        seeing = time.monotonic() - started
        efforts = fit_projector(model, seen, recipe, work)
        record = record_of(recipe, {"encoder": vars(effort), "seeing": {"seconds": seeing}, **efforts})
        export(trained, recipe.model.to_dict(), out, record, {"encoder": figures, "captions": scores(model, recipe)})
    return out


def fit_projector(model: VisionSmolLM, seen: Sequence[Encoded], recipe: Recipe, work: Path) -> dict[str, dict[str, float]]:
    """Both stages, in place; the time that each took."""
    embeddings = model.language_model.get_input_embeddings().weight.detach()
    initialise(model.network.projector, embeddings, recipe.seed)
    words = sorted({token for one in seen for token in one.words})
    blank = model.prepare(item_of(Scene((), "white")), 1)
    stages = (
        Stage("name", recipe.name, Namer(embeddings, words, recipe.sharpness).loss),
        Stage("write", recipe.write, Writer(model, blank, autocast_dtype(recipe.precision)).loss),
    )

    def batch(rng: random.Random) -> list[Encoded]:
        return rng.sample(list(seen), min(recipe.size, len(seen)))

    return fit_stages(model, stages, batch, recipe.seed, recipe.precision, recipe.size, recipe.batches, work)


def item_of(shown: Scene, name: str = "picture") -> Item:
    return Item(name, "textured", REQUEST, render(shown))


def scores(model: VisionSmolLM, recipe: Recipe) -> dict[str, Any]:
    """What the model writes of held-out pictures: shares of captions that are right in all, of counts, and of things by what is said
    of them at their place."""
    rng = random.Random(f"{recipe.seed}/held-out captions")
    tallies = {"things": 0, "named": 0, "colours": 0, "shapes": 0, "whole": 0, "counts": 0}
    wrong = {}
    shown = [scene(rng, "test") for _ in range(recipe.held_out)]
    for one in track(shown, "captioning held-out pictures", console=Console(stderr=True)):
        [response] = model.respond([item_of(one)], "text", model.defaults("text"))
        number, said = parse_caption(response.text or "")
        at = {place: (colour, shape) for colour, shape, place in said}
        wanted = {thing.place: (thing.colour, thing.shape) for thing in one.things}
        tallies["things"] += len(wanted)
        tallies["counts"] += number == len(wanted)
        tallies["named"] += sum(place in at for place in wanted)
        tallies["colours"] += sum(at.get(place, ("", ""))[0] == colour for place, (colour, _) in wanted.items())
        tallies["shapes"] += sum(at.get(place, ("", ""))[1] == shape for place, (_, shape) in wanted.items())
        whole = number == len(wanted) and at == wanted and len(said) == len(wanted)
        tallies["whole"] += whole
        if not whole:
            wrong[caption(one)] = response.text
    count, things = len(shown), tallies["things"]
    shares = {"right": tallies["whole"] / count, "counts": tallies["counts"] / count}
    shares |= {what: tallies[what] / things for what in ("named", "colours", "shapes")}
    return {"pictures": count, "things": things, **shares, "wrong": wrong}


def recipe_of(name: str, seed: int = 0, precision: str = "auto") -> Recipe:
    """The recipe of one of the pair.

    Raises:
        ValueError: it is none of `NAMES`.
    """
    if name not in NAMES:
        raise ValueError(f"no model of the pair is called {name!r}; there are {' and '.join(NAMES)}")
    recipe = Recipe(seed=seed, precision=precision)
    return replace(recipe, model=replace(recipe.model, objective=name.rpartition("-")[2]))
