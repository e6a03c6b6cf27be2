"""The network of Show-o2 (arXiv 2506.15564): a Qwen2 that reads image latents by two paths and draws them by flow matching.

    latents -> patches -> SigLIP layers  (meaning) --+
    latents -> patches                   (detail)  --+-> fusion -> [time, image tokens] in the sequence of Qwen2
    last norm of Qwen2 -> projection -> blocks modulated by the time -> velocity of the latents

Qwen2, the SigLIP layers and the attention and feed-forward parts of the flow head are those of `transformers`; what stands between them
is ours. Names are the official ones. Attention is causal, and both ways among the time token and the tokens of its image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, SiglipVisionConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RotaryEmbedding
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from unisonde.models.parts.checkpoint import Keys, empty, fill
from unisonde.models.parts.sampling import euler, guided

Config = TypeVar("Config", bound=PreTrainedConfig)

HIDDEN = float(torch.iinfo(torch.int64).min)
"""What is added to the attention logit of a position that must not be seen, as published. Float16, which ends before, takes its least."""

SHIFT = 3.0
"""How far the times of sampling are moved towards noise."""

FREQUENCIES = 256
"""Width of the sinusoids of the time."""

FLOW_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Rotary positions of the flow head: those of Llama 3.2."""


@dataclass(frozen=True)
class Showo2Config:
    """Sizes of a Show-o2.

    Attributes:
        hidden, ffn, layers, heads, kv_heads, vocabulary, tied, positions, rope_theta: of the Qwen2; `tied` says whether its head is
            its embedding.
        latent_channels, patch: of the latents, and the side of the square of them that becomes one token.
        grid: side of a drawn picture, in tokens.
        window: the most positions of a sequence that draws, four of them kept for marks.
        semantic_*: of the path of SigLIP layers; `semantic_grid` is the side of its table of positions, and of a picture that is read.
        flow_*: of the head that predicts velocities.
    """

    hidden: int = 1536
    ffn: int = 8960
    layers: int = 28
    heads: int = 12
    kv_heads: int = 2
    vocabulary: int = 151669
    tied: bool = True
    positions: int = 32768
    rope_theta: float = 1e6
    latent_channels: int = 16
    patch: int = 2
    grid: int = 27
    window: int = 1024
    semantic_width: int = 1152
    semantic_ffn: int = 4304
    semantic_layers: int = 26
    semantic_heads: int = 16
    semantic_grid: int = 27
    flow_width: int = 2048
    flow_ffn: int = 8192
    flow_layers: int = 10
    flow_heads: int = 32
    flow_kv_heads: int = 8

    @property
    def tokens(self) -> int:
        """Image tokens of a drawn picture, without the time."""
        return self.grid**2

    @property
    def semantic_tokens(self) -> int:
        """Image tokens of a picture that is read, without the time."""
        return self.semantic_grid**2

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Showo2Config:
        """Of a published config.json, which names the Qwen2 by its width alone, or of one that a twin was written with.

        Raises:
            ValueError: the width is of no known Qwen2, pictures are not square, or something needed is not said.
        """
        if "sizes" in raw:
            return cls(**raw["sizes"])
        base = next((size for size in SIZES.values() if size.hidden == raw.get("hidden_size")), None)
        if base is None:
            known = ", ".join(f"{size.hidden} ({name})" for name, size in SIZES.items())
            raise ValueError(f"the width {raw.get('hidden_size')} is of no known Show-o2; there are {known}")
        grid = raw.get("image_latent_height", base.grid)
        if grid != raw.get("image_latent_width", grid) or grid not in WINDOWS:
            sides = f"{grid} x {raw.get('image_latent_width', grid)}"
            raise ValueError(f"pictures of {sides} tokens are of no known Show-o2; there are {', '.join(map(str, WINDOWS))} a side")
        return replace(
            base,
            vocabulary=raw.get("llm_vocab_size") or base.vocabulary,
            grid=grid,
            window=WINDOWS[grid],
            latent_channels=raw.get("image_latent_dim", base.latent_channels),
            patch=raw.get("patch_size", base.patch),
            semantic_width=raw.get("clip_latent_dim", base.semantic_width),
            flow_layers=raw.get("num_diffusion_layers", base.flow_layers),
        )

    def to_dict(self) -> dict[str, Any]:
        """As published, and every size besides."""
        return {
            "_class_name": "Showo2Qwen2_5",
            "llm_vocab_size": self.vocabulary,
            "image_latent_dim": self.latent_channels,
            "image_latent_height": self.grid,
            "image_latent_width": self.grid,
            "patch_size": self.patch,
            "hidden_size": self.hidden,
            "clip_latent_dim": self.semantic_width,
            "num_diffusion_layers": self.flow_layers,
            "add_time_embeds": True,
            "sizes": asdict(self),
        }


