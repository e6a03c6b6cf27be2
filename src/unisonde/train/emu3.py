"""How an Emu3 twin learns: image codes first, then one transformer for drawing and writing, codes and words being one vocabulary.

The codes of a twin are named before anything is trained, as in `image_codes`: Tabletop has few distinct patches. What is trained of the
tokenizer is the encoder that names them and the decoder that draws them; its running statistics stay as they were built, as the
tokenizer of Emu3 is always in evaluation mode.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Emu3ForConditionalGeneration
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor
from transformers.models.emu3.modeling_emu3 import Emu3VQVAE

from unisonde.data.item import Item, Task
from unisonde.data.tabletop.scene import SIDE, Scene
from unisonde.models.base import Generation
from unisonde.models.emu3 import BOS, EOS, PAD, SPECIAL_TOKENS, Emu3, code_word, twin
from unisonde.models.parts.segments import Segment, encode
from unisonde.models.parts.text import pad
from unisonde.train.export import new_folder, save_hub_layout, save_own
from unisonde.train.image_codes import GRID, PATCH, code_weights, crowd, patch_codes, pixels_of
from unisonde.train.loop import Effort, Schedule, fit
from unisonde.train.tabletop_batches import Example, word_tokenizer

GENERATION: dict[Task, Generation] = {
    "text": Generation(tokens=96, temperature=0.0),
    "image": Generation(temperature=0.0, guidance=2.0),
}
"""The twin's sampling settings. Its world is small and exact, so it takes the likeliest codes, with less guidance than published."""

CODES = Schedule(steps=1600, rate=2e-3, warmup=50, weight_decay=0.0)
BATCH = 12
FIGURE = 4.0
"""What a code, or a patch, of a figure counts against one of the plain background. Most are background, soon known."""
SHARPNESS = 16.0
"""Inverse temperature of the encoder's choice among unit codes."""


def new_twin(seed: int) -> Emu3:
    """An untrained twin."""
    codes = len(patch_codes())
    template_words = ("USER", "ASSISTANT", f"{GRID}*{GRID}")
    tokenizer = word_tokenizer((*SPECIAL_TOKENS, *template_words, *map(code_word, range(codes))), BOS, EOS, PAD)
    torch.manual_seed(seed)
    network = Emu3ForConditionalGeneration(twin(tokenizer.get_vocab(), codes))
    initialise(network, seed)
    initialise_codes(network.model.vqmodel, seed)
    processor = Emu3ImageProcessor(
        image_mean=[0.5] * 3, image_std=[0.5] * 3, min_pixels=SIDE**2, max_pixels=SIDE**2, spatial_factor=PATCH
    )
    name = "twin/emu3"
    return Emu3(network, tokenizer, processor, name, None, system="", positive="", negative="", area=SIDE**2, generation=GENERATION)


RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")


@torch.no_grad()
def initialise(network: Emu3ForConditionalGeneration, seed: int) -> None:
    """Weights that keep the scale of what they are given (LeCun), embeddings of half unit size, quiet residual branches."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in [*network.model.text_model.named_parameters(), *network.lm_head.named_parameters()]:
        if weight.ndim < 2:  # norms are right
            continue
        std = 0.5 if name.endswith("embed_tokens.weight") else weight.shape[1] ** -0.5
        weight.normal_(std=0.3 * std if name.endswith(RESIDUAL_OUTPUTS) else std, generator=generator)


# ------------------------------------------------------------------------------------------------------------------ image codes


def latents(vq: Emu3VQVAE, pixels: Tensor) -> Tensor:
    """What the encoder says of each patch: (B, 3, H, W) -> (B, n, e). The code is the nearest in the codebook."""
    film = pixels[:, None].expand(-1, vq.config.temporal_downsample_factor, -1, -1, -1)
    return vq.quant_conv(vq.encoder(film).transpose(1, 2)).flatten(2).transpose(1, 2)


def drawn(vq: Emu3VQVAE, quantised: Tensor) -> Tensor:
    """Pixel values from code vectors: (B, n, e) -> (B, 3, H, W), the first frame of the film that the decoder draws."""
    latent = quantised.transpose(1, 2).unflatten(2, (1, GRID, GRID))
    film = vq.decoder(vq.post_quant_conv(latent).transpose(1, 2), latent.transpose(1, 2))
    return film.unflatten(0, (len(quantised), -1))[:, 0]


def code_loss(vq: Emu3VQVAE, scenes: list[Scene]) -> Tensor:
    """The decoder's error given the right codes, and how surely the encoder names them."""
    pixels, codes = pixels_of(scenes), patch_codes().of(scenes)
    book = F.normalize(vq.quantize.embedding.weight, dim=-1)
    error = drawn(vq, book[codes]) - pixels
    each = F.unfold(error.abs() + error.square(), PATCH, stride=PATCH).mean(1)
    weights = code_weights(codes, FIGURE)
    # The encoder learns names, and does not pull the codebook.
    choice = SHARPNESS * (F.normalize(latents(vq, pixels), dim=-1) @ book.detach().T)
    return (weights * each).sum() / weights.sum() + 0.1 * F.cross_entropy(choice.flatten(0, 1), codes.flatten())


