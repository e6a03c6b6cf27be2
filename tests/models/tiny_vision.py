"""A tiny random vision-smollm, for the tests of the model and of its training."""

from __future__ import annotations

from dataclasses import replace

import torch

from unisonde.models.parts.projected import ProjectedNetwork, Projector
from unisonde.models.vision_smollm import VisionConfig, VisionSmolLM, build_encoder

from . import tiny
from .tiny_speech import TEMPLATE

CONFIG = VisionConfig(encoder=16, decoder=32, hidden=16, layers=2, heads=2, inner=24)


def make(seed: int = 0, objective: str = "aligned") -> VisionSmolLM:
    torch.manual_seed(seed)
    config = replace(CONFIG, objective=objective)
    encoder = tiny.enliven(build_encoder(config), seed)
    network = ProjectedNetwork(encoder, Projector(config), tiny.causal("llama", seed))
    return VisionSmolLM(network, config, tiny.byte_tokenizer(template=TEMPLATE))
