"""Ultravox: its folder, its templates, long recordings, and its network against one written out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from bridges import LLAMA_MARKS, TEXT, WHISPER, built, picture, sound, write_ultravox
from safetensors.torch import load_file, save_file
from torch import Tensor

from unisonde.data.item import Item
from unisonde.data.sound import Sound
from unisonde.models import ultravox
from unisonde.models.base import Generation
from unisonde.models.parts.checkpoint import empty
from unisonde.models.parts.whisper_encoder import encode, in_pieces, log_mel
from unisonde.models.ultravox import KEYS, Ultravox, UltravoxNetwork, full_size, load

GREEDY = Generation(tokens=5, temperature=0.0)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Ultravox:
    made = built("ultravox", tmp_path_factory.getbasetemp())[0]
    assert isinstance(made, Ultravox)
    return made


@pytest.fixture(scope="module")
def weights(model: Ultravox, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return built("ultravox", tmp_path_factory.getbasetemp())[1]


# --------------------------------------------------------------------------------------------------------------------- by hand


def norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    made = x @ w[f"{name}.weight"].T
    return made + w[f"{name}.bias"] if f"{name}.bias" in w else made


def whisper(w: dict[str, Tensor], mel: Tensor, heads: int = 2, padded: int = 0) -> Tensor:
    """The encoder on features (mels, frames) and `padded` frames of zeros behind them, which no position looks at: (positions, d)."""
    content = (mel.shape[1] + 1) // 2
    x = F.gelu(F.conv1d(F.pad(mel, (0, padded))[None], w["conv1.weight"], w["conv1.bias"], padding=1))
    x = F.gelu(F.conv1d(x, w["conv2.weight"], w["conv2.bias"], stride=2, padding=1))[0].T
    x = x + w["embed_positions.weight"][: len(x)]
    for k in range(WHISPER["encoder_layers"]):
        at = f"layers.{k}"
        h = norm(x, w, f"{at}.self_attn_layer_norm")
        q, key, value = (linear(h, w, f"{at}.self_attn.{p}_proj").unflatten(-1, (heads, -1)).transpose(0, 1) for p in "qkv")
        seen = (q @ key[:, :content].transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ value[:, :content]
        x = x + linear(seen.transpose(0, 1).flatten(1), w, f"{at}.self_attn.out_proj")
        h = F.gelu(linear(norm(x, w, f"{at}.final_layer_norm"), w, f"{at}.fc1"))
        x = x + linear(h, w, f"{at}.fc2")
    return norm(x, w, "layer_norm")


def project(w: dict[str, Tensor], states: Tensor, middle: bool) -> Tensor:
    """Features of the encoder's states (positions, d)."""
    short = -len(states) % 8
    joined = torch.cat([states, states.new_zeros(short, states.shape[1])]).reshape(-1, 8 * states.shape[1])
    h = rms(joined, w["ln_pre.weight"]) @ w["linear_1.weight"].T
    value, gate = h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :]
    h = gate * torch.sigmoid(gate) * value  # the second half is the gate
    if middle:
        return rms(h, w["ln_mid.weight"]) @ w["linear_2.weight"].T
    return rms(h @ w["linear_2.weight"].T, w["ln_post.weight"])


def under(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in weights.items() if k.startswith(prefix)}


def by_hand(weights: dict[str, Tensor], samples: np.ndarray, ids: list[int], slots: list[int], middle: bool = True) -> Tensor:
    """Logits (L, V) of a prompt with a recording. Pieces of a second go through the encoder by themselves."""
    extractor = transformers.WhisperFeatureExtractor(feature_size=WHISPER["num_mel_bins"])
    padded = np.pad(samples, (0, -len(samples) % 160))
    mel = torch.tensor(extractor(padded, sampling_rate=16000, padding=False, truncation=False)["input_features"][0])
    pieces = [mel[:, start : start + 100] for start in range(0, mel.shape[1], 100)]
    behind = [100 - piece.shape[1] if len(pieces) > 1 else 0 for piece in pieces]
    states = [whisper(under(weights, "audio_tower."), p, padded=b) for p, b in zip(pieces, behind, strict=True)]
    made = [project(under(weights, "multi_modal_projector."), s, middle) for s in states]
    features = torch.cat([f[: math.ceil(p.shape[1] / 16)] for f, p in zip(made, pieces, strict=True)])
    decoder = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).eval()
    decoder.load_state_dict(under(weights, "language_model."))
    with torch.inference_mode():
        embeddings = decoder.get_input_embeddings()(torch.tensor([ids]))
        embeddings[0, slots] = features
        return decoder(inputs_embeds=embeddings).logits[0]


