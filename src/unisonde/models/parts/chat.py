"""Chat templates as segments: which characters of a rendered conversation are the user's, and which are the template's.

A template is a program (Jinja), so its output cannot be read off: the conversation is rendered once with a mark in place of the
prompt, split at the mark, and checked against the rendering of the prompt itself.
"""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from unisonde.models.parts.segments import Segment, content, template

MARK = "\ue000\ue001\ue002"
"""Private-use characters: no prompt holds them and no template strips them."""

DAY = "01 Jan 2025"
"""Some templates (Llama 3) write today's date, if none is given, and the same item would differ from day to day."""


def chat_segments(tokenizer: Any, prompt: str, item: str, image: bool | None = None) -> list[Segment]:
    """The prompt as one turn of a user, up to where the assistant's answer begins.

    Args:
        tokenizer: a tokenizer or processor that has a chat template.
        item: its id, for errors.
        image: whether a picture comes before the text; None for models without images, whose templates take plain text.

    Raises:
        ValueError: the template refuses the conversation, or changes the prompt beyond white space at its ends.
    """
    before, after = _around(tokenizer, [_turn("user", MARK, image)], item)
    rendered = _render(tokenizer, [_turn("user", prompt, image)], item)
    for kept in (prompt, prompt.strip(), prompt.lstrip(), prompt.rstrip()):
        if rendered == before + kept + after:
            return [template(before), content(kept), template(after)]
    raise ValueError(f"the chat template rewrites the prompt of item {item!r}, so its positions cannot be told from the template's")


def end_of_turn(tokenizer: Any, image: bool | None = None) -> int | None:
    """The special token that ends the assistant's turn, None if the template ends it otherwise."""
    question = _turn("user", "?", None if image is None else False)
    try:
        _, after = _around(tokenizer, [question, _turn("assistant", MARK, None if image is None else False)], "", answered=True)
    except ValueError:
        return None
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    ids = inner(after.lstrip(), add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in _special(inner) else None


def _special(tokenizer: Any) -> set[int]:
    return set(tokenizer.all_special_ids) | {k for k, token in tokenizer.added_tokens_decoder.items() if token.special}


def _turn(role: str, text: str, image: bool | None) -> dict[str, Any]:
    if image is None:
        return {"role": role, "content": text}
    return {"role": role, "content": [{"type": "image"}] * image + [{"type": "text", "text": text}]}


def _around(tokenizer: Any, turns: list[dict[str, Any]], item: str, answered: bool = False) -> tuple[str, str]:
    parts = _render(tokenizer, turns, item, answered).split(MARK)
    if len(parts) != 2:
        raise ValueError(f"the chat template writes the prompt of item {item!r} {len(parts) - 1} times; once is what can be read")
    return parts[0], parts[1]


def _render(tokenizer: Any, turns: list[dict[str, Any]], item: str, answered: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=not answered, date_string=DAY)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template refuses item {item!r}: {error}") from error
