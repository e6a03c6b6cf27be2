"""Show-o and MAGVIT-v2 against the official code's recorded outputs, and that the comparison fails when something is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from unisonde.models import showo as family
from unisonde.models.parts import showo_network
from unisonde.models.parts.magvit2 import Magvit2
from unisonde.models.showo import Drawing
from unisonde.models.trace import hooked
from unisonde.study.parity import showo, showo_magvit
from unisonde.study.parity.fixture import TOLERANCE, Fixture

FIXTURES = {"showo": showo, "showo_magvit": showo_magvit}


def checked(shared, name: str = "showo") -> Fixture:
    fixture = Fixture(shared / "parity", name, FIXTURES[name].INPUTS)
    FIXTURES[name].check(fixture)
    return fixture


def wrong(fixture: Fixture) -> set[str]:
    return {d.name for d in fixture.differences.values() if not d.ok}


@pytest.mark.parametrize(("name", "compared"), [("showo", 70), ("showo_magvit", 2)])
def test_every_output_agrees(shared, name, compared) -> None:
    fixture = checked(shared, name)
    assert not fixture.left and not wrong(fixture)
    assert len(fixture.differences) == compared
    assert max(d.largest for d in fixture.differences.values()) < 1e-5


def test_a_wrong_rope_base_is_noticed(shared, monkeypatch) -> None:
    right = showo.config_of
    monkeypatch.setattr(showo, "config_of", lambda c: replace(right(c), llm=replace(right(c).llm, rope_theta=5000.0)))
    found = wrong(checked(shared))
    assert {"t2i.step0.h1", "mmu.prefill.h1", "lm.prefill.h1"} <= found and "t2i.step0.h0" not in found


def test_one_wrong_column_of_a_mask_is_noticed(shared, monkeypatch) -> None:
    right = showo_network.visibility

    def without_a_column(there, everywhere=None, everything=None):
        sees = right(there, everywhere, everything).clone()
        sees[:, -1, 11] = False
        return sees

    monkeypatch.setattr(family, "visibility", without_a_column)
    monkeypatch.setattr(showo, "visibility", without_a_column)
    found = wrong(checked(shared))
    assert {"t2i.mask", "t2i.step0.h1", "mmu.mask", "mmu.prefill.h1", "lm.prefill.h1"} <= found


def test_two_swapped_keys_are_noticed(shared) -> None:
    fixture = Fixture(shared / "parity", "showo", showo.INPUTS)
    one, two = (f"showo.model.layers.1.self_attn.{name}.weight" for name in ("q_proj", "k_proj"))
    fixture.weights[one], fixture.weights[two] = fixture.weights[two], fixture.weights[one]
    showo.check(fixture)
    found = wrong(fixture)
    assert "t2i.step0.h2" in found and "t2i.step0.h1" not in found


def test_upside_down_levels_are_noticed(shared, monkeypatch) -> None:
    monkeypatch.setattr(Magvit2, "encode", lambda self, x, right=Magvit2.encode: right(self, x.flip(-1)))
    assert wrong(checked(shared, "showo_magvit")) == {"code", "dec"}


@torch.inference_mode()
def test_prompts_without_their_padding_give_the_official_states(shared) -> None:
    """In use prompts are not padded to the window, and padding is on the other side."""
    fixture = Fixture(shared / "parity", "showo", showo.INPUTS)
    model = showo.model_of(fixture.config, fixture.weights)
    window, codes = model.config.prompt_window, model.codes
    official = fixture.feed("t2i.step_inputs")[2]
    rows = [[i for i in row[:window].tolist() if i != model.pad_id] for row in official]
    drawing = Drawing(model.network, *family.pad(rows, model.pad_id, "right"))
    picture = official[:2, -codes - 1 : -1]
    masked = picture == model.config.mask
    seen: dict[int, list[torch.Tensor]] = {}
    with hooked(model.network.stack, lambda layer, output: seen.setdefault(layer, []).append(output.clone())):
        drawing.read_prompts()
        drawing.states(torch.where(masked, 0, picture - model.config.first_code), masked)
    for layer in range(model.network.stack.depth + 2):
        name = "final" if layer == model.network.stack.final else f"h{layer}"
        expected = torch.from_numpy(fixture.arrays[f"t2i.step2.{name}"])
        for row, ids in enumerate(rows):
            ours = torch.cat([seen[layer][0][row, : len(ids)], seen[layer][1][row]])
            assert (ours - expected[row, window - len(ids) :]).abs().max() < TOLERANCE / 20
