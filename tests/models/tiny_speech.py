"""A tiny random speech-smollm, for the tests of the model and of its training."""

from __future__ import annotations

import torch
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from unisonde.models.parts.projected import ProjectedNetwork
from unisonde.models.speech_smollm import Projector, ProjectorConfig, SpeechSmolLM

from . import tiny

CONFIG = ProjectorConfig(encoder=24, decoder=32, stack=4, hidden=16, margin=5)
TEMPLATE = "<s>{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
POSITIONS = 60
"""Of the tiny encoder: 1.2 s."""


def make(seed: int = 0) -> SpeechSmolLM:
    torch.manual_seed(seed)
    sizes = {"d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "num_mel_bins": 8}
    encoder = tiny.enliven(WhisperEncoder(WhisperConfig(**sizes, max_source_positions=POSITIONS)), seed)
    decoder = tiny.causal("llama", seed)
    network = ProjectedNetwork(encoder, Projector(CONFIG), decoder)
    return SpeechSmolLM(network, CONFIG, tiny.byte_tokenizer(template=TEMPLATE), "tiny")
