"""The autoencoder of Harmon and MAR, KL-16 of latent diffusion (arXiv 2112.10752): pixels to latents of 16 channels, 16 times smaller.

The network is `AutoencoderKL` of `diffusers` (`Any` in signatures: its base classes have no types). The published file `kl16.ckpt` has
the names of the original code, which a table renames; its attention is written as 1 x 1 convolutions, which `diffusers` has as matrices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from unisonde.models.parts.checkpoint import Keys, Rename, empty, fill

PUBLISHED: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"] * 5,
    "block_out_channels": [128, 128, 256, 256, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 0.2325,
}
"""66.5 million parameters. The encoder has attention at its last resolution, the decoder in its middle alone."""

_CONVOLVED = re.compile(r".+\.attn(\.\d+|_1)\.(q|k|v|proj_out)\.weight")

_RESIDUAL = ((r"(norm1|conv1|norm2|conv2)", r"\g<1>"), (r"nin_shortcut", "conv_shortcut"))
_ATTENTION = ((r"norm", "group_norm"), (r"(q|k|v)", r"to_\g<1>"), (r"proj_out", "to_out.0"))


def keys_of(levels: int = 5) -> Keys:
    """From the names of the original code to those of `AutoencoderKL`.

    Levels are numbered from the finest in both halves of the original; the decoder of `diffusers` counts them as they are run.

    Args:
        levels: of resolution.
    """

    def parts(theirs: str, ours: str, leaves: tuple[tuple[str, str], ...]) -> list[Rename]:
        return [Rename(rf"{theirs}\.{leaf}\.(?P<kind>\w+)", rf"{ours}.{name}.\g<kind>") for leaf, name in leaves]

    renames: list[Rename] = []
    for half in ("encoder", "decoder"):
        renames.append(Rename(rf"{half}\.norm_out\.(\w+)", rf"{half}.conv_norm_out.\1"))
        renames += parts(rf"{half}\.mid\.attn_1", f"{half}.mid_block.attentions.0", _ATTENTION)
        for block in (1, 2):
            renames += parts(rf"{half}\.mid\.block_{block}", f"{half}.mid_block.resnets.{block - 1}", _RESIDUAL)
    for level in range(levels):
        for theirs, ours, way in (
            (rf"encoder\.down\.{level}", f"encoder.down_blocks.{level}", "down"),
            (rf"decoder\.up\.{level}", f"decoder.up_blocks.{levels - 1 - level}", "up"),
        ):
            renames.append(Rename(rf"{theirs}\.{way}sample\.conv\.(\w+)", rf"{ours}.{way}samplers.0.conv.\1"))
            for block in range(3):  # two in the encoder
                renames += parts(rf"{theirs}\.block\.{block}", f"{ours}.resnets.{block}", _RESIDUAL)
                renames += parts(rf"{theirs}\.attn\.{block}", f"{ours}.attentions.{block}", _ATTENTION)
    return Keys(tuple(renames), ignored={r"loss\..+": "what trained it: a discriminator and a perceptual distance"})


def as_matrices(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Original tensors, with the 1 x 1 convolutions of attention as matrices."""
    for key, tensor in tensors:
        yield key, tensor.flatten(1) if _CONVOLVED.fullmatch(key) else tensor


def build(config: Mapping[str, Any] | None = None) -> Any:
    """An empty autoencoder; the published one without a configuration."""
    return empty(lambda: AutoencoderKL.from_config(dict(config or PUBLISHED)))


def filled(
    tensors: Iterable[tuple[str, Tensor]], device: str | torch.device, name: str, config: Mapping[str, Any] | None = None
) -> Any:
    """The autoencoder of tensors under their original names, in float32.

    Raises:
        ValueError: they do not fill it exactly.
    """
    network = build(config)
    fill(
        network,
        as_matrices(tensors),
        keys_of(len(network.config.block_out_channels)),
        device,
        torch.float32,
        f"{name} (autoencoder)",
    )
    return network.eval()


def stride(vae: Any) -> int:
    """Pixels a latent, along a side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Latents of about unit size, the mode of their distribution: (B, 3, H, W) in [-1, 1] -> (B, c, h, w)."""
    return vae.encode(pixels.to(vae.post_quant_conv.weight)).latent_dist.mode() * vae.config.scaling_factor


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pixel values, about [-1, 1]: (B, c, h, w) -> (B, 3, H, W)."""
    return vae.decode(latents.to(vae.post_quant_conv.weight) / vae.config.scaling_factor).sample
