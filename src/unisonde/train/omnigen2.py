"""How an OmniGen2 twin learns: its autoencoder first, then the language model and the diffusion transformer together.

The published language model was there before, and the diffusion transformer learnt to draw from its states as they were. A twin's has
nothing to say yet: here the gradient of drawing goes through the text features into it, while it learns to write. Drawing is learnt by
flow matching (arXiv 2209.03003), some of it without a prompt; writing by cross-entropy of the response.

The autoencoder keeps the grid, and begins as the identity: what a picture as small as these shows is in single pixels, which the
published way down and up (strided, then nearest neighbours) would blur. Its encoder stays what it is; its decoder learns to draw a clean
picture from latents that are nearly right, which is all that sampling leaves.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from unisonde.data.item import Item, Task
from unisonde.data.tabletop.render import render
from unisonde.data.tabletop.scene import SIDE
from unisonde.models.base import Generation
from unisonde.models.omnigen2 import (
    BEGIN_IMAGE,
    BOS,
    DRAW,
    END_IMAGE,
    EOS,
    IMAGE,
    SCHEDULER,
    WEIGHTS,
    Drawing,
    Encoded,
    Network,
    OmniGen2,
    widened,
)
from unisonde.models.parts import omnigen2_mllm as mllm
from unisonde.models.parts.omnigen2_network import OmniGen2Config, OmniGen2Transformer
from unisonde.models.parts.prompts import picture_places
from unisonde.models.parts.segments import encode
from unisonde.models.parts.text import pad
from unisonde.train.export import new_folder, save_json, save_own, save_weights
from unisonde.train.image_codes import crowd, pixels_of
from unisonde.train.loop import Effort, Schedule, fit
from unisonde.train.tabletop_batches import Example, word_tokenizer

PAD, VIDEO = "<|endoftext|>", "<|video_pad|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, BEGIN_IMAGE, END_IMAGE, IMAGE, VIDEO, DRAW)
TEMPLATE = ("user", "assistant", "<", "img1", ">")
"""Words of the templates that Tabletop's grammar does not have."""

GENERATION: dict[Task, Generation] = {
    "text": Generation(tokens=96, temperature=0.0),
    "image": Generation(guidance=1.5, steps=25),
}
"""The twin's sampling settings. Its world is small and exact, so it draws with less guidance than published, and in fewer steps."""

PICTURES = {"patch_size": 4, "size": {"shortest_edge": SIDE**2, "longest_edge": SIDE**2}}
"""How the twin reads pictures: 8 x 8 patches of 4 x 4 pixels, which become 4 x 4 features."""

LATENTS = Schedule(steps=400, rate=2e-3, warmup=20, weight_decay=0.0)
BATCH = 6

LEANING = 1.5
"""Times are u ** LEANING, u uniform: they lean towards noise, where there is nothing to go by but the prompt. At 3, sharp edges are
hardly learnt, which come late."""

EMPHASIS = 8.0
"""How much a pixel, or the latents of a token, count that are not all of the background, which fills nine tenths of a picture."""

CARRIED = 32.0
"""What two channels of an untrained autoencoder carry along, against which pixel values are small."""
LINEAR = 8.0
"""Where SiLU is as good as linear."""
LOG_VARIANCE = -3.6
"""Of the posterior: a deviation of 0.17 in latents that are pixel values, from which the decoder learns to draw."""


def twin() -> OmniGen2Config:
    """The twin's diffusion transformer: pictures as 8 x 8 tokens of 4 x 4 x 3 values; 1.6 million parameters.

    Rows and columns turn more dimensions of a head than the place in the sequence: of their frequencies only those count that tell eight
    places apart.
    """
    return OmniGen2Config(
        patch_size=4,
        in_channels=3,
        hidden_size=120,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(6, 12, 12),
        text_feat_dim=128,
    )


def twin_mllm(tokenizer: Any) -> Qwen2_5_VLConfig:
    """The configuration of the twin's language model: 0.9 million parameters."""
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in (("image", IMAGE), ("video", VIDEO))}
    ids |= {"vision_start": tokenizer.convert_tokens_to_ids(BEGIN_IMAGE), "vision_end": tokenizer.convert_tokens_to_ids(END_IMAGE)}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4},
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids(EOS),
        "pad_token_id": None,
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 128,
    }
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **{f"{name}_token_id": i for name, i in ids.items()}
    )


