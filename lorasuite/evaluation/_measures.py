"""What a gate judges by: one metric of the three arms that count, or each task by itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasuite.evaluation._arms import PUBLISHED_ARMS, Arm
from lorasuite.evaluation._comparison import Comparison
from lorasuite.evaluation._results import EvaluationSummary
from lorasuite.evaluation._tasks import TaskSummary

if TYPE_CHECKING:
    from lorasuite.evaluation._gate import Gate

#: lm-eval's metrics in the order of preference: a task's first one counts.
TASK_METRICS = ("acc_norm", "acc", "exact_match")

#: What metrics are called in sentences.
NAMES = {"exact_match": "exact match", "bits_per_byte": "bits per byte", "tasks": "mean task score"}

#: What the migrated adapter is measured against.
BOTH = (Arm.OLD_ADAPTER, Arm.NEW)

Interval = tuple[float, float]

#: Quantiles of the normal distribution: two-sided level 0.05, and power 0.8.
_Z_LEVEL, _Z_POWER = 1.959964, 0.841621


@dataclass(frozen=True)
class Measure:
    """One metric of the three arms that count, higher is better, and their paired comparisons."""

    metric: str
    task: str | None
    arm: Arm
    old: float
    bare: float
    found: float
    against_old: Comparison | None
    against_bare: Comparison | None
    #: Rows, or documents of tasks, that each arm was measured on; None where it was not recorded.
    rows: int | None

    @property
    def detectable(self) -> float | None:
        """The smallest difference from the old adapter that these rows tell: power 0.8, two-sided level 0.05.

        ``(z₀.₉₇₅ + z₀.₈)·s``, with the standard error ``s`` of the paired difference from the width of its interval
        (Cohen 1988, ch. 2).
        """
        interval = self.difference(self.against_old)
        return None if interval is None else (_Z_LEVEL + _Z_POWER) * (interval[1] - interval[0]) / (2 * _Z_LEVEL)

    @property
    def sign(self) -> int:
        """-1 where the metric is better when lower, else 1."""
        return -1 if self.metric == "bits_per_byte" else 1

    def difference(self, comparison: Comparison | None) -> Interval | None:
        """The interval of how much better the migrated arm is, from its comparison with another."""
        if comparison is None or comparison.interval is None:
            return None
        low, high = sorted(self.sign * end for end in comparison.interval)
        return low, high

    @property
    def negative_flips(self) -> float | None:
        """Share of what the old adapter got right; None where nothing is right or wrong."""
        found = self.against_old
        if found is None or found.both_right is None:
            return None
        flipped, right = len(found.negative_flips), found.both_right
        return flipped / max(1, flipped + right)


def measures_of(
    evaluation: Mapping[Arm, EvaluationSummary],
    tasks: Mapping[Arm, Mapping[str, TaskSummary]],
    gate: Gate,
    comparisons: Sequence[Comparison],
) -> list[Measure]:
    """What is judged: one metric, or every task by itself where the gate looks at intervals or single tasks."""
    found: list[Measure] = []
    if gate.tasks or (gate.lower_bound and gate.metric in ("auto", "tasks")):
        names = dict.fromkeys(task for scores in tasks.values() for task in _single(scores))
        each = [
            _measure(task, task, _task_scores(tasks, task), comparisons, _documents(tasks, [task])) for task in names
        ]
        found = [measure for measure in each if measure is not None]
        if gate.metric == "tasks" or (found and not evaluation):
            return found
    for metric in ("exact_match", "bits_per_byte", "tasks") if gate.metric == "auto" else (gate.metric,):
        scores = _scores(metric, evaluation, tasks)
        measure = _measure(metric, None, scores, comparisons, _rows(metric, evaluation, tasks))
        if measure is None:
            continue
        # an exact match that is the same everywhere tells nothing: look at the next metric, if there is one
        same = len({measure.found, measure.old, measure.bare}) == 1
        if gate.metric == "auto" and metric == "exact_match" and same:
            continue
        if metric == "tasks" and found:
            break
        return [*found, measure]
    return found


def _measure(
    metric: str, task: str | None, scores: Mapping[Arm, float], comparisons: Sequence[Comparison], rows: int | None
) -> Measure | None:
    arm = next((arm for arm in PUBLISHED_ARMS if arm in scores), None)
    if arm is None or not set(BOTH) <= set(scores):
        return None

    def compared(other: Arm) -> Comparison | None:
        for one in comparisons:
            same = one.task == task if task else one.task is None and one.metric == metric
            if (one.first, one.second) == (other, arm) and same:
                return one
        return None

    return Measure(
        metric=metric,
        task=task,
        arm=arm,
        old=scores[Arm.OLD_ADAPTER],
        bare=scores[Arm.NEW],
        found=scores[arm],
        against_old=compared(Arm.OLD_ADAPTER),
        against_bare=compared(Arm.NEW),
        rows=rows,
    )


def _rows(
    metric: str, evaluation: Mapping[Arm, EvaluationSummary], tasks: Mapping[Arm, Mapping[str, TaskSummary]]
) -> int | None:
    """The rows that every arm was measured on."""
    if metric == "tasks":
        return _documents(tasks, {task: None for scores in tasks.values() for task in _single(scores)})
    return min((result.n for result in evaluation.values()), default=None)


def _documents(tasks: Mapping[Arm, Mapping[str, TaskSummary]], names: Iterable[str]) -> int | None:
    """The documents of tasks that every arm was measured on; None where it is not recorded."""
    counts = [min((scores[task].n or 0 for scores in tasks.values() if task in scores), default=0) for task in names]
    return sum(counts) if counts and all(counts) else None


def _task_scores(tasks: Mapping[Arm, Mapping[str, TaskSummary]], task: str) -> dict[Arm, float]:
    found = {arm: _task_score(scores[task]) for arm, scores in tasks.items() if task in scores}
    return {arm: value for arm, value in found.items() if value is not None}


def _scores(
    metric: str, evaluation: Mapping[Arm, EvaluationSummary], tasks: Mapping[Arm, Mapping[str, TaskSummary]]
) -> dict[Arm, float]:
    """The metric by arm, higher is better, for the arms that have it."""
    if metric == "tasks":
        found = {arm: [_task_score(score) for score in _single(scores).values()] for arm, scores in tasks.items()}
        known = {arm: [value for value in values if value is not None] for arm, values in found.items()}
        return {arm: sum(values) / len(values) for arm, values in known.items() if values}
    sign = -1 if metric == "bits_per_byte" else 1
    scores = {arm: getattr(result, metric) for arm, result in evaluation.items()}
    return {arm: sign * float(score) for arm, score in scores.items() if score is not None}


def _single(scores: Mapping[str, TaskSummary]) -> dict[str, TaskSummary]:
    """The scores without those of groups, which are means of others."""
    return {task: score for task, score in scores.items() if not score.group}


def _task_score(score: TaskSummary) -> float | None:
    """A task's preferred metric; None where it has none of those that are better when higher."""
    by_name = {name.split(",")[0]: value for name, value in reversed(score.metrics.items())}
    return next((float(by_name[name]) for name in TASK_METRICS if name in by_name), None)
