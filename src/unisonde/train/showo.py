"""How a Show-o twin learns: image codes first, then one Phi for drawing (masked codes) and for writing (the next token).

The codes of a twin are named before anything is trained, as in `image_codes`: Tabletop has few distinct patches. A patch is a
background, a colour over it and the share of each pixel that the colour covers, and the signs of its code say these three, in that
order; of the covers, those that look alike have like signs.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unisonde.data.item import Task
from unisonde.data.tabletop.render import coverage
from unisonde.data.tabletop.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene
from unisonde.models.base import Generation
from unisonde.models.parts import magvit2
from unisonde.models.parts.magvit2 import Magvit2
from unisonde.models.parts.showo_network import Showo, twin
from unisonde.models.parts.text import pad
from unisonde.models.showo import Drawing, Encoded, ShowO
from unisonde.train.export import new_folder, save_json, save_own, save_weights
from unisonde.train.image_codes import PATCH, crowd, patch_codes, pixels_of
from unisonde.train.loop import Effort, Schedule, fit
from unisonde.train.tabletop_batches import Example, word_tokenizer

END, USER, ASSISTANT = "<|endoftext|>", "USER", "ASSISTANT"

GENERATION: dict[Task, Generation] = {
    "text": Generation(tokens=96, temperature=0.0),
    "image": Generation(temperature=0.0, guidance=2.0, steps=16),
}
"""The twin's sampling settings. Its world is small and exact, so it takes the likeliest codes, with less guidance than published."""

CODES = Schedule(steps=1600, rate=2e-3, warmup=50, weight_decay=0.0)
JOINT = Schedule(steps=1900, rate=2e-3, matrix_rate=0.02, warmup=60, weight_decay=0.02)
BATCH = 12
COVER_BITS = 6
"""Signs of a code that say which pixels of a patch are covered."""
WEIGHT = 5.0
"""How much a patch with a shape in it counts for the image tokenizer, beside a plain one: most of a picture is plain."""


def new_twin(seed: int) -> ShowO:
    """An untrained twin."""
    tokenizer = word_tokenizer((END, USER, ASSISTANT), END, END, END)
    torch.manual_seed(seed)
    network, codes = Showo(twin(len(tokenizer))), Magvit2(magvit2.twin())
    initialise(network, seed)
    initialise_codes(codes, seed)
    return ShowO(network, codes, tokenizer, "twin/showo", generation=GENERATION)


RESIDUAL_OUTPUTS = ("dense.weight", "fc2.weight")


@torch.no_grad()
def initialise(network: Showo, seed: int) -> None:
    """Weights that keep the scale of what they are given (LeCun), embeddings of half unit size, quiet residual branches."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        if weight.ndim < 2:  # norms and biases are right
            continue
        std = 0.5 if name.endswith("embed_tokens.weight") else weight.shape[1] ** -0.5
        weight.normal_(std=0.3 * std if name.endswith(RESIDUAL_OUTPUTS) else std, generator=generator)


# ------------------------------------------------------------------------------------------------------------------ image codes


@cache
def covers() -> tuple[Tensor, Tensor]:
    """The shares of a patch's pixels that a colour can cover, (K, 16), none first; and the number of each, (K,)."""
    split = [coverage(shape, size).reshape(2, PATCH, 2, PATCH).swapaxes(1, 2).reshape(4, -1) for shape in SHAPES for size in SIZES]
    distinct = torch.from_numpy(np.unique(np.concatenate([np.zeros((1, PATCH**2)), *split]), axis=0))
    return distinct, halved(distinct, COVER_BITS)


@cache
def code_names(bits: int) -> Tensor:
    """The code of each distinct patch of Tabletop: (K,).

    Raises:
        ValueError: there are not enough bits.
    """
    colour_bits, ground_bits = (math.ceil(math.log2(len(of))) for of in (COLOURS, BACKGROUNDS))
    if ground_bits + colour_bits + COVER_BITS > bits:
        raise ValueError(f"a code of Tabletop takes {ground_bits} + {colour_bits} + {COVER_BITS} bits, there are {bits}")
    numbers = {patch.tobytes(): k for k, patch in enumerate(patch_codes().patches)}
    names = torch.full((len(numbers),), -1)
    shares = [share[:, None] for share in covers()[0].numpy()]
    for (ground, under), (colour, over), (cover, share) in itertools.product(
        enumerate(BACKGROUNDS.values()), enumerate(COLOURS.values()), zip(covers()[1].tolist(), shares, strict=True)
    ):
        patch = (share * np.array(over) + (1 - share) * np.array(under)).round().astype(np.uint8)
        number = numbers[patch.tobytes()]
        if names[number] < 0:  # a plain patch has no colour, and some look the same in two ways: the first counts
            names[number] = ((ground << colour_bits) + colour << COVER_BITS) + cover
    return names


