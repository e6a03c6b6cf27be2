"""Qwen2-Audio: its folder, its template and its network, against the classes of `transformers` that compute the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from bridges import as_published, built, sound, write_qwen2_audio
from safetensors.torch import load_file, save_file
from test_ultravox import llama_keys, whisper_keys
from transformers.models.qwen2_audio.processing_qwen2_audio import Qwen2AudioProcessor

from unisonde.data.item import Item
from unisonde.models.base import Generation
from unisonde.models.parts.checkpoint import empty
from unisonde.models.qwen2_audio import AUDIO, KEYS, Qwen2Audio, Qwen2AudioNetwork, full_size, load
from unisonde.models.trace import Reading, Trace

GREEDY = Generation(tokens=5, temperature=0.0)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Qwen2Audio, Any]:
    """Ours, and the network of `transformers` whose weights it has."""
    model, network = built("qwen2-audio", tmp_path_factory.getbasetemp())
    assert isinstance(model, Qwen2Audio)
    return model, network


def processed(model: Qwen2Audio, item: Item) -> dict[str, torch.Tensor]:
    """What the processor of `transformers` makes of an item, by its own chat template."""
    processor = Qwen2AudioProcessor(model.extractor, model.tokenizer)
    said = [{"type": "text", "text": item.prompt}]
    turn = {"role": "user", "content": [{"type": "audio"}, *said] if item.audio is not None else said}
    text = processor.apply_chat_template(
        [turn], chat_template=processor.default_chat_template, tokenize=False, add_generation_prompt=True
    )
    audio = {"audio": [item.sound().samples], "sampling_rate": 16000} if item.audio is not None else {}
    return dict(processor(text=[text], return_tensors="pt", **audio))


@pytest.mark.parametrize(
    "item", [Item("a", "", "who speaks?", audio=sound(0.42)), Item("b", "", "", audio=sound(1.0)), Item("c", "", "rings")]
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


def test_the_encoder_does_not_look_at_the_padding(pair) -> None:
    model, network = pair
    item = Item("a", "", "who?", audio=sound(0.42))
    inputs = processed(model, item)
    prompted = model.prepare(item, 5)
    louder = dict(prompted.inputs)
    louder["mel"] = louder["mel"].clone()
    louder["mel"][:, :, 60:] += 3.0
    with torch.inference_mode():
        assert torch.equal(model.bridge(louder), model.bridge(prompted.inputs))
        states = network.model.audio_tower(inputs["input_features"]).last_hidden_state  # without a mask
        assert not torch.allclose(network.model.multi_modal_projector(states)[:, :10], model.bridge(prompted.inputs), **CLOSE)


def test_generation_is_that_of_transformers(pair) -> None:
    model, network = pair
    item = Item("a", "", "who speaks?", audio=sound(0.7, 1))
    [response] = model.respond([item], "text", Generation(tokens=8, temperature=0.0))
    inputs = processed(model, item)
    with torch.inference_mode():
        out = network.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=model.ends, pad_token_id=model.pad_id)
    written = [t for t in out[0, inputs["input_ids"].shape[1] :].tolist() if t not in model.ends]
    assert response.text == model.tokenizer.decode(written, skip_special_tokens=True).strip()


def test_the_spans_of_a_prompt(pair) -> None:
    model, _ = pair
    prompt = model.prepare(Item("a", "", "who speaks?", audio=sound(0.42)), 5)
    read = [(s.modality, s.kind, model.tokenizer.decode(prompt.ids[s.start : s.stop])) for s in prompt.spans]
    assert read == [
        (
            "text",
            "template",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nAudio 1: <|audio_bos|>",
        ),
        ("audio", "content", AUDIO * 10),
        ("text", "template", "<|audio_eos|>\n"),
        ("text", "content", "who speaks?"),
        ("text", "template", "<|im_end|>\n<|im_start|>assistant\n"),
    ]


def test_what_the_stacks_show(pair) -> None:
    """The encoder's layers by 50 positions a second; the adapter takes pairs, averaged and normalised."""
    model, network = pair
    item = Item("a", "", "who?", audio=sound(0.42))
    kept = tiny.Kept()
    model.respond([item], "text", GREEDY, trace=Trace(kept))
    seen = {(s.stack, s.layer): s for s in kept.seen}
    inputs = processed(model, item)
    with torch.inference_mode():
        mask = torch.zeros(1, 1, 50, 50).masked_fill(torch.arange(50) >= 21, -1e9)
        tower = network.model.audio_tower(inputs["input_features"], attention_mask=mask, output_hidden_states=True)
    assert len(seen["encoder", 2].select("prompt", Reading())) == 21 and ("encoder", 3) not in seen
    for layer in range(2):  # the last of transformers' is after the norm
        torch.testing.assert_close(seen["encoder", layer].states, tower.hidden_states[layer][0, :21], **CLOSE)
    torch.testing.assert_close(seen["adapter", 0].states, tower.last_hidden_state[0, :10], **CLOSE)


