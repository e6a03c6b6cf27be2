"""Any causal language model of `transformers`: text in, text out.

Prompt states: the positions of the user's text; what the chat template puts around it is template, and so is BOS. Response states:
the positions at which a response token is the input (DESIGN.md, decision 3); the tokens that end a response are
template. Stack `llm`: the decoder's layers and last norm; one teacher-forced pass, step `single`. Padding is on the left while a
response is written and on the right while it is read; both are masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from unisonde.data.item import Item, Task
from unisonde.models.base import Generation, Response, item_seed
from unisonde.models.parts.chat import chat_segments
from unisonde.models.parts.pretrained import load_network, load_tokenizer, source_of
from unisonde.models.parts.segments import content, encode
from unisonde.models.parts.text import cut_to_window, pad, write_text
from unisonde.models.parts.text_decoder import TextDecoder
from unisonde.models.trace import Row, Span, Trace


@dataclass(frozen=True)
class Encoded:
    """A prompt as the model takes it: token ids, what they hold, and whether it was cut."""

    ids: list[int]
    spans: tuple[Span, ...]
    flags: tuple[str, ...] = ()


class CausalLM(TextDecoder):
    """A causal language model.

    Args:
        network: the `transformers` model, with its language-model head.
        tokenizer: its tokenizer, one that gives character offsets; its chat template is used if it has one.
        generation: sampling settings, where they differ from the published ones.

    Raises:
        ValueError: it cannot be told which modules are the layers.
    """

    family = "causal-lm"

    def __init__(
        self, network: Any, tokenizer: Any, name: str, source: Path | None = None, generation: Generation | None = None
    ) -> None:
        super().__init__(network, tokenizer, name, tokenizer if tokenizer.chat_template else None, source, generation)

    def encode(self, item: Item, room: int, truncate: bool = False) -> Encoded:
        """The prompt of an item.

        Args:
            room: positions to leave for the response.

        Raises:
            ValueError: there is a picture, no text, or more than the window holds.
        """
        if item.image is not None:
            raise ValueError(f"item {item.id!r} has an image prompt; {self.name} reads text alone")
        if not item.prompt.strip():
            raise ValueError(f"item {item.id!r} has an empty prompt")
        segments = chat_segments(self.chat, item.prompt, item.id) if self.chat else [content(item.prompt)]
        # A chat template writes BOS itself.
        ids, spans = encode(self.tokenizer, segments, special=not self.chat)
        if self.window is None:
            return Encoded(ids, spans)
        return Encoded(*cut_to_window(ids, spans, self.window - room, truncate, self.name, item.id))

    @torch.inference_mode()
    def respond(
        self,
        items: Sequence[Item],
        task: Task,
        generation: Generation,
        seed: int = 0,
        trace: Trace | None = None,
        truncate: bool = False,
    ) -> list[Response]:
        self.check_task(task)
        prompts = [self.encode(item, generation.tokens or 0, truncate) for item in items]
        ids, mask = pad([p.ids for p in prompts], self.pad_id, "left")
        ids, mask = ids.to(self.device), mask.to(self.device)
        seeds = [item_seed(seed, item) for item in items]
        written = write_text(self.network, self.tokenizer, ids, mask, generation, seeds, self.ends, self.pad_id)
        if trace is not None:
            rows = [Row(k, p.spans + w.spans(len(p.ids))) for k, (p, w) in enumerate(zip(prompts, written, strict=True))]
            with trace.record(self._stack, rows):
                self.read([p.ids + w.ids for p, w in zip(prompts, written, strict=True)])
        return [w.response(p.flags) for p, w in zip(prompts, written, strict=True)]

    def read(self, sequences: Sequence[list[int]]) -> None:
        """The teacher-forced pass over prompts and responses."""
        ids, mask = pad(sequences, self.pad_id, "right")
        self.network.base_model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False)


def load(path: str, name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> CausalLM:
    """The causal language model of a local folder or hub id.

    Raises:
        ValueError: a file is missing or the hub cannot be reached; the sentence names the file.
    """
    path = str(path)
    tokenizer = load_tokenizer(path)
    network = load_network(AutoModelForCausalLM, path, device, dtype)
    return CausalLM(network, tokenizer, name, source_of(path))
