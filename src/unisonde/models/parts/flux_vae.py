"""The FLUX autoencoder as BAGEL publishes it (`ae.safetensors`): from pixels to normalised latents and back.

The network is `AutoencoderKL` of `diffusers` (`Any` in signatures: its base classes have no types). The file has the names of its
authors, who count the decoder's levels from fine to coarse and write the attention's matrices as convolutions of one pixel; a table of
modules says what is what.

Latents are scale (z - shift). Where BAGEL reads a picture, z is a sample of the posterior.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from unisonde.models.parts.checkpoint import Keys, Rename, empty, fill

FILE = "ae.safetensors"


@dataclass(frozen=True)
class FluxVaeConfig:
    """Sizes of an autoencoder; the published ones by default.

    Attributes:
        widths: channels of each level, from fine to coarse.
        blocks: residual blocks a level of the encoder; the decoder has one more.
        groups: of the group norms.
        attention: whether there is attention in the middle.
        scale, shift: latents are scale (z - shift).
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    latent_channels: int = 16
    groups: int = 32
    attention: bool = True
    scale: float = 0.3611
    shift: float = 0.1159

    @property
    def reduction(self) -> int:
        """Pixels a latent, along a side."""
        return 2 ** (len(self.widths) - 1)


def build(config: FluxVaeConfig) -> Any:
    """An autoencoder of random weights."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(config.widths),
        up_block_types=("UpDecoderBlock2D",) * len(config.widths),
        block_out_channels=config.widths,
        layers_per_block=config.blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
        scaling_factor=config.scale,
        shift_factor=config.shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=config.attention,
    )


def modules(config: FluxVaeConfig) -> dict[str, str]:
    """The official names of the modules that have weights -> those of `diffusers`."""
    names: dict[str, str] = {}

    def residual(theirs: str, ours: str) -> None:
        names.update({f"{theirs}.{part}": f"{ours}.{part}" for part in ("norm1", "conv1", "norm2", "conv2")})
        names[f"{theirs}.nin_shortcut"] = f"{ours}.conv_shortcut"

    top = len(config.widths) - 1
    for half, levels, blocks, resampled in (
        ("encoder", "down", config.blocks, "downsample"),
        ("decoder", "up", config.blocks + 1, "upsample"),
    ):
        names |= {
            f"{half}.conv_in": f"{half}.conv_in",
            f"{half}.norm_out": f"{half}.conv_norm_out",
            f"{half}.conv_out": f"{half}.conv_out",
        }
        for level in range(top + 1):
            ours = f"{half}.{levels}_blocks.{level if half == 'encoder' else top - level}"
            for block in range(blocks):
                residual(f"{half}.{levels}.{level}.block.{block}", f"{ours}.resnets.{block}")
            names[f"{half}.{levels}.{level}.{resampled}.conv"] = f"{ours}.{resampled}rs.0.conv"
        for block in (0, 1):
            residual(f"{half}.mid.block_{block + 1}", f"{half}.mid_block.resnets.{block}")
        for theirs, part in {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}.items():
            names[f"{half}.mid.attn_1.{theirs}"] = f"{half}.mid_block.attentions.0.{part}"
    return names


def keys_of(config: FluxVaeConfig) -> Keys:
    """How official keys become those of `diffusers`."""
    return Keys(tuple(Rename(rf"{re.escape(theirs)}\.(\w+)", rf"{ours}.\1") for theirs, ours in modules(config).items()))


def as_matrices(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The attention's convolutions of one pixel as the matrices that they are."""
    for key, tensor in tensors:
        yield key, tensor.flatten(1) if _MATRIX.fullmatch(key) and tensor.shape[2:] == (1, 1) else tensor


_MATRIX = re.compile(r".*\.attn_1\.(q|k|v|proj_out)\.weight")


def official_tensors(vae: Any, config: FluxVaeConfig) -> dict[str, Tensor]:
    """The weights as the official file has them."""
    theirs = {ours: name for name, ours in modules(config).items()}
    official = {}
    for key, tensor in vae.state_dict().items():
        module, _, leaf = key.rpartition(".")
        name = f"{theirs[module]}.{leaf}"
        official[name] = tensor[..., None, None] if _MATRIX.fullmatch(name) else tensor
    return official


def filled(config: FluxVaeConfig, tensors: Iterable[tuple[str, Tensor]], device: str | torch.device, name: str) -> Any:
    """The autoencoder of official tensors, in float32.

    Raises:
        ValueError: they do not fill it exactly.
    """
    vae = empty(lambda: build(config))
    fill(vae, as_matrices(tensors), keys_of(config), device, torch.float32, f"{name} (autoencoder)")
    return vae.eval()


def encode(vae: Any, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
    """Latents: (B, 3, H, W) in [-1, 1] -> (B, c, h, w).

    Args:
        noise: (B, c, h, w), standard normal, for a sample of the posterior; its mode if None.
    """
    posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
    z = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(posterior.std)
    return vae.config.scaling_factor * (z - vae.config.shift_factor)


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pixel values, about [-1, 1]: (B, c, h, w) -> (B, 3, H, W)."""
    return vae.decode((latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)).sample
