"""From states to rows where prompt and response come from separate passes, as in Harmon or BAGEL."""

from __future__ import annotations

import pytest
import torch

import unisonde
from unisonde.data.item import Item
from unisonde.models.trace import LayerStates, Reading, Span
from unisonde.runs.readout import Readout

ITEM = Item("i", "c", "a prompt")
PROMPT = (Span(0, 1, "prompt", "text", "template"), Span(1, 13, "prompt", "text"))
RESPONSE = (Span(0, 2, "response", "image", "template"), Span(2, 22, "response", "image"))


def readout(reading: Reading | None = None) -> Readout:
    return Readout([ITEM], unisonde.Protocol(), reading or Reading(), {"run": "r"})


def states(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def values(seen: Readout, quantity: str) -> list[float]:
    return [row["value"] for row in seen.rows[0] if row["quantity"] == quantity]


def test_a_held_prompt_is_the_prompt_of_every_later_pass() -> None:
    seen = readout(Reading(step="all"))
    prompt, first, last = states(13, 0), states(22, 1), states(22, 2)
    seen(LayerStates("llm", "single", 0, 0, PROMPT, prompt))
    for step, response in (("0000", first), ("final", last)):
        seen(LayerStates("llm", step, 0, 0, RESPONSE, response))
    expected = [float(unisonde.conditional_entropy(prompt[1:13], response[2:22])) for response in (first, last)]
    assert values(seen, "conditional_entropy") == pytest.approx(expected, abs=1e-12)
    assert values(seen, "entropy") == pytest.approx([float(unisonde.entropy(prompt[1:13]))], abs=1e-12)
    assert [row["step"] for row in seen.rows[0]] == ["single"] + ["0000"] * 3 + ["final"] * 3
    assert {row["n_prompt"] for row in seen.rows[0]} == {12} and seen.lengths[0] == (12, 20)


def test_a_layer_that_adds_in_place_does_not_change_what_is_held() -> None:
    """The states handed on are a view of the running stream."""
    seen = readout()
    stream = states(13, 0)
    before = stream.clone()
    seen(LayerStates("llm", "single", 0, 0, PROMPT, stream))
    stream += 5 * states(13, 9)
    seen(LayerStates("llm", "final", 0, 0, RESPONSE, states(22, 1)))
    expected = float(unisonde.conditional_entropy(before[1:13], states(22, 1)[2:22]))
    assert values(seen, "conditional_entropy") == pytest.approx([expected], abs=1e-12)


def test_all_spans_count_the_template_in() -> None:
    seen = readout(Reading(spans="all"))
    both = (*PROMPT, *(Span(s.start + 13, s.stop + 13, s.role, s.modality, s.kind) for s in RESPONSE))
    stream = states(35, 3)
    seen(LayerStates("llm", "single", 2, 0, both, stream))
    assert values(seen, "conditional_entropy") == pytest.approx(
        [float(unisonde.conditional_entropy(stream[:13], stream[13:]))], abs=1e-12
    )


def test_a_response_without_a_prompt_is_said() -> None:
    with pytest.raises(ValueError, match=r"came without a prompt.*\(layer 4 of dit, step final, item 'i'\)"):
        readout()(LayerStates("dit", "final", 4, 0, RESPONSE, states(22, 1)))