def train_codes(vq: Emu3VQVAE, checkpoint: Path, seed: int = 0, schedule: Schedule = CODES) -> Effort:
    """Train encoder, codebook and decoder in place, on pictures of any things in any colours."""

    def loss(step: int) -> Tensor:
        rng = random.Random(f"{seed}/codes/{step}")
        return code_loss(vq, [crowd(rng) for _ in range(BATCH)])

    effort = fit("image codes", vq, loss, schedule, checkpoint, BATCH)
    settle(vq)
    return effort


@torch.no_grad()
def settle(vq: Emu3VQVAE) -> None:
    """Give the codebook the unit length that training gave it: of unit codes, the nearest is the one that points the same way."""
    vq.quantize.embedding.weight.copy_(F.normalize(vq.quantize.embedding.weight, dim=-1))


@torch.no_grad()
def initialise_codes(vq: Emu3VQVAE, seed: int) -> None:
    """A network that passes on what it is given, and a codebook that holds what the patches look like.

    Convolutions keep the scale of their input (LeCun), residual branches begin at zero, those over time as the identity on the newest
    frame; the norms of the decoder scale by one, and add what the code says.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in vq.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=generator)
            if module.bias is not None:
                module.bias.fill_(1.0 if name.endswith("conv_y") else 0.0)
            if name.endswith(("conv2", "out_proj", "conv_y")):
                nn.init.zeros_(module.weight)
        elif isinstance(module, nn.Conv3d):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
            if not name.endswith("conv2.conv"):
                height, width = module.weight.shape[-2:]
                module.weight[:, :, -1, height // 2, width // 2] = torch.eye(*module.weight.shape[:2])
    patches = torch.from_numpy(patch_codes().patches).double() / 127.5 - 1
    centred = patches - patches.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    look = centred @ directions[: vq.config.embed_dim].T
    book = vq.quantize.embedding.weight
    book.copy_(F.normalize(look / look.std(0) ** 0.5, dim=-1).to(book))


# ---------------------------------------------------------------------------------------------------------------- words, pictures


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right: ids (B, L), the token after each position, -100 where nothing is learnt, and what each counts."""

    ids: Tensor
    next_token: Tensor
    weights: Tensor


def collate(model: Emu3, examples: Sequence[Example], rng: random.Random, unconditional: float = 0.1) -> Batch:
    """Examples of one kind as the model will see them in use: its own templates, the response after them.

    Args:
        rng: draws which drawings go without a prompt.
        unconditional: the share of those.
    """
    kind = examples[0].kind
    grids = patch_codes().of([made.scene for made in examples]).unflatten(1, (GRID, GRID))
    sequences, starts, weights = [], [], []
    for made, codes in zip(examples, grids, strict=True):
        item = Item("", "", made.prompt)
        if kind == "draw":
            prompt = model.unconditional() if rng.random() < unconditional else tokens(model, model.segments(item, "image"))
            response = model.sequence_of(codes)
            # The marks of a picture stand where they must, and are not learnt.
            each = F.pad(code_weights(codes.view(1, -1), FIGURE).view_as(codes), (0, 1)).flatten().tolist() + [0.0] * 3
        else:
            shown = codes if kind in ("caption", "answer") else None
            prompt = tokens(model, model.segments(item, "text", shown))
            response = [*model.tokenizer(made.response, add_special_tokens=False)["input_ids"], model.eos_id]
            each = [1.0] * len(response)
        sequences.append(prompt + response)
        starts.append(len(prompt))
        weights.append(each)
    ids, _ = pad(sequences, model.pad_id, "right")
    next_token, counts = torch.full_like(ids, -100), torch.zeros(ids.shape)
    for row, (sequence, start, each) in enumerate(zip(sequences, starts, weights, strict=True)):
        place = slice(start - 1, len(sequence) - 1)
        counts[row, place] = torch.tensor(each)
        next_token[row, place] = torch.tensor(sequence[start:])
    return Batch(ids, torch.where(counts > 0, next_token, -100), counts)


def tokens(model: Emu3, segments: Sequence[Segment]) -> list[int]:
    return encode(model.tokenizer, segments, special=False)[0]


def joint_parts(model: Emu3) -> nn.ModuleList:
    """What is trained jointly: everything but the image tokenizer."""
    return nn.ModuleList([model.network.model.text_model, model.network.lm_head])


def joint_loss(model: Emu3, batch: Batch) -> Tensor:
    """Cross-entropy of the response over the whole vocabulary, in nats a token, each as much as it counts."""
    states = model.network.model.text_model(input_ids=batch.ids, use_cache=False).last_hidden_state
    learnt = batch.next_token != -100
    each = F.cross_entropy(model.network.lm_head(states[learnt]).float(), batch.next_token[learnt], reduction="none")
    weights = batch.weights[learnt]
    return (each * weights).sum() / weights.sum()


# ---------------------------------------------------------------------------------------------------------------------- writing


def export(model: Emu3, out: Path, record: dict[str, Any] | None = None) -> None:
    """Write a folder that `unisonde.load` opens: weights in float16, configuration, tokenizer, image processor, settings, record.

    Raises:
        ValueError: `out` already holds files.
    """
    with new_folder(out) as folder:
        save_hub_layout(model, folder)
        save_own(model, folder, record, **{name: getattr(model, name) for name in ("system", "positive", "negative", "area")})
