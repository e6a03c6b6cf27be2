"""From a template's text to token ids and spans.

A family writes its template as segments, each with the modality and kind of what it holds; the whole text is tokenised at once, as
the model was trained, and each token goes to the segment that its characters lie in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from unisonde.models.trace import Kind, Modality, Role, Span


@dataclass(frozen=True)
class Segment:
    text: str
    modality: Modality = "text"
    kind: Kind = "template"


def template(text: str) -> Segment:
    return Segment(text)


def content(text: str, modality: Modality = "text") -> Segment:
    return Segment(text, modality, "content")


def encode(tokenizer: Any, segments: Sequence[Segment], *, special: bool = True) -> tuple[list[int], tuple[Span, ...]]:
    """Token ids of the joined text and their prompt spans.

    A token that reaches over two segments (a space that the vocabulary joins to the next word) belongs to the one that holds its
    last character. Tokens that the tokenizer adds (BOS) are template.

    Args:
        special: whether the tokenizer adds its own special tokens.
    """
    encoded = tokenizer("".join(s.text for s in segments), return_offsets_mapping=True, add_special_tokens=special)
    ends: list[int] = []
    for segment in segments:
        ends.append((ends[-1] if ends else 0) + len(segment.text))
    owners: list[Segment] = []
    current = 0
    outside = Segment("")
    for start, stop in encoded["offset_mapping"]:
        if stop <= start:
            owners.append(outside)
            continue
        while current < len(ends) - 1 and stop > ends[current]:
            current += 1
        owners.append(segments[current])
    return list(encoded["input_ids"]), spans_of([(s.modality, s.kind) for s in owners])


def spans_of(positions: Sequence[tuple[Modality, Kind]], role: Role = "prompt", start: int = 0) -> tuple[Span, ...]:
    """Runs of positions of one modality and kind, as spans that begin at `start`."""
    spans = []
    for (modality, kind), run in groupby(positions):
        stop = start + len(list(run))
        spans.append(Span(start, stop, role, modality, kind))
        start = stop
    return tuple(spans)


def with_features(
    ids: Sequence[int], spans: Sequence[Span], at: int, count: int, placeholder: int, modality: Modality, replaced: int = 0
) -> tuple[list[int], tuple[Span, ...]]:
    """A prompt with `count` places for features put in at position `at`, where `replaced` tokens go."""
    kinds = kinds_of(spans)
    places: list[tuple[Modality, Kind]] = [(modality, "content")] * count
    tokens = [*ids[:at], *[placeholder] * count, *ids[at + replaced :]]
    return tokens, spans_of(kinds[:at] + places + kinds[at + replaced :])


def kinds_of(spans: Sequence[Span]) -> list[tuple[Modality, Kind]]:
    """Modality and kind of each position."""
    return [(span.modality, span.kind) for span in spans for _ in range(len(span))]
