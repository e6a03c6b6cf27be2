"""How a JanusFlow twin is made: an autoencoder of pictures first, then one Llama for drawing and writing together.

Drawing is learnt by flow matching: at a random time t between noise z0 and a latent x, the network sees z = (1 - t) z0 + t x and
is asked for x - z0. The paper draws times from a logit-normal distribution; here they lean towards noise, where there is nothing to go
by but the prompt. Some drawings are learnt without one, masked as guidance masks it. Writing is learnt by cross-entropy of the response.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from unisonde.data.item import Item, Task
from unisonde.data.tabletop.scene import Scene
from unisonde.models.base import Generation
from unisonde.models.janusflow import (
    ASSISTANT,
    BOS,
    EOS,
    PAD,
    SPECIAL_TOKENS,
    USER,
    JanusFlow,
    image_slots,
    twin_autoencoder,
)
from unisonde.models.parts import siglip
from unisonde.models.parts.flow_llama import KEYS, TOWER, Branches, JanusFlowNetwork, branches, twin
from unisonde.models.parts.segments import encode
from unisonde.models.parts.siglip import Pictures
from unisonde.models.parts.text import pad
from unisonde.models.trace import Span
from unisonde.train.export import new_folder, save_json, save_own, save_weights
from unisonde.train.image_codes import pixels_of
from unisonde.train.loop import Effort, Schedule, fit
from unisonde.train.tabletop_batches import Example, word_tokenizer

GENERATION: dict[Task, Generation] = {
    "text": Generation(tokens=96, temperature=0.0),
    "image": Generation(guidance=2.0, steps=30),
}
"""The twin's sampling settings: the published ones, and greedy text of at most 96 tokens."""

EMPHASIS = 10.0
KL_WEIGHT = 1e-2
"""Of the autoencoder's latents towards a standard normal, against the error of its pictures."""

LEANING = 1.2
"""Times are u ** LEANING, u uniform. With logit-normal times the prompt was hardly used after 240 steps: of the velocity at t = 0,
99% of the variance was left, against 41% after 120 steps so. Leaning further, towards 1.5, leaves what is near the data unsharp."""

LOG_VARIANCE = -5.0
"""Of the latents at the start. From 0 the first hundreds of steps go into latents large enough to be heard above their own noise."""


def new_twin(seed: int) -> JanusFlow:
    """An untrained twin. Role names are words of its tokenizer, as they are plain text in the published templates."""
    tokenizer = word_tokenizer((*SPECIAL_TOKENS, USER, ASSISTANT), BOS, EOS, PAD)
    torch.manual_seed(seed)
    config = twin(len(tokenizer))
    network, autoencoder = JanusFlowNetwork(config), twin_autoencoder()
    # On a CPU and at these lengths the plain attention is faster than the fused kernel.
    network.language_model.set_attn_implementation("eager")
    initialise(network, seed)
    initialise_autoencoder(autoencoder, seed)
    pictures = Pictures(config.side, min_size=1)
    return JanusFlow(network, autoencoder, tokenizer, pictures, "twin/janusflow", system="", generation=GENERATION)


RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight", "channelwise_linear_2.weight")


@torch.no_grad()
def initialise(network: JanusFlowNetwork, seed: int) -> None:
    """Weights that keep the scale of what they are given (LeCun), embeddings of half unit size, quiet residual branches and times."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        if name.endswith("bias") and weight.ndim == 1:
            weight.zero_()
        if weight.ndim < 2 or "channelwise_norm" in name:
            continue
        std = 0.5 if name.endswith(("embed_tokens.weight", "beg_of_und_embed")) else weight[0].numel() ** -0.5
        quiet = name.endswith(RESIDUAL_OUTPUTS) or "cond_embeds_mapper" in name or "out_convs" in name or "gen_enc_aligner" in name
        weight.normal_(std=0.3 * std if quiet else std, generator=generator)


@torch.no_grad()
def initialise_autoencoder(autoencoder: AutoencoderKL, seed: int) -> None:
    """Start from a network that passes on what it is given: pixel by pixel, residual branches at zero, latents almost certain.

    Convolutions keep the scale of their input (LeCun). Off the centre their taps are a tenth of that, or four random blurs in a row
    would have to be undone before anything sharp comes through.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in autoencoder.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=generator)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
        if name.endswith("conv2"):
            nn.init.zeros_(module.weight)
        elif module.kernel_size == (3, 3) and not name.endswith("conv1"):
            centre = 3 * module.weight[:, :, 1, 1]
            module.weight.mul_(0.1)[:, :, 1, 1] = centre
    certainty = slice(autoencoder.config.latent_channels, None)
    autoencoder.quant_conv.weight[certainty].zero_()
    autoencoder.quant_conv.bias[certainty] = LOG_VARIANCE


