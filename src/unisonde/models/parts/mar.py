"""MAR (arXiv 2406.11838) as Harmon uses it: an encoder of the image tokens that are there, a decoder to all of them, a diffusion head.

A picture is a grid of continuous tokens, each a square of the autoencoder's latents. The encoder sees those that are visible, behind a
few buffer tokens that stand for nothing; the decoder fills the places of the others with one learnt vector and gives a vector for every
token, from which `token_diffusion` draws it. Attention is bidirectional in both. Positions are learnt for one size of picture and
stretched to others. Names are the official ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unisonde.models.parts.token_diffusion import TokenDiffusion


@dataclass(frozen=True)
class MarSizes:
    """Sizes of a MAR, by their published names; the defaults are MAR-Huge's.

    Attributes:
        img_size: side in pixels of the pictures that positions are learnt for.
        vae_stride, vae_embed_dim: pixels a latent along a side, and channels of one.
        patch_size: side of the square of latents that makes a token.
        buffer_size: buffer tokens.
        diffloss_d, diffloss_w: depth and width of the diffusion head.
        num_sampling_steps: its steps, by their published name (`NoiseSchedule.named`).
    """

    img_size: int = 256
    vae_stride: int = 16
    patch_size: int = 1
    encoder_embed_dim: int = 1280
    encoder_depth: int = 20
    encoder_num_heads: int = 16
    decoder_embed_dim: int = 1280
    decoder_depth: int = 20
    decoder_num_heads: int = 16
    mlp_ratio: float = 4.0
    vae_embed_dim: int = 16
    buffer_size: int = 64
    diffloss_d: int = 12
    diffloss_w: int = 1536
    num_sampling_steps: str = "100"

    @classmethod
    def of(cls, raw: Mapping[str, Any], base: MarSizes | None = None) -> MarSizes:
        """From what a configuration says; the rest is as in `base`."""
        known = {k: raw[k] if k in raw else getattr(base or cls(), k) for k in cls.__dataclass_fields__}
        return cls(**known | {"num_sampling_steps": str(known["num_sampling_steps"])})

    @property
    def grid(self) -> int:
        """Side, in tokens, of the pictures that positions are learnt for."""
        return self.img_size // self.vae_stride // self.patch_size

    @property
    def channels(self) -> int:
        """Of a token."""
        return self.vae_embed_dim * self.patch_size**2


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A transformer block, norms first."""

    def __init__(self, width: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, 1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, 1e-6)
        self.mlp = Mlp(width, int(width * ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def stretched(table: Tensor, side: int, grid: int) -> Tensor:
    """Positions learnt for a grid of `side`, (1, side * side, D), for one of `grid`: (1, grid * grid, D)."""
    if grid == side:
        return table
    square = table.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return F.interpolate(square.float(), (grid, grid), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2).to(table)


class Mar(nn.Module):
    """Encoder, decoder and diffusion head.

    Throughout, pictures are square; `visible` (B, n) says which of their n tokens are there, as many in every row.
    """

    def __init__(self, sizes: MarSizes) -> None:
        super().__init__()
        self.sizes = sizes
        width, inner, count = sizes.encoder_embed_dim, sizes.decoder_embed_dim, sizes.grid**2
        self.fake_latent = nn.Parameter(torch.zeros(1, width))
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, sizes.buffer_size + count, width))
        self.z_proj = nn.Linear(sizes.channels, width)
        self.z_proj_ln = nn.LayerNorm(width, 1e-6)
        self.encoder_blocks = nn.ModuleList(
            Block(width, sizes.encoder_num_heads, sizes.mlp_ratio) for _ in range(sizes.encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(width, 1e-6)
        self.decoder_embed = nn.Linear(width, inner)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, inner))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, sizes.buffer_size + count, inner))
        self.decoder_blocks = nn.ModuleList(
            Block(inner, sizes.decoder_num_heads, sizes.mlp_ratio) for _ in range(sizes.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(inner, 1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, count, inner))
        self.diffloss = TokenDiffusion(sizes.channels, inner, sizes.diffloss_w, sizes.diffloss_d, sizes.num_sampling_steps)

    def positions(self, table: Tensor, count: int) -> Tensor:
        """Positions of the buffers and of `count` image tokens: (1, b + count, D). Those of the buffers stay as they are."""
        buffers, image = table[:, : self.sizes.buffer_size], table[:, self.sizes.buffer_size :]
        return torch.cat([buffers, stretched(image, self.sizes.grid, math.isqrt(count))], 1)

    def encode(self, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        """What is seen of pictures: (B, n, c) -> (B, b + v, D), the buffers first, then the visible tokens row by row."""
        buffers = self.fake_latent.expand(len(tokens), self.sizes.buffer_size, -1)
        x = torch.cat([buffers, self.z_proj(tokens.to(self.z_proj.weight))], 1)
        x = self.z_proj_ln(x + self.positions(self.encoder_pos_embed_learned, tokens.shape[1]))
        if visible is not None:
            there = F.pad(visible, (self.sizes.buffer_size, 0), value=True)
            x = x[there].unflatten(0, (len(x), -1))
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, x: Tensor, visible: Tensor) -> Tensor:
        """A vector for every token: (B, b + v, D) -> (B, n, D)."""
        there = F.pad(visible, (self.sizes.buffer_size, 0), value=True)[..., None]
        known = self.decoder_embed(x)
        x = self.mask_token.to(known).expand(*there.shape[:2], -1).masked_scatter(there, known)
        x = x + self.positions(self.decoder_pos_embed_learned, visible.shape[1])
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_norm(x)[:, self.sizes.buffer_size :]
        return x + stretched(self.diffusion_pos_embed_learned, self.sizes.grid, math.isqrt(visible.shape[1]))


def to_tokens(latents: Tensor, patch: int) -> Tensor:
    """Latents (B, c, h, w) -> tokens row by row, (B, n, c * patch * patch), the channel slowest in each."""
    height, width = (side // patch for side in latents.shape[-2:])
    split = latents.unflatten(3, (width, patch)).unflatten(2, (height, patch))  # (B, c, m, p, n, q)
    return split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def to_latents(tokens: Tensor, patch: int) -> Tensor:
    """The way back: tokens of square pictures, (B, n, c * patch * patch) -> (B, c, h, w)."""
    side = math.isqrt(tokens.shape[1])
    split = tokens.unflatten(2, (-1, patch, patch)).unflatten(1, (side, side))  # (B, m, n, c, p, q)
    return split.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