def halved(vectors: Tensor, bits: int) -> Tensor:
    """A number of `bits` bits for each of (K, d): the first says on which side of the middle it lies, along the direction in which all
    differ most, the next the same within its half, and so on."""
    names = torch.zeros(len(vectors), dtype=torch.long)

    def halve(members: Tensor, value: int) -> None:
        if len(members) < 2:
            return
        look = vectors[members] - vectors[members].mean(0)
        direction = torch.linalg.svd(look, full_matrices=False)[2][0]
        direction = direction * direction[direction.abs().argmax()].sign()  # either sign is a direction: take one for good
        low, high = members[(look @ direction).argsort(stable=True)].tensor_split(2)
        names[high] += value
        halve(low, value // 2)
        halve(high, value // 2)

    halve(torch.arange(len(vectors)), 2 ** (bits - 1))
    return names


def codes_of(scenes: list[Scene], bits: int) -> Tensor:
    """The codes of pictures: (B, 64)."""
    return code_names(bits)[patch_codes().of(scenes)]


def code_loss(tokenizer: Magvit2, scenes: list[Scene]) -> Tensor:
    """The decoder's error given the right codes, and how surely the encoder's signs say them."""
    pixels, codes = pixels_of(scenes), codes_of(scenes, tokenizer.config.bits)
    drawn = tokenizer.decode(codes)
    error = patches((drawn - pixels).abs() + (drawn - pixels).square()).mean(-1)
    plain = codes % 2**COVER_BITS == covers()[1][0]
    weights = torch.where(plain, 1.0, WEIGHT)
    right = tokenizer.quantize.embedding[codes]
    said = tokenizer.encoder(pixels).flatten(2).transpose(1, 2)
    return (weights * error).sum() / weights.sum() + 0.1 * F.softplus(-4 * right * said).mean()


def patches(pixels: Tensor) -> Tensor:
    """(B, 3, 32, 32) -> (B, 64, 48), row by row."""
    return F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)


def train_codes(tokenizer: Magvit2, checkpoint: Path, seed: int = 0, schedule: Schedule = CODES) -> Effort:
    """Train encoder and decoder in place, on pictures of any things in any colours."""

    def loss(step: int) -> Tensor:
        rng = random.Random(f"{seed}/codes/{step}")
        return code_loss(tokenizer, [crowd(rng) for _ in range(BATCH)])

    effort = fit("image codes", tokenizer.train(), loss, schedule, checkpoint, BATCH)
    tokenizer.eval()
    return effort


@torch.no_grad()
def initialise_codes(tokenizer: Magvit2, seed: int) -> None:
    """Convolutions that keep the scale of their input, residual branches that begin at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in tokenizer.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith(("conv2", "proj_out")):
                nn.init.zeros_(module.weight)


# ---------------------------------------------------------------------------------------------------------------- words, pictures


@dataclass(frozen=True)
class Batch:
    """Examples of one kind as the model sees them in use, by its own templates.

    Attributes:
        prompts: with the guidance's empty prompt for some drawings.
        codes: of the pictures that are drawn or shown, (B, n).
        masked: (B, n), the codes to be guessed, of drawings.
        responses: token ids of text responses, with the end.
    """

    prompts: list[Encoded]
    codes: Tensor | None = None
    masked: Tensor | None = None
    responses: list[list[int]] | None = None


def collate(model: ShowO, examples: Sequence[Example], rng: random.Random, unconditional: float = 0.1) -> Batch:
    """A batch of examples of one kind.

    Args:
        rng: draws which codes are masked, and which drawings go without a prompt.
        unconditional: the share of those.
    """
    kind, scenes = examples[0].kind, [made.scene for made in examples]
    codes = None if kind == "infer" else codes_of(scenes, model.image_codes.config.bits)
    if kind == "draw":
        texts = ["" if rng.random() < unconditional else made.prompt for made in examples]
        return Batch(
            [model.assemble(text, "image") for text in texts], codes, torch.stack([_mask(model.codes, rng) for _ in texts])
        )
    # Of the pixels only that there are some: the codes are known.
    shown = None if codes is None else torch.empty(0)
    prompts = [model.assemble(made.prompt, "text", shown) for made in examples]
    responses = [model.tokenizer(made.response, add_special_tokens=False)["input_ids"] + [model.eos_id] for made in examples]
    return Batch(prompts, codes, None, responses)


def _mask(codes: int, rng: random.Random) -> Tensor:
    """Which codes of a picture are masked: as published, a share that is the cosine of an even draw, and one at least."""
    count = max(1, round(codes * math.cos(rng.random() * math.pi / 2)))
    masked = torch.zeros(codes, dtype=torch.bool)
    masked[rng.sample(range(codes), count)] = True
    return masked


def joint_loss(model: ShowO, batch: Batch) -> Tensor:
    """Cross-entropy in nats a token: of masked codes for drawings, of the response's words otherwise."""
    if batch.responses is None:
        assert batch.codes is not None and batch.masked is not None
        drawing = Drawing(model.network, *pad([p.ids for p in batch.prompts], model.pad_id, "right"))
        drawing.read_prompts()
        logits = drawing.step(batch.codes, batch.masked)
        return F.cross_entropy(logits[batch.masked].float(), batch.codes[batch.masked])
    features = None if batch.codes is None else model.embed_codes(batch.codes)
    states = model.read(batch.prompts, model.embed(batch.prompts, features), batch.responses)
    # The state before a token predicts it.
    before = [
        states[k, len(p.ids) - 1 : len(p.ids) - 1 + len(r)]
        for k, (p, r) in enumerate(zip(batch.prompts, batch.responses, strict=True))
    ]
    words = torch.tensor([token for response in batch.responses for token in response])
    return F.cross_entropy(model.network.logits(torch.cat(before)).float(), words)


# ---------------------------------------------------------------------------------------------------------------------- writing


def export(model: ShowO, out: Path, record: dict[str, Any] | None = None) -> None:
    """Write a folder that `unisonde.load` opens, in the published layout: weights in float16, the image tokenizer in `magvitv2/`.

    Raises:
        ValueError: `out` already holds files.
    """
    with new_folder(out, "magvitv2") as folder:
        save_weights(model.network.state_dict(), folder / "model.safetensors")
        save_json(model.config.to_dict(), folder / "config.json")
        save_weights(model.image_codes.state_dict(), folder / "magvitv2/model.safetensors")
        save_json(model.image_codes.config.to_dict(), folder / "magvitv2/config.json")
        model.tokenizer.save_pretrained(folder)
        save_own(model, folder, record)
