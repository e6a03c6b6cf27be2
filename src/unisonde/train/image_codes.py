"""Training an image tokenizer on Tabletop: a convolutional autoencoder with a codebook (VQ-VAE, arXiv 1711.00937).

The codebook lives on the unit sphere, as Janus-Pro's does at look-up. The autoencoder first learns with its latents as they are, a
little noise added; then the codebook is laid through them by k-means, and both learn on together. A codebook that learns from the
first step on collapses to the few codes that blurred pictures need.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from transformers.models.janus.modeling_janus import JanusVQVAE

from unisonde.data.tabletop.render import render_array
from unisonde.data.tabletop.scene import Scene, draw_scene
from unisonde.train.loop import Schedule, fit

BATCH = 12
SCHEDULE = Schedule(steps=1500, rate=3e-3, warmup=50, weight_decay=0.0)
CROWDS = (1, 2, 3, 9, 9, 9)
"""Things in a training picture: more than a Tabletop scene has, since most of a scene is plain background and teaches little."""
FREE_SHARE = 0.4
"""Share of the steps before the codebook is laid."""
NOISE = 0.05
"""Noise on free latents, per dimension, so that what is told apart lies apart."""
SAMPLED_SCENES = 320
"""Pictures whose latents the codebook is laid through."""


def pixels_of(scenes: list[Scene]) -> Tensor:
    """Pictures as pixel values in [-1, 1]: (B, 3, 32, 32), what the image processor of the twin gives."""
    pictures = np.stack([render_array(scene) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def encode(vq: JanusVQVAE, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, and unit latents before and after quantisation: (B, 3, H, W) -> (B, n), (B, n, e), (B, n, e).

    `JanusVQVAE.encode` compares latents of any length with the codebook as stored; at look-up it normalises. The published encoder
    normalises both, and so do we.
    """
    latents = F.normalize(vq.quant_conv(vq.encoder(pixels)).flatten(2).transpose(1, 2), dim=-1)
    book = F.normalize(vq.quantize.embedding.weight, dim=-1)
    codes = (latents @ book.T).argmax(-1)
    return codes, latents, book[codes]


def decode(vq: JanusVQVAE, quantised: Tensor) -> Tensor:
    """Pixel values from quantised latents: (B, n, e) -> (B, 3, H, W)."""
    side = int(quantised.shape[1] ** 0.5)
    return vq.decoder(vq.post_quant_conv(quantised.transpose(1, 2).unflatten(2, (side, side))))


def train_image_codes(vq: JanusVQVAE, checkpoint: Path, seed: int = 0, schedule: Schedule = SCHEDULE) -> float:
    """Train `vq` in place. Returns seconds."""
    book = vq.quantize.embedding.weight
    free = round(FREE_SHARE * schedule.steps)

    def pictures(rng: random.Random, count: int) -> Tensor:
        return pixels_of([draw_scene(rng, "train", rng.choice(CROWDS)) for _ in range(count)])

    def loss(step: int) -> Tensor:
        if step == free:
            lay_codebook(vq, pictures(random.Random(f"{seed}/codebook"), SAMPLED_SCENES), seed)
        pixels = pictures(random.Random(f"{seed}/codes/{step}"), BATCH)
        _, latents, quantised = encode(vq, pixels)
        if step < free:
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(step))
            error = decode(vq, F.normalize(latents + NOISE * noise, dim=-1)) - pixels
            return (error.abs() + error.square()).mean()
        error = decode(vq, latents + (quantised - latents).detach()) - pixels
        # The codebook follows the latents, and the latents stay near the codebook.
        following = (latents.detach() - quantised).square().sum(-1).mean()
        commitment = (latents - quantised.detach()).square().sum(-1).mean()
        return (error.abs() + error.square()).mean() + following + 0.25 * commitment

    vq.train()
    initialise(vq, seed)
    seconds = fit("image codes", vq, loss, schedule, checkpoint, BATCH)
    with torch.no_grad():  # a unit codebook, so that an encoder that forgets to normalise it finds the same codes
        book.copy_(F.normalize(book, dim=-1))
    vq.eval()
    return seconds


def initialise(vq: JanusVQVAE, seed: int) -> None:
    """Convolutions that keep the scale of what they are given (LeCun). With the default of `transformers`, 0.02, the skips of the
    residual blocks start near zero, the group norms take the rest, and the colour of a plain background never comes through."""
    generator = torch.Generator().manual_seed(seed)
    for module in vq.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@torch.no_grad()
def lay_codebook(vq: JanusVQVAE, pixels: Tensor, seed: int) -> None:
    """Put the codes where the latents of some pictures are: k-means on the unit sphere."""
    latents = encode(vq, pixels)[1].flatten(0, 1)
    centres, _ = kmeans2(latents.double().numpy(), vq.config.num_embeddings, minit="++", seed=seed, iter=10, missing="warn")
    vq.quantize.embedding.weight.copy_(F.normalize(torch.from_numpy(centres).float(), dim=-1))