def new_twin(seed: int) -> OmniGen2:
    """An untrained twin."""
    tokenizer = word_tokenizer((*SPECIAL_TOKENS, *TEMPLATE), BOS, EOS, PAD)
    torch.manual_seed(seed)
    language_model = Qwen2_5_VLForConditionalGeneration(twin_mllm(tokenizer))
    language_model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(EOS)
    transformer = OmniGen2Transformer(twin())
    drawing = Drawing(side=SIDE, negative="")
    pictures = mllm.pictures_of(PICTURES)
    model = OmniGen2(
        language_model,
        transformer,
        new_vae(seed),
        tokenizer,
        pictures,
        "twin/omnigen2",
        system="",
        generation=GENERATION,
        drawing=drawing,
    )
    initialise(model.network, seed)
    return model


def joint_parts(network: Network) -> nn.ModuleDict:
    """What is trained jointly, under names by which `fit` knows the matrices of all transformer layers."""
    transformer, tower = network.transformer, network.mllm.model.visual
    return nn.ModuleDict(
        {"layers": nn.ModuleList([transformer.noise_refiner, transformer.context_refiner, tower.blocks]), "network": network}
    )


RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "attn.proj.weight")

BRANCH = 0.3
"""Size of what a residual branch of an untrained diffusion transformer adds, before its gate, to a stream of about unit size."""


@torch.no_grad()
def initialise(network: Network, seed: int) -> None:
    """Weights that keep the scale of what they are given (LeCun), embeddings of half unit size, quiet residual branches.

    As published, the time changes nothing at first. Gates begin open, where the official ones begin shut: a shut gate keeps a block from
    learning until it has opened. What enters as noise leaves as velocity, with the other sign, where the official velocity is zero: noise
    has to come through whole, and there is no other way for it.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        if name.endswith("bias") and weight.ndim == 1:
            weight.zero_()
        if ".norm1.linear." in name or name.startswith("transformer.norm_out."):
            weight.zero_()
            if name.endswith("norm1.linear.bias"):
                for gate in (1, 3):
                    weight.chunk(4)[gate].fill_(1.0)
        elif name.endswith((".norm2.weight", "ffn_norm2.weight")) and name.startswith("transformer."):
            weight.fill_(BRANCH)  # they end the residual branches
        elif weight.ndim > 1:
            std = 0.5 if name.endswith("embed_tokens.weight") else weight[0].numel() ** -0.5
            weight.normal_(std=0.3 * std if name.endswith(RESIDUAL_OUTPUTS) else std, generator=generator)
    transformer = network.transformer
    through = torch.linalg.qr(transformer.x_embedder.weight).Q
    width, values = through.shape
    transformer.x_embedder.weight.copy_(through * (width / values) ** 0.5)
    transformer.norm_out.linear_2.weight.copy_(-through.T * (values / width) ** 0.5)


# ------------------------------------------------------------------------------------------------------------------- autoencoder


def new_vae(seed: int) -> Any:
    """The twin's autoencoder: 32 x 32 pictures as 3 x 32 x 32 latents, at first the pixels themselves.

    As in FLUX's there are no convolutions around the latents. Norms have one group: with several, each takes the level of its few
    channels out, and with it the colour of a plain picture.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(16,),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=1,
        sample_size=SIDE,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    begin_linear(vae)
    return vae


@torch.no_grad()
def begin_linear(vae: Any) -> None:
    """Start as the identity.

    Residual branches begin at zero. What is left of either half are two convolutions with a norm and SiLU between. Six channels hold the
    pixel's values and their opposites, so that the norm's mean is zero; two hold a large constant and its opposite, so that its
    deviation hardly depends on the picture; and SiLU is made linear by moving what enters it up.
    """
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d) and name.endswith("conv2"):
            for parameter in module.parameters():
                parameter.zero_()
    width = vae.config.block_out_channels[0]
    for half in (vae.encoder, vae.decoder):
        for conv in (half.conv_in, half.conv_out):
            conv.weight.zero_()
            conv.bias.zero_()
        for k in range(3):
            for sign, channel in ((1.0, k), (-1.0, k + 3)):
                half.conv_in.weight[channel, k, 1, 1] = sign
                half.conv_out.weight[k, channel, 1, 1] = 0.5 * sign
        half.conv_in.bias[6], half.conv_in.bias[7] = CARRIED, -CARRIED
        half.conv_norm_out.weight.fill_(CARRIED * (2 / width) ** 0.5)
        half.conv_norm_out.bias.fill_(LINEAR)
        for name, module in half.named_modules():
            if name.endswith("norm1"):  # residual branches see the picture at its own size, and the constants at unit size
                module.weight.fill_(CARRIED * (2 / width) ** 0.5)
                module.weight[6:8] /= CARRIED
    vae.encoder.conv_out.bias[3:] = LOG_VARIANCE


