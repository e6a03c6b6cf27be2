"""The diffusion head of MAR (arXiv 2406.11838): one small network that draws each image token by itself, given a vector for it.

Noise is predicted, and beside it where between its two bounds the variance of a step lies (arXiv 2102.09672). Training has 1000 steps
with cosine betas; sampling visits a few of them, evenly spread, with the betas that lead from one to the next. Guidance is inside:
the noise of the conditional and the unconditional vector are mixed at every step. Names are the official ones.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from unisonde.models.parts.sampling import guided

TRAINED_STEPS = 1000
FREQUENCIES = 256
"""Width of the sinusoids of the time."""


# --------------------------------------------------------------------------------------------------------------------- schedule


def cosine_betas(steps: int = TRAINED_STEPS) -> np.ndarray:
    """Share of the variance that each step replaces by noise: (steps,), float64, none above 0.999 (arXiv 2102.09672, equation 17)."""
    t = np.arange(steps + 1) / steps
    kept = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - kept[1:] / kept[:-1], 0.999)


@dataclass(frozen=True)
class NoiseSchedule:
    """The steps that sampling visits.

    Attributes:
        timesteps: their numbers among the trained ones, (T,), integers, rising.
        betas: share of the variance that each replaces by noise, (T,), float64.
    """

    timesteps: np.ndarray
    betas: np.ndarray

    @classmethod
    def named(cls, steps: str | int) -> NoiseSchedule:
        """By the published names: `100` are 100 steps from the first to the last; `ddim50` every 20th from the first.

        Raises:
            ValueError: there are not as many, or it is no such name.
        """
        match = re.fullmatch(r"(ddim)?(\d+)", str(steps))
        count = int(match[2]) if match else 0
        if match is None or not 1 <= count <= TRAINED_STEPS or (match[1] and TRAINED_STEPS % count):
            raise ValueError(f"of {TRAINED_STEPS} diffusion steps a number or an even share (ddim50) can be visited, got {steps!r}")
        if match[1]:
            return cls.at(np.arange(0, TRAINED_STEPS, TRAINED_STEPS // count))
        stride = (TRAINED_STEPS - 1) / max(1, count - 1)
        return cls.at(np.array([round(k * stride) for k in range(count)]))

    @classmethod
    def at(cls, timesteps: np.ndarray) -> NoiseSchedule:
        """Of these of the trained steps."""
        kept = np.cumprod(1 - cosine_betas())[timesteps]
        return cls(timesteps, 1 - kept / np.concatenate([[1.0], kept[:-1]]))

    def __len__(self) -> int:
        return len(self.betas)

    @property
    def kept(self) -> np.ndarray:
        """Share of the data's variance that is left at each step."""
        return np.cumprod(1 - self.betas)

    @property
    def kept_before(self) -> np.ndarray:
        return np.concatenate([[1.0], self.kept[:-1]])

    @property
    def data_weight(self) -> np.ndarray:
        """Of the data in the mean of the step before, given data and noisy data."""
        return self.betas * np.sqrt(self.kept_before) / (1 - self.kept)

    @property
    def noisy_weight(self) -> np.ndarray:
        return (1 - self.kept_before) * np.sqrt(1 - self.betas) / (1 - self.kept)

    @property
    def least(self) -> np.ndarray:
        """The logarithm of the least variance of a step; of the first, which has none, that of the second."""
        variance = self.betas * (1 - self.kept_before) / (1 - self.kept)
        return np.log(np.concatenate([variance[1:2], variance[1:]])) if len(self) > 1 else np.log(self.betas)

    @property
    def most(self) -> np.ndarray:
        return np.log(self.betas)


# ---------------------------------------------------------------------------------------------------------------------- network


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class TimeEmbed(nn.Module):
    """Step numbers (N,) -> (N, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(next(self.mlp.parameters()).dtype))


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, 1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(given).chunk(3, -1)
        return x + gate * self.mlp(modulate(self.in_ln(x), shift, scale))


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, 1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(given).chunk(2, -1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Denoiser(nn.Module):
    """Noisy tokens (N, c) at steps (N,) with a vector for each, (N, D) -> (N, 2c): their noise, and the share of the variance."""

    def __init__(self, channels: int, condition: int, width: int, depth: int) -> None:
        super().__init__()
        self.time_embed = TimeEmbed(width)
        self.cond_embed = nn.Linear(condition, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        like = self.input_proj.weight
        given = self.time_embed(t) + self.cond_embed(condition.to(like))
        x = self.input_proj(x.to(like))
        for block in self.res_blocks:
            x = block(x, given)
        return self.final_layer(x, given)


class TokenDiffusion(nn.Module):
    """The head with its schedule.

    Args:
        channels: of a token.
        condition: width of the vector that a token is drawn from.
        steps: of sampling, by their published name.
    """

    def __init__(self, channels: int, condition: int, width: int, depth: int, steps: str) -> None:
        super().__init__()
        self.net = Denoiser(channels, condition, width, depth)
        self.schedule = NoiseSchedule.named(steps)

    def sample(self, condition: Tensor, noise: Tensor, temperature: float = 1.0, guidance: float = 1.0) -> Tensor:
        """Tokens drawn from their vectors: (N, D) -> (N, c), float32.

        Args:
            condition: of the conditional branch and, unless `guidance` is 1, behind it the same tokens of the unconditional one.
            noise: standard normal, (1 + T, N, c): where each token begins, and what is added at each step, in the order of sampling;
                at the last nothing is added.
            temperature: of what is added.
        """
        schedule, x = self.schedule, noise[0].float()
        table = zip(
            schedule.timesteps.tolist(),
            np.sqrt(1 / schedule.kept).tolist(),
            np.sqrt(1 / schedule.kept - 1).tolist(),
            schedule.data_weight.tolist(),
            schedule.noisy_weight.tolist(),
            schedule.least.tolist(),
            schedule.most.tolist(),
            strict=True,
        )
        for (t, of_noisy, of_noise, to_data, to_noisy, least, most), added in zip(reversed([*table]), noise[1:], strict=True):
            eps, share = self._predict(x, t, condition, guidance)
            data = of_noisy * x - of_noise * eps
            mean = to_data * data + to_noisy * x
            share = (share + 1) / 2
            deviation = (0.5 * (share * most + (1 - share) * least)).exp()
            x = mean + deviation * added * temperature if t else mean
        return x

    def _predict(self, x: Tensor, t: int, condition: Tensor, guidance: float) -> tuple[Tensor, Tensor]:
        """The noise in (N, c), and the share of the variance. With guidance both branches look at the conditional tokens."""
        if guidance != 1:
            x = x[: len(x) // 2].repeat(2, 1)
        times = torch.full((len(x),), t, device=x.device)
        eps, share = self.net(x, times, condition).float().chunk(2, -1)
        if guidance != 1:
            conditional, unconditional = eps.chunk(2)
            eps = guided(conditional, unconditional, guidance).repeat(2, 1)
        return eps, share
