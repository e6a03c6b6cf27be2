"""How a BAGEL twin learns: its autoencoder first, then drawing by flow matching and writing word by word, both experts together.

Drawing: at a random time t between data (0) and noise (1) the network sees z = (1 - t) x + t noise and is asked for noise - x. The
paper draws the logistic of normal numbers, moved towards noise; here times come as often as sampling visits them, or the last steps,
which clean a picture up, are hardly learnt. Some drawings are learnt without their prompt, as guidance leaves it out. Writing:
cross-entropy of the response. The autoencoder keeps the grid of pixels, for pictures as small as these show single pixels, and begins as
a map that is nearly linear, from colours to latents and back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unisonde.data.item import Item, Task
from unisonde.data.tabletop.scene import Scene
from unisonde.models.bagel import BOS, EOS, LLM, SPECIAL_TOKENS, VIT, Bagel, Encoded, arrange, read_rows
from unisonde.models.base import Generation
from unisonde.models.parts import flux_vae
from unisonde.models.parts.bagel_flow import Guidance, shifted
from unisonde.models.parts.bagel_network import BagelNetwork, squares, twin
from unisonde.models.parts.flux_vae import FluxVaeConfig
from unisonde.models.parts.segments import spans_of
from unisonde.models.trace import Span
from unisonde.train.export import new_folder, save_json, save_own, save_weights
from unisonde.train.image_codes import figures, pixels_of
from unisonde.train.loop import Effort, Schedule, fit
from unisonde.train.tabletop_batches import Example, word_tokenizer

GENERATION: dict[Task, Generation] = {
    "text": Generation(tokens=96, temperature=0.0),
    "image": Generation(guidance=1.5, steps=50),
}
"""The twin's sampling settings. Its world is small and exact, so it draws with less guidance than published."""

GUIDANCE = Guidance(text=1.5)

PAD = "<pad>"
"""What the tokenizer's own class wants; BAGEL pads with nothing, and no prompt holds it."""

AUTOENCODER = FluxVaeConfig(widths=(16,), blocks=1, latent_channels=4, groups=1, attention=False, scale=1.0, shift=0.0)
"""The twin's autoencoder: 32 x 32 pictures to as many latents. Group norms have one group: with several, each takes the level of its few
channels out, and with it the colour of a plain picture."""

CONSTANT = 4.0
"""What channels without a colour carry along in an untrained autoencoder, so that norms divide by much the same in every picture."""

OFFSET = 12.0
"""Where the untrained autoencoder's activations lie, for SiLU is nearly linear there."""

LOG_VARIANCE = -6.0
"""Of the posterior of an untrained autoencoder, whose latents have about unit size."""

TREMOR = 0.2
"""Deviation of the noise on latents, of unit size, from which the decoder learns to draw; about what sampling leaves."""

FIGURE = 8.0
"""What a pixel or token that is not all background counts against one that is. Most are background, which is soon known: after 300 steps
in which all counted alike, a tenth of the background's velocity was left at t = 1, and seven tenths of the figures'."""


def new_twin(seed: int) -> Bagel:
    """An untrained twin."""
    tokenizer = word_tokenizer((*SPECIAL_TOKENS, PAD), BOS, EOS, PAD)
    torch.manual_seed(seed)
    network, vae = BagelNetwork(twin(len(tokenizer))), flux_vae.build(AUTOENCODER)
    initialise(network, seed)
    initialise_autoencoder(vae)
    return Bagel(network, vae, tokenizer, "twin/bagel", generation=GENERATION, guidance=GUIDANCE)


def joint_parts(network: BagelNetwork) -> nn.ModuleList:
    """What is trained jointly: everything but the fixed tables of places."""
    drawing = [network.time_embedder, network.vae2llm, network.llm2vae]
    return nn.ModuleList([network.language_model, *drawing, network.vit_model, network.connector])


RESIDUAL_SIZE = 1.6
"""Of the residual stream of an untrained twin at a latent token: latents and time have unit size, places half of it squared."""

RESIDUAL_OUTPUTS = ("o_proj", "o_proj_moe_gen", "down_proj", "out_proj", "fc2")


@torch.no_grad()
def initialise(network: BagelNetwork, seed: int) -> None:
    """Weights that keep the scale of what they are given (LeCun), embeddings of half unit size, quiet residual branches.

    What enters as latents leaves as velocity at first, by way of the residual stream: noise has to come through whole, and there is no
    other way for it. The experts begin alike, as published: `gen` as a copy of `und`.
    """
    generator = torch.Generator().manual_seed(seed)
    named = dict(network.named_parameters())
    for name, weight in named.items():
        if "_moe_gen" in name or not weight.requires_grad:
            continue
        if name.endswith("bias"):
            weight.zero_()
        elif weight.ndim > 1:
            std = 0.5 if "embed" in name and "patch" not in name and "time" not in name else weight[0].numel() ** -0.5
            inside = ".layers." in name and name.rpartition(".")[0].endswith(RESIDUAL_OUTPUTS)
            weight.normal_(std=0.3 * std if inside else std, generator=generator)
    through = torch.linalg.qr(network.vae2llm.weight).Q
    width, values = through.shape
    network.vae2llm.weight.copy_(through * (width / values) ** 0.5)
    network.llm2vae.weight.copy_(through.T * (values / width) ** 0.5 * RESIDUAL_SIZE)
    for name, weight in named.items():
        if "_moe_gen" in name:
            weight.copy_(named[name.replace("_moe_gen", "")])


