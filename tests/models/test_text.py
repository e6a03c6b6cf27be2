"""Text in and out: padding, the window, writing."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from unisonde.models.base import Generation
from unisonde.models.parts.segments import spans_of
from unisonde.models.parts.text import Written, cut_to_window, pad, write_text
from unisonde.models.trace import Span

T, C, P = ("text", "template"), ("text", "content"), ("image", "content")


def test_padding() -> None:
    ids, mask = pad([[1, 2, 3], [4]], 9, "left")
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, mask = pad([[1, 2, 3], [4]], 9, "right")
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def cut(kinds: list, window: int, truncate: bool = True) -> tuple:
    return cut_to_window(list(range(len(kinds))), spans_of(kinds), window, truncate, "mine", "i")


def test_what_fits_is_left_alone() -> None:
    kinds = [T, C, C, T]
    assert cut(kinds, 4, truncate=False) == ([0, 1, 2, 3], spans_of(kinds), ())


def test_the_end_of_the_last_text_is_cut_and_the_template_stays() -> None:
    ids, spans, flags = cut([T, P, P, T, C, C, C, C, T, T], 8)
    assert ids == [0, 1, 2, 3, 4, 5, 8, 9] and flags == ("cut",)
    assert spans == spans_of([T, P, P, T, C, C, T, T])
    ids, spans, _ = cut([C, C, T, C, C, C, T], 5)
    assert ids == [0, 1, 2, 3, 6] and spans == spans_of([C, C, T, C, T])


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"item 'i' takes 4 positions with its template, mine has room for 3.*--truncate"):
        cut([T, C, C, T], 3, truncate=False)
    for kinds, window in (([T, C, C, T], 2), ([T, T, T], 2), ([P, P, T], 2), ([C, C], 0), ([C, C], -3)):
        with pytest.raises(ValueError, match="leaves no room"):
            cut(kinds, window)


def test_what_is_written_as_spans() -> None:
    assert Written([5, 6, 2], 2, "ab", full=False).spans(10) == (
        Span(10, 12, "response", "text", "content"),
        Span(12, 13, "response", "text", "template"),
    )
    assert Written([2], 0, "", full=False).spans(3) == (Span(3, 4, "response", "text", "template"),)
    assert Written([5], 1, "a", full=True).response(("cut",)).flags == ("cut", "full")


class Scripted:
    """Stands in for a network: each row answers with its script, whatever it is asked."""

    def __init__(self, scripts: dict[int, list[int]], **published: Any) -> None:
        self.scripts = scripts
        self.generation_config = type("Published", (), published)()
        self.calls: list[dict[str, Any]] = []

    def generate(self, input_ids: torch.Tensor, **given: Any) -> torch.Tensor:
        self.calls.append({"input_ids": input_ids, **given})
        return torch.cat([input_ids, torch.tensor([self.scripts[row[-1].item()] for row in input_ids])], 1)


def written(network: Any, temperature: float = 0.0, tokens: int = 4, **inputs: Any) -> list[Written]:
    ids, mask = pad([[7, 1], [2]], 0, "left")
    if inputs:
        ids, mask = ids[:1], mask[:1]
    generation = Generation(tokens=tokens, temperature=temperature)
    return write_text(network, tiny.byte_tokenizer(), ids, mask, generation, [3, 4], [257, 256], 0, **inputs)


SCRIPTS = {1: [65, 66, 257, 0], 2: [67, 68, 69, 70]}


def test_a_response_ends_at_its_first_end() -> None:
    first, second = written(Scripted(SCRIPTS))
    assert (first.ids, first.content, first.full) == ([65, 66, 257], 2, False)
    assert (second.ids, second.content, second.full) == ([67, 68, 69, 70], 4, True)


def test_greedy_rows_run_together_and_sampled_rows_alone_without_padding() -> None:
    network = Scripted(SCRIPTS)
    written(network)
    [call] = network.calls
    assert call["input_ids"].tolist() == [[7, 1], [0, 2]] and call["do_sample"] is False and call["eos_token_id"] == [256, 257]
    for network, temperature in ((Scripted(SCRIPTS), 0.7), (Scripted(SCRIPTS, repetition_penalty=1.1), 0.0)):
        written(network, temperature)
        assert [call["input_ids"].tolist() for call in network.calls] == [[[7, 1]], [[2]]]
        assert [call["attention_mask"].tolist() for call in network.calls] == [[[1, 1]], [[1]]]
        assert all(call["do_sample"] == bool(temperature) for call in network.calls)
    network = Scripted(SCRIPTS, repetition_penalty=1.0, no_repeat_ngram_size=None)
    written(network)
    assert len(network.calls) == 1


def test_other_inputs_reach_the_network_whole() -> None:
    network, pixels = Scripted(SCRIPTS), torch.zeros(12, 5)  # as of Qwen2-VL: patches first, not rows
    written(network, 0.7, pixels=pixels)
    assert network.calls[0]["pixels"] is pixels


def test_randomness_outside_is_left_alone() -> None:
    lm = tiny.causal("llama")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = written(lm, 1.5)
    assert torch.equal(torch.rand(3), expected)
    assert first == written(lm, 1.5)


def test_embeddings_in_place_of_ids() -> None:
    lm = tiny.causal("llama")
    ids, mask = pad([[7, 1, 30], [2, 99]], 0, "left")
    embeddings = lm.get_input_embeddings()(ids)
    for temperature in (0.0, 1.5):
        given = (tiny.byte_tokenizer(), ids, mask, Generation(tokens=5, temperature=temperature), [3, 4], 257, 0)
        assert write_text(lm, *given) == write_text(lm, *given, embeddings=embeddings)
