"""Paired comparison of two arms on the same samples: what one adapter gets right and the other wrong.

A record is one line of a ``samples.jsonl`` that an evaluation on held-out rows or on tasks wrote.
A sample is identified by its ``task`` (absent for held-out rows) and its ``index``, the row's number from 0 in the
task's documents; :func:`sample_id` makes ``"task/index"`` or ``"index"`` of them. Scores are under ``scores`` by
lm-eval's name (``"exact_match,answer"``, ``"acc,none"``) for tasks, and fields of their own for held-out rows
(``exact_match``; ``loglikelihood`` and ``bytes``, from which ``bits_per_byte`` comes).

Everything here is plain arithmetic on those records: no model, no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from lorasuite.errors import DataError, Problem

Record = Mapping[str, Any]

#: Bootstrap draws of the samples, and their seed.
RESAMPLES, SEED = 10_000, 1234
CONFIDENCE = 0.95
#: Flips told with prompt and outputs; the rest by their ids alone.
EXAMPLES = 5

#: Metrics of held-out rows and tasks in the order of preference: the first that both arms have is compared.
PREFERRED = ("acc_norm", "acc", "exact_match", "bits_per_byte")


class Comparison(BaseModel):
    """How the second of two arms differs from the first, on the samples of one task (or the held-out rows)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    first: str = Field(description="name of the arm compared with")
    second: str = Field(description="name of the arm that is compared")
    task: str | None = Field(description="None for held-out rows")
    metric: str = Field(description="as the records name it, or bits_per_byte")
    n: int = Field(description="samples")
    first_score: float
    second_score: float
    difference: float = Field(description="second minus first")
    interval: tuple[float, float] | None = Field(
        description="paired percentile bootstrap of the difference; None for fewer than two samples"
    )
    confidence: float = CONFIDENCE
    mcnemar_p: float | None = Field(description="exact, two-sided; None where scores are not right or wrong, as below")
    both_right: int | None
    both_wrong: int | None
    negative_flips: list[str] = Field(description="ids of what the first got right and the second gets wrong")
    positive_flips: list[str] = Field(description="ids of what the first got wrong and the second gets right")
    examples: list[dict[str, Any]] = Field(description="the first negative flips: id, prompt, target, both outputs")


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The records of a ``samples.jsonl``.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(Problem(str(path), f"is not a file of samples ({error})", "Evaluate again.")) from None


def sample_id(record: Record) -> str:
    """``"task/index"``, or ``"index"`` for a held-out row."""
    task = record.get("task")
    return f"{task}/{record['index']}" if task else str(record["index"])


def metrics(records: Sequence[Record]) -> list[str]:
    """The metrics that every record has, the preferred one first."""
    common = [set(_metrics(record)) for record in records]
    names = set.intersection(*common) if common else set()
    places = {name: at for at, name in enumerate(PREFERRED)}
    return sorted(names, key=lambda name: (places.get(name.split(",")[0], len(places)), name))


