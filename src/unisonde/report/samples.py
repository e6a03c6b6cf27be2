"""Samples of the report: a handful of prompts with what the model answered, and the items that failed.

Prompts and responses are untrusted text and untrusted bytes. Text is escaped; bytes are shown only after Pillow has read them as
a picture and written them anew, so that nothing but pixels reaches the page.
"""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any

import polars as pl
from PIL import Image

from unisonde.report.curves import Section, in_order

A_CELL = 4
"""How many items of each cell are shown."""
LONGEST = 1500
"""Characters of a text that are shown."""
SIDE = 512
"""Larger pictures are scaled down to this side, in pixels."""
TINY = 96
"""Smaller pictures are shown with hard pixels: smoothing would invent what the model did not draw."""
FAILURES = 20


def samples(section: Section) -> str:
    """A few items of each cell, from different categories as far as there are, in the order of the run; empty if there is none."""
    items = section.items.with_columns(pl.concat_str("modality", pl.lit(" → "), "task").alias("cell"))
    answered = items.filter(pl.col("error").is_null())
    cards = []
    for cell in in_order(answered["cell"].unique().to_list()):
        mine = answered.filter(pl.col("cell") == cell)
        # The first of each category, then the second of each, and so on.
        turn = mine.with_columns(pl.int_range(pl.len()).over("category").alias("turn")).sort("turn", maintain_order=True)
        cards += [_card(item) for item in turn.head(A_CELL).to_dicts()]
    return f'<div class="samples">{"".join(cards)}</div>' if cards else ""


def failures(section: Section) -> str:
    """The items that failed, with their errors; empty if there is none."""
    failed = section.items.filter(pl.col("error").is_not_null())
    if failed.is_empty():
        return ""
    lines = "".join(
        f"<li><b>{escape(str(item['item']))}</b> ({escape(item['modality'])} → {escape(item['task'])}): "
        f"<code dir='auto'>{_text(item['error'])}</code></li>"
        for item in failed.head(FAILURES).to_dicts()
    )
    more = f"<p>and {failed.height - FAILURES} more, in the run's folder.</p>" if failed.height > FAILURES else ""
    count = f"<p>{failed.height} of {section.items.height} items failed and are in no figure:</p>"
    return f"{count}<ul class='failures'>{lines}</ul>{more}"


def picture(data: bytes | None, what: str) -> str:
    """An `<img>` with the picture inside; a sentence if the bytes are no picture; empty for None.

    Args:
        data: an image file of any format that Pillow reads.
        what: the alternative text.
    """
    if data is None:
        return ""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            width, height = opened.size
            opened.thumbnail((SIDE, SIDE))
            buffer = io.BytesIO()
            opened.convert("RGBA" if "A" in opened.getbands() else "RGB").save(buffer, "PNG", optimize=True)
    except Exception as error:  # decoders answer damaged bytes with almost any type of error
        return f'<p class="note">a picture of {len(data)} bytes that cannot be shown: {escape(str(error))}</p>'
    source = base64.b64encode(buffer.getvalue()).decode("ascii")
    tiny = ' class="tiny"' if max(width, height) <= TINY else ""
    return f'<img{tiny} src="data:image/png;base64,{source}" alt="{escape(what)}, {width} x {height} pixels">'


def _card(item: dict[str, Any]) -> str:
    tokens = f"{item['n_prompt'] or 0} + {item['n_response'] or 0} tokens"
    flags = f", flags: {escape(item['flags'])}" if item["flags"] else ""
    kind = f"{escape(item['cell'])} · {escape(item['category'] or 'no category')} · {escape(str(item['item']))}"
    prompt = picture(item["prompt_image"], "image prompt") + (_quote(item["prompt"]) if item["prompt"] else "")
    response = picture(item["response_image"], "image response")
    if item["response_text"] is not None:
        response += _quote(item["response_text"]) if item["response_text"].strip() else '<p class="note">an empty text</p>'
    return (
        f'<article><p class="kind">{kind}</p><div><section><h4>prompt</h4>{prompt}</section>'
        f"<section><h4>response</h4>{response or '<p class=note>not kept</p>'}</section></div>"
        f'<p class="note">{tokens}{flags}</p></article>'
    )


def _quote(text: str) -> str:
    return f'<blockquote dir="auto">{_text(text)}</blockquote>'


def _text(text: str) -> str:
    more = f" … ({len(text) - LONGEST} more characters)" if len(text) > LONGEST else ""
    return escape(text[:LONGEST]) + more
