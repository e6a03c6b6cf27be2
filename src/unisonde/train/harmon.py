"""How a Harmon twin learns: its autoencoder first, then drawing some tokens given others and writing word by word, together.

Drawing is learnt as in MAR (arXiv 2406.11838): some tokens are hidden, and the diffusion head learns to draw them from the decoder's
vectors, at several random steps for each. Some drawings go with the prompt of the unconditional branch.

The autoencoder keeps the grid of pixels, for pictures as small as these show single ones; squares of 4 x 4 latents make a token.
"""

from __future__ import annotations

import math
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
from unisonde.models.base import Generation
from unisonde.models.harmon import ASKED, END, SPECIAL_TOKENS, START, Encoded, Harmon
from unisonde.models.parts.harmon_network import Drawing, HarmonNetwork, twin
from unisonde.models.parts.text import pad
from unisonde.models.parts.token_diffusion import TRAINED_STEPS, NoiseSchedule, TokenDiffusion
from unisonde.train.export import new_folder, save_json, save_own, save_weights
from unisonde.train.image_codes import crowd, pixels_of
from unisonde.train.loop import Effort, Schedule, fit
from unisonde.train.tabletop_batches import Example, word_tokenizer

WORDS = ("user", "assistant", ASKED.rstrip(": "))
"""What the template says that Tabletop's grammar does not."""

GENERATION: dict[Task, Generation] = {
    "text": Generation(tokens=96, temperature=0.0),
    "image": Generation(temperature=1.0, guidance=1.5, steps=16),
}
"""The twin's sampling settings. Its world is small and exact, so it draws with less guidance than published, and in fewer steps."""

LATENTS = Schedule(steps=200, rate=1e-3, warmup=20, weight_decay=0.0)
JOINT = Schedule(steps=1900, rate=2e-3, matrix_rate=0.02, warmup=60, weight_decay=0.02)
BATCH = 12

CONSTANT = 8.0
"""What the channels of an untrained autoencoder or diffusion head carry along, half of them negated."""
LOG_VARIANCE = -6.0
"""Of the latents of an untrained autoencoder, in pixel values."""
PULL = 1e-6
"""Weight of the latents' divergence from a standard normal, in nats a latent."""

REPEATS = 4
"""Steps of the diffusion that each hidden token is learnt at in a batch, as published."""
VARIANCE = 1e-3
"""Weight of what the variances of the diffusion's steps learn from."""
FIGURE = 4.0
"""What a token of a figure counts beside one of the plain background. Most tokens are background, soon known."""


def new_twin(seed: int) -> Harmon:
    """An untrained twin. Role names and the request are single words of its tokenizer."""
    tokenizer = word_tokenizer((*SPECIAL_TOKENS, *WORDS), START, END, END)
    torch.manual_seed(seed)
    network, vae = HarmonNetwork(twin(len(tokenizer))), new_vae(seed)
    # On a CPU and at these lengths the plain attention is faster than the fused kernel.
    network.llm.set_attn_implementation("eager")
    initialise(network, seed)
    return Harmon(network, vae, tokenizer, "twin/harmon", generation=GENERATION)


RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "mlp.fc2.weight")


@torch.no_grad()
def initialise(network: HarmonNetwork, seed: int) -> None:
    """Weights that keep the scale of what they are given (LeCun), positions of half unit size, quiet residual branches.

    Words are small, for their table is the head as well, and at half unit size it would be very sure of itself.

    The diffusion head is to answer noise with noise first of all: at its noisiest steps an error of a hundredth in that is one of
    many units in the token. So it begins as a map that passes on what it is given (`begin_passing`).
    """
    generator = torch.Generator().manual_seed(seed)
    tables = ("pos_embed_learned", "mask_token", "fake_latent")
    for name, weight in network.named_parameters():
        if name.endswith("embed_tokens.weight"):
            weight.normal_(std=0.1, generator=generator)
        elif name.endswith(tables):
            weight.normal_(std=0.5, generator=generator)
        elif name.endswith("bias"):
            weight.zero_()
        elif weight.ndim > 1:
            quiet = name.endswith(RESIDUAL_OUTPUTS)
            weight.normal_(std=(0.3 if quiet else 1.0) * weight[0].numel() ** -0.5, generator=generator)
    begin_passing(network.mar.diffloss, generator)


