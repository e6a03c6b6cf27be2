"""What every model can do, whatever its family: respond to items, in text or in images, and show its states meanwhile."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from unisonde.data.item import TASKS, Item, Task
from unisonde.models.trace import Stack, Trace


@dataclass(frozen=True)
class Generation:
    """How a response is sampled. None: the setting does not apply to this model and task.

    Attributes:
        tokens: the most tokens of a text response; the number of codes of an image response that is drawn code by code.
        temperature: 0 is greedy.
        guidance: weight of classifier-free guidance; 1 is none.
        steps: sampling steps of flow, diffusion and masked models.
    """

    tokens: int | None = None
    temperature: float | None = None
    guidance: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Generation.{name} must be at least 1, got {value}")
        for name in ("temperature", "guidance"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"Generation.{name} must be 0 or more, got {value}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def digest(self) -> str:
        """A short hash that is stored with every number."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Response:
    """What a model answered to one item: a text or an image, and the number of content positions it took.

    `flags` says what a reader of the numbers must know: `cut` (the prompt was cut to the model's text window), `full` (the text
    ended because its token limit was reached).
    """

    tokens: int
    text: str | None = None
    image: Image.Image | None = None
    flags: tuple[str, ...] = ()


class Model(ABC):
    """A loaded model.

    Attributes:
        name: as it was asked for; measurements carry it.
        family: the registry's name of the code that runs it.
        tasks: the tasks that it can do.
        source: the folder or files of its weights, for its identity; None if they were never on disk.
    """

    family: ClassVar[str]
    name: str
    tasks: tuple[Task, ...]
    source: Path | None

    @property
    @abstractmethod
    def stacks(self) -> tuple[Stack, ...]:
        """The transformers whose states `respond` shows."""

    @property
    @abstractmethod
    def module(self) -> torch.nn.Module:
        """The network itself."""

    @property
    def networks(self) -> tuple[torch.nn.Module, ...]:
        """All networks that it runs: `module`, and what is published apart from it (an autoencoder, a vision tower)."""
        return (self.module,)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @abstractmethod
    def defaults(self, task: Task) -> Generation:
        """The sampling settings as published with the model."""

    @abstractmethod
    def respond(
        self,
        items: Sequence[Item],
        task: Task,
        generation: Generation,
        seed: int = 0,
        trace: Trace | None = None,
        truncate: bool = False,
    ) -> list[Response]:
        """Answer each item; with a `trace`, show the states of prompt and response.

        The answer to an item depends on the item, the settings and the seed, not on the items that share its batch.

        Raises:
            ValueError: an item that this model cannot take; the sentence names it.
        """

    def settings(self, task: Task, **overrides: Any) -> Generation:
        """The published sampling settings, some of them replaced; None leaves a setting as published.

        Raises:
            ValueError: the model cannot do the task, or has no such setting.
        """
        self.check_task(task)
        published = self.defaults(task)
        for name, value in overrides.items():
            if value is not None and getattr(published, name) is None:
                raise ValueError(f"{self.name} has no setting {name!r} for the task {task!r}")
        return dataclasses.replace(published, **{name: value for name, value in overrides.items() if value is not None})

    def check_task(self, task: str) -> None:
        """Raises ValueError if the model cannot do the task."""
        if task not in TASKS:
            raise ValueError(f"the task is one of {', '.join(TASKS)}; got {task!r}")
        if task not in self.tasks:
            raise ValueError(f"{self.name} cannot do the task {task!r}, only {', '.join(self.tasks)}")

    def generate(
        self,
        prompt: str,
        task: Task = "text",
        *,
        image: Image.Image | Path | str | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> str | Image.Image:
        """Answer one prompt: a string for the task `text`, a picture for the task `image`.

        Args:
            image: an image prompt, for the task `text`.
            settings: of `Generation`: tokens, temperature, guidance, steps.
        """
        item = Item("prompt", "", prompt, Path(image) if isinstance(image, str) else image)
        [response] = self.respond([item], task, self.settings(task, **settings), seed)
        return response.image if response.image is not None else str(response.text)

    def identity(self) -> dict[str, Any]:
        """What makes this model this model, for `run.json`: name, family, parameters, number format, weights, vocabulary."""
        return {
            "name": self.name,
            "family": self.family,
            "parameters": sum(p.numel() for network in self.networks for p in network.parameters()),
            "dtype": str(next(self.module.parameters()).dtype).removeprefix("torch."),
            "weights": fingerprint(self.source) if self.source else None,
            "tokenizer": vocabulary(self.tokenizer) if hasattr(self, "tokenizer") else None,
        } | ({"apart": [sample(network) for network in self.networks[1:]]} if len(self.networks) > 1 else {})


def sample(network: torch.nn.Module) -> str:
    """A short hash of a network's weights: every name and shape, and 64 numbers of each tensor, spread evenly over it.

    For what is published apart from the model: its files may be anywhere.
    """
    h = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        flat = tensor.detach().flatten()
        few = flat[torch.linspace(0, max(0, len(flat) - 1), min(64, len(flat))).long().to(flat.device)]
        h.update(f"{name} {tuple(tensor.shape)}\n".encode() + few.double().cpu().numpy().tobytes())
    return h.hexdigest()[:16]


def vocabulary(tokenizer: Any) -> str:
    """A short hash of a tokenizer's words and marks with their numbers. Some families take theirs from another publisher's files."""
    words = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps([words, sorted(map(str, tokenizer.all_special_tokens))]).encode()).hexdigest()[:16]


FINGERPRINTED = (".json", ".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".model", ".jinja", ".gguf")
"""Names of weight and configuration files end so."""


def fingerprint(folder: Path) -> str:
    """A short hash of the weight and configuration files of a folder.

    Small files are hashed whole; of a large one its size and 64 blocks spread evenly over it, so that 15 billion parameters take a
    moment and a fine-tuned copy still differs.
    """
    block = 1 << 16
    h = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in FINGERPRINTED):
        size = path.stat().st_size
        h.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            if size <= 64 * block:
                h.update(file.read())
            else:
                for k in range(64):
                    file.seek(k * (size - block) // 63)
                    h.update(file.read(block))
    return h.hexdigest()[:16]


def item_seed(seed: int, item: Item) -> int:
    """The seed of one item's draws: a function of the run's seed and the item's id, so that batches change nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{item.id}".encode()).digest()[:8], "big") >> 1
