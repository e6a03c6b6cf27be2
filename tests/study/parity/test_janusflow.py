"""JanusFlow against the official code; and that the comparison fails when one thing is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unisonde.models.parts import flow_llama
from unisonde.models.parts.flow_llama import KEYS, Branches, JanusFlowNetwork, full_size
from unisonde.study.parity import janusflow
from unisonde.study.parity.fixture import Fixture


@pytest.fixture
def fixture(shared: Path) -> Fixture:
    return Fixture(shared / "parity", "janusflow", janusflow.INPUTS)


def wrong(fixture: Fixture) -> set[str]:
    janusflow.check(fixture)
    return {difference.name for difference in fixture.differences.values() if not difference.ok}


def test_every_output_agrees(fixture) -> None:
    assert wrong(fixture) == set()
    assert fixture.left == [] and fixture.fed == {"und.input_ids", "und.pixel_values", "t2i.tokens", "t2i.z0"}
    assert len(fixture.differences) == len(fixture.arrays) - 3  # of the inputs, the tokens are made by our own code as well
    assert max(d.largest for d in fixture.differences.values()) < 2e-5


def test_wrong_rope_base_is_noticed(fixture) -> None:
    fixture.config["language_config"]["rope_theta"] = 20000.0
    assert {"und.logits", "t2i.v0", "t2i.z_final"} <= wrong(fixture)


def test_one_masked_column_is_noticed(fixture, monkeypatch) -> None:
    attention = Branches.attention

    def one_more(self: Branches, response: int) -> torch.Tensor:
        mask = attention(self, response).clone()
        mask[-1, 1] = 1  # the unconditional row sees one padding token
        return mask

    monkeypatch.setattr(Branches, "attention", one_more)
    found = wrong(fixture)
    assert {"t2i.attention_mask", "t2i.v0"} <= found and not any(name.startswith("und.") for name in found)


def test_positions_that_skip_the_mask_are_noticed(fixture, monkeypatch) -> None:
    """Of the unconditional row all but one prompt position is masked; its picture stands where the conditional one does nevertheless."""

    def compact(self: Branches, response: int) -> torch.Tensor:
        return self.mask.sum(1, keepdim=True) + torch.arange(response)

    monkeypatch.setattr(Branches, "positions", compact)
    found = wrong(fixture)
    assert "t2i.step0.h1" in found and "t2i.attention_mask" not in found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("vision_und_enc_model.vision_tower.blocks.0.norm1.weight", "vision_und_enc_model.vision_tower.blocks.0.norm2.weight"),
        ("vision_gen_enc_model.mid_block.res_blocks.0.norm.weight", "vision_gen_enc_model.mid_block.res_blocks.1.norm.weight"),
        ("language_model.model.layers.1.mlp.gate_proj.weight", "language_model.model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_a_swapped_key_is_noticed(fixture, one, other) -> None:
    fixture.weights[one], fixture.weights[other] = fixture.weights[other], fixture.weights[one]
    assert wrong(fixture)


def test_the_guidance_weight_is_noticed(fixture) -> None:
    fixture.config["run"]["t2i"]["cfg_weight"] = 1.9
    assert "t2i.v0" in wrong(fixture)


def test_the_time_is_noticed(fixture, monkeypatch) -> None:
    monkeypatch.setattr(flow_llama, "TIME_SCALE", 999.0)
    found = wrong(fixture)
    assert "t2i.v1" in found and "t2i.v0" not in found  # the first step is at time 0


def test_the_full_size_covers_the_manifest(shared: Path) -> None:
    """Every official key and shape, less the pooling head, and none beside."""
    lines = (shared / "manifests" / "janusflow_1_3b.keys.txt").read_text().split("\n")
    manifest = {
        key: tuple(int(side) for side in shape.strip("()").split(",") if side.strip())
        for key, shape in (line.split("\t") for line in lines if line)
    }
    with torch.device("meta"):
        network = JanusFlowNetwork(full_size())
    assert len(manifest) == 587
    assert {name: tuple(t.shape) for name, t in network.state_dict().items()} == KEYS.shapes(manifest)
    assert {key.split(".")[2] for key in manifest if KEYS.ignores(key)} == {"attn_pool"}
    total = sum(torch.Size(shape).numel() for shape in manifest.values())
    assert total / 1e9 == pytest.approx(2.046, abs=0.0005)
