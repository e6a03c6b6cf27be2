"""An encoder, a projector trained here, and SmolLM2-135M: what speech-smollm and the vision-smollm pair share.

Some positions of the encoder are joined end to end into one feature, and a gated projector takes it to the width of the decoder's
embeddings. Features stand in the user's turn, before the request; a line break is between them. All but the projector is frozen.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from unisonde.data.item import Item
from unisonde.models import smollm
from unisonde.models.base import Generation
from unisonde.models.bridged import Bridged, Prompted
from unisonde.models.parts.chat import chat_segments
from unisonde.models.parts.segments import encode, kinds_of, spans_of, template, with_features
from unisonde.models.trace import Span, Stack

Own = TypeVar("Own", bound="ProjectorSizes")


@dataclass(frozen=True)
class ProjectorSizes:
    """Sizes of the projector; a family adds its own.

    Attributes:
        encoder, decoder: widths of what it takes and of what it gives.
        stack: positions of the encoder that make a feature.
        hidden: width behind the gate.
    """

    encoder: int
    decoder: int
    stack: int
    hidden: int

    family: ClassVar[str]
    """What config.json calls the model."""

    def to_dict(self) -> dict[str, Any]:
        """As config.json beside the weights has it."""
        return {"model_type": self.family} | asdict(self)

    @classmethod
    def from_dict(cls: type[Own], raw: Mapping[str, Any], where: str) -> Own:
        """Of a config.json.

        Raises:
            ValueError: it is another model's.
        """
        sizes = {name: value for name, value in raw.items() if name != "model_type"}
        wanted = asdict(cls())  # type: ignore[call-arg]  # a family's sizes have defaults
        fits = set(sizes) == set(wanted) and all(type(sizes[name]) is type(value) for name, value in wanted.items())
        if raw.get("model_type") != cls.family or not fits:
            raise ValueError(
                f"config.json of {where!r} is not that of a projector of {cls.family}, with the sizes {', '.join(sorted(wanted))}"
            )
        return cls(**sizes)


class Projector(nn.Module):
    """From joined positions of the encoder to features: norm, gated map, norm. The last norm gives features the size of embeddings."""

    def __init__(self, config: ProjectorSizes) -> None:
        super().__init__()
        joined = config.encoder * config.stack
        self.norm_in = LlamaRMSNorm(joined, eps=1e-6)
        self.gate = nn.Linear(joined, config.hidden, bias=False)
        self.up = nn.Linear(joined, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.decoder, bias=False)
        self.norm_out = LlamaRMSNorm(config.decoder, eps=1e-6)

    def forward(self, joined: Tensor) -> Tensor:
        """(..., n, stack d) -> (..., n, D)."""
        x = self.norm_in(joined)
        return self.norm_out(self.down(F.silu(self.gate(x)) * self.up(x)))


class ProjectedNetwork(nn.Module):
    """Encoder, projector and decoder."""

    def __init__(self, encoder: Any, projector: Projector, language_model: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.language_model = language_model


class Projected(Bridged):
    """An encoder, a projector and SmolLM2.

    Args:
        encoder: the encoder's layers.
        tokenizer: of SmolLM2, with its chat template.
        source: folder of the projector.
        apart: folders of what is published apart.
    """

    def __init__(
        self,
        network: ProjectedNetwork,
        config: ProjectorSizes,
        tokenizer: Any,
        name: str,
        encoder: Stack,
        generation: Generation,
        source: Path | None = None,
        apart: Mapping[str, Path] | None = None,
    ) -> None:
        super().__init__(network, tokenizer, name, encoder, network.projector, source, generation, apart=apart)
        self.config = config

    def text_alone(self, item: Item, tokens: int, truncate: bool) -> Prompted:
        """An item without sound or picture: the decoder's own prompt."""
        ids, spans = encode(self.tokenizer, chat_segments(self.tokenizer, item.prompt, item.id), special=False)
        ids, spans, flags = self.fit(ids, spans, tokens, truncate, item)
        return Prompted(ids, spans, flags=flags)

    def placed(self, item: Item, count: int, tokens: int, truncate: bool) -> tuple[list[int], tuple[Span, ...], tuple[str, ...]]:
        """The prompt of an item with `count` places for features before its request; the flags of what was cut."""
        before, request, after = chat_segments(self.tokenizer, item.prompt, item.id)
        # Features stand between tokens, so what is before them and what is behind them are tokenised apart.
        head, opened = encode(self.tokenizer, [before], special=False)
        tail, asked = encode(self.tokenizer, [template("\n"), request, after] if request.text else [after], special=False)
        spans = spans_of(kinds_of(opened) + kinds_of(asked))
        ids, spans = with_features(head + tail, spans, len(head), count, self.pad_id, self.takes)
        return self.fit(ids, spans, tokens, truncate, item)

    def bridge(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.network.projector(self.joined(inputs))

    @abstractmethod
    def joined(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What enters the projector, (1, n, stack d), of the encoder's inputs."""


def before_smollm(
    encoder: nn.Module, projector: Projector, device: torch.device, dtype: torch.dtype
) -> tuple[ProjectedNetwork, Any, Path]:
    """All three as one network that learns nothing; the decoder's tokenizer, and the folder that the decoder lies in.

    Raises:
        ValueError: the package with the decoder's weights is not installed.
    """
    decoder = smollm.load(device, dtype)
    assert decoder.source is not None, "it is kept in a folder"
    network = ProjectedNetwork(encoder, projector, decoder.network).to(device=device, dtype=dtype)
    return network.requires_grad_(False), decoder.tokenizer, decoder.source
