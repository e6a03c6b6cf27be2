"""Janus-Pro in its original format (`deepseek-ai/Janus-Pro-1B`, `-7B`): its configuration and key names as those of `transformers`.

The original config.json (`model_type` `multi_modality`) names its parts by class and gives few sizes; the rest stands in the official
code and here. The modules of `JanusForConditionalGeneration` compute the same as the official ones, with two exceptions
that `models.janus_pro` mends: its quantiser compares latents with the codebook unnormalised, where the official one normalises both,
and its image processor rounds a resized side, where the official one cuts it off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import JanusConfig
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig
from transformers.models.llama.configuration_llama import LlamaConfig

from unisonde.models.parts import siglip
from unisonde.models.parts.checkpoint import Keys, Rename

ORIGINAL = "multi_modality"
"""`model_type` of the original format."""

_TOWER = "vision_model.vision_tower"


def _projector(theirs: str, ours: str) -> tuple[Rename, ...]:
    """A `Sequential` of linear layers with activations between them: layers 0, 2, 4, ... are `fc1` and the hidden layers."""
    later = (Rename(rf"{theirs}\.layers\.{2 * k}\.(\w+)", rf"{ours}.hidden_layers.{k - 1}.\1") for k in range(1, 5))
    return Rename(rf"{theirs}\.layers\.0\.(\w+)", rf"{ours}.fc1.\1"), *later


def _tokenizer(theirs: str, ours: str) -> tuple[Rename, ...]:
    """The VQ-16 tokenizer. Blocks are numbered in the order in which they run, in both."""
    rules = []
    for half, levels in (("encoder", "down"), ("decoder", "up")):
        there, here = rf"{theirs}\.{half}", f"{ours}.{half}"
        rules += [
            Rename(rf"{there}\.conv_blocks\.(\d+)\.res\.(.+)", rf"{here}.{levels}.\1.block.\2"),
            Rename(rf"{there}\.conv_blocks\.(\d+)\.(.+)", rf"{here}.{levels}.\1.\2"),
            *(Rename(rf"{there}\.mid\.{k}\.(.+)", rf"{here}.mid.{to}.\1") for k, to in enumerate(("block_1", "attn_1", "block_2"))),
        ]
    return *rules, Rename(rf"{theirs}\.(.+)", rf"{ours}.\1")


KEYS = Keys(
    renames=(
        Rename(
            r"vision_model\.vision_tower\.blocks\.(\d+)\.attn\.proj\.(\w+)",
            r"model.vision_model.encoder.layers.\1.self_attn.projection_layer.\2",  # not the name that SigLIP itself has for it
        ),
        *siglip.renames(_TOWER, "model.vision_model"),
        *_projector("aligner", "model.aligner"),
        *_tokenizer("gen_vision_model", "model.vqmodel"),
        Rename(r"gen_embed\.weight", "model.generation_embeddings.weight"),
        *_projector("gen_aligner", "model.generation_aligner"),
        Rename(r"gen_head\.output_mlp_projector\.(\w+)", r"model.generation_head.proj_out.\1"),
        Rename(r"gen_head\.vision_head\.(\w+)", r"model.generation_head.vision_head.\1"),
        Rename(r"language_model\.model\.(.+)", r"model.language_model.\1"),
        Rename(r"language_model\.lm_head\.weight", "lm_head.weight"),
    ),
    ignored={
        **siglip.ignored(_TOWER),
        r"gen_vision_model\.quantize\.codebook_used": "a record of the codes that training used last, which nothing reads",
    },
)
"""From the original keys to those of `JanusForConditionalGeneration`."""

TOKENIZERS: dict[str, dict[str, Any]] = {
    "VQ-16": {"base_channels": 128, "encoder_ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": 2, "z_channels": 256}
}
"""Sizes of the image tokenizers that configurations name (`gen_vision_config.cls`)."""

_LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
}
"""What the original code takes where `language_config` is silent: the 7B names its layers, its window and its vocabulary alone."""


def configuration(original: Mapping[str, Any], image_token: int) -> JanusConfig:
    """The configuration of `transformers` from the original config.json.

    Args:
        image_token: the id of `<image_placeholder>`, which the original format leaves to the tokenizer.

    A tower or image tokenizer that is none of the published ones may be given by its sizes: a dictionary `siglip` (width, layers, heads,
    image_size, patch_size, mlp_ratio), and one `vq` (codebook_size, codebook_embed_dim, base_channels, encoder_ch_mult, num_res_blocks,
    z_channels), beside the published entries.

    Raises:
        ValueError: a part is missing, or is of a kind that Janus-Pro does not have.
    """
    try:
        return _configuration(original, image_token)
    except KeyError as error:
        raise ValueError(f"config.json has no entry {error}, which Janus-Pro in its original format has") from None


def _configuration(original: Mapping[str, Any], image_token: int) -> JanusConfig:
    vision, aligner, codes, code_aligner, head = (
        original[f"{part}_config"]["params"] for part in ("vision", "aligner", "gen_vision", "gen_aligner", "gen_head")
    )
    text = {key: original["language_config"].get(key, value) for key, value in _LLAMA.items()}
    text["num_key_value_heads"] = original["language_config"].get("num_key_value_heads", text["num_attention_heads"])
    text["vocab_size"] = original["language_config"]["vocab_size"]
    if original["language_config"].get("rope_scaling"):
        raise ValueError("config.json asks for rope_scaling, which no Janus-Pro has")
    for said, params in (("aligner", aligner), ("gen_aligner", code_aligner)):
        if params["projector_type"] != "mlp_gelu":
            raise ValueError(f"{said}_config has a projector of type {params['projector_type']!r}; Janus-Pro has mlp_gelu")
        if params["n_embed"] != text["hidden_size"]:
            raise ValueError(f"{said}_config projects to {params['n_embed']}, and the language model is {text['hidden_size']} wide")
    if vision.get("select_layer", -1) != -1:
        raise ValueError(f"vision_config reads layer {vision['select_layer']} of its tower; Janus-Pro reads the last, -1")
    tower = original.get("siglip") or _named(siglip.TOWERS, vision["model_name"], "vision_config.params.model_name")
    size = original.get("vq") or _named(TOKENIZERS, original["gen_vision_config"]["cls"], "gen_vision_config.cls")
    theta = text.pop("rope_theta")
    return JanusConfig(
        text_config=LlamaConfig(
            **text, rope_parameters={"rope_type": "default", "rope_theta": float(theta)}, tie_word_embeddings=False
        ),
        vision_config=JanusVisionConfig(
            hidden_size=tower["width"],
            num_hidden_layers=tower["layers"],
            num_attention_heads=tower["heads"],
            image_size=vision["image_size"],
            patch_size=tower["patch_size"],
            num_image_tokens=(vision["image_size"] // tower["patch_size"]) ** 2,
            mlp_ratio=float(tower.get("mlp_ratio", 4)),
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            depth=aligner["depth"],
            projection_dim=aligner["n_embed"],
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=codes["n_embed"],
            num_embeddings=codes["image_token_size"],
            latent_channels=size["z_channels"],
            base_channels=size["base_channels"],
            channel_multiplier=list(size["encoder_ch_mult"]),
            num_res_blocks=size["num_res_blocks"],
            num_hidden_layers=code_aligner["depth"],
            projection_dim=head["image_token_embed"],
            image_token_embed_dim=head["n_embed"],
        ),
        image_token_id=image_token,
        tie_word_embeddings=False,
    )


def _named(known: Mapping[str, dict[str, Any]], name: str, where: str) -> dict[str, Any]:
    if name not in known:
        raise ValueError(f"{where} of config.json is {name!r}; Janus-Pro has {' or '.join(known)}")
    return known[name]
