"""vision-smollm: two small encoders that differ in their objective alone, each with a projector before SmolLM2-135M.

| name | its encoder was trained | so of a picture it needs |
|---|---|---|
| `vision-smollm-aligned` | to tell which caption belongs to which picture | what captions say: shape, colour, place, count |
| `vision-smollm-masked` | to make up patches that it was not shown | whatever is to be seen, texture and size too |

Encoders are of one size and saw the same pictures of textured Tabletop, and projectors were trained alike, on captions that name neither
texture nor size (`unisonde.train.vision_smollm`, docs/decoding.md). So what the decoder can use of one and not of the other is owed
to the objective.

The picture has 32 x 32 pixels, 64 patches; four patches that make a square are one of 16 features. A picture of another size is
scaled, and flagged `scaled`.

What the states are. Stack `encoder`: 64 patches row by row, 6 layers and the last norm. Stack `adapter`: layer 0 the four patches
of each square, end to end, layer 1 the features. Stack `llm`: the features' positions are `image`; the chat template and the line
break between picture and request are template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from unisonde.data.item import Item
from unisonde.models.base import Generation
from unisonde.models.bridged import Prompted
from unisonde.models.parts.checkpoint import Keys, empty, fill, tensors_of, weight_files
from unisonde.models.parts.pretrained import read_json, settled, source_of
from unisonde.models.parts.projected import Projected, ProjectedNetwork, Projector, ProjectorSizes, before_smollm
from unisonde.models.trace import Stack

FAMILY = "vision-smollm"
OBJECTIVES = ("aligned", "masked")
GENERATION = Generation(tokens=48, temperature=0.0)
SQUARE = 2
"""Patches along the side of what makes a feature."""


@dataclass(frozen=True)
class VisionConfig(ProjectorSizes):
    """Sizes of encoder and projector.

    Attributes:
        objective: of the encoder, `aligned` or `masked`.
        encoder: width of the encoder.
        layers, heads, inner: of the encoder: layers, attention heads, width of the middle of its maps.
        side, patch: of a picture and of a patch, in pixels.
    """

    objective: str = "aligned"
    encoder: int = 128
    decoder: int = 576
    stack: int = SQUARE**2
    hidden: int = 512
    layers: int = 6
    heads: int = 4
    inner: int = 512
    side: int = 32
    patch: int = 4

    family = FAMILY

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"the objective of an encoder is {' or '.join(OBJECTIVES)}, got {self.objective!r}")
        if self.stack != SQUARE**2 or self.side % (SQUARE * self.patch):
            raise ValueError(
                f"{SQUARE} x {SQUARE} patches make a feature, so there are {SQUARE**2} to a stack and a side divides by "
                f"{SQUARE * self.patch}; got a stack of {self.stack} and a side of {self.side}"
            )

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.side // self.patch


def build_encoder(config: VisionConfig) -> SiglipVisionModel:
    """An encoder with no weights to speak of: patches, layers and a last norm; nothing pools them."""
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=config.encoder,
            intermediate_size=config.inner,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            image_size=config.side,
            patch_size=config.patch,
            vision_use_head=False,
        )
    )


class VisionSmolLM(Projected):
    """A small encoder, a projector and SmolLM2.

    Args:
        tokenizer: of SmolLM2, with its chat template.
        source: folder of encoder and projector.
        apart: the folder of the decoder.
    """

    family: ClassVar[str] = FAMILY
    takes = "image"
    config: VisionConfig

    def __init__(
        self,
        network: ProjectedNetwork,
        config: VisionConfig,
        tokenizer: Any,
        name: str | None = None,
        source: Path | None = None,
        apart: Mapping[str, Path] | None = None,
    ) -> None:
        stack = Stack("encoder", tuple(network.encoder.encoder.layers), network.encoder.post_layernorm)
        super().__init__(network, config, tokenizer, name or name_of(config), stack, GENERATION, source, apart)

    def prepare(self, item: Item, tokens: int, truncate: bool = False) -> Prompted:
        self.check(item)
        picture = item.picture()
        if picture is None:
            return self.text_alone(item, tokens, truncate)
        pixels, scaled = pixels_of(picture, self.config.side)
        patches = self.config.grid**2
        ids, spans, cut = self.placed(item, patches // self.config.stack, tokens, truncate)
        return Prompted(ids, spans, {"pixels": pixels}, patches, ("scaled",) * scaled + cut)

    def joined(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return join(self.network.encoder(inputs["pixels"]).last_hidden_state, self.config.grid)


def pixels_of(picture: Image.Image, side: int) -> tuple[Tensor, bool]:
    """Pixel values in [-1, 1], (1, 3, side, side), of an RGB picture, and whether it had to be scaled."""
    scaled = picture.size != (side, side)
    if scaled:
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1, scaled


def join(states: Tensor, grid: int) -> Tensor:
    """Patches of each square end to end, squares row by row: (B, grid^2, d) -> (B, grid^2 / 4, 4 d)."""
    batch, _, width = states.shape
    squares = states.view(batch, grid // SQUARE, SQUARE, grid // SQUARE, SQUARE, width).transpose(2, 3)
    return squares.reshape(batch, (grid // SQUARE) ** 2, SQUARE**2 * width)


def name_of(config: VisionConfig) -> str:
    """`vision-smollm-aligned`, ..."""
    return f"{FAMILY}-{config.objective}"


def load(
    where: str, name: str | None = None, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> VisionSmolLM:
    """vision-smollm with the encoder and the projector of a folder, which `unisonde train vision-smollm-aligned` wrote.

    Args:
        name: None is that of its objective.
        dtype: None takes float32 on a CPU, else bfloat16.

    Raises:
        ValueError: the package with the decoder's weights is not installed, or a file is missing or damaged.
    """
    device, dtype = settled(device, dtype)
    config = VisionConfig.from_dict(read_json(where, "config.json"), where)
    trained = empty(lambda: Trained(build_encoder(config), Projector(config)))
    fill(trained, tensors_of(weight_files(where)), Keys(), device, dtype, name or name_of(config))
    return assemble(trained, config, name, source_of(where), device, dtype)


class Trained(nn.Module):
    """What a folder of weights holds."""

    def __init__(self, encoder: SiglipVisionModel, projector: Projector) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector


def assemble(
    trained: Trained,
    config: VisionConfig,
    name: str | None = None,
    source: Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> VisionSmolLM:
    """An encoder and a projector before the published decoder.

    Raises:
        ValueError: its package is not installed.
    """
    device, dtype = settled(device, dtype)
    network, tokenizer, decoder = before_smollm(trained.encoder, trained.projector, device, dtype)
    return VisionSmolLM(network, config, tokenizer, name, source, {"language_model": decoder})
