"""Losses of rows without gradients: length-sorted batches, every label token weighing the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from lorasuite.data import IGNORED, Row, encode_rows
from lorasuite.errors import NumericalError, Problem

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def validation_loss(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    cutoff: int,
    batch_size: int,
) -> float:
    """Mean loss in nats per label token over all rows, encoded as for training (so the EOS counts).

    Every token weighs the same, whatever the batch it falls in.

    Args:
        model: on its device; its mode is restored.
        tokenizer: the model's.
        rows: with their answers.
        cutoff: tokens kept of a row.
        batch_size: rows read at once.

    Raises:
        DataError: no usable rows.
        NumericalError: the loss is NaN or infinite.
    """
    total, count = 0.0, 0
    for _, labels, logits in read_batches(model, encode_rows(rows, tokenizer, cutoff).examples, batch_size):
        total += float(summed_loss(logits, labels))
        count += int((labels[:, 1:] != IGNORED).sum())
    loss = total / count
    if not math.isfinite(loss):
        raise NumericalError(
            [Problem("validation loss", f"is {loss}", "Lower the learning rate, or check the base model")]
        )
    return loss


def read_batches(
    model: PreTrainedModel | PeftModel, examples: Sequence[dict[str, list[int]]], batch_size: int
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """What a model in evaluation mode makes of encoded examples, without gradients.

    The longest come first: that pads least, and memory runs out at once or not at all.

    Yields:
        of each batch the positions of its examples, its labels ``(batch, tokens)`` and its logits
        ``(batch, tokens, V)``.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda n: len(examples[n]["input_ids"]), reverse=True)
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            batch = {key: value.to(device) for key, value in collate([examples[n] for n in members]).items()}
            labels = batch.pop("labels")
            with torch.no_grad():
                logits = model(**batch).logits
            yield members, labels, logits
    finally:
        model.train(training)


def collate(examples: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad examples on the right to the longest: three ``(batch, tokens)`` int64 tensors.

    Padding is token 0, masked in attention and labels: it needs no pad token and can never be seen.
    """
    width = max(len(example["input_ids"]) for example in examples)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {
        key: torch.tensor([example[key] + [value] * (width - len(example[key])) for example in examples])
        for key, value in fill.items()
    }


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed next-token cross-entropy in nats, in float32.

    Args:
        logits: ``(batch, tokens, V)``.
        labels: ``(batch, tokens)`` int64; those that are :data:`IGNORED` do not count.
    """
    loss: torch.Tensor = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss
