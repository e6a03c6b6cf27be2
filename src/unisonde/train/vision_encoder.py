"""The two encoders of the pair `vision-smollm-aligned` and `vision-smollm-masked`: one network, the same pictures, two objectives.

| objective | what is learnt | thrown away afterwards |
|---|---|---|
| aligned | which caption of a batch belongs to which picture (contrastive, as CLIP: arXiv 2103.00020) | a small text tower, two maps |
| masked | the pixels of patches that were left out (as MAE: arXiv 2111.06377) | a small decoder |

Pictures are those of `unisonde.data.tabletop.textured`, half of them of things that are alike, half mixed. Captions name neither
texture nor size, so only the second objective needs them.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipTextConfig, SiglipTextModel, SiglipVisionModel
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from unisonde.data.tabletop.grammar import NUMBERS
from unisonde.data.tabletop.render import render_array
from unisonde.data.tabletop.scene import COLOURS, COLUMNS, ROWS, SHAPES, TEXTURES, Scene
from unisonde.data.tabletop.textured import Part, alike, caption, mixed
from unisonde.train.image_codes import to_pixels
from unisonde.train.loop import Effort, Schedule, autocast_dtype, fit

HELD_OUT = 256
"""Held-out pictures, for the figures."""
SHOWN = 24
"""Patches of 64 that the masked encoder is shown; the others it has to make up."""
LONGEST = 40
"""Words of a caption."""


def scene(rng: random.Random, split: Part = "train") -> Scene:
    """A picture to learn from, or one of another split."""
    return alike(rng, split, rng.choice(TEXTURES)) if rng.random() < 0.5 else mixed(rng, split)


def pixels_of(scenes: list[Scene]) -> Tensor:
    """(B, 3, 32, 32) in [-1, 1]."""
    return to_pixels(np.stack([render_array(one) for one in scenes]))


def train_encoder(
    objective: str,
    encoder: SiglipVisionModel,
    schedule: Schedule,
    checkpoint: Path,
    size: int = 64,
    batches: int = 2,
    precision: str = "auto",
    seed: int = 0,
) -> tuple[Effort, dict[str, float]]:
    """Train an encoder in place; the time it took, and figures of held-out pictures.

    The weights it starts from, and the pictures that it sees, depend on the seed and not on the objective.
    """
    initialise(encoder, seed)
    network: Aligned | Masked = Aligned(encoder) if objective == "aligned" else Masked(encoder)
    network.beginning(seed)
    dtype = autocast_dtype(precision)

    def loss(number: int) -> Tensor:
        rng = random.Random(f"{seed}/encoder/{number}")
        scenes = [scene(rng) for _ in range(size)]
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False):
            return network.loss(scenes, rng)

    network.requires_grad_(True).train()
    effort = fit(f"{objective} encoder", network, loss, schedule, checkpoint, size * batches, batches)
    network.requires_grad_(False).eval()
    rng = random.Random(f"{seed}/held out")
    return effort, network.figures([scene(rng, "test") for _ in range(HELD_OUT)], rng)


@torch.no_grad()
def initialise(network: nn.Module, seed: int) -> None:
    """Weights that keep the scale of what they are given (LeCun), small embeddings, branches that begin near zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            inputs = module.weight[0].numel()
            small = 0.1 if name.endswith(("out_proj", "fc2")) else 1.0
            module.weight.normal_(std=small * inputs**-0.5, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(std=0.3, generator=generator)


class Aligned(nn.Module):
    """An encoder and a text tower that agree on pairs of picture and caption."""

    def __init__(self, encoder: SiglipVisionModel, layers: int = 2) -> None:
        super().__init__()
        vision: SiglipVisionConfig = encoder.config
        width = vision.hidden_size
        config = SiglipTextConfig(
            vocab_size=len(words()) + 1,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=vision.num_attention_heads,
            max_position_embeddings=LONGEST,
        )
        self.encoder = encoder
        self.text = SiglipTextModel(config)
        self.of_picture = nn.Linear(width, width, bias=False)
        self.of_text = nn.Linear(width, width, bias=False)
        self.sharpness = nn.Parameter(torch.tensor(2.0))

    def beginning(self, seed: int) -> None:
        for number, part in enumerate((self.text, self.of_picture, self.of_text)):
            initialise(part, seed + 1 + number)

    def pictures(self, pixels: Tensor) -> Tensor:
        """Unit vectors (B, d)."""
        return F.normalize(self.of_picture(self.encoder(pixels).last_hidden_state.mean(1)).float(), dim=-1)

    def captions(self, texts: list[str]) -> Tensor:
        """Unit vectors (B, d)."""
        rows = [[words()[word] for word in split(text)] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [len(words())] * (longest - len(row)) for row in rows])
        there = (ids < len(words())).float()
        hidden = self.text.embeddings(input_ids=ids)
        mask = torch.zeros(len(rows), 1, 1, longest).masked_fill(there[:, None, None] == 0, -1e9)
        states = self.text.final_layer_norm(
            self.text.encoder(inputs_embeds=hidden, attention_mask=mask.to(hidden.dtype)).last_hidden_state
        )
        pooled = (states * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        return F.normalize(self.of_text(pooled).float(), dim=-1)

    def loss(self, scenes: list[Scene], rng: random.Random) -> Tensor:
        """Cross-entropy, both ways, of who belongs to whom; equal captions belong to each other's pictures, too."""
        texts = [caption(one) for one in scenes]
        logits = self.sharpness.exp().clamp(max=100) * self.pictures(pixels_of(scenes)) @ self.captions(texts).T
        same = torch.tensor([[a == b for b in texts] for a in texts]).float()
        same = same / same.sum(1, keepdim=True)
        return 0.5 * (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same))

    @torch.no_grad()
    def figures(self, scenes: list[Scene], rng: random.Random) -> dict[str, float]:
        """`accuracy`: the share of pictures whose own caption is the nearest of all."""
        texts = [caption(one) for one in scenes]
        nearest = (self.pictures(pixels_of(scenes)) @ self.captions(texts).T).argmax(1)
        right = sum(texts[k] == text for k, text in zip(nearest.tolist(), texts, strict=True))
        return {"pictures": len(scenes), "accuracy": right / len(texts)}


