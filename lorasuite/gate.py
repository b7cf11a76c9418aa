"""The gate: from a migration's measured arms to a verdict on the adapter.

The scale is the old adapter's *lead*: how much better the old base with its adapter is than the bare new base. An
adapter that keeps most of the lead ships, one that keeps some of it needs (more) fine-tuning, and one that keeps next
to nothing is not worth migrating.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Verdict = Literal["ship", "needs-finetune", "retrain", "unmeasured"]
GateMetric = Literal["auto", "exact_match", "bits_per_byte", "tasks"]

#: lm-eval's metrics in the order of preference: a task's first one counts.
TASK_METRICS = ("acc_norm", "acc", "exact_match")


#: What the migrated adapter is measured against.
BOTH = ("old+adapter", "new")


class Gate(BaseModel):
    """Thresholds, as shares of the old adapter's lead over the bare new base."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ship: float = Field(0.9, description="share of the old adapter's lead kept from which the adapter ships")
    finetune: float = Field(0.2, description="share from which more fine-tuning is worth a try; below it: retrain")
    metric: GateMetric = Field(
        "auto", description="exact_match, bits_per_byte, tasks (mean over lm-eval tasks), or auto: the first there is"
    )


class Judgement(BaseModel):
    """A verdict, the numbers it rests on (higher is better: bits per byte are negated), and why in words."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    verdict: Verdict
    reason: str
    metric: str | None = None
    arm: str | None = None
    kept: float | None = Field(None, description="share of the lead that was kept; None where there was no lead")
    old: float | None = None
    bare: float | None = None
    migrated: float | None = None


def judge(
    evaluation: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Mapping[str, Any]], gate: Gate | None = None
) -> Judgement:
    """The verdict on a migration from ``evaluation`` and ``tasks`` of its ``migration.json``.

    The published adapter is the arm ``migrated+lft`` where there is one, else ``migrated``. Where the bare new base
    is at least as good as the old base with its adapter there is no lead to keep: then the adapter ships if it makes
    the new base better still.
    """
    gate = gate or Gate()
    for metric in ("exact_match", "bits_per_byte", "tasks") if gate.metric == "auto" else (gate.metric,):
        scores = _scores(metric, evaluation, tasks)
        arm = "migrated+lft" if "migrated+lft" in scores else "migrated"
        if {*BOTH, arm} <= set(scores):
            # an exact match that is the same everywhere tells nothing: look at the next metric, if there is one
            if gate.metric == "auto" and metric == "exact_match" and len({scores[a] for a in (arm, *BOTH)}) == 1:
                continue
            break
    else:
        return Judgement(verdict="unmeasured", reason="no held-out rows or tasks were given to measure it on")
    old, bare, found = scores["old+adapter"], scores["new"], scores[arm]
    lead = old - bare
    kept = (found - bare) / lead if lead > 0 else None
    numbers: dict[str, Any] = {
        "metric": metric, "arm": arm, "kept": kept, "old": old, "bare": bare, "migrated": found,
    }  # fmt: skip
    told = f"{metric} {abs(found):.4g}; the old base with its adapter {abs(old):.4g}, the bare new base {abs(bare):.4g}"
    if kept is None:
        better = found > bare
        why = (
            f"the new base needs no adapter for the old level, and this one makes it {'better' if better else 'worse'}"
        )
        return Judgement(verdict="ship" if better else "retrain", reason=f"{told}: {why}", **numbers)
    verdict: Verdict = "ship" if kept >= gate.ship else "needs-finetune" if kept >= gate.finetune else "retrain"
    return Judgement(verdict=verdict, reason=f"{told}: {100 * kept:.0f} % of the lead kept", **numbers)


def _scores(
    metric: str, evaluation: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """The metric by arm, higher is better, for the arms that have it."""
    if metric == "tasks":
        leaves = {arm: [s for s in scores.values() if not s.get("group")] for arm, scores in tasks.items()}
        found = {arm: [_task_score(score) for score in scores] for arm, scores in leaves.items()}
        known = {arm: [value for value in values if value is not None] for arm, values in found.items()}
        return {arm: sum(values) / len(values) for arm, values in known.items() if values}
    sign = -1 if metric == "bits_per_byte" else 1
    return {arm: sign * float(result[metric]) for arm, result in evaluation.items() if result.get(metric) is not None}


def _task_score(score: Mapping[str, Any]) -> float | None:
    """A task's preferred metric; None where it has none of those that are better when higher."""
    by_name = {name.split(",")[0]: value for name, value in reversed(score["metrics"].items())}
    return next((float(by_name[name]) for name in TASK_METRICS if name in by_name), None)