def train_vae(
    vae: Any,
    checkpoint: Path,
    seed: int = 0,
    schedule: Schedule = LATENTS,
    pictures: Callable[[random.Random], Tensor] | None = None,
) -> Effort:
    """Set the shift and scale that make an autoencoder's latents centred and of unit variance, and train its decoder, in place.

    Args:
        pictures: a batch of pixels from random numbers; pictures of up to nine things of any shape and colour if None.
    """
    draw = pictures or (lambda rng: pixels_of([crowd(rng) for _ in range(BATCH)]))

    def loss(step: int) -> Tensor:
        rng = random.Random(f"{seed}/latents/{step}")
        return latent_loss(vae, draw(rng), torch.Generator().manual_seed(rng.getrandbits(60)))

    measure(vae, torch.cat([draw(random.Random(f"{seed}/measure/{k}")) for k in range(16)]))
    # What reads the pictures off the last activations stays: those are large and would move it by a whole colour in a step.
    parts = nn.ModuleList([vae.decoder.conv_in, vae.decoder.mid_block, vae.decoder.up_blocks])
    effort = fit("latents", parts.train(), loss, schedule, checkpoint, BATCH)
    vae.eval()
    return effort


def latent_loss(vae: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """The error of pictures decoded from samples of the posterior, that of figures weighted. pixels: (B, 3, H, W) in [-1, 1]."""
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.sample(generator)
    error = vae.decode(latents).sample - pixels
    weight = torch.where(figures(pixels), EMPHASIS, 1.0).expand_as(error)
    return ((error.abs() + error.square()) * weight).sum() / weight.sum()


def figures(pixels: Tensor) -> Tensor:
    """Which pixels are off the background, the commonest colour of a picture: (B, 3, H, W) -> (B, 1, H, W) booleans."""
    return (pixels != pixels.flatten(2).median(-1).values[..., None, None]).any(1, keepdim=True)


@torch.no_grad()
def measure(vae: Any, pixels: Tensor) -> None:
    """Set the shift and scale of latents to those of these pictures."""
    latents = vae.encode(pixels).latent_dist.mode()
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=1 / float(latents.std()))


