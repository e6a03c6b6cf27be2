"""Prismatic (arXiv 2402.07865), the two of its models that differ in their encoder alone: DINOv2 or SigLIP, two linear maps, Vicuna.

The encoders are those of `timm`, built here from parts of `transformers` by a table of keys. Of both the last layer but one is
read, without the last norm, and the last layer is left out. The checkpoint, one file, holds maps and decoder; the encoder's
weights, unchanged, come from `timm`'s repositories. A picture is brought to 224 x 224 pixels, 256 patches, that stand right after
BOS.

What the states are. Stack `encoder`: DINOv2's class token and four registers, which are template, and the patches, 23 layers;
SigLIP's patches, 26 layers. Stack `adapter`: layer 0 the patches of the last of them, layer 1 the features. Stack `llm`: the
features' positions are `image`; BOS, Vicuna's system prompt and the role names are template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, LlamaConfig, LlamaForCausalLM, SiglipVisionModel

from unisonde.data.item import Item
from unisonde.models.base import Generation
from unisonde.models.bridged import Bridged, Prompted
from unisonde.models.parts import siglip
from unisonde.models.parts.checkpoint import Keys, Rename, empty, fill, tensors_of, weight_files
from unisonde.models.parts.pretrained import VOCABULARIES, load_tokenizer, reach, read_json, settled
from unisonde.models.parts.segments import Segment, content, encode, template, with_features
from unisonde.models.trace import Stack

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""Vicuna's system prompt."""

TOKENIZER = "llava-hf/llava-1.5-7b-hf"
"""Where Vicuna's tokenizer is to be had as tokenizer.json; Vicuna's own repository has it in a format that needs another package."""

CHECKPOINT = "checkpoints/latest-checkpoint.pt"
VISION = "vision"
"""The folder beside config.json in which the encoder's weights may lie."""

FEATURIZER = "vision_backbone.featurizer"
REGISTERS = 4


# ------------------------------------------------------------------------------------------------------------------ configuration


@dataclass(frozen=True)
class Tower:
    """An encoder of `timm`.

    Attributes:
        hub_id: where its weights are.
        layers: all of them; the last is not run.
        mean, std: of the pixels, in red, green and blue.
    """

    kind: Literal["dinov2", "siglip"]
    hub_id: str
    width: int
    layers: int
    heads: int
    ffn: int
    image_size: int = 224
    patch_size: int = 14
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def lead(self) -> int:
        """Positions before the patches."""
        return 1 + REGISTERS if self.kind == "dinov2" else 0


TOWERS = {
    "dinov2-vit-l": Tower(
        "dinov2",
        "timm/vit_large_patch14_reg4_dinov2.lvd142m",
        1024,
        24,
        16,
        4096,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    ),
    "siglip-vit-so400m": Tower("siglip", "timm/vit_so400m_patch14_siglip_224.webli", 1152, 27, 16, 4304),
}
"""The encoders that configurations name (`vision_backbone_id`)."""