def test_a_recording_that_is_too_long(pair) -> None:
    model, _ = pair
    item = Item("long", "", "who?", audio=sound(1.2))
    with pytest.raises(ValueError, match=r"the recording of item 'long' is 1.2 s long, tiny/qwen2-audio takes 1 s; .* --truncate"):
        model.respond([item], "text", GREEDY)
    [response] = model.respond([item], "text", GREEDY, truncate=True)
    assert response.flags.count("cut") == 1
    assert len(model.prepare(item, 5, truncate=True).slots) == 25


def test_names_that_transformers_writes(tmp_path: Path, pair) -> None:
    """A folder that `transformers` 5 has saved holds other names in memory, and may hold them on disk."""
    model, network = pair
    write_qwen2_audio(tmp_path)
    save_file({k: t.clone() for k, t in network.state_dict().items()}, tmp_path / "model.safetensors")
    again = load(str(tmp_path), "mine", "cpu")
    for (name, ours), (other, theirs) in zip(again.network.state_dict().items(), model.network.state_dict().items(), strict=True):
        assert name == other and torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("multi_modal_projector.linear.bias"), "lacks multi_modal_projector.linear.bias"),
        (lambda s: s.update({"audio_tower.layers.9.fc1.bias": torch.ones(1)}), "has unknown audio_tower.layers.9.fc1.bias"),
    ],
)
def test_a_checkpoint_that_is_not_this_models(tmp_path: Path, change, said: str) -> None:
    write_qwen2_audio(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=said):
        load(str(tmp_path), "mine", "cpu")


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    write_qwen2_audio(tmp_path)
    tiny.byte_tokenizer(["<|im_start|>", "<|im_end|>"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks <\|audio_bos\|>, <\|AUDIO\|>, <\|audio_eos\|>: it is not Qwen2-Audio's"):
        load(str(tmp_path), "mine", "cpu")


def test_the_full_size_has_the_published_keys() -> None:
    network = empty(lambda: Qwen2AudioNetwork(full_size()))
    checkpoint = whisper_keys("audio_tower.", 32, 1280, 5120, 128)
    checkpoint |= {"multi_modal_projector.linear.weight": (4096, 1280), "multi_modal_projector.linear.bias": (4096,)}
    checkpoint |= llama_keys("language_model.", 32, 4096, 11008, 156032, bias=True)
    assert sum(map(math.prod, checkpoint.values())) == sum(p.numel() for p in network.parameters()) == 8_397_094_912
    assert KEYS.shapes(checkpoint) == {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    # And transformers has the same, under its own names.
    whole = empty(lambda: transformers.Qwen2AudioForConditionalGeneration(full_size()))
    assert {as_published(name) for name in whole.state_dict()} == set(checkpoint)


def test_the_published_configuration_is_the_full_size(tmp_path: Path) -> None:
    """As in the repository, which leaves to defaults what `full_size` says."""
    raw = {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 128,
            "encoder_layers": 32,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "d_model": 1280,
            "activation_function": "gelu",
            "scale_embedding": False,
            "max_source_positions": 1500,
        },
        "audio_token_index": 151646,
        "ignore_index": -100,
        "model_type": "qwen2_audio",
        "text_config": {
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "intermediate_size": 11008,
            "max_position_embeddings": 8192,
            "model_type": "qwen2",
            "rope_theta": 10000,
            "rms_norm_eps": 1e-5,
            "sliding_window": 32768,
            "torch_dtype": "bfloat16",
            "use_mrope": False,
            "vocab_size": 156032,
        },
        "vocab_size": 156032,
    }
    read = transformers.Qwen2AudioConfig(**json.loads(json.dumps(raw)))
    ours = full_size()
    for part in ("audio_config", "text_config"):
        theirs, mine = getattr(read, part).to_dict(), getattr(ours, part).to_dict()
        differ = {key for key in mine if mine[key] != theirs.get(key)} - {"dtype", "sliding_window", "torch_dtype"}
        assert not differ, {key: (mine[key], theirs.get(key)) for key in differ}
