"""Ultravox (fixie-ai, versions 0.3 to 0.6): the encoder of Whisper, a gated projector, and a Llama that reads what it gives as words.

Every eight positions of the encoder are joined into one feature, 6.25 a second, and stand in the user's turn after the request.
The published checkpoint holds what was trained, encoder and projector; the decoder is the one that its configuration names,
unchanged. Encoder layers and decoder are those of `transformers`; the projector is ours, under its official names.

What the states are. Stack `encoder`: 50 positions a second, 32 layers and the last norm; what is longer than 30 seconds is
encoded in pieces, which are joined. Stack `adapter`: layer 0 eight positions of the encoder, end to end, layer 1 the features.
Stack `llm`: the features' positions are `audio`; the chat template and the space between request and recording are template.

As published the encoder sees no padding. The published code puts the end-of-turn token where features go; its embedding is never
used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, WhisperConfig, WhisperFeatureExtractor
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from unisonde.data.item import Item
from unisonde.models.bridged import Bridged, Prompted
from unisonde.models.parts.chat import chat_segments, end_of_turn
from unisonde.models.parts.checkpoint import Keys, Rename, empty, fill, tensors_of, weight_files
from unisonde.models.parts.pretrained import load_tokenizer, reach, read_json, settled, source_of
from unisonde.models.parts.quiet import quiet
from unisonde.models.parts.segments import content, encode, kinds_of, spans_of, template, with_features
from unisonde.models.parts.whisper_encoder import encode as hear
from unisonde.models.parts.whisper_encoder import in_pieces, log_mel, positions_of
from unisonde.models.trace import Stack

AUDIO = "<|audio|>"
"""What stands for the recording in the user's turn; the vocabulary does not have it."""

LANGUAGE_MODEL, WHISPER = "llm", "whisper"
"""Folders beside the weights in which the decoder and the encoder may lie, and what their keys begin with while they are loaded."""

KEYS = Keys(
    renames=(
        Rename(rf"{LANGUAGE_MODEL}\.(.+)", r"language_model.\1"),
        Rename(rf"{WHISPER}\.model\.encoder\.(.+)", r"audio_tower.\1"),
    ),
    ignored={
        rf"{WHISPER}\.(model\.decoder\..*|proj_out\.weight)": "the decoder of Whisper, which the model never runs",
        r".*\.rotary_emb\.inv_freq": "rotary frequencies, which are computed",
    },
)


# ------------------------------------------------------------------------------------------------------------------------ network


@dataclass(frozen=True)
class UltravoxConfig:
    """Sizes of an Ultravox.

    Attributes:
        audio, text: of Whisper and of the decoder.
        hidden: width of the projector before its gate.
        stack: how many positions of the encoder make a feature.
        middle: whether the projector's second norm stands before its second map (versions from 0.5) or after it.
    """

    audio: WhisperConfig
    text: Any
    hidden: int = 4096
    stack: int = 8
    middle: bool = True

    @classmethod
    def from_dict(cls, raw: dict[str, Any], audio: dict[str, Any], text: dict[str, Any]) -> UltravoxConfig:
        """Of a published config.json, and those of its parts.

        Raises:
            ValueError: it is another kind of Ultravox.
        """
        wrong = {
            "projector_act": (raw.get("projector_act", "swiglu"), "swiglu"),
            "audio_latency_block_size": (raw.get("audio_latency_block_size"), None),
            "the model_type of its encoder": (audio.get("model_type", "whisper"), "whisper"),
        }
        for name, (there, here) in wrong.items():
            if there != here:
                raise ValueError(f"the configuration of Ultravox has {name} {there!r}, where {here!r} is what this code computes")
        return cls(
            WhisperConfig(**audio),
            AutoConfig.for_model(**{"model_type": "llama"} | text),
            raw.get("hidden_size", 4096),
            raw.get("stack_factor", 8),
            raw.get("projector_ln_mid", False),
        )


