"""The network of Show-o: its configuration with presets, a Phi that reads words and image codes, and which positions see which.

Words, marks and image codes are tokens of one vocabulary: the text tokenizer's words first, then ten marks, the image codes, and the
mask. The transformer is the stock Phi with normalised queries and keys; attention is given as a table of what sees what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PhiConfig, PhiForCausalLM

from unisonde.models.parts.checkpoint import Keys
from unisonde.models.trace import Stack

MARKS = ("[PAD]", "<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>", "<|lvg|>")
"""The marks in the order of their ids, which follow the words'."""

KEYS = Keys()
"""The checkpoint of a variant with CLIP: all names are the official ones."""

KEYS_CODES = Keys(ignored={r"mm_projector\..*": "brings CLIP features to the transformer, and this variant sees by image codes"})


def keys_of(config: ShowoConfig) -> Keys:
    return KEYS if config.w_clip_vit else KEYS_CODES


@dataclass(frozen=True)
class PhiSizes:
    """What of a Phi differs between sizes; the defaults are Phi-1.5's."""

    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "gelu_new"
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.5

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> PhiSizes:
        """From a Phi's `config.json`, as written by any version of `transformers`."""
        known = dict(raw) | (raw.get("rope_parameters") or {})
        return cls(**{k: v for k, v in known.items() if k in cls.__dataclass_fields__})


@dataclass(frozen=True)
class ShowoConfig:
    """A Show-o, by the names of its published `config.json`; the defaults are `showlab/show-o`, 1.448 billion parameters.

    Attributes:
        w_clip_vit: whether it sees pictures by CLIP features rather than image codes.
        num_vq_tokens: codes of a picture.
        max_seq_length: the longest text prompt of drawing, two of its marks included and the first mark not.
        llm: sizes of its Phi.
        clip_width: of the CLIP features.
    """

    w_clip_vit: bool = False
    vocab_size: int = 58498
    llm_vocab_size: int = 50295
    codebook_size: int = 8192
    num_vq_tokens: int = 256
    num_new_special_tokens: int = 10
    max_seq_length: int = 128
    llm: PhiSizes = PhiSizes()
    clip_width: int = 1024

    def __post_init__(self) -> None:
        whole = self.llm_vocab_size + self.num_new_special_tokens + self.codebook_size + 1
        if self.num_new_special_tokens != len(MARKS) or self.vocab_size != whole:
            raise ValueError(
                f"a Show-o vocabulary is words, {len(MARKS)} marks, image codes and a mask; {self.llm_vocab_size} + "
                f"{self.num_new_special_tokens} + {self.codebook_size} + 1 is not {self.vocab_size}"
            )

    def mark(self, name: str) -> int:
        """The id of a mark."""
        return self.llm_vocab_size + MARKS.index(name)

    @property
    def first_code(self) -> int:
        """The id of image code 0."""
        return self.llm_vocab_size + self.num_new_special_tokens

    @property
    def mask(self) -> int:
        """The id that stands for a code that is not settled yet."""
        return self.vocab_size - 1

    @property
    def prompt_window(self) -> int:
        """Positions of a drawing's prompt; the picture begins behind them, however short the prompt is."""
        return self.max_seq_length + 1

    @classmethod
    def of(cls, raw: Mapping[str, Any], llm: PhiSizes) -> ShowoConfig:
        """From the published `config.json`, which says nothing of its Phi.

        Raises:
            ValueError: it lacks a size or is none of a Show-o.
        """
        lacking = [name for name in ("w_clip_vit", "vocab_size", "llm_vocab_size", "num_vq_tokens") if name not in raw]
        if lacking:
            raise ValueError(f"the config.json lacks {', '.join(lacking)}: it is not Show-o's")
        known = {k: v for k, v in raw.items() if k in cls.__dataclass_fields__ and k != "llm"}
        return cls(**known, llm=llm)

    def to_dict(self) -> dict[str, Any]:
        return {"_class_name": "Showo", "mask_token_id": self.mask} | asdict(self)


def full_size(resolution: int = 256, clip: bool = False) -> ShowoConfig:
    """A published configuration: pictures of 256 x 256 or 512 x 512, with or without CLIP."""
    return ShowoConfig(w_clip_vit=clip, num_vq_tokens=(resolution // 16) ** 2)


def twin(vocabulary: int, codes: int = 64, book: int = 2048) -> ShowoConfig:
    """The twin: 32 x 32 pictures as 8 x 8 codes, 1.9 million parameters and 0.7 million of image tokenizer."""
    llm = PhiSizes(hidden_size=160, intermediate_size=448, num_hidden_layers=5, num_attention_heads=5, max_position_embeddings=512)
    return ShowoConfig(False, vocabulary + len(MARKS) + book + 1, vocabulary, book, codes, llm=llm)


def visibility(there: Tensor, everywhere: Tensor | None = None, everything: Tensor | None = None) -> Tensor:
    """Which positions see which: (B, L, L) booleans, rows see columns. Causal, but for what is said.

    Args:
        there: (B, L), whether a position holds anything. Padding is seen by padding alone, so that no row is empty.
        everywhere: (B, L), columns that every row sees (a picture that is read).
        everything: (B, L), rows that see every column (a picture that is drawn).
    """
    length = there.shape[1]
    sees = torch.ones(length, length, dtype=torch.bool, device=there.device).tril()[None]
    if everywhere is not None:
        sees = sees | everywhere[:, None, :]
    if everything is not None:
        sees = sees | everything[:, :, None]
    return sees & (there[:, None, :] == there[:, :, None])


class Showo(nn.Module):
    """The transformer with its heads, and the projector of CLIP features where there is one. Names are the official ones."""

    def __init__(self, config: ShowoConfig) -> None:
        super().__init__()
        self.config = config
        width = config.llm.hidden_size
        self.showo = PhiForCausalLM(PhiConfig(vocab_size=config.vocab_size, qk_layernorm=True, **asdict(config.llm)))
        if config.w_clip_vit:
            self.mm_projector = nn.Sequential(nn.Linear(config.clip_width, width), nn.GELU(), nn.Linear(width, width))

    @property
    def stack(self) -> Stack:
        return Stack("llm", tuple(self.showo.model.layers), self.showo.model.final_layernorm)

    @property
    def dtype(self) -> torch.dtype:
        return self.showo.lm_head.weight.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """(...,) -> (..., D)."""
        return self.showo.model.embed_tokens(ids)

    def forward(self, embeddings: Tensor, sees: Tensor, positions: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """States after the last norm.

        Args:
            embeddings: (B, q, D).
            sees: (B, q, k) booleans; the k columns are those in the cache and then the q new ones.
            positions: (B, q), for the rotary embedding.
            cache: keys and values of earlier positions; the new ones are added.
        """
        blocked = torch.finfo(embeddings.dtype).min
        mask = torch.zeros(sees.shape, dtype=embeddings.dtype, device=sees.device).masked_fill(~sees, blocked)
        return self.showo.model(
            inputs_embeds=embeddings,
            attention_mask=mask[:, None],
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def logits(self, states: Tensor) -> Tensor:
        """(..., D) -> (..., vocabulary)."""
        return self.showo.lm_head(states)

    def code_logits(self, states: Tensor) -> Tensor:
        """Logits of the image codes alone: (..., D) -> (..., codebook)."""
        head, first = self.showo.lm_head, self.config.first_code
        book = slice(first, first + self.config.codebook_size)
        return F.linear(states, head.weight[book], head.bias[book])
