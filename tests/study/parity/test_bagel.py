"""BAGEL agrees with the official code array by array, and a small mistake anywhere does not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from unisonde.models import bagel as family
from unisonde.models.parts import bagel_flow, bagel_network
from unisonde.study.parity import bagel
from unisonde.study.parity.fixture import TOLERANCE, Fixture


@pytest.fixture
def fixture(shared: Path) -> Fixture:
    return Fixture(shared / "parity", "bagel", bagel.INPUTS)


def wrong(fixture: Fixture) -> set[str]:
    """The outputs that differ."""
    bagel.check(fixture)
    return {name for name, difference in fixture.differences.items() if not difference.ok}


def test_every_output_agrees(fixture) -> None:
    assert wrong(fixture) == set()
    assert fixture.left == []
    assert fixture.fed == {"und.image", "und.text_ids", "t2i.text_ids", "t2i.packed_init_noises", "vae.x"}
    assert len(fixture.differences) == len(fixture.arrays) - 5 == 94
    assert max(d.largest for d in fixture.differences.values()) < 2e-5 < TOLERANCE


def test_another_rotary_base_differs(fixture) -> None:
    fixture.config["llm"]["rope_theta"] = 5e5
    found = wrong(fixture)
    assert {"und.text.h1", "t2i.prompt.h1", "t2i.pass0.h1", "t2i.latent"} <= found
    # A picture stands at one place, so what it sees of itself has no rotation: here, all that there is.
    assert "und.img.h1" not in found and "t2i.pass1.h1" not in found


def test_one_masked_column_differs(fixture, monkeypatch) -> None:
    visible = bagel_network.visible

    def without_one(blocks: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        seen = visible(blocks, there)
        seen[..., 3:, 2] = False
        return seen

    monkeypatch.setattr(family, "visible", without_one)
    found = wrong(fixture)
    assert {"und.img.h1", "t2i.prompt.h1"} <= found and "und.img.h0" not in found


def test_a_causal_picture_differs(fixture, monkeypatch) -> None:
    visible = bagel_network.visible
    monkeypatch.setattr(family, "visible", lambda blocks, there: visible(torch.full_like(blocks, -1), there))
    found = wrong(fixture)
    assert "und.img.h1" in found and not any(name.startswith("t2i.prompt") for name in found)


def test_places_that_count_a_pictures_tokens_differ(fixture, monkeypatch) -> None:
    arrange = family.arrange

    def counted(spans, latents: int = 0) -> family.Layout:
        layout = arrange(spans, latents)
        return family.Layout(list(range(len(layout.places))), layout.blocks, layout.filled, layout.drawn)

    monkeypatch.setattr(bagel, "arrange", counted)
    found = wrong(fixture)
    assert {"und.vit.packed_position_ids", "und.text_pos", "und.start_pos", "und.img.h1"} <= found


def test_marks_of_the_expert_that_draws_differ(fixture, monkeypatch) -> None:
    """The marks around a picture that is drawn belong to the expert that understands."""
    everything = SimpleNamespace(of=lambda drawn: bagel_network.Owners.of(torch.ones_like(drawn)))
    monkeypatch.setattr(bagel_flow, "Owners", everything)
    found = wrong(fixture)
    assert "t2i.pass0.h1" in found and "t2i.pass0.final" in found
    assert "t2i.pass0.h0" not in found and "t2i.prompt.h1" not in found


@pytest.mark.parametrize(
    ("one", "other", "seen"),
    [
        ("layers.0.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight", "und.img.h1"),
        ("layers.0.mlp.gate_proj.weight", "layers.0.mlp_moe_gen.gate_proj.weight", "t2i.pass0.h1"),
        ("layers.1.self_attn.q_norm.weight", "layers.1.self_attn.q_norm_moe_gen.weight", "und.text.h2"),
        ("norm.weight", "norm_moe_gen.weight", "t2i.pass0.final"),
    ],
)
def test_swapped_keys_differ(fixture, one, other, seen) -> None:
    one, other = (f"language_model.model.{name}" for name in (one, other))
    fixture.weights[one], fixture.weights[other] = fixture.weights[other], fixture.weights[one]
    assert seen in wrong(fixture)


@pytest.mark.parametrize(("name", "value"), [("cfg_text_scale", 3.9), ("cfg_renorm_type", "channel"), ("cfg_renorm_min", 0.99)])
def test_guidance_is_compared(fixture, name, value) -> None:
    fixture.config["run"]["t2i"][name] = value
    found = wrong(fixture)
    assert {"t2i.latent", "t2i.z", "t2i.image", "t2i.pass2.h0"} <= found and "t2i.pass0.final" not in found


def test_another_interval_makes_other_passes(fixture) -> None:
    fixture.config["run"]["t2i"]["cfg_interval"] = [0.6, 1.0]
    with pytest.raises(ValueError, match="ours made 7 passes, the official code 8"):
        bagel.check(fixture)


def test_another_shift_differs(fixture, monkeypatch) -> None:
    monkeypatch.setattr(bagel_flow, "SHIFT", 2.9)
    found = wrong(fixture)
    assert "t2i.pass2.h0" in found and "t2i.pass0.h0" not in found


def test_another_table_of_places_is_noticed(fixture) -> None:
    fixture.weights["latent_pos_embed.pos_embed"] = fixture.weights["latent_pos_embed.pos_embed"].flip(1)
    with pytest.raises(ValueError, match="the official table of places is not what `sinusoids` makes"):
        bagel.check(fixture)


def test_patches_cut_otherwise_differ(fixture, monkeypatch) -> None:
    monkeypatch.setattr(bagel_network, "squares", lambda picture, side: bagel.squares(picture.transpose(-1, -2), side))
    found = wrong(fixture)
    assert "und.img.h0" in found


def test_the_autoencoder_is_compared(fixture) -> None:
    fixture.config["vae"]["shift_factor"] = 0.12
    found = wrong(fixture)
    assert "t2i.image" in found and "t2i.z" not in found
