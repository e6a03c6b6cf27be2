"""Show-o2 agrees with the official code array by array, and a small mistake anywhere does not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from unisonde.models.parts import showo2_network
from unisonde.models.parts.checkpoint import Keys, Rename
from unisonde.study.parity import showo2, verify
from unisonde.study.parity.fixture import TOLERANCE, Fixture


@pytest.fixture
def fixture(shared: Path) -> Fixture:
    return Fixture(shared / "parity", "showo2", showo2.INPUTS)


def wrong(fixture: Fixture) -> dict[str, float]:
    """The outputs that differ, and by how much."""
    showo2.check(fixture)
    return {name: d.largest for name, d in fixture.differences.items() if not d.ok}


def test_every_output_agrees(shared: Path, tmp_path: Path) -> None:
    for suffix in ("json", "safetensors", "npz"):
        (tmp_path / f"showo2.{suffix}").symlink_to(shared / "parity" / f"showo2.{suffix}")
    [verdict] = verify(tmp_path)
    assert verdict.ok and not verdict.left and not verdict.error
    # 4 inputs; of the token ids of drawing the prompts are fed, and the sequences laid out from them compared.
    assert (verdict.arrays, verdict.inputs, verdict.compared) == (74, 4, 71)
    assert verdict.largest < 2e-5 < TOLERANCE


def test_another_rotary_base_differs(fixture: Fixture) -> None:
    fixture.config["qwen2"]["rope_theta"] = 5e5
    found = wrong(fixture)
    assert {"und.prefill.h1", "t2i.step0.h1", "t2i.single.v", "lm.h1"} <= set(found)
    assert (
        "und.inputs_embeds" not in found and "t2i.step0.h0" not in found
    )  # rotary positions change nothing before the first layer


def test_another_rotary_base_of_the_flow_head_differs(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(showo2_network.FLOW_ROPE, "rope_theta", 1e4)
    found = wrong(fixture)
    assert "t2i.single.v" in found and "t2i.latent" in found
    assert "t2i.single.final" not in found


def test_one_masked_column_differs(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_one(block: torch.Tensor, there: torch.Tensor | None = None) -> torch.Tensor:
        seen = visible(block, there)
        seen[:, 3:, 2] = False
        return seen

    visible = showo2_network.visible
    monkeypatch.setattr(showo2_network, "visible", without_one)  # what draws and writes; the mask compared stays right
    found = wrong(fixture)
    assert "t2i.step0.h1" in found and "und.gen0.h1" in found and "t2i.mask" not in found


def test_a_block_that_begins_with_the_time_differs(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published block of a picture that is read lies one position further than the picture."""
    monkeypatch.setattr(showo2, "read_block", showo2.image_places)
    found = wrong(fixture)
    assert {"und.modality_positions", "und.mask", "und.prefill.h1"} <= set(found)
    assert not any(name.startswith("t2i") for name in found)


@pytest.mark.parametrize(
    ("one", "other", "seen"),
    [
        ("mlp.gate_proj", "mlp.up_proj", "und.prefill.h1"),
        ("und_trans.layers.0.self_attn.q_proj", "und_trans.layers.0.self_attn.k_proj", "und.semantic"),
        ("diffusion_head_a.0.mlp.gate_proj", "diffusion_head_a.0.mlp.up_proj", "t2i.single.v"),
        ("diffusion_head_a.0.input_layernorm", "diffusion_head_a.0.post_attention_layernorm", "t2i.single.v"),
    ],
)
def test_swapped_keys_differ(fixture: Fixture, monkeypatch: pytest.MonkeyPatch, one: str, other: str, seen: str) -> None:
    keys_of = showo2_network.keys_of

    def swapped(config: showo2_network.Showo2Config) -> Keys:
        both = tuple(Rename(rf"(.*){a.replace('.', '[.]')}(.*)", rf"\1{b}\2") for a, b in ((one, other), (other, one)))
        return dataclasses.replace(keys_of(config), renames=both)

    monkeypatch.setattr(showo2_network, "keys_of", swapped)
    assert seen in wrong(fixture)


def test_latents_as_squares_differ(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's velocities are those of latents in reading order, not of the square of latents that it was made from."""

    def squares(self: showo2_network.Showo2Network, values: torch.Tensor) -> torch.Tensor:
        p, side = self.config.patch, int(values.shape[1] ** 0.5)
        cells = values.unflatten(-1, (p, p, -1)).unflatten(1, (side, side))
        return cells.permute(0, 5, 1, 3, 2, 4).reshape(len(values), -1, side * p, side * p)

    monkeypatch.setattr(showo2_network.Showo2Network, "_laid_out", squares)
    found = wrong(fixture)
    assert "t2i.single.v" in found and "t2i.step0.final" not in found and "t2i.step1.h0" in found


def test_times_and_guidance_are_compared(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture.config["run"]["t2i"]["guidance"] = 4.9
    found = wrong(fixture)
    assert "t2i.latent" in found and "t2i.step0.final" not in found
    fixture.config["run"]["t2i"]["guidance"] = 5.0
    fixture.differences.clear()
    monkeypatch.setattr(showo2_network, "SHIFT", 2.0)
    assert {"t2i.t", "t2i.latent"} <= set(wrong(fixture))
