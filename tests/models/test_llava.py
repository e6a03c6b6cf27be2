"""LLaVA: its folder, its template and its network, against the classes of `transformers` that compute the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from bridges import as_published, built, picture, write_llava
from safetensors.torch import load_file, save_file
from test_ultravox import llama_keys

from unisonde.data.item import Item
from unisonde.models.base import Generation
from unisonde.models.llava import Llava, LlavaNetwork, full_size, keys, layers_read, load
from unisonde.models.parts.checkpoint import empty
from unisonde.models.trace import Reading, Trace

GREEDY = Generation(tokens=5, temperature=0.0)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: "
    "{% for c in m.content %}{% if c.type == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }} {% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""The published chat template, for one turn."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Llava, Any]:
    """Ours, and the network of `transformers` whose weights it has."""
    model, network = built("llava", tmp_path_factory.getbasetemp())
    assert isinstance(model, Llava)
    return model, network


def processed(model: Llava, item: Item) -> dict[str, torch.Tensor]:
    """What the processor of `transformers` makes of an item."""
    processor = transformers.LlavaProcessor(
        model.pictures,
        model.tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    said = [{"type": "text", "text": item.prompt}]
    turn = {"role": "user", "content": [{"type": "image"}, *said] if item.image is not None else said}
    text = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    shown = {"images": [item.picture()]} if item.image is not None else {}
    return dict(processor(text=[text], return_tensors="pt", **shown))


@pytest.mark.parametrize(
    "item", [Item("a", "", "what is it?", picture(24, 15)), Item("b", "", "which?", picture(9, 40)), Item("c", "", "rings")]
)
def test_ids_and_logits_are_those_of_transformers(pair, item: Item) -> None:
    model, network = pair
    prompted = model.prepare(item, 5)
    inputs = processed(model, item)
    assert inputs["input_ids"].tolist() == [prompted.ids]
    with torch.inference_mode():
        expected = network(**inputs).logits
        logits = model.language_model(inputs_embeds=model.embed(prompted)).logits
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_generation_is_that_of_transformers(pair) -> None:
    model, network = pair
    item = Item("a", "", "what is it?", picture(24, 15))
    [response] = model.respond([item], "text", Generation(tokens=8, temperature=0.0))
    inputs = processed(model, item)
    with torch.inference_mode():
        out = network.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=model.ends, pad_token_id=model.pad_id)
    written = [t for t in out[0, inputs["input_ids"].shape[1] :].tolist() if t not in model.ends]
    assert response.text == model.tokenizer.decode(written, skip_special_tokens=True).strip()


def test_what_the_stacks_show(pair) -> None:
    model, network = pair
    item = Item("a", "", "what is it?", picture(24, 15))
    kept = tiny.Kept()
    model.respond([item], "text", GREEDY, trace=Trace(kept))
    seen = {(s.stack, s.layer): s for s in kept.seen}
    with torch.inference_mode():
        tower = network.model.vision_tower(processed(model, item)["pixel_values"], output_hidden_states=True)
    assert model.encoder.depth == 2 and model.encoder.norm is None and len(tower.hidden_states) == 4
    for layer in range(3):
        torch.testing.assert_close(seen["encoder", layer].states, tower.hidden_states[layer][0], **CLOSE)
    assert [(len(s), s.modality, s.kind) for s in seen["encoder", 0].spans] == [(1, "image", "template"), (16, "image", "content")]
    torch.testing.assert_close(seen["adapter", 0].select("prompt", Reading()), tower.hidden_states[-2][0, 1:], **CLOSE)


def test_the_spans_of_a_prompt(pair) -> None:
    model, _ = pair
    prompt = model.prepare(Item("a", "", "what is it?", picture(24, 15)), 5)
    read = [(s.modality, s.kind, model.tokenizer.decode(prompt.ids[s.start : s.stop])) for s in prompt.spans]
    assert read == [
        ("text", "template", "<s>USER: "),
        ("image", "content", "<image>" * 16),
        ("text", "template", "\n"),
        ("text", "content", "what is it?"),
        ("text", "template", " ASSISTANT:"),
    ]


def test_a_mark_that_the_user_wrote_is_a_word(pair) -> None:
    model, _ = pair
    prompted = model.prepare(Item("a", "", "an <image> tag", picture(24, 15)), 5)
    assert len(prompted.slots) == 16 and prompted.ids.count(model.tokenizer.convert_tokens_to_ids("<image>")) == 17
    assert model.respond([Item("a", "", "an <image> tag", picture(24, 15))], "text", GREEDY)


def test_the_class_token_among_the_features(tmp_path: Path) -> None:
    """`vision_feature_select_strategy` full."""
    write_llava(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"vision_feature_select_strategy": "full", "vision_feature_layer": 1}))
    model = load(str(tmp_path), "full", "cpu")
    assert model.lead == 0 and len(model.prepare(Item("a", "", "", picture(9, 9)), 5).slots) == 17 and model.encoder.depth == 1


def test_names_that_transformers_writes(tmp_path: Path, pair) -> None:
    model, network = pair
    write_llava(tmp_path)
    save_file({k: t.clone() for k, t in network.state_dict().items()}, tmp_path / "model.safetensors")
    again = load(str(tmp_path), "mine", "cpu")
    for (name, ours), (other, theirs) in zip(again.network.state_dict().items(), model.network.state_dict().items(), strict=True):
        assert name == other and torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("multi_modal_projector.linear_2.bias"), "lacks multi_modal_projector.linear_2.bias"),
        (lambda s: s.update({"vision_tower.vision_model.extra": torch.ones(1)}), "has unknown vision_tower.vision_model.extra"),
        (
            lambda s: s.pop("vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias"),
            "lacks vision_tower.encoder.layers.1.mlp.fc1.bias",
        ),
    ],
)
def test_a_checkpoint_that_is_not_this_models(tmp_path: Path, change, said: str) -> None:
    write_llava(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=said):
        load(str(tmp_path), "mine", "cpu")


def test_a_llava_of_another_kind(tmp_path: Path) -> None:
    write_llava(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"vision_feature_layer": [-2, -1]}))
    with pytest.raises(ValueError, match=r"reads layer \[-2, -1\] of an encoder of type 'clip_vision_model'"):
        load(str(tmp_path), "mine", "cpu")


def clip_keys(prefix: str, layers: int, d: int, ffn: int, patch: int, positions: int) -> dict[str, tuple[int, ...]]:
    """The weights of CLIP's encoder of pictures, as published."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (d,),
        "embeddings.position_embedding.weight": (positions, d),
    }
    shapes |= {"embeddings.patch_embedding.weight": (d, 3, patch, patch)}
    norms = ["pre_layrnorm", "post_layernorm", *(f"encoder.layers.{k}.layer_norm{n}" for k in range(layers) for n in (1, 2))]
    shapes |= {f"{norm}.{kind}": (d,) for norm in norms for kind in ("weight", "bias")}
    for k in range(layers):
        maps = {f"self_attn.{name}_proj": (d, d) for name in ("q", "k", "v", "out")} | {"mlp.fc1": (ffn, d), "mlp.fc2": (d, ffn)}
        for name, shape in maps.items():
            shapes |= {f"encoder.layers.{k}.{name}.weight": shape, f"encoder.layers.{k}.{name}.bias": shape[:1]}
    return {prefix + name: shape for name, shape in shapes.items()}


