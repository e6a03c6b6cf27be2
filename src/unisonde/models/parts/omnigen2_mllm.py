"""The language model of OmniGen2, a stock Qwen2.5-VL of `transformers`: loading it, its pictures, and passes over prompts.

It reads pictures and text and writes text; of a prompt to be drawn, the states after its last norm are what the diffusion transformer is
given. Text alone has plain positions; where there is a picture, its features have a position for height and one for width, and the text
after it goes on behind the larger of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from unisonde.models.parts.checkpoint import Keys, Rename, empty, fill, tensors_of, weight_files
from unisonde.models.parts.pretrained import VOCABULARIES, reach, read_json

FOLDER, PROCESSOR = "mllm", "processor"
"""Where a published repository has the network, and where its tokenizer and image settings are."""

TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja")
"""What a tokenizer may consist of besides its vocabulary."""

TIED = {r"lm_head\.weight": "tied: it is the embedding"}
"""What the checkpoint of a network whose head is its embedding may hold, and need not."""


def keys_of(tied: bool) -> Keys:
    """How official keys become those of `transformers`: published under the names that it had before version 4.52, or the later ones."""
    before = (
        Rename(r"visual\.(.+)", r"model.visual.\1"),
        Rename(r"model\.((embed_tokens|layers|norm)\..+)", r"model.language_model.\1"),
    )
    return Keys(before, ignored=TIED if tied else {}, absent=TIED if tied else {})


def config_of(raw: Mapping[str, Any]) -> Qwen2_5_VLConfig:
    """Of a published mllm/config.json.

    Raises:
        ValueError: it is another model's.
    """
    if raw.get("model_type") != "qwen2_5_vl":
        raise ValueError(f"the language model is of type {raw.get('model_type')!r}, where OmniGen2 has a qwen2_5_vl")
    return Qwen2_5_VLConfig.from_dict(dict(raw))


def load_network(path: str, device: torch.device, dtype: torch.dtype, name: str) -> Any:
    """The network of a folder or hub id, with its published sampling settings.

    Raises:
        ValueError: a file is missing, or the tensors do not fill it exactly.
    """
    config = config_of(read_json(path, f"{FOLDER}/config.json"))
    network: Any = empty(lambda: Qwen2_5_VLForConditionalGeneration(config))
    keys = keys_of(config.tie_word_embeddings)
    fill(network, tensors_of(weight_files(path, f"{FOLDER}/model")), keys, device, dtype, f"{name} (language model)")
    if config.tie_word_embeddings:
        network.lm_head.weight = network.model.language_model.embed_tokens.weight
    if reach(path, f"{FOLDER}/generation_config.json") is not None:
        network.generation_config = GenerationConfig.from_dict(read_json(path, f"{FOLDER}/generation_config.json"))
    return network.eval()


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a folder or hub id; it must give character offsets, from which spans are made.

    Raises:
        ValueError: it is not there, or gives none.
    """
    found = reach(path, *(f"{PROCESSOR}/{file}" for file in VOCABULARIES))
    if found is None:
        raise ValueError(f"{path!r} has no tokenizer: {PROCESSOR}/tokenizer.json is not there; download it again")
    for file in TOKENIZER:  # of a hub id, they are fetched so
        reach(path, f"{PROCESSOR}/{file}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(found.parent), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the tokenizer of {path!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {path!r} gives no character offsets; a tokenizer.json is needed")
    return tokenizer


def load_pictures(path: str) -> Qwen2VLImageProcessorPil:
    """How pictures are prepared: sides become multiples of 28 pixels, and their product falls into the published range."""
    raw = read_json(path, f"{PROCESSOR}/preprocessor_config.json")
    return pictures_of({key: value for key, value in raw.items() if not key.endswith(("processor_type", "processor_class"))})


def pictures_of(settings: Mapping[str, Any]) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(**settings)


def prepare(pictures: Any, picture: Image.Image, item: str) -> tuple[dict[str, Tensor], int]:
    """An RGB picture as the network takes it, and how many positions it has.

    Raises:
        ValueError: it is too long and narrow.
    """
    try:
        inputs = dict(pictures(images=[picture], return_tensors="pt"))
    except ValueError as error:
        raise ValueError(f"the image of item {item!r}, {picture.width} x {picture.height}, cannot be taken: {error}") from None
    return inputs, int(inputs["image_grid_thw"].prod()) // pictures.merge_size**2


def states(
    network: Any, ids: Tensor, there: Tensor, where: Tensor | None = None, picture: Mapping[str, Tensor] | None = None
) -> Tensor:
    """One pass over sequences padded on the right: ids (B, L), and where no padding is -> states after the last norm, (B, L, D).

    Args:
        where: (B, L) booleans, where features of pictures go. What the model writes may hold their token, too, and is text all the same.
        picture: of `prepare`, the pictures of all rows one after another.
    """
    embeddings, positions = network.get_input_embeddings()(ids), None
    if picture and where is not None:
        features = torch.cat(list(network.get_image_features(**picture).pooler_output))
        embeddings = embeddings.masked_scatter(where[..., None], features.to(embeddings.dtype))
        positions, _ = network.model.get_rope_index(
            ids, where.int(), image_grid_thw=picture["image_grid_thw"], attention_mask=there
        )
    return network.model.language_model(
        inputs_embeds=embeddings, attention_mask=there, position_ids=positions, use_cache=False
    ).last_hidden_state