def full_size() -> UltravoxConfig:
    """Version 0.6 on Llama-3.1-8B: 8.72 billion parameters, of which 0.64 are Whisper's and 0.05 the projector's."""
    audio = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "num_mel_bins": 128}
    text = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    return UltravoxConfig.from_dict({"projector_ln_mid": True}, audio, text)


class Projector(nn.Module):
    """From joined positions of the encoder to features: norm, map, gate, map, and a second norm before or after the last."""

    def __init__(self, config: UltravoxConfig) -> None:
        super().__init__()
        joined, gated, width = config.audio.d_model * config.stack, config.hidden // 2, config.text.hidden_size
        self.ln_pre = LlamaRMSNorm(joined, eps=1e-6)
        self.linear_1 = nn.Linear(joined, config.hidden, bias=False)
        self.linear_2 = nn.Linear(gated, width, bias=False)
        self.ln_mid: nn.Module = LlamaRMSNorm(gated, eps=1e-6) if config.middle else nn.Identity()
        self.ln_post: nn.Module = nn.Identity() if config.middle else LlamaRMSNorm(width, eps=1e-6)

    def forward(self, joined: Tensor) -> Tensor:
        """(..., n, stack d) -> (..., n, D)."""
        value, gate = self.linear_1(self.ln_pre(joined)).chunk(2, -1)
        return self.ln_post(self.linear_2(self.ln_mid(F.silu(gate) * value)))


class UltravoxNetwork(nn.Module):
    """Encoder, projector and decoder under their official names."""

    def __init__(self, config: UltravoxConfig) -> None:
        super().__init__()
        self.config = config
        self.audio_tower = WhisperEncoder(config.audio)
        self.multi_modal_projector = Projector(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text)

    def join(self, states: Tensor) -> Tensor:
        """Each `stack` positions as one: (..., L, d) -> (..., L / stack rounded up, stack d); what is missing at the end is zero."""
        stack = self.config.stack
        states = F.pad(states, (0, 0, 0, -states.shape[-2] % stack))
        return states.unflatten(-2, (-1, stack)).flatten(-2)


# -------------------------------------------------------------------------------------------------------------------------- model


