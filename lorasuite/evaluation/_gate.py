"""The gate: from a migration's measured arms to a verdict on the adapter.

An adapter is measured by the share it keeps of the old adapter's *lead*: how much better the old base with its adapter
is than the bare new base. One that keeps most of the lead ships, one that keeps some of it needs (more) fine-tuning,
and one that keeps next to nothing is to be trained anew. Beside the lead a gate may ask for a gain over the bare new
base, and bound what the old adapter got right and the new one gets wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lorasuite.evaluation._arms import PUBLISHED_ARMS, Arm
from lorasuite.evaluation._comparison import Comparison
from lorasuite.evaluation._results import EvaluationSummary
from lorasuite.evaluation._tasks import TaskSummary

Verdict = Literal["ship", "needs-finetune", "retrain", "unmeasured"]
GateMetric = Literal["auto", "exact_match", "bits_per_byte", "tasks"]
#: From best to worst; what was not measured cannot be relied on.
VERDICTS: tuple[Verdict, ...] = ("ship", "needs-finetune", "retrain", "unmeasured")

#: lm-eval's metrics in the order of preference: a task's first one counts.
TASK_METRICS = ("acc_norm", "acc", "exact_match")

#: What metrics are called in sentences.
NAMES = {"exact_match": "exact match", "bits_per_byte": "bits per byte", "tasks": "mean task score"}

#: What the migrated adapter is measured against.
BOTH = (Arm.OLD_ADAPTER, Arm.NEW)

Interval = tuple[float, float]


class Thresholds(BaseModel):
    """What an adapter has to reach."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ship: float = Field(0.9, description="share of the old adapter's lead kept from which the adapter ships")
    finetune: float = Field(0.2, description="share from which more fine-tuning is worth a try; below it: retrain")
    min_gain_over_bare: float | None = Field(
        None, description="smallest gain over the bare new base, in the metric's own unit (bits per byte: saved)"
    )
    max_negative_flips: float | None = Field(
        None, ge=0, le=1, description="largest share of what the old adapter got right that the new one gets wrong"
    )
    lower_bound: bool = Field(
        False, description="shares and gains count by the lower end of their 95 % interval, and every task by itself"
    )


class Gate(Thresholds):
    """Thresholds, as shares of the old adapter's lead over the bare new base."""

    metric: GateMetric = Field(
        "auto", description="exact_match, bits_per_byte, tasks (mean over lm-eval tasks), or auto: the first there is"
    )
    tasks: dict[str, dict[str, float | bool | None]] = Field(
        {},
        description="thresholds of single tasks by name; with any, each task is judged by itself and the worst counts",
    )

    def model_post_init(self, _context: Any) -> None:
        """Refuse an unknown threshold of a task now, not after the migration."""
        for name in self.tasks:
            self.of(name)

    def of(self, task: str | None) -> Thresholds:
        """The thresholds of a task: its own over the common ones."""
        common = {name: getattr(self, name) for name in Thresholds.model_fields}
        return Thresholds.model_validate(common | self.tasks.get(task or "", {}))


class Check(BaseModel):
    """One requirement and how it came out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="what is required, in words")
    task: str | None = None
    value: float | None = Field(description="what was measured; None where it could not be")
    interval: Interval | None = None
    threshold: float
    passed: bool


class Judgement(BaseModel):
    """A verdict, the numbers it rests on (higher is better: bits per byte are negated), and why in words."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    verdict: Verdict
    reason: str
    metric: str | None = None
    task: str | None = Field(None, description="the task that decided, where tasks were judged one by one")
    arm: Arm | None = None
    kept: float | None = Field(None, description="share of the lead that was kept; None where there was no lead")
    kept_interval: Interval | None = Field(None, description="of the kept share, with the lead as it was measured")
    old: float | None = None
    bare: float | None = None
    migrated: float | None = None
    checks: list[Check] = []


@dataclass(frozen=True)
class _Measure:
    """One metric of the three arms that count, higher is better, and their paired comparisons."""

    metric: str
    task: str | None
    arm: Arm
    old: float
    bare: float
    found: float
    against_old: Comparison | None
    against_bare: Comparison | None

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


def judge(
    evaluation: Mapping[Arm, EvaluationSummary],
    tasks: Mapping[Arm, Mapping[str, TaskSummary]],
    gate: Gate | None = None,
    comparisons: Sequence[Comparison] = (),
) -> Judgement:
    """The verdict on a migration.

    The published adapter is the arm ``migrated+lft`` where there is one, else ``migrated``. Where the bare new base
    is at least as good as the old base with its adapter there is no lead to keep: then the adapter ships if it makes
    the new base better still. An interval that a threshold asks for and nobody measured counts as not reached.

    Args:
        evaluation: results on the held-out rows.
        tasks: for each arm its scores by task or group.
        gate: the thresholds; the default ones if None.
        comparisons: of the published arm with others, sample by sample.
    """
    gate = gate or Gate()
    measures = _measures(evaluation, tasks, gate, comparisons)
    missing = sorted(set(gate.tasks) - {measure.task or "" for measure in measures})
    if not measures or missing:
        why = f"the gate asks for {', '.join(missing)}, which was not measured" if missing else (
            "no held-out rows or tasks were given to measure it on"
        )  # fmt: skip
        return Judgement(verdict="unmeasured", reason=why)
    judged = [_judge(measure, gate.of(measure.task)) for measure in measures]
    worst = max(judged, key=lambda one: VERDICTS.index(one.verdict))
    return worst.model_copy(update={"checks": [check for one in judged for check in one.checks]})


