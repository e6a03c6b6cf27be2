"""Pictures and pixel values in [-1, 1], as most image tokenizers and autoencoders take and give them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

STRIP = 64
"""Of a picture that is more times as long as wide, the ends are cut off first: a line of one pixel by 100,000 is not blown up whole."""


def centre_square(picture: Image.Image, side: int) -> Tensor:
    """The middle of an RGB picture: the shorter side resized to `side` (bicubic), the rest cut off; (3, side, side) in [-1, 1]."""
    width, height = picture.size
    short = min(width, height)
    if max(width, height) > STRIP * short:
        across, down = (max(0, length - STRIP * short) // 2 for length in (width, height))
        picture = picture.crop((across, down, width - across, height - down))
        width, height = picture.size
    scaled = (side * width // short, side * height // short)
    if scaled != picture.size:
        picture = picture.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in scaled)
    square = picture.crop((left, top, left + side, top + side))
    return torch.from_numpy(np.asarray(square, np.float32) / 127.5 - 1).permute(2, 0, 1)


def to_pictures(pixels: Tensor, cut: bool = False) -> list[Image.Image]:
    """(B, 3, H, W), about [-1, 1] -> B pictures.

    Args:
        cut: whether a value between two levels goes to the lower one, as some authors have it, and not to the nearer one.
    """
    levels = ((pixels.float() + 1) * 127.5).clamp(0, 255)
    values = (levels if cut else levels.round()).to(torch.uint8)
    return [Image.fromarray(array) for array in values.permute(0, 2, 3, 1).cpu().numpy()]
