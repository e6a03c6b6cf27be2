"""The diffusion transformer of OmniGen2 (arXiv 2506.18871): text features and image latents in one sequence, both ways.

    text features -> norm, linear -> context refiner ------------------+
    reference latents -> patches + index -> reference refiner, each ---+--> joint layers -> norm -> velocity of the noisy latents
    noisy latents -> patches -> noise refiner --------------------------+

Every block but the context refiner's is scaled and gated by the time. Positions have three axes: text runs along all of them at once,
an image stands at one place of the first and spreads over the other two. Names are the official ones. The sampler follows the flow from
noise (0) to data (1) by Euler's method, over times that are moved towards noise the more, the larger the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from unisonde.models.parts.checkpoint import Keys, empty, fill
from unisonde.models.parts.sampling import euler, guided
from unisonde.models.trace import Stack

ROPE = 10000.0
"""Base of the rotary frequencies of every axis."""

FREQUENCIES = 256
"""Width of the sinusoids of the time."""

TIME_WIDTH = 1024
"""Largest width of the time embedding; a narrower network has its own."""

REFERENCES = 5
"""The most reference images of a row."""

KEYS = Keys()
"""Official keys are ours."""


@dataclass(frozen=True)
class OmniGen2Config:
    """Sizes of the transformer, under their published names; the defaults are those of `OmniGen2/OmniGen2`: 3.967 billion parameters.

    Attributes:
        patch_size, in_channels: the side of the square of latents that becomes one token, and the channels of latents.
        multiple_of: the width of the feed-forward parts is four times the hidden size, rounded up to a multiple of this.
        axes_dim_rope: how many dimensions of a head each axis of positions turns.
        text_feat_dim: width of the text features, which is that of the language model.
    """

    patch_size: int = 2
    in_channels: int = 16
    hidden_size: int = 2520
    num_layers: int = 32
    num_refiner_layers: int = 2
    num_attention_heads: int = 21
    num_kv_heads: int = 7
    multiple_of: int = 256
    norm_eps: float = 1e-5
    axes_dim_rope: tuple[int, int, int] = (40, 40, 40)
    text_feat_dim: int = 2048
    timestep_scale: float = 1000.0

    def __post_init__(self) -> None:
        if self.hidden_size != self.num_attention_heads * sum(self.axes_dim_rope):
            raise ValueError(
                f"a width of {self.hidden_size} is not {self.num_attention_heads} heads of {sum(self.axes_dim_rope)} dimensions, "
                "as the axes of positions need"
            )

    @property
    def ffn(self) -> int:
        """Width of the feed-forward parts."""
        return self.multiple_of * math.ceil(4 * self.hidden_size / self.multiple_of)

    @property
    def patch_values(self) -> int:
        """Values of a token's square of latents."""
        return self.patch_size**2 * self.in_channels

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> OmniGen2Config:
        """Of a published transformer/config.json.

        Raises:
            ValueError: a size is not said, or something is set that no published OmniGen2 has.
        """
        lacking = [field.name for field in fields(cls) if field.name not in raw]
        if lacking:
            raise ValueError(f"the configuration of the transformer lacks {', '.join(lacking)}; it is not OmniGen2's")
        if raw.get("out_channels") not in (None, raw["in_channels"]) or raw.get("ffn_dim_multiplier") not in (None, 1):
            raise ValueError(
                "the transformer has out_channels or an ffn_dim_multiplier of its own, which no published OmniGen2 has"
            )
        known = {field.name: raw[field.name] for field in fields(cls)}
        return cls(**known | {"axes_dim_rope": tuple(raw["axes_dim_rope"])})

    def to_dict(self) -> dict[str, Any]:
        """As published."""
        return {"_class_name": "OmniGen2Transformer2DModel"} | asdict(self) | {"axes_dim_rope": list(self.axes_dim_rope)}


# ---------------------------------------------------------------------------------------------------------------------- positions


def places(text: int, grids: Sequence[tuple[int, int]]) -> Tensor:
    """Positions of one sequence, (L, 3): `text` tokens, then images of these rows and columns of tokens, row by row.

    Token i of the text is at (i, i, i). An image is at one place of the first axis, the next free one, and takes up as many of them
    as its longer side has tokens.
    """
    parts = [torch.arange(text)[:, None].expand(-1, 3)]
    shifts = accumulate((max(grid) for grid in grids), initial=text)
    for shift, (rows, columns) in zip(shifts, grids, strict=False):
        parts.append(torch.cartesian_prod(torch.tensor([shift]), torch.arange(rows), torch.arange(columns)))
    return torch.cat(parts)


