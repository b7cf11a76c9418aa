"""Sampling in which every row draws from its own seed, so that it does not depend on its batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria


class SeededSampler(LogitsProcessor):  # type: ignore[misc]
    """Chooses each row's next token and leaves it the only one possible; greedy, it leaves that to ``generate``.

    ``generate`` would draw from one generator for the whole batch, so that a row would depend on its neighbours, and a
    random number for every token of the vocabulary. Here a row draws one uniform number a token, and takes the token at
    which the cumulative probability passes it (inverse transform sampling). Only with ``top_p`` below 1 is the
    vocabulary sorted. It works in the scores it is given, ``(rows, V)`` float32, which ``generate`` has copied.

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
        self._uniform = torch.empty(0)
        if temperature:
            generators = map(random.Random, seeds)
            self._uniform = torch.tensor(
                [[generator.random() for _ in range(steps)] for generator in generators], dtype=torch.float64
            )
        self._temperature, self._top_p, self._size, self._never = temperature, top_p, size, list(never)
        self._step = 0
        self._log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores, of which all but the chosen token's are minus infinity where it is sampled."""
        mass = scores.logsumexp(dim=-1, keepdim=True)  # of the whole vocabulary: the model's own probabilities
        scores[:, self._size :] = -torch.inf
        scores[:, self._never] = -torch.inf
        self._step += 1
        if not self._temperature:
            self._log_probs.append((scores.amax(dim=-1, keepdim=True) - mass)[:, 0])
            return scores
        uniform = self._uniform[:, self._step - 1, None].to(scores.device)
        chosen = self._sample(scores, uniform) if self._top_p == 1 else self._sample_sorted(scores, uniform)
        self._log_probs.append((scores.gather(1, chosen) - mass)[:, 0])
        return scores.fill_(-torch.inf).scatter_(1, chosen, 0.0)

    def take(self) -> list[list[float]]:
        """Of each row the log-probabilities of its tokens since the last time, at temperature 1, in nats."""
        found: list[list[float]] = torch.stack(self._log_probs, dim=1).tolist()
        self._log_probs = []
        return found

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        if self._temperature:
            self._uniform = self._uniform[rows.cpu()]

    def _sample(self, scores: Tensor, uniform: Tensor) -> Tensor:
        total = (scores / self._temperature).softmax(dim=-1).cumsum_(dim=-1)
        aim = (uniform * total[:, -1:]).to(total.dtype)
        place = torch.searchsorted(total, aim, right=True)
        # rounding may end behind the last token that has any probability
        return place.minimum(torch.searchsorted(total, total[:, -1:].contiguous()))

    def _sample_sorted(self, scores: Tensor, uniform: Tensor) -> Tensor:
        # float64: the sum runs over a whole vocabulary
        values, ids = (scores.double() / self._temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        total = values.cumsum(dim=-1)
        # the token that reaches top_p is still in
        kept = (total - values < self._top_p).sum(dim=-1, keepdim=True)
        mass = total.gather(1, kept - 1)
        place = torch.searchsorted(total, uniform * mass, right=True).minimum(kept - 1)
        return ids.gather(1, place)


class HalfDone(StoppingCriteria):  # type: ignore[misc]
    """Stops a batch when half of its rows have come to their end, for the others to go on without them.

    Args:
        ends: ids that end an answer.
    """

    def __init__(self, ends: Sequence[int]) -> None:
        self._ends = torch.tensor(ends)
        self._done = torch.tensor(False)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each row is to stop ``(rows,)``: all of them or none."""
        at_end = torch.isin(input_ids[:, -1], self._ends.to(input_ids.device))
        self._done = self._done.to(input_ids.device) | at_end
        half = 2 * int(self._done.sum()) >= len(input_ids)
        return torch.full_like(at_end, half)
