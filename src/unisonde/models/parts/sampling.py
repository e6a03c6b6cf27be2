"""Drawing: guidance, temperature, the way from noise to data, and randomness that does not depend on the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def uniforms(seeds: Sequence[int], steps: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1), float64: (B, steps). Row b depends on `seeds[b]` alone; drawn on the CPU, so every device sees the same."""
    rows = [torch.rand(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows).to(device)


def normals(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, float32: (B, *shape). Row b depends on `seeds[b]` alone; drawn on the CPU, as `uniforms` are."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def guided(conditional: Tensor, unconditional: Tensor, weight: float) -> Tensor:
    """Classifier-free guidance: u + w (c - u). Shapes alike."""
    return unconditional + weight * (conditional - unconditional)


def draw(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """One token a row, by inverting the cumulative distribution: logits (B, K), uniform (B,) -> (B,).

    Temperature 0 takes the most likely token. No host round trip, and one number of randomness a token.
    """
    if temperature == 0:
        return logits.argmax(-1)
    # Float64: over 16384 codes a float32 cumulative sum loses the rare ones.
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    point = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def euler(
    velocity: Callable[[Tensor, float], Tensor],
    z: Tensor,
    times: Sequence[float],
    around: Callable[[int], AbstractContextManager[Any]] = lambda step: nullcontext(),
) -> Tensor:
    """Where a flow leads from `z` (B, ...), by Euler's method.

    Args:
        velocity: at a point (B, ...) and a time; like the point in shape.
        times: all but the last are evaluated.
        around: a context for each evaluation, by its number from 0.
    """
    for step, (now, then) in enumerate(pairwise(times)):
        with around(step):
            change = velocity(z, now)
        z = z + (then - now) * change
    return z
