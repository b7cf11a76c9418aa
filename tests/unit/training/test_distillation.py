"""Soft labels against a dense reference, and fine-tuning with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from lorasuite.data import IGNORED, Row, encode_rows
from lorasuite.training import (
    FinetuneSettings,
    SoftLabels,
    collate,
    distilled_losses,
    finetune,
    label_rows,
    soft_labels,
)
from tests.integration.tiny import digit_rows, tiny_lora, tiny_model, tiny_tokenizer


def pairing(size: int, shift: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of one tokenizer beside themselves, or rotated by ``shift`` in the new vocabulary."""
    ids = torch.arange(size)
    return ids, (ids + shift) % size


def distilled(
    logits: torch.Tensor, labels: torch.Tensor, batch: dict[str, torch.Tensor], vocabulary: torch.Tensor,
    temperature: float, weight: float,
) -> torch.Tensor:  # fmt: skip
    """The summed loss of all labels."""
    at, positions, targets = label_rows(labels)
    taught = [batch[name][at, positions] for name in ("teacher_outcomes", "teacher_log_probs", "teacher_known")]
    return distilled_losses(
        logits[at, positions], targets, *taught, vocabulary=vocabulary, temperature=temperature, weight=weight
    ).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_full_distributions_equal_the_dense_loss(temperature: float) -> None:
    teacher, student, tokenizer, rows = tiny_model(1), tiny_model(2), tiny_tokenizer(), digit_rows(6)
    size = len(tokenizer)
    soft = soft_labels(teacher, tokenizer, rows, pairing(size), top=size, temperature=temperature, batch_size=4)
    examples = encode_rows(rows, tokenizer).examples
    batch = collate(examples)
    labels = batch.pop("labels")
    logits, target = student(**batch).logits, teacher(**batch).logits
    found = distilled(logits, labels, soft.batch(examples), soft.vocabulary, temperature, 0.3)
    used = labels[:, 1:] != IGNORED
    hard = functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="sum"
    )
    p = (target[:, :-1][used][:, :size] / temperature).log_softmax(-1)
    q = (logits[:, :-1][used][:, :size] / temperature).log_softmax(-1)
    kl = functional.kl_div(q, p, log_target=True, reduction="sum")
    assert float(found.detach()) == pytest.approx(float((0.7 * hard + 0.3 * temperature**2 * kl).detach()), rel=1e-5)


def test_cut_distributions_bound_the_divergence_and_vanish_for_the_teacher_itself() -> None:
    teacher, student, tokenizer, rows = tiny_model(1), tiny_model(2), tiny_tokenizer(), digit_rows(6)
    examples = encode_rows(rows, tokenizer).examples
    batch = collate(examples)
    labels = batch.pop("labels")

    def divergence(model: torch.nn.Module, top: int) -> float:
        soft = soft_labels(teacher, tokenizer, rows, pairing(len(tokenizer)), top=top)
        logits = model(**batch).logits
        return float(distilled(logits, labels, soft.batch(examples), soft.vocabulary, 1.0, 1.0).detach())

    full = divergence(student, len(tokenizer))
    assert 0 < divergence(student, 2) < divergence(student, 8) < full
    assert abs(divergence(teacher, 4)) < 1e-3 * full


def test_rows_are_known_by_their_tokens_in_the_new_vocabulary() -> None:
    """Renumbered tokens keep their distributions; rows of other tokens, or unknown ones, have none."""
    teacher, tokenizer, rows = tiny_model(1), tiny_tokenizer(), digit_rows(4)
    size = len(tokenizer)
    old = soft_labels(teacher, tokenizer, rows, pairing(size))
    moved = soft_labels(teacher, tokenizer, rows, pairing(size, shift=5))
    ids = encode_rows(rows, tokenizer).examples[0]["input_ids"]
    renumbered = [(token + 5) % size for token in ids]
    assert ids in old and renumbered in moved and ids not in moved
    assert torch.equal(moved.vocabulary[moved.outcomes.long()], (old.vocabulary[old.outcomes.long()] + 5) % size)
    without = torch.arange(size) != ids[3]
    fewer = soft_labels(teacher, tokenizer, [*rows, Row(kind="text", text="say")], (pairing(size)[0][without],) * 2)
    assert len(fewer.lengths) < 5 and ids not in fewer
    stored = SoftLabels.from_tensors(old.tensors())
    assert stored.digest() == old.digest() != moved.digest() and stored.temperature == 1.0
    stranger = {"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3], "attention_mask": [1] * 3}
    batch = old.batch([stranger])
    logits = torch.randn(1, 3, 40)
    plain = functional.cross_entropy(logits[0, :-1], torch.tensor([2, 3]), reduction="sum")
    found = distilled(logits, torch.tensor([stranger["labels"]]), batch, old.vocabulary, 1.0, 0.9)
    assert float(found) == pytest.approx(float(plain), rel=1e-6)


def test_finetuning_distils(tmp_path: Path) -> None:
    """The first step's loss is the distilled one, accumulated or not, and the teacher is approached."""
    teacher, student, tokenizer, rows = tiny_model(1), tiny_model(2), tiny_tokenizer(), digit_rows(8)
    soft = soft_labels(teacher, tokenizer, rows, pairing(len(tokenizer)))
    examples = encode_rows(rows, tokenizer).examples
    batch = collate(examples)
    labels = batch.pop("labels")
    expected = distilled(student(**batch).logits, labels, soft.batch(examples), soft.vocabulary, 1.0, 1.0)
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
