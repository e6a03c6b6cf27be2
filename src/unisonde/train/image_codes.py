"""The image tokenizer of Tabletop twins: one code for every 4 x 4 patch that the world can show.

Tabletop is made of few patches: every quarter of every shape, size, colour and background, aligned with the grid of codes. So the codes
need not be discovered: `PatchCodes` numbers the distinct patches, and what is trained is the network that a family ships, an encoder
that names the patches and a decoder that draws them. Both see every shape in every colour, the held-out pairs too, as a general image
tokenizer would; the held-out pairs are kept from all that is learnt jointly.
"""

from __future__ import annotations

import itertools
import random
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.janus.modeling_janus import JanusVQVAE

from unisonde.data.tabletop.render import render_array
from unisonde.data.tabletop.scene import BACKGROUNDS, COLOURS, SHAPES, SIDE, SIZES, Scene, Thing, places
from unisonde.train.loop import Effort, Schedule, fit

PATCH = 4
GRID = SIDE // PATCH
BATCH = 6
BATCHES = 2
SCHEDULE = Schedule(steps=1600, rate=2e-3, warmup=50, weight_decay=0.0)
CROWDS = (0, 1, 2, 3, 9, 9, 9)
"""Things in a training picture: mostly more than a Tabletop scene has, since most of a scene is plain background and teaches little."""
SHARPNESS = 16.0
"""Inverse temperature of the encoder's choice among unit codes."""


def pixels_of(scenes: list[Scene]) -> Tensor:
    """Pictures as pixel values in [-1, 1]: (B, 3, 32, 32), what the image processor of the twin gives."""
    return to_pixels(np.stack([render_array(scene) for scene in scenes]))


def to_pixels(pictures: np.ndarray) -> Tensor:
    """(B, H, W, 3) bytes -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def patches_of(pictures: np.ndarray) -> np.ndarray:
    """(B, 32, 32, 3) -> (B, 64, 48), row by row."""
    split = pictures.reshape(-1, GRID, PATCH, GRID, PATCH, 3).swapaxes(2, 3)
    return split.reshape(-1, GRID * GRID, PATCH * PATCH * 3)


def figures(pixels: Tensor) -> Tensor:
    """Which pixels are off the background, the commonest colour of a picture: (B, 3, H, W) -> (B, 1, H, W) booleans."""
    return (pixels != pixels.flatten(2).median(-1).values[..., None, None]).any(1, keepdim=True)


def code_weights(codes: Tensor, figure: float) -> Tensor:
    """What each code of a picture counts: 1 for the commonest, which is the background, `figure` for the others; (B, n) -> (B, n)."""
    return torch.where(codes == codes.mode(dim=1, keepdim=True).values, 1.0, figure)


class PatchCodes:
    """The distinct patches of the world, in a fixed order: `patches` (K, 48), bytes."""

    def __init__(self) -> None:
        looks = itertools.product(SHAPES, COLOURS, SIZES, BACKGROUNDS)
        scenes = [Scene((Thing(0, 0, shape, colour, size),), background) for shape, colour, size, background in looks]
        pictures = np.stack([render_array(scene) for scene in scenes])
        self.patches = np.unique(patches_of(pictures).reshape(-1, PATCH * PATCH * 3), axis=0)
        self._number = {patch.tobytes(): k for k, patch in enumerate(self.patches)}

    def __len__(self) -> int:
        return len(self.patches)

    def of(self, scenes: list[Scene]) -> Tensor:
        """The codes of pictures: (B, 64)."""
        patches = patches_of(np.stack([render_array(scene) for scene in scenes]))
        return torch.tensor([[self._number[patch.tobytes()] for patch in picture] for picture in patches])

    def look(self, width: int) -> Tensor:
        """What the patches look like, alike where they are: (K, width), float64. The principal components of their pixels, each with the
        root of its deviation, so that the many small differences between shapes count beside the few large ones between colours.
        """
        patches = torch.from_numpy(self.patches).double() / 127.5 - 1
        centred = patches - patches.mean(0)
        _, _, directions = torch.linalg.svd(centred, full_matrices=False)
        components = centred @ directions[:width].T
        return components / components.std(0) ** 0.5


@cache
def patch_codes() -> PatchCodes:
    return PatchCodes()


def crowd(rng: random.Random) -> Scene:
    """A random picture of up to nine things, of any shape and colour."""
    cells = rng.sample(list(places()), rng.choice(CROWDS))
    things = (Thing(*cell, rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(tuple(SIZES))) for cell in cells)
    return Scene(tuple(things), rng.choice(tuple(BACKGROUNDS)))


def train_image_codes(vq: JanusVQVAE, checkpoint: Path, seed: int = 0, schedule: Schedule = SCHEDULE) -> Effort:
    """Train encoder, codebook and decoder of `vq` in place."""
    codes = patch_codes()

    def loss(number: int) -> Tensor:
        rng = random.Random(f"{seed}/codes/{number}")
        scenes = [crowd(rng) for _ in range(BATCH)]
        pixels, named = pixels_of(scenes), codes.of(scenes)
        book = F.normalize(vq.quantize.embedding.weight, dim=-1)
        error = decode(vq, book[named]) - pixels
        # The encoder learns names, and does not pull the codebook.
        choice = SHARPNESS * (encode(vq, pixels) @ book.detach().T)
        return (error.abs() + error.square()).mean() + 0.1 * F.cross_entropy(choice.flatten(0, 1), named.flatten())

    vq.train()
    initialise(vq, seed)
    effort = fit("image codes", vq, loss, schedule, checkpoint, BATCH * BATCHES, BATCHES)
    with torch.no_grad():  # a unit codebook, so that an encoder that forgets to normalise it finds the same codes
        vq.quantize.embedding.weight.copy_(F.normalize(vq.quantize.embedding.weight, dim=-1))
    vq.eval()
    return effort


def encode(vq: JanusVQVAE, pixels: Tensor) -> Tensor:
    """Unit latents: (B, 3, H, W) -> (B, n, e). The code is the nearest in the codebook."""
    return F.normalize(vq.quant_conv(vq.encoder(pixels)).flatten(2).transpose(1, 2), dim=-1)


def decode(vq: JanusVQVAE, quantised: Tensor) -> Tensor:
    """Pixel values from unit codes: (B, n, e) -> (B, 3, H, W)."""
    return vq.decoder(vq.post_quant_conv(quantised.transpose(1, 2).unflatten(2, (GRID, GRID))))


@torch.no_grad()
def initialise(vq: JanusVQVAE, seed: int) -> None:
    """Start from a network that passes on what it is given, and a codebook that holds what the patches look like.

    Convolutions keep the scale of their input (LeCun) and residual branches begin at zero. With the default of `transformers`
    (0.02) the skips begin near zero, the group norms take over, and the colour of a plain background is long in coming through.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in vq.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith(("conv2", "proj_out")):
                nn.init.zeros_(module.weight)
    look = patch_codes().look(vq.config.embed_dim)
    book = vq.quantize.embedding.weight
    book.zero_()
    book[: len(look)] = F.normalize(look, dim=-1).to(book)
