"""Harmon agrees with the official code array by array, and a small mistake anywhere does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from unisonde.models.parts import harmon_network, mar, token_diffusion
from unisonde.models.parts.checkpoint import Keys, Rename
from unisonde.models.parts.harmon_network import Drawing, HarmonNetwork
from unisonde.study.parity import harmon
from unisonde.study.parity.fixture import TOLERANCE, Fixture


@pytest.fixture
def fixture(shared: Path) -> Fixture:
    return Fixture(shared / "parity", "harmon", harmon.INPUTS)


def wrong(fixture: Fixture) -> set[str]:
    """The outputs that differ."""
    harmon.check(fixture)
    return {name for name, d in fixture.differences.items() if not d.ok}


def test_every_output_agrees(fixture: Fixture) -> None:
    assert not wrong(fixture) and not fixture.left
    assert (len(fixture.arrays), len(fixture.fed), len(fixture.differences)) == (154, 65, 89)
    assert max(d.largest for d in fixture.differences.values() if not d.exact) < TOLERANCE / 2


def test_only_drawn_tokens_are_compared_by_their_rounding(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    units: dict[str, float] = {}
    compare = Fixture.compare

    def noting(self: Fixture, name: str, ours: Tensor, unit: float = 1.0) -> None:
        units[name] = max(unit, units.get(name, 0.0))
        compare(self, name, ours, unit)

    monkeypatch.setattr(Fixture, "compare", noting)
    harmon.check(fixture)
    others = {name for name, unit in units.items() if unit != 1}
    assert others == {"dl.sample", "t2i.latent", *(f"t2i.step{k}.tokens" for k in (1, 2, 3))}
    for name in others:  # neighbouring float32 numbers are further apart there than the tolerance
        rounding = torch.finfo(torch.float32).eps * float(abs(fixture.arrays[name]).max())
        assert units[name] * TOLERANCE == pytest.approx(32 * rounding) and rounding > 30 * TOLERANCE


def test_another_rotary_base_differs(fixture: Fixture) -> None:
    fixture.config["qwen2"]["rope_theta"] = 5e5
    found = wrong(fixture)
    assert {"und.prefill.h1", "und.logits", "t2i.prefill.h1", "t2i.step0.h1", "t2i.step3.dec_z", "t2i.image"} <= found
    assert not found & {"und.z_enc", "t2i.prefill.h0", "t2i.step0.h0", "dl.out"}


def test_one_wrong_column_of_a_mask_differs(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Drawing.layout

    def one_less(self: Drawing, count: int) -> tuple[Tensor, Tensor]:
        there, places = right(self, count)
        there = there.clone()
        there[:, 2] = False
        return there, places

    monkeypatch.setattr(Drawing, "layout", one_less)
    found = wrong(fixture)
    assert {"t2i.step0.full_mask", "t2i.step0.h1", "t2i.step1.dec_z"} <= found
    assert not found & {"t2i.prefill.final", "t2i.step0.h0", "t2i.step0.position_ids", "und.logits"}


def test_positions_that_count_padding_differ(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Drawing.layout

    def counted(self: Drawing, count: int) -> tuple[Tensor, Tensor]:
        there, places = right(self, count)
        return there, (torch.arange(there.shape[1])[-count:]).expand_as(places)

    monkeypatch.setattr(Drawing, "layout", counted)
    found = wrong(fixture)
    assert {"t2i.step0.position_ids", "t2i.step0.h1"} <= found and "t2i.step0.full_mask" not in found


def test_buffers_that_stay_in_front_differ(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_front(self: HarmonNetwork, tokens: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        seen = self.mar.encode(tokens, visible)
        return seen, self.proj_in(seen)

    monkeypatch.setattr(HarmonNetwork, "see", in_front)
    found = wrong(fixture)
    assert {"und.z_enc", "und6.z_enc", "t2i.step1.z_enc", "t2i.step1.h0", "t2i.step1.dec_z"} <= found
    assert "und6.x_enc" not in found


def test_two_swapped_keys_differ(fixture: Fixture) -> None:
    swapped = Keys(
        (
            Rename(r"mar\.encoder_blocks\.1\.norm1\.(\w+)", r"mar.encoder_blocks.1.norm2.\1"),
            Rename(r"mar\.encoder_blocks\.1\.norm2\.(\w+)", r"mar.encoder_blocks.1.norm1.\1"),
        ),
        harmon.KEYS.ignored,
        harmon.KEYS.absent,
    )
    network = harmon.network_of(fixture.config, fixture.weights, swapped)
    with torch.inference_mode():
        harmon.check_question(fixture, network)
    assert {"und.z_enc", "und6.x_enc", "und.logits"} <= {name for name, d in fixture.differences.items() if not d.ok}


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ("guidance", "dl.sample"),
        ("temperature", "dl.sample"),
        ("betas", "dl.betas"),
        ("stretching", "und6.x_enc"),
        ("visible order", "t2i.step1.h0"),
    ],
)
def test_other_mistakes_differ(fixture: Fixture, monkeypatch: pytest.MonkeyPatch, change: str, first: str) -> None:
    sample, encode = token_diffusion.TokenDiffusion.sample, mar.Mar.encode
    if change == "guidance":
        monkeypatch.setattr(token_diffusion, "guided", lambda c, u, w: c + w * (c - u))
    elif change == "temperature":
        monkeypatch.setattr(token_diffusion.TokenDiffusion, "sample", lambda self, c, n, t, g: sample(self, c, n, t - 0.02, g))
    elif change == "betas":
        linear = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).numpy()
        monkeypatch.setattr(token_diffusion, "cosine_betas", lambda: linear)
    elif change == "stretching":
        monkeypatch.setattr(mar, "stretched", lambda table, side, grid: _repeated(table, side, grid))
    else:
        monkeypatch.setattr(mar.Mar, "encode", lambda self, x, v=None: _turned(encode(self, x, v), self.sizes.buffer_size))
    assert first in wrong(fixture)


def test_other_numbers_of_tokens_a_step_do_not_fit_the_recorded_noise(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harmon_network, "masked_counts", lambda count, steps: iter([14, 12, 6, 0]))
    with pytest.raises(RuntimeError, match="must match the size"):
        wrong(fixture)


def _repeated(table: Tensor, side: int, grid: int) -> Tensor:
    """The nearest position in place of one in between."""
    nearest = torch.arange(grid) * side // grid
    return table.unflatten(1, (side, side))[:, nearest][:, :, nearest].flatten(1, 2)


def _turned(seen: Tensor, buffers: int) -> Tensor:
    """The visible tokens in the opposite order."""
    return torch.cat([seen[:, :buffers], seen[:, buffers:].flip(1)], 1)


def test_nothing_but_inputs_is_fed(fixture: Fixture) -> None:
    for name in ("t2i.step1.tokens", "t2i.step0.mask", "t2i.attention_mask", "und.generated", "t2i.latent", "dl.betas", "vae.z"):
        with pytest.raises(ValueError, match="compared and never fed"):
            fixture.feed(name)
