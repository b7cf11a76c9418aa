"""The gate: from a migration's measured arms to a verdict on the adapter.

An adapter is measured by the share it keeps of the old adapter's *lead*: how much better the old base with its adapter
is than the bare new base. One that keeps most of the lead ships, one that keeps some of it needs (more) fine-tuning,
and one that keeps next to nothing is to be trained anew. What is measured on few rows is judged by its interval, and
what is measured on next to none does not ship. Beside the lead a gate may ask for a gain over the bare new base, bound
what the old adapter got right and the new one gets wrong, and how much more the new adapter may cost of general ability
than the old one did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lorasuite.evaluation._arms import Arm
from lorasuite.evaluation._comparison import Comparison
from lorasuite.evaluation._general import General, GeneralCost
from lorasuite.evaluation._measures import NAMES, Interval, Measure, measures_of
from lorasuite.evaluation._results import EvaluationSummary
from lorasuite.evaluation._served import Served
from lorasuite.evaluation._tasks import TaskSummary

Verdict = Literal["ship", "needs-finetune", "retrain", "unmeasured"]
GateMetric = Literal["auto", "exact_match", "bits_per_byte", "tasks"]
#: From best to worst; what was not measured cannot be relied on.
VERDICTS: tuple[Verdict, ...] = ("ship", "needs-finetune", "retrain", "unmeasured")


class Thresholds(BaseModel):
    """What an adapter has to reach."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

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
    interval_below: int = Field(
        100,
        ge=0,
        description="on fewer rows the 95 % interval decides, not the mean: its lower end whether an adapter "
        "ships, its upper end whether it is to be retrained",
    )
    min_rows: int = Field(
        30, ge=0, description="on fewer rows no adapter ships: where it would, it counts as unmeasured"
    )

    @model_validator(mode="after")
    def _in_order(self) -> Thresholds:
        if self.finetune > self.ship:
            raise ValueError(
                f"finetune ({self.finetune:g}) is above ship ({self.ship:g}): nothing would need a fine-tune"
            )
        return self


