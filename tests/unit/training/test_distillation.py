"""Soft labels against a dense reference, and fine-tuning with them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from lorasuite.data import IGNORED, encode_rows
from lorasuite.training import (
    FinetuneSettings,
    RowAligner,
    SoftLabels,
    collate,
    finetune,
    held_out_divergence,
    label_rows,
    soft_labels,
)
from lorasuite.training._distillation import (
    KNOWN,
    LOG_PROBS,
    OUTCOMES,
    UNIT_LOG_PROBS,
    UNITS,
    distilled_losses,
    label_terms,
)
from tests.integration.tiny import digit_rows, tiny_lora, tiny_model, tiny_tokenizer


def aligner(old: Any = None, new: Any = None) -> RowAligner:
    """Of the tiny tokenizer and itself."""
    return RowAligner(old or tiny_tokenizer(), new or tiny_tokenizer(), 64)


def pairing(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of one tokenizer beside themselves."""
    return torch.arange(size), torch.arange(size)


def distilled(
    logits: torch.Tensor, labels: torch.Tensor, soft: SoftLabels, examples: list[dict[str, list[int]]],
    weight: float, reverse: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The summed loss of all labels."""
    at, positions, targets = label_rows(labels)
    taught = {name: part[at, positions] for name, part in soft.batch(examples).items()}
    first = [taught[name] for name in (OUTCOMES, LOG_PROBS, KNOWN)]
    terms = label_terms(
        logits[at, positions], targets, *first,
        vocabulary=soft.vocabulary, temperature=soft.temperature, reverse=reverse,
    )  # fmt: skip
    rest = (taught[KNOWN], at, taught[UNITS], taught[UNIT_LOG_PROBS])
    return distilled_losses(terms, *rest, temperature=soft.temperature, weight=weight, reverse=reverse).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_full_distributions_equal_the_dense_loss(temperature: float) -> None:
    teacher, student, tokenizer, rows = tiny_model(1), tiny_model(2), tiny_tokenizer(), digit_rows(6)
    size = len(tokenizer)
    soft = soft_labels(teacher, aligner(), rows, pairing(size), top=size, temperature=temperature, batch_size=4)
    examples = encode_rows(rows, tokenizer).examples
    batch = collate(examples)
    labels = batch.pop("labels")
    logits, target = student(**batch).logits, teacher(**batch).logits
    found = distilled(logits, labels, soft, examples, 0.3)
    used = labels[:, 1:] != IGNORED
    hard = functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="sum"
    )
    p = (target[:, :-1][used][:, :size] / temperature).log_softmax(-1)
    q = (logits[:, :-1][used][:, :size] / temperature).log_softmax(-1)
    kl = functional.kl_div(q, p, log_target=True, reduction="sum")
    reversed_kl = functional.kl_div(p, q, log_target=True, reduction="sum")
    assert float(found.detach()) == pytest.approx(float((0.7 * hard + 0.3 * temperature**2 * kl).detach()), rel=1e-5)
    other = distilled(logits, labels, soft, examples, 1.0, reverse=True)
    assert float(other.detach()) == pytest.approx(float((temperature**2 * reversed_kl).detach()), rel=1e-4)
    mean = held_out_divergence(student, soft, examples, batch_size=4)
    assert mean == pytest.approx(float(kl.detach()) / int(used.sum()), rel=1e-4)


def test_cut_distributions_bound_the_divergence_and_vanish_for_the_teacher_itself() -> None:
    teacher, student, tokenizer, rows = tiny_model(1), tiny_model(2), tiny_tokenizer(), digit_rows(6)
    examples = encode_rows(rows, tokenizer).examples
    batch = collate(examples)
    labels = batch.pop("labels")

    def divergence(model: torch.nn.Module, top: int) -> float:
        soft = soft_labels(teacher, aligner(), rows, pairing(len(tokenizer)), top=top)
        logits = model(**batch).logits
        return float(distilled(logits, labels, soft, examples, 1.0).detach())

    full = divergence(student, len(tokenizer))
    assert 0 < divergence(student, 2) < divergence(student, 8) < full
    assert abs(divergence(teacher, 4)) < 1e-3 * full


def test_rows_are_known_by_their_tokens_in_the_new_vocabulary() -> None:
    """Tokens are renumbered by the pairs; where a token has no partner its label is a unit of two outcomes; rows that
    are not known have the cross-entropy alone."""
    teacher, tokenizer, rows = tiny_model(1), tiny_tokenizer(), digit_rows(4)
    size = len(tokenizer)
    old = soft_labels(teacher, aligner(), rows, pairing(size))
    examples = encode_rows(rows, tokenizer).examples
    ids = examples[0]["input_ids"]
    assert ids in old and ids[:-1] not in old and int((old.units >= 0).sum()) == 0
    without = torch.arange(size) != ids[3]
    fewer = soft_labels(teacher, aligner(), rows, (pairing(size)[0][without],) * 2)
    assert int((fewer.units >= 0).sum()) == sum(example["input_ids"].count(ids[3]) for example in examples)
    assert torch.equal(fewer.judged, old.judged)
    place = (old.start(ids) or 0) + 2
    batch = collate(examples[:1])
    said = teacher(**batch).logits[0, 2].log_softmax(-1)[ids[3]]
    assert float(fewer.unit_log_probs[place]) == pytest.approx(float(said.detach()), rel=1e-5)
    stored = SoftLabels.from_tensors(old.tensors())
    assert stored.digest() == old.digest() != fewer.digest() and stored.temperature == 1.0
    stranger = {"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3], "attention_mask": [1] * 3}
    logits = torch.randn(1, 3, 40)
    plain = functional.cross_entropy(logits[0, :-1], torch.tensor([2, 3]), reduction="sum")
    found = distilled(logits, torch.tensor([stranger["labels"]]), old, [stranger], 0.9)
    assert float(found) == pytest.approx(float(plain), rel=1e-6)
    assert float(distilled(logits, torch.tensor([stranger["labels"]]), old, [stranger], 1.0, reverse=True)) == 0


@pytest.mark.parametrize("reverse", [False, True])
def test_a_unit_of_several_tokens_has_two_outcomes(reverse: bool) -> None:
    """Itself, with the product of its tokens' probabilities, and everything else."""
    ours = torch.tensor([-0.2, -0.4, -1.0, -0.7])  # two labels of a unit, one label of another row's, one of none
    terms = torch.stack([-ours, torch.zeros(4), ours], dim=-1)
    rows, units = torch.tensor([0, 0, 1, 1]), torch.tensor([3, 3, 3, -1])
    theirs = torch.tensor([-0.3, -0.3, -0.1, 0.0])
    found = distilled_losses(
        terms, torch.zeros(4, dtype=torch.bool), rows, units, theirs, temperature=1.0, weight=1.0, reverse=reverse
    )

    def divergence(teacher: float, student: float) -> float:
        p, q = (math.exp(one) for one in ((student, teacher) if reverse else (teacher, student)))
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    first, second = divergence(-0.3, -0.6), divergence(-0.1, -1.0)
    alone = 0.0 if reverse else 0.7
    assert found.tolist() == pytest.approx([first / 2, first / 2, second, alone], rel=1e-5)


def test_finetuning_distils(tmp_path: Path) -> None:
    """The first step's loss is the distilled one, accumulated or not, and the teacher is approached."""
    teacher, student, tokenizer, rows = tiny_model(1), tiny_model(2), tiny_tokenizer(), digit_rows(8)
    soft = soft_labels(teacher, aligner(), rows, pairing(len(tokenizer)))
    examples = encode_rows(rows, tokenizer).examples
    batch = collate(examples)
    labels = batch.pop("labels")
    expected = distilled(student(**batch).logits, labels, soft, examples, 1.0)
    for name, micro in (("whole", "auto"), ("parts", 2)):
        tuning = FinetuneSettings(
            batch_size=8, micro_batch_size=micro, epochs=12, learning_rate=3e-2, distillation=1.0, precision="fp32"
        )
        result = finetune(
            student, tokenizer, rows, tuning,
            adapter=None, lora=tiny_lora(), output=tmp_path / name, work_dir=tmp_path / "work", soft_labels=soft,
        )  # fmt: skip
        count = int((labels != IGNORED).sum())
        assert result.distilled == 8
        assert result.losses[0]["loss"] == pytest.approx(float(expected.detach()) / count, rel=1e-3)
        assert result.losses[-1]["loss"] < 0.5 * result.losses[0]["loss"]