def rotary(positions: Tensor, axes: Sequence[int]) -> Tensor:
    """Angles of queries and keys as (cosine, sine): positions (B, L, 3) -> (2, B, L, d / 2), d the dimensions of a head."""
    angles = [
        positions[..., axis, None].double() * ROPE ** (-torch.arange(0, size, 2, device=positions.device).double() / size)
        for axis, size in enumerate(axes)
    ]
    angle = torch.cat(angles, -1)
    return torch.stack([angle.cos(), angle.sin()]).float()


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Queries or keys (B, L, heads, d) turned, in float32; the dimensions 2 i and 2 i + 1 are a pair."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles[:, :, :, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def there(lengths: Sequence[int], longest: int | None = None) -> Tensor:
    """Where rows padded on the right hold something: (B, L) booleans."""
    return torch.arange(max(lengths) if longest is None else longest) < torch.tensor(lengths)[:, None]


# ------------------------------------------------------------------------------------------------------------------------- blocks


class Attention(nn.Module):
    """Attention both ways, with fewer keys than queries, which are normalised and turned."""

    def __init__(self, config: OmniGen2Config) -> None:
        super().__init__()
        width, self.head = config.hidden_size, sum(config.axes_dim_rope)
        self.groups = config.num_attention_heads // config.num_kv_heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, config.num_kv_heads * self.head, bias=False)
        self.to_v = nn.Linear(width, config.num_kv_heads * self.head, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])
        self.norm_q = nn.RMSNorm(self.head, 1e-5)
        self.norm_k = nn.RMSNorm(self.head, 1e-5)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (part(x).unflatten(-1, (-1, self.head)) for part in (self.to_q, self.to_k, self.to_v))
        query, key = rotated(self.norm_q(query), angles), rotated(self.norm_k(key), angles)
        # Repeated by hand: with grouped keys the fused kernels are not taken everywhere.
        key, value = (part.repeat_interleave(self.groups, 2) for part in (key, value))
        seen = None if mask is None else mask[:, None, None]
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return self.to_out[0](y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, inner, bias=False)
        self.linear_2 = nn.Linear(inner, width, bias=False)
        self.linear_3 = nn.Linear(width, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)) * self.linear_3(x))


class TimedNorm(nn.Module):
    """A norm scaled by the time, which also says how the rest of its block is scaled and gated."""

    def __init__(self, width: int, time_width: int, eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(time_width, 4 * width)
        self.norm = nn.RMSNorm(width, eps)

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale, gate, scale_forward, gate_forward = self.linear(F.silu(time))[:, None].chunk(4, -1)
        return self.norm(x) * (1 + scale), gate, scale_forward, gate_forward


class Block(nn.Module):
    """Attention and feed-forward, each between two norms; with `timed`, scaled and gated by the time."""

    def __init__(self, config: OmniGen2Config, timed: bool = True) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.norm_eps
        self.attn = Attention(config)
        self.feed_forward = FeedForward(width, config.ffn)
        self.norm1 = TimedNorm(width, min(width, TIME_WIDTH), eps) if timed else nn.RMSNorm(width, eps)
        self.ffn_norm1 = nn.RMSNorm(width, eps)
        self.norm2 = nn.RMSNorm(width, eps)
        self.ffn_norm2 = nn.RMSNorm(width, eps)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None, time: Tensor | None = None) -> Tensor:
        if time is None:
            x = x + self.norm2(self.attn(self.norm1(x), angles, mask))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        y, gate, scale_forward, gate_forward = self.norm1(x, time)
        x = x + gate.tanh() * self.norm2(self.attn(y, angles, mask))
        y = self.feed_forward(self.ffn_norm1(x) * (1 + scale_forward))
        return x + gate_forward.tanh() * self.ffn_norm2(y)


