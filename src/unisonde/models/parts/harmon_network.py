"""The network of Harmon (arXiv 2503.21979): one MAR encoder of pictures for reading and for drawing, around a Qwen2.5.

    visible image tokens -> MAR encoder -> projection -> [buffers moved to the end] -> Qwen2, behind the text
    encoder's output + projection of Qwen2's -> MAR decoder -> a vector for every token -> diffusion head -> tokens

Drawing follows MaskGIT (arXiv 2202.04200): every step draws some tokens, in random order, fewer at first. The text is causal and stands
in front, so its keys and values serve every step. Qwen2 is that of `transformers`, the rest is ours; names are the official ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from unisonde.models.parts.checkpoint import Keys, empty, fill
from unisonde.models.parts.mar import Mar, MarSizes
from unisonde.models.trace import Stack

_HEAD = {r"llm\.lm_head\.weight": "tied: it is llm.model.embed_tokens.weight"}
KEYS = Keys(ignored=_HEAD | {r"mar\.class_emb\.weight": "classes of ImageNet, which Harmon does not draw by"}, absent=_HEAD)
"""All names are the official ones; the autoencoder's (`vae.`) are taken out before."""


@dataclass(frozen=True)
class QwenSizes:
    """What of a Qwen2 differs between sizes, by the names of its config.json; the defaults are Qwen2.5-1.5B's."""

    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    num_key_value_heads: int = 2
    vocab_size: int = 151936
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6

    @classmethod
    def of(cls, raw: Mapping[str, Any], base: QwenSizes | None = None) -> QwenSizes:
        """From what a configuration of any version of `transformers` says; the rest is as in `base`."""
        said = dict(raw) | (raw.get("rope_parameters") or {})
        return cls(**{k: said[k] if k in said else getattr(base or cls(), k) for k in cls.__dataclass_fields__})


@dataclass(frozen=True)
class HarmonConfig:
    """Sizes of a Harmon.

    Attributes:
        grid: side of a picture in tokens, read or drawn.
    """

    llm: QwenSizes = field(default_factory=QwenSizes)
    mar: MarSizes = field(default_factory=MarSizes)
    grid: int = 32

    @property
    def tokens(self) -> int:
        """Image tokens of a picture, without the buffers."""
        return self.grid**2

    @property
    def buffers(self) -> int:
        return self.mar.buffer_size

    @property
    def window(self) -> int:
        """The most positions of a text that is drawn."""
        return self.llm.max_position_embeddings - self.tokens - self.buffers

    @classmethod
    def of(cls, raw: Mapping[str, Any], width: int) -> HarmonConfig:
        """From a config.json, which need not say much, and the width of the Qwen2 in the weights.

        Raises:
            ValueError: the width is of no published Harmon, and the configuration does not say the sizes.
        """
        llm, mar = raw.get("llm") or {}, raw.get("mar") or {}
        base = next((size for size in SIZES.values() if size.llm.hidden_size == width), None)
        if base is None and not {"hidden_size", "num_attention_heads"} <= set(llm):
            known = ", ".join(f"{size.llm.hidden_size} ({name})" for name, size in SIZES.items())
            raise ValueError(f"the width {width} is of no known Harmon; there are {known}")
        base = base or cls()
        return replace(base, llm=QwenSizes.of(llm, base.llm), mar=MarSizes.of(mar, base.mar), grid=raw.get("grid", base.grid))

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": "harmon"} | asdict(self)


SIZES: dict[str, HarmonConfig] = {
    "1.5B": HarmonConfig(),
    "0.5B": HarmonConfig(
        QwenSizes(896, 4864, 24, 14, 2),
        MarSizes(
            encoder_embed_dim=768,
            encoder_depth=12,
            encoder_num_heads=12,
            decoder_embed_dim=768,
            decoder_depth=12,
            decoder_num_heads=12,
            diffloss_d=6,
            diffloss_w=1024,
        ),
    ),
}
"""The published sizes, for pictures of 512 x 512: Qwen2.5-1.5B with MAR-Huge, Qwen2.5-0.5B with MAR-Base."""


