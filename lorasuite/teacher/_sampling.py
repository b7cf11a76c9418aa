"""Sampling in which every row draws from its own seed, so that it does not depend on its batch."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor


class SeededSampler(LogitsProcessor):  # type: ignore[misc]
    """Chooses each row's next token itself, and leaves it the only one possible.

    ``generate`` would draw from one generator for the whole batch, so that a row would depend on its neighbours. Here a
    row draws one uniform number a token, and takes the token at which the cumulative probability passes it.

    Args:
        seeds: one a row.
        steps: tokens generated at most.
        temperature: of the softmax; 0 takes the likeliest token.
        top_p: probability mass that tokens are drawn from, the likeliest first.
        size: ids from here on are no tokens of the tokenizer (padded embeddings).
        never: ids that are not chosen.
    """

    def __init__(
        self,
        seeds: Sequence[str],
        steps: int,
        *,
        temperature: float,
        top_p: float,
        size: int,
        never: Sequence[int],
    ) -> None:
        generators = map(random.Random, seeds)
        self._uniform = torch.tensor([[generator.random() for _ in range(steps)] for generator in generators])
        self._temperature, self._top_p, self._size, self._never = temperature, top_p, size, list(never)
        self._log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``(rows, V)`` of which all but the chosen token's are minus infinity."""
        scores = scores.float().clone()
        scores[:, self._size :] = -torch.inf
        scores[:, self._never] = -torch.inf
        if self._temperature:
            chosen = self._sample(scores, self._uniform[:, len(self._log_probs)].to(scores.device))
        else:
            chosen = scores.argmax(dim=-1)
        self._log_probs.append(scores.log_softmax(dim=-1).gather(1, chosen[:, None])[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)

    def log_probs(self) -> list[list[float]]:
        """Of each row the log-probabilities of its tokens so far, at temperature 1, in nats."""
        found: list[list[float]] = torch.stack(self._log_probs, dim=1).tolist()
        return found

    def _sample(self, scores: Tensor, uniform: Tensor) -> Tensor:
        # float64: the sum runs over a whole vocabulary
        values, ids = (scores.double() / self._temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        total = values.cumsum(dim=-1)
        # the token that reaches top_p is still in
        kept = (total - values < self._top_p).sum(dim=-1, keepdim=True)
        mass = total.gather(1, kept - 1)
        place = torch.searchsorted(total, uniform[:, None].double() * mass, right=True).minimum(kept - 1)
        return ids.gather(1, place)[:, 0]
