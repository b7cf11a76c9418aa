"""The before/after tables: held-out rows and lm-eval tasks, for terminals, cards and the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lorasuite.evaluation import PUBLISHED_ARMS, Arm, EvaluationSummary, General, GeneralCost, TaskSummary
from lorasuite.reporting import _figures as figures
from lorasuite.reporting._names import METRICS, Name, Z, arm_label, number, percent, sorted_arms, wilson

#: The name that tables give an arm.
Label = Callable[[str], str]


def comparison(
    evaluation: Mapping[Name, EvaluationSummary], label: Label = arm_label
) -> tuple[list[str], list[dict[str, Any]]]:
    """The before/after table: column titles, and a row an arm with ``value ± standard error`` cells."""
    metrics = _known_metrics(evaluation)
    rows = []
    for arm in sorted_arms(evaluation):
        result = evaluation[arm]
        cells = [_cell(metric, result) for metric in metrics]
        rows.append({"name": label(arm), "arm": arm, "cells": cells, "n": result.n})
    return [METRICS[m] for m in metrics], rows


def task_comparison(
    tasks: Mapping[Name, Mapping[str, TaskSummary]], label: Label = arm_label
) -> tuple[list[str], list[dict[str, Any]]]:
    """lm-eval scores: a column for each task and metric, a row an arm, ``value ± standard error`` cells."""
    arms = sorted_arms(tasks)
    columns = sorted({(task, metric) for arm in arms for task, score in tasks[arm].items() for metric in score.metrics})
    rows = []
    for arm in arms:
        cells = []
        for task, metric in columns:
            value, error = _task_score(tasks[arm], task, metric)
            cells.append("–" if value is None else f"{value:.4g}" + (f" ± {error:.2g}" if error is not None else ""))
        rows.append({"name": label(arm), "cells": cells})
    return [f"{task} {metric.removesuffix(',none')}" for task, metric in columns], rows


#: What the table of general ability shows, beside what it was measured on.
GENERAL_COLUMNS = (
    "old base", "old base + adapter", "cost", "new base", "new base + adapter", "cost", "beyond the old", "n",
)  # fmt: skip


def general_costs(general: General | None) -> list[list[str]]:
    """General ability: what it was measured on, and a cell for each of :data:`GENERAL_COLUMNS`."""
    return [] if general is None else [_cost_row(general, cost) for cost in general.costs]


def _cost_row(general: General, cost: GeneralCost) -> list[str]:
    shown = number if cost.task is None else percent

    def score(arm: Arm) -> float | None:
        if cost.task is None:
            return general.text[arm].bits_per_byte if arm in general.text else None
        return _task_score(general.tasks.get(arm, {}), cost.task, cost.metric)[0]

    what = "general text, bits per byte" if cost.task is None else f"{cost.task}, {cost.metric.split(',')[0]}"
    ends = "" if cost.interval is None else f" ({shown(cost.interval[0])} to {shown(cost.interval[1])})"
    old = [shown(score(Arm.OLD)), shown(score(Arm.OLD_ADAPTER)), shown(cost.old)]
    new = [shown(score(Arm.NEW)), shown(score(cost.arm)), shown(cost.new)]
    return [what, *old, *new, shown(cost.excess) + ends, str(cost.n)]


def _known_metrics(evaluation: Mapping[Name, EvaluationSummary]) -> list[str]:
    return [m for m in METRICS if any(getattr(result, m) is not None for result in evaluation.values())]


def _score(result: EvaluationSummary, metric: str) -> tuple[float | None, float | None]:
    """A metric and its standard error."""
    return getattr(result, metric), getattr(result, f"{metric}_stderr")


def _task_score(scores: Mapping[str, TaskSummary], task: str, metric: str) -> tuple[float | None, float | None]:
    """A task's metric and its standard error; None of what the arm was not measured on."""
    score = scores.get(task)
    return (None, None) if score is None else (score.metrics.get(metric), score.stderr.get(metric))


def _cell(metric: str, result: EvaluationSummary) -> str:
    value, error = _score(result, metric)
    if value is None:
        return "–"
    if metric == "exact_match":
        return f"{100 * value:.1f} %" + (f" ± {100 * error:.1f}" if error is not None else "")
    return f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def metric_tables(
    evaluation: Mapping[Arm, EvaluationSummary], first: str | None, label: Label = arm_label
) -> list[dict[str, Any]]:
    """Held-out rows: for each metric a row an arm, with its 95 % interval on one axis; the verdict's metric first."""
    known = _known_metrics(evaluation)
    known.sort(key=lambda metric: (metric != first, list(METRICS).index(metric)))
    tables = []
    for metric in known:
        rows = []
        for arm in sorted_arms(evaluation):
            value, error = _score(evaluation[arm], metric)
            if value is not None:
                rows.append(_row(arm, label(arm), value, error, evaluation[arm].n, metric))
        tables.append({"metric": metric, "title": METRICS[metric], "rows": _drawn(rows, metric)})
    return tables


def _row(arm: str, name: str, value: float, error: float | None, n: int, metric: str) -> dict[str, Any]:
    low = high = None
    if metric == "exact_match" and n:
        low, high = wilson(value, n)
    elif error is not None:
        low, high = value - Z * error, value + Z * error
    shown = percent if metric == "exact_match" else number
    return {
        "arm": arm,
        "name": name,
        "value": value,
        "low": low,
        "high": high,
        "n": n,
        "text": shown(value),
        "range": None if low is None else f"{shown(low)} to {shown(high)}",
    }


def _drawn(rows: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    ends = [end for row in rows for end in (row["value"], row["low"], row["high"]) if end is not None]
    axis = (0.0, 1.0) if metric == "exact_match" else (min(0.0, *ends), max(ends) * 1.04 or 1.0)
    for row in rows:
        mark = 1 if row["arm"] in PUBLISHED_ARMS else 2
        row["plot"] = figures.whisker(row["value"], row["low"], row["high"], axis, mark)
    return rows


def task_tables(tasks: Mapping[Arm, Mapping[str, TaskSummary]], label: Label = arm_label) -> dict[str, Any]:
    """lm-eval: a row a task and metric, a column an arm, the published one first; value with its 95 % interval."""
    first = [arm for arm in PUBLISHED_ARMS if arm in tasks][:1]
    then = (Arm.OLD_ADAPTER, Arm.NEW, Arm.SCRATCH, Arm.SCRATCH_OWN)
    arms = list(dict.fromkeys([*first, *(arm for arm in then if arm in tasks), *tasks]))
    keys = sorted({(t, m) for arm in arms for t, score in tasks[arm].items() for m in score.metrics})
    groups = {t for arm in arms for t, score in tasks[arm].items() if score.group}
    keys.sort(key=lambda key: key[0] in groups)  # means after what they are means of
    rows = []
    for task, metric in keys:
        cells = []
        for arm in arms:
            value, error = _task_score(tasks[arm], task, metric)
            cells.append({"value": value, "half": None if error is None else Z * error})
        n = next((tasks[arm][task].n for arm in arms if task in tasks[arm]), None)
        shown = metric.removesuffix(",none") + (", mean of its tasks" if task in groups else "")
        rows.append({"task": task, "metric": shown, "cells": cells, "n": n})
    return {"arms": [label(arm) for arm in arms], "rows": rows}