SIZES: dict[str, Showo2Config] = {
    "1.5B": Showo2Config(),
    "7B": Showo2Config(hidden=3584, ffn=18944, heads=28, kv_heads=4, tied=False),
}
"""The published sizes: 2.831 and 8.932 billion parameters."""

WINDOWS: dict[int, int] = {27: 1024, 32: 1280, 64: 4352}
"""Side of a drawn picture in tokens (432, 512, 1024 pixels) -> the published length of its sequence."""


def twin(vocabulary: int) -> Showo2Config:
    """The configuration of the twin: 32 x 32 pictures as 24 x 8 x 8 latents, a token each; about 2.5 million parameters."""
    return Showo2Config(
        hidden=160,
        ffn=368,
        layers=5,
        heads=5,
        kv_heads=5,
        vocabulary=vocabulary,
        tied=False,
        positions=512,
        latent_channels=24,
        patch=1,
        grid=8,
        window=256,
        semantic_width=96,
        semantic_ffn=192,
        semantic_layers=2,
        semantic_heads=4,
        semantic_grid=8,
        flow_width=128,
        flow_ffn=256,
        flow_layers=3,
        flow_heads=4,
        flow_kv_heads=2,
    )


# ------------------------------------------------------------------------------------------------------------------------ parts


class PatchEmbed(nn.Module):
    """Latents (B, c, h, w) -> one token for each square of them, row by row: (B, n, D)."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, latents: Tensor) -> Tensor:
        return self.proj(latents.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class TimeEmbed(nn.Module):
    """Times (B,) in [0, 1], 0 being noise -> (B, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        angles = t[:, None].float() * torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device))
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(next(self.mlp.parameters())))


def modulate(x: Tensor, shift: Tensor, scale: Tensor, where: Tensor) -> Tensor:
    """x (1 + scale) + shift at the positions `where` (B, L), x elsewhere; in float32. x: (B, L, D), shift and scale: (B, D)."""
    moved = x.float() * (1 + scale.float()[:, None]) + shift.float()[:, None]
    return torch.where(where[..., None], moved.to(x.dtype), x)


