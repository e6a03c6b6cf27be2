"""Qwen2-Audio (arXiv 2407.10759): an encoder shaped as Whisper's, one linear map, and a Qwen2 that reads what it gives as words.

A recording is padded to thirty seconds, and the encoder does not look at the padding. Pairs of its states are averaged and
normalised before the map, so that a second of sound is 25 features. All parts are those of `transformers`, under their official
names.

What the states are. Stack `encoder`: 50 positions a second, 32 layers; the average of pairs and the norm after it come next and
are what layer 0 of the stack `adapter` shows; its layer 1 is the features. Stack `llm`: the features' positions are `audio`; the
chat template, its system prompt and the marks around the recording are template.

A recording over thirty seconds is refused, or cut there with `truncate` and flagged. Responses are greedy, whatever
generation_config.json says: a response that is drawn, or kept from repeating itself, is not what the decoder scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2AudioConfig, WhisperFeatureExtractor
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder, Qwen2AudioMultiModalProjector

from unisonde.data.item import Item
from unisonde.models.bridged import Bridged, Prompted
from unisonde.models.parts.checkpoint import Keys, Rename, empty, fill, tensors_of, weight_files
from unisonde.models.parts.pretrained import load_tokenizer, part, read_json, settled, source_of
from unisonde.models.parts.prompts import check_marks
from unisonde.models.parts.segments import Segment, content, encode, template, with_features
from unisonde.models.parts.whisper_encoder import positions_of, visible
from unisonde.models.trace import Stack

BEGIN_TURN, END_TURN = "<|im_start|>", "<|im_end|>"
BEGIN_AUDIO, AUDIO, END_AUDIO = "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"
MARKS = (BEGIN_TURN, END_TURN, BEGIN_AUDIO, AUDIO, END_AUDIO)

SYSTEM = "You are a helpful assistant."
"""The system prompt of the published chat template."""

KEYS = Keys(
    renames=(
        Rename(r"model\.language_model\.(.+)", r"language_model.model.\1"),
        Rename(r"model\.(audio_tower|multi_modal_projector)\.(.+)", r"\1.\2"),
        Rename(r"lm_head\.(.+)", r"language_model.lm_head.\1"),
    )
)
"""The published names are ours; `transformers` 5 writes others."""


def full_size() -> Qwen2AudioConfig:
    """The published size: 8.40 billion parameters, of which the encoder has 0.64."""
    text = {
        "model_type": "qwen2",
        "vocab_size": 156032,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }
    return Qwen2AudioConfig(text_config=text)


class Qwen2AudioNetwork(nn.Module):
    """Encoder, map and decoder under their official names."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.audio_tower = Qwen2AudioEncoder(config.audio_config)
        self.multi_modal_projector = Qwen2AudioMultiModalProjector(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)


class Qwen2Audio(Bridged):
    """A Qwen2-Audio of any size.

    Args:
        extractor: from samples to features, padded to what the encoder takes.

    Raises:
        ValueError: the tokenizer lacks a mark.
    """

    family: ClassVar[str] = "qwen2-audio"
    takes = "audio"

    def __init__(
        self, network: Qwen2AudioNetwork, tokenizer: Any, extractor: WhisperFeatureExtractor, name: str, source: Path | None = None
    ) -> None:
        check_marks(tokenizer, MARKS, name, "Qwen2-Audio")
        super().__init__(
            network,
            tokenizer,
            name,
            Stack("encoder", tuple(network.audio_tower.layers)),
            network.multi_modal_projector,
            source,
            ends=[tokenizer.convert_tokens_to_ids(END_TURN)],
        )
        self.extractor = extractor
        self.audio_id = tokenizer.convert_tokens_to_ids(AUDIO)

    def segments(self, item: Item) -> list[Segment]:
        """The published chat template, with one mark for the recording."""
        heard: list[Segment] = []
        if item.audio is not None:
            heard = [template(f"Audio 1: {BEGIN_AUDIO}"), content(AUDIO, "audio"), template(f"{END_AUDIO}\n")]
        return [
            template(f"{BEGIN_TURN}system\n{SYSTEM}{END_TURN}\n{BEGIN_TURN}user\n"),
            *heard,
            content(item.prompt),
            template(f"{END_TURN}\n{BEGIN_TURN}assistant\n"),
        ]

    def prepare(self, item: Item, tokens: int, truncate: bool = False) -> Prompted:
        self.check(item)
        sound = item.sound()
        ids, spans = encode(self.tokenizer, self.segments(item), special=False)
        if sound is None:
            ids, spans, flags = self.fit(ids, spans, tokens, truncate, item)
            return Prompted(ids, spans, flags=flags)
        samples, flags = sound.samples, sound.flags
        if len(samples) > self.extractor.n_samples:
            if not truncate:
                raise ValueError(
                    f"the recording of item {item.id!r} is {sound.seconds:.1f} s long, {self.name} takes "
                    f"{self.extractor.n_samples / self.extractor.sampling_rate:g} s; shorten it, or cut it with --truncate"
                )
            samples, flags = samples[: self.extractor.n_samples], (*flags, "cut")
        made = self.extractor(
            samples,
            sampling_rate=self.extractor.sampling_rate,
            padding="max_length",
            return_attention_mask=True,
            return_tensors="pt",
        )
        frames = positions_of(int(made["attention_mask"].sum()))
        at = next(span.start for span in spans if span.modality == "audio")
        ids, spans = with_features(ids, spans, at, (frames - 2) // 2 + 1, self.audio_id, "audio", replaced=1)
        ids, spans, cut = self.fit(ids, spans, tokens, truncate, item)
        inputs = {"mel": made["input_features"], "frames": torch.tensor([frames])}
        return Prompted(ids, spans, inputs, frames, tuple(dict.fromkeys(flags + cut)))

    def bridge(self, inputs: Mapping[str, Tensor]) -> Tensor:
        tower = self.network.audio_tower
        mask = visible(inputs["frames"], tower.max_source_positions, inputs["mel"].dtype)
        states = tower(inputs["mel"], attention_mask=mask).last_hidden_state
        count = (int(inputs["frames"]) - 2) // 2 + 1
        return self.network.multi_modal_projector(states)[:, :count]


def load(path: str, name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Qwen2Audio:
    """The Qwen2-Audio of a local folder or hub id, in the layout of `Qwen/Qwen2-Audio-7B-Instruct`.

    Args:
        dtype: None takes float32 on a CPU, else bfloat16.

    Raises:
        ValueError: a file is missing or damaged, or the hub cannot be reached; the sentence names the file.
    """
    path = str(path)
    device, dtype = settled(device, dtype)
    config = Qwen2AudioConfig(**read_json(path, "config.json"))
    tokenizer = load_tokenizer(path)
    extractor = part(path, "preprocessor_config.json", lambda: WhisperFeatureExtractor.from_pretrained(path))
    network = empty(lambda: Qwen2AudioNetwork(config))
    fill(network, tensors_of(weight_files(path)), KEYS, device, dtype, name)
    return Qwen2Audio(network, tokenizer, extractor, name, source_of(path))