LANGUAGE_MODELS = {
    "vicuna-v15-7b": {"vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
}
"""The decoders that configurations name (`llm_backbone_id`), where they differ from the defaults of Llama.

The vocabulary is that of Llama 2 and a token for padding, filled up to a multiple of 64.
"""

RESIZES = ("letterbox", "resize-crop", "resize-naive")


@dataclass(frozen=True)
class PrismaticConfig:
    """Sizes of a Prismatic, how its pictures are made square, and the most positions of a sequence."""

    tower: Tower
    text: LlamaConfig
    resize: str = "letterbox"
    window: int = 2048

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> PrismaticConfig:
        """Of the entry `model` of a published config.json.

        An encoder or decoder that is none of those may be given by its sizes: a dictionary `vision` (of `Tower`), and one `llm` (of
        `LlamaConfig`), beside the published entries.

        Raises:
            ValueError: an entry is missing, or is of a kind that is not known here.
        """
        try:
            tower = Tower(**raw["vision"]) if "vision" in raw else _named(TOWERS, raw, "vision_backbone_id")
            text = raw["llm"] if "llm" in raw else _named(LANGUAGE_MODELS, raw, "llm_backbone_id")
            resize, maps = raw["image_resize_strategy"], raw["arch_specifier"]
        except KeyError as error:
            raise ValueError(f"config.json has no entry model.{error.args[0]}, which Prismatic has") from None
        except TypeError as error:
            raise ValueError(f"model.vision of config.json does not describe an encoder ({error})") from None
        if not maps.endswith("gelu-mlp") or "fused" in maps:
            raise ValueError(f"arch_specifier of config.json is {maps!r}; known here is gelu-mlp")
        if resize not in RESIZES:
            raise ValueError(f"image_resize_strategy of config.json is {resize!r}; known are {', '.join(RESIZES)}")
        return cls(tower, LlamaConfig(**text), resize, raw.get("llm_max_length", 2048))


def _named(known: Mapping[str, Any], raw: Mapping[str, Any], entry: str) -> Any:
    if raw[entry] not in known:
        raise ValueError(f"{entry} of config.json is {raw[entry]!r}; known here is {' or '.join(known)}")
    return known[raw[entry]]


def full_size(encoder: str) -> PrismaticConfig:
    """A published size: `dinov2-vit-l` or `siglip-vit-so400m`."""
    named = {"vision_backbone_id": encoder, "llm_backbone_id": "vicuna-v15-7b", "arch_specifier": "no-align+gelu-mlp"}
    return PrismaticConfig.from_dict(named | {"image_resize_strategy": "letterbox"})


# ------------------------------------------------------------------------------------------------------------------------ network


def vision_model(tower: Tower) -> nn.Module:
    """The layers of an encoder that run, without its last norm."""
    sizes: dict[str, Any] = {"image_size": tower.image_size, "patch_size": tower.patch_size}
    if tower.kind == "siglip":
        config = siglip.vision_config(tower.width, tower.layers - 1, tower.heads, **sizes, intermediate_size=tower.ffn)
        seen: Any = SiglipVisionModel(config)
        seen.post_layernorm = nn.Identity()
        return seen
    looked: Any = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=tower.width,
            num_hidden_layers=tower.layers - 1,
            num_attention_heads=tower.heads,
            mlp_ratio=tower.ffn // tower.width,
            num_register_tokens=REGISTERS,
            **sizes,
        )
    )
    looked.layernorm = nn.Identity()
    looked.embeddings.register_parameter("mask_token", None)  # of its training; `timm` has none
    return looked


class PrismaticNetwork(nn.Module):
    """Encoder, maps and decoder."""

    def __init__(self, config: PrismaticConfig) -> None:
        super().__init__()
        self.config = config
        width = config.text.hidden_size
        self.vision_tower = vision_model(config.tower)
        self.projector = nn.Sequential(nn.Linear(config.tower.width, width), nn.GELU(), nn.Linear(width, width))
        self.language_model = LlamaForCausalLM(config.text)

    @property
    def encoder(self) -> Stack:
        inner = self.vision_tower.get_submodule("encoder")
        return Stack("encoder", tuple(inner.get_submodule("layer" if self.config.tower.kind == "dinov2" else "layers").children()))