class ScaledNorm(nn.Module):
    """A norm without weights of its own: x (B, L, D) and scale (B, D) -> norm(x) (1 + scale)."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale)[:, None]


class Out(nn.Module):
    """From the last layer to velocities: p p c values a token. What leaves `norm` is the state after the last norm."""

    def __init__(self, width: int, time_width: int, values: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(time_width, width)
        self.norm = ScaledNorm()
        self.linear_2 = nn.Linear(width, values)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.linear_2(self.norm(x, self.linear_1(F.silu(time))))


class TimeAndText(nn.Module):
    """Embeddings of the time, (B,) -> (B, T), and of text features, (B, L, d) -> (B, L, D)."""

    def __init__(self, config: OmniGen2Config) -> None:
        super().__init__()
        self.sinusoids = Timesteps(FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0, scale=config.timestep_scale)
        self.timestep_embedder = TimestepEmbedding(FREQUENCIES, min(config.hidden_size, TIME_WIDTH))
        norm = nn.RMSNorm(config.text_feat_dim, config.norm_eps)
        self.caption_embedder = nn.Sequential(norm, nn.Linear(config.text_feat_dim, config.hidden_size))

    def time(self, t: Tensor) -> Tensor:
        return self.timestep_embedder(self.sinusoids(t.float()).to(self._dtype))

    def text(self, features: Tensor) -> Tensor:
        return self.caption_embedder(features.to(self._dtype))

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.caption_embedder.parameters()).dtype


# ------------------------------------------------------------------------------------------------------------------------ network


class OmniGen2Transformer(nn.Module):
    """The transformer. `read` makes of a prompt what every step of sampling takes; `velocity` is one evaluation."""

    def __init__(self, config: OmniGen2Config) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.x_embedder = nn.Linear(config.patch_values, width)
        self.ref_image_patch_embedder = nn.Linear(config.patch_values, width)
        self.time_caption_embed = TimeAndText(config)
        self.noise_refiner = nn.ModuleList(Block(config) for _ in range(config.num_refiner_layers))
        self.ref_image_refiner = nn.ModuleList(Block(config) for _ in range(config.num_refiner_layers))
        self.context_refiner = nn.ModuleList(Block(config, timed=False) for _ in range(config.num_refiner_layers))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_out = Out(width, min(width, TIME_WIDTH), config.patch_values)
        self.image_index_embedding = nn.Parameter(torch.zeros(REFERENCES, width))

    @property
    def stack(self) -> Stack:
        """The joint layers, where text and image share a width."""
        return Stack("dit", tuple(self.layers), self.norm_out.norm)

    @property
    def device(self) -> torch.device:
        return self.x_embedder.weight.device

    def read(self, features: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Text as the joint sequence takes it, the same at every step: features (B, L, d), padded on the right -> B of (n, D).

        Args:
            lengths: of the B texts.
        """
        x = self.time_caption_embed.text(features.to(self.device))
        present = there(lengths, x.shape[1]).to(self.device)
        # Where nothing stands, angles are zero numbers, as published; nobody sees it.
        angles = rotary(places(x.shape[1], [])[None].to(self.device), self.config.axes_dim_rope) * present[..., None]
        for block in self.context_refiner:
            x = block(x, angles, None if present.all() else present)
        return [row[:length] for row, length in zip(x, lengths, strict=True)]

    def velocity(
        self, texts: Sequence[Tensor], latents: Tensor, t: Tensor, references: Sequence[Sequence[Tensor]] | None = None
    ) -> Tensor:
        """One evaluation: velocities from noise at 0 to data at 1, float32, (B, c, h, w).

        Args:
            texts: of `read`.
            latents: (B, c, h, w), at times t (B,).
            references: latents (c, h, w) of each row's reference images, at most five.
        """
        time = self.time_caption_embed.time(t.to(self.device))
        images = references or [[]] * len(texts)
        grid, grids = self._grid(latents), [[self._grid(image) for image in row] for row in images]
        positions = [places(len(text), [*row, grid]) for text, row in zip(texts, grids, strict=True)]
        angles = rotary(pad_sequence(positions, batch_first=True).to(self.device), self.config.axes_dim_rope)
        lengths, tokens = [len(row) for row in positions], grid[0] * grid[1]

        noise = self.x_embedder(self._tokens(latents))
        own = torch.stack([angles[:, k, length - tokens : length] for k, length in enumerate(lengths)], 1)
        for block in self.noise_refiner:
            noise = block(noise, own, None, time)

        rows = []
        for k, text in enumerate(texts):
            turned = angles[:, k : k + 1, len(text) : lengths[k] - tokens]
            rows.append(torch.cat([text, *self._refined(images[k], turned, time[k : k + 1]), noise[k]]))
        x = pad_sequence(rows, batch_first=True)
        mask = None if min(lengths) == max(lengths) else there(lengths).to(self.device)
        for block in self.layers:
            x = block(x, angles, mask, time)
        values = self.norm_out(x, time)
        return self._laid_out(torch.stack([values[k, length - tokens : length] for k, length in enumerate(lengths)]), grid)

    def _refined(self, images: Sequence[Tensor], angles: Tensor, time: Tensor) -> list[Tensor]:
        """A row's reference images, each by itself: (c, h, w) -> (n, D); their angles (2, 1, all of n, d / 2)."""
        refined = []
        for image, index in zip(images, self.image_index_embedding[: len(images)], strict=True):
            x = self.ref_image_patch_embedder(self._tokens(image[None])) + index
            own, angles = angles.tensor_split([x.shape[1]], 2)
            for block in self.ref_image_refiner:
                x = block(x, own, None, time)
            refined.append(x[0])
        return refined

    def _grid(self, latents: Tensor) -> tuple[int, int]:
        """Rows and columns of tokens of (..., h, w)."""
        return latents.shape[-2] // self.config.patch_size, latents.shape[-1] // self.config.patch_size

    def _tokens(self, latents: Tensor) -> Tensor:
        """The squares of latents as tokens, row by row, the channel last: (B, c, h, w) -> (B, n, p p c)."""
        p, x = self.config.patch_size, latents.to(self.x_embedder.weight)
        return x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def _laid_out(self, values: Tensor, grid: tuple[int, int]) -> Tensor:
        """The way back: (B, n, p p c) -> (B, c, h, w), float32."""
        p = self.config.patch_size
        squares = values.float().unflatten(1, grid).unflatten(3, (p, p, -1))
        return squares.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    # ------------------------------------------------------------------------------------------------------------------- drawing

    @torch.inference_mode()
    def draw(
        self,
        texts: Sequence[Tensor],
        unconditional: Sequence[Tensor],
        noise: Tensor,
        times: Tensor,
        guidance: float,
        interval: tuple[float, float] = (0.0, 1.0),
        around: Callable[[int], AbstractContextManager[Any]] = lambda step: nullcontext(),
    ) -> Tensor:
        """Latents by Euler's method: noise (B, c, h, w) -> (B, c, h, w), in float32.

        Args:
            texts, unconditional: of B prompts and their B negative ones, of `read`.
            times: (N + 1,), of which all but the last are evaluated.
            guidance, interval: of `guides`; where there is guidance the negative prompts are evaluated after the others, in one pass.
            around: a context for the pass of each step.
        """
        moments = times.tolist()

        def velocity(latents: Tensor, now: float) -> Tensor:
            both = guides(moments.index(now), len(moments) - 1, guidance, interval)
            rows = [*texts, *unconditional] if both else texts
            v = self.velocity(rows, latents.repeat(1 + both, 1, 1, 1), torch.full((len(rows),), now))
            if not both:
                return v
            conditional, negative = v.chunk(2)
            return guided(conditional, negative, guidance)

        return euler(velocity, noise.float().to(self.device), moments, around)


