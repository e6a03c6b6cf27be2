"""How a Show-o2 twin learns: its Wan autoencoder first, then drawing by flow matching and writing word by word together.

The autoencoder is a small one of the same class, which begins as principal components. Its encoder stays that: a map from squares of
pixels to latents in which a direction is the larger the more it changes a picture. Its decoder learns to draw clean pictures from latents
that tremble, as those of a drawing do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from torch import Tensor, nn
from transformers import PreTrainedConfig

from unisonde.data.item import Item, Task
from unisonde.models.base import Generation
from unisonde.models.parts import wan_vae
from unisonde.models.parts.showo2_network import Showo2Network, additive, shifted, twin, visible
from unisonde.models.parts.text import pad
from unisonde.models.showo2 import BOS, EOS, PAD, SPECIAL_TOKENS, Encoded, Showo2, drawing, image_places
from unisonde.train.export import new_folder, save_json, save_own, save_weights
from unisonde.train.image_codes import crowd, figures, pixels_of
from unisonde.train.loop import Effort, Schedule, fit
from unisonde.train.tabletop_batches import Example, word_tokenizer

ROLES = ("user", "assistant")
"""Words of the template that Tabletop's grammar does not have."""

GENERATION: dict[Task, Generation] = {
    "text": Generation(tokens=96, temperature=0.0),
    "image": Generation(guidance=1.5, steps=25),
}
"""The twin's sampling settings. Its world is small and exact, so it draws with less guidance than published, and in fewer steps."""

LATENTS = Schedule(steps=600, rate=2e-4, warmup=50, weight_decay=0.0)
JOINT = Schedule(steps=1900, rate=2e-3, matrix_rate=0.02, warmup=60, weight_decay=0.02)
BATCH = 12
SQUARE = 4
"""Side of the square of pixels that becomes one latent."""
CONSTANT = 8.0
"""What the channels of an untrained autoencoder carry along, in deviations of its latents."""
LOG_VARIANCE = -6.0
"""Of the posterior, whose latents have about unit size."""
TREMOR = 0.2
"""Deviation of the noise on latents, of unit size, from which the decoder learns to draw; about what sampling leaves."""
FIGURE = 8.0
"""What a pixel or latent that is not all background counts against one that is. Most are background, which is soon known."""
PASSED = 2.0
"""Deviation of a latent's channel where it reaches the last layer of an untrained network, for latents of unit size."""


def new_twin(seed: int) -> Showo2:
    """An untrained twin."""
    tokenizer = word_tokenizer((*SPECIAL_TOKENS, *ROLES), BOS, EOS, PAD)
    torch.manual_seed(seed)
    network, vae = Showo2Network(twin(len(tokenizer))), new_vae(seed)
    # On a CPU and at these lengths the plain attention is faster than the fused kernel, most of all backwards in bfloat16.
    for part in network.modules():
        if isinstance(config := getattr(part, "config", None), PreTrainedConfig):
            config._attn_implementation = "eager"
    initialise(network, seed)
    pass_latents(network, seed)
    return Showo2(network, vae, tokenizer, "twin/showo2", system="", generation=GENERATION)


