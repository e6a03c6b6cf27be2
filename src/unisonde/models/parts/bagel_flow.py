"""How BAGEL draws: contexts that a picture is drawn in, guidance by what they leave out, and Euler's method on latents.

A context is what stands before a picture: keys and values of every layer, and the rotary position that the whole picture takes. A
drawing has one with everything in it, and for guidance one without the text, and one without the picture where a picture is changed. They
are read once; the passes of sampling use them and add nothing.

Time runs from 1 (noise) to 0 (data). Guidance is applied where the time lies in an interval, (0.4, 1] as published for text to image, and
its result is shortened to the length of the conditional velocity.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from unisonde.models.parts.bagel_network import BagelNetwork, Owners, Past
from unisonde.models.parts.sampling import guided

SHIFT = 3.0
"""How far the times of sampling are moved towards noise."""


@dataclass(frozen=True)
class Guidance:
    """Weights of guidance, and where and how it is applied; as published for text to image.

    Attributes:
        text: weight of the text; at 1 or below there is no guidance at all.
        image: weight of the picture that is changed; at 1 or below only the text guides.
        above, until: the times at which it is applied, `above` excluded.
        norm: over what lengths are compared: all of a picture's velocity, that of each token, or that of each token after the guidance by
            text and before that by the picture.
        least: the smallest factor that shortens.
    """

    text: float = 4.0
    image: float = 1.0
    above: float = 0.4
    until: float = 1.0
    norm: Literal["global", "channel", "text_channel"] = "global"
    least: float = 0.0

    def applies(self, t: Tensor) -> bool:
        """Whether a step at this time is guided."""
        return self.text > 1 and bool(t > self.above) and bool(t <= self.until)

    def __call__(self, conditional: Tensor, without_text: Tensor, without_image: Tensor | None = None) -> Tensor:
        """The guided velocity, all (B, n, d); each row by itself."""
        v = guided(conditional, without_text, self.text)
        if self.norm == "text_channel":
            v = self._shortened(v, conditional)
            return v if without_image is None else guided(v, without_image, self.image)
        return self._shortened(v if without_image is None else guided(v, without_image, self.image), conditional)

    def _shortened(self, v: Tensor, conditional: Tensor) -> Tensor:
        axes = (1, 2) if self.norm == "global" else (2,)
        wanted, length = (torch.linalg.vector_norm(x, dim=axes, keepdim=True) for x in (conditional, v))
        return v * (wanted / (length + 1e-8)).clamp(self.least, 1.0)


EDITING = Guidance(image=2.0, above=0.0, norm="text_channel")
"""As published where a picture is changed."""


@dataclass(frozen=True)
class Context:
    """What stands before pictures: keys and values (None: nothing), where they are no padding (B, L), and the pictures' places (B,)."""

    past: Past | None
    there: Tensor
    places: Tensor

    @classmethod
    def nothing(cls, rows: int, device: torch.device) -> Context:
        return cls(None, torch.ones(rows, 0, dtype=torch.bool, device=device), torch.zeros(rows, dtype=torch.long, device=device))

    def mask(self, length: int) -> Tensor | None:
        """What `length` further positions, which see each other, see: (B, 1, 1, L + length); everything if None."""
        if bool(self.there.all()):
            return None
        return torch.cat([self.there, self.there.new_ones(len(self.there), length)], 1)[:, None, None]


@dataclass(frozen=True)
class Contexts:
    """The contexts of one drawing."""

    whole: Context
    without_text: Context
    without_image: Context | None = None


@dataclass(frozen=True)
class Canvas:
    """What is drawn on: the network, the ids of the marks around a picture, and its grid of tokens."""

    network: BagelNetwork
    begin: int
    end: int
    grid: tuple[int, int]

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def velocity(self, latents: Tensor, t: Tensor, context: Context) -> Tensor:
        """One pass over a picture: (B, n, d) at time t, a scalar -> (B, n, d), float32."""
        device = context.places.device
        marks = self.network.words(torch.tensor([self.begin, self.end], device=device)).to(device).expand(len(latents), -1, -1)
        tokens = self.network.drawn(latents, t.to(device).expand(len(latents)), self.grid).to(marks)
        x = torch.cat([marks[:, :1], tokens, marks[:, 1:]], 1)
        drawn = torch.ones(x.shape[:2], dtype=torch.bool, device=device)
        drawn[:, [0, -1]] = False
        places = context.places[:, None].expand(-1, x.shape[1])
        states, _ = self.network.read(x, places, context.mask(x.shape[1]), Owners.of(drawn), context.past)
        return self.network.velocity(states[:, 1:-1]).to(device)

    @torch.inference_mode()
    def draw(
        self,
        contexts: Contexts,
        noise: Tensor,
        times: Tensor,
        guidance: Guidance,
        around: Callable[[int], AbstractContextManager[Any]] = lambda step: nullcontext(),
    ) -> Tensor:
        """Latents by Euler's method: noise (B, n, d) -> (B, n, d).

        Args:
            times: (N,), of which all but the last are evaluated.
            around: a context for the conditional pass of each step.
        """
        latents = noise.float()
        for step, (now, then) in enumerate(pairwise(times)):
            with around(step):
                velocity = self.velocity(latents, now, contexts.whole)
            if guidance.applies(now):
                others = [contexts.without_text]
                if guidance.image > 1 and contexts.without_image is not None:
                    others.append(contexts.without_image)
                velocity = guidance(velocity, *(self.velocity(latents, now, context) for context in others))
            latents = latents - (now - then).to(latents) * velocity
        return latents


def flow_times(points: int) -> Tensor:
    """The times of sampling, from 1 (noise) to 0 (data), moved towards noise: (points,)."""
    return shifted(torch.linspace(1, 0, points))


def shifted(s: Tensor) -> Tensor:
    """Times in [0, 1] moved towards noise; 0 and 1 stay."""
    return SHIFT * s / (1 + (SHIFT - 1) * s)
