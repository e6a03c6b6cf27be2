"""The networks of OmniGen2: positions, times, guidance, and the published sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from unisonde.models.omnigen2 import Drawing
from unisonde.models.parts import omnigen2_mllm as mllm
from unisonde.models.parts.checkpoint import empty
from unisonde.models.parts.omnigen2_network import (
    KEYS,
    OmniGen2Config,
    OmniGen2Transformer,
    flow_times,
    guides,
    places,
    rotary,
    rotated,
    there,
)
from unisonde.train.omnigen2 import twin


def test_positions() -> None:
    assert places(2, [(1, 2), (2, 1)]).tolist() == [[0] * 3, [1] * 3, [2, 0, 0], [2, 0, 1], [4, 0, 0], [4, 1, 0]]
    assert there([1, 3]).int().tolist() == [[1, 0, 0], [1, 1, 1]] and there([1], 2).int().tolist() == [[1, 0]]


def test_rotations_depend_on_differences_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 12, generator=generator)

    def product(one: list[int], other: list[int]) -> float:
        angles = [rotary(torch.tensor([[at]]), (4, 4, 4)) for at in (one, other)]
        return float((rotated(query, angles[0]) * rotated(key, angles[1])).sum())

    assert product([3, 5, 7], [1, 5, 2]) == pytest.approx(product([12, 0, 5], [10, 0, 0]), abs=1e-5)
    # Each axis counts, and turns pairs of its own.
    for axis in range(3):
        moved = [0, 0, 0]
        moved[axis] = 1
        assert abs(product([0, 0, 0], moved) - product([0, 0, 0], [0, 0, 0])) > 1e-3
    assert product([0, 0, 0], [0, 0, 0]) == pytest.approx(float((query * key).sum()), abs=1e-5)
    # The first pair is the dimensions 0 and 1, turned by the position itself.
    turned = rotated(torch.eye(12)[None, :1, None], rotary(torch.tensor([[[2, 0, 0]]]), (4, 4, 4)))
    assert turned[0, 0, 0, :2].tolist() == pytest.approx([np.cos(2), np.sin(2)], abs=1e-6)


def test_times_are_moved_with_the_size() -> None:
    """Published: even at 320 x 320 pixels, moved 3.2-fold towards noise at 1024 x 1024."""
    assert torch.allclose(flow_times(50, 40 * 40), torch.linspace(0, 1, 51))
    large = flow_times(50, 128 * 128)
    assert large[0] == 0 and large[-1] == 1 and (large.diff() > 0).all() and len(large) == 51
    assert float(large[25]) == pytest.approx(0.5 / (3.2 - 3.2 * 0.5 + 0.5)) and float(large[-2]) == pytest.approx(0.9387, abs=1e-4)
    assert torch.allclose(flow_times(50, 128 * 128, shift=False), torch.linspace(0, 1, 51))
    assert float(flow_times(2, 32 * 32)[1]) > 0.5  # small ones towards data


def test_guidance_has_an_interval() -> None:
    def given(guidance: float, interval: tuple[float, float]) -> list[bool]:
        return [guides(step, 4, guidance, interval) for step in range(4)]

    assert given(4.0, (0.0, 1.0)) == [True] * 4
    assert given(4.0, (0.0, 0.5)) == [True, True, True, False]  # both ends belong to it
    assert given(4.0, (0.3, 0.5)) == [False, False, True, False]
    assert given(1.0, (0.0, 1.0)) == given(0.5, (0.0, 1.0)) == [False] * 4
    for wrong in ((0.5, 0.4), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(ValueError, match="an interval within"):
            Drawing(interval=wrong)


def manifest(path: Path) -> dict[str, tuple[int, ...]]:
    pairs = (line.split("\t") for line in path.read_text().splitlines() if line)
    return {key: tuple(int(n) for n in shape.strip("()").split(",") if n.strip()) for key, shape in pairs}


PUBLISHED = {
    "_class_name": "OmniGen2Transformer2DModel",
    "_diffusers_version": "0.33.1",
    "axes_dim_rope": [40, 40, 40],
    "axes_lens": [1024, 1664, 1664],
    "ffn_dim_multiplier": None,
    "hidden_size": 2520,
    "in_channels": 16,
    "multiple_of": 256,
    "norm_eps": 1e-5,
    "num_attention_heads": 21,
    "num_kv_heads": 7,
    "num_layers": 32,
    "num_refiner_layers": 2,
    "out_channels": None,
    "patch_size": 2,
    "text_feat_dim": 2048,
    "timestep_scale": 1000.0,
}


def test_the_published_size_covers_the_manifest(shared: Path) -> None:
    config = OmniGen2Config.from_dict(PUBLISHED)
    assert config == OmniGen2Config() and config.ffn == 10240
    network = empty(lambda: OmniGen2Transformer(config))
    theirs = manifest(shared / "manifests" / "omnigen2_dit.keys.txt")
    assert KEYS.shapes(theirs) == {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert len(theirs) == 582 and not KEYS.ignored
    assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(3.967, abs=0.0006)


def test_the_published_language_model_has_its_size() -> None:
    raw = {
        "model_type": "qwen2_5_vl",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": True,
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048},
    }
    config = mllm.config_of(raw)
    network = empty(lambda: Qwen2_5_VLForConditionalGeneration(config))
    assert network.model.language_model.rotary_emb.config.rope_parameters["mrope_section"] == [16, 24, 24]
    count = sum(p.numel() for p in network.parameters()) - (not config.tie_word_embeddings) * network.lm_head.weight.numel()
    assert count / 1e9 == pytest.approx(3.7546, abs=0.0002) and config.text_config.hidden_size == OmniGen2Config().text_feat_dim
    assert set(mllm.keys_of(True).shapes({"model.norm.weight": (2048,), "visual.merger.ln_q.weight": (1280,)})) == {
        "model.language_model.norm.weight",
        "model.visual.merger.ln_q.weight",
    }


def test_published_configurations_are_understood() -> None:
    assert OmniGen2Config.from_dict(twin().to_dict()) == twin()
    with pytest.raises(ValueError, match="lacks hidden_size, num_layers; it is not OmniGen2's"):
        OmniGen2Config.from_dict({k: v for k, v in PUBLISHED.items() if k not in ("hidden_size", "num_layers")})
    with pytest.raises(ValueError, match="a width of 2512 is not 21 heads of 120 dimensions"):
        OmniGen2Config.from_dict(PUBLISHED | {"hidden_size": 2512})
    with pytest.raises(ValueError, match="which no published OmniGen2 has"):
        OmniGen2Config.from_dict(PUBLISHED | {"out_channels": 32})
