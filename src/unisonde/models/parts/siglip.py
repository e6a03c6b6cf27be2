"""SigLIP as the Janus models publish it: the names of `timm`, and the vision encoder of `transformers` that computes the same.

`timm` fuses query, key and value in one matrix and keeps the position table with a batch dimension; `SiglipVisionModel` has three
matrices and an embedding. The activation is the exact GELU, where SigLIP's own configuration has the tanh approximation. The pooling
head (`attn_pool`) is in the checkpoints and nothing reads it. Pictures are prepared as the same publishers do it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import SiglipVisionConfig

from unisonde.models.parts.checkpoint import Rename

_BLOCK = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def renames(theirs: str, ours: str) -> tuple[Rename, ...]:
    """From the keys of a `timm` tower to those of a `SiglipVisionModel`.

    Args:
        theirs: what the official keys begin with, such as `vision_model.vision_tower`.
        ours: the path of the `SiglipVisionModel` in our module.
    """
    tower = re.escape(theirs)

    def layer(name: str) -> str:
        return rf"{ours}.encoder.layers.\1.{name}"

    return (
        Rename(rf"{tower}\.pos_embed", f"{ours}.embeddings.position_embedding.weight", squeeze=True),
        Rename(rf"{tower}\.patch_embed\.proj\.(\w+)", rf"{ours}.embeddings.patch_embedding.\1"),
        Rename(rf"{tower}\.norm\.(\w+)", rf"{ours}.post_layernorm.\1"),
        Rename(
            rf"{tower}\.blocks\.(\d+)\.attn\.qkv\.(\w+)", tuple(layer(rf"self_attn.{part}_proj.\2") for part in ("q", "k", "v"))
        ),
        *(Rename(rf"{tower}\.blocks\.(\d+)\.{re.escape(name)}\.(\w+)", layer(rf"{to}.\2")) for name, to in _BLOCK.items()),
    )


def keys(theirs: str, layers: int) -> list[str]:
    """The keys of a `timm` tower, but for those that are ignored."""
    names = [f"blocks.{k}.{name}" for k in range(layers) for name in ("attn.qkv", *_BLOCK)]
    pairs = [f"{name}.{kind}" for name in ("patch_embed.proj", *names, "norm") for kind in ("weight", "bias")]
    return [f"{theirs}.{name}" for name in ("pos_embed", *pairs)]


def ignored(theirs: str) -> dict[str, str]:
    """The keys of a `timm` tower that are left out, with the reason."""
    return {rf"{re.escape(theirs)}\.attn_pool\..*": "the pooling head of SigLIP, which the model never runs"}


def vision_config(width: int, layers: int, heads: int, image_size: int, patch_size: int, **others: Any) -> SiglipVisionConfig:
    """The configuration of a tower: feed-forward of four times the width, exact GELU, norms at 1e-6, no pooling head."""
    settings: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "vision_use_head": False,
    }
    return SiglipVisionConfig(**settings | others)


def sides(config: SiglipVisionConfig) -> tuple[int, int]:
    """The sides of a picture and of a patch in pixels; `vision_config` makes both squares."""
    picture, patch = config.image_size, config.patch_size
    assert isinstance(picture, int) and isinstance(patch, int)
    return picture, patch


SIZES = ("width", "layers", "heads", "image_size", "patch_size")
"""What `vision_config` has to be told."""

TOWERS: dict[str, dict[str, int]] = {
    "siglip_large_patch16_384": {"width": 1024, "layers": 24, "heads": 16, "image_size": 384, "patch_size": 16},
}
"""Sizes of the towers that configurations name (`vision_config.params.model_name`)."""


@dataclass(frozen=True)
class Pictures:
    """From a picture to pixel values, as the Janus models publish it (`preprocessor_config.json`).

    The long side is resized to `image_size` (bicubic, lengths rounded down, at least `min_size`), the rest filled with the mean colour.
    """

    image_size: int
    min_size: int = 14
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], image_size: int) -> Pictures:
        """Of the published file; what it does not say is the default, and the tower's size."""
        told = {name: raw[name] for name in ("image_size", "min_size") if name in raw}
        told |= {name: tuple(raw[name]) for name in ("image_mean", "image_std") if name in raw}
        return cls(**{"image_size": image_size} | told)

    def to_dict(self) -> dict[str, Any]:
        """As published."""
        return {"image_processor_type": "VLMImageProcessor", "do_normalize": True, "rescale_factor": 1 / 255} | asdict(self)

    def __call__(self, picture: Image.Image) -> Tensor:
        """An RGB picture -> (3, image_size, image_size)."""
        longest = max(picture.size)
        width, height = (max(int(side / longest * self.image_size), self.min_size) for side in picture.size)
        if (width, height) != picture.size:
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        red, green, blue = (int(255 * mean) for mean in self.image_mean)
        square = Image.new("RGB", (self.image_size, self.image_size), (red, green, blue))
        if width >= height:
            square.paste(picture, (0, (self.image_size - height) // 2))
        else:
            square.paste(picture, ((self.image_size - width) // 2, 0))
        pixels = torch.from_numpy(np.asarray(square, np.float32) / 255)
        return ((pixels - torch.tensor(self.image_mean)) / torch.tensor(self.image_std)).permute(2, 0, 1)
