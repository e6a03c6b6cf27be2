"""The first lesson of a twin's vision encoder: at every patch, the words for what stands there.

Published models begin with an encoder that has seen many pictures with their captions (Janus-Pro: SigLIP). A twin's begins with this: the
feature of each patch is to be half the sum of the word embeddings of what it shows. Shape, colour, size and place of a thing, or the
background; whole things, though a patch shows a quarter of one. It takes seconds, and questions about pictures are learnt sooner after it
(docs/twins.md). Encoder and embeddings go on changing when all is trained together.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from unisonde.data.tabletop.scene import BACKGROUNDS, CELL, COLOURS, COLUMNS, PITCH, ROWS, SHAPES, SIZES, Scene
from unisonde.train.image_codes import GRID, PATCH, crowd, pixels_of
from unisonde.train.loop import Effort, Schedule, autocast, fit

BATCH = 32
BATCHES = 2
SCHEDULE = Schedule(steps=200, rate=2e-3, matrix_rate=0.02, warmup=20, weight_decay=0.02)

SIZE = 0.5
"""Of a feature, against the sum of the embeddings. Five words make a thing, so features are about as large as words."""

WORDS = (*SIZES, *COLOURS, *SHAPES, *ROWS, *COLUMNS, "background", *BACKGROUNDS)
"""All that patches can show."""


def shown(scenes: Sequence[Scene]) -> Tensor:
    """Which of `WORDS` each patch shows: (B, 64, len(WORDS)), zeros and ones."""

    def marks(*words: str) -> Tensor:
        return torch.tensor([float(word in words) for word in WORDS])

    patches = torch.empty(len(scenes), GRID, GRID, len(WORDS))
    for picture, scene in zip(patches, scenes, strict=True):
        picture[:] = marks("background", scene.background)
        for thing in scene.things:
            top, left, side = (pixels // PATCH for pixels in (PITCH * thing.row, PITCH * thing.column, CELL))
            there = marks(thing.size, thing.colour, thing.shape, ROWS[thing.row], COLUMNS[thing.column])
            picture[top : top + side, left : left + side] = there
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
    embeddings: Tensor,
    checkpoint: Path,
    seed: int = 0,
    precision: torch.dtype | None = None,
    schedule: Schedule = SCHEDULE,
) -> Effort:
    """Train `encoder` in place.

    Args:
        encoder: what is trained: the vision encoder and what takes its features into the language model.
        see: its features of pictures, (B, 3, 32, 32) -> (B, 64, D).
        embeddings: of `WORDS`, (len(WORDS), D).
        precision: of mixed precision; None is float32.
    """

    def loss(number: int) -> Tensor:
        rng = random.Random(f"{seed}/vision/{number}")
        scenes = [familiar_crowd(rng) for _ in range(BATCH)]
        with autocast(precision):
            features = see(pixels_of(scenes))
        return (features.float() / SIZE - shown(scenes) @ embeddings).square().mean()

    return fit("vision encoder", encoder.train(), loss, schedule, checkpoint, BATCH * BATCHES, BATCHES)