class Ultravox(Bridged):
    """An Ultravox of any size.

    Args:
        tokenizer: of its decoder, with a chat template.
        apart: folders of what is published apart: `language_model`, `audio_tower`.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    family: ClassVar[str] = "ultravox"
    takes = "audio"

    def __init__(
        self,
        network: UltravoxNetwork,
        tokenizer: Any,
        name: str,
        source: Path | None = None,
        apart: Mapping[str, Path] | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {name} has no chat template, which Ultravox needs")
        tower = network.audio_tower
        turn = end_of_turn(tokenizer)
        super().__init__(
            network,
            tokenizer,
            name,
            Stack("encoder", tuple(tower.layers), tower.layer_norm),
            network.multi_modal_projector,
            source,
            ends=[] if turn is None else [turn],
            apart=apart,
        )
        self.extractor = WhisperFeatureExtractor(feature_size=network.config.audio.num_mel_bins)

    @property
    def longest(self) -> int:
        """Frames of features that the encoder takes at once."""
        return 2 * self.network.config.audio.max_source_positions

    def features_of(self, frames: Any) -> Any:
        """How many features so many frames of a piece make; numbers or tensors."""
        return -(-frames // (2 * self.network.config.stack))

    def prepare(self, item: Item, tokens: int, truncate: bool = False) -> Prompted:
        self.check(item)
        sound = item.sound()
        if sound is None:
            ids, spans = encode(self.tokenizer, chat_segments(self.tokenizer, item.prompt, item.id), special=False)
            ids, spans, flags = self.fit(ids, spans, tokens, truncate, item)
            return Prompted(ids, spans, flags=flags)
        asked = f"{item.prompt} {AUDIO}" if item.prompt.strip() else AUDIO
        before, turn, after = chat_segments(self.tokenizer, asked, item.id)
        words = turn.text.removesuffix(AUDIO)
        # As published what stands before the recording and what stands after it are tokenised apart.
        gap = template(words[len(words.rstrip()) :])
        head, said = encode(self.tokenizer, [before, content(words.rstrip()), gap], special=False)
        tail, left = encode(self.tokenizer, [after], special=False)
        mel, lengths = in_pieces(log_mel(self.extractor, sound.samples), self.longest)
        spans = spans_of(kinds_of(said) + kinds_of(left))
        count = int(self.features_of(lengths).sum())
        ids, spans = with_features(head + tail, spans, len(head), count, self.tokenizer.eos_token_id, "audio")
        ids, spans, flags = self.fit(ids, spans, tokens, truncate, item)
        frames = int(positions_of(lengths).sum())
        return Prompted(ids, spans, {"mel": mel, "lengths": lengths}, frames, sound.flags + flags)

    def bridge(self, inputs: Mapping[str, Tensor]) -> Tensor:
        states = hear(self.network.audio_tower, inputs["mel"], inputs["lengths"])
        features = self.network.multi_modal_projector(self.network.join(states))
        counts = self.features_of(inputs["lengths"]).tolist()
        return torch.cat([piece[:count] for piece, count in zip(features, counts, strict=True)])[None]


# ------------------------------------------------------------------------------------------------------------------------ loading


def load(path: str, name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Ultravox:
    """The Ultravox of a local folder or hub id, in the layout of `fixie-ai/ultravox-v0_6-llama-3_1-8b`.

    What its configuration names by an id (`text_model_id`, and in old versions `audio_model_id`) may lie in the same folder, in `llm/`
    and `whisper/`; else it comes from its publisher.

    Args:
        dtype: None takes float32 on a CPU, else bfloat16.

    Raises:
        ValueError: a file is missing or damaged, or the hub cannot be reached; the sentence names the file.
    """
    path = str(path)
    device, dtype = settled(device, dtype)
    raw = read_json(path, "config.json")
    text_at = _apart(path, LANGUAGE_MODEL, raw.get("text_model_id"), "language model")
    audio_at = _apart(path, WHISPER, raw.get("audio_model_id"), "encoder")
    audio = raw.get("audio_config") if audio_at is None else read_json(audio_at, "config.json")
    text = raw.get("text_config") if text_at is None else read_json(text_at, "config.json")
    if audio is None or text is None:
        raise ValueError(f"config.json of {path!r} has neither {'audio' if audio is None else 'text'}_config nor the id of a model")
    config = UltravoxConfig.from_dict(raw, audio, text)
    with quiet():  # `transformers` wonders at the type of the model
        tokenizer = load_tokenizer(path)
    network = empty(lambda: UltravoxNetwork(config))
    tensors = chain(tensors_of(weight_files(path)), _under(LANGUAGE_MODEL, text_at), _under(WHISPER, audio_at))
    fill(network, tensors, KEYS, device, dtype, name)
    apart = {"language_model": text_at, "audio_tower": audio_at}
    return Ultravox(
        network, tokenizer, name, source_of(path), {part: source_of(where) for part, where in apart.items() if where is not None}
    )


def _apart(path: str, folder: str, hub_id: str | None, what: str) -> str | None:
    """Where a part lies that the configuration names by an id; None if it names none."""
    if hub_id is None:
        return None
    if (Path(path) / folder / "config.json").is_file():
        return str(Path(path) / folder)
    if reach(hub_id, "config.json") is None:
        raise ValueError(
            f"the {what} of {path!r} is published apart, as {hub_id}, and cannot be had from the hub (it may ask for your consent and a "
            f"token); put its config.json and .safetensors files into a folder {folder} beside the weights"
        )
    return hub_id


def _under(prefix: str, path: str | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a part that is published apart, with a prefix to their keys."""
    for key, tensor in tensors_of(weight_files(path)) if path is not None else []:
        yield f"{prefix}.{key}", tensor
