"""The tokens of a closed set of answers: where a decoder reads each from, and the log-probabilities of the answers that they make up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AnswerTokens:
    """The tokens of K answers: the first of each, (K,); of the m others their answer, their place after the first, themselves, (m,)."""

    first: Tensor
    answer: Tensor
    place: Tensor
    token: Tensor

    @classmethod
    def of(cls, tails: Sequence[list[int]], device: torch.device) -> AnswerTokens:
        others = [(k, place, token) for k, tail in enumerate(tails) for place, token in enumerate(tail[1:])]
        columns = torch.tensor(others, dtype=torch.long).reshape(-1, 3).T.to(device)
        return cls(torch.tensor([tail[0] for tail in tails], device=device), *columns)

    def reading(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows from which tokens are read, (1 + m, d): the last of the prompt, (1, 1, d), then of the answers, (K, T - 1, d) if any."""
        return torch.cat([parts[0][0], *(rest[self.answer, self.place] for rest in parts[1:])])

    def sums(self, logits: Tensor) -> Tensor:
        """Log-probabilities of the answers, (l, K), from logits of those rows, (l, 1 + m, V)."""
        logits = logits.float()
        whole = logits.logsumexp(-1)
        later = logits[:, 1:].gather(2, self.token[:, None].expand(len(logits), -1, 1))[..., 0] - whole[:, 1:]
        return (logits[:, 0, self.first] - whole[:, :1]).index_add(1, self.answer, later)