def new_vae(seed: int) -> AutoencoderKLWan:
    """The twin's autoencoder: 32 x 32 pictures as 24 x 8 x 8 latents, at first the principal components of squares of 4 x 4 pixels.

    It has one level of resolution and takes squares of pixels as channels, a setting that the class has from Wan 2.2. With levels like
    the published one it learns far too slowly for a twin: what stands in a latent reaches its pixels by copying, and the convolutions
    after that tell one copy from another by the neighbours alone.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=48,
        z_dim=24,
        dim_mult=[1],
        num_res_blocks=1,
        temperal_downsample=[],
        latents_mean=[0.0] * 24,
        latents_std=[1.0] * 24,
        patch_size=SQUARE,
        in_channels=3 * SQUARE**2,
        out_channels=3 * SQUARE**2,
        scale_factor_spatial=SQUARE,
    )
    begin_linear(vae, seed)
    return vae


@torch.no_grad()
def begin_linear(vae: AutoencoderKLWan, seed: int) -> None:
    """Start as a linear map onto the principal components of Tabletop's squares, and back.

    Residual branches and attention begin at zero. What is left are two convolutions with a norm and SiLU between, in either half; a
    large constant that they carry along makes both nearly linear. Begun at random, the halves take very long to agree on things,
    which fill a twelfth of the pixels.
    """
    rng = random.Random(f"{seed}/components")
    pixels = pixels_of([crowd(rng) for _ in range(100)])
    squares = patchify(pixels[:, :, None], SQUARE).movedim(1, -1).flatten(0, -2).double()
    centre = squares.mean(0)
    _, size, directions = torch.linalg.svd(squares - centre, full_matrices=False)
    z = vae.config.z_dim
    size, directions = size[:z] / len(squares) ** 0.5, directions[:z]
    # Half way from pixels to unit deviations: so fine detail neither counts as much as the background nor drowns in noise.
    spread = size.sqrt() / size.mean().sqrt()
    # An orthonormal embedding in the channels, at right angles to the constant.
    width = vae.config.base_dim
    random_columns = torch.randn(width, z + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    random_columns[:, 0] = 1
    embed = torch.linalg.qr(random_columns).Q[:, 1:]

    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and name.endswith(("conv2", "proj")):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    scale = spread / size
    code = (directions * scale[:, None], -directions @ centre * scale)
    for half, inner, outer in (
        (vae.encoder, (embed @ code[0], embed @ code[1] + CONSTANT), (embed.T, torch.zeros(z))),
        (vae.decoder, (embed, torch.full((width,), CONSTANT)), (directions.T / scale @ embed.T, centre)),
    ):
        _point(half.conv_in, *inner)
        half.norm_out.gamma.fill_(CONSTANT)
        _point(half.conv_out, *outer)
    vae.encoder.conv_out.bias[z:] = LOG_VARIANCE
    _point(vae.quant_conv, torch.eye(2 * z), torch.zeros(2 * z))
    _point(vae.post_quant_conv, torch.eye(z), torch.zeros(z))


def _point(conv: nn.Conv3d, matrix: Tensor, bias: Tensor) -> None:
    """Make a convolution a matrix at each position, its first rows (o, i) given and the others zero."""
    assert conv.bias is not None
    conv.weight.zero_()
    conv.bias.zero_()
    side = conv.weight.shape[-1] // 2
    conv.weight[: len(matrix), :, -1, side, side] = matrix.to(conv.weight)  # of a kernel over time the last slice is now
    conv.bias[: len(bias)] = bias.to(conv.bias)


RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")


@torch.no_grad()
def initialise(network: Showo2Network, seed: int) -> None:
    """Weights that keep the scale of what they are given (LeCun), embeddings of half unit size, quiet residual branches.

    As published, the time changes nothing at first and the velocity is zero. Gates begin at one, where the official ones begin at zero:
    a closed gate keeps a block from learning until it has opened.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        if name.endswith("adaLN_modulation.1.bias") and "diffusion_head_a" in name:
            for gate in (2, 5):
                weight.chunk(6)[gate].fill_(1.0)
        elif "adaLN_modulation" in name or name.startswith("diffusion_head_b.linear"):
            weight.zero_()
        elif weight.ndim > 1:
            std = 0.5 if "embed_tokens" in name or "position_embedding" in name else weight[0].numel() ** -0.5
            weight.normal_(std=0.3 * std if name.endswith(RESIDUAL_OUTPUTS) else std, generator=generator)


