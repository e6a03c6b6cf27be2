"""The MAGVIT-v2 image tokenizer as Show-o publishes it (`showlab/magvitv2`): pictures to codes and back, without a codebook to look up.

A convolutional encoder ends in a few channels; the signs of them, read as a binary number with the first channel in front, are the
code ("lookup-free quantisation", arXiv 2310.05737). The decoder is given the signs. Module names are the official ones; the order of
`decoder.up` is from the finest level to the coarsest, so the decoder runs it backwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unisonde.models.parts.checkpoint import Keys

KEYS = Keys(absent={r"quantize\..*": "the signs that a code stands for; computed from the number of bits"})


@dataclass(frozen=True)
class Magvit2Config:
    """Sizes of the tokenizer; the defaults are the published ones, 95.4 million parameters.

    Attributes:
        channels: of the finest level; `..._mult` multiplies it level by level, finest first.
        encoder_blocks, decoder_blocks: residual blocks of each level, finest first.
        bits: channels of a code; there are 2 ** bits codes.
    """

    channels: int = 128
    encoder_mult: tuple[int, ...] = (1, 2, 2, 4, 4)
    encoder_blocks: tuple[int, ...] = (4, 3, 4, 3, 4)
    decoder_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_blocks: tuple[int, ...] = (4, 4, 3, 4, 3)
    bits: int = 13

    @property
    def patch(self) -> int:
        """Pixels a code stands for, along one side."""
        return 2 ** (len(self.encoder_mult) - 1)

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Magvit2Config:
        """From a `config.json`; the published one names no sizes."""
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items() if k in cls.__dataclass_fields__}
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        return {"_class_name": "MAGVITv2"} | asdict(self)


def twin() -> Magvit2Config:
    """32 x 32 pictures as 8 x 8 codes out of 2048; 0.7 million parameters."""
    # The norms have 32 groups. With one channel a group they would forget how bright a picture is, so the ends are twice as wide.
    return Magvit2Config(32, (2, 1, 2), (1, 1, 1), (2, 1, 2), (1, 1, 1), bits=11)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(channels), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = norm(out), nn.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.nin_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        change = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return change + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """One head over all places of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (conv(y).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(mixed.transpose(1, 2).reshape(x.shape))


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            ResidualBlock(channels, channels),
            Attention(channels),
            ResidualBlock(channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # on the right and below alone


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, and the way to the next if there is one."""

    def __init__(self, channels: int, out: int, blocks: int, way: tuple[str, nn.Module] | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(channels if k == 0 else out, out) for k in range(blocks))
        if way is not None:
            self.add_module(*way)
        self._way = None if way is None else way[0]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self._way is None else self.get_submodule(self._way)(x)


class Encoder(nn.Module):
    def __init__(self, config: Magvit2Config) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.encoder_mult]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList(
            Level(before, width, blocks, ("downsample", Downsample(width)) if k < len(widths) - 1 else None)
            for k, (before, width, blocks) in enumerate(
                zip([config.channels, *widths[:-1]], widths, config.encoder_blocks, strict=True)
            )
        )
        self.mid = Middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.bits, 3, padding=1)
        self.quant_conv = nn.Conv2d(config.bits, config.bits, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_in(pixels)
        for level in self.down:
            x = level(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(x)))))


class Decoder(nn.Module):
    def __init__(self, config: Magvit2Config) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.decoder_mult]
        self.post_quant_conv = nn.Conv2d(config.bits, config.bits, 1)
        self.conv_in = nn.Conv2d(config.bits, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            Level(before, width, blocks, ("upsample", Upsample(width)) if k else None)
            for k, (before, width, blocks) in enumerate(zip([*widths[1:], widths[-1]], widths, config.decoder_blocks, strict=True))
        )
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, signs: Tensor) -> Tensor:
        x = self.mid(self.conv_in(self.post_quant_conv(signs)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Signs(nn.Module):
    """What codes stand for: `embedding` (2 ** bits, bits) of -1 and 1, and the value of each bit, the highest first."""

    embedding: Tensor
    power_vals: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        values = 2 ** torch.arange(bits - 1, -1, -1, device="cpu")
        ones = (torch.arange(2**bits, device="cpu")[:, None] & values) > 0
        self.register_buffer("embedding", ones.float() * 2 - 1)
        self.register_buffer("power_vals", values)


class Magvit2(nn.Module):
    """Pixel values in [-1, 1] to codes and back."""

    def __init__(self, config: Magvit2Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Signs(config.bits)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> codes (B, n), row by row."""
        positive = self.encoder(pixels).flatten(2).transpose(1, 2) > 0
        return (positive * self.quantize.power_vals).sum(-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes of square pictures (B, n) -> (B, 3, H, W).

        Raises:
            ValueError: n is no square.
        """
        side = round(codes.shape[1] ** 0.5)
        if side**2 != codes.shape[1]:
            raise ValueError(f"{codes.shape[1]} codes are no square picture")
        signs = self.quantize.embedding[codes].transpose(1, 2).unflatten(2, (side, side))
        return self.decoder(signs.to(self.decoder.conv_in.weight))
