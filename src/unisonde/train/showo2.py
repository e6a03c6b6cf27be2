"""How a Show-o2 twin learns: its Wan autoencoder first, then drawing by flow matching and writing word by word together.

The autoencoder is a small one of the same class, which begins as principal components. It learns as a large one does: from the error of
the picture, with a light pull of the posterior towards a standard normal. Afterwards the latents' mean and deviation are measured, by
which they are normalised.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from safetensors.torch import save_file
from torch import Tensor, nn

from unisonde.data.item import Item, Task
from unisonde.models.base import Generation
from unisonde.models.parts import wan_vae
from unisonde.models.parts.showo2_network import Showo2Network, additive, shifted, twin, visible
from unisonde.models.parts.text import pad
from unisonde.models.showo2 import BOS, EOS, PAD, SPECIAL_TOKENS, Encoded, Showo2, drawing, image_places
from unisonde.train.image_codes import crowd, pixels_of
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
"""What the channels of an untrained autoencoder carry along, in deviations of a component."""
LOG_VARIANCE = -6.0
"""Of the posterior of an untrained autoencoder, whose latents have about unit size."""
PULL = 1e-4
"""Weight of the posterior's divergence from a standard normal, in nats a latent."""


def new_twin(seed: int) -> Showo2:
    """An untrained twin."""
    tokenizer = word_tokenizer((*SPECIAL_TOKENS, *ROLES), BOS, EOS, PAD)
    torch.manual_seed(seed)
    network, vae = Showo2Network(twin(len(tokenizer))), new_vae(seed)
    initialise(network, seed)
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
    code = (directions / size[:, None], -directions @ centre / size)
    for half, inner, outer in (
        (vae.encoder, (embed @ code[0], embed @ code[1] + CONSTANT), (embed.T, torch.zeros(z))),
        (vae.decoder, (embed, torch.full((width,), CONSTANT)), (directions.T * size @ embed.T, centre)),
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


# ---------------------------------------------------------------------------------------------------------------------- latents


def latent_loss(vae: AutoencoderKLWan, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """The picture's error after a sample of the posterior, and the pull. pixels: (B, 3, H, W) in [-1, 1]."""
    posterior = vae.encode(pixels[:, :, None]).latent_dist
    latents = posterior.sample(generator)
    # The decoder itself: `decode` keeps pixels in their range, and what lies outside it would have no gradient.
    error = unpatchify(vae.decoder(vae.post_quant_conv(latents)), SQUARE)[:, :, 0] - pixels
    return (error.abs() + error.square()).mean() + PULL * posterior.kl().sum() / latents.numel()


def train_latents(
    vae: AutoencoderKLWan,
    checkpoint: Path,
    seed: int = 0,
    schedule: Schedule = LATENTS,
    pictures: Callable[[random.Random], Tensor] | None = None,
) -> Effort:
    """Train an autoencoder in place, and measure its latents.

    Args:
        pictures: a batch of pixels from random numbers; pictures of up to nine things of any shape and colour if None.
    """
    draw = pictures or (lambda rng: pixels_of([crowd(rng) for _ in range(BATCH)]))

    def loss(step: int) -> Tensor:
        rng = random.Random(f"{seed}/latents/{step}")
        return latent_loss(vae, draw(rng), torch.Generator().manual_seed(rng.getrandbits(60)))

    effort = fit("latents", vae.train(), loss, schedule, checkpoint, BATCH)
    measure(vae.eval(), torch.cat([draw(random.Random(f"{seed}/measure/{k}")) for k in range(16)]))
    return effort


@torch.no_grad()
def measure(vae: AutoencoderKLWan, pixels: Tensor) -> None:
    """Set the mean and deviation of each latent channel, by which latents are normalised, to those of these pictures."""
    vae.register_to_config(latents_mean=[0.0] * vae.config.z_dim, latents_std=[1.0] * vae.config.z_dim)
    latents = wan_vae.encode(vae, pixels)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3)).clamp(min=1e-3)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


# ---------------------------------------------------------------------------------------------------------------- words, pictures


@dataclass(frozen=True)
class Batch:
    """Examples of one kind as the model sees them in use, by its own templates.

    Attributes:
        prompts: with the guidance's empty prompt for some drawings.
        latents: of the pictures that are drawn or shown, (B, c, h, w).
        noise: as the latents, and `times` (B,): what drawings set out from, and how far they are.
        responses: token ids of text responses, with the end.
    """

    prompts: list[Encoded]
    latents: Tensor | None = None
    noise: Tensor | None = None
    times: Tensor | None = None
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
        with torch.no_grad():
            latents = wan_vae.encode(model.vae, pixels_of([made.scene for made in examples]), noise)
    prompts = []
    for made in examples:
        text = "" if kind == "draw" and rng.random() < unconditional else made.prompt
        item = Item("", "", text, Path() if kind in ("caption", "answer") else None)  # the path stands for a picture
        prompts.append(Encoded(*model.tokens_of(model.segments(item, "image" if kind == "draw" else "text"))))
    if kind == "draw":
        assert latents is not None
        times = shifted(torch.randn(len(examples), generator=generator).sigmoid())
        return Batch(prompts, latents, torch.randn(latents.shape, generator=generator), times)
    end = model.marks.eos
    responses = [[*model.tokenizer(made.response, add_special_tokens=False)["input_ids"], end] for made in examples]
    return Batch(prompts, latents, responses=responses)


def joint_loss(model: Showo2, batch: Batch) -> Tensor:
    """The squared error of the velocity for drawings, cross-entropy in nats a token for text."""
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
    """From noise straight to data, at an even pace (arXiv 2209.03003); times are the logistic of normal numbers, as published,
    and moved towards noise as in sampling: only there does the prompt decide what is drawn."""
    assert batch.latents is not None and batch.noise is not None and batch.times is not None
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
    return (velocity - (batch.latents - batch.noise)).square().mean()


# ---------------------------------------------------------------------------------------------------------------------- writing


def export(model: Showo2, out: Path, record: dict | None = None) -> None:
    """Write a folder that `unisonde.load` opens, in the published layout: weights in float16, the autoencoder in `vae/`.

    Raises:
        ValueError: `out` already holds files.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} already holds files; name another folder, or remove it")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / wan_vae.FOLDER).mkdir(parents=True)
    for network, file in (
        (model.network, partial / "model.safetensors"),
        (model.vae, partial / wan_vae.FOLDER / f"{wan_vae.WEIGHTS}.safetensors"),
    ):
        weights = {key: tensor.half().contiguous() for key, tensor in network.state_dict().items()}
        save_file(weights, file, metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(model.config.to_dict(), indent=1) + "\n")
    model.vae.save_config(partial / wan_vae.FOLDER)
    model.tokenizer.save_pretrained(partial)
    settings = {
        "family": model.family,
        "system": model.system,
        "generation": {task: asdict(model.defaults(task)) for task in model.tasks},
    }
    (partial / "unisonde.json").write_text(json.dumps(settings, indent=1) + "\n")
    if record is not None:
        (partial / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    if out.exists():
        out.rmdir()
    partial.rename(out)
