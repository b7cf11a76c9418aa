"""The before/after tables: held-out rows and lm-eval tasks, for terminals, cards and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorasuite.reporting import _figures as figures
from lorasuite.reporting._names import ARMS, METRICS, Z, _sorted_arms, number, percent, wilson


def comparison(evaluation: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """The before/after table: column titles, and a row an arm with ``value ± standard error`` cells."""
    metrics = [m for m in METRICS if any(arm.get(m) is not None for arm in evaluation.values())]
    rows = []
    for arm in _sorted_arms(evaluation):
        result = evaluation[arm]
        cells = [_cell(metric, result) for metric in metrics]
        rows.append({"name": ARMS.get(arm, arm), "arm": arm, "cells": cells, "n": result["n"]})
    return [METRICS[m] for m in metrics], rows


def task_comparison(tasks: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """lm-eval scores: a column for each task and metric, a row an arm, ``value ± standard error`` cells."""
    arms = _sorted_arms(tasks)
    columns = sorted(
        {(task, metric) for arm in arms for task, score in tasks[arm].items() for metric in score["metrics"]}
    )
    rows = []
    for arm in arms:
        cells = []
        for task, metric in columns:
            score = tasks[arm].get(task, {"metrics": {}, "stderr": {}})
            value, error = score["metrics"].get(metric), score["stderr"].get(metric)
            cells.append("–" if value is None else f"{value:.4g}" + (f" ± {error:.2g}" if error is not None else ""))
        rows.append({"name": ARMS.get(arm, arm), "cells": cells})
    return [f"{task} {metric.removesuffix(',none')}" for task, metric in columns], rows


def _cell(metric: str, result: Mapping[str, Any]) -> str:
    value, error = result.get(metric), result.get(f"{metric}_stderr")
    if value is None:
        return "–"
    if metric == "exact_match":
        return f"{100 * value:.1f} %" + (f" ± {100 * error:.1f}" if error is not None else "")
    return f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def metric_tables(evaluation: Mapping[str, Mapping[str, Any]], first: str | None) -> list[dict[str, Any]]:
    """Held-out rows: for each metric a row an arm, with its 95 % interval on one axis; the verdict's metric first."""
    known = [m for m in METRICS if any(arm.get(m) is not None for arm in evaluation.values())]
    known.sort(key=lambda metric: (metric != first, list(METRICS).index(metric)))
    tables = []
    for metric in known:
        rows = []
        for arm in _sorted_arms(evaluation):
            result = evaluation[arm]
            if result.get(metric) is None:
                continue
            rows.append(_row(arm, float(result[metric]), result.get(f"{metric}_stderr"), result["n"], metric))
        tables.append({"metric": metric, "title": METRICS[metric], "rows": _drawn(rows, metric)})
    return tables


def _row(arm: str, value: float, error: float | None, n: int | None, metric: str) -> dict[str, Any]:
    low = high = None
    if metric == "exact_match" and n:
        low, high = wilson(value, n)
    elif error is not None:
        low, high = value - Z * error, value + Z * error
    shown = percent if metric == "exact_match" else number
    return {
        "arm": arm,
        "name": ARMS.get(arm, arm),
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
        mark = 1 if row["arm"].startswith("migrated") else 2
        row["plot"] = figures.whisker(row["value"], row["low"], row["high"], axis, mark)
    return rows


def task_tables(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """lm-eval: a row a task and metric, a column an arm, what matters most first; value with its 95 % interval."""
    first = [arm for arm in ("migrated+lft", "migrated") if arm in tasks][:1]
    arms = list(
        dict.fromkeys([*first, *(a for a in ("old+adapter", "new", "scratch", "scratch-own") if a in tasks), *tasks])
    )
    keys = sorted({(t, m) for arm in arms for t, score in tasks[arm].items() for m in score["metrics"]})
    groups = {t for arm in arms for t, score in tasks[arm].items() if score.get("group")}
    keys.sort(key=lambda key: key[0] in groups)  # means after what they are means of
    rows = []
    for task, metric in keys:
        cells = []
        for arm in arms:
            score = tasks[arm].get(task)
            value = None if score is None else score["metrics"].get(metric)
            error = None if score is None else score["stderr"].get(metric)
            cells.append({"value": value, "half": None if error is None else Z * error})
        n = next((tasks[arm][task].get("n") for arm in arms if task in tasks[arm]), None)
        shown = metric.removesuffix(",none") + (", mean of its tasks" if task in groups else "")
        rows.append({"task": task, "metric": shown, "cells": cells, "n": n})
    return {"arms": [ARMS.get(arm, arm) for arm in arms], "rows": rows}
