"""OmniGen2 agrees with the official code array by array, and a small mistake anywhere does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unisonde.models.parts import omnigen2_network
from unisonde.models.parts.checkpoint import Keys, Rename
from unisonde.study.parity import omnigen2
from unisonde.study.parity.fixture import TOLERANCE, Fixture


@pytest.fixture
def fixture(shared: Path) -> Fixture:
    return Fixture(shared / "parity", "omnigen2", omnigen2.INPUTS)


def wrong(fixture: Fixture) -> dict[str, float]:
    """The outputs that differ, and by how much."""
    omnigen2.check(fixture)
    return {name: d.largest for name, d in fixture.differences.items() if not d.ok}


def test_every_output_agrees(fixture: Fixture) -> None:
    assert wrong(fixture) == {} and fixture.left == []
    # Of the masks of the texts the lengths are taken, and the masks made from them compared.
    assert (len(fixture.arrays), len(fixture.fed), len(fixture.differences)) == (46, 8, 40)
    assert max(d.largest for d in fixture.differences.values()) < 3e-5 < TOLERANCE


def test_another_rotary_base_differs(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(omnigen2_network, "ROPE", 5e3)
    found = wrong(fixture)
    # Each axis turns two pairs, the first of them at any base alike.
    assert {"single.h1", "single.out", "ref.out", "final"} <= set(found)


def test_axes_in_another_order_differ(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    places = omnigen2_network.places
    monkeypatch.setattr(omnigen2_network, "places", lambda text, grids: places(text, grids)[:, [0, 2, 1]])
    found = wrong(fixture)
    assert {"single.noise0", "single.h1", "ref.h0"} <= set(found)
    assert "single.ctx1" not in found  # text runs along all axes alike


def test_an_image_after_the_last_token_differs(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image takes up as many places of the first axis as its longer side has tokens, not one, and not as many as it has tokens."""

    def one_each(text: int, grids: list[tuple[int, int]]) -> torch.Tensor:
        at = places(text, grids)
        start = text
        for number, (rows, columns) in enumerate(grids):
            at[start : start + rows * columns, 0] = text + number
            start += rows * columns
        return at

    places = omnigen2_network.places
    monkeypatch.setattr(omnigen2_network, "places", one_each)
    found = wrong(fixture)
    assert "ref.h1" in found and "single.out" not in found


def test_one_masked_column_differs(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_one(lengths: list[int], longest: int | None = None) -> torch.Tensor:
        present = there(lengths, longest)
        present[1, 2] = False
        return present

    there = omnigen2_network.there
    monkeypatch.setattr(omnigen2_network, "there", without_one)  # what the network takes; the masks compared stay right
    found = wrong(fixture)
    assert {"single.ctx0", "single.h1", "step0.h1"} <= set(found) and "text_mask" not in found


@pytest.mark.parametrize(
    ("one", "other", "seen", "spared"),
    [
        ("layers.0.feed_forward.linear_1", "layers.0.feed_forward.linear_3", "single.h1", "single.h0"),
        ("layers.1.norm2", "layers.1.ffn_norm2", "single.h2", "single.h1"),
        ("layers.2.attn.norm_q", "layers.2.attn.norm_k", "single.h3", "single.h2"),
        ("noise_refiner.0.attn.to_q", "noise_refiner.0.attn.to_out.0", "single.noise0", "single.ctx1"),
        ("context_refiner.0.norm1", "context_refiner.0.ffn_norm1", "single.ctx0", "single.noise1"),
        ("ref_image_refiner.0.attn.to_k", "ref_image_refiner.0.attn.to_v", "ref.h0", "final"),
        ("x_embedder", "ref_image_patch_embedder", "single.noise0", "single.ctx1"),
    ],
)
def test_swapped_keys_differ(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch, one: str, other: str, seen: str, spared: str
) -> None:
    both = tuple(Rename(rf"{a.replace('.', '[.]')}([.].+)", rf"{b}\1") for a, b in ((one, other), (other, one)))
    monkeypatch.setattr(omnigen2_network, "KEYS", Keys(both))
    found = wrong(fixture)
    assert seen in found and spared not in found


def test_times_guidance_and_its_interval_are_compared(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture.config["run"]["guidance"] = 3.9
    found = wrong(fixture)
    assert {"final", "step3.h1"} <= set(found) and "step0.velocity_tokens" not in found
    fixture.config["run"]["guidance"] = 4.0
    fixture.differences.clear()
    with monkeypatch.context() as patch:
        patch.setattr(omnigen2_network, "guides", lambda step, steps, guidance, interval: step < steps - 1)
        assert set(wrong(fixture)) == {"final"}
    fixture.differences.clear()
    monkeypatch.setattr(omnigen2, "flow_times", lambda steps, positions: omnigen2_network.flow_times(steps, positions, shift=False))
    assert {"timesteps", "final"} <= set(wrong(fixture))


def test_an_order_of_a_squares_latents_differs(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = omnigen2_network.OmniGen2Transformer._tokens

    def channel_first(self: omnigen2_network.OmniGen2Transformer, latents: torch.Tensor) -> torch.Tensor:
        return tokens(self, latents).unflatten(-1, (-1, self.config.in_channels)).transpose(2, 3).flatten(2)

    monkeypatch.setattr(omnigen2_network.OmniGen2Transformer, "_tokens", channel_first)
    assert {"single.noise0", "single.h0", "ref.h0"} <= set(wrong(fixture))
