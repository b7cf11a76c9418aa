"""What a task is scored by, from the answers that a cell keeps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lorasuite.evaluation import compare

Sample = Mapping[str, Any]

#: Of a task that is not named here the score is exact match.
EXACT = "exact match"
PARSED = "JSON equal"
CHRF = "chrF"
SCORED_BY = {"snips": PARSED, "e2e": CHRF}
#: Draws of the bootstrap of chrF, their seed, and what its interval holds.
RESAMPLES, SEED, CONFIDENCE = 2_000, 1234, 0.95


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


def difference(
    task: str, first: Sequence[Sample], second: Sequence[Sample]
) -> tuple[float, tuple[float, float] | None]:
    """How much higher a task's score is on the second answers to the same rows, and the paired bootstrap interval.

    As :func:`lorasuite.evaluation.compare` has it; chrF is of the rows of a draw together, as the score is of all.

    Raises:
        DataError: as ``compare``.
    """
    if SCORED_BY.get(task) == CHRF:
        return _chrf_difference(first, second)
    if SCORED_BY.get(task) == PARSED:
        first, second = ([{**sample, "exact_match": _equal(sample)} for sample in side] for side in (first, second))
    found = compare(first, second, metric="exact_match")
    return found.difference, found.interval


def _chrf_difference(first: Sequence[Sample], second: Sequence[Sample]) -> tuple[float, tuple[float, float]]:
    from sacrebleu.metrics import CHRF as Metric

    compare(first, second, metric="bits_per_byte")  # the same rows with the same targets
    metric = Metric()
    order = {sample["index"]: n for n, sample in enumerate(first)}
    sides = []
    for side in (first, sorted(second, key=lambda sample: order[sample["index"]])):
        outputs, targets = ([str(sample[name]).strip() for sample in side] for name in ("output", "target"))
        # what a subclass of sacrebleu's metrics computes of a row, and a score of the sums of it
        sides.append(np.array(metric._extract_corpus_statistics(outputs, [targets])))
    draws = np.random.default_rng(SEED).integers(len(first), size=(RESAMPLES, len(first)))
    both = [[metric._compute_score_from_stats(one[rows].sum(0)).score for one in sides] for rows in draws]
    low, high = np.quantile(np.diff(both)[:, 0] / 100, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    whole = [metric._compute_score_from_stats(one.sum(0)).score for one in sides]
    return (whole[1] - whole[0]) / 100, (float(low), float(high))


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
