"""What a task is scored by, from the answers that a cell keeps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

Sample = Mapping[str, Any]

#: Of a task that is not named here the score is exact match.
EXACT = "exact match"
PARSED = "JSON equal"
CHRF = "chrF"
SCORED_BY = {"snips": PARSED, "e2e": CHRF}


def score(task: str, samples: Iterable[Sample]) -> float | None:
    """A task's score, from 0 to 1; None where nothing was answered."""
    given = list(samples)
    if not given or any(sample["output"] is None for sample in given):
        return None
    by = SCORED_BY.get(task, EXACT)
    if by == PARSED:
        return sum(_equal(sample) for sample in given) / len(given)
    if by == CHRF:
        from sacrebleu import corpus_chrf

        outputs, targets = ([str(sample[name]).strip() for sample in given] for name in ("output", "target"))
        return float(corpus_chrf(outputs, [targets]).score) / 100
    return sum(bool(sample["exact_match"]) for sample in given) / len(given)


def slot_f1(samples: Iterable[Sample]) -> float | None:
    """F1 of all slots of all rows together, a slot being its name and its value; None where no row has any.

    An answer that is no JSON object has no slots.
    """
    found, wanted, right = 0, 0, 0
    for sample in samples:
        ours, theirs = (_slots(str(sample[name] or "")) for name in ("output", "target"))
        found, wanted = found + ours.total(), wanted + theirs.total()
        right += (ours & theirs).total()
    return 2 * right / (found + wanted) if wanted else None


def _equal(sample: Sample) -> bool:
    """Whether an answer says the same as the target: key order and spaces do not matter."""
    answer = _parsed(str(sample["output"]))
    return answer is not None and answer == _parsed(str(sample["target"]))


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _slots(text: str) -> Counter[tuple[str, str]]:
    slots = (_parsed(text) or {}).get("slots")
    return Counter((name, str(value)) for name, value in slots.items()) if isinstance(slots, dict) else Counter()
