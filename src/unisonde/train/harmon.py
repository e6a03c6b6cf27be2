"""How a Harmon twin learns: its autoencoder first, then drawing some tokens given others and writing word by word, together.

Drawing is learnt as in MAR (arXiv 2406.11838): some tokens are hidden, and the diffusion head learns to draw them from the decoder's
vectors, at several random steps for each. Some drawings go with the prompt of the unconditional branch.

The autoencoder keeps the grid of pixels, for pictures as small as these show single ones; squares of 4 x 4 latents make a token. Its
decoder learns from latents that tremble, for drawn tokens are never quite right, and a patch of Tabletop is one of few.
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
from unisonde.models.parts import kl16
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

LATENTS = Schedule(steps=1000, rate=2e-3, warmup=20, weight_decay=0.0)
JOINT = Schedule(steps=1900, rate=2e-3, matrix_rate=0.02, warmup=60, weight_decay=0.02)
BATCH = 12

CONSTANT = 8.0
"""What the channels of an untrained autoencoder carry along, half of them negated."""
HEAD_CONSTANT = 3.0
"""And those of an untrained diffusion head, whose training is rougher the larger it is: what leaves it is multiplied by it."""
LOG_VARIANCE = -6.0
"""Of the latents, in pixel values."""
TREMOR = 0.4
"""The largest deviation of the noise on latents, of unit size, from which the decoder learns to draw. Sampling leaves less."""

OFF = 0.1
"""Deviation of the noise on the tokens that drawings are learnt given."""
REPEATS = 2
"""Steps of the diffusion that each hidden token is learnt at in a batch."""
LOUDEST = 50.0
"""The most that an error of the noise counts, squared. Nearly every step of sampling is below. The least is 1."""
FIGURE = 8.0
"""What a pixel or token of a figure counts beside one of the plain background. Most are background, soon known."""


def new_twin(seed: int) -> Harmon:
    """An untrained twin. Role names and the request are single words of its tokenizer."""
    tokenizer = word_tokenizer((*SPECIAL_TOKENS, *WORDS), START, END, END)
    torch.manual_seed(seed)
    network, vae = HarmonNetwork(twin(len(tokenizer))), new_vae(seed)
    # On a CPU and at these lengths the plain attention is faster than the fused kernel.
    network.llm.set_attn_implementation("eager")
    initialise(network, seed)
    return Harmon(network, vae, tokenizer, "twin/harmon", generation=GENERATION)


LOUDNESS = {"o_proj.weight": 0.3, "down_proj.weight": 0.3, "proj_in.2.weight": 0.2, "proj_out.2.weight": 4.0}
"""Matrices that begin smaller or larger: the residual outputs of Qwen2; what takes image features into it, where words are as small;
and what takes its states out, or MAR's own are all that the decoder hears."""
TABLES = {
    "encoder_pos_embed_learned": 0.5,
    "fake_latent": 0.5,
    "decoder_pos_embed_learned": 0.2,
    "mask_token": 0.2,
    "diffusion_pos_embed_learned": 0.3,
}
"""Deviation of what is learnt for places."""