# ----------------------------------------------------------------------------------------------------------------- autoencoder


@torch.no_grad()
def initialise_autoencoder(vae: Any) -> None:
    """Start as nearly linear: three channels carry the colours, pixel by pixel, the others a constant; residual branches are zero."""
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d) and name.endswith("conv2"):
            for parameter in module.parameters():
                parameter.zero_()
    for half, given in ((vae.encoder, 3), (vae.decoder, vae.config.latent_channels)):
        width = half.conv_in.out_channels
        still = torch.arange(given, given + (width - given) // 2 * 2)
        carried = torch.zeros(width)
        carried[still[::2]], carried[still[1::2]] = CONSTANT, -CONSTANT
        _pixelwise(half.conv_in, torch.eye(width, given), carried)
        half.conv_norm_out.weight.fill_(float(carried.square().mean()) ** 0.5)
        half.conv_norm_out.bias.fill_(OFFSET)
        back = torch.eye(3, width)
        back[:, still] = -1 / len(still)  # takes out the level by which the norm has moved every channel
        _pixelwise(half.conv_out, back, torch.zeros(3))
    vae.encoder.conv_out.bias[vae.config.latent_channels :] = LOG_VARIANCE


def _pixelwise(conv: nn.Conv2d, matrix: Tensor, bias: Tensor) -> None:
    """Make a convolution a matrix at each pixel, its first rows (o, i) given and the others zero."""
    conv.weight.zero_()
    conv.weight[: len(matrix), :, 1, 1] = matrix
    assert conv.bias is not None
    conv.bias.zero_()
    conv.bias[: len(bias)] = bias


def train_autoencoder(
    model: Bagel, scenes: Callable[[random.Random], list[Scene]], schedule: Schedule, checkpoint: Path, seed: int = 0
) -> Effort:
    """Set scale and shift so that latents have mean zero and unit variance, and train the decoder in place. The encoder stays linear.

    Args:
        scenes: the pictures of one step.
    """
    vae = model.vae
    measure(vae, pixels_of([scene for k in range(8) for scene in scenes(random.Random(f"{seed}/measure/{k}"))]))

    def loss(step: int) -> Tensor:
        pixels = pixels_of(scenes(random.Random(f"{seed}/autoencoder/{step}")))
        return decoder_loss(vae, pixels, torch.Generator().manual_seed(step))

    effort = fit("autoencoder", vae.decoder.train(), loss, schedule, checkpoint, len(scenes(random.Random(0))))
    vae.eval()
    return effort


def decoder_loss(vae: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """The error of pictures decoded from latents that tremble, that of figures weighted. pixels: (B, 3, H, W) in [-1, 1]."""
    with torch.no_grad():
        latents = flux_vae.encode(vae, pixels)
    error = flux_vae.decode(vae, latents + TREMOR * torch.randn(latents.shape, generator=generator)) - pixels
    weight = torch.where(figures(pixels), FIGURE, 1.0).expand_as(pixels)
    return ((error.abs() + error.square()) * weight).sum() / weight.sum()


@torch.no_grad()
def measure(vae: Any, pixels: Tensor) -> None:
    """Set scale and shift so that the latents of these pictures have mean zero and unit variance."""
    z = vae.encode(pixels).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / float(z.std()), shift_factor=float(z.mean()))


# ---------------------------------------------------------------------------------------------------------------- words, pictures


@dataclass(frozen=True)
class Batch:
    """Examples of one kind as the model sees them in use, by its own templates.

    Attributes:
        prompts: empty ones (no positions) for drawings without a prompt.
        latents: of drawings, as tokens (B, n, d); `noise` as they are, and `times` (B,), how much of it there is.
        weights: (B, n), what each token counts.
        pixels: of pictures that are shown.
        responses: token ids of text responses, with the end.
    """

    prompts: list[Encoded]
    latents: Tensor | None = None
    noise: Tensor | None = None
    times: Tensor | None = None
    weights: Tensor | None = None
    pixels: Tensor | None = None
    responses: list[list[int]] | None = None


def collate(model: Bagel, examples: Sequence[Example], rng: random.Random, unconditional: float = 0.1) -> Batch:
    """A batch of examples of one kind.

    Args:
        rng: draws noise, times, and which drawings go without a prompt.
        unconditional: the share of those.
    """
    kind = examples[0].kind
    pixels = None if kind == "infer" else pixels_of([made.scene for made in examples])
    prompts = [_prompt(model, made) for made in examples]
    if kind != "draw":
        responses = [[*model.tokenizer(made.response, add_special_tokens=False)["input_ids"], model.marks.eos] for made in examples]
        return Batch(prompts, pixels=pixels if kind in ("caption", "answer") else None, responses=responses)
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    assert pixels is not None
    with torch.no_grad():
        tokens = squares(flux_vae.encode(model.vae, pixels), model.config.latent_patch)
    times = shifted(torch.rand(len(examples), generator=generator))
    prompts = [Encoded([], ()) if rng.random() < unconditional else prompt for prompt in prompts]
    drawn = squares(figures(pixels).float(), model.config.stride).amax(-1)
    return Batch(prompts, tokens, torch.randn(tokens.shape, generator=generator), times, 1 + (FIGURE - 1) * drawn)


def _prompt(model: Bagel, made: Example) -> Encoded:
    item = Item("", "", made.prompt)
    seen = model.config.vision_grid**2 if made.kind in ("caption", "answer") else 0  # the pixels come otherwise
    pieces = model.pieces(item, "image" if made.kind == "draw" else "text", seen)
    ids = [token for piece, _, _ in pieces for token in piece]
    return Encoded(ids, spans_of([(modality, kind) for piece, modality, kind in pieces for _ in piece]))


def joint_loss(model: Bagel, batch: Batch) -> Tensor:
    """Drawing: the squared error of the velocity, that of figures weighted. Writing: cross-entropy of the response, in nats a token."""
    if batch.responses is None:
        return _flow_loss(model, batch)
    features = [] if batch.pixels is None else [model.network.seen(pixels) for pixels in batch.pixels]
    states = model.read(batch.prompts, batch.responses, features)
    # The state before a token predicts it.
    before = [
        states[k, len(p.ids) - 1 : len(p.ids) - 1 + len(r)]
        for k, (p, r) in enumerate(zip(batch.prompts, batch.responses, strict=True))
    ]
    words = torch.tensor([token for response in batch.responses for token in response])
    return F.cross_entropy(model.network.logits(torch.cat(before)), words)


def _flow_loss(model: Bagel, batch: Batch) -> Tensor:
    assert batch.latents is not None and batch.noise is not None and batch.times is not None and batch.weights is not None
    noisy = torch.lerp(batch.latents, batch.noise, batch.times[:, None, None])
    error = velocity_of(model, batch.prompts, noisy, batch.times) - (batch.noise - batch.latents)
    return (error.square().mean(-1) * batch.weights).sum() / batch.weights.sum()


def velocity_of(model: Bagel, prompts: Sequence[Encoded], latents: Tensor, times: Tensor) -> Tensor:
    """The velocity of latents (B, n, d) at times (B,), in one pass over prompts and pictures; `Canvas` gives the same from a context."""
    tokens = model.network.drawn(latents, times, model.grid)
    marks, count = model.marks, latents.shape[1]
    picture = [marks.begin_image, *[marks.begin_image] * count, marks.end_image]
    layouts = []
    for prompt in prompts:
        start = len(prompt.ids)
        held = [("text", start, 1), ("image", start + 1, count), ("text", start + count + 1, 1)]
        spans = [
            Span(at, at + size, "response", modality, "content" if modality == "image" else "template")  # type: ignore[arg-type]
            for modality, at, size in held
        ]
        layouts.append(arrange([*prompt.spans, *spans], 1))
    states, _ = read_rows(model.network, [[*p.ids, *picture] for p in prompts], layouts, list(tokens), marks.eos, "right")
    inside = torch.stack([states[k, len(p.ids) + 1 : len(p.ids) + 1 + count] for k, p in enumerate(prompts)])
    return model.network.velocity(inside)


# --------------------------------------------------------------------------------------------------------------------- export


def export(model: Bagel, out: Path, record: dict[str, Any] | None = None) -> None:
    """Write a folder that `unisonde.load` opens, in the published layout, weights in float16.

    Raises:
        ValueError: `out` already holds files.
    """
    autoencoder = replace(AUTOENCODER, scale=model.vae.config.scaling_factor, shift=model.vae.config.shift_factor)
    llm, vit, sizes = model.config.to_dicts()
    with new_folder(out) as folder:
        save_weights(model.network.state_dict(), folder / "ema.safetensors")
        save_weights(flux_vae.official_tensors(model.vae, autoencoder), folder / flux_vae.FILE)
        model.tokenizer.save_pretrained(folder)
        for name, held in {LLM: llm, VIT: vit, "config.json": {"name": [model.name]}}.items():
            save_json(held, folder / name)
        save_own(model, folder, record, sizes=sizes, autoencoder=asdict(autoencoder), guidance=asdict(model.guidance))
