"""Losses of rows without gradients: length-sorted batches, every label token weighing the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lorasuite.data import IGNORED, Encoded, Row, encode_rows
from lorasuite.errors import NumericalError, Problem
from lorasuite.training._head import LabelHead, cross_entropies, label_rows

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LabelLogits(NamedTuple):
    """What a model says at ``n`` positions that predict a label."""

    examples: Tensor
    """``(n,)`` int64, which example, on the CPU."""
    positions: Tensor
    """``(n,)`` int64, which token of it was read last; the label is the next one; on the CPU."""
    targets: Tensor
    """``(n,)`` int64, the labels, where the logits are."""
    logits: Tensor
    """``(n, V)``, in the model's dtype and on its device."""


def validation_loss(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row] | Encoded,
    cutoff: int,
    batch_size: int,
) -> float:
    """Mean loss in nats per label token over all rows, encoded as for training (so the EOS counts).

    Every token weighs the same, whatever the batch it falls in. It costs a forward pass without head, and the head at
    the label positions.

    Args:
        model: on its device; its mode is restored.
        tokenizer: the model's.
        rows: with their answers, as they are or encoded.
        cutoff: tokens kept of a row.
        batch_size: rows read at once.

    Raises:
        DataError: no usable rows.
        NumericalError: the loss is NaN or infinite.
    """
    total, count = 0.0, 0
    for found in read_labels(model, encode_rows(rows, tokenizer, cutoff).examples, batch_size):
        total += float(cross_entropies(found.logits, found.targets).double().sum())
        count += len(found.targets)
    loss = total / count
    if not math.isfinite(loss):
        raise NumericalError(
            [Problem("validation loss", f"is {loss}", "Lower the learning rate, or check the base model")]
        )
    return loss


def read_labels(
    model: PreTrainedModel | PeftModel, examples: Sequence[dict[str, list[int]]], batch_size: int
) -> Iterator[LabelLogits]:
    """What a model in evaluation mode says where encoded examples have labels, without gradients, some at a time.

    The longest come first: that pads least, and memory runs out at once or not at all.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda n: len(examples[n]["input_ids"]), reverse=True)
    training = model.training
    model.eval()
    try:
        head = LabelHead(model)
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            batch = collate([examples[n] for n in members])
            at, positions, targets = label_rows(batch.pop("labels"))
            with torch.no_grad():
                states = head.states({key: value.to(device) for key, value in batch.items()})
            rows = states[at.to(states.device), positions.to(states.device)]
            del states
            for logits, *rest in head.chunks(rows, torch.tensor(members)[at], positions, targets):
                yield LabelLogits(rest[0], rest[1], rest[2].to(logits.device), logits)
    finally:
        model.train(training)


def collate(examples: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad examples on the right to the longest: ``(batch, tokens)`` int64 tensors; of labels where they have them.

    Padding is token 0, masked in attention and labels: it needs no pad token and can never be seen.
    """
    width = max(len(example["input_ids"]) for example in examples)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {
        key: torch.tensor([example[key] + [value] * (width - len(example[key])) for example in examples])
        for key, value in fill.items()
        if key in examples[0]
    }
