"""Where two tokenizers cut one answer alike: its shortest spans that begin and end at a token's border in both.

Such a span is what GOLD (TRL) calls an alignment group and SimCT (arXiv 2605.07711) a jointly tokenizable unit: the
finest parts of a text to which two models give probabilities of the same thing. Borders are byte offsets, so that a
character of several tokens is no obstacle. Special tokens have no text; those that stand between the same bytes pair in
their order, so that the end of an answer is a unit however each tokenizer writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lorasuite.bases import TokenBytes
from lorasuite.data import IGNORED, Row, encode_rows
from lorasuite.errors import DataError, Problem

Unit = tuple[range, range]


def units(old: Sequence[bytes], new: Sequence[bytes]) -> list[Unit]:
    """The units of two tokenizations, as ranges of tokens of each, in their order.

    One text may be the beginning of the other (one of them was cut off, or ends in markup that the other writes as a
    special token); spaces at the very beginning are of no account, as some tokenizers add one. Otherwise they are not
    of the same text, and there are no units.

    Args:
        old, new: the bytes of each token; none for a special one.
    """
    texts = [b"".join(tokens) for tokens in (old, new)]
    bare = [text.lstrip(b" ") for text in texts]
    shorter, longer = sorted(bare, key=len)
    if not longer.startswith(shorter):
        return []
    ahead = [len(text) - len(rest) for text, rest in zip(texts, bare, strict=True)]
    places = {border: place for place, border in enumerate(_borders(new, ahead[1]))}
    found: list[Unit] = []
    begin_old = begin_new = 0
    for place, border in enumerate(_borders(old, ahead[0])):
        if border in places:
            found.append((range(begin_old, place + 1), range(begin_new, places[border] + 1)))
            begin_old, begin_new = place + 1, places[border] + 1
    return found


def _borders(tokens: Sequence[bytes], ahead: int) -> Iterator[tuple[int, int]]:
    """Where each token ends: bytes before its end, and how many special tokens stand there up to it."""
    end, special = -ahead, 0
    for token in tokens:
        end, special = end + len(token), 0 if token else special + 1
        yield end, special


@dataclass(frozen=True)
class AlignedRow:
    """A row as both tokenizers encode it; ``units`` are ranges of positions in ``old`` and ``new`` that are labels."""

    old: dict[str, list[int]]
    new: dict[str, list[int]]
    units: list[Unit]


class RowAligner:
    """Rows as two tokenizers encode them for training.

    Args:
        old, new: the two tokenizers; each renders conversations by its own chat template.
        cutoff: tokens kept of a row.
    """

    def __init__(self, old: Any, new: Any, cutoff: int) -> None:
        self.old, self.new, self.cutoff = old, new, cutoff
        self._bytes = TokenBytes(old), TokenBytes(new)

    def __call__(self, rows: Sequence[Row]) -> list[AlignedRow]:
        """The rows that keep some of their answer in both and have a unit.

        Raises:
            DataError: if there is none, or as :func:`lorasuite.data.encode_rows`.
        """
        sides = []
        for tokenizer in (self.old, self.new):
            encoded = encode_rows(rows, tokenizer, self.cutoff)
            away = set(encoded.cut_off)
            sides.append(dict(zip((n for n in range(len(rows)) if n not in away), encoded.examples, strict=True)))
        found = []
        for n in sorted(sides[0].keys() & sides[1].keys()):
            both = [side[n] for side in sides]
            # the prompts of two chat templates are not of the same text, answers are
            answered = rows[n].kind in ("completion", "messages")
            begin = [next(t for t, x in enumerate(e["labels"]) if x != IGNORED) if answered else 0 for e in both]
            texts = [text(e["input_ids"][b:]) for text, e, b in zip(self._bytes, both, begin, strict=True)]
            moved = [
                (range(o.start + begin[0], o.stop + begin[0]), range(n.start + begin[1], n.stop + begin[1]))
                for o, n in units(*texts)
            ]
            labelled = [
                unit
                for unit in moved
                if all(e["labels"][t] != IGNORED for e, part in zip(both, unit, strict=True) for t in part)
            ]
            if labelled:
                found.append(AlignedRow(both[0], both[1], labelled))
        if not found:
            remedy = "Use rows whose text both tokenizers keep, or do without what the teacher says of their tokens"
            raise DataError([Problem("training rows", "no position of their two tokenizations pairs", remedy)])
        return found