@torch.no_grad()
def pass_latents(network: Showo2Network, seed: int) -> None:
    """Begin with a straight way from the latents of a token to its velocity, which is then what stands there, with the sign of noise.

    Noise has to come through whole, by way of three norms and two layers with GELU, and that takes long to learn. GELU lets a number
    through whose negative it is given, too: gelu(x) - gelu(-x) = x. So each of the two layers passes half as many directions as it has
    channels: those of the latents, and random ones. Only a token of one latent knows the velocity that it is asked for.
    """
    generator = torch.Generator().manual_seed(seed)

    def columns(fixed: Tensor, count: int) -> Tensor:
        """Orthonormal columns: those given, and random ones up to `count`."""
        more = torch.randn(len(fixed), count - fixed.shape[1], generator=generator)
        return torch.cat([fixed, torch.linalg.qr(torch.cat([fixed, more], 1)).Q[:, fixed.shape[1] :]], 1)

    def through(layers: nn.Module, given: Tensor, taken: Tensor) -> None:
        first, _, last = list(layers.children())[-3:]
        for part, weight in ((first, torch.cat([given.T, -given.T])), (last, torch.cat([taken, -taken], 1))):
            assert isinstance(part, nn.Linear)
            part.weight.copy_(weight)
            part.bias.zero_()

    config, enter, leave = network.config, network.image_embedder_gen.proj, network.diffusion_head_b.linear
    values, semantic = config.latent_channels, torch.zeros(config.semantic_width, 0)
    entered = columns(torch.zeros(config.hidden, 0), values)
    assert enter.bias is not None
    enter.weight.copy_((entered * (config.hidden / values) ** 0.5)[..., None, None])
    enter.bias.zero_()
    fused = torch.block_diag(columns(semantic, config.hidden // 2 - values), entered).roll(values, 1)  # the latents' first
    inside = columns(torch.zeros(config.hidden, 0), config.hidden // 2)
    through(network.fusion_proj, fused, inside)
    outside = columns(torch.zeros(config.flow_width, 0), config.flow_width // 2)
    through(network.diff_proj, columns(inside[:, :values], config.flow_width // 2), outside)
    leave.weight.copy_(-outside[:, :values].T / PASSED)
    leave.bias.zero_()


def joint_parts(network: Showo2Network) -> nn.ModuleDict:
    """What is trained jointly, with the matrices around the Qwen2 among the `layers` that Muon trains."""
    drawing = ("fusion_proj", "time_embed_proj", "diff_proj", "diffusion_head_a", "diffusion_head_b")
    parts = dict(network.named_children())
    layers = nn.ModuleList(parts.pop(name) for name in drawing)
    return nn.ModuleDict({"layers": layers, **parts})


# ---------------------------------------------------------------------------------------------------------------------- latents


def decoder_loss(vae: AutoencoderKLWan, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """The error of pictures decoded from latents that tremble, that of figures weighted. pixels: (B, 3, H, W) in [-1, 1]."""
    with torch.no_grad():
        latents = vae.encode(pixels[:, :, None]).latent_dist.mode()
    deviation = torch.tensor(vae.config.latents_std)[:, None, None, None]
    latents = latents + TREMOR * deviation * torch.randn(latents.shape, generator=generator)
    # The decoder itself: `decode` keeps pixels in their range, and what lies outside it would have no gradient.
    error = unpatchify(vae.decoder(vae.post_quant_conv(latents)), SQUARE)[:, :, 0] - pixels
    weight = torch.where(figures(pixels), FIGURE, 1.0).expand_as(pixels)
    return ((error.abs() + error.square()) * weight).sum() / weight.sum()


def train_latents(
    vae: AutoencoderKLWan,
    checkpoint: Path,
    seed: int = 0,
    schedule: Schedule = LATENTS,
    pictures: Callable[[random.Random], Tensor] | None = None,
) -> Effort:
    """Measure the latents of an autoencoder, and train its decoder in place.

    Args:
        pictures: a batch of pixels from random numbers; pictures of up to nine things of any shape and colour if None.
    """
    draw = pictures or (lambda rng: pixels_of([crowd(rng) for _ in range(BATCH)]))
    measure(vae, torch.cat([draw(random.Random(f"{seed}/measure/{k}")) for k in range(16)]))

    def loss(step: int) -> Tensor:
        rng = random.Random(f"{seed}/latents/{step}")
        return decoder_loss(vae, draw(rng), torch.Generator().manual_seed(rng.getrandbits(60)))

    effort = fit("latents", vae.decoder.train(), loss, schedule, checkpoint, BATCH)
    vae.eval()
    return effort


@torch.no_grad()
def measure(vae: AutoencoderKLWan, pixels: Tensor) -> None:
    """Set the mean of each latent channel, and one deviation for all, so that the latents of these pictures have zero and unit size."""
    vae.register_to_config(latents_mean=[0.0] * vae.config.z_dim, latents_std=[1.0] * vae.config.z_dim)
    latents = wan_vae.encode(vae, pixels)
    mean = latents.mean((0, 2, 3))
    size = (latents - mean[:, None, None]).square().mean().sqrt()
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=[float(size)] * vae.config.z_dim)


# ---------------------------------------------------------------------------------------------------------------- words, pictures


@dataclass(frozen=True)
class Batch:
    """Examples of one kind as the model sees them in use, by its own templates.

    Attributes:
        prompts: with the guidance's empty prompt for some drawings.
        latents: of the pictures that are drawn or shown, (B, c, h, w).
        noise: as the latents, and `times` (B,): what drawings set out from, and how far they are.
        weights: what each place of a drawing counts, (B, 1, h, w).
        responses: token ids of text responses, with the end.
    """

    prompts: list[Encoded]
    latents: Tensor | None = None
    noise: Tensor | None = None
    times: Tensor | None = None
    weights: Tensor | None = None
    responses: list[list[int]] | None = None


def collate(model: Showo2, examples: Sequence[Example], rng: random.Random, unconditional: float = 0.1) -> Batch:
    """A batch of examples of one kind.

    Args:
        rng: draws noise, times, the posterior's samples, and which drawings go without a prompt.
        unconditional: the share of those.
    """
    kind = examples[0].kind
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    latents = None
    if kind != "infer":
        side = model.config.grid * model.config.patch
        noise = torch.randn(len(examples), model.config.latent_channels, side, side, generator=generator)
        pixels = pixels_of([made.scene for made in examples])
        with torch.no_grad():
            latents = wan_vae.encode(model.vae, pixels, noise)
    prompts = []
    for made in examples:
        text = "" if kind == "draw" and rng.random() < unconditional else made.prompt
        item = Item("", "", text, Path() if kind in ("caption", "answer") else None)  # the path stands for a picture
        prompts.append(Encoded(*model.tokens_of(model.segments(item, "image" if kind == "draw" else "text"))))
    if kind == "draw":
        assert latents is not None
        times = shifted(torch.rand(len(examples), generator=generator))
        weights = 1 + (FIGURE - 1) * F.max_pool2d(figures(pixels).float(), wan_vae.reduction(model.vae))
        return Batch(prompts, latents, torch.randn(latents.shape, generator=generator), times, weights)
    end = model.marks.eos
    responses = [[*model.tokenizer(made.response, add_special_tokens=False)["input_ids"], end] for made in examples]
    return Batch(prompts, latents, responses=responses)


def joint_loss(model: Showo2, batch: Batch) -> Tensor:
    """The squared error of the velocity for drawings, that of figures weighted; cross-entropy in nats a token for text."""
    if batch.responses is None:
        return _flow_loss(model, batch)
    states = model.read(batch.prompts, batch.responses, batch.latents)
    # The state before a token predicts it.
    before = [
        states[k, len(p.ids) - 1 : len(p.ids) - 1 + len(r)]
        for k, (p, r) in enumerate(zip(batch.prompts, batch.responses, strict=True))
    ]
    words = torch.tensor([token for response in batch.responses for token in response])
    return F.cross_entropy(model.network.showo.lm_head(torch.cat(before)).float(), words)


def _flow_loss(model: Showo2, batch: Batch) -> Tensor:
    """From noise straight to data, at an even pace (arXiv 2209.03003). Times come as often as sampling visits them, most near noise,
    where the prompt decides what is drawn; with the published logistic of normal numbers the last steps are hardly learnt."""
    assert batch.latents is not None and batch.noise is not None and batch.times is not None and batch.weights is not None
    tokens = model.config.tokens
    ids, _ = pad([drawing(p.ids[1:-1], model.marks, tokens) for p in batch.prompts], model.marks.pad, "right")
    where = image_places(torch.tensor([len(p.ids) for p in batch.prompts]), tokens + 1, ids.shape[1])
    t = batch.times[:, None, None, None]
    velocity = model.network.flow(
        ids,
        where,
        t * batch.latents + (1 - t) * batch.noise,
        batch.times,
        additive(visible(where), model.network.dtype),
    )
    error = (velocity - (batch.latents - batch.noise)).square().mean(1, keepdim=True)
    return (error * batch.weights).sum() / batch.weights.sum()


# ---------------------------------------------------------------------------------------------------------------------- writing


def export(model: Showo2, out: Path, record: dict[str, Any] | None = None) -> None:
    """Write a folder that `unisonde.load` opens, in the published layout: weights in float16, the autoencoder in `vae/`.

    Raises:
        ValueError: `out` already holds files.
    """
    with new_folder(out, wan_vae.FOLDER) as folder:
        save_weights(model.network.state_dict(), folder / "model.safetensors")
        save_json(model.config.to_dict(), folder / "config.json")
        save_weights(model.vae.state_dict(), folder / wan_vae.FOLDER / f"{wan_vae.WEIGHTS}.safetensors")
        model.vae.save_config(folder / wan_vae.FOLDER)
        model.tokenizer.save_pretrained(folder)
        save_own(model, folder, record, system=model.system)