def guides(step: int, steps: int, guidance: float, interval: tuple[float, float]) -> bool:
    """Whether a step has guidance: its weight is above 1, and the share of the steps made, step / steps, within the interval.

    As published; it is the share of the steps and not the time, and a weight below 1 is none.
    """
    return guidance > 1 and interval[0] <= step / steps <= interval[1]


def flow_times(steps: int, positions: int, shift: bool = True) -> Tensor:
    """The times of sampling, from 0 (noise) to 1 (data), float32: (steps + 1,).

    Args:
        positions: of a latent, height times width. At 40 x 40 times are even; at 128 x 128 they are moved 3.2-fold towards noise.
        shift: whether they are moved at all.
    """
    s = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    factor = math.sqrt(positions) / 40 if shift else 1.0
    return (s / (factor - factor * s + s)).float()


def filled(
    config: OmniGen2Config,
    tensors: Iterable[tuple[str, Tensor]],
    device: str | torch.device,
    dtype: torch.dtype | None,
    name: str,
) -> OmniGen2Transformer:
    """The transformer of official tensors.

    Raises:
        ValueError: they do not fill it exactly.
    """
    network = empty(lambda: OmniGen2Transformer(config))
    fill(network, tensors, KEYS, device, dtype, name)
    return network.eval()