@pytest.mark.parametrize("seconds", [0.1, 0.42, 0.9999, 1.0])
def test_the_network_is_the_one_written_out_by_hand(model: Ultravox, weights: dict[str, Tensor], seconds: float) -> None:
    item = Item("i", "", "who speaks?", audio=sound(seconds))
    prompted = model.prepare(item, 5)
    with torch.inference_mode():
        logits = model.language_model(inputs_embeds=model.embed(prompted)).logits[0]
    expected = by_hand(weights, item.sound().samples, prompted.ids, prompted.slots)
    torch.testing.assert_close(logits, expected, **CLOSE)
    # It would be noticed: without the encoder's last norm, or with the gate first, logits differ.
    other = weights | {"multi_modal_projector.linear_1.weight": weights["multi_modal_projector.linear_1.weight"].roll(12, 0)}
    assert not torch.allclose(by_hand(other, item.sound().samples, prompted.ids, prompted.slots), expected, **CLOSE)


@pytest.mark.parametrize("seconds", [1.005, 2.3, 3.0])
def test_a_long_recording_goes_through_the_encoder_in_pieces(model: Ultravox, weights: dict[str, Tensor], seconds: float) -> None:
    """The last piece is padded, and the padding masked. What the encoder gives there fills up the last feature, as published."""
    item = Item("i", "", "", audio=sound(seconds, 2))
    prompted = model.prepare(item, 5)
    frames = math.ceil(seconds * 100)
    counts = [math.ceil(min(100, frames - start) / 16) for start in range(0, frames, 100)]
    assert len(prompted.slots) == sum(counts) and prompted.inputs["mel"].shape == (len(counts), 16, 100)
    assert prompted.frames == sum(math.ceil(min(100, frames - start) / 2) for start in range(0, frames, 100))
    with torch.inference_mode():
        logits = model.language_model(inputs_embeds=model.embed(prompted)).logits[0]
    torch.testing.assert_close(logits, by_hand(weights, item.sound().samples, prompted.ids, prompted.slots), **CLOSE)


def test_the_encoder_on_all_it_takes_is_that_of_transformers(model: Ultravox) -> None:
    tower, extractor = model.network.audio_tower, model.extractor
    mel = log_mel(extractor, sound(1.0).samples)
    whole = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)(sound(1.0).samples, sampling_rate=16000)
    assert torch.equal(mel, torch.tensor(whole["input_features"][0]))
    pieces, lengths = in_pieces(mel, 100)
    with torch.inference_mode():
        torch.testing.assert_close(encode(tower, pieces, lengths), tower(pieces).last_hidden_state, **CLOSE)


def test_the_second_norm_after_the_last_map(tmp_path: Path) -> None:
    """As in versions before 0.5, whose encoder is a Whisper published apart."""
    weights = write_ultravox(tmp_path / "old", middle=False, old=True)
    model = load(str(tmp_path / "old"), "old", "cpu")
    assert set(model.apart) == {"language_model", "audio_tower"}
    item = Item("i", "", "who?", audio=sound(0.5))
    prompted = model.prepare(item, 5)
    with torch.inference_mode():
        logits = model.language_model(inputs_embeds=model.embed(prompted)).logits[0]
    expected = by_hand(weights, item.sound().samples, prompted.ids, prompted.slots, middle=False)
    torch.testing.assert_close(logits, expected, **CLOSE)


# -------------------------------------------------------------------------------------------------------------------- templates


def spelled(model: Ultravox, item: Item) -> list[tuple[str, str, str]]:
    """Modality, kind and text of the spans of a prompt."""
    prompt = model.prepare(item, 5)
    assert [s.start for s in prompt.spans] == [0, *(s.stop for s in prompt.spans[:-1])] and prompt.spans[-1].stop == len(prompt.ids)
    return [(s.modality, s.kind, model.tokenizer.decode(prompt.ids[s.start : s.stop])) for s in prompt.spans]


