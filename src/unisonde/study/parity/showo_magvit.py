"""Parity of MAGVIT-v2: codes of a random picture, and the picture that they decode to."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from unisonde.models.parts.checkpoint import empty, fill
from unisonde.models.parts.magvit2 import KEYS, Magvit2, Magvit2Config
from unisonde.study.parity.fixture import Fixture

INPUTS = ("x",)


def config_of(fixture: Fixture) -> Magvit2Config:
    """Sizes of the encoder as the fixture says them; those of the decoder are in its weights alone."""
    encoder = fixture.config["enc"]
    blocks = blocks_of(fixture.weights, "decoder.up")
    last = [fixture.weights[f"decoder.up.{level}.block.0.conv1.weight"].shape[0] for level in range(len(blocks))]
    return Magvit2Config(
        channels=encoder["ch"],
        encoder_mult=tuple(encoder["ch_mult"]),
        encoder_blocks=tuple(encoder["num_res_blocks"]),
        decoder_mult=tuple(width // encoder["ch"] for width in last),
        decoder_blocks=blocks,
        bits=encoder["z_channels"],
    )


def blocks_of(weights: Mapping[str, Tensor], levels: str) -> tuple[int, ...]:
    """How many residual blocks each level has."""
    found = {match.groups() for key in weights if (match := re.match(rf"{re.escape(levels)}\.(\d+)\.block\.(\d+)\.", key))}
    numbers = [int(level) for level, _ in found]
    return tuple(numbers.count(level) for level in range(max(numbers) + 1))


@torch.inference_mode()
def check(fixture: Fixture) -> None:
    """Encode and decode. The picture is decoded from our codes, which must be the official ones first."""
    tokenizer = empty(lambda: Magvit2(config_of(fixture)))
    fill(tokenizer, fixture.weights.items(), KEYS, "cpu", torch.float32, fixture.name)
    codes = tokenizer.encode(fixture.feed("x"))
    fixture.compare("code", codes)
    fixture.compare("dec", tokenizer.decode(codes))