@torch.no_grad()
def latents_of(vae: Any, pixels: Tensor) -> Tensor:
    """What is to be drawn: (B, 3, H, W) -> (B, c, h, w)."""
    return (vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor


# ---------------------------------------------------------------------------------------------------------------- words, pictures


@dataclass(frozen=True)
class Batch:
    """Examples of one kind as the model sees them in use, by its own templates.

    Attributes:
        prompts: with the negative prompt for some drawings; of an example with a picture, `widened` as in use.
        latents, noise: of drawings, (B, c, h, w): where they go, and what they set out from.
        times: (B,), how far they are.
        weights: (B, 1, h, w), what each latent counts.
        responses: token ids of text responses, with the end.
        pictures: that are shown, as the language model takes them.
    """

    prompts: list[Encoded]
    latents: Tensor | None = None
    noise: Tensor | None = None
    times: Tensor | None = None
    weights: Tensor | None = None
    responses: list[list[int]] | None = None
    pictures: dict[str, Tensor] | None = None


def collate(model: OmniGen2, examples: Sequence[Example], rng: random.Random, unconditional: float = 0.1) -> Batch:
    """A batch of examples of one kind.

    Args:
        rng: draws noise, times, and which drawings go without a prompt.
        unconditional: the share of those.
    """
    kind = examples[0].kind
    prompts = []
    for made in examples:
        text = model.drawing.negative if kind == "draw" and rng.random() < unconditional else made.prompt
        item = Item("", "", text, Path() if kind in ("caption", "answer") else None)  # the path stands for a picture
        prompts.append(
            Encoded(*encode(model.tokenizer, model.segments(item, "image" if kind == "draw" else "text"), special=False))
        )
    if kind == "draw":
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        pixels = pixels_of([made.scene for made in examples])
        latents = latents_of(model.vae, pixels)
        noise = torch.randn(latents.shape, generator=generator)
        times = torch.rand(len(examples), generator=generator) ** LEANING
        side = model.network.transformer.config.patch_size
        drawn = F.interpolate(F.max_pool2d(figures(pixels).float(), side), scale_factor=side)
        return Batch(prompts, latents, noise, times, 1 + (EMPHASIS - 1) * drawn)
    end = model.tokenizer.convert_tokens_to_ids(EOS)
    responses = [[*model.tokenizer(made.response, add_special_tokens=False)["input_ids"], end] for made in examples]
    if kind == "infer":
        return Batch(prompts, responses=responses)
    pictures = dict(model.pictures(images=[render(made.scene) for made in examples], return_tensors="pt"))
    features = (pictures["image_grid_thw"].prod(-1) // model.pictures.merge_size**2).tolist()
    wide = [widened(p.ids, p.spans, p.ids.index(model.image_id), n) for p, n in zip(prompts, features, strict=True)]
    return Batch([Encoded(*prompt) for prompt in wide], responses=responses, pictures=pictures)


def joint_loss(model: OmniGen2, batch: Batch) -> Tensor:
    """The squared error of the velocity for drawings, cross-entropy in nats a token for text."""
    if batch.responses is None:
        return _flow_loss(model, batch)
    sequences = [[*p.ids, *tail] for p, tail in zip(batch.prompts, batch.responses, strict=True)]
    ids, there = pad(sequences, model.pad_id, "right")
    where = picture_places([p.spans for p in batch.prompts], [0] * len(ids), ids.shape[1])
    states = mllm.states(model.network.mllm, ids, there, where, batch.pictures)
    # The state before a token predicts it.
    before = [
        states[k, len(p.ids) - 1 : len(p.ids) - 1 + len(r)]
        for k, (p, r) in enumerate(zip(batch.prompts, batch.responses, strict=True))
    ]
    words = torch.tensor([token for response in batch.responses for token in response])
    return F.cross_entropy(model.network.mllm.lm_head(torch.cat(before)).float(), words)


def _flow_loss(model: OmniGen2, batch: Batch) -> Tensor:
    """From noise straight to data, at an even pace; tokens of what stands on the background count more than it."""
    assert batch.latents is not None and batch.noise is not None and batch.times is not None and batch.weights is not None
    transformer = model.network.transformer
    ids, there = pad([p.ids for p in batch.prompts], model.pad_id, "right")
    texts = transformer.read(mllm.states(model.network.mllm, ids, there), [len(p.ids) for p in batch.prompts])
    z = torch.lerp(batch.noise, batch.latents, batch.times[:, None, None, None])
    error = transformer.velocity(texts, z, batch.times) - (batch.latents - batch.noise)
    return (error.square().mean(1, keepdim=True) * batch.weights).sum() / batch.weights.sum()


# ------------------------------------------------------------------------------------------------------------------------ writing


def export(model: OmniGen2, out: Path, record: dict[str, Any] | None = None) -> None:
    """Write a folder that `unisonde.load` opens, in the published layout; weights in float16.

    Raises:
        ValueError: `out` already holds files.
    """
    network = model.network
    with new_folder(out, "mllm", "transformer", "vae", "scheduler", "processor") as folder:
        for part, file in (
            (network.mllm, "mllm/model"),
            (network.transformer, f"transformer/{WEIGHTS}"),
            (model.vae, f"vae/{WEIGHTS}"),
        ):
            save_weights(part.state_dict(), folder / f"{file}.safetensors")
        network.mllm.config.save_pretrained(folder / "mllm")
        network.mllm.generation_config.save_pretrained(folder / "mllm")
        model.vae.save_config(folder / "vae")
        model.tokenizer.save_pretrained(folder / "processor")
        save_json({"_class_name": "OmniGen2Pipeline"}, folder / "model_index.json")
        save_json(network.transformer.config.to_dict(), folder / "transformer/config.json")
        scheduler = {"_class_name": SCHEDULER, "dynamic_time_shift": model.drawing.shift}
        save_json(scheduler, folder / "scheduler/scheduler_config.json")
        save_json(PICTURES, folder / "processor/preprocessor_config.json")
        drawing = {name: value for name, value in asdict(model.drawing).items() if name != "shift"}
        save_own(model, folder, record, system=model.system, drawing=drawing)
