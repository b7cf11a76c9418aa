"""Which of the teacher's rows are left out, and why."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from lorasuite.data import Kind
from lorasuite.teacher._generation import Answer
from lorasuite.teacher._settings import NGRAM, TeacherSettings

#: Why a row is left out, in the order the reasons are looked for.
Reason = Literal["empty", "truncated", "repetition", "duplicate", "near_duplicate"]

#: An answer of fewer words is never called repetitive or a near-duplicate: short answers are alike by nature.
MIN_WORDS = 12


class SyntheticRowFilter:
    """Tells why a synthetic row should be left out, knowing those kept before it."""

    def __init__(self, settings: TeacherSettings) -> None:
        self.settings = settings
        self._seen: set[tuple[str, str]] = set()
        #: group → n-gram → numbers of the kept rows that have it
        self._holders: dict[str, dict[tuple[str, ...], list[int]]] = {}
        self._kept = 0

    def reason(self, answer: Answer) -> Reason | None:
        """Why the row is left out; None keeps it, for the next ones to be compared with."""
        kind = answer.prompt.row.kind
        text = " ".join(answer.text.split())
        if not text:
            return "empty"
        if not answer.ended and not self._may_be_cut(kind):
            return "truncated"
        if not self.settings.filter:
            return None
        grams = _ngrams(text)
        if grams and 1 - len(set(grams)) / len(grams) > self.settings.max_repetition:
            return "repetition"
        # Answers of different prompts may be alike (yes or no); texts may not.
        group = "" if kind == "text" else answer.prompt.text
        if (group, text) in self._seen:
            return "duplicate"
        if grams and self._overlap(group, set(grams)) > self.settings.max_overlap:
            return "near_duplicate"
        self._seen.add((group, text))
        holders = self._holders.setdefault(group, {})
        for gram in set(grams):
            holders.setdefault(gram, []).append(self._kept)
        self._kept += 1
        return None

    def _may_be_cut(self, kind: Kind) -> bool:
        return self.settings.truncated == "keep" or (self.settings.truncated == "text" and kind == "text")

    def _overlap(self, group: str, grams: set[tuple[str, ...]]) -> float:
        """The largest share of the n-grams that one kept row has."""
        holders = self._holders.get(group, {})
        shared = Counter(row for gram in grams for row in holders.get(gram, ()))
        return max(shared.values(), default=0) / len(grams)


def _ngrams(text: str) -> list[tuple[str, ...]]:
    """The word n-grams of a text; none of a short one."""
    words = text.split()
    if len(words) < MIN_WORDS:
        return []
    return [tuple(words[at : at + NGRAM]) for at in range(len(words) - NGRAM + 1)]