@torch.no_grad()
def initialise(network: HarmonNetwork, seed: int) -> None:
    """Weights that keep the scale of what they are given (LeCun), with a few exceptions, so that the prompt is heard from the start.

    Words are small, for their table is the head as well, and at half unit size it would be very sure of itself. So are the image
    features beside them, or what the buffers gather of a prompt would be lost in what they were before. Decoding, the buffers are loud
    and places are quiet, for the places that are to be drawn hear of the prompt through the buffers alone.

    The diffusion head is to answer noise with noise first of all: at its noisiest steps an error of a hundredth in that is one of
    many units in the token. So it begins as a map that passes on what it is given (`begin_passing`).
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        if name.endswith("embed_tokens.weight"):
            weight.normal_(std=0.1, generator=generator)
        elif name.removeprefix("mar.") in TABLES:
            weight.normal_(std=TABLES[name.removeprefix("mar.")], generator=generator)
        elif name.endswith("bias"):
            weight.zero_()
        elif weight.ndim > 1:
            loudness = next((loudness for end, loudness in LOUDNESS.items() if name.endswith(end)), 1.0)
            weight.normal_(std=loudness * weight[0].numel() ** -0.5, generator=generator)
    begin_passing(network.mar.diffloss, generator)


@torch.no_grad()
def begin_passing(head: TokenDiffusion, generator: torch.Generator) -> None:
    """Start as a map that says that all it is given is noise, and takes the least variance: residual branches at zero, and a large
    constant in the channels.

    As in `begin_linear`, half of the channels carry the constant and half its negative, so that norms divide by it, whatever the
    token. Gates begin at one, and what tokens are drawn from is heard from the start; the official ones begin at zero, and open slowly.
    """
    net: Any = head.net
    width, channels = net.input_proj.weight.shape
    columns = torch.randn(width // 2, channels + 1, generator=generator, dtype=torch.float64)
    columns[:, 0] = 1
    embed = torch.linalg.qr(columns).Q[:, 1:].float()
    constant = HEAD_CONSTANT * torch.cat([torch.ones(width // 2), -torch.ones(width - width // 2)])
    net.input_proj.weight.zero_()[: width // 2] = embed
    net.input_proj.bias.copy_(constant)
    for block in net.res_blocks:
        block.in_ln.weight.fill_(HEAD_CONSTANT)
        block.in_ln.bias.copy_(-constant)
        block.mlp[2].weight.zero_()
        block.adaLN_modulation[1].bias.chunk(3)[2].fill_(1.0)
    net.final_layer.adaLN_modulation[1].weight.zero_()
    spread = (HEAD_CONSTANT**2 + channels / width) ** 0.5  # what the last norm divides by
    net.final_layer.linear.weight.zero_()[:channels, : width // 2] = spread * embed.T
    net.final_layer.linear.bias[channels:] = -1.0


def joint_parts(network: HarmonNetwork) -> nn.ModuleDict:
    """What is trained jointly. Among the `layers` whose matrices Muon trains are those of MAR and between it and Qwen2 as well.

    Not the diffusion head's first and last: at its noisiest steps a small change of them is a large one of the token. `guess` is no
    part of the network: a linear guess at a token from its vector, by which the decoder learns what it is to say while the head is
    still learning to listen.
    """
    mar, head = network.mar, network.mar.diffloss.net
    guess = nn.Linear(mar.sizes.decoder_embed_dim, mar.sizes.channels)
    nn.init.zeros_(guess.weight)
    nn.init.zeros_(guess.bias)
    blocks = [*mar.encoder_blocks, *mar.decoder_blocks, *head.res_blocks]
    between = [network.proj_in, network.proj_out, mar.z_proj, mar.decoder_embed, head.time_embed, head.cond_embed]
    return nn.ModuleDict({"layers": nn.ModuleList([*blocks, *between, guess]), "network": network, "guess": guess})


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
    half, colours = vae.config.block_out_channels[0] // 2, vae.config.latent_channels
    # An orthonormal embedding of the colours at right angles to the constant.
    columns = torch.randn(half, colours + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    columns[:, 0] = 1
    embed = torch.linalg.qr(columns).Q[:, 1:]
    sign = torch.cat([torch.ones(half), -torch.ones(half)])
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d) and name.endswith("conv2"):
            for parameter in module.parameters():
                parameter.zero_()
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


def figures(values: Tensor) -> Tensor:
    """Which pixels or tokens are off the background, the commonest value of a picture: (B, n, c) -> (B, n) booleans."""
    return ((values - values.median(1, keepdim=True).values).abs() > 0.01).any(-1)


def decoder_loss(vae: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """The error of pictures decoded from latents that tremble, that of figures weighted. pixels: (B, 3, H, W) in [-1, 1].

    The noise is more on some pictures than on others, up to `TREMOR`.
    """
    with torch.no_grad():
        latents = kl16.encode(vae, pixels)
    tremor = TREMOR * torch.rand(len(pixels), 1, 1, 1, generator=generator)
    error = kl16.decode(vae, latents + tremor * torch.randn(latents.shape, generator=generator)) - pixels
    weight = torch.where(figures(pixels.flatten(2).transpose(1, 2)), FIGURE, 1.0)
    each = (error.abs() + error.square()).mean(1).flatten(1)
    return (each * weight).sum() / weight.sum()


def train_latents(
    vae: Any,
    checkpoint: Path,
    seed: int = 0,
    schedule: Schedule = LATENTS,
    pictures: Callable[[random.Random], Tensor] | None = None,
) -> Effort:
    """Set an autoencoder's scale so that latents have unit variance, and train its decoder in place. The encoder stays linear.

    Args:
        pictures: a batch of pixels from random numbers; pictures of up to nine things of any shape and colour if None.
    """
    draw = pictures or (lambda rng: pixels_of([crowd(rng) for _ in range(BATCH)]))
    vae.eval()
    with torch.no_grad():
        shown = torch.cat([draw(random.Random(f"{seed}/scale/{k}")) for k in range(8)])
        vae.register_to_config(scaling_factor=1 / float(vae.encode(shown).latent_dist.mode().std()))

    def loss(step: int) -> Tensor:
        rng = random.Random(f"{seed}/latents/{step}")
        return decoder_loss(vae, draw(rng), torch.Generator().manual_seed(rng.getrandbits(60)))

    effort = fit("latents", nn.ModuleList([vae.post_quant_conv, vae.decoder]).train(), loss, schedule, checkpoint, BATCH)
    vae.eval()
    return effort


# ---------------------------------------------------------------------------------------------------------------- words, pictures


@dataclass(frozen=True)
class Batch:
    """Examples of one kind as the model sees them in use, by its own templates.

    Attributes:
        tokens: of the pictures that are drawn or shown, (B, n, c).
        near: of drawings, the same a little off, as those are that sampling has drawn before.
        visible: (B, n), the tokens of drawings that are known, as many in every row.
        times: (M,) steps of the diffusion, `REPEATS` for each hidden token; noise: (M, c).
        responses: token ids of text responses, with the end.
    """

    prompts: list[Encoded]
    tokens: Tensor | None = None
    near: Tensor | None = None
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
    known = count - max(1, math.ceil(count * _hidden_share(rng)))
    visible = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    for row in visible:
        row[rng.sample(range(count), known)] = True
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    hidden = REPEATS * len(examples) * (count - known)
    times = torch.randint(TRAINED_STEPS, (hidden,), generator=generator)
    noise = torch.randn(hidden, tokens.shape[2], generator=generator)
    near = tokens + OFF * torch.randn(tokens.shape, generator=generator)
    return Batch(prompts, tokens, near, visible, times, noise)


def _hidden_share(rng: random.Random) -> float:
    """Half of the batches have nothing to go by but the prompt; in the others as much is hidden as at a random step of sampling.

    MAR hides 0.7 or more, for ImageNet. A twin draws most of its tokens in passes that see more than the rest.
    """
    return 1.0 if rng.random() < 0.5 else math.cos(math.pi / 2 * rng.random())


def joint_loss(model: Harmon, batch: Batch, guess: nn.Module | None = None) -> Tensor:
    """Of drawings the diffusion's loss, tokens of figures weighted, and the squared error of a guess; cross-entropy in nats for text.

    Args:
        guess: at tokens from their vectors, (..., D) -> (..., c); see `joint_parts`.
    """
    if batch.responses is None:
        return _drawing_loss(model, batch, guess)
    features = None if batch.tokens is None else model.network.see(batch.tokens)[1]
    states = model.read(model.embed(batch.prompts, features), batch.responses)
    # The state before a token predicts it.
    before = [
        states[k, len(p.ids) - 1 : len(p.ids) - 1 + len(r)]
        for k, (p, r) in enumerate(zip(batch.prompts, batch.responses, strict=True))
    ]
    words = torch.tensor([token for response in batch.responses for token in response])
    return F.cross_entropy(model.network.llm.lm_head(torch.cat(before)).float(), words)


def _drawing_loss(model: Harmon, batch: Batch, guess: nn.Module | None) -> Tensor:
    assert batch.tokens is not None and batch.near is not None and batch.visible is not None
    assert batch.times is not None and batch.noise is not None
    drawing = Drawing(model.network, *pad([p.ids for p in batch.prompts], model.end_id, "right"))
    drawing.read_prompts()
    vectors = drawing.vectors(batch.near, batch.visible)
    hidden = ~batch.visible
    wanted, given = (x[hidden].repeat(REPEATS, 1) for x in (batch.tokens, vectors))
    each = denoising_loss(model.network.mar.diffloss, wanted, given, batch.times, batch.noise)
    weight = torch.where(figures(batch.tokens), FIGURE, 1.0)[hidden].repeat(REPEATS)
    if guess is not None:
        each = each + (guess(given.float()) - wanted).square().mean(-1)
    return (each * weight).sum() / weight.sum()


def denoising_loss(head: TokenDiffusion, tokens: Tensor, given: Tensor, times: Tensor, noise: Tensor) -> Tensor:
    """The squared error of the noise in tokens (M, c): (M,).

    The published loss counts it as it is. It is much the same whatever a very noisy token stands for: a large network learns that in
    time, a twin needs to be told. So where there is more noise than token, the error counts as it shows in the token (arXiv 2202.00512,
    truncated SNR), up to `LOUDEST` times. Where there is less it counts as it is, for what is left there stays in the picture.

    The variances, which the published loss teaches too (arXiv 2102.09672), stay the least. Among 1000 steps the bounds are close, and
    to make up for errors of its mean a small head learns variances far above the upper one; in 20 steps the bounds are far apart.
    With variances so learnt, drawn tokens were off by 0.3; with the least, by 0.08.
    """
    kept = torch.from_numpy(NoiseSchedule.named(TRAINED_STEPS).kept).to(tokens)[times][:, None]
    noisy = kept.sqrt() * tokens + (1 - kept).sqrt() * noise
    with torch.autocast(tokens.device.type, enabled=False):  # bfloat16 cannot tell noise from noise that is a hundredth off
        eps, _ = head.net(noisy, times, given.float()).chunk(2, -1)
    return ((eps - noise).square() * ((1 - kept) / kept).clamp(1, LOUDEST)).mean(-1)


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
