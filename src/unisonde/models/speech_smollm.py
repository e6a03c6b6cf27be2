"""speech-smollm: Whisper tiny.en hears, a projector trained here hands on, SmolLM2-135M reads what it gives as words.

The shape is Ultravox's, small enough for a laptop: every `stack` positions of the encoder are joined into one feature, a gated
projector takes it to the width of the decoder's embeddings, and it stands in the user's turn before the request. Encoder and decoder are
the published ones, frozen; both install from PyPI. The projector alone was trained, on transcription alone (docs/decoding.md), so
whatever else of the speech reaches the decoder was put there by nobody.

What the states are. Stack `encoder`: 50 positions a second, 4 layers and the last norm; the silence behind the recording is not
shown. Stack `adapter`: layer 0 the positions that make a feature, end to end, layer 1 the features. Stack `llm`: the features'
positions are `audio`; the chat template and the line break between recording and request are template.

A recording over thirty seconds is refused, or cut there with `truncate` and flagged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import WhisperFeatureExtractor

from unisonde.data.item import Item
from unisonde.data.sound import RATE, Sound
from unisonde.models.base import Generation
from unisonde.models.bridged import Prompted
from unisonde.models.parts.checkpoint import Keys, empty, fill, tensors_of, weight_files
from unisonde.models.parts.pretrained import read_json, settled, source_of
from unisonde.models.parts.projected import Projected, ProjectedNetwork, Projector, ProjectorSizes, before_smollm
from unisonde.models.parts.whisper_encoder import encode as hear
from unisonde.models.parts.whisper_tiny import MARGIN, POSITION, find_weights, load_encoder, mel_of, positions_of
from unisonde.models.registry import packaged
from unisonde.models.trace import Stack

NAME = "speech-smollm"
SHIPPED = "twins/speech-smollm"
"""Where in the package the projector lies."""

GENERATION = Generation(tokens=32, temperature=0.0)


@dataclass(frozen=True)
class ProjectorConfig(ProjectorSizes):
    """Sizes of the projector.

    Attributes:
        margin: positions of silence behind a recording while it is encoded.
    """

    encoder: int = 384
    decoder: int = 576
    stack: int = 8
    hidden: int = 512
    margin: int = MARGIN

    family = NAME


class SpeechSmolLM(Projected):
    """Whisper tiny.en, a projector and SmolLM2.

    Args:
        tokenizer: of SmolLM2, with its chat template.
        source: folder of the projector.
        apart: folders of encoder and decoder.
    """

    family: ClassVar[str] = NAME
    takes = "audio"
    config: ProjectorConfig

    def __init__(
        self,
        network: ProjectedNetwork,
        config: ProjectorConfig,
        tokenizer: Any,
        name: str = NAME,
        source: Path | None = None,
        apart: Mapping[str, Path] | None = None,
    ) -> None:
        encoder = Stack("encoder", tuple(network.encoder.layers), network.encoder.layer_norm)
        super().__init__(network, config, tokenizer, name, encoder, GENERATION, source, apart)
        self.extractor = WhisperFeatureExtractor(feature_size=network.encoder.config.num_mel_bins)

    @property
    def longest(self) -> int:
        """The most positions of the encoder."""
        return self.network.encoder.config.max_source_positions

    def prepare(self, item: Item, tokens: int, truncate: bool = False) -> Prompted:
        self.check(item)
        sound = item.sound()
        if sound is None:
            return self.text_alone(item, tokens, truncate)
        sound = self.shortened(sound, item, truncate)
        frames = positions_of(sound)
        ids, spans, cut = self.placed(item, -(-frames // self.config.stack), tokens, truncate)
        inputs = {"mel": mel_of(self.extractor, sound, self.longest, self.config.margin), "frames": torch.tensor([frames])}
        return Prompted(ids, spans, inputs, frames, tuple(dict.fromkeys(sound.flags + cut)))

    def shortened(self, sound: Sound, item: Item, truncate: bool) -> Sound:
        """A recording that the encoder takes at once; with `truncate` its end is cut where need be, and flagged.

        Raises:
            ValueError: it is too long.
        """
        most = self.longest * POSITION
        if len(sound.samples) <= most:
            return sound
        if not truncate:
            raise ValueError(
                f"the recording of item {item.id!r} is {sound.seconds:.1f} s long, {self.name} takes {most / RATE:g} s; shorten it, or "
                "cut it with --truncate"
            )
        return Sound(sound.samples[:most], sound.rate, (*sound.flags, "cut"))

    def joined(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.join(self.hear(inputs["mel"]), int(inputs["frames"]))

    def hear(self, mel: Tensor) -> Tensor:
        """States of the encoder, (1, n, d), those of the silence too."""
        return hear(self.network.encoder, mel, torch.tensor([mel.shape[-1]]))

    def join(self, states: Tensor, frames: int) -> Tensor:
        """What makes each feature, end to end: (1, n, d) -> (1, frames / stack rounded up, stack d).

        The last feature has positions of the silence in it; where the window leaves no silence, zeros.
        """
        stack = self.config.stack
        held = states[:, : frames + -frames % stack]
        held = F.pad(held, (0, 0, 0, -held.shape[1] % stack))
        return held.unflatten(1, (-1, stack)).flatten(2)


def load(
    where: str | None = None, name: str = NAME, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> SpeechSmolLM:
    """speech-smollm with the projector of a folder.

    Args:
        where: what `unisonde train speech-smollm` wrote; None is the one that ships with the package.
        dtype: None takes float32 on a CPU, else bfloat16.

    Raises:
        ValueError: the packages with the weights of encoder or decoder are not installed, or a file is missing or damaged.
    """
    device, dtype = settled(device, dtype)
    where = str(packaged(SHIPPED)) if where is None else str(where)
    config = ProjectorConfig.from_dict(read_json(where, "config.json"), where)
    projector = empty(lambda: Projector(config))
    fill(projector, tensors_of(weight_files(where)), Keys(), device, dtype, name)
    return assemble(projector, config, name, source_of(where), device, dtype)


def assemble(
    projector: Projector,
    config: ProjectorConfig,
    name: str = NAME,
    source: Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> SpeechSmolLM:
    """A projector between the published encoder and the published decoder.

    Raises:
        ValueError: one of their packages is not installed.
    """
    device, dtype = settled(device, dtype)
    encoder = load_encoder(device, dtype)
    network, tokenizer, decoder = before_smollm(encoder, projector, device, dtype)
    apart = {"encoder": find_weights().parent, "language_model": decoder}
    return SpeechSmolLM(network, config, tokenizer, name, source, apart)