class Gate(Thresholds):
    """Thresholds, as shares of the old adapter's lead over the bare new base."""

    metric: GateMetric = Field(
        "auto", description="exact_match, bits_per_byte, tasks (mean over lm-eval tasks), or auto: the first there is"
    )
    tasks: dict[str, dict[str, int | float | bool | None]] = Field(
        {},
        description="thresholds of single tasks by name; with any, each task is judged by itself and the worst counts",
    )
    max_general_loss: float | None = Field(
        0.05,
        description="most bits per byte of general text that the new adapter may cost its base beyond what the old one "
        "cost; by the upper end of the interval with lower_bound",
    )
    max_general_drop: float | None = Field(
        0.1, description="the same of general_task's score, as a share of 1: what 100 documents tell"
    )
    general_required: bool = Field(
        False, description="an adapter does not ship where its cost of general ability was not measured: unmeasured"
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
    rows: int | None = Field(None, description="rows, or documents of tasks, that each arm was measured on")
    detectable: float | None = Field(
        None,
        description="smallest true difference from the old adapter, in the metric's own unit, that so many rows show "
        "four times in five at the 5 % level; None where no interval was measured",
    )
    old: float | None = None
    bare: float | None = None
    migrated: float | None = None
    checks: list[Check] = []


def judge(
    evaluation: Mapping[Arm, EvaluationSummary],
    tasks: Mapping[Arm, Mapping[str, TaskSummary]],
    gate: Gate | None = None,
    comparisons: Sequence[Comparison] = (),
    general: General | None = None,
) -> Judgement:
    """The verdict on a migration.

    The published adapter is the arm ``migrated+lft`` where there is one, else ``migrated``. Where the bare new base
    is at least as good as the old base with its adapter there is no lead to keep: then the adapter ships if it makes
    the new base better still. An interval that a threshold asks for and nobody measured counts as not reached. General
    ability that nobody measured is said, and decides nothing unless the gate requires it: it takes texts of its own,
    and an adapter has to be able to ship without them.

    Args:
        evaluation: results on the held-out rows.
        tasks: for each arm its scores by task or group.
        gate: the thresholds; the default ones if None.
        comparisons: of the published arm with others, sample by sample.
        general: what the adapters cost their bases of general ability.
    """
    gate = gate or Gate()
    return _with_general(_by_lead(evaluation, tasks, gate, comparisons), gate, general)


def _by_lead(
    evaluation: Mapping[Arm, EvaluationSummary],
    tasks: Mapping[Arm, Mapping[str, TaskSummary]],
    gate: Gate,
    comparisons: Sequence[Comparison],
) -> Judgement:
    """The verdict without general ability."""
    measures = measures_of(evaluation, tasks, gate, comparisons)
    missing = sorted(set(gate.tasks) - {measure.task or "" for measure in measures})
    if not measures or missing:
        why = f"the gate asks for {', '.join(missing)}, which was not measured" if missing else (
            "no held-out rows or tasks were given to measure it on"
        )  # fmt: skip
        return Judgement(verdict="unmeasured", reason=why)
    judged = [_judge(measure, gate.of(measure.task)) for measure in measures]
    worst = max(judged, key=lambda one: VERDICTS.index(one.verdict))
    return worst.model_copy(update={"checks": [check for one in judged for check in one.checks]})


def _with_general(judgement: Judgement, gate: Gate, general: General | None) -> Judgement:
    """The same verdict, unless the adapter ships and costs too much of general ability."""
    costs = [] if general is None else general.costs
    verdict, told = judgement.verdict, [judgement.reason]
    checks = [check for cost in costs if (check := _general_check(cost, gate)) is not None]
    if not costs:
        told.append("general ability was not measured")
        if verdict == "ship" and gate.general_required:
            verdict = "unmeasured"
    for cost in costs:
        unit = "bits per byte of general text" if cost.task is None else f"points of {cost.task}"
        new, old = (value if cost.task is None else 100 * value for value in (cost.new, cost.old))
        told.append(f"the adapter costs {new:.2g} {unit}, the old one {old:.2g}")
    failed = [check for check in checks if not check.passed]
    if failed:
        by = " by the upper end of the interval" if gate.lower_bound else ""
        told += [f"missed {check.name} {check.threshold:.4g}{by}" for check in failed]
        verdict = "needs-finetune" if verdict == "ship" else verdict
    made = {"verdict": verdict, "reason": "; ".join(told), "checks": [*judgement.checks, *checks]}
    return judgement.model_copy(update=made)


def _general_check(cost: GeneralCost, gate: Gate) -> Check | None:
    """Whether an adapter costs more than it may beyond what the old one cost; None where there is no limit."""
    limit = gate.max_general_loss if cost.task is None else gate.max_general_drop
    if limit is None:
        return None
    highest = cost.excess if not gate.lower_bound else None if cost.interval is None else cost.interval[1]
    what = "bits per byte of general text" if cost.task is None else "share of the general task"
    return Check(
        name=f"{what} lost beyond what the old adapter cost, at most",
        task=cost.task,
        value=cost.excess,
        interval=cost.interval,
        threshold=limit,
        passed=highest is not None and highest <= limit,
    )


def as_served(judgement: Judgement, serving: Mapping[str, Served]) -> Judgement:
    """The same verdict, if what a server computes with the adapter is what was measured.

    An adapter that ships by its figures counts as unmeasured where a loader that was run answers otherwise: the
    figures are not those of what would be served. Loaders of which only the rules were read decide nothing; that
    one was asked for and could not be run is said.

    Args:
        serving: by loader.
    """
    if judgement.verdict != "ship":
        return judgement
    why = judgement.reason
    lacking = [f"{loader}: {found.not_run}" for loader, found in serving.items() if found.not_run is not None]
    if lacking:
        why += f"; not run as asked for ({'; '.join(lacking)})"
    wrong = [f"{loader}: {found.problems[0]}" for loader, found in serving.items() if found.ran and not found.ok]
    if not wrong:
        return judgement.model_copy(update={"reason": why})
    why += f"; a server would answer otherwise ({'; '.join(wrong)})"
    return judgement.model_copy(update={"verdict": "unmeasured", "reason": why})


def fails(verdict: str, limit: str) -> bool:
    """Whether a verdict is at least as bad as ``limit``; ``failed`` and ``unmeasured`` always are."""
    order = [*VERDICTS, "failed"]
    return order.index(verdict) >= order.index(limit)


def _judge(measure: Measure, limits: Thresholds) -> Judgement:
    lead, gain = measure.old - measure.bare, measure.found - measure.bare
    against_old, against_bare = measure.difference(measure.against_old), measure.difference(measure.against_bare)
    few = measure.rows is None or measure.rows < limits.interval_below
    by_bound = limits.lower_bound or few
    kept = gain / lead if lead > 0 else None
    interval = None if kept is None or against_old is None else (1 + against_old[0] / lead, 1 + against_old[1] / lead)
    checks: list[Check] = []

    def check(name: str, value: float | None, threshold: float, interval: Interval | None = None) -> None:
        lowest = value if not by_bound else None if interval is None else interval[0]
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
        check("gain over the bare new base", gain, limits.min_gain_over_bare, against_bare)
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
        "rows": measure.rows, "detectable": measure.detectable,
    }  # fmt: skip
    told = (
        f"{measure.task or NAMES[measure.metric]} {abs(measure.found):.4g} "
        f"(old base with its adapter {abs(measure.old):.4g}, bare new base {abs(measure.bare):.4g})"
    )
    verdict: Verdict
    if kept is None:
        verdict = "ship" if gain > 0 else "retrain"
        why = f"the new base needs no adapter for the old level, and this one makes it {_better(gain)}"
        if few and verdict == "ship" and (against_bare is None or against_bare[0] <= 0):
            verdict, why = "needs-finetune", f"{why}, which so few rows do not show"
    else:
        most = interval[1] if few and interval is not None else kept
        verdict = "ship" if checks[0].passed else "needs-finetune" if most >= limits.finetune else "retrain"
        why = f"{100 * kept:.0f} % of the lead kept"
        if interval is not None:
            why += f" (95 % interval {100 * interval[0]:.0f} to {100 * interval[1]:.0f} %)"
    failed = [one for one in checks if not one.passed]
    if verdict == "ship" and failed:
        verdict = "needs-finetune"
    if failed:
        why += "; missed " + ", ".join(_told(one, by_bound) for one in failed)
    why += _power(measure)
    if verdict == "ship" and (measure.rows or 0) < limits.min_rows:
        verdict, why = "unmeasured", f"{why}; an adapter ships on {limits.min_rows} rows or more"
    return Judgement(verdict=verdict, reason=f"{told}: {why}", **numbers)


def _better(gain: float) -> str:
    return "better" if gain > 0 else "worse" if gain < 0 else "neither better nor worse"


def _power(measure: Measure) -> str:
    """What the rows can tell, in words."""
    if measure.rows is None or measure.detectable is None:
        return "" if measure.rows is None else f"; measured on {measure.rows} rows"
    unit = f"{measure.detectable:.2g} bits per byte"
    if measure.metric != "bits_per_byte":
        unit = f"{100 * measure.detectable:.2g} points"
    return f"; {measure.rows} rows tell differences of {unit}"


def _told(check: Check, lower_bound: bool) -> str:
    if check.value is None:
        return f"{check.name} (not measured)"
    if lower_bound and check.interval is None and not check.name.startswith("right"):
        return f"{check.name} (no interval was measured)"
    return f"{check.name} {check.threshold:.4g}" + (" by the lower bound" if lower_bound and check.interval else "")
