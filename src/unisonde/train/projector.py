"""Training of a projector between a frozen encoder and frozen SmolLM2: what speech-smollm and the vision-smollm pair share.

The encoder's states of every item are worked out once, beforehand. A stage trains the projector by one loss of its features; the
last stage is `write`, the cross-entropy of what the decoder should write after them. A folder of training goes on where a killed
call left it, and the folder of weights appears whole or not at all.
"""

from __future__ import annotations

import copy
import json
import platform
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache

from unisonde.models.bridged import Bridged, Prompted
from unisonde.models.parts.projected import Projected, Projector
from unisonde.train.loop import Schedule, autocast_dtype, fit


@dataclass(frozen=True)
class Encoded:
    """An item as the encoder gives it, and what there is to write.

    Attributes:
        joined: what enters the projector, (n, stack d), float16.
        ids: the tokens of the text, without an end.
        words: the same, as they stand inside a sentence.
    """

    joined: Tensor
    ids: list[int]
    words: list[int]


@torch.no_grad()
def initialise(projector: Projector, embeddings: Tensor, seed: int) -> None:
    """Weights that keep the scale of what they are given (LeCun); features of the mean size of the decoder's embeddings."""
    generator = torch.Generator().manual_seed(seed)
    for linear in (projector.gate, projector.up, projector.down):
        linear.weight.normal_(std=linear.in_features**-0.5, generator=generator)
    projector.norm_out.weight.fill_(float(embeddings.square().mean().sqrt()))


def project(projector: nn.Module, batch: Sequence[Encoded], dtype: torch.dtype | None) -> list[Tensor]:
    """Features (n, D) of each item, all by one pass."""
    joined = torch.cat([one.joined for one in batch]).float()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False):
        together = projector(joined)
    return list(together.split([len(one.joined) for one in batch]))


class Writer:
    """The frozen decoder: what it would write after the template's beginning, features and the request.

    The beginning is the same for all, so its keys and values are worked out once.
    """

    def __init__(self, model: Bridged, prompted: Prompted, dtype: torch.dtype | None) -> None:
        decoder = model.language_model
        self.decoder = decoder if dtype is None else copy.deepcopy(decoder).to(dtype)
        slots = prompted.slots
        head, self.tail = prompted.ids[: slots[0]], prompted.ids[slots[-1] + 1 :]
        self.end = model.tokenizer.eos_token_id
        with torch.no_grad():
            cache = self.decoder.model(input_ids=torch.tensor([head]), use_cache=True).past_key_values
        self.beginning = [(layer.keys, layer.values) for layer in cache.layers]

    def words(self, ids: Sequence[int]) -> Tensor:
        return self.decoder.get_input_embeddings()(torch.tensor(list(ids)))

    def loss(self, features: Sequence[Tensor], batch: Sequence[Encoded]) -> Tensor:
        """Mean nats a token of the texts, their end counted in: features (n, D) each."""
        rows = []
        for given, one in zip(features, batch, strict=True):
            words = self.words([*self.tail, *one.ids])
            rows.append(torch.cat([given.to(words.dtype), words]))
        # Padding is on the right, where no position that counts looks.
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.beginning):
            cache.update(keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1), layer)
        states = self.decoder.model(inputs_embeds=padded, past_key_values=cache, use_cache=True).last_hidden_state
        read = [state[len(row) - len(one.ids) - 1 : len(row)] for state, row, one in zip(states, rows, batch, strict=True)]
        wanted = torch.tensor([token for one in batch for token in [*one.ids, self.end]])
        return F.cross_entropy(self.decoder.lm_head(torch.cat(read)).float(), wanted)


@dataclass(frozen=True)
class Stage:
    """A stretch of training by one loss of features, (n, D) each, and the items that they are of."""

    name: str
    schedule: Schedule
    loss: Callable[[Sequence[Tensor], Sequence[Encoded]], Tensor]


def fit_stages(
    model: Projected,
    stages: Sequence[Stage],
    draw: Callable[[random.Random], list[Encoded]],
    seed: int,
    precision: str,
    size: int,
    batches: int,
    work: Path,
) -> dict[str, dict[str, float]]:
    """Train the projector of a model, stage after stage, in place; the time that each took.

    Args:
        draw: a batch.
        size, batches: items in a batch, batches in a step.
        work: the folder of the checkpoints.
    """
    projector, dtype = model.network.projector, autocast_dtype(precision)
    efforts = {}
    for stage in stages:

        def loss(number: int, stage: Stage = stage) -> Tensor:
            batch = draw(random.Random(f"{seed}/{stage.name}/{number}"))
            return stage.loss(project(projector, batch, dtype), batch)

        projector.requires_grad_(True).train()
        effort = fit(stage.name, projector, loss, stage.schedule, work / f"{stage.name}.pt", size * batches, batches)
        efforts[stage.name] = asdict(effort)
    projector.requires_grad_(False).eval()
    return efforts


# ------------------------------------------------------------------------------------------------------------------- folders


@contextmanager
def workshop(out: Path, recipe: Any) -> Iterator[Path]:
    """The folder of a training by this recipe, which is removed when all is done.

    Raises:
        ValueError: `out` holds files, or the beginnings of another recipe.
    """
    written = json.dumps(asdict(recipe), indent=1)
    work = out.with_name(out.name + ".training")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} already holds files; name another folder with --out, or remove it")
    begun = work / "recipe.json"
    if begun.exists() and begun.read_text() != written:
        raise ValueError(f"{work} was begun with another recipe; go on with that one, or remove the folder")
    work.mkdir(parents=True, exist_ok=True)
    begun.write_text(written)
    yield work
    shutil.rmtree(work)


def record_of(recipe: Any, effort: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """How something was made, for training.json."""
    return {
        "recipe": asdict(recipe),
        **more,
        "effort": dict(effort),
        "precision": str(autocast_dtype(recipe.precision) or torch.float32).removeprefix("torch."),
        "torch": torch.__version__,
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "finished": time.strftime("%Y-%m-%d"),
    }


def export(weights: nn.Module, config: Mapping[str, Any], out: Path, record: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Write a folder that `unisonde.load` opens: weights in float16, sizes, the record of the training, its figures."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    held = {name: tensor.half().contiguous() for name, tensor in weights.state_dict().items()}
    save_file(held, partial / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config", config), ("training", record), ("scores", figures)):
        (partial / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    if out.exists():
        out.rmdir()  # empty, or the training would have been refused
    partial.rename(out)
