"""Positions of two tokenizations of one text at which both models have read the same prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorasuite.bases._tracing import LoadedBase
from lorasuite.errors import DataError, Problem


def paired_positions(old: Sequence[tuple[int, int]], new: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Positions of two tokenizations of one text whose tokens end at the same character.

    A causal model at such a position has read the same prefix in both. Tokens without text (special tokens) pair with
    nothing; of several tokens that end at one character (bytes of it) the last counts.

    Args:
        old, new: ``(start, end)`` character offsets of each token.
    """
    ends = {end: position for position, (start, end) in enumerate(old) if end > start}
    last = {end: position for position, (start, end) in enumerate(new) if end > start}
    return [(ends[end], position) for end, position in sorted(last.items()) if end in ends]


#: Texts in a forward pass.
BATCH = 32


@dataclass(frozen=True)
class Batch:
    """Some texts in both tokenizations, padded on the right, and the positions of both that pair.

    ``old`` and ``new``: token ids ``(texts, tokens)``; ``old_rows`` and ``new_rows``: the numbers of the texts and of
    the positions that pair, ``(pairs,)`` each. Under causal attention nothing before the padding sees it, so no mask is
    needed.
    """

    old: Tensor
    new: Tensor
    old_rows: tuple[Tensor, Tensor]
    new_rows: tuple[Tensor, Tensor]


def text_batches(
    texts: Sequence[str],
    old: LoadedBase,
    new: LoadedBase,
    cutoff: int,
    size: int = BATCH,
    subject: str = "calibration",
) -> list[Batch]:
    """Texts in both tokenizations, ``size`` a batch, by length; those without a pair are left out.

    Args:
        cutoff: tokens of a text read at most, in each tokenization.
        subject: what the user calls the texts.

    Raises:
        DataError: if no two positions pair.
    """
    encoded = []
    for text in texts:
        both = [
            base.tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=cutoff) for base in (old, new)
        ]
        pairs = paired_positions(*(e["offset_mapping"] for e in both))
        if pairs:
            encoded.append((both[0]["input_ids"], both[1]["input_ids"], pairs))
    if not encoded:
        raise DataError(Problem(subject, "no position of the two tokenizations pairs", "Give texts of several words."))
    encoded.sort(key=lambda item: len(item[1]))
    found = []
    for start in range(0, len(encoded), size):
        part = encoded[start : start + size]
        which = torch.tensor([n for n, (_, _, pairs) in enumerate(part) for _ in pairs])
        at = torch.tensor([pair for _, _, pairs in part for pair in pairs])
        ids = [
            torch.nn.utils.rnn.pad_sequence([torch.tensor(p[which_base]) for p in part], True) for which_base in (0, 1)
        ]
        found.append(Batch(ids[0], ids[1], (which, at[:, 0]), (which, at[:, 1])))
    return found


@dataclass(frozen=True)
class TextBatch:
    """Some texts of one tokenization, padded on the right.

    ``ids``: token ids ``(texts, tokens)``; ``lengths``: each text's own tokens ``(texts,)``; ``numbers``: which text
    each is ``(texts,)``.
    """

    ids: Tensor
    lengths: Tensor
    numbers: Tensor


def length_batches(texts: Sequence[str], tokenizer: Any, cutoff: int, size: int = BATCH) -> list[TextBatch]:
    """Texts in one tokenization, at most ``cutoff`` tokens each, by length, ``size`` of them a batch.

    Raises:
        DataError: naming each text that has no token.
    """
    encoded = [ids[:cutoff] for ids in tokenizer(list(texts))["input_ids"]]
    empty = [number for number, ids in enumerate(encoded) if not ids]
    if empty:
        raise DataError([Problem(f"calibration text {number}", "has no token", "Remove it.") for number in empty])
    order = sorted(range(len(encoded)), key=lambda number: len(encoded[number]))
    found = []
    for start in range(0, len(order), size):
        part = order[start : start + size]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(encoded[number]) for number in part], True)
        found.append(TextBatch(ids, torch.tensor([len(encoded[number]) for number in part]), torch.tensor(part)))
    return found