class FlowBlock(nn.Module):
    """A transformer block whose image positions are scaled, shifted and gated by the time."""

    def __init__(self, config: Qwen3Config, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn = Qwen3Attention(config, layer)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen2RMSNorm(width, 1e-5)
        self.post_attention_layernorm = Qwen2RMSNorm(width, 1e-5)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, time: Tensor, where: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_b, scale_b, gate_b = self.adaLN_modulation(time).chunk(6, -1)
        at = where[..., None]
        y, _ = self.self_attn(modulate(self.input_layernorm(x), shift_a, scale_a, where), rotary, mask)
        x = x + torch.where(at, gate_a[:, None] * y, y)
        y = self.mlp(modulate(self.post_attention_layernorm(x), shift_b, scale_b, where))
        return x + torch.where(at, gate_b[:, None] * y, y)


class FlowEnd(nn.Module):
    """From the last block to velocities: p p c values a token."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.norm_final = Qwen2RMSNorm(width, 1e-6)
        self.linear = nn.Linear(width, values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, time: Tensor, where: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(time).chunk(2, -1)
        return self.linear(modulate(self.norm_final(x), shift, scale, where))


# ---------------------------------------------------------------------------------------------------------------------- network


class Showo2Network(nn.Module):
    """Qwen2 between a dual path of image latents and a flow head.

    Throughout, `where` (B, L) says which positions hold an image: the time token and the tokens after it, as many in every row that has
    any. Of a drawing they are also those that see each other.
    """

    def __init__(self, config: Showo2Config) -> None:
        super().__init__()
        self.config = config
        self.showo = Qwen2ForCausalLM(_llm(config))
        self.image_embedder_und = PatchEmbed(config.latent_channels, config.semantic_width, config.patch)
        self.image_embedder_gen = PatchEmbed(config.latent_channels, config.hidden, config.patch)
        self.position_embedding = nn.Embedding(config.semantic_tokens, config.semantic_width)
        self.und_trans = SiglipEncoder(_semantic(config))  # type: ignore[arg-type]  # the vision half of its configuration
        self.fusion_proj = nn.Sequential(
            Qwen2RMSNorm(config.semantic_width + config.hidden, 1e-6),
            nn.Linear(config.semantic_width + config.hidden, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.hidden),
        )
        self.time_embed = TimeEmbed(config.flow_width)
        self.diff_proj: nn.Module = nn.Identity()
        self.time_embed_proj: nn.Module = nn.Identity()
        if config.hidden != config.flow_width:
            self.diff_proj = nn.Sequential(
                nn.Linear(config.hidden, config.flow_width), nn.GELU(), nn.Linear(config.flow_width, config.flow_width)
            )
            self.time_embed_proj = nn.Linear(config.flow_width, config.hidden)
        flow = _flow(config)
        self.flow_rotary = Qwen3RotaryEmbedding(flow)
        self.diffusion_head_a = nn.ModuleList(FlowBlock(flow, layer) for layer in range(config.flow_layers))
        self.diffusion_head_b = FlowEnd(config.flow_width, config.patch**2 * config.latent_channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.image_embedder_gen.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.image_embedder_gen.proj.weight.device

    # ---------------------------------------------------------------------------------------------------------------- reading

    def semantic(self, latents: Tensor) -> Tensor:
        """What the SigLIP layers make of latents: (B, c, h, w) -> (B, n, d)."""
        height, width = (side // self.config.patch for side in latents.shape[-2:])
        return self.und_trans(self.image_embedder_und(latents) + self._positions(height, width)).last_hidden_state

    def _positions(self, height: int, width: int) -> Tensor:
        """The table of positions, stretched to another grid where need be: (n, d)."""
        table, side = self.position_embedding.weight, self.config.semantic_grid
        if (height, width) == (side, side):
            return table
        square = table.unflatten(0, (side, side)).permute(2, 0, 1)[None]
        return F.interpolate(square, (height, width), mode="bicubic", align_corners=False)[0].flatten(1).T

    def fused(self, latents: Tensor) -> Tensor:
        """Image tokens: (B, c, h, w) -> (B, n, D)."""
        return self.fusion_proj(torch.cat([self.semantic(latents), self.image_embedder_gen(latents)], -1))

    def embed(self, ids: Tensor, where: Tensor, latents: Tensor | None, t: Tensor) -> tuple[Tensor, Tensor]:
        """Input embeddings (B, L, D), and time embeddings for the flow head.

        Args:
            latents: (K, c, h, w) of the K rows that hold an image, in their order; None if none does.
            t: (K,) their times; 1 for a picture that is read.
        """
        words, time = self.showo.model.embed_tokens(ids), self.time_embed(t)
        if latents is None:
            return words, time
        image = torch.cat([self.time_embed_proj(time)[:, None], self.fused(latents)], 1)
        return words.masked_scatter(where[..., None], image.to(words.dtype)), time

    def states(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """One pass of Qwen2: embeddings (B, L, D) -> states after the last norm."""
        places = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
        return self.showo.model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=places, use_cache=False
        ).last_hidden_state

    # ---------------------------------------------------------------------------------------------------------------- drawing

    def velocity(self, states: Tensor, time: Tensor, where: Tensor, mask: Tensor) -> Tensor:
        """The flow head: states after Qwen2's last norm (B, L, D) -> velocities (B, c, h, w), float32. Every row holds an image."""
        places = torch.arange(states.shape[1], device=states.device)[None]
        x = self.diff_proj(states)
        rotary = self.flow_rotary(x, places)
        for block in self.diffusion_head_a:
            x = block(x, time, where, rotary, mask)
        values = self.diffusion_head_b(x, time, where)[where].unflatten(0, (len(states), -1))[:, 1:]  # without the time token
        return self._laid_out(values.float())

    def _laid_out(self, values: Tensor) -> Tensor:
        """(B, n, p p c), the channel last -> (B, c, h, w).

        A token's values are the next p p latents in reading order, as published, and not the square that it was made from.
        """
        side = math.isqrt(values.shape[1]) * self.config.patch
        return values.unflatten(-1, (-1, self.config.latent_channels)).flatten(1, 2).transpose(1, 2).unflatten(-1, (side, side))

    def flow(self, ids: Tensor, where: Tensor, latents: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        """One pass of everything: ids (B, L), latents (B, c, h, w) at times t (B,) -> velocities, from noise at 0 to data at 1."""
        embeddings, time = self.embed(ids, where, latents, t)
        return self.velocity(self.states(embeddings, mask), time, where, mask)

    @torch.inference_mode()
    def draw(
        self,
        ids: Tensor,
        where: Tensor,
        noise: Tensor,
        times: Tensor,
        guidance: float,
        around: Callable[[int], AbstractContextManager[Any]] = lambda step: nullcontext(),
    ) -> Tensor:
        """Latents by Euler's method: noise (B, c, h, w) -> (B, c, h, w).

        Args:
            ids, where: of B prompts, followed by their B unconditional ones unless `guidance` is 1.
            times: (N,), of which all but the last are evaluated.
            around: a context for the pass of each step.
        """
        copies, mask = len(ids) // len(noise), additive(visible(where), self.dtype)

        def velocity(latents: Tensor, time: float) -> Tensor:
            both = self.flow(ids, where, latents.repeat(copies, 1, 1, 1), times.new_full((len(ids),), time), mask)
            if copies == 1:
                return both
            conditional, unconditional = both.chunk(2)
            return guided(conditional, unconditional, guidance)

        return euler(velocity, noise.float(), times.tolist(), around)

    # ---------------------------------------------------------------------------------------------------------------- writing

    @torch.inference_mode()
    def write(
        self, embeddings: Tensor, block: Tensor, there: Tensor, pick: Callable[[Tensor, int], Tensor], limit: int, end: int
    ) -> Tensor:
        """Tokens one after another, until every row has ended: (B, T), T at most `limit`; what follows `end` in a row is of no use.

        Args:
            embeddings: of prompts padded on the left; `there` (B, L) says where no padding is, `block` which positions see each other.
            pick: from logits (B, V) and the step to tokens (B,).
        """
        cache = DynamicCache(config=self.showo.config)
        mask, places = additive(visible(block, there), self.dtype), (there.long().cumsum(-1) - 1).clamp(min=0)
        written: list[Tensor] = []
        ended = torch.zeros(len(block), dtype=torch.bool, device=block.device)
        for step in range(limit):
            logits = self.showo(
                inputs_embeds=embeddings,
                attention_mask=mask,
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            written.append(pick(logits[:, -1], step))
            ended |= written[-1] == end
            if bool(ended.all()):
                break
            there = torch.cat([there, there.new_ones(len(there), 1)], -1)
            mask, places = additive(there[:, None], self.dtype), places[:, -1:] + 1
            embeddings = self.showo.model.embed_tokens(written[-1])[:, None]
        return torch.stack(written, 1)


def visible(block: Tensor, there: Tensor | None = None) -> Tensor:
    """Which positions each position sees: (B, L) -> (B, L, L). What came before, and those of a block each other.

    Args:
        there: (B, L), False at padding, which nothing but itself sees.
    """
    diagonal = torch.eye(block.shape[1], dtype=torch.bool, device=block.device)
    seen = torch.ones_like(diagonal).tril() | (block[:, :, None] & block[:, None, :])
    return seen if there is None else (seen & there.bool()[:, None, :]) | diagonal


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention logits: (B, Q, K) booleans -> (B, 1, Q, K)."""
    hidden = max(HIDDEN, torch.finfo(dtype).min)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen.bool(), hidden)[:, None]


def flow_times(points: int, device: torch.device | str = "cpu") -> Tensor:
    """The times of sampling, from 0 (noise) to 1 (data), moved towards noise: (points,)."""
    return shifted(torch.linspace(0, 1, points, device=device))


def shifted(s: Tensor) -> Tensor:
    """Times in [0, 1] moved towards noise; 0 and 1 stay."""
    return s / (s + SHIFT - SHIFT * s)


# --------------------------------------------------------------------------------------------------------------------- building


def keys_of(config: Showo2Config) -> Keys:
    """How official keys become ours: they are ours, but that a tied head is the embedding."""
    if not config.tied:
        return Keys()
    head = {r"showo\.lm_head\.weight": "tied: it is showo.model.embed_tokens.weight"}
    return Keys(ignored=head, absent=head)


def filled(
    config: Showo2Config,
    tensors: Iterable[tuple[str, Tensor]],
    device: str | torch.device,
    dtype: torch.dtype | None,
    name: str,
) -> Showo2Network:
    """The network of official tensors.

    Raises:
        ValueError: they do not fill it exactly.
    """
    network = empty(lambda: Showo2Network(config))
    fill(network, tensors, keys_of(config), device, dtype, name)
    if config.tied:
        network.showo.lm_head.weight = network.showo.model.embed_tokens.weight
    return network.eval()


def _llm(config: Showo2Config) -> Qwen2Config:
    return _fused(
        Qwen2Config(
            vocab_size=config.vocabulary,
            hidden_size=config.hidden,
            intermediate_size=config.ffn,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.positions,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tied,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _semantic(config: Showo2Config) -> SiglipVisionConfig:
    return _fused(
        SiglipVisionConfig(
            hidden_size=config.semantic_width,
            intermediate_size=config.semantic_ffn,
            num_hidden_layers=config.semantic_layers,
            num_attention_heads=config.semantic_heads,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
        )
    )


def _flow(config: Showo2Config) -> Qwen3Config:
    return _fused(
        Qwen3Config(
            hidden_size=config.flow_width,
            intermediate_size=config.flow_ffn,
            num_hidden_layers=config.flow_layers,
            num_attention_heads=config.flow_heads,
            num_key_value_heads=config.flow_kv_heads,
            head_dim=config.flow_width // config.flow_heads,
            max_position_embeddings=131072,
            rms_norm_eps=1e-6,  # of queries and keys; the blocks' own norms have 1e-5
            attention_bias=False,
            rope_parameters=dict(FLOW_ROPE),
        )
    )


def _fused(config: Config) -> Config:
    """The fused attention of torch, which whole models of `transformers` take by themselves."""
    config._attn_implementation = "sdpa"
    return config