@torch.no_grad()
def begin_passing(head: TokenDiffusion, generator: torch.Generator) -> None:
    """Start as a map that says that all it is given is noise: residual branches at zero, and a large constant in the channels.

    As in `begin_linear`, half of the channels carry the constant and half its negative, so that norms divide by it, whatever the
    token. Gates begin at one, and what tokens are drawn from is heard from the start; the official ones begin at zero, and open slowly.
    """
    net: Any = head.net
    width, channels = net.input_proj.weight.shape
    columns = torch.randn(width // 2, channels + 1, generator=generator, dtype=torch.float64)
    columns[:, 0] = 1
    embed = torch.linalg.qr(columns).Q[:, 1:].float()
    constant = CONSTANT * torch.cat([torch.ones(width // 2), -torch.ones(width - width // 2)])
    net.input_proj.weight.zero_()[: width // 2] = embed
    net.input_proj.bias.copy_(constant)
    for block in net.res_blocks:
        block.in_ln.weight.fill_(CONSTANT)
        block.in_ln.bias.copy_(-constant)
        block.mlp[2].weight.zero_()
        block.adaLN_modulation[1].bias.chunk(3)[2].fill_(1.0)
    net.final_layer.adaLN_modulation[1].weight.zero_()
    net.final_layer.linear.weight.zero_()[:channels, : width // 2] = CONSTANT * embed.T


def joint_parts(network: HarmonNetwork) -> nn.ModuleDict:
    """What is trained jointly, with the blocks of MAR and of the diffusion head among the `layers` whose matrices Muon trains."""
    mar = network.mar
    blocks = [*mar.encoder_blocks, *mar.decoder_blocks, *mar.diffloss.net.res_blocks]
    return nn.ModuleDict({"layers": nn.ModuleList(blocks), "network": network})


# ------------------------------------------------------------------------------------------------------------------ autoencoder


def new_vae(seed: int) -> Any:
    """The twin's autoencoder: one level, latents of 3 channels for single pixels, which begin as the pixels themselves."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(16,),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=1,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    begin_linear(vae, seed)
    return vae


@torch.no_grad()
def begin_linear(vae: Any, seed: int) -> None:
    """Start as a map that passes colours on: residual branches at zero, and channels that carry a large constant along.

    The norm takes out the mean of all channels and divides by their spread. Half of the channels carry the constant and half its
    negative, so that the mean is zero and the spread the constant, whatever the picture; the positive half then passes through SiLU
    almost unchanged, and the colours are in it.
    """
    half = vae.config.block_out_channels[0] // 2
    colours = vae.config.latent_channels
    # An orthonormal embedding of the colours at right angles to the constant.
    columns = torch.randn(half, colours + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    columns[:, 0] = 1
    embed = torch.linalg.qr(columns).Q[:, 1:]
    sign = torch.cat([torch.ones(half), -torch.ones(half)])
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d) and name.endswith("conv2"):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for part in (vae.encoder, vae.decoder):
        _point(part.conv_in, embed, CONSTANT * sign)
        part.conv_norm_out.weight.fill_(CONSTANT)
        part.conv_norm_out.bias.zero_()
        _point(part.conv_out, embed.T, torch.zeros(colours))
    _point(vae.quant_conv, torch.eye(colours), torch.tensor([0.0] * colours + [LOG_VARIANCE] * colours))
    _point(vae.post_quant_conv, torch.eye(colours), torch.zeros(colours))


def _point(conv: nn.Conv2d, matrix: Tensor, bias: Tensor) -> None:
    """Make a convolution a matrix at each position, its first rows and columns given and the others zero."""
    assert conv.bias is not None
    conv.weight.zero_()
    conv.bias.zero_()
    side = conv.weight.shape[-1] // 2
    conv.weight[: matrix.shape[0], : matrix.shape[1], side, side] = matrix.to(conv.weight)
    conv.bias[: len(bias)] = bias.to(conv.bias)


def latent_loss(vae: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """The picture's error after a sample of the latents, and the pull. pixels: (B, 3, H, W) in [-1, 1]."""
    posterior = vae.encode(pixels).latent_dist
    latents = posterior.sample(generator)
    error = vae.decode(latents).sample - pixels
    return (error.abs() + error.square()).mean() + PULL * posterior.kl().sum() / latents.numel()


def train_latents(
    vae: Any,
    checkpoint: Path,
    seed: int = 0,
    schedule: Schedule = LATENTS,
    pictures: Callable[[random.Random], Tensor] | None = None,
) -> Effort:
    """Train an autoencoder in place, and set its scale so that latents have unit variance.

    Args:
        pictures: a batch of pixels from random numbers; pictures of up to nine things of any shape and colour if None.
    """
    draw = pictures or (lambda rng: pixels_of([crowd(rng) for _ in range(BATCH)]))

    def loss(step: int) -> Tensor:
        rng = random.Random(f"{seed}/latents/{step}")
        return latent_loss(vae, draw(rng), torch.Generator().manual_seed(rng.getrandbits(60)))

    effort = fit("latents", vae.train(), loss, schedule, checkpoint, BATCH)
    vae.eval()
    with torch.no_grad():
        shown = torch.cat([draw(random.Random(f"{seed}/scale/{k}")) for k in range(8)])
        vae.register_to_config(scaling_factor=1 / float(vae.encode(shown).latent_dist.mode().std()))
    return effort


# ---------------------------------------------------------------------------------------------------------------- words, pictures


@dataclass(frozen=True)
class Batch:
    """Examples of one kind as the model sees them in use, by its own templates.

    Attributes:
        tokens: of the pictures that are drawn or shown, (B, n, c).
        visible: (B, n), the tokens of drawings that are known, as many in every row.
        times: (M,) steps of the diffusion, `REPEATS` for each hidden token; noise: (M, c).
        responses: token ids of text responses, with the end.
    """

    prompts: list[Encoded]
    tokens: Tensor | None = None
    visible: Tensor | None = None
    times: Tensor | None = None
    noise: Tensor | None = None
    responses: list[list[int]] | None = None


def collate(model: Harmon, examples: Sequence[Example], rng: random.Random, unconditional: float = 0.1) -> Batch:
    """A batch of examples of one kind.

    Args:
        rng: draws which tokens are hidden, steps and noise, and which drawings go without a prompt.
        unconditional: the share of those.
    """
    kind = examples[0].kind
    tokens = None
    if kind != "infer":
        with torch.no_grad():
            tokens = model.tokens_of(pixels_of([made.scene for made in examples]))
    if kind != "draw":
        shown = None if tokens is None else Path()  # the path stands for a picture
        prompts = [model.assemble(Item("", "", made.prompt, shown), "text") for made in examples]
        responses = [[*model.tokenizer(made.response, add_special_tokens=False)["input_ids"], model.end_id] for made in examples]
        return Batch(prompts, tokens, responses=responses)
    assert tokens is not None
    wishes = ["" if rng.random() < unconditional else made.prompt for made in examples]
    prompts = [model.assemble(Item("", "", wish), "image") for wish in wishes]
    count = tokens.shape[1]
    known = count - math.ceil(count * _hidden_share(rng))
    visible = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    for row in visible:
        row[rng.sample(range(count), known)] = True
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    hidden = REPEATS * len(examples) * (count - known)
    times = torch.randint(TRAINED_STEPS, (hidden,), generator=generator)
    return Batch(prompts, tokens, visible, times, torch.randn(hidden, tokens.shape[2], generator=generator))


def _hidden_share(rng: random.Random) -> float:
    """Normal around 1 with a deviation of 0.25, as published for MAR, and kept between 0.7 and 1.

    The published draws again what lies above 1. Here that is 1, so that half of the batches have nothing to go by but the prompt.
    """
    return min(1.0, max(0.7, rng.gauss(1.0, 0.25)))


def joint_loss(model: Harmon, batch: Batch) -> Tensor:
    """Of drawings the diffusion's loss, tokens of figures weighted; cross-entropy in nats a token for text."""
    if batch.responses is None:
        return _drawing_loss(model, batch)
    features = None if batch.tokens is None else model.network.see(batch.tokens)[1]
    states = model.read(model.embed(batch.prompts, features), batch.responses)
    # The state before a token predicts it.
    before = [
        states[k, len(p.ids) - 1 : len(p.ids) - 1 + len(r)]
        for k, (p, r) in enumerate(zip(batch.prompts, batch.responses, strict=True))
    ]
    words = torch.tensor([token for response in batch.responses for token in response])
    return F.cross_entropy(model.network.llm.lm_head(torch.cat(before)).float(), words)


def _drawing_loss(model: Harmon, batch: Batch) -> Tensor:
    assert batch.tokens is not None and batch.visible is not None and batch.times is not None and batch.noise is not None
    drawing = Drawing(model.network, *pad([p.ids for p in batch.prompts], model.end_id, "right"))
    drawing.read_prompts()
    vectors = drawing.vectors(batch.tokens, batch.visible)
    hidden = ~batch.visible
    wanted, given = (x[hidden].repeat(REPEATS, 1) for x in (batch.tokens, vectors))
    each = denoising_loss(model.network.mar.diffloss, wanted, given, batch.times, batch.noise)
    plain = batch.tokens.median(1, keepdim=True).values
    figure = (batch.tokens - plain).abs().amax(-1) > 0.05
    weight = torch.where(figure, FIGURE, 1.0)[hidden].repeat(REPEATS)
    return (each * weight).sum() / weight.sum()


def denoising_loss(head: TokenDiffusion, tokens: Tensor, given: Tensor, times: Tensor, noise: Tensor) -> Tensor:
    """The squared error of the noise in tokens (M, c), and how far the variance is from the true one: (M,).

    The second is the divergence of the step's distribution from the true one, in nats, through which the variance alone learns
    (arXiv 2102.09672, with its weight).
    """
    schedule = NoiseSchedule.named(TRAINED_STEPS)

    def at(table: Any) -> Tensor:
        return torch.from_numpy(table).to(tokens)[times][:, None]

    kept, least, most = at(schedule.kept), at(schedule.least), at(schedule.most)
    noisy = kept.sqrt() * tokens + (1 - kept).sqrt() * noise
    eps, share = head.net(noisy, times, given).float().chunk(2, -1)
    share = (share + 1) / 2
    log_variance = share * most + (1 - share) * least
    error = (eps - noise).square()
    off = at(schedule.data_weight).square() * (1 - kept) / kept * error.detach()  # of the mean, squared
    divergence = 0.5 * (log_variance - least - 1 + (least - log_variance).exp() + off * (-log_variance).exp())
    return (error + VARIANCE * divergence).mean(-1)


# ---------------------------------------------------------------------------------------------------------------------- writing


def export(model: Harmon, out: Path, record: dict[str, Any] | None = None) -> None:
    """Write a folder that `unisonde.load` opens, in the published layout: weights in float16, the autoencoder in `vae/`.

    Raises:
        ValueError: `out` already holds files.
    """
    weights = model.network.state_dict()
    del weights["llm.lm_head.weight"]  # the embedding
    with new_folder(out, "vae") as folder:
        save_weights(weights, folder / "model.safetensors")
        save_json(model.config.to_dict(), folder / "config.json")
        save_weights(model.vae.state_dict(), folder / "vae/diffusion_pytorch_model.safetensors")
        model.vae.save_config(folder / "vae")
        model.tokenizer.save_pretrained(folder)
        save_own(model, folder, record)
