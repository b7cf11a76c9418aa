"""Whether the teacher is worth copying."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from lorasuite.data import IGNORED, UNFINISHED, Row, encode_pair, prompt_ids
from lorasuite.errors import DataError, Problem
from lorasuite.teacher._generation import Answer, context_length
from lorasuite.training import cross_entropies, read_labels

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


#: Least share of the old base's loss on the teacher's text that an adapter must take away to count as changing it; at
#: least so many bits per byte (a greedy text's loss is near zero with and without it).
MIN_CHANGE = 0.01
#: Rows that the teacher is judged by, at most, spread over all: more cost passes of every base, and their mean is the
#: same within what the decision turns on.
MOST_JUDGED = 100


class TextLoss(BaseModel):
    """The loss of a model on the answers of some rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    nats: float = Field(description="summed over the answers' tokens")
    bytes: int = Field(description="UTF-8 bytes of the answers")
    rows: int

    @property
    def bits_per_byte(self) -> float:
        """The loss over the answers' bytes, in bits; comparable between tokenizers, as a loss per token is not."""
        return self.nats / math.log(2) / self.bytes


def text_losses(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    batch_size: int = 16,
) -> list[TextLoss | None]:
    """The loss of each row's answer (of a text row, all of it), its end token included.

    Answers are scored given their prompts, so that models with different tokenizers are asked the same. It costs a
    forward pass without head, and the head at the answers' tokens.

    Args:
        model: on its device.
        tokenizer: the model's.
        rows: with their answers.
        batch_size: rows read at once.

    Returns:
        one a row; None where the row is longer than the model's context.

    Raises:
        DataError: a conversation, and the tokenizer has no chat template.
    """
    context = context_length(model)
    found: list[TextLoss | None] = [None] * len(rows)
    examples: list[tuple[int, dict[str, list[int]], int]] = []
    for index, row in enumerate(rows):
        head, tail, size = _scored(row, tokenizer)
        ids = head + tail
        if len(ids) > context or len(ids) < 2:
            continue
        labels = [IGNORED] * max(len(head), 1) + ids[max(len(head), 1) :]
        examples.append((index, {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}, size))
    nats = torch.zeros(len(examples), dtype=torch.float64)
    for read in read_labels(model, [example for _, example, _ in examples], batch_size):
        losses = cross_entropies(read.logits, read.targets)
        nats.index_add_(0, read.examples, losses.double().cpu())
    for (index, _, size), loss in zip(examples, nats.tolist(), strict=True):
        found[index] = TextLoss(nats=loss, bytes=size, rows=1)
    return found


def _scored(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], int]:
    """The tokens before a row's answer, those of the answer and its end, and the answer's UTF-8 bytes."""
    prompt, scored, suffix = row.target(tokenizer)
    special = row.kind != "messages"
    if prompt:
        head, tail = encode_pair(tokenizer, prompt, scored, special=special)
    else:
        head, tail = [], prompt_ids(tokenizer, scored, special=special)
    if not suffix and not row.extra.get(UNFINISHED) and tokenizer.eos_token_id is not None:
        tail = [*tail, int(tokenizer.eos_token_id)]
    return head, tail, len(scored.encode())