def test_the_full_size_has_the_published_keys() -> None:
    config = full_size()
    network = empty(lambda: LlavaNetwork(config))
    checkpoint = clip_keys("vision_tower.vision_model.", 24, 1024, 4096, 14, 577)
    maps = {"linear_1.weight": (4096, 1024), "linear_1.bias": (4096,), "linear_2.weight": (4096, 4096), "linear_2.bias": (4096,)}
    checkpoint |= {f"multi_modal_projector.{name}": shape for name, shape in maps.items()}
    checkpoint |= llama_keys("language_model.", 32, 4096, 11008, 32064)
    assert sum(map(math.prod, checkpoint.values())) == 7_063_427_072
    assert keys(config).shapes(checkpoint) == {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    left_out = [key for key in checkpoint if keys(config).ignores(key)]
    assert len(left_out) == 16 + 2 and layers_read(config) == network.vision_tower.config.num_hidden_layers == 23
    assert sum(p.numel() for p in network.parameters()) == 7_063_427_072 - sum(math.prod(checkpoint[key]) for key in left_out)
    whole = empty(lambda: transformers.LlavaForConditionalGeneration(config))
    assert {as_published(name) for name in whole.state_dict()} == set(checkpoint)


def test_the_published_configuration_is_the_full_size() -> None:
    """As in the repository, which leaves to defaults what `full_size` says."""
    raw = {
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "tie_word_embeddings": False,
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    read, ours = transformers.LlavaConfig(**raw), full_size()
    for part in ("vision_config", "text_config"):
        theirs, mine = getattr(read, part).to_dict(), getattr(ours, part).to_dict()
        differ = {key for key in mine if mine[key] != theirs.get(key)} - {"dtype", "torch_dtype", "_name_or_path"}
        assert not differ, {key: (mine[key], theirs.get(key)) for key in differ}
    assert (read.vision_feature_layer, read.vision_feature_select_strategy) == (ours.vision_feature_layer, "default")
