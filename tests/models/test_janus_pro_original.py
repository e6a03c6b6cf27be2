"""Janus-Pro in its original format: key table, configuration, files of every kind, and the same states as in the converted format.

The folders are written here, small and random, with the official key names made from those of `transformers` by rules of this file's own.
"""

from __future__ import annotations

import ast
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import byte_tokenizer
from torch import Tensor
from transformers import JanusForConditionalGeneration

import unisonde
from unisonde.data.item import Item
from unisonde.models.base import Generation
from unisonde.models.janus_pro import (
    ASSISTANT,
    BEGIN_IMAGE,
    BOS,
    END_IMAGE,
    IMAGE,
    SIZES,
    SPECIAL_TOKENS,
    SYSTEM,
    USER,
    ImageProcessor,
    JanusPro,
    full_size,
)
from unisonde.models.parts.checkpoint import empty
from unisonde.models.parts.janus_keys import KEYS, configuration
from unisonde.models.trace import Trace

HIDDEN = 48
PREPROCESSING = {
    "background_color": [127, 127, 127],
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "VLMImageProcessor",
    "image_size": 32,
    "image_std": [0.5, 0.5, 0.5],
    "min_size": 14,
    "rescale_factor": 1 / 255,
}


def published(hidden: int, language: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the original repositories."""
    projector = {"cls": "MlpProjector", "model_type": "aligner"}
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "torch_dtype": "bfloat16",
        "vision_config": {
            "cls": "CLIPVisionTower",
            "model_type": "vision",
            "params": {"image_size": 384, "model_name": "siglip_large_patch16_384", "select_feature": "same", "select_layer": -1},
        },
        "aligner_config": projector | {"params": {"depth": 2, "input_dim": 1024, "n_embed": hidden, "projector_type": "mlp_gelu"}},
        "gen_vision_config": {"cls": "VQ-16", "model_type": "gen_vision", "params": {"image_token_size": 16384, "n_embed": 8}},
        "gen_aligner_config": projector
        | {"model_type": "gen_aligner", "params": {"depth": 2, "input_dim": 8, "n_embed": hidden, "projector_type": "mlp_gelu"}},
        "gen_head_config": {
            "cls": "vision_head",
            "model_type": "gen_head",
            "params": {"image_token_embed": hidden, "image_token_size": 16384, "n_embed": hidden},
        },
        "language_config": {"model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": 102400} | language,
    }


PUBLISHED = {
    "1B": published(
        2048,
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "max_position_embeddings": 16384,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
        },
    ),
    "7B": published(4096, {"max_position_embeddings": 16384, "num_hidden_layers": 30}),
}


def tiny() -> dict[str, Any]:
    """A config.json of a size that no one published."""
    config = published(
        HIDDEN,
        {
            "vocab_size": 320,
            "hidden_size": HIDDEN,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
        },
    )
    config["vision_config"]["params"] |= {"image_size": 32, "model_name": "tiny"}
    config["gen_vision_config"]["params"] |= {"image_token_size": 40}
    config["siglip"] = {"width": 32, "layers": 2, "heads": 2, "patch_size": 8, "mlp_ratio": 2}
    config["vq"] = {"base_channels": 32, "encoder_ch_mult": [1, 1, 2, 1], "z_channels": 32, "num_res_blocks": 1}
    return config


# ---------------------------------------------------------------------------------------- official names, by rules of our own

NAMES = (
    (r"model\.vision_model\.encoder\.layers\.(\d+)\.", r"vision_model.vision_tower.blocks.\1."),
    (r"model\.vision_model\.post_layernorm\.", "vision_model.vision_tower.norm."),
    (r"model\.vision_model\.embeddings\.patch_embedding\.", "vision_model.vision_tower.patch_embed.proj."),
    (r"model\.vision_model\.embeddings\.position_embedding\.weight", "vision_model.vision_tower.pos_embed"),
    (r"layer_norm([12])", r"norm\1"),
    (r"self_attn\.projection_layer", "attn.proj"),
    (r"model\.aligner", "aligner"),
    (r"model\.generation_aligner", "gen_aligner"),
    (r"aligner\.fc1", "aligner.layers.0"),
    (r"aligner\.hidden_layers\.0", "aligner.layers.2"),
    (r"model\.generation_head\.proj_out", "gen_head.output_mlp_projector"),
    (r"model\.generation_head", "gen_head"),
    (r"model\.generation_embeddings", "gen_embed"),
    (r"model\.vqmodel", "gen_vision_model"),
    (r"coder\.(down|up)\.", "coder.conv_blocks."),
    (r"conv_blocks\.(\d+)\.block", r"conv_blocks.\1.res"),
    (r"mid\.block_1", "mid.0"),
    (r"mid\.attn_1", "mid.1"),
    (r"mid\.block_2", "mid.2"),
    (r"^model\.language_model", "language_model.model"),
    (r"^lm_head", "language_model.lm_head"),
)


def official(state: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """A state of `JanusForConditionalGeneration` under the official names, with what the official class carries unused."""
    named: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if ".vision_model." in key and (fused := re.search(r"self_attn\.([qkv])_proj\.(\w+)", key)):
            if fused[1] == "q":
                parts = [state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                layer = re.search(r"layers\.(\d+)", key)
                named[f"vision_model.vision_tower.blocks.{layer[1]}.attn.qkv.{fused[2]}"] = torch.cat(parts)
            continue
        for pattern, to in NAMES:
            key = re.sub(pattern, to, key)
        named[key] = tensor[None] if key.endswith("pos_embed") else tensor
    like = next(iter(state.values()))
    pool = {"latent": (1, 1, width), "kv.weight": (2 * width, width), "kv.bias": (2 * width,)}
    pool |= {"mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,), "mlp.fc2.weight": (width, 4 * width)}
    pool |= {f"{name}.weight": (width, width) for name in ("q", "proj")} | {"norm.weight": (width,)}
    pool |= {f"{name}.bias": (width,) for name in ("q", "proj", "norm", "mlp.fc2")}
    named |= {f"vision_model.vision_tower.attn_pool.{name}": like.new_empty(shape) for name, shape in pool.items()}
    named["gen_vision_model.quantize.codebook_used"] = like.new_zeros(65536)
    return named


@pytest.mark.parametrize("size", SIZES)
def test_the_table_covers_the_published_checkpoint_exactly(shared: Path, size: str) -> None:
    lines = (shared / "manifests" / f"janus_pro_{size.lower()}.keys.txt").read_text().splitlines()
    manifest = {key: ast.literal_eval(shape) for key, shape in (line.split("\t") for line in lines)}
    with torch.device("meta"):
        network = JanusForConditionalGeneration(full_size(*SIZES[size]))
    ours = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    assert KEYS.shapes(manifest) == ours
    ignored = {key for key in manifest if KEYS.ignores(key)}
    assert ignored == {key for key in manifest if ".attn_pool." in key} | {"gen_vision_model.quantize.codebook_used"}
    assert {key: tuple(t.shape) for key, t in official(network.state_dict(), 1024).items()} == manifest
    total = sum(math.prod(shape) for key, shape in manifest.items() if not key.endswith("codebook_used"))
    assert total / 1e9 == pytest.approx({"1B": 2.089, "7B": 7.420}[size], abs=0.0005)


@pytest.mark.parametrize("size", SIZES)
def test_the_table_covers_the_published_sizes_without_a_list(size: str) -> None:
    with torch.device("meta"):
        state = JanusForConditionalGeneration(full_size(*SIZES[size])).state_dict()
    filled = KEYS.shapes({key: tuple(tensor.shape) for key, tensor in official(state, 1024).items()})
    assert filled == {key: tuple(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize("size", SIZES)
def test_the_published_configuration_is_the_preset(size: str) -> None:
    made, preset = configuration(PUBLISHED[size], 100581).to_dict(), full_size(*SIZES[size]).to_dict()
    assert made == preset


# -------------------------------------------------------------------------------------------------------------------- folders


def settle(state: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        key: tensor if tensor.ndim < 2 else torch.randn(tensor.shape, generator=generator) * tensor[0].numel() ** -0.5
        for key, tensor in state.items()
    }


@pytest.fixture(scope="module")
def network() -> JanusForConditionalGeneration:
    made = JanusForConditionalGeneration(configuration(tiny(), 256 + 2 + SPECIAL_TOKENS.index(IMAGE)))
    made.load_state_dict(settle(made.state_dict()))
    return made.eval()


@pytest.fixture(scope="module")
def weights(network) -> dict[str, Tensor]:
    return official(network.state_dict(), 32)


def folder(path: Path, weights: dict[str, Tensor], files: str) -> Path:
    """An original repository, its weights in `files`: whole or sharded, safetensors or pickle."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(tiny()))
    (path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    byte_tokenizer(SPECIAL_TOKENS).save_pretrained(path)
    # As published: a class that cuts words otherwise than tokenizer.json says, and BOS left to a setting.
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "bos_token": BOS}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    write(path, weights, files)
    return path


def write(path: Path, weights: dict[str, Tensor], files: str) -> None:
    stem, extension = ("model", "safetensors") if files.endswith("safetensors") else ("pytorch_model", "bin")
    save = save_file if extension == "safetensors" else torch.save
    weights = {key: tensor.clone() for key, tensor in weights.items()}
    if not files.startswith("sharded"):
        save(weights, path / f"{stem}.{extension}")
        return
    keys = sorted(weights)
    shards = {f"{stem}-0000{k + 1}-of-00002.{extension}": keys[k::2] for k in range(2)}
    for name, held in shards.items():
        save({key: weights[key] for key in held}, path / name)
    index = {"metadata": {}, "weight_map": {key: name for name, held in shards.items() for key in held}}
    (path / f"{stem}.{extension}.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def original(weights, tmp_path_factory) -> Path:
    return folder(tmp_path_factory.mktemp("janus") / "original", weights, "bin")


@pytest.fixture(scope="module")
def model(original: Path) -> JanusPro:
    return unisonde.load(original)


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (29, 50, 3), dtype=np.uint8))
ITEMS = {"text": Item("q", "c", "what is this?", PICTURE), "image": Item("d", "c", "a red ring")}
SETTINGS = {"text": Generation(tokens=6, temperature=0.0), "image": Generation(temperature=1.0, guidance=5.0)}