@cache
def words() -> dict[str, int]:
    """The words of captions, numbered."""
    held = (*NUMBERS[1:], "shape", "shapes", ":", ",", ".", "and", "a", "an", "at", "the", *COLOURS, *SHAPES, *ROWS, *COLUMNS)
    return {word: k for k, word in enumerate(dict.fromkeys(held))}


def split(text: str) -> list[str]:
    for mark in ":,.":
        text = text.replace(mark, f" {mark}")
    return text.split()


class Masked(nn.Module):
    """An encoder that sees some patches, and a decoder that makes up the others."""

    def __init__(self, encoder: SiglipVisionModel, layers: int = 2) -> None:
        super().__init__()
        config: Any = encoder.config
        small: Any = SiglipVisionConfig(
            **{**config.to_dict(), "num_hidden_layers": layers, "intermediate_size": 2 * config.hidden_size}
        )
        small._attn_implementation = config._attn_implementation
        self.encoder = encoder
        self.hidden = nn.Parameter(torch.zeros(config.hidden_size))
        self.places = nn.Embedding(encoder.embeddings.num_patches, config.hidden_size)
        self.decoder = SiglipEncoder(small)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.patch: int = config.patch_size
        self.pixels = nn.Linear(config.hidden_size, 3 * self.patch**2)

    def beginning(self, seed: int) -> None:
        for number, part in enumerate((self.places, self.decoder, self.pixels)):
            initialise(part, seed + 1 + number)

    def made_up(self, pixels: Tensor, shown: Tensor) -> Tensor:
        """Patches (B, n, 48) from those that are shown, (B, m) numbers."""
        embedded = self.encoder.embeddings(pixels)
        index = shown[..., None].expand(-1, -1, embedded.shape[-1])
        seen = self.encoder.encoder(inputs_embeds=embedded.gather(1, index)).last_hidden_state
        seen = self.encoder.post_layernorm(seen)
        slots = self.hidden.to(seen.dtype).expand(len(pixels), embedded.shape[1], -1).scatter(1, index, seen)
        states = self.decoder(inputs_embeds=slots + self.places.weight).last_hidden_state
        return self.pixels(self.norm(states))

    def error(self, scenes: list[Scene], rng: random.Random) -> tuple[Tensor, Tensor]:
        """Squared error of every patch, (B, n), and which patches were not shown."""
        pixels = pixels_of(scenes)
        count = self.encoder.embeddings.num_patches
        shown = torch.tensor([rng.sample(range(count), SHOWN) for _ in scenes])
        there = torch.zeros(len(scenes), count, dtype=torch.bool).scatter(1, shown, True)
        wanted = F.unfold(pixels, self.patch, stride=self.patch).transpose(1, 2)
        return (self.made_up(pixels, shown).float() - wanted).square().mean(-1), ~there

    def loss(self, scenes: list[Scene], rng: random.Random) -> Tensor:
        """Mean squared error of the patches that were not shown."""
        error, left = self.error(scenes, rng)
        return error[left].mean()

    @torch.no_grad()
    def figures(self, scenes: list[Scene], rng: random.Random) -> dict[str, float]:
        """`error`: the mean squared error of patches that were not shown, of those that are no background; `constant`: that of the
        best single colour for all of them."""
        pixels = pixels_of(scenes)
        error, left = self.error(scenes, rng)
        wanted = F.unfold(pixels, self.patch, stride=self.patch).transpose(1, 2).unflatten(2, (3, -1))
        things = left & (wanted.amax(-1) - wanted.amin(-1) > 0.05).any(-1)
        held = wanted[things]
        constant = (held - held.mean((0, 2), keepdim=True)).square().mean()
        return {"pictures": len(scenes), "error": float(error[things].mean()), "constant": float(constant)}
