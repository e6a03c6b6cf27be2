"""The shallow U-ViT of JanusFlow (arXiv 2411.07975): from a noisy latent to tokens of a language model, and from states to a velocity.

The encoder makes patches of the latent and the time's embedding; the decoder takes what the language model made of the patches, beside
the encoder's output (the one skip of the U), back to the latent's grid. Both are two ConvNeXt V2 blocks (arXiv 2301.00808) whose
outputs are scaled and shifted by the time. Names are the official ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

GRN_EPS = 1e-6


@dataclass(frozen=True)
class UViTConfig:
    """Sizes of encoder and decoder.

    Attributes:
        latent_channels: of the autoencoder's latents.
        patch: side of the square of latent pixels that becomes one token; a power of two.
        channels: of a patch on either side of the language model.
        blocks: ConvNeXt blocks in the encoder, and in the decoder.
        hidden: width of the language model, and of the time's embedding.
    """

    latent_channels: int = 4
    patch: int = 2
    channels: int = 768
    blocks: int = 2
    hidden: int = 2048
    eps: float = 1e-6

    @property
    def doublings(self) -> int:
        """How often the decoder doubles the grid to get from patches to latent pixels."""
        return self.patch.bit_length() - 1


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2: each channel weighed by its norm over the picture, relative to the other channels. x: (B, H, W, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.bias = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        norm = x.norm(dim=(1, 2), keepdim=True)
        response = norm / (norm.mean(-1, keepdim=True) + GRN_EPS)
        return self.bias + (self.weight * response + 1) * x


class ConvNeXtBlock(nn.Module):
    """A residual block, then a scale and shift by the time. x: (B, C, H, W), time: (B, D)."""

    def __init__(self, channels: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.RMSNorm(channels, eps)
        self.channelwise_linear_1 = nn.Linear(channels, 4 * channels)
        self.channelwise_norm = GlobalResponseNorm(4 * channels)
        self.channelwise_linear_2 = nn.Linear(4 * channels, channels)
        self.cond_embeds_mapper = nn.Linear(hidden, 2 * channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.channelwise_linear_2(self.channelwise_norm(F.gelu(self.channelwise_linear_1(y))))
        scale, shift = self.cond_embeds_mapper(F.silu(time))[..., None, None].chunk(2, 1)
        return (x + y.permute(0, 3, 1, 2)) * (1 + scale) + shift


class ConvNeXtStage(nn.Module):
    def __init__(self, channels: int, hidden: int, blocks: int, eps: float) -> None:
        super().__init__()
        self.res_blocks = nn.ModuleList(ConvNeXtBlock(channels, hidden, eps) for _ in range(blocks))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        for block in self.res_blocks:
            x = block(x, time)
        return x


class ShallowUViTEncoder(nn.Module):
    """Noisy latents z (B, c, H, W) at times t (B,), 0 to 1000 -> patches (B, C, H / p, W / p) and time embeddings (B, D)."""

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        self.time_proj = Timesteps(config.channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(config.channels, config.hidden)
        self.in_conv = nn.Conv2d(config.latent_channels, config.channels, config.patch, config.patch)
        self.mid_block = ConvNeXtStage(config.channels, config.hidden, config.blocks, config.eps)

    def forward(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        time = self.time_embed(self.time_proj(t).to(z.dtype))
        return self.mid_block(self.in_conv(z), time), time


class Unpatchify(nn.Module):
    def __init__(self, channels: int, out_channels: int, patch: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(channels, eps)
        self.unpatch_conv = nn.Conv2d(channels, out_channels * patch**2, 1)
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.unpatch_conv(channelwise(self.norm, x)), self.patch)


class ShallowUViTDecoder(nn.Module):
    """States of the patches and the encoder's patches, both (B, C, H / p, W / p), and the time (B, D) -> velocity (B, c, H, W)."""

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(config.channels, config.eps)
        self.mid_block = ConvNeXtStage(2 * config.channels, config.hidden, config.blocks, config.eps)
        widths = [2 * config.channels, *[config.channels] * (config.doublings - 1), config.latent_channels]
        self.out_convs = nn.ModuleList(Unpatchify(*pair, 2, config.eps) for pair in pairwise(widths))

    def forward(self, x: Tensor, skip: Tensor, time: Tensor) -> Tensor:
        x = self.mid_block(torch.cat([channelwise(self.input_norm, x), skip], 1), time)
        for unpatchify in self.out_convs:
            x = unpatchify(x)
        return x


def channelwise(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm over the channels of (B, C, H, W)."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
