"""Soft labels: the teacher's distribution where training rows have labels, as an addition to the fine-tuning loss.

They need the two tokenizers to cut a row into the same tokens, under the same or other ids. A row is recognised by its
token ids in the new vocabulary; rows that are cut differently simply have no soft labels. Distributions are over the
tokens both vocabularies hold, renormalised, cut to the ``k`` likeliest; what is left of the probability counts as one
more outcome, so the divergence is a lower bound that is exact where ``k`` reaches the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lorasuite.data import Row, encode_rows
from lorasuite.errors import DataError
from lorasuite.training._head import cross_entropies
from lorasuite.training._loss import read_labels

#: Outcomes kept of each distribution.
TOP = 32

#: Names of a batch's soft labels: outcomes ``(batch, tokens, k)``, their log-probabilities, and where there are any.
OUTCOMES, LOG_PROBS, KNOWN = "teacher_outcomes", "teacher_log_probs", "teacher_known"


@dataclass(frozen=True, eq=False)
class SoftLabels:
    """The teacher's distributions over the next token at ``T`` tokens of several sequences, one after the other."""

    tokens: Tensor
    """``(T,)`` int64, ids of the new vocabulary."""
    lengths: Tensor
    """``(sequences,)`` int64."""
    outcomes: Tensor
    """``(T, k)`` int32, places in ``vocabulary``."""
    log_probs: Tensor
    """``(T, k)`` float32, at ``temperature``; all -inf at tokens before which no label stands."""
    vocabulary: Tensor
    """``(shared,)`` int64, the ids of the new vocabulary that distributions are over."""
    temperature: float

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, to be stored."""
        names = ("tokens", "lengths", "outcomes", "log_probs", "vocabulary")
        return {name: getattr(self, name) for name in names} | {"temperature": torch.tensor(self.temperature)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> SoftLabels:
        """What :meth:`tensors` gave."""
        return cls(**{**tensors, "temperature": float(tensors["temperature"])})  # type: ignore[arg-type]

    @cached_property
    def _places(self) -> dict[tuple[int, ...], int]:
        """Sequence → where it starts."""
        starts = (self.lengths.cumsum(0) - self.lengths).tolist()
        tokens = self.tokens.tolist()
        return {
            tuple(tokens[start : start + length]): start
            for start, length in zip(starts, self.lengths.tolist(), strict=True)
        }

    def __contains__(self, input_ids: Sequence[int]) -> bool:
        return tuple(input_ids) in self._places

    def batch(self, examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """The soft labels of encoded examples, padded on the right.

        Returns:
            :data:`OUTCOMES` ``(batch, tokens, k)`` int64, :data:`LOG_PROBS` of the same shape in float32, and
            :data:`KNOWN` ``(batch, tokens)`` bool.
        """
        width = max(len(example["input_ids"]) for example in examples)
        shape = (len(examples), width, self.outcomes.shape[1])
        outcomes = torch.zeros(shape, dtype=torch.int64)
        log_probs = torch.full(shape, -torch.inf)
        known = torch.zeros(shape[:2], dtype=torch.bool)
        for at, example in enumerate(examples):
            length = len(example["input_ids"])
            start = self._places.get(tuple(example["input_ids"]))
            if start is not None:
                outcomes[at, :length] = self.outcomes[start : start + length].long()
                log_probs[at, :length] = self.log_probs[start : start + length]
                known[at, :length] = log_probs[at, :length, 0].isfinite()
        return {OUTCOMES: outcomes, LOG_PROBS: log_probs, KNOWN: known}

    def digest(self) -> str:
        """SHA-256 of everything."""
        found = hashlib.sha256()
        for name, tensor in self.tensors().items():
            found.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return found.hexdigest()


def soft_labels(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    common: tuple[Tensor, Tensor],
    *,
    cutoff: int = 256,
    top: int = TOP,
    temperature: float = 1.0,
    batch_size: int = 16,
) -> SoftLabels:
    """The teacher's distribution over the next token, wherever the rows have labels.

    Args:
        model: the teacher, on its device.
        tokenizer: its own.
        rows: those that are trained on.
        common: paired ids, old and new, of the tokens that both vocabularies hold (``CommonTokens``). Rows with any
            other token are left out.
        cutoff: tokens kept of a row, as in fine-tuning.
        top: most outcomes kept of a distribution.
        batch_size: rows read at once.
        temperature: of the softmax, for teacher and student alike.

    Raises:
        DataError: without usable rows.
    """
    old, new = common
    # ids beyond the tokenizer are padding of the embeddings
    real = old < len(tokenizer)
    old, new = old[real], new[real]
    translation = dict(zip(old.tolist(), new.tolist(), strict=True))
    examples = [
        example
        for example in encode_rows(rows, tokenizer, cutoff).examples
        if all(token in translation for token in example["input_ids"])
    ]
    k = min(top, len(old))
    shape = (sum(len(example["input_ids"]) for example in examples), k)
    outcomes = torch.zeros(shape, dtype=torch.int32)
    log_probs = torch.full(shape, -torch.inf)
    starts = torch.tensor([0, *(len(example["input_ids"]) for example in examples)]).cumsum(0)
    for found in read_labels(model, examples, batch_size):
        shared = old.to(found.logits.device)
        likeliest = (found.logits[:, shared].float() / temperature).log_softmax(dim=-1).topk(k, dim=-1)
        at = starts[found.examples] + found.positions
        outcomes[at], log_probs[at] = likeliest.indices.int().cpu(), likeliest.values.cpu()
    if not examples:
        raise DataError("no row consists of tokens that both vocabularies hold: there are no soft labels")
    return SoftLabels(
        tokens=torch.tensor([translation[token] for example in examples for token in example["input_ids"]]),
        lengths=torch.tensor([len(example["input_ids"]) for example in examples]),
        outcomes=outcomes,
        log_probs=log_probs,
        vocabulary=new,
        temperature=temperature,
    )


def distilled_losses(
    logits: Tensor,
    targets: Tensor,
    outcomes: Tensor,
    log_probs: Tensor,
    known: Tensor,
    *,
    vocabulary: Tensor,
    temperature: float,
    weight: float,
) -> Tensor:
    """``(1 - w)·cross-entropy + w·T²·KL(teacher ‖ student)`` of each label, ``(n,)``, in nats and float32.

    The loss of Hinton et al. (arXiv 1503.02531). Labels without soft labels have the cross-entropy alone.

    Args:
        logits: ``(n, V)``.
        targets: ``(n,)`` int64, the labels.
        outcomes: ``(n, k)`` int64, from :meth:`SoftLabels.batch`, as the next two.
        log_probs: ``(n, k)`` float32.
        known: ``(n,)`` bool.
        vocabulary: ``(shared,)`` int64, the ids that distributions are over.
        temperature: ``T``.
        weight: ``w``, from 0 to 1.
    """
    losses = cross_entropies(logits, targets)
    teacher = log_probs[known]
    student = (logits[known][:, vocabulary.to(logits.device)].float() / temperature).log_softmax(dim=-1)
    student = student.gather(1, outcomes[known])
    divergence = (teacher.exp() * (teacher - student)).sum(dim=-1)
    if teacher.shape[-1] < len(vocabulary):
        tiny = torch.finfo(torch.float32).tiny
        rest = (1 - teacher.exp().sum(dim=-1)).clamp_min(tiny)
        other = (1 - student.exp().sum(dim=-1)).clamp_min(1e-7)  # of a float32 sum, less is rounding
        divergence = divergence + rest * (rest.log() - other.log())
    mixed = (1 - weight) * losses[known] + weight * temperature**2 * divergence
    return losses.masked_scatter(known, mixed)
