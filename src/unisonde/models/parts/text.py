"""Text in and out of a causal language model: padding, the text window, writing a response with `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from unisonde.models.base import Generation, Response
from unisonde.models.parts.quiet import quiet
from unisonde.models.parts.segments import spans_of
from unisonde.models.trace import Kind, Modality, Span


def pad(sequences: Sequence[list[int]], value: int, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Token lists as one (B, L) tensor, and its mask: 1 where a token stands."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), value)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), longest) if side == "left" else slice(0, len(sequence))
        ids[row, place] = torch.tensor(sequence, dtype=torch.long)
        mask[row, place] = 1
    return ids, mask


def cut_to_window(
    ids: list[int], spans: tuple[Span, ...], window: int, truncate: bool, model: str, item: str
) -> tuple[list[int], tuple[Span, ...], tuple[str, ...]]:
    """The prompt unchanged if it fits, else with the end of its last text content cut away and the flag `cut`.

    Raises:
        ValueError: it does not fit and `truncate` is off, or what would be left holds no text.
    """
    excess = len(ids) - window
    if excess <= 0:
        return ids, spans, ()
    if not truncate:
        raise ValueError(
            f"the prompt of item {item!r} takes {len(ids)} positions with its template, {model} has room for {window}; "
            "shorten it, ask for a shorter response, or cut it with --truncate"
        )
    text = [k for k, span in enumerate(spans) if span.modality == "text" and span.kind == "content"]
    if not text or len(spans[text[-1]]) <= excess:
        raise ValueError(f"the template of item {item!r} alone leaves no room for its text in the {window} positions of {model}")
    last = spans[text[-1]]
    kept = [(s.modality, s.kind) for s in spans for p in range(s.start, s.stop) if not (s is last and p >= s.stop - excess)]
    return ids[: last.stop - excess] + ids[last.stop :], spans_of(kept), ("cut",)


@dataclass(frozen=True)
class Written:
    """A text response: its token ids, how many of them are content (the rest ends it), and its text."""

    ids: list[int]
    content: int
    text: str
    full: bool

    def spans(self, start: int) -> tuple[Span, ...]:
        """Its response spans, in a sequence where the prompt has `start` positions."""
        content: list[tuple[Modality, Kind]] = [("text", "content")] * self.content
        ends: list[tuple[Modality, Kind]] = [("text", "template")] * (len(self.ids) - self.content)
        return spans_of(content + ends, "response", start)

    def response(self, flags: tuple[str, ...] = ()) -> Response:
        return Response(self.content, text=self.text, flags=flags + (("full",) if self.full else ()))


LOOK_BACK = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""Published settings that weigh a token by what came before it, and the values that switch them off."""


@torch.inference_mode()
def write_text(
    network: Any,
    tokenizer: Any,
    ids: Tensor,
    mask: Tensor,
    generation: Generation,
    seeds: Sequence[int],
    eos: int | Sequence[int],
    pad_id: int,
    embeddings: Tensor | None = None,
    **inputs: Any,
) -> list[Written]:
    """Text responses by `network.generate`: ids and mask (B, L), padded on the left -> B responses.

    Greedy at temperature 0. Otherwise each row is sampled by itself from its own seed, without its padding, so that batches change
    nothing; so is one whose published settings look back at the prompt, for they would take padding for words.

    Args:
        embeddings: (B, L, D), in place of the embeddings of `ids`.
        inputs: other inputs of the model (pixel values), for batches of one.
    """
    ends = {eos} if isinstance(eos, int) else set(eos)
    common: dict[str, Any] = {
        "max_new_tokens": generation.tokens,
        "pad_token_id": pad_id,
        "eos_token_id": sorted(ends) or None,
        "use_cache": True,
        "num_beams": 1,
        "return_dict_in_generate": False,
    }
    if generation.temperature == 0:
        # None switches off what a published generation_config.json may set for sampling.
        common |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    else:
        common |= {"do_sample": True, "temperature": generation.temperature}
    given = {"attention_mask": mask} | ({"input_ids": ids} if embeddings is None else {"inputs_embeds": embeddings})
    published = network.generation_config
    looks_back = any(getattr(published, name, None) not in (None, off) for name, off in LOOK_BACK.items())
    if len(ids) == 1 or (generation.temperature == 0 and not looks_back):
        batches = [given]
    else:
        starts = (mask == 0).sum(1).tolist()
        batches = [{name: value[row : row + 1, start:] for name, value in given.items()} for row, start in enumerate(starts)]
    rows: list[list[int]] = []
    for first, batch in enumerate(batches):
        with quiet(), torch.random.fork_rng(devices=[ids.device] if ids.device.type == "cuda" else []):
            torch.manual_seed(seeds[first])
            out = network.generate(**batch, **inputs, **common)
        skip = batch["input_ids"].shape[1] if embeddings is None else 0
        rows += [row[skip:].tolist() for row in out]
    return [_written(row, ends, tokenizer, generation) for row in rows]


def _written(ids: list[int], ends: set[int], tokenizer: Any, generation: Generation) -> Written:
    stop = next((k for k, token in enumerate(ids) if token in ends), len(ids))
    text = tokenizer.decode(ids[:stop], skip_special_tokens=True).strip()
    return Written(ids[: stop + 1], stop, text, full=stop == len(ids) and stop == generation.tokens)
