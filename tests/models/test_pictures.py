"""Pictures to pixel values and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from unisonde.data.item import Item
from unisonde.models.janus_pro import ImageProcessor
from unisonde.models.parts.pictures import centre_square, to_pictures
from unisonde.models.parts.siglip import Pictures


def test_resized_by_the_short_side_and_cropped_in_the_middle() -> None:
    picture = Image.new("RGB", (64, 32), "black")
    picture.paste((255, 0, 0), (16, 0, 48, 32))
    pixels = centre_square(picture, 32)
    assert pixels.shape == (3, 32, 32) and pixels[0].min() == 1 and pixels[1:].max() == -1


@pytest.mark.parametrize("size", [(1, 1), (100, 70), (7, 90), (32, 32), (1, 50)])
def test_every_size_becomes_the_square(size: tuple[int, int]) -> None:
    pixels = centre_square(Image.new("RGB", size, "white"), 32)
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32 and (pixels == 1).all()


@pytest.mark.parametrize("upright", [True, False])
def test_a_long_strip_is_cut_before_it_is_blown_up(upright: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    grey = np.zeros((2, 9001, 3), np.uint8)
    grey[:, 4499:4502] = 255  # the middle three
    picture = Image.fromarray(grey.transpose(1, 0, 2).copy() if upright else grey)
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *rest: sizes.append(size) or resize(self, size, *rest))
    pixels = centre_square(picture, 32)
    assert pixels.shape == (3, 32, 32) and max(sizes[0]) <= 65 * 32
    assert (pixels[0].T if upright else pixels[0])[:, 15:17].min() == 1


def test_levels_come_back() -> None:
    """All 256 levels survive the way there and back, rounded or cut."""
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    pixels = centre_square(Image.fromarray(levels), 16)
    [picture] = to_pictures(pixels[None])
    assert (np.asarray(picture) == levels).all()
    [below] = to_pictures(pixels[None] - 0.4 / 127.5)
    [cut] = to_pictures(pixels[None] - 0.4 / 127.5, cut=True)
    assert (np.asarray(below) == levels).all() and (np.asarray(cut) == np.maximum(levels, 1) - 1).all()


def test_values_outside_the_range_are_kept_in_it() -> None:
    pixels = torch.tensor([-3.0, 3.0]).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    assert np.asarray(to_pictures(pixels.bfloat16())[0]).tolist() == [[[0] * 3, [255] * 3]]


SHAPES = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PREPARED = {
    "janus-pro": lambda picture: ImageProcessor(**SHAPES, min_size=14)(picture, return_tensors="pt")["pixel_values"][0],
    "janusflow": Pictures(32),
    "showo, showo2": lambda picture: centre_square(picture, 32),
    "showo with clip": lambda picture: CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )(picture, return_tensors="pt")["pixel_values"][0],
}


@pytest.mark.parametrize("family", PREPARED)
@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 3), (3, 3), (40, 30)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "I;16"])
def test_pictures_of_any_kind_and_size(family: str, size: tuple[int, int], mode: str) -> None:
    """A white one is white where it is, whatever its mode; three pixels along a side are no channels."""
    white = {"RGB": (255,) * 3, "RGBA": (90, 0, 0, 0), "L": 255, "I;16": 65535}
    picture = Image.new("RGB", size, "white").convert("P") if mode == "P" else Image.new(mode, size, white[mode])
    shown = Item("a", "c", "what?", picture).picture()
    assert shown is not None
    pixels = torch.as_tensor(PREPARED[family](shown))
    assert pixels.shape == (3, 32, 32) and torch.allclose(pixels[:, 15:17, 15:17], torch.ones(()))
