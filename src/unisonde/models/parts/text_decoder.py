"""What models that only write text have in common: one stack of layers, a tokenizer, a chat template or none, an end."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch

from unisonde.data.item import Task
from unisonde.models.base import Generation, Model
from unisonde.models.parts.chat import end_of_turn
from unisonde.models.parts.decoder import find_stack
from unisonde.models.parts.pretrained import ends_of, pad_of, published, window_of
from unisonde.models.trace import Stack


class TextDecoder(Model):
    """A model of `transformers` that writes text with one decoder.

    Args:
        network: the `transformers` model, with its language-model head.
        tokenizer: its tokenizer, one that gives character offsets.
        chat: the tokenizer or processor that holds the chat template, if there is one.
        generation: sampling settings, where they differ from the published ones.

    Raises:
        ValueError: it cannot be told which modules are the layers.
    """

    tasks = ("text",)
    pictures: ClassVar[bool] = False
    """Whether its chat template takes pictures, and so wants the parts of a turn in a list."""

    def __init__(
        self, network: Any, tokenizer: Any, name: str, chat: Any | None, source: Path | None, generation: Generation | None
    ) -> None:
        self.network = network.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.source = source
        self.chat = chat
        self._stack = find_stack(network)
        self._defaults = generation or published(network)
        self.ends = ends_of(network, tokenizer, end_of_turn(chat, image=False if self.pictures else None) if chat else None)
        self.pad_id = pad_of(network, tokenizer, self.ends)

    @property
    def module(self) -> torch.nn.Module:
        return self.network

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return (self._stack,)

    @property
    def window(self) -> int | None:
        """The most positions of a sequence; None if the model sets no bound."""
        return window_of(self.network)

    def defaults(self, task: Task) -> Generation:
        return self._defaults
