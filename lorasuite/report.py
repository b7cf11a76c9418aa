"""The HTML reports of a migration and of a fleet: self-contained pages made from the records and files beside them.

Every section says in a sentence when there is nothing to show, and what would be needed: a reader who has to decide
must not have to guess whether something is missing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from lorasuite import figures
from lorasuite.checkpoint import read_json
from lorasuite.errors import CheckpointError, Problem

REPORT = "report.html"
RECORD = "migration.json"
FLEET_RECORD = "fleet.json"
FIGURE_DATA = "figures.safetensors"

#: Arms of an evaluation in the order they are read, and what they are called.
ARMS = {
    "old": "old base",
    "old+adapter": "old base + adapter",
    "new": "new base",
    "migrated": "migrated, no LFT",
    "scratch-own": "LoRA from scratch, without the written rows",
    "scratch": "LoRA from scratch, same samples",
    "migrated+lft": "migrated + LFT",
}
METRICS = {"exact_match": "exact match", "loss": "loss (nats/token)", "bits_per_byte": "bits per byte"}
#: Half-width of a 95 % interval in standard errors.
Z = 1.96
VERDICT_WORDS = {
    "ship": ("Ship", "good"),
    "needs-finetune": ("Needs fine-tuning", "fair"),
    "retrain": ("Retrain", "poor"),
    "unmeasured": ("Not measured", "none"),
    "failed": ("Failed", "poor"),
}
LOADERS = {"peft": "PEFT", "transformers": "merged, plain transformers", "vllm": "vLLM", "llama.cpp": "llama.cpp"}


def write_report(folder: Path) -> Path:
    """Build ``report.html`` of a migration's directory from its ``migration.json``, or of a fleet's.

    Raises:
        CheckpointError: if the directory holds neither.
    """
    path = folder / REPORT
    if (folder / RECORD).is_file():
        data = load_file(folder / FIGURE_DATA) if (folder / FIGURE_DATA).is_file() else {}
        page = render(read_json(folder / RECORD), data)
    elif (folder / FLEET_RECORD).is_file():
        page = render_fleet(read_json(folder / FLEET_RECORD))
    else:
        raise CheckpointError(
            Problem(
                str(folder),
                f"has no {RECORD} and no {FLEET_RECORD}",
                "Give the output directory of a migration or of a fleet.",
            )
        )
    path.write_text(page, encoding="utf-8")
    return path


def render(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """A migration's page as HTML."""
    word, tone = VERDICT_WORDS[record["verdict"]["verdict"]]
    return _page(
        "report.html.j2",
        m=record,
        word=word,
        tone=tone,
        decision=decision(record),
        metrics=metric_tables(record["evaluation"], record["verdict"].get("metric")),
        tasks=task_tables(record["tasks"]),
        flips=flips(record),
        candidates=candidates(record),
        training=training(record),
        layers=layer_section(record, tensors),
        heads=head_section(record),
        energy=energy_section(record),
        serving={LOADERS.get(name, name): served for name, served in record.get("serving", {}).items()},
        cost=cost_section(record),
        settings=json.dumps(record.get("settings", {}), indent=2, ensure_ascii=False, sort_keys=True),
        arms=ARMS,
    )


def render_fleet(fleet: Mapping[str, Any]) -> str:
    """A fleet's page as HTML: a row an adapter, sortable where scripts run."""
    words = {verdict: {"word": w, "tone": t} for verdict, (w, t) in VERDICT_WORDS.items()}
    order = {verdict: number for number, verdict in enumerate(VERDICT_WORDS)}
    rows = sorted(fleet["adapters"], key=lambda row: (order.get(row["verdict"], 99), row["name"]))
    counts = [(words[v], sum(row["verdict"] == v for row in rows)) for v in VERDICT_WORDS]
    return _page("fleet.html.j2", f=fleet, rows=rows, words=words, order=order, counts=[(w, n) for w, n in counts if n])


