"""The first lesson of a twin's vision encoder: at every patch, what stands there.

Published models begin with an encoder that has seen many pictures with their captions (Janus-Pro: SigLIP). A twin's begins with this.
Each word for a thing (size, colour, shape, place) or for the background has a random direction of its own, and the feature of a patch is
to be the sum of the directions of what it shows; of whole things, though a patch may show a part of one. It takes seconds. With
directions of their own, things are found sooner in answers than with the embeddings of the same words (docs/twins.md).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from unisonde.data.tabletop.scene import BACKGROUNDS, CELL, COLOURS, COLUMNS, PITCH, ROWS, SHAPES, SIDE, SIZES, Scene
from unisonde.train.image_codes import crowd, pixels_of
from unisonde.train.loop import Effort, Schedule, autocast, fit

BATCH = 32
BATCHES = 2
SCHEDULE = Schedule(steps=400, rate=2e-3, matrix_rate=0.02, warmup=20, weight_decay=0.02)

SPREAD = 0.35
"""Standard deviation of a direction's numbers. Four words make a thing, so features are somewhat larger than embeddings of words."""

PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
WORDS = (*SIZES, *COLOURS, *SHAPES, *PLACES, "background", *BACKGROUNDS)
"""All that patches can show."""


def directions(width: int, seed: int) -> Tensor:
    """Of each of `WORDS`, (len(WORDS), width)."""
    return SPREAD * torch.randn(len(WORDS), width, generator=torch.Generator().manual_seed(seed))


def shown(scenes: Sequence[Scene], patch: int) -> Tensor:
    """Which of `WORDS` each patch of `patch` x `patch` pixels shows: (B, n, len(WORDS)), zeros and ones."""

    def marks(*words: str) -> Tensor:
        return torch.tensor([float(word in words) for word in WORDS])

    def touched(cell: int) -> slice:
        """The patches along one side that a cell reaches into."""
        return slice(PITCH * cell // patch, -(-(PITCH * cell + CELL) // patch))

    patches = torch.empty(len(scenes), SIDE // patch, SIDE // patch, len(WORDS))
    for picture, scene in zip(patches, scenes, strict=True):
        picture[:] = marks("background", scene.background)
        for thing in scene.things:
            there = marks(thing.size, thing.colour, thing.shape, thing.place)
            picture[touched(thing.row), touched(thing.column)] = there
    return patches.flatten(1, 2)


def familiar_crowd(rng: random.Random) -> Scene:
    """A random picture of up to nine things without the pairs of shape and colour that are held out."""
    while True:
        scene = crowd(rng)
        if scene.split != "compositional":
            return scene


def train_patch_words(
    encoder: nn.Module,
    see: Callable[[Tensor], Tensor],
    width: int,
    patch: int,
    checkpoint: Path,
    seed: int = 0,
    precision: torch.dtype | None = None,
    schedule: Schedule = SCHEDULE,
) -> Effort:
    """Train `encoder` in place.

    Args:
        encoder: what is trained: the vision encoder and what takes its features into the language model.
        see: its features of pictures, (B, 3, 32, 32) -> (B, n, width).
        patch: side of what one feature is of, in pixels. No patch reaches into two things.
        precision: of mixed precision; None is float32.
    """
    known = directions(width, seed)

    def loss(number: int) -> Tensor:
        rng = random.Random(f"{seed}/vision/{number}")
        scenes = [familiar_crowd(rng) for _ in range(BATCH)]
        with autocast(precision):
            features = see(pixels_of(scenes))
        return (features.float() - shown(scenes, patch) @ known).square().mean() / SPREAD**2

    return fit("vision encoder", encoder.train(), loss, schedule, checkpoint, BATCH * BATCHES, BATCHES)