def compare(
    first: Sequence[Record],
    second: Sequence[Record],
    *,
    metric: str | None = None,
    names: tuple[str, str] = ("first", "second"),
    examples: int = EXAMPLES,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Comparison:
    """Compare two arms' records of the same samples, in whatever order either has them.

    A metric of nothing but 0 and 1 also gets McNemar's exact test: the smaller count of flips against a binomial of
    one half (McNemar 1947). The interval is the percentile bootstrap over samples, both arms resampled together (Efron
    & Tibshirani 1993, ch. 13); for ``bits_per_byte``, a ratio of sums, the ratios are resampled.

    Args:
        first: records of the arm compared with.
        second: records of the arm that is compared.
        metric: None: the first of :func:`metrics` that both have.
        names: of the arms.
        examples: negative flips that are told with prompt and outputs.
        resamples: draws of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: no records, samples of one arm only, another target for the same sample, or no metric in common.
    """
    a, b = _keyed(first, names[0]), _keyed(second, names[1])
    _check(a, b, names)
    known = [name for name in metrics(list(a.values())) if name in metrics(list(b.values()))]
    chosen = metric or next(iter(known), None)
    if chosen is None or chosen not in known:
        what = f"have no metric {metric!r} in common" if metric else "have no metric in common"
        raise DataError(Problem(f"{names[0]} and {names[1]}", what, f"Both have: {', '.join(known) or 'none'}."))
    ids = list(a)
    table = np.array([[*_value(a[id_], chosen), *_value(b[id_], chosen)] for id_ in ids], dtype=float)
    one, other = table[:, :2], table[:, 2:]
    score_one, score_other = (float(side[:, 0].sum() / side[:, 1].sum()) for side in (one, other))
    flips: dict[str, Any] = {"mcnemar_p": None, "both_right": None, "both_wrong": None}
    negative: list[str] = []
    positive: list[str] = []
    if chosen != "bits_per_byte" and set(np.unique(table[:, [0, 2]])) <= {0.0, 1.0}:
        right, still = table[:, 0] == 1, table[:, 2] == 1
        negative = [id_ for id_, flipped in zip(ids, right & ~still, strict=True) if flipped]
        positive = [id_ for id_, flipped in zip(ids, ~right & still, strict=True) if flipped]
        flips = {
            "mcnemar_p": mcnemar(len(negative), len(positive)),
            "both_right": int((right & still).sum()),
            "both_wrong": int((~right & ~still).sum()),
        }
    return Comparison(
        first=names[0],
        second=names[1],
        task=next(iter(a.values())).get("task"),
        metric=chosen,
        n=len(ids),
        first_score=score_one,
        second_score=score_other,
        difference=score_other - score_one,
        interval=_interval(one, other, resamples, seed),
        negative_flips=negative,
        positive_flips=positive,
        examples=[_example(a[id_], b[id_]) for id_ in negative[:examples]],
        **flips,
    )


def compare_arms(
    arms: Mapping[str, Mapping[str, Sequence[Record]]], pairs: Iterable[tuple[str, str]] | None = None
) -> list[Comparison]:
    """Compare arms on every task (or set of rows) that both have.

    Args:
        arms: records by arm and task.
        pairs: names of the arms to compare, first and second; those of which an arm is missing are left out. None: each
            arm with all after it.

    Raises:
        DataError: as :func:`compare`.
    """
    wanted = combinations(arms, 2) if pairs is None else pairs
    return [
        compare(arms[first][task], arms[second][task], names=(first, second))
        for first, second in wanted
        if first in arms and second in arms
        for task in arms[first]
        if task in arms[second]
    ]


def compare_costs(
    old: Sequence[Record],
    old_adapted: Sequence[Record],
    new: Sequence[Record],
    new_adapted: Sequence[Record],
    *,
    metric: str,
) -> tuple[float, float, tuple[float, float] | None]:
    """What two adapters change of a metric, each on its own base, and the interval of how much more the second does.

    Args:
        old: records of the first base, bare.
        old_adapted: of the same with its adapter.
        new: records of the second base, bare.
        new_adapted: of the same with its adapter.
        metric: of :func:`metrics` that all have.

    Returns:
        the two changes (adapted minus bare), and the paired bootstrap interval of the second minus the first; None for
        fewer than two samples.

    Raises:
        DataError: no records, or not of the same samples.
    """
    names = ("the old base", "the old base with its adapter", "the new base", "the new base with its adapter")
    arms = [_keyed(records, name) for records, name in zip((old, old_adapted, new, new_adapted), names, strict=True)]
    for arm, name in zip(arms[1:], names[1:], strict=True):
        _check(arms[0], arm, (names[0], name))
    values = np.array([[_value(arm[id_], metric) for id_ in arms[0]] for arm in arms], dtype=float)
    first, second = (
        np.stack([values[adapted, :, 0] - values[adapted - 1, :, 0], values[adapted, :, 1]], axis=1)
        for adapted in (1, 3)
    )
    changes = [float(change[:, 0].sum() / change[:, 1].sum()) for change in (first, second)]
    return changes[0], changes[1], _interval(first, second, RESAMPLES, SEED)


def mcnemar(negative: int, positive: int) -> float:
    """Two-sided exact p-value that flips one way and the other are equally likely; 1 where there are none."""
    from scipy.stats import binomtest

    flips = negative + positive
    return float(binomtest(negative, flips, 0.5).pvalue) if flips else 1.0


def _keyed(records: Sequence[Record], name: str) -> dict[str, Record]:
    keyed = {sample_id(record): record for record in records}
    if not keyed:
        raise DataError(Problem(name, "has no samples", "Evaluate it on at least one."))
    if len(keyed) < len(records):
        what = f"has {len(records) - len(keyed)} samples twice"
        raise DataError(Problem(name, what, "Give the records of one evaluation."))
    return keyed


def _check(first: Mapping[str, Record], second: Mapping[str, Record], names: tuple[str, str]) -> None:
    """DataError unless both are of the same samples."""
    where = f"{names[0]} and {names[1]}"
    apart = sorted(set(first) ^ set(second))
    if apart:
        what = f"{len(apart)} samples are in one of them only (such as {apart[0]})"
        raise DataError(Problem(where, what, "Evaluate both on the same rows, with the same limit."))
    unlike = [id_ for id_, record in first.items() if record.get("target") != second[id_].get("target")]
    if unlike:
        what = f"sample {unlike[0]} has another target in each ({len(unlike)} of {len(first)} samples)"
        raise DataError(Problem(where, what, "Evaluate both on the same rows."))


def _metrics(record: Record) -> list[str]:
    found = [name for name, value in record.get("scores", {}).items() if isinstance(value, (int, float))]
    if record.get("exact_match") is not None:
        found.append("exact_match")
    if record.get("loglikelihood") is not None and record.get("bytes"):
        found.append("bits_per_byte")
    return found


def _value(record: Record, metric: str) -> tuple[float, float]:
    """Numerator and denominator of the sample's part in the score, which is the ratio of their sums."""
    if metric == "bits_per_byte":
        return -float(record["loglikelihood"]) / math.log(2), float(record["bytes"])
    scores = record.get("scores", {})
    return float(scores[metric] if metric in scores else record[metric]), 1.0


def _interval(first: Any, second: Any, resamples: int, seed: int) -> tuple[float, float] | None:
    from scipy.stats import bootstrap

    if len(first) < 2:
        return None

    def difference(a: Any, wa: Any, b: Any, wb: Any, axis: int) -> Any:
        return b.sum(axis) / wb.sum(axis) - a.sum(axis) / wa.sum(axis)

    found = bootstrap(
        (*first.T, *second.T),
        difference,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, 2_000_000 // len(first)),  # bounds the memory of the draws
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def _example(first: Record, second: Record) -> dict[str, Any]:
    return {
        "id": sample_id(first),
        "prompt": second.get("prompt"),
        "target": first.get("target"),
        "first_output": first.get("output"),
        "second_output": second.get("output"),
    }
