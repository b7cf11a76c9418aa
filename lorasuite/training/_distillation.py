"""Soft labels: the teacher's distribution where rows have labels, in place of the labels or beside them.

Two tokenizers need not cut a row alike. Where a unit of both (:mod:`lorasuite.training._units`) is one token that both
vocabularies hold, the distributions over the shared tokens are compared, renormalised and cut to the teacher's ``k``
likeliest; what is left of the probability counts as one more outcome. Any other unit has two outcomes, itself and
everything else; its probability is the product of its tokens'. Merging outcomes never makes a divergence larger, so
each is a lower bound of that of the next tokens, exact where ``k`` reaches the vocabulary. A label that is in no unit
is not compared. A row is recognised by its token ids in the new vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor

from lorasuite.data import Row
from lorasuite.training._head import cross_entropies
from lorasuite.training._loss import read_labels
from lorasuite.training._units import RowAligner

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

#: Outcomes kept of each distribution.
OUTCOMES_KEPT = 32
#: Least probability of what is left: of a float32 sum, less is rounding.
LEAST = 1e-7

#: Names of a batch's soft labels: outcomes ``(batch, tokens, k)``, their log-probabilities, where there are any; which
#: unit of two outcomes a label is in ``(batch, tokens)``, -1 in none, and that unit's log-probability.
OUTCOMES, LOG_PROBS, KNOWN = "teacher_outcomes", "teacher_log_probs", "teacher_known"
UNITS, UNIT_LOG_PROBS = "teacher_units", "teacher_unit_log_probs"


@dataclass(frozen=True, eq=False)
class PerToken:
    """Something known of ``T`` tokens of several sequences, one after the other."""

    tokens: Tensor
    """``(T,)`` int64, ids of the new vocabulary."""
    lengths: Tensor
    """``(sequences,)`` int64."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, to be stored."""
        return {one.name: torch.as_tensor(getattr(self, one.name)) for one in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """What :meth:`tensors` gave."""
        found: dict[str, Any] = {n: float(value) if value.dim() == 0 else value for n, value in tensors.items()}
        return cls(**found)

    @cached_property
    def _places(self) -> dict[tuple[int, ...], int]:
        """Sequence → where it starts."""
        starts = (self.lengths.cumsum(0) - self.lengths).tolist()
        tokens = self.tokens.tolist()
        return {
            tuple(tokens[start : start + length]): start
            for start, length in zip(starts, self.lengths.tolist(), strict=True)
        }

    def start(self, input_ids: Sequence[int]) -> int | None:
        """Where a sequence starts among the tokens; None where it is not known."""
        return self._places.get(tuple(input_ids))

    def __contains__(self, input_ids: Sequence[int]) -> bool:
        return tuple(input_ids) in self._places

    def digest(self) -> str:
        """SHA-256 of everything."""
        found = hashlib.sha256()
        for name, tensor in self.tensors().items():
            found.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return found.hexdigest()


@dataclass(frozen=True, eq=False)
class SoftLabels(PerToken):
    """The teacher's distributions over what comes after each token."""

    outcomes: Tensor
    """``(T, k)`` int32, places in ``vocabulary``."""
    log_probs: Tensor
    """``(T, k)`` float32, at ``temperature``; all -inf at tokens before which no such label stands."""
    units: Tensor
    """``(T,)`` int32, the number, in its sequence, of the unit of two outcomes that the next token is in; -1: none."""
    unit_log_probs: Tensor
    """``(T,)`` float32, of that unit, at ``temperature``."""
    vocabulary: Tensor
    """``(shared,)`` int64, the ids of the new vocabulary that distributions are over."""
    temperature: float

    @property
    def judged(self) -> Tensor:
        """Which of the tokens a label that is compared follows, ``(T,)`` bool."""
        return self.log_probs.isfinite().any(dim=-1) | (self.units >= 0)

    def at(self, places: Tensor) -> dict[str, Tensor]:
        """The soft labels of some tokens, by the names of a batch's.

        Args:
            places: ``(…)`` int64, among the ``T`` tokens; -1: of a sequence that is not known.
        """
        known = places >= 0
        log_probs = self.log_probs[places].masked_fill(~known[..., None], -torch.inf)
        return {
            OUTCOMES: self.outcomes[places].long(),
            LOG_PROBS: log_probs,
            KNOWN: log_probs.isfinite().any(dim=-1),
            UNITS: self.units[places].long().masked_fill(~known, -1),
            UNIT_LOG_PROBS: self.unit_log_probs[places],
        }

    def batch(self, examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """The soft labels of encoded examples, padded on the right, by name."""
        return self.at(padded_places(self, examples))


def padded_places(known: PerToken, examples: Sequence[Mapping[str, Sequence[int]]]) -> Tensor:
    """Where each token of encoded examples is among the known ones, ``(batch, tokens)`` int64; -1: nowhere."""
    width = max(len(example["input_ids"]) for example in examples)
    places = torch.full((len(examples), width), -1)
    for row, example in zip(places, examples, strict=True):
        start = known.start(example["input_ids"])
        if start is not None:
            length = len(example["input_ids"])
            row[:length] = torch.arange(start, start + length)
    return places


def soft_labels(
    model: PreTrainedModel | PeftModel,
    aligner: RowAligner,
    rows: Sequence[Row],
    common: tuple[Tensor, Tensor],
    *,
    top: int = OUTCOMES_KEPT,
    temperature: float = 1.0,
    batch_size: int = 16,
) -> SoftLabels:
    """What the teacher gives to what comes next, wherever a unit of the rows begins.

    Args:
        model: the teacher, on its device; it reads the old tokenizer's tokens.
        aligner: of the teacher's tokenizer and of the one that is trained with.
        rows: those that are trained on.
        common: paired ids, old and new, of the tokens that both vocabularies hold (``CommonTokens``). The two tokens
            that end texts pair besides.
        top: most outcomes kept of a distribution.
        temperature: of the softmax, for teacher and student alike.
        batch_size: rows read at once.

    Raises:
        DataError: without usable rows.
    """
    old, new = _shared(aligner, common)
    translation = dict(zip(old.tolist(), new.tolist(), strict=True))
    aligned = aligner(rows)
    k = min(top, len(old))
    starts = torch.tensor([0, *(len(row.old["input_ids"]) for row in aligned)]).cumsum(0)
    outcomes = torch.zeros((int(starts[-1]), k), dtype=torch.int32)
    log_probs, said = torch.full(outcomes.shape, -torch.inf), torch.zeros(len(outcomes))
    for found in read_labels(model, [row.old for row in aligned], batch_size):
        shared = old.to(found.logits.device)
        logits = found.logits.float() / temperature
        likeliest = logits[:, shared].log_softmax(dim=-1).topk(k, dim=-1)
        at = starts[found.examples] + found.positions
        outcomes[at], log_probs[at] = likeliest.indices.int().cpu(), likeliest.values.cpu()
        said[at] = -cross_entropies(logits, found.targets).cpu()
    total = sum(len(row.new["input_ids"]) for row in aligned)
    result = SoftLabels(
        tokens=torch.tensor([token for row in aligned for token in row.new["input_ids"]]),
        lengths=torch.tensor([len(row.new["input_ids"]) for row in aligned]),
        outcomes=torch.zeros((total, k), dtype=torch.int32),
        log_probs=torch.full((total, k), -torch.inf),
        units=torch.full((total,), -1, dtype=torch.int32),
        unit_log_probs=torch.zeros(total),
        vocabulary=new,
        temperature=temperature,
    )
    begin = 0
    for row, source in zip(aligned, starts.tolist(), strict=False):
        for number, (theirs, ours) in enumerate(row.units):
            first, target = source + theirs.start - 1, begin + ours.start - 1  # what comes next is said a token before
            pair = row.old["input_ids"][theirs.start], row.new["input_ids"][ours.start]
            if len(theirs) == len(ours) == 1 and translation.get(pair[0]) == pair[1]:
                result.outcomes[target], result.log_probs[target] = outcomes[first], log_probs[first]
            else:
                result.units[target : target + len(ours)] = number
                result.unit_log_probs[target : target + len(ours)] = said[first : first + len(theirs)].sum()
        begin += len(row.new["input_ids"])
    return result


def _shared(aligner: RowAligner, common: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The ids of shared tokens that distributions are over."""
    old, new = common
    # ids beyond the tokenizer are padding of the embeddings
    real = old < len(aligner.old)
    old, new = old[real], new[real]
    ends = [tokenizer.eos_token_id for tokenizer in (aligner.old, aligner.new)]
    if None not in ends and not ((old == ends[0]) | (new == ends[1])).any():
        old, new = torch.cat([old, torch.tensor(ends[:1])]), torch.cat([new, torch.tensor(ends[1:])])
    return old, new


class Terms(NamedTuple):
    """What :func:`label_terms` gives of each label, ``(n, 3)``, by column."""

    cross_entropy: Tensor
    divergence: Tensor
    log_prob: Tensor


def label_terms(
    logits: Tensor,
    targets: Tensor,
    outcomes: Tensor,
    log_probs: Tensor,
    known: Tensor,
    *,
    vocabulary: Tensor,
    temperature: float,
    reverse: bool = False,
) -> Tensor:
    """The columns of :class:`Terms`, ``(n, 3)``, in nats and float32: cross-entropy; where the teacher's distribution
    is known its divergence, else 0; the label's log-probability at the temperature.

    Args:
        logits: ``(n, V)``.
        targets: ``(n,)`` int64, the labels.
        outcomes: ``(n, k)`` int64, from :meth:`SoftLabels.batch`, as the next two.
        log_probs: ``(n, k)`` float32.
        known: ``(n,)`` bool.
        vocabulary: ``(shared,)`` int64, the ids that distributions are over.
        temperature: of the softmax.
        reverse: KL(student ‖ teacher) in place of KL(teacher ‖ student).
    """
    hard = cross_entropies(logits, targets)
    warm = -hard if temperature == 1 else -cross_entropies(logits.float() / temperature, targets)
    teacher = log_probs[known]
    student = (logits[known][:, vocabulary.to(logits.device)].float() / temperature).log_softmax(dim=-1)
    student = student.gather(1, outcomes[known])
    if teacher.shape[-1] < len(vocabulary):
        teacher, student = _with_rest(teacher), _with_rest(student)
    divergence = torch.zeros_like(hard).masked_scatter(known, _divergence(teacher, student, reverse))
    return torch.stack([hard, divergence, warm], dim=-1)


def distilled_losses(
    terms: Tensor,
    known: Tensor,
    rows: Tensor,
    units: Tensor,
    unit_log_probs: Tensor,
    *,
    temperature: float,
    weight: float,
    reverse: bool = False,
) -> Tensor:
    """``(1 - w)·cross-entropy + w·T²·KL`` of each label, ``(n,)``, in nats and float32.

    The loss of Hinton et al. (arXiv 1503.02531). A unit's divergence is spread evenly over its labels. Labels that are
    not compared have the cross-entropy alone; with ``reverse``, where they are the student's own, nothing.

    Args:
        terms: ``(n, 3)``, from :func:`label_terms`.
        known: ``(n,)`` bool, as there.
        rows: ``(n,)`` int64, which row each label is of.
        units, unit_log_probs: ``(n,)``, from :meth:`SoftLabels.batch`.
        temperature: ``T``.
        weight: ``w``, from 0 to 1.
        reverse: KL(student ‖ teacher) in place of KL(teacher ‖ student).
    """
    found = Terms(*terms.unbind(dim=-1))
    divergence, joined = found.divergence, units >= 0
    if joined.any():
        pairs = torch.stack([rows[joined], units[joined]], dim=-1)
        _, group, sizes = pairs.unique(dim=0, return_inverse=True, return_counts=True)
        student = torch.zeros(len(sizes), device=terms.device).index_add(0, group, found.log_prob[joined])
        teacher = torch.zeros_like(student).index_copy(0, group, unit_log_probs[joined])
        both = [_with_rest(one[:, None]) for one in (teacher, student)]
        divergence = divergence.masked_scatter(joined, (_divergence(both[0], both[1], reverse) / sizes)[group])
    mixed = (1 - weight) * found.cross_entropy + weight * temperature**2 * divergence
    unjudged = torch.zeros_like(mixed) if reverse else found.cross_entropy
    return torch.where(known | joined, mixed, unjudged)


def _with_rest(log_probs: Tensor) -> Tensor:
    """Outcomes ``(n, k)`` and one more, which has what is left of the probability."""
    rest = (1 - log_probs.exp().sum(dim=-1, keepdim=True)).clamp_min(LEAST)
    return torch.cat([log_probs, rest.log()], dim=-1)


def _divergence(teacher: Tensor, student: Tensor, reverse: bool) -> Tensor:
    """KL of distributions over the same outcomes, ``(n,)``."""
    first, second = (student, teacher) if reverse else (teacher, student)
    return (first.exp() * (first - second)).sum(dim=-1)


def held_out_divergence(
    model: PreTrainedModel | PeftModel, soft: SoftLabels, examples: Sequence[dict[str, list[int]]], batch_size: int = 16
) -> float:
    """Mean KL(teacher ‖ student) of the labels that are compared, in nats a label; without gradients.

    Args:
        model: the student, on its device; its mode is restored.
        soft: the teacher's distributions.
        examples: encoded rows that ``soft`` knows.
        batch_size: rows read at once.
    """
    starts = torch.tensor([soft.start(example["input_ids"]) or 0 for example in examples])
    parts: list[Tensor] = []
    rows: list[Tensor] = []
    places: list[Tensor] = []
    for found in read_labels(model, examples, batch_size):
        at = starts[found.examples] + found.positions
        one = {name: value.to(found.logits.device) for name, value in soft.at(at).items()}
        taught = (one[name] for name in (OUTCOMES, LOG_PROBS, KNOWN))
        temperature, vocabulary = soft.temperature, soft.vocabulary
        terms = label_terms(found.logits, found.targets, *taught, vocabulary=vocabulary, temperature=temperature)
        parts.append(terms.cpu())
        rows.append(found.examples)
        places.append(at)
    at = torch.cat(places)
    one = soft.at(at)
    losses = distilled_losses(
        torch.cat(parts), one[KNOWN], torch.cat(rows), one[UNITS], one[UNIT_LOG_PROBS],
        temperature=1.0, weight=1.0,
    )  # fmt: skip
    return float(losses[soft.judged[at]].double().mean())
