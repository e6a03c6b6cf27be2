"""The encoder of Whisper on recordings of any length: log-mel features in pieces, without the padding to thirty seconds.

`WhisperEncoder` of `transformers` takes thirty seconds and nothing else, and sees its padding as silence. Models that were
trained on what is spoken alone (Ultravox) run its layers on as many positions as there are, and mask what pads the last piece of
a long recording.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder


def log_mel(extractor: WhisperFeatureExtractor, samples: np.ndarray) -> Tensor:
    """The log-mel features of mono samples (n,) at 16 kHz, padded to a whole frame: (mels, frames), 100 frames a second."""
    made = extractor(
        samples,
        sampling_rate=extractor.sampling_rate,
        padding="longest",
        pad_to_multiple_of=extractor.hop_length,
        truncation=False,
        return_tensors="pt",
    )
    return made["input_features"][0]


def in_pieces(mel: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Features (mels, frames) as pieces of at most `longest` frames, (P, mels, frames of a piece), and the frames of each, (P,).

    Of several pieces the last is padded with zeros.
    """
    count = -(-mel.shape[1] // longest)
    lengths = torch.tensor([min(longest, mel.shape[1] - k * longest) for k in range(count)])
    if count > 1:
        mel = F.pad(mel, (0, count * longest - mel.shape[1]))
    return torch.stack(mel.chunk(count, 1)), lengths


def positions_of(frames: Any) -> Any:
    """How many positions of the encoder stand for so many frames of features; numbers or tensors."""
    return (frames - 1) // 2 + 1


def visible(lengths: Tensor, positions: int, dtype: torch.dtype) -> Tensor | None:
    """What is added to attention logits, (P, 1, positions, positions), so that nothing past `lengths` (P,) is seen; None for nothing."""
    if bool((lengths >= positions).all()):
        return None
    seen = torch.arange(positions, device=lengths.device) < lengths[:, None]
    added = torch.zeros(seen.shape, dtype=dtype, device=lengths.device).masked_fill(~seen, torch.finfo(dtype).min)
    return added[:, None, None].expand(-1, 1, positions, -1)


def encode(tower: WhisperEncoder, mel: Tensor, lengths: Tensor) -> Tensor:
    """States after the last norm, (P, positions, d), of features (P, mels, frames) of which `lengths` (P,) frames are content."""
    x = F.gelu(tower.conv2(F.gelu(tower.conv1(mel)))).transpose(1, 2)
    x = x + tower.embed_positions.weight[: x.shape[1]]
    mask = visible(positions_of(lengths), x.shape[1], x.dtype)
    for layer in tower.layers:
        x = layer(x, mask)
    return tower.layer_norm(x)
