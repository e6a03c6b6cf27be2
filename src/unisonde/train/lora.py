"""LoRA on the decoder of a bridged model (arXiv 2106.09685, by `peft`): a small change of its attention, learnt so that it writes given
responses. Encoder and adapter stay as they are, so what reaches the decoder is worked out once.

Training runs on a copy of the decoder, in bfloat16 where the processor multiplies in it; `tuned` puts what was learnt into the decoder
itself for a while, in its own number format.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unisonde.models.bridged import Bridged, Prompted
from unisonde.train.loop import Effort, Schedule, autocast_dtype, fit

INSTALL = "pip install 'unisonde[lora]'"


@dataclass(frozen=True)
class LoraRecipe:
    """What is learnt, and how.

    Attributes:
        rank, alpha, dropout: of LoRA.
        targets: the maps that are changed, by the end of their names.
        size: items a step.
        precision: `auto`, `bf16` or `fp32`, in training.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    size: int = 8
    precision: str = "auto"
    schedule: Schedule = field(default_factory=lambda: Schedule(steps=120, rate=1e-3, warmup=12))


@dataclass(frozen=True)
class Lesson:
    """A prompt, prepared ahead, and the tokens to write after it."""

    prompted: Prompted
    ids: list[int]


def learn(
    model: Bridged, lessons: Sequence[Lesson], recipe: LoraRecipe, checkpoint: Path, seed: int = 0, name: str = "LoRA"
) -> tuple[dict[str, Tensor], Effort]:
    """The weights that a decoder learns from lessons, and the time that it took; the model stays as it is.

    Lessons are taken in a random order that depends on the seed and their number, each once before any is taken again.

    Args:
        checkpoint: a file from which a killed call goes on.

    Raises:
        ValueError: there are no lessons, peft is not installed, or the decoder has no maps of the recipe's names.
    """
    if not lessons:
        raise ValueError("there is nothing to learn from; give one or more items with responses")
    kind = number_format(recipe.precision, model.device)
    held = model.language_model
    # A decoder in this format already is trained in its place: a second one may not fit.
    decoder = held if next(held.parameters()).dtype == kind else copy.deepcopy(held).to(kind)
    torch.manual_seed(seed)
    with _adapted(decoder, recipe) as wrapped:
        changed = nn.ParameterList(parameter for parameter in wrapped.parameters() if parameter.requires_grad)

        def loss(number: int) -> Tensor:
            batch = [lessons[k] for k in _drawn(len(lessons), recipe.size, number, seed)]
            with torch.random.fork_rng(devices=[]):  # dropout by the number of the batch, so that a killed call goes on alike
                torch.manual_seed(seed * 1_000_003 + number)
                return _written(model, decoder, batch)

        decoder.train()
        try:
            effort = fit(name, changed, loss, recipe.schedule, checkpoint, recipe.size)
        finally:
            decoder.eval()
        return {key: value.detach().clone() for key, value in _weights(wrapped).items()}, effort


def number_format(precision: str, device: torch.device) -> torch.dtype:
    """In which the decoder is trained: bfloat16 on a GPU, unless float32 is asked for; on a processor as in all training here."""
    if device.type == "cpu":
        return autocast_dtype(precision) or torch.float32
    return torch.float32 if precision == "fp32" else torch.bfloat16


def require() -> None:
    """Raises ValueError if peft is not installed."""
    if find_spec("peft") is None:
        raise ValueError(f"LoRA needs the package peft: {INSTALL}")


@contextmanager
def tuned(model: Bridged, weights: Mapping[str, Tensor], recipe: LoraRecipe) -> Iterator[None]:
    """While inside, the decoder of a model has these weights of `learn`; afterwards it is what it was."""
    with _adapted(model.language_model, recipe) as wrapped:
        known = dict(wrapped.named_parameters())
        with torch.no_grad():
            for key, value in weights.items():
                known[key].copy_(value)
        wrapped.eval()
        yield


def _weights(wrapped: Any) -> dict[str, nn.Parameter]:
    return {key: value for key, value in wrapped.named_parameters() if value.requires_grad}


@contextmanager
def _adapted(decoder: nn.Module, recipe: LoraRecipe) -> Iterator[Any]:
    """While inside, the decoder has fresh LoRA layers, which alone may learn."""
    require()
    from peft import LoraConfig, get_peft_model

    may_learn = {name: parameter.requires_grad for name, parameter in decoder.named_parameters()}
    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, target_modules=list(recipe.targets), bias="none"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(decoder, config)
    try:
        yield wrapped
    finally:
        wrapped.unload()
        for name, parameter in decoder.named_parameters():
            parameter.requires_grad_(may_learn[name])


def _drawn(count: int, size: int, number: int, seed: int) -> list[int]:
    """The lessons of a batch: places number * size on in an endless row of shuffled rounds."""
    drawn = []
    for place in range(number * size, (number + 1) * size):
        turn, within = divmod(place, count)
        drawn.append(random.Random(f"{seed}/{turn}").sample(range(count), count)[within])
    return drawn


def _written(model: Bridged, decoder: Any, batch: Sequence[Lesson]) -> Tensor:
    """Mean nats a token of the responses, their end counted in."""
    end = model.tokenizer.eos_token_id
    kind = decoder.get_input_embeddings().weight.dtype
    with torch.no_grad():
        rows = [model.embed(one.prompted, one.ids)[0].to(kind) for one in batch]
    # Padding is on the right, where no position that counts looks.
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    states = decoder.get_decoder()(inputs_embeds=padded, use_cache=False).last_hidden_state
    read = [state[len(row) - len(one.ids) - 1 : len(row)] for state, row, one in zip(states, rows, batch, strict=True)]
    wanted = torch.tensor([token for one in batch for token in [*one.ids, end]], device=padded.device)
    return F.cross_entropy(decoder.get_output_embeddings()(torch.cat(read)).float(), wanted)