def written_losses(
    answers: Sequence[Answer], rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> list[TextLoss | None]:
    """What :func:`text_losses` of the writer would give for the rows of answers, without running it again.

    Args:
        answers: what was generated.
        rows: what became of each.
        tokenizer: the writer's.

    Returns:
        one a row; None where the tokens of the row's answer are not those that were generated: text was stripped, is
        cut otherwise when it is read again, or counts from its first word on.
    """
    found: list[TextLoss | None] = []
    for answer, row in zip(answers, rows, strict=True):
        head, tail, size = _scored(row, tokenizer)
        same = head == list(answer.prompt.ids) and tail == list(answer.ids[: len(tail)])
        whole = same and len(tail) >= answer.tokens
        found.append(TextLoss(nats=-sum(answer.log_probs[: len(tail)]), bytes=size, rows=1) if whole else None)
    return found


def losses_of_some(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    places: Iterable[int],
    *,
    batch_size: int,
) -> list[TextLoss | None]:
    """:func:`text_losses` of the rows at ``places``, and None for the others."""
    asked = list(places)
    read = text_losses(model, tokenizer, [rows[n] for n in asked], batch_size=batch_size)
    known = dict(zip(asked, read, strict=True))
    return [known.get(n) for n in range(len(rows))]


def judged(rows: int) -> range:
    """The places of at most :data:`MOST_JUDGED` of so many rows, spread evenly."""
    return range(0, rows, -(-rows // MOST_JUDGED) or 1)


def write_losses(losses: Mapping[str, Sequence[TextLoss | None]]) -> bytes:
    """Losses of the same rows by the model they are of, as JSON, for :func:`read_losses`."""
    dumped = {name: [loss and loss.model_dump(mode="json") for loss in found] for name, found in losses.items()}
    return json.dumps(dumped).encode()


def read_losses(file: Path) -> dict[str, list[TextLoss | None]]:
    """What :func:`write_losses` gave, from a file."""
    kept = json.loads(file.read_text(encoding="utf-8"))
    return {name: [loss and TextLoss.model_validate(loss) for loss in found] for name, found in kept.items()}


def total(losses: Sequence[TextLoss | None]) -> TextLoss:
    """The sum of rows' losses; those of None are left out."""
    known = [loss for loss in losses if loss is not None]
    return TextLoss(nats=sum(k.nats for k in known), bytes=sum(k.bytes for k in known), rows=len(known))


class Worth(BaseModel):
    """Whether the teacher is worth copying, and what that was decided by."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    worth: bool
    reason: str
    measured_on: Literal["training rows", "written rows"]
    scored_rows: int = Field(description="rows judged by that every model could read whole")
    bits_per_byte: dict[str, float] = Field(
        description="of old (the bare old base), teacher and new (the bare new base)"
    )


def judge_teacher(
    old: Sequence[TextLoss | None], teacher: Sequence[TextLoss | None], new: Sequence[TextLoss | None], labelled: bool
) -> Worth:
    """Whether the teacher is worth copying.

    On the user's rows it is where its loss is less than the bare new base's. On rows the teacher wrote that comparison
    says nothing, as no model predicts a text better than the one that wrote it; there the adapter must change the old
    base's loss, and the new base must not predict the text as well already. Whether the teacher's answers are right is
    not known without labels.

    Args:
        old: losses of the bare old base.
        teacher: of the old base with its adapter, on the same rows.
        new: of the bare new base.
        labelled: whether the rows are the user's.

    Raises:
        DataError: if no row can be read whole by every model.
    """
    whole = [n for n, found in enumerate(zip(old, teacher, new, strict=True)) if None not in found]
    if not whole:
        what = "no row is short enough for both bases to read whole"
        raise DataError([Problem("teacher", what, "Use shorter rows, or a smaller teacher.max_new_tokens")])
    bits = {
        name: total([losses[n] for n in whole]).bits_per_byte
        for name, losses in (("old", old), ("teacher", teacher), ("new", new))
    }
    shown = f"{bits['teacher']:.3f} bits per byte against the bare new base's {bits['new']:.3f}"
    if labelled:
        worth = bits["teacher"] < bits["new"]
        reason = f"the teacher {'beats' if worth else 'does not beat'} the bare new base: {shown}"
    elif bits["old"] - bits["teacher"] < MIN_CHANGE * max(bits["old"], 1.0):
        worth = False
        reason = f"the adapter hardly changes the old base: {bits['old']:.3f} bits per byte without it, {shown}"
    else:
        worth = bits["teacher"] < bits["new"]
        reason = f"{'there is something' if worth else 'nothing'} to learn from the teacher's text: {shown}"
    return Worth(
        worth=worth,
        reason=reason,
        measured_on="training rows" if labelled else "written rows",
        scored_rows=len(whole),
        bits_per_byte=bits,
    )