def twin(vocabulary: int) -> HarmonConfig:
    """The twin: 32 x 32 pictures as 8 x 8 tokens of 4 x 4 latents, 2.4 million parameters."""
    return HarmonConfig(
        QwenSizes(160, 320, 4, 5, 5, vocabulary, 512, rope_theta=10000.0),
        MarSizes(
            img_size=32,
            vae_stride=1,
            patch_size=4,
            encoder_embed_dim=128,
            encoder_depth=2,
            encoder_num_heads=4,
            decoder_embed_dim=128,
            decoder_depth=3,
            decoder_num_heads=4,
            mlp_ratio=3.0,
            vae_embed_dim=3,
            buffer_size=16,
            diffloss_d=3,
            diffloss_w=160,
            num_sampling_steps="ddim20",
        ),
        grid=8,
    )


class HarmonNetwork(nn.Module):
    """Qwen2 and MAR with the projections between them; the autoencoder is apart."""

    def __init__(self, config: HarmonConfig) -> None:
        super().__init__()
        self.config = config
        width, mar = config.llm.hidden_size, config.mar
        self.llm: Any = Qwen2ForCausalLM(_llm(config.llm))
        self.mar = Mar(mar)
        self.proj_in = nn.Sequential(nn.Linear(mar.encoder_embed_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.proj_out = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, mar.encoder_embed_dim))

    @property
    def stack(self) -> Stack:
        return Stack("llm", tuple(self.llm.model.layers), self.llm.model.norm)

    @property
    def dtype(self) -> torch.dtype:
        return self.llm.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.llm.lm_head.weight.device

    def embed(self, ids: Tensor) -> Tensor:
        """(...,) -> (..., D)."""
        return self.llm.model.embed_tokens(ids)

    def see(self, tokens: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What is seen of pictures, for the decoder and for Qwen2.

        Args:
            tokens: (B, n, c).
            visible: (B, n), as many in every row; all if None.

        Returns:
            The encoder's output (B, b + v, E), its b buffers first, and input features of Qwen2 (B, v + b, D), the buffers last.
        """
        seen = self.mar.encode(tokens, visible)
        return seen, self.proj_in(seen).roll(-self.config.buffers, 1)

    def vectors(self, seen: Tensor, states: Tensor, visible: Tensor) -> Tensor:
        """A vector for every token: what the encoder gave, Qwen2's states of it (buffers last) and (B, n) -> (B, n, E')."""
        return self.mar.decode(seen + self.proj_out(states.roll(self.config.buffers, 1)), visible)


class Drawing:
    """Pictures being drawn: the prompts' keys and values, and passes behind them.

    Args:
        ids, mask: of the prompts, (B, P), padded on the right.
    """

    def __init__(self, network: HarmonNetwork, ids: Tensor, mask: Tensor) -> None:
        self.network = network
        self.ids = ids.to(network.device)
        self.mask = mask.to(network.device).bool()
        self.cache = DynamicCache(config=network.llm.config)

    def read_prompts(self) -> Tensor:
        """The prompts' states after the last norm, (B, P, D). Padding comes behind the prompts, which do not see it."""
        model = self.network.llm.model
        return model(inputs_embeds=self.network.embed(self.ids), past_key_values=self.cache, use_cache=True).last_hidden_state

    def layout(self, count: int) -> tuple[Tensor, Tensor]:
        """Which positions are seen, (B, P + count), and the numbers of the last `count`: they go on where the prompt ends."""
        there = torch.cat([self.mask, self.mask.new_ones(len(self.mask), count)], 1)
        return there, (there.long().cumsum(-1) - 1)[:, -count:]

    def states(self, features: Tensor) -> Tensor:
        """Qwen2's states of image features behind the prompts: (B, q, D) -> (B, q, D), after the last norm."""
        there, places = self.layout(features.shape[1])
        states = self.network.llm.model(
            inputs_embeds=features, attention_mask=there, position_ids=places, past_key_values=self.cache, use_cache=True
        ).last_hidden_state
        self.cache.crop(-features.shape[1])  # the prompts alone stay
        return states

    def vectors(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """A vector for every token, given those that are visible: (B, n, c), (B, n) -> (B, n, E')."""
        seen, features = self.network.see(tokens, visible)
        return self.network.vectors(seen, self.states(features), visible)

    def draw(
        self,
        orders: Tensor,
        steps: int,
        noise: Callable[[int], Tensor],
        temperature: float,
        guidance: float,
        around: Callable[[int, int], AbstractContextManager[Any]] = lambda step, visible: nullcontext(),
    ) -> Tensor:
        """Image tokens, some at every step: (B, n, c), float32, the unconditional branch's alike.

        Args:
            orders: (b, n), the places of the tokens of each picture, the last to be drawn first; b is B, or half of it with guidance.
            noise: standard normal numbers for `m` tokens of each picture in the order of their places, (1 + T, B * m, c).
            temperature, guidance: as in `TokenDiffusion.sample`.
            around: a context for a step's pass, given its number and how many tokens are visible.
        """
        count, copies = orders.shape[1], len(self.ids) // len(orders)
        tokens = torch.zeros(len(self.ids), count, self.network.config.mar.channels, device=orders.device)
        masked = torch.ones(len(self.ids), count, dtype=torch.bool, device=orders.device)
        left = count
        for step, stay in enumerate(masked_counts(count, steps)):
            with around(step, count - left):
                vectors = self.vectors(tokens, ~masked)
            still = last_ones(orders, stay).repeat(copies, 1)
            if drawn := left - stay:
                place = masked & ~still
                made = self.network.mar.diffloss.sample(vectors[place], noise(drawn), temperature, guidance)
                tokens[place] = made[: len(orders) * drawn].repeat(copies, 1)
            masked, left = still, stay
        return tokens


def masked_counts(count: int, steps: int) -> Iterator[int]:
    """How many of `count` tokens are still masked after each step: they fall as a cosine, by one at least, to one, and last to none."""
    left = count
    for step in range(1, steps):
        left = max(1, min(left - 1, math.floor(count * math.cos(math.pi / 2 * step / steps))))
        yield left
    yield 0


def last_ones(orders: Tensor, count: int) -> Tensor:
    """The places of the `count` tokens that are drawn last: (b, n) -> (b, n) booleans."""
    places = torch.zeros_like(orders, dtype=torch.bool)
    return places.scatter(1, orders[:, :count], True)


def filled(
    config: HarmonConfig,
    tensors: Iterable[tuple[str, Tensor]],
    device: str | torch.device,
    dtype: torch.dtype | None,
    name: str,
    keys: Keys = KEYS,
) -> HarmonNetwork:
    """The network of official tensors, those of the autoencoder left out.

    Raises:
        ValueError: they do not fill it exactly.
    """
    network = empty(lambda: HarmonNetwork(config))
    fill(network, tensors, keys, device, dtype, name)
    return network.eval()


def without(tensors: Iterable[tuple[str, Tensor]], prefix: str, into: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors whose names do not begin with `prefix`; the others are put into a dictionary, without it."""
    for key, tensor in tensors:
        if key.startswith(prefix):
            into[key.removeprefix(prefix)] = tensor
        else:
            yield key, tensor


def normals(generators: Sequence[torch.Generator], *shape: int) -> Tensor:
    """Standard normal numbers of each generator, float32, drawn on the CPU: (B, *shape)."""
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


def _llm(sizes: QwenSizes) -> Qwen2Config:
    said = asdict(sizes)
    rope = {"rope_type": "default", "rope_theta": said.pop("rope_theta")}
    config = Qwen2Config(**said, rope_parameters=rope, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None)
    config._attn_implementation = "sdpa"
    return config
