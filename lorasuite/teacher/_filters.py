"""Which written rows are left out, and why."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from lorasuite.data import Kind
from lorasuite.teacher._generation import _Written
from lorasuite.teacher._settings import NGRAM, SHORTEST, Reason, TeacherSettings

if TYPE_CHECKING:
    pass


class _Sieve:
    """Tells why a written row should be left out, knowing those kept before it."""

    def __init__(self, settings: TeacherSettings) -> None:
        self.settings = settings
        self.seen: set[tuple[str, str]] = set()
        #: group → n-gram → the kept rows that have it
        self.holders: dict[str, dict[tuple[str, ...], list[int]]] = {}
        self.kept = 0

    def reason(self, written: _Written) -> Reason | None:
        """Why the row is left out; None keeps it, for the next ones to be compared with."""
        kind = written.attempt.row.kind
        answer = " ".join(written.answer.split())
        if not answer:
            return "empty"
        if not written.ended and not self._may_be_cut(kind):
            return "truncated"
        if not self.settings.filter:
            return None
        grams = _ngrams(answer)
        if grams and 1 - len(set(grams)) / len(grams) > self.settings.max_repetition:
            return "repetition"
        # Answers of different prompts may be alike (yes or no); texts may not.
        group = "" if kind == "text" else written.attempt.text
        if (group, answer) in self.seen:
            return "duplicate"
        if grams and self._overlap(group, set(grams)) > self.settings.max_overlap:
            return "near_duplicate"
        self.seen.add((group, answer))
        holders = self.holders.setdefault(group, {})
        for gram in set(grams):
            holders.setdefault(gram, []).append(self.kept)
        self.kept += 1
        return None

    def _may_be_cut(self, kind: Kind) -> bool:
        return self.settings.truncated == "keep" or (self.settings.truncated == "text" and kind == "text")

    def _overlap(self, group: str, grams: set[tuple[str, ...]]) -> float:
        """The largest share of the n-grams that one kept row has."""
        holders = self.holders.get(group, {})
        shared = Counter(row for gram in grams for row in holders.get(gram, ()))
        return max(shared.values(), default=0) / len(grams)


def _ngrams(text: str) -> list[tuple[str, ...]]:
    """The word n-grams of a text; none of a short one."""
    words = text.split()
    if len(words) < SHORTEST:
        return []
    return [tuple(words[at : at + NGRAM]) for at in range(len(words) - NGRAM + 1)]