def states(model: JanusPro, task: str) -> list[Tensor]:
    kept: list[Tensor] = []
    model.respond([ITEMS[task]], task, SETTINGS[task], 3, Trace(lambda seen: kept.append(seen.states.clone())))  # type: ignore[arg-type]
    return kept


@pytest.mark.parametrize("files", ["safetensors", "sharded safetensors", "sharded bin"])
def test_every_kind_of_file_gives_the_same_weights(files: str, weights, model: JanusPro, tmp_path: Path) -> None:
    other = unisonde.load(folder(tmp_path / "m", weights, files))
    assert (other.family, other.tasks) == ("janus-pro", ("text", "image"))
    theirs = other.network.state_dict()
    for key, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, theirs[key]), key


def test_both_formats_give_equal_states(network, model: JanusPro, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    sides = {"size": {"height": 32, "width": 32}, "image_processor_type": "JanusImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING | sides))
    converted = unisonde.load(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "janus"
    assert converted.system == model.system == SYSTEM and converted.defaults("image") == model.defaults("image")
    for task in ("text", "image"):
        ours, theirs = states(model, task), states(converted, task)
        assert len(ours) == len(theirs) == 5
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_number_formats(original: Path) -> None:
    model = unisonde.load(original, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in model.network.parameters()} == {torch.bfloat16}
    assert model.network.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert {p.dtype for p in unisonde.load(original).network.parameters()} == {torch.float32}
    assert len(states(model, "text")) == 5
    assert isinstance(model.generate("a red ring", "image"), Image.Image)


def test_the_prompt_is_the_published_one_letter_by_letter(model: JanusPro) -> None:
    """Bytes are tokens here, so nothing can hide: no space lost, BOS once and first."""
    special = {token: 258 + k for k, token in enumerate(SPECIAL_TOKENS)}

    def ids(*parts: str) -> list[int]:
        letters = byte_tokenizer()
        return [i for part in parts for i in ([special[part]] if part in special else letters(part)["input_ids"])]

    drawn = model.encode(ITEMS["image"], "image", 0)
    assert drawn.ids == ids(BOS, USER, ": a red ring\n\n", ASSISTANT, ":", BEGIN_IMAGE)
    assert model.unconditional(drawn.ids) == [special[BOS], *[model.pad_id] * (len(drawn.ids) - 2), special[BEGIN_IMAGE]]
    seen = model.encode(ITEMS["text"], "text", 0)
    asked = (END_IMAGE, "\nwhat is this?\n\n", ASSISTANT, ":")
    assert seen.ids == ids(BOS, SYSTEM + "\n\n", USER, ": ", BEGIN_IMAGE, *[IMAGE] * 16, *asked)
    assert model.image_id == special[IMAGE]


@pytest.mark.parametrize("size", [(50, 29), (29, 50), (640, 427), (31, 31), (500, 7)])
def test_pictures_are_prepared_as_published(model: JanusPro, size: tuple[int, int]) -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    longest = max(size)
    whole = tuple(max(int(side / longest * 32), 14) for side in size)
    square = Image.new("RGB", (32, 32), (127, 127, 127))
    square.paste(picture.resize(whole, Image.Resampling.BICUBIC), ((32 - whole[0]) // 2, (32 - whole[1]) // 2))
    expected = torch.tensor(np.asarray(square)).permute(2, 0, 1) / 255 * 2 - 1
    pixels = model.image_processor(picture, return_tensors="pt")["pixel_values"][0]
    assert (pixels - expected).abs().max() < 1e-5
    assert isinstance(model.image_processor, ImageProcessor)


def test_rounding_the_side_would_be_another_picture(model: JanusPro) -> None:
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    stock = JanusImageProcessorPil(size={"height": 32, "width": 32}, min_size=14, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    theirs, ours = (processor(PICTURE, return_tensors="pt")["pixel_values"][0] for processor in (stock, model.image_processor))
    assert (theirs - ours).abs().max() > 0.1  # 29 of 50 are 18.56 of 32: 18 as published, 19 rounded


@torch.inference_mode()
def test_codes_of_a_picture_are_the_nearest_unit_vectors(model: JanusPro) -> None:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vq = model.network.model.vqmodel
    latents = vq.quant_conv(vq.encoder(pixels))
    codes = model.codes_of(pixels)
    assert codes.shape == (2, 16)
    for b, y, x in ((0, 0, 0), (0, 1, 3), (1, 3, 2)):
        latent = latents[b, :, y, x] / latents[b, :, y, x].norm()
        distances = [float((latent - entry / entry.norm()).square().sum()) for entry in vq.quantize.embedding.weight]
        assert int(codes[b, 4 * y + x]) == int(np.argmin(distances))
    assert model.pixels_of(codes).shape == (2, 3, 32, 32)


def test_settings_beside_the_weights_replace_the_published_ones(weights, tmp_path: Path) -> None:
    path = folder(tmp_path / "m", weights, "safetensors")
    own = {"system": "", "generation": {"text": {"tokens": 7, "temperature": 0.0}}}
    (path / "unisonde.json").write_text(json.dumps(own))
    model = unisonde.load(path)
    assert (model.system, model.defaults("text").tokens, model.defaults("image").guidance) == ("", 7, 5.0)


# --------------------------------------------------------------------------------------------------------------------- errors


class Code:
    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("gen_embed.weight"), r"lacks model\.generation_embeddings\.weight"),
        (lambda w: w.pop("vision_model.vision_tower.blocks.1.attn.qkv.bias"), r"lacks .*k_proj.bias.*q_proj.bias"),
        (lambda w: w.update({"vision_model.vision_tower.cls_token": torch.zeros(1, 1, 32)}), r"has unknown .*cls_token"),
        (lambda w: w.update({"language_model.model.layers.3.mlp.up_proj.weight": torch.zeros(64, 48)}), r"unknown .*layers\.3"),
        (lambda w: w.update({"gen_embed.weight": torch.zeros(41, 8)}), r"shape gen_embed\.weight \(41, 8\) instead of \(40, 8\)"),
        (lambda w: w.update({"vision_model.vision_tower.blocks.0.attn.qkv.bias": torch.zeros(97)}), r"qkv\.bias.*97"),
        (lambda w: w.update({"note": Code()}), "holds more than plain weights"),
    ],
)
def test_weights_that_are_not_this_models(change, said, weights, tmp_path: Path, capsys) -> None:
    changed = dict(weights)
    change(changed)
    path = folder(tmp_path / "m", {}, "bin")
    torch.save(changed, path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=said) as error:
        unisonde.load(path)
    assert "\n" not in str(error.value) and "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("gen_head_config"), "no entry 'gen_head_config'"),
        (lambda c: c["language_config"].pop("vocab_size"), "no entry 'vocab_size'"),
        (lambda c: c.pop("siglip"), "is 'tiny'; Janus-Pro has siglip_large_patch16_384"),
        (lambda c: c["aligner_config"]["params"].update(projector_type="linear"), "projector of type 'linear'"),
        (lambda c: c["aligner_config"]["params"].update(n_embed=64), "projects to 64, and the language model is 48 wide"),
        (lambda c: c["vision_config"]["params"].update(select_layer=-2), "reads layer -2"),
        (lambda c: c["language_config"].update(rope_scaling={"type": "linear"}), "rope_scaling"),
    ],
)
def test_configurations_that_are_not_janus_pros(change, said) -> None:
    config = tiny()
    change(config)
    with pytest.raises(ValueError, match=said):
        configuration(config, 0)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "tokenizer.json", "pytorch_model.bin"])
def test_a_missing_file_is_named(file: str, weights, tmp_path: Path) -> None:
    path = folder(tmp_path / "m", weights, "bin")
    (path / file).unlink()
    with pytest.raises(ValueError, match=rf"no weights|{re.escape(file)}") as error:
        unisonde.load(path)
    assert "\n" not in str(error.value)


def test_buffers_of_an_empty_network_are_real() -> None:
    network = empty(lambda: JanusForConditionalGeneration(full_size(*SIZES["1B"])))
    assert all(p.is_meta for p in network.parameters()) and not any(b.is_meta for b in network.buffers())