def test_the_spans_of_a_prompt(model: Ultravox) -> None:
    begin, end, turn = LLAMA_MARKS
    head, tail = f"{begin}user{end}\n\n", f"{turn}{begin}assistant{end}\n\n"
    assert spelled(model, Item("i", "", " who speaks? ", audio=sound(0.42))) == [
        ("text", "template", head),
        ("text", "content", "who speaks?"),
        ("text", "template", "  "),  # one of the prompt's, one of the publisher's
        ("audio", "content", "</s>" * 3),
        ("text", "template", tail),
    ]
    assert spelled(model, Item("i", "", "", audio=sound(0.42))) == [
        ("text", "template", head),
        ("audio", "content", "</s>" * 3),
        ("text", "template", tail),
    ]
    assert spelled(model, Item("i", "", "two rings")) == [
        ("text", "template", head),
        ("text", "content", "two rings"),
        ("text", "template", tail),
    ]


def test_the_sequence_is_laid_out_as_published(model: Ultravox) -> None:
    """The rendered turn is split at the mark, its parts tokenised apart, and the end-of-turn token put between, once a feature."""
    ids = model.prepare(Item("i", "", "who speaks?", audio=sound(0.42)), 5).ids
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "who speaks? <|audio|>"}], tokenize=False, add_generation_prompt=True
    )
    head, tail = (model.tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in text.split("<|audio|>"))
    assert ids == head + [model.tokenizer.eos_token_id] * 3 + tail
    assert set(model.ends) == {257, model.tokenizer.convert_tokens_to_ids("<|eot_id|>")}


def test_what_is_known_of_a_recording_is_kept(model: Ultravox) -> None:
    loud = np.clip(5 * sound(0.4).samples, -1, 1)
    [response] = model.respond([Item("loud", "", "who?", audio=Sound(loud, 16000))], "text", GREEDY)
    assert "clipped" in response.flags
    quick, slow = (model.prepare(Item("i", "", "", audio=sound(0.5, rate=rate)), 5) for rate in (48000, 8000))
    assert len(quick.slots) == len(slow.slots) == 4
    stereo = Sound(np.stack([sound(0.5).samples, np.zeros(8000, np.float32)], 1), 16000)
    assert len(model.prepare(Item("i", "", "", audio=stereo), 5).slots) == 4


# ----------------------------------------------------------------------------------------------------------------------- loading


def test_a_decoder_in_the_checkpoint(model: Ultravox, tmp_path: Path) -> None:
    write_ultravox(tmp_path / "inside", inside=True)
    inside = load(str(tmp_path / "inside"), "inside", "cpu")
    assert inside.apart == {} and set(model.apart) == {"language_model"}
    for (name, ours), (other, theirs) in zip(inside.network.state_dict().items(), model.network.state_dict().items(), strict=True):
        assert name == other and torch.equal(ours, theirs)
    assert inside.identity()["parameters"] == model.identity()["parameters"]


def test_number_formats(tmp_path: Path) -> None:
    write_ultravox(tmp_path)
    model = load(str(tmp_path), "half", "cpu", torch.bfloat16)
    assert {p.dtype for p in model.network.parameters()} == {torch.bfloat16}
    assert model.language_model.model.rotary_emb.inv_freq.dtype == torch.float32
    items = [Item("i", "", "who?", audio=sound(2.3))]
    assert len(model.respond(items, "text", GREEDY)) == 1
    assert torch.isfinite(model.answer_scores(items, ["a", "b"])).all()


def changed(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("multi_modal_projector.ln_mid.weight"), "lacks multi_modal_projector.ln_mid.weight"),
        (lambda s: s.update({"audio_tower.extra": torch.ones(1)}), "has unknown audio_tower.extra"),
        (lambda s: s.update({"audio_tower.conv1.bias": torch.ones(3)}), r"in another shape audio_tower.conv1.bias \(3,\)"),
    ],
)
def test_a_checkpoint_that_is_not_this_models(tmp_path: Path, change, said: str) -> None:
    write_ultravox(tmp_path)
    changed(tmp_path, change)
    with pytest.raises(ValueError, match=said):
        load(str(tmp_path), "mine", "cpu")


