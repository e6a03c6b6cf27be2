"""LLaVA-1.5 (arXiv 2310.03744): CLIP, two linear maps, and a Vicuna that reads what they give as words.

All parts are those of `transformers`. Of the encoder the last layer but one is read (`vision_feature_layer`, -2), so its last
layer and its last norm, which is for the class token alone, are left out. A picture is resized by its short side and cropped to
the square in the middle, 336 x 336 pixels, 576 patches.

What the states are. Stack `encoder`: the class token, which is template, and the patches; 23 layers. Stack `adapter`: layer 0 the
patches of the last of them, layer 1 the features. Stack `llm`: the features' positions are `image`; role names, the line break
after the picture and BOS are template.

Any LLaVA with a CLIP encoder of which one layer is read loads here; to read the decoder alone of others, `hf:` and their name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForCausalLM, CLIPVisionModel, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from unisonde.data.item import Item
from unisonde.models.bridged import Bridged, Prompted
from unisonde.models.parts.checkpoint import Keys, Rename, empty, fill, tensors_of, weight_files
from unisonde.models.parts.pretrained import load_tokenizer, part, read_json, settled, source_of
from unisonde.models.parts.prompts import check_marks
from unisonde.models.parts.segments import Segment, content, encode, template, with_features
from unisonde.models.trace import Stack

IMAGE = "<image>"


def full_size() -> LlavaConfig:
    """The published size: 7.06 billion parameters, 13 million of them in the layer that is left out."""
    text = {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    return LlavaConfig(text_config=text)  # the encoder's sizes are the defaults of transformers


def layers_read(config: Any) -> int:
    """How many layers of the encoder run.

    Raises:
        ValueError: several layers are read, or the encoder is not CLIP's.
    """
    layer, kind, depth = config.vision_feature_layer, config.vision_config.model_type, config.vision_config.num_hidden_layers
    if kind != "clip_vision_model" or not isinstance(layer, int):
        raise ValueError(
            f"this LLaVA reads layer {layer} of an encoder of type {kind!r}; known here is one layer of clip_vision_model (for its "
            "decoder alone, put hf: before its name)"
        )
    return layer if layer >= 0 else depth + 1 + layer


def keys(config: Any) -> Keys:
    """From the published keys, and those that `transformers` 5 writes, to ours."""
    tower = r"(?:model\.)?vision_tower\.(?:vision_model\.)?"
    unread = range(layers_read(config), config.vision_config.num_hidden_layers)
    ignored = {
        tower + r"post_layernorm\.\w+": "the norm of the class token, which the model never reads",
        tower + r"embeddings\.position_ids": "the numbers of the positions, which are counted",
    }
    ignored |= {tower + rf"encoder\.layers\.{re.escape(str(k))}\..*": "a layer after the one that is read" for k in unread}
    return Keys(
        (
            Rename(tower + "(.+)", r"vision_tower.\1"),
            Rename(r"model\.multi_modal_projector\.(.+)", r"multi_modal_projector.\1"),
            Rename(r"model\.language_model\.(.+)", r"language_model.model.\1"),
            Rename(r"lm_head\.(.+)", r"language_model.lm_head.\1"),
        ),
        ignored,
    )


class LlavaNetwork(nn.Module):
    """Encoder, maps and decoder under their published names; of the encoder what is read."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        vision = copy.deepcopy(config.vision_config)
        vision.num_hidden_layers = layers_read(config)
        tower: Any = CLIPVisionModel(vision)
        tower.post_layernorm = nn.Identity()
        self.vision_tower = tower
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)


class Llava(Bridged):
    """A LLaVA of any size.

    Args:
        pictures: the published image processor.

    Raises:
        ValueError: the tokenizer lacks the mark of a picture.
    """

    family: ClassVar[str] = "llava"
    takes = "image"

    def __init__(self, network: LlavaNetwork, tokenizer: Any, pictures: Any, name: str, source: Path | None = None) -> None:
        check_marks(tokenizer, [IMAGE], name, "LLaVA")
        tower = network.vision_tower
        kept = network.config.vision_feature_select_strategy == "full"
        super().__init__(
            network,
            tokenizer,
            name,
            Stack("encoder", tuple(tower.encoder.layers)),
            network.multi_modal_projector,
            source,
            lead=0 if kept else 1,  # the class token
        )
        self.pictures = pictures
        self.patches = tower.embeddings.num_positions - self.lead

    def segments(self, item: Item) -> list[Segment]:
        """The published chat template, with one mark for the picture."""
        seen = [] if item.image is None else [content(IMAGE, "image"), template("\n")]
        return [template("USER: "), *seen, content(item.prompt), template(" ASSISTANT:")]

    def prepare(self, item: Item, tokens: int, truncate: bool = False) -> Prompted:
        self.check(item)
        picture = item.picture()
        ids, spans = encode(self.tokenizer, self.segments(item))
        inputs: dict[str, Tensor] = {}
        if picture is not None:
            inputs["pixels"] = self.pictures(images=[picture], return_tensors="pt")["pixel_values"]
            at = next(span.start for span in spans if span.modality == "image")
            placeholder = self.tokenizer.convert_tokens_to_ids(IMAGE)
            ids, spans = with_features(ids, spans, at, self.patches, placeholder, "image", replaced=1)
        ids, spans, flags = self.fit(ids, spans, tokens, truncate, item)
        return Prompted(ids, spans, inputs, self.patches if inputs else 0, flags)

    def bridge(self, inputs: Mapping[str, Tensor]) -> Tensor:
        states = self.network.vision_tower(inputs["pixels"]).last_hidden_state
        return self.network.multi_modal_projector(states[:, self.lead :])


def load(path: str, name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Llava:
    """The LLaVA of a local folder or hub id, in the layout of `llava-hf/llava-1.5-7b-hf`.

    Args:
        dtype: None takes float32 on a CPU, else bfloat16.

    Raises:
        ValueError: a file is missing or damaged, or the hub cannot be reached; the sentence names the file.
    """
    path = str(path)
    device, dtype = settled(device, dtype)
    config = LlavaConfig(**read_json(path, "config.json"))
    tokenizer = load_tokenizer(path)
    pictures = part(path, "preprocessor_config.json", lambda: AutoImageProcessor.from_pretrained(path, backend="pil"))
    network = empty(lambda: LlavaNetwork(config))
    fill(network, tensors_of(weight_files(path)), keys(config), device, dtype, name)
    return Llava(network, tokenizer, pictures, name, source_of(path))
