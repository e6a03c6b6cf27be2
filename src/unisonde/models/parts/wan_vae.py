"""The Wan 2.1 autoencoder (arXiv 2503.20314) for single pictures: from pixels to normalised latents and back.

The network is `AutoencoderKLWan` of `diffusers` (`Any` in signatures: its base classes have no types); a picture is a video of one
frame. Two layouts are opened: the original
`Wan2.1_VAE.pth`, renamed by a table, and that of `diffusers` (`config.json` and `diffusion_pytorch_model.safetensors`).

Latents are normalised by a mean and a deviation for each channel. Show-o2 reads a sample of the posterior, whose noise it does not
divide by that deviation; so it is here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from unisonde.models.parts.checkpoint import Keys, Rename, empty, fill, tensors_of, weight_files
from unisonde.models.parts.pretrained import reach, read_json

FILE = "Wan2.1_VAE.pth"
REPOSITORY = "Wan-AI/Wan2.1-T2V-14B"
"""Where the original file is published; Show-o2 refers to it."""

FOLDER, CONFIG, WEIGHTS = "vae", "config.json", "diffusion_pytorch_model"
"""The layout of `diffusers`, in a folder beside the model."""

_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}


def keys_of(levels: int = 4, blocks: int = 2) -> Keys:
    """From the names of `Wan2.1_VAE.pth` to those of `AutoencoderKLWan`.

    The original counts the blocks of the decoder through, the resampling that ends a level among them; `diffusers` counts them by level.

    Args:
        levels: of resolution.
        blocks: residual blocks a level of the encoder; the decoder has one more.
    """

    def parts(theirs: str, ours: str) -> list[Rename]:
        return [Rename(rf"{theirs}\.{re.escape(old)}\.(?P<leaf>\w+)", rf"{ours}.{new}.\g<leaf>") for old, new in _RESIDUAL.items()]

    renames = [Rename(r"conv1\.(\w+)", r"quant_conv.\1"), Rename(r"conv2\.(\w+)", r"post_quant_conv.\1")]
    for half in ("encoder", "decoder"):
        renames += [
            Rename(rf"{half}\.conv1\.(\w+)", rf"{half}.conv_in.\1"),
            Rename(rf"{half}\.head\.0\.gamma", f"{half}.norm_out.gamma"),
            Rename(rf"{half}\.head\.2\.(\w+)", rf"{half}.conv_out.\1"),
            Rename(rf"{half}\.middle\.1\.(.+)", rf"{half}.mid_block.attentions.0.\1"),
        ]
        for block, resnet in ((0, 0), (2, 1)):
            renames += parts(rf"{half}\.middle\.{block}", f"{half}.mid_block.resnets.{resnet}")
    renames += parts(r"encoder\.downsamples\.(\d+)", r"encoder.down_blocks.\1")
    renames.append(Rename(r"encoder\.downsamples\.(\d+)\.(.+)", r"encoder.down_blocks.\1.\2"))
    for level in range(levels):
        first = level * (blocks + 2)
        for block in range(blocks + 1):
            renames += parts(rf"decoder\.upsamples\.{first + block}", f"decoder.up_blocks.{level}.resnets.{block}")
        renames.append(Rename(rf"decoder\.upsamples\.{first + blocks + 1}\.(.+)", rf"decoder.up_blocks.{level}.upsamplers.0.\1"))
    return Keys(tuple(renames))


def load(path: str, device: str | torch.device, name: str) -> Any:
    """The autoencoder that goes with the model of a folder or hub id, in float32.

    Taken is what lies in the folder `vae` beside the model, or `Wan2.1_VAE.pth` there, or that file from its publisher.

    Raises:
        ValueError: there is none, or its tensors do not fill the network exactly.
    """
    if reach(path, f"{FOLDER}/{CONFIG}") is not None:
        network = build(read_json(path, f"{FOLDER}/{CONFIG}"))
        keys, files = Keys(), weight_files(path, f"{FOLDER}/{WEIGHTS}")
    else:
        where = next((place for place in (path, REPOSITORY) if reach(place, FILE) is not None), None)
        if where is None:
            raise ValueError(
                f"the autoencoder of {name} is neither in {path!r} nor can it be had from the hub; put {FILE} of {REPOSITORY} there"
            )
        network, keys, files = build(), keys_of(), weight_files(where, FILE)
    fill(network, tensors_of(files), keys, device, torch.float32, f"{name} (autoencoder)")
    return network.eval()


def build(config: Mapping[str, Any] | None = None) -> Any:
    """An empty autoencoder; the published one without a configuration."""
    quiet = logging.getLogger("diffusers.configuration_utils")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # of a newer configuration's unknown settings; a wrong network is seen by its keys
    try:
        return empty(lambda: AutoencoderKLWan.from_config(dict(config or {})))
    finally:
        quiet.setLevel(level)


def reduction(vae: Any) -> int:
    """Pixels a latent, along a side."""
    return 2 ** (len(vae.config.dim_mult) - 1) * (vae.config.patch_size or 1)


def encode(vae: Any, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
    """Normalised latents: (B, 3, H, W) in [-1, 1] -> (B, c, h, w).

    Args:
        noise: (B, c, h, w), standard normal, for a sample of the posterior; its mode if None.
    """
    posterior = vae.encode(_like(vae, pixels)[:, :, None]).latent_dist
    mean, std = _scale(vae)
    latents = (posterior.mode()[:, :, 0] - mean) / std
    return latents if noise is None else latents + posterior.std[:, :, 0] * noise.to(latents)


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pixel values: (B, c, h, w) -> (B, 3, H, W), kept in [-1, 1]."""
    mean, std = _scale(vae)
    return vae.decode((_like(vae, latents) * std + mean)[:, :, None]).sample[:, :, 0]


def _like(vae: Any, x: Tensor) -> Tensor:
    return x.to(vae.post_quant_conv.weight)


def _scale(vae: Any) -> tuple[Tensor, Tensor]:
    like = vae.post_quant_conv.weight
    mean, std = (torch.tensor(values).to(like)[:, None, None] for values in (vae.config.latents_mean, vae.config.latents_std))
    return mean, std