# ----------------------------------------------------------------------------------------------------------------- autoencoder


def train_autoencoder(
    model: JanusFlow, scenes: Callable[[random.Random], list[Scene]], schedule: Schedule, checkpoint: Path, seed: int = 0
) -> Effort:
    """Train the autoencoder of `model` in place, and set its scale so that latents have unit variance.

    Args:
        scenes: the pictures of one step.
    """
    autoencoder = model.autoencoder.train()

    def loss(step: int) -> Tensor:
        pixels = pixels_of(scenes(random.Random(f"{seed}/autoencoder/{step}")))
        return autoencoder_loss(autoencoder, pixels, torch.Generator().manual_seed(step))

    batch = len(scenes(random.Random(0)))
    effort = fit("autoencoder", autoencoder, loss, schedule, checkpoint, batch)
    autoencoder.eval()
    with torch.no_grad():
        shown = pixels_of([scene for k in range(8) for scene in scenes(random.Random(f"{seed}/scale/{k}"))])
        spread = autoencoder.encode(shown).latent_dist.mode().std()
    autoencoder.register_to_config(scaling_factor=1 / float(spread))
    return effort


def autoencoder_loss(autoencoder: AutoencoderKL, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """The error of pictures decoded from drawn latents, and the latents' divergence from a standard normal.

    What stands on a plain background is a small part of a picture and counts `EMPHASIS` times.
    """
    posterior = autoencoder.encode(pixels).latent_dist
    error = autoencoder.decode(posterior.sample(generator)).sample - pixels
    ground = pixels.flatten(2).median(-1).values[..., None, None]
    weight = torch.where((pixels != ground).any(1, keepdim=True), EMPHASIS, 1.0).expand_as(pixels)
    divergence = posterior.kl().mean() / posterior.mean[0].numel()
    return ((error.abs() + error.square()) * weight).sum() / weight.sum() + KL_WEIGHT * divergence


@torch.no_grad()
def latents_of(model: JanusFlow, scenes: Sequence[Scene]) -> Tensor:
    """What is to be drawn: (B, c, H, W), of unit variance."""
    return model.autoencoder.encode(pixels_of(list(scenes))).latent_dist.mode() * model.autoencoder.config.scaling_factor


# ----------------------------------------------------------------------------------------------------------------------- twin


@dataclass(frozen=True)
class Drawing:
    """Prompts (B, L) with their masks, latents to be drawn, noise and times: z0 and x (B, c, H, W), t (B,)."""

    prompts: Branches
    latents: Tensor
    noise: Tensor
    times: Tensor


@dataclass(frozen=True)
class Writing:
    """Sequences padded on the right: ids (B, L), the token after each position or -100, and where pixels go."""

    ids: Tensor
    next_token: Tensor
    where: Tensor
    pixels: Tensor | None = None


def collate(
    model: JanusFlow, examples: Sequence[Example], rng: random.Random, unconditional: float, latents: Tensor | None = None
) -> Drawing | Writing:
    """Examples of one kind as the model will see them in use: its own templates, the response after them.

    Args:
        unconditional: share of drawings without their prompt.
        latents: of the examples' scenes; made here if None.
    """
    if examples[0].kind == "draw":
        return _drawing(model, examples, rng, unconditional, latents)
    return _writing(model, examples)


def _prompt(model: JanusFlow, made: Example) -> tuple[list[int], tuple[Span, ...]]:
    shown = made.kind in ("caption", "answer")
    item = Item("", "", made.prompt, Path() if shown else None)  # the path stands for a picture, whose pixels come otherwise
    return encode(model.tokenizer, model.segments(item, "image" if made.kind == "draw" else "text"))


def _drawing(
    model: JanusFlow, examples: Sequence[Example], rng: random.Random, unconditional: float, latents: Tensor | None
) -> Drawing:
    prompts = branches([_prompt(model, made)[0] for made in examples], model.pad_id, guide=True)
    count = len(examples)
    rows = torch.tensor([k + count * (rng.random() < unconditional) for k in range(count)])
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    latents = latents_of(model, [made.scene for made in examples]) if latents is None else latents
    return Drawing(
        Branches(prompts.ids[rows], prompts.mask[rows], prompts.lengths[rows]),
        latents,
        torch.randn(latents.shape, generator=generator),
        torch.rand(count, generator=generator) ** LEANING,
    )


def _writing(model: JanusFlow, examples: Sequence[Example]) -> Writing:
    sequences, starts, spans = [], [], []
    for made in examples:
        prompt, held = _prompt(model, made)
        response = model.tokenizer(made.response, add_special_tokens=False)["input_ids"]
        sequences.append([*prompt, *response, model.eos_id])
        starts.append(len(prompt))
        spans.append(held)
    ids, mask = pad(sequences, model.pad_id, "right")
    positions = torch.arange(ids.shape[1])
    learnt = (positions + 1 >= torch.tensor(starts)[:, None]) & (mask.roll(-1, 1) == 1) & (positions + 1 < ids.shape[1])
    where = image_slots(spans, [0] * len(spans), ids.shape[1])
    pixels = pixels_of([made.scene for made in examples]) if where.any() else None
    return Writing(ids, torch.where(learnt, ids.roll(-1, 1), -100), where, pixels)


def joint_loss(model: JanusFlow, batch: Drawing | Writing) -> Tensor:
    """Drawing: the mean squared error of the velocity. Writing: cross-entropy of the response, in nats a token."""
    network = model.network
    if isinstance(batch, Drawing):
        t = batch.times[:, None, None, None]
        velocity = velocity_of(network, batch.prompts, torch.lerp(batch.noise, batch.latents, t), batch.times)
        return F.mse_loss(velocity.float(), batch.latents - batch.noise)
    features = None if batch.pixels is None else network.see(batch.pixels)
    states = network.llm(inputs_embeds=network.embed(batch.ids, features, batch.where), use_cache=False).last_hidden_state
    learnt = batch.next_token != -100
    return F.cross_entropy(network.language_model.lm_head(states[learnt]).float(), batch.next_token[learnt])


def velocity_of(network: JanusFlowNetwork, prompts: Branches, z: Tensor, times: Tensor) -> Tensor:
    """The velocity at (B, c, H, W) and times (B,), in one pass over prompts and latents; `Flow` gives the same from a cache."""
    tokens, patches, embedded = network.enter(z, times)
    response = tokens.shape[1]
    places = torch.arange(prompts.ids.shape[1]).expand_as(prompts.ids)
    states = network.llm(
        inputs_embeds=torch.cat([network.embed(prompts.ids), tokens], 1),
        attention_mask=prompts.attention(response),
        position_ids=torch.cat([places, prompts.positions(response)], 1),
        use_cache=False,
    ).last_hidden_state
    return network.leave(states[:, 1 - response :], patches, embedded)


# --------------------------------------------------------------------------------------------------------------------- export


def official_tensors(network: JanusFlowNetwork) -> dict[str, Tensor]:
    """The weights under their official names, the fused ones joined again."""
    ours = network.state_dict()
    apart = siglip.keys(TOWER, network.config.vision.num_hidden_layers)
    names = [*apart, *(name for name in ours if not name.startswith("vision_und_enc_model."))]
    official: dict[str, Tensor] = {}
    for name in names:
        rename, parts = KEYS.of(name)
        tensor = torch.cat([ours[part] for part in parts])
        official[name] = tensor[None] if rename is not None and rename.squeeze else tensor
    return official


def export(model: JanusFlow, out: Path, record: dict[str, Any] | None = None) -> None:
    """Write a folder that `unisonde.load` opens, in the published layout, with the autoencoder in `vae/`; weights in float16.

    Raises:
        ValueError: `out` already holds files.
    """
    with new_folder(out, "vae") as folder:
        save_json(model.network.config.to_dict(), folder / "config.json")
        save_json(model.pictures.to_dict(), folder / "preprocessor_config.json")
        model.tokenizer.save_pretrained(folder)
        model.autoencoder.save_config(folder / "vae")
        save_weights(official_tensors(model.network), folder / "model.safetensors")
        save_weights(model.autoencoder.state_dict(), folder / "vae/diffusion_pytorch_model.safetensors")
        save_own(model, folder, record, system=model.system)