def _page(template: str, **values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lorasuite"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "seconds": seconds}
    page: str = environment.get_template(template).render(**values)
    return page


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: ``–`` where there is none."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.2g}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage, without a decimal that says nothing."""
    return "–" if value is None else f"{100 * value:.{digits}f}".removesuffix(".0") + "\u00a0%"


def seconds(value: float) -> str:
    """A time: seconds, minutes or hours."""
    if value < 60:
        return f"{value:.1f} s" if value >= 0.1 else f"{1000 * value:.0f} ms"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def _sorted_arms(arms: Iterable[str]) -> list[str]:
    known = list(arms)
    return [*[a for a in ARMS if a in known], *[a for a in known if a not in ARMS]]


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


# ------------------------------------------------------------------------------------------------------- the sections


def decision(record: Mapping[str, Any]) -> dict[str, Any]:
    """What stands at the top: the kept share as a meter, the gate's checks, and what a reader should know besides."""
    verdict = record["verdict"]
    gate = record.get("settings", {}).get("gate", {})
    picture = None
    if verdict.get("kept") is not None:
        low, high = verdict.get("kept_interval") or (None, None)
        limits = [gate[name] for name in ("finetune", "ship") if name in gate]
        picture = figures.meter(verdict["kept"], low, high, limits)
    arm = verdict.get("arm")
    remarks = []
    for one in record.get("comparisons", []):
        if one["second"] == arm and one["interval"] is not None and one["metric"] == verdict.get("metric"):
            remarks += _remark(one)
    for name, served in record.get("serving", {}).items():
        if not served["ok"]:
            remarks.append(f"{LOADERS.get(name, name)} would not serve it as it is: {served['problems'][0]}.")
    dropped = record.get("dropped", [])
    if dropped:
        remarks.append(f"{len(dropped)} of the old adapter's modules found no place in the new base.")
    return {"meter": picture, "gate": gate, "remarks": remarks, "arm": ARMS.get(arm or "", arm)}


def _remark(one: Mapping[str, Any]) -> list[str]:
    """What the controls say of the published adapter, where the interval leaves zero out."""
    sign = -1 if one["metric"] == "bits_per_byte" else 1
    low, high = sorted(sign * end for end in one["interval"])
    if one["first"] == "scratch" and high < 0:
        return ["A fresh LoRA trained on the same samples does better: consider it in place of this adapter."]
    if one["first"] == "scratch" and low > 0:
        return ["It does better than a fresh LoRA trained on the same samples."]
    if one["first"] == "scratch-own" and high < 0:
        return ["A fresh LoRA does better without the rows that the old adapter wrote."]
    if one["first"] == "scratch-own" and low > 0:
        return ["It does better than a fresh LoRA without the rows that the old adapter wrote."]
    if one["first"] == "new" and high < 0:
        return ["The bare new base does better without it."]
    return []


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


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of ``n`` samples (Wilson 1927), which none and all of them have, too."""
    from scipy.stats import binomtest

    found = binomtest(round(share * n), n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


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


def flips(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The published arm against the old adapter, where samples are right or wrong."""
    return [
        {**one, "rate": len(one["negative_flips"]) / max(1, len(one["negative_flips"]) + one["both_right"])}
        for one in record.get("comparisons", [])
        if one["first"] == "old+adapter" and one["both_right"] is not None
    ]


def candidates(record: Mapping[str, Any]) -> dict[str, Any]:
    """What was tried and its held-out loss; a column for whatever the entries tell, in the order they were ranked."""
    found = [dict(entry) for entry in record.get("candidates", [])]
    optional = {"start": "start", "learning_rate": "learning rate", "reported_loss": "loss on fresh rows"}
    extra = {key: title for key, title in optional.items() if any(entry.get(key) is not None for entry in found)}
    losses = [entry["loss"] for entry in found if entry.get("loss") is not None]
    for number_, entry in enumerate(found):
        entry["chosen"] = number_ == 0
        loss = entry.get("loss")
        entry["plot"] = None if loss is None else figures.whisker(loss, None, None, (0.0, max(losses) * 1.04), 1)
    return {"rows": found, "extra": extra, "seconds": any(entry.get("seconds") is not None for entry in found)}


def training(record: Mapping[str, Any]) -> dict[str, Any]:
    """Loss curves of the fine-tune and of the control, and the learning rates that were tried."""
    runs = {"migrated + LFT": record.get("finetune"), "LoRA from scratch": record.get("control")}
    made = {name: run for name, run in runs.items() if run}
    lines = {name: [(p["step"], p["loss"]) for p in run["losses"]] for name, run in made.items()}
    return {
        "runs": made,
        "figure": figures.curves(lines, "step", "loss, nats per token") if lines else None,
        "sweeps": {name: run["sweep"] for name, run in made.items() if run.get("sweep")},
    }


def layer_section(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The similarity heat map with the chosen path, and the path as a table."""
    layers = {int(o): int(n) for o, n in record["layer_map"].items()}
    metric = str(record.get("settings", {}).get("pair", {}).get("similarity", "cka"))
    metric = metric.upper() if metric != "procrustes" else "Procrustes similarity"
    known = record.get("layer_similarity", {})
    rows = [{"old": o, "new": n, "similarity": known.get(str(o))} for o, n in sorted(layers.items())]
    picture = figures.heat_map(tensors["similarity"], layers, metric) if "similarity" in tensors else None
    skipped: list[int] = []
    if "similarity" in tensors:
        skipped = [n for n in range(tensors["similarity"].shape[1]) if n not in layers.values()]
    return {"figure": picture, "rows": rows, "metric": metric, "skipped": skipped}


def head_section(record: Mapping[str, Any]) -> dict[str, Any]:
    """Matched heads by layer pair; ``columns`` are the old heads, or none where there are too many for a table."""
    rows = []
    means = record.get("head_similarity", {})
    for pair, heads in record["head_map"].items():
        old, _, new = pair.partition("->")
        matched = {int(a): int(b) for a, b in heads.items()}
        rows.append({"old": old, "new": new, "heads": matched, "mean": means.get(old)})
    columns = sorted({a for row in rows for a in row["heads"]})
    bars = {f"{row['old']}→{row['new']}": (row["mean"], None) for row in rows if row["mean"] is not None}
    return {
        "rows": rows,
        "columns": columns if len(columns) <= 16 else [],
        "figure": figures.columns(bars, "old → new layer", "mean similarity of matched heads", False) if bars else None,
    }


def energy_section(record: Mapping[str, Any]) -> dict[str, Any]:
    """Energy kept by the cut to the output rank and unexplained variance of the alignment, by layer and module."""
    grid: dict[int, dict[str, float]] = {}
    for path, kept in record.get("retained_energy", {}).items():
        found = re.search(r"\.(\d+)\.", path)
        layer = int(found[1]) if found else -1
        grid.setdefault(layer, {})[path.rpartition(".")[2]] = kept
    names = list(dict.fromkeys(name for row in grid.values() for name in row))
    bars = {str(layer): (fmean(row.values()), min(row.values())) for layer, row in sorted(grid.items())}
    lossless = all(kept > 0.9995 for row in grid.values() for kept in row.values())
    aligned = record.get("alignment") or {}
    residual = {int(layer): ends for layer, ends in aligned.get("residual", {}).items()}
    layers = {int(o): n for o, n in record["layer_map"].items()}
    spread = {str(layers[o]): (fmean(e.values()), max(e.values())) for o, e in sorted(residual.items()) if e}
    return {
        "names": names,
        "grid": sorted(grid.items()),
        "lossless": lossless,
        "figure": None if lossless or not bars else figures.columns(bars, "new layer", "energy kept"),
        "rows": aligned.get("rows"),
        "ends": list(dict.fromkeys(end for ends in residual.values() for end in ends)),
        "residual": [(layers[o], ends) for o, ends in sorted(residual.items())],
        "residual_figure": figures.columns(spread, "new layer", "unexplained variance") if spread else None,
        "norms": record.get("updates", {}),
    }


def cost_section(record: Mapping[str, Any]) -> dict[str, Any]:
    """Time and memory by stage: this run's seconds, and what the computation took whenever it was made."""
    rows = [dict(row) for row in record["timings"]]
    longest = max([row["computed_seconds"] for row in rows] or [1.0]) or 1.0
    for row in rows:
        row["share"] = max(0.5, 100 * row["computed_seconds"] / longest)
    spent = sum(row["seconds"] for row in rows)
    computed = sum(row["computed_seconds"] for row in rows)
    cached = sum(row["cached"] for row in rows)
    peak = max([row["peak_memory_bytes"] for row in rows] or [0])
    return {"rows": rows, "spent": spent, "computed": computed, "cached": cached, "peak": peak}


def fleet_rows(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Rows of a fleet with their report's address relative to the fleet's own page."""
    return [
        {**row, "report": None if row["report"] is None else Path(os.path.relpath(row["report"], folder)).as_posix()}
        for row in rows
    ]
