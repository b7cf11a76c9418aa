"""Rows as token ids and labels for causal language models."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasuite.data._rows import UNFINISHED, Row
from lorasuite.errors import DataError, Problem

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: Label of a position that takes no part in the loss (PyTorch's ``ignore_index``, which transformers uses too).
IGNORED = -100


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a prompt exactly as at generation.

    With ``special`` the tokenizer adds what it adds (a BOS, for most), unless ``text`` already starts with
    the BOS, as lm-eval decides too. An EOS that some tokenizers append is dropped: a prompt is not finished.
    """
    special = special and not _starts_with_bos(tokenizer, text)
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    eos = tokenizer.eos_token_id
    if special and eos is not None and len(ids) > 1 and ids[-1] == eos:
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not bare or bare[-1] != eos:
            ids.pop()
    return ids


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, *, special: bool = True
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, as at generation, and of the completion that continues it.

    Both are tokenised as one string, since that is how running text merges. If the prompt's own ids are the
    start of the result — always so when the completion begins at a word boundary — the rest is the
    completion. Otherwise some token reaches across the boundary, or the prompt's last token merges
    differently before the completion; the model will be *given* the prompt's own ids, so these are kept, and
    the completion's ids are those that start at the boundary by the offset mapping, or the completion
    tokenised on its own where a token straddles it.
    """
    head = prompt_ids(tokenizer, prompt, special=special)
    joined = prompt_ids(tokenizer, prompt + completion, special=special)
    if joined[: len(head)] == head:
        return head, joined[len(head) :]
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(prompt + completion, add_special_tokens=False, return_offsets_mapping=True)
        boundary = len(prompt)
        offsets = [(int(start), int(end)) for start, end in encoded["offset_mapping"]]
        if not any(start < boundary < end for start, end in offsets):
            first = next((at for at, (start, end) in enumerate(offsets) if start >= boundary and end > start), None)
            if first is not None:
                return head, list(encoded["input_ids"])[first:]
    return head, list(tokenizer(completion, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class Encoded:
    """Training examples, and the indices of the rows left out because the cut-off took their whole completion."""

    examples: list[dict[str, list[int]]]
    cut_off: list[int]


class RowEncoder:
    """Rows as training examples, each row tokenized once however often it is asked for.

    Args:
        tokenizer: of the model that is trained.
        cutoff: tokens kept of a row.

    Raises:
        DataError: ``cutoff`` is below 2 tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, cutoff: int = 256) -> None:
        if cutoff < 2:
            raise DataError([Problem("cutoff", f"is {cutoff} tokens", "Use at least 2")])
        self._tokenizer, self._cutoff = tokenizer, cutoff
        self._known: dict[Row, dict[str, list[int]] | None] = {}

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        """As :func:`encode_rows`, of these rows."""
        if not rows:
            raise DataError([Problem("training rows", "there are none", "Give at least one row")])
        examples: list[dict[str, list[int]]] = []
        cut_off: list[int] = []
        for index, row in enumerate(rows):
            if row not in self._known:
                self._known[row] = self._example(row)
            example = self._known[row]
            if example is None:
                cut_off.append(index)
            else:
                examples.append(example)
        if not examples:
            what = f"no row of {len(rows)} keeps any of its completion within {self._cutoff} tokens"
            raise DataError([Problem("training rows", what, "Raise cutoff, or shorten the prompts")])
        if cut_off:
            logger.warning(
                "%d of %d rows keep no completion within %d tokens and are left out (first: row %d)",
                len(cut_off),
                len(rows),
                self._cutoff,
                cut_off[0] + 1,
            )
        return Encoded(examples=examples, cut_off=cut_off)

    def _example(self, row: Row) -> dict[str, list[int]] | None:
        """One row; None where the cut-off takes its whole completion."""
        tokenizer = self._tokenizer
        eos = tokenizer.eos_token_id
        prompt, scored, suffix = row.target(tokenizer)
        # Chat templates spell out their own special tokens, so the tokenizer must not add a second BOS.
        special = row.kind != "messages"
        if prompt:
            head, tail = encode_pair(tokenizer, prompt, scored + suffix, special=special)
        else:
            head, tail = [], prompt_ids(tokenizer, scored, special=special)
        ends = not suffix.strip() and not row.extra.get(UNFINISHED)
        if eos is not None and ends and (not tail or tail[-1] != eos):
            tail = [*tail, eos]
        ids = (head + tail)[: self._cutoff]
        labels = list(ids)
        if row.kind in ("completion", "messages"):
            labels[: len(head)] = [IGNORED] * min(len(head), len(ids))
        # The first token is never predicted; masked, so that counting labels counts predictions.
        labels[0] = IGNORED
        if len(head) >= len(ids) or all(label == IGNORED for label in labels):
            return None
        return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}


def encode_rows(rows: Sequence[Row] | Encoded, tokenizer: PreTrainedTokenizerBase, cutoff: int = 256) -> Encoded:
    """Encode rows for training; see :func:`encode`. Also says which rows had to be left out.

    Args:
        rows: those that are encoded already are given back.

    Raises:
        DataError: ``rows`` is empty, ``cutoff`` is below 2 tokens, no row keeps any of its completion, or (for
            ``messages``) as :meth:`Row.prompt_and_completion`.
    """
    return rows if isinstance(rows, Encoded) else RowEncoder(tokenizer, cutoff)(rows)


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, cutoff: int = 256) -> list[dict[str, list[int]]]:
    """Encode rows for causal-LM training: ``input_ids``, ``labels`` and ``attention_mask``, each ``(tokens,)``.

    Labels equal the input ids (the model shifts them) and are -100 where no loss is taken: the first token,
    and the prompt of ``completion`` and ``messages`` rows (as TRL does). Instruction rows learn prompt and
    answer (as the paper's scripts do), text rows all of it. BOS is added as the tokenizer adds it, EOS after
    the completion unless the chat template ends the turn itself, or the row has ``"unfinished": true``. Examples
    longer than ``cutoff`` tokens lose their end.

    Raises:
        DataError: as :func:`encode_rows`.
    """
    return encode_rows(rows, tokenizer, cutoff).examples


def end_tokens(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, suffixes: Sequence[str] = ()
) -> list[int]:
    """Ids that end an answer, the tokenizer's EOS first.

    They are that, the EOS of the model's generation settings, and the special token that a chat template ends turns
    with.

    Args:
        model: one that generates.
        tokenizer: the model's, with an EOS token.
        suffixes: what follows the answers in conversations (:meth:`Row.target`).
    """
    ends = [int(tokenizer.eos_token_id)]
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is not None:
        ends += [int(token) for token in (configured if isinstance(configured, list) else [configured])]
    for text in suffixes:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text.strip() else []
        if ids and ids[0] in tokenizer.all_special_ids:
            ends.append(int(ids[0]))
    return list(dict.fromkeys(ends))


def _starts_with_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the text spells out the BOS token at its start."""
    bos = tokenizer.bos_token
    return isinstance(bos, str) and bool(bos) and text.startswith(bos)