_DINOV2 = {
    "norm1": "norm1",
    "attn.proj": "attention.o_proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def keys(tower: Tower) -> Keys:
    """From the published keys, those of `timm` under `vision_backbone.featurizer`, to ours."""
    theirs, layer = re.escape(FEATURIZER), r"vision_tower.encoder.layer.\1."
    blocks = rf"{theirs}\.blocks\.(\d+)\."
    vision: tuple[Rename, ...] = siglip.renames(FEATURIZER, "vision_tower")
    if tower.kind == "dinov2":
        qkv = tuple(rf"{layer}attention.{part}_proj.\2" for part in "qkv")
        vision = (
            Rename(rf"{theirs}\.cls_token", "vision_tower.embeddings.cls_token"),
            Rename(rf"{theirs}\.reg_token", "vision_tower.embeddings.register_tokens"),
            Rename(rf"{theirs}\.pos_embed", "vision_tower.embeddings.position_embeddings"),
            Rename(rf"{theirs}\.patch_embed\.proj\.(\w+)", r"vision_tower.embeddings.patch_embeddings.projection.\1"),
            Rename(rf"{blocks}attn\.qkv\.(\w+)", qkv),
            Rename(rf"{blocks}ls([12])\.gamma", rf"{layer}layer_scale\2.lambda1"),
            *(Rename(rf"{blocks}{re.escape(name)}\.(\w+)", rf"{layer}{to}.\2") for name, to in _DINOV2.items()),
        )
    ignored = {
        rf"{theirs}\.norm\.\w+": "the last norm, which the model never runs",
        rf"{theirs}\.blocks\.{tower.layers - 1}\..*": "the last layer, which is not read",
        r".*\.rotary_emb\.inv_freq": "rotary frequencies, which are computed",
    }
    return Keys(
        (
            *vision,
            Rename(r"projector\.projector\.(.+)", r"projector.\1"),
            Rename(r"llm_backbone\.llm\.(.+)", r"language_model.\1"),
        ),
        ignored | siglip.ignored(FEATURIZER),
    )


def positions(table: Tensor, tower: Tower) -> Tensor:
    """`timm`'s table of positions (1, n, d) at the grid of these pictures, as `timm` resizes it, in the shape of the part that takes it.

    DINOv2's class token has a position in `transformers` and none in `timm`, where it is added to the token: here it is zero.
    """
    side = round(table.shape[1] ** 0.5)
    if side != tower.grid:
        square = table.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        square = F.interpolate(square, size=(tower.grid, tower.grid), mode="bicubic", antialias=True)
        table = square.flatten(2).transpose(1, 2).to(table.dtype)
    return F.pad(table, (0, 0, 1, 0)) if tower.kind == "dinov2" else table


def published(vision: Iterable[Path], checkpoint: Iterable[Path], tower: Tower) -> Iterator[tuple[str, Tensor]]:
    """All tensors under their published names: of the encoder's files, and of the checkpoint."""
    for key, tensor in tensors_of(vision):
        yield f"{FEATURIZER}.{key}", positions(tensor, tower) if key == "pos_embed" else tensor
    files = list(checkpoint)
    for name in ("projector", "llm_backbone"):
        yield from ((f"{name}.{key}", tensor) for key, tensor in tensors_of(files, ("model", name)))


# -------------------------------------------------------------------------------------------------------------------------- model


def prepared(picture: Image.Image, config: PrismaticConfig) -> Tensor:
    """An RGB picture as published: made square, resized (bicubic), the middle cut out where it is still too large, normalised; (3, H, W).

    `letterbox` puts a border of the mean colour around it; `resize-crop` resizes its short side; `resize-naive` resizes both.
    """
    side, tower = config.tower.image_size, config.tower
    if config.resize == "letterbox":
        longest = max(picture.size)
        border = tuple((longest - length) // 2 for length in picture.size)
        red, green, blue = (int(255 * mean) for mean in tower.mean)
        page = Image.new("RGB", (picture.width + 2 * border[0], picture.height + 2 * border[1]), (red, green, blue))
        page.paste(picture, (border[0], border[1]))
        picture = page
    short = min(picture.size)
    size = (side, side) if config.resize == "resize-naive" else tuple(int(side * length / short) for length in picture.size)
    if size != picture.size:
        picture = picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in picture.size)
    pixels = torch.from_numpy(np.array(picture.crop((left, top, left + side, top + side)), np.float32) / 255)
    return ((pixels - torch.tensor(tower.mean)) / torch.tensor(tower.std)).permute(2, 0, 1)


class Prismatic(Bridged):
    """A Prismatic of any size.

    Args:
        tokenizer: Vicuna's, which puts BOS before a text.
        apart: the folder of what is published apart: `vision_tower`.

    Raises:
        ValueError: the tokenizer puts no BOS before a text.
    """

    family: ClassVar[str] = "prismatic"
    takes = "image"

    def __init__(
        self,
        network: PrismaticNetwork,
        tokenizer: Any,
        name: str,
        source: Path | None = None,
        apart: Mapping[str, Path] | None = None,
    ) -> None:
        if tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
            raise ValueError(f"the tokenizer of {name} puts no BOS before a text: it is not Vicuna's")
        super().__init__(
            network,
            tokenizer,
            name,
            network.encoder,
            network.projector,
            source,
            Generation(tokens=512, temperature=0.0),
            lead=network.config.tower.lead,
            apart=apart,
        )
        self.patches = network.config.tower.grid**2

    @property
    def window(self) -> int:
        """The most positions of a sequence: those that it was trained on."""
        return self.network.config.window

    def segments(self, item: Item) -> list[Segment]:
        """Vicuna's template; the picture is not in the text."""
        return [template(f"{SYSTEM} USER: "), content(item.prompt.strip()), template(" ASSISTANT:")]

    def prepare(self, item: Item, tokens: int, truncate: bool = False) -> Prompted:
        self.check(item)
        picture = item.picture()
        ids, spans = encode(self.tokenizer, self.segments(item))
        inputs: dict[str, Tensor] = {}
        if picture is not None:
            inputs["pixels"] = prepared(picture, self.network.config)[None]
            ids, spans = with_features(ids, spans, 1, self.patches, self.pad_id, "image")
        ids, spans, flags = self.fit(ids, spans, tokens, truncate, item)
        return Prompted(ids, spans, inputs, self.patches if inputs else 0, flags)

    def bridge(self, inputs: Mapping[str, Tensor]) -> Tensor:
        states = self.network.vision_tower(inputs["pixels"]).last_hidden_state
        return self.network.projector(states[:, self.lead :])


# ------------------------------------------------------------------------------------------------------------------------ loading


def load(path: str, name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Prismatic:
    """The Prismatic of a local folder, or of a folder of a repository on the hub, as in `TRI-ML/prismatic-vlms/dinov2-224px+7b`.

    The encoder's weights may lie in its `vision/`, and Vicuna's tokenizer beside config.json; else they come from the hub.

    Args:
        dtype: None takes float32 on a CPU, else bfloat16.

    Raises:
        ValueError: a file is missing or damaged, or the hub cannot be reached; the sentence names the file.
    """
    path = str(path)
    device, dtype = settled(device, dtype)
    inside = "" if Path(path).is_dir() else "/".join(path.split("/")[2:])
    where, prefix = (path, "") if not inside else ("/".join(path.split("/")[:2]), f"{inside}/")
    raw = read_json(where, f"{prefix}config.json")
    if not isinstance(raw.get("model"), dict):
        raise ValueError(f"config.json of {path!r} has no entry model, which Prismatic has")
    config = PrismaticConfig.from_dict(raw["model"])
    own = Path(path) / VISION
    vision_at = str(own) if own.is_dir() else config.tower.hub_id
    vision = weight_files(vision_at)
    tokenizer = load_tokenizer(path if Path(path).is_dir() and reach(path, *VOCABULARIES) else TOKENIZER)
    checkpoint = weight_files(where, f"{prefix}{CHECKPOINT}")
    network = empty(lambda: PrismaticNetwork(config))
    fill(network, published(vision, checkpoint, config.tower), keys(config.tower), device, dtype, name)
    found = reach(where, f"{prefix}config.json")
    assert found is not None, "it has been read"
    return Prismatic(network, tokenizer, name, found.parent, {"vision_tower": vision[0].parent})
