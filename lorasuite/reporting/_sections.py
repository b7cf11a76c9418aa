"""The sections of a migration's report, each from the record."""

from __future__ import annotations

import re
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from torch import Tensor

from lorasuite.reporting import _figures as figures
from lorasuite.reporting._names import ARMS, LOADERS


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
