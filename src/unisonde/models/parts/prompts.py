"""What is refused before a unified model runs: a tokenizer of another model, a prompt of nothing, words that nobody taught it.

Also where the features of a picture go in a sequence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unisonde.data.item import Item, Task
from unisonde.models.trace import Span


def check_marks(tokenizer: Any, marks: Sequence[str], name: str, family: str) -> None:
    """Raises ValueError if the tokenizer of the model `name` lacks a special token of its family; the sentence names them."""
    lacking = [mark for mark in marks if tokenizer.convert_tokens_to_ids(mark) in (None, tokenizer.unk_token_id)]
    if lacking:
        raise ValueError(f"the tokenizer of {name} lacks {', '.join(lacking)}: it is not {family}'s")


def check_prompt(item: Item, task: Task, name: str) -> None:
    """Raises ValueError if an item has neither text nor picture, or a picture to draw from, or a recording."""
    if item.audio is not None:
        raise ValueError(f"item {item.id!r} has an audio prompt; {name} takes text and pictures alone")
    if task == "image" and item.image is not None:
        raise ValueError(f"item {item.id!r} has an image prompt; {name} draws from text prompts alone")
    if not item.prompt.strip() and item.image is None:
        raise ValueError(f"item {item.id!r} has an empty prompt")


def check_words(tokenizer: Any, ids: Sequence[int], item: Item, name: str) -> None:
    """Raises ValueError if words of a prompt are unknown to a tokenizer that has few; the sentence names them.

    Args:
        ids: the prompt's token ids. Where the unknown token is that of beginnings and ends, it says nothing.
    """
    unknown = tokenizer.unk_token_id
    if unknown in (None, tokenizer.bos_token_id, tokenizer.eos_token_id) or unknown not in ids:
        return
    pieces = set(re.findall(r"\w+|[^\w\s]", item.prompt))
    words = sorted(piece for piece in pieces if tokenizer.convert_tokens_to_ids(piece.lower()) == unknown)
    raise ValueError(f"{name} does not know the words {', '.join(words[:8])} of item {item.id!r}; it was trained on few")


def picture_places(spans: Sequence[Sequence[Span]], starts: Sequence[int], length: int, before: int = 0) -> Tensor:
    """Which positions of padded sequences hold a picture's features: (B, length) booleans, on the CPU.

    Spans decide, and not where the placeholder stands: a user or the model may write that token.

    Args:
        starts: where each row's sequence begins.
        before: positions before a picture that go with its features.
    """
    places = torch.zeros(len(spans), length, dtype=torch.bool)
    for row, (held, start) in enumerate(zip(spans, starts, strict=True)):
        for span in held:
            if span.modality == "image" and span.kind == "content":
                places[row, start + span.start - before : start + span.stop] = True
    return places
