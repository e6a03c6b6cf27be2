"""Segments to tokens: every token goes to the segment that its last character lies in."""

from __future__ import annotations

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from unisonde.models.parts.segments import Segment, content, encode, spans_of, template
from unisonde.models.trace import Span

BYTES = tiny.byte_tokenizer(["<image>", "<end>"])


def merging() -> PreTrainedTokenizerFast:
    """Letters, and the merges ` a`, `ab`, `: `: tokens that reach over segments."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: k for k, letter in enumerate(letters)} | {"Ġa": 256, "ab": 257, ":Ġ": 258}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[("Ġ", "a"), ("a", "b"), (":", "Ġ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def texts(tokenizer: PreTrainedTokenizerFast, ids: list[int], spans: tuple[Span, ...]) -> list[tuple[str, str, str]]:
    return [(s.modality, s.kind, tokenizer.decode(ids[s.start : s.stop])) for s in spans]


def test_the_whole_text_is_tokenised_at_once() -> None:
    segments = [template("User:"), content(" abb"), template("\n<end>")]
    tokenizer = merging()
    ids, _ = encode(tokenizer, segments)
    assert ids == tokenizer("User: abb\n<end>")["input_ids"]


def test_a_token_over_two_segments_belongs_to_the_one_of_its_last_character() -> None:
    tokenizer = merging()
    # ` a` is one token: its space is the template's, its last character the content's.
    ids, spans = encode(tokenizer, [template("x "), content("ac"), template("y")])
    assert texts(tokenizer, ids, spans) == [("text", "template", "x"), ("text", "content", " ac"), ("text", "template", "y")]
    # `ab` is one token whose last character is the template's.
    ids, spans = encode(tokenizer, [content("ca"), template("b")])
    assert texts(tokenizer, ids, spans) == [("text", "content", "c"), ("text", "template", "ab")]


def test_modalities_and_special_tokens() -> None:
    ids, spans = encode(
        BYTES, [template("see "), content("<image>" * 4, "image"), template("\n"), content("what?"), template("<end>")]
    )
    assert [(s.modality, s.kind, len(s)) for s in spans] == [
        ("text", "template", 4),
        ("image", "content", 4),
        ("text", "template", 1),
        ("text", "content", 5),
        ("text", "template", 1),
    ]
    assert all(s.role == "prompt" for s in spans) and spans[-1].stop == len(ids)


def test_tokens_that_the_tokenizer_adds_are_template() -> None:
    tokenizer = tiny.byte_tokenizer(bos=True)
    assert encode(tokenizer, [content("ab")]) == (
        [256, *tokenizer("ab")["input_ids"][1:]],
        (Span(0, 1, "prompt", "text", "template"), Span(1, 3, "prompt", "text", "content")),
    )
    assert encode(tokenizer, [content("ab")], special=False)[1] == (Span(0, 2, "prompt", "text", "content"),)


@pytest.mark.parametrize("segments", [[template(""), content("ab"), template("")], [content(""), content("ab")], [content("ab")]])
def test_empty_segments_hold_nothing(segments: list[Segment]) -> None:
    assert encode(BYTES, segments)[1] == (Span(0, 2, "prompt", "text", "content"),)
    assert encode(BYTES, [content("")]) == ([], ())


@given(st.lists(st.tuples(st.text(max_size=6), st.sampled_from(["content", "template"])), min_size=1, max_size=6))
def test_spans_cover_every_position_once(parts: list[tuple[str, str]]) -> None:
    segments = [Segment(text, "text", kind) for text, kind in parts]  # type: ignore[arg-type]
    ids, spans = encode(BYTES, segments)
    assert [s.start for s in spans] == [0, *[s.stop for s in spans[:-1]]][: len(spans)]
    assert (spans[-1].stop if spans else 0) == len(ids)
    # Of bytes, each token lies inside one character, so the counts are those of the texts.
    content_bytes = sum(len(s.text.encode()) for s in segments if s.kind == "content")
    assert sum(len(s) for s in spans if s.kind == "content") == content_bytes


def test_runs_become_spans() -> None:
    positions = [("text", "template"), ("image", "content"), ("image", "content"), ("text", "content")]
    assert spans_of(positions, "response", 5) == (  # type: ignore[arg-type]
        Span(5, 6, "response", "text", "template"),
        Span(6, 8, "response", "image", "content"),
        Span(8, 9, "response", "text", "content"),
    )
    assert spans_of([]) == ()