def fails(verdict: str, limit: str) -> bool:
    """Whether a verdict is at least as bad as ``limit``; ``failed`` and ``unmeasured`` always are."""
    order = [*VERDICTS, "failed"]
    return order.index(verdict) >= order.index(limit)


def _judge(measure: _Measure, limits: Thresholds) -> Judgement:
    lead, gain = measure.old - measure.bare, measure.found - measure.bare
    against_old = measure.difference(measure.against_old)
    kept = gain / lead if lead > 0 else None
    interval = None if kept is None or against_old is None else (1 + against_old[0] / lead, 1 + against_old[1] / lead)
    checks: list[Check] = []

    def check(name: str, value: float | None, threshold: float, interval: Interval | None = None) -> None:
        lowest = value if not limits.lower_bound else None if interval is None else interval[0]
        passed = lowest is not None and lowest >= threshold
        checks.append(
            Check(
                name=name,
                task=measure.task,
                value=value,
                interval=interval,
                threshold=threshold,
                passed=passed,
            )
        )

    if kept is not None:
        check("share of the lead kept", kept, limits.ship, interval)
    if limits.min_gain_over_bare is not None:
        check("gain over the bare new base", gain, limits.min_gain_over_bare, measure.difference(measure.against_bare))
    if limits.max_negative_flips is not None:
        flips = measure.negative_flips
        checks.append(
            Check(
                name="right before and wrong now, at most",
                task=measure.task,
                value=flips,
                threshold=limits.max_negative_flips,
                passed=flips is not None and flips <= limits.max_negative_flips,
            )
        )
    numbers: dict[str, Any] = {
        "metric": measure.metric, "task": measure.task, "arm": measure.arm, "kept": kept, "kept_interval": interval,
        "old": measure.old, "bare": measure.bare, "migrated": measure.found, "checks": checks,
    }  # fmt: skip
    told = (
        f"{measure.task or NAMES[measure.metric]} {abs(measure.found):.4g} "
        f"(old base with its adapter {abs(measure.old):.4g}, bare new base {abs(measure.bare):.4g})"
    )
    verdict: Verdict
    if kept is None:
        verdict = "ship" if gain > 0 else "retrain"
        why = f"the new base needs no adapter for the old level, and this one makes it {_better(gain)}"
    else:
        verdict = "ship" if checks[0].passed else "needs-finetune" if kept >= limits.finetune else "retrain"
        why = f"{100 * kept:.0f} % of the lead kept"
        if interval is not None:
            why += f" (95 % interval {100 * interval[0]:.0f} to {100 * interval[1]:.0f} %)"
    failed = [one for one in checks if not one.passed]
    if verdict == "ship" and failed:
        verdict = "needs-finetune"
    if failed:
        why += "; missed " + ", ".join(_told(one, limits.lower_bound) for one in failed)
    return Judgement(verdict=verdict, reason=f"{told}: {why}", **numbers)


def _better(gain: float) -> str:
    return "better" if gain > 0 else "worse" if gain < 0 else "neither better nor worse"


def _told(check: Check, lower_bound: bool) -> str:
    if check.value is None:
        return f"{check.name} (not measured)"
    if lower_bound and check.interval is None and not check.name.startswith("right"):
        return f"{check.name} (no interval was measured)"
    return f"{check.name} {check.threshold:.4g}" + (" by the lower bound" if lower_bound and check.interval else "")


def _measures(
    evaluation: Mapping[Arm, EvaluationSummary],
    tasks: Mapping[Arm, Mapping[str, TaskSummary]],
    gate: Gate,
    comparisons: Sequence[Comparison],
) -> list[_Measure]:
    """What is judged: one metric, or every task by itself where the gate looks at intervals or single tasks."""
    found: list[_Measure] = []
    if gate.tasks or (gate.lower_bound and gate.metric in ("auto", "tasks")):
        names = dict.fromkeys(task for scores in tasks.values() for task in _single(scores))
        each = [_measure(f"{task}", task, _task_scores(tasks, task), comparisons) for task in names]
        found = [measure for measure in each if measure is not None]
        if gate.metric == "tasks" or (found and not evaluation):
            return found
    for metric in ("exact_match", "bits_per_byte", "tasks") if gate.metric == "auto" else (gate.metric,):
        scores = _scores(metric, evaluation, tasks)
        measure = _measure(metric, None, scores, comparisons)
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
    metric: str, task: str | None, scores: Mapping[Arm, float], comparisons: Sequence[Comparison]
) -> _Measure | None:
    arm = next((arm for arm in PUBLISHED_ARMS if arm in scores), None)
    if arm is None or not set(BOTH) <= set(scores):
        return None

    def compared(other: Arm) -> Comparison | None:
        for one in comparisons:
            same = one.task == task if task else one.task is None and one.metric == metric
            if (one.first, one.second) == (other, arm) and same:
                return one
        return None

    return _Measure(
        metric=metric,
        task=task,
        arm=arm,
        old=scores[Arm.OLD_ADAPTER],
        bare=scores[Arm.NEW],
        found=scores[arm],
        against_old=compared(Arm.OLD_ADAPTER),
        against_bare=compared(Arm.NEW),
    )


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