def test_a_decoder_that_cannot_be_had(tmp_path: Path) -> None:
    write_ultravox(tmp_path)
    (tmp_path / "llm" / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"the language model of .* is published apart, as meta-llama/Llama-3.1-8B-Instruct.* a folder llm"
    ):
        load(str(tmp_path), "mine", "cpu")


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("projector_act", "gelu", "has projector_act 'gelu', where 'swiglu'"),
        ("audio_latency_block_size", 100, "has audio_latency_block_size 100, where None"),
        ("audio_config", None, "neither audio_config nor the id of a model"),
        ("audio_config", WHISPER | {"model_type": "wav2vec2"}, "the model_type of its encoder 'wav2vec2'"),
    ],
)
def test_another_kind_of_ultravox(tmp_path: Path, entry: str, value, said: str) -> None:
    write_ultravox(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {entry: value}))
    with pytest.raises(ValueError, match=said):
        load(str(tmp_path), "mine", "cpu")


def test_a_picture_is_refused(model: Ultravox) -> None:
    with pytest.raises(ValueError, match="item 'p' has an image prompt; tiny/ultravox takes recordings and text"):
        model.respond([Item("p", "", "what?", picture(9, 9))], "text", GREEDY)


# --------------------------------------------------------------------------------------------------------------------- full size


def whisper_keys(prefix: str, layers: int, d: int, ffn: int, mels: int) -> dict[str, tuple[int, ...]]:
    """The weights of a Whisper encoder, as published."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (d, mels, 3), "conv1.bias": (d,), "conv2.weight": (d, d, 3)}
    shapes |= {"conv2.bias": (d,), "embed_positions.weight": (1500, d), "layer_norm.weight": (d,), "layer_norm.bias": (d,)}
    for k in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"layers.{k}.self_attn.{name}.weight"] = (d, d)
            if name != "k_proj":
                shapes[f"layers.{k}.self_attn.{name}.bias"] = (d,)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"layers.{k}.{name}.weight": (d,), f"layers.{k}.{name}.bias": (d,)}
        shapes |= {f"layers.{k}.fc1.weight": (ffn, d), f"layers.{k}.fc1.bias": (ffn,)}
        shapes |= {f"layers.{k}.fc2.weight": (d, ffn), f"layers.{k}.fc2.bias": (d,)}
    return {prefix + name: shape for name, shape in shapes.items()}


def llama_keys(
    prefix: str, layers: int, d: int, ffn: int, vocabulary: int, kv: int | None = None, bias: bool = False
) -> dict[str, tuple[int, ...]]:
    """The weights of a Llama, or with `bias` of a Qwen2, as published."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, d), "lm_head.weight": (vocabulary, d)}
    shapes |= {"model.norm.weight": (d,)}
    for k in range(layers):
        at = f"model.layers.{k}"
        for name in "qkvo":
            rows = d if name in "qo" else kv or d
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, d)
            if bias and name != "o":
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (rows,)
        shapes |= {f"{at}.mlp.{name}_proj.weight": (ffn, d) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (d, ffn)}
        shapes |= {f"{at}.{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
    return {prefix + name: shape for name, shape in shapes.items()}


def test_the_full_size_has_the_published_keys() -> None:
    network = empty(lambda: UltravoxNetwork(full_size()))
    checkpoint = whisper_keys("audio_tower.", 32, 1280, 5120, 128)
    maps = {"ln_pre.weight": (10240,), "linear_1.weight": (4096, 10240), "ln_mid.weight": (2048,), "linear_2.weight": (4096, 2048)}
    checkpoint |= {f"multi_modal_projector.{name}": shape for name, shape in maps.items()}
    assert sum(map(math.prod, checkpoint.values())) == 687_312_896  # 1.37 GB in bfloat16
    decoder = llama_keys("llm.", 32, 4096, 14336, 128256, 1024)
    assert sum(map(math.prod, decoder.values())) == 8_030_261_248
    ours = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert KEYS.shapes(checkpoint | decoder) == ours
    assert sum(p.numel() for p in network.parameters()) == 8_717_574_144
    # Rotary positions of Llama 3.1: the slowest turn eight times more slowly than those of Llama 3.
    slowest = network.language_model.model.rotary_emb.inv_freq[-1]
    assert float(slowest) == pytest.approx(500000.0 ** (-126 / 128) / 8, rel=1e-5)
    assert ultravox.LANGUAGE_MODEL == "llm"
