"""The sections of a migration's report, each from the record."""

from __future__ import annotations

import re
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from torch import Tensor

from lorasuite.evaluation import Arm, Comparison
from lorasuite.reporting import _figures as figures
from lorasuite.reporting._names import LOADERS
from lorasuite.reporting._published import Published
from lorasuite.reporting._record import MigrationRecord
from lorasuite.transforms import Input, names, transform


def decision(record: MigrationRecord) -> dict[str, Any]:
    """What stands at the top: the kept share as a meter, the gate's checks, and what a reader should know besides."""
    verdict, gate = record.verdict, record.gate
    picture = None
    if verdict.kept is not None:
        low, high = verdict.kept_interval or (None, None)
        picture = figures.meter(verdict.kept, low, high, [gate.finetune, gate.ship])
    remarks = []
    for one in record.comparisons:
        if one.second == verdict.arm and one.metric == verdict.metric:
            remarks += _remark(one, record.published)
    for name, served in record.serving.items():
        if not served.ok:
            remarks.append(f"{LOADERS.get(name, name)} would not serve it as it is: {served.problems[0]}.")
    if record.dropped:
        remarks.append(f"{len(record.dropped)} of the old adapter's modules found no place in the new base.")
    arm = None if verdict.arm is None else record.label(verdict.arm)
    return {"meter": picture, "gate": gate, "remarks": remarks, "arm": arm}


def _remark(one: Comparison, published: Published) -> list[str]:
    """What the controls say of the published adapter, where the interval leaves zero out."""
    if one.interval is None:
        return []
    sign = -1 if one.metric == "bits_per_byte" else 1
    low, high = sorted(sign * end for end in one.interval)
    same = "trained on the rows that the old adapter wrote, too" if published.synthetic_rejected else (
        "trained on the same samples"
    )  # fmt: skip
    if one.first == Arm.SCRATCH and high < 0:
        return [f"A fresh LoRA {same} does better: consider it in place of this adapter."]
    if one.first == Arm.SCRATCH and low > 0:
        return [f"It does better than a fresh LoRA {same}."]
    if one.first == Arm.SCRATCH_OWN and high < 0:
        return ["A fresh LoRA does better without the rows that the old adapter wrote."]
    if one.first == Arm.SCRATCH_OWN and low > 0:
        return ["It does better than a fresh LoRA without the rows that the old adapter wrote."]
    if one.first == Arm.NEW and high < 0:
        return ["The bare new base does better without it."]
    return []


def flips(record: MigrationRecord) -> list[tuple[Comparison, float]]:
    """The published arm against the old adapter, where samples are right or wrong, and the share of flips in those
    that were right."""
    return [
        (one, len(one.negative_flips) / max(1, len(one.negative_flips) + one.both_right))
        for one in record.comparisons
        if one.first == Arm.OLD_ADAPTER and one.both_right is not None
    ]


def candidates(record: MigrationRecord) -> list[dict[str, Any]]:
    """What was tried and its held-out loss, in the order they were ranked."""
    losses = [entry.loss for entry in record.candidates if entry.loss is not None]
    axis = (0.0, max(losses, default=0.0) * 1.04)
    return [
        {
            **entry.model_dump(),
            "chosen": place == 0,
            "plot": None if entry.loss is None else figures.whisker(entry.loss, None, None, axis, 1),
        }
        for place, entry in enumerate(record.candidates)
    ]


def training(record: MigrationRecord) -> dict[str, Any]:
    """Loss curves of the fine-tune and of the control, and the learning rates that were tried."""
    runs = {record.published.label: record.finetune, Arm.SCRATCH.label: record.control}
    made = {name: run for name, run in runs.items() if run is not None}
    lines = {name: [(point["step"], point["loss"]) for point in run.losses] for name, run in made.items()}
    return {
        "runs": made,
        "figure": figures.curves(lines, "step", "loss, nats per token") if lines else None,
        "sweeps": {name: run.sweep for name, run in made.items() if run.sweep},
    }


def layer_section(record: MigrationRecord, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The similarity heat map with the chosen path, and the path as a table."""
    layers = record.layers
    metric = str((record.settings.get("pair") or {}).get("similarity", "cka"))
    metric = metric.upper() if metric != "procrustes" else "Procrustes similarity"
    rows = [{"old": o, "new": n, "similarity": record.layer_similarity.get(str(o))} for o, n in sorted(layers.items())]
    picture = figures.heat_map(tensors["similarity"], layers, metric) if "similarity" in tensors else None
    skipped: list[int] = []
    if "similarity" in tensors:
        skipped = [n for n in range(tensors["similarity"].shape[1]) if n not in layers.values()]
    return {"figure": picture, "rows": rows, "metric": metric, "skipped": skipped}


def head_section(record: MigrationRecord) -> dict[str, Any]:
    """Matched heads by layer pair; ``columns`` are the old heads, or none where there are too many for a table."""
    rows: list[dict[str, Any]] = []
    for pair, heads in record.head_map.items():
        old, _, new = pair.partition("->")
        matched = {int(a): b for a, b in heads.items()}
        rows.append({"old": old, "new": new, "heads": matched, "mean": record.head_similarity.get(old)})
    columns = sorted({a for row in rows for a in row["heads"]})
    bars = {f"{row['old']}→{row['new']}": (row["mean"], None) for row in rows if row["mean"] is not None}
    return {
        "rows": rows,
        "read": _reads_heads(record.method),
        "columns": columns if len(columns) <= 16 else [],
        "figure": figures.columns(bars, "old → new layer", "mean similarity of matched heads", False) if bars else None,
    }


def _reads_heads(method: str) -> bool:
    """Whether a transform reads the head maps; taken for granted of one that is not installed."""
    return method not in names(controls=True) or Input.HEAD_MAPPING in transform(method).inputs


def energy_section(record: MigrationRecord) -> dict[str, Any]:
    """Energy kept by the cut to the output rank and unexplained variance of the alignment, by layer and module."""
    grid: dict[int, dict[str, float]] = {}
    for path, kept in record.retained_energy.items():
        found = re.search(r"\.(\d+)\.", path)
        layer = int(found[1]) if found else -1
        grid.setdefault(layer, {})[path.rpartition(".")[2]] = kept
    names = list(dict.fromkeys(name for row in grid.values() for name in row))
    bars = {str(layer): (fmean(row.values()), min(row.values())) for layer, row in sorted(grid.items())}
    lossless = all(kept > 0.9995 for row in grid.values() for kept in row.values())
    aligned, layers = record.alignment, record.layers
    residual = {} if aligned is None else {int(layer): ends for layer, ends in aligned.residual.items()}
    spread = {str(layers[o]): (fmean(e.values()), max(e.values())) for o, e in sorted(residual.items()) if e}
    return {
        "names": names,
        "grid": sorted(grid.items()),
        "lossless": lossless,
        "figure": None if lossless or not bars else figures.columns(bars, "new layer", "energy kept"),
        "rows": None if aligned is None else aligned.rows,
        "ends": list(dict.fromkeys(end for ends in residual.values() for end in ends)),
        "residual": [(layers[o], ends) for o, ends in sorted(residual.items())],
        "residual_figure": figures.columns(spread, "new layer", "unexplained variance") if spread else None,
        "norms": record.updates,
    }


def cost_section(record: MigrationRecord) -> dict[str, Any]:
    """Time and memory by stage: this run's seconds, and what the computation took whenever it was made."""
    rows = [run.model_dump() for run in record.timings]
    longest = max([row["computed_seconds"] for row in rows] or [1.0]) or 1.0
    for row in rows:
        row["share"] = max(0.5, 100 * row["computed_seconds"] / longest)
    spent = sum(row["seconds"] for row in rows)
    computed = sum(row["computed_seconds"] for row in rows)
    cached = sum(row["cached"] for row in rows)
    peak = max([row["peak_memory_bytes"] for row in rows] or [0])
    return {"rows": rows, "spent": spent, "computed": computed, "cached": cached, "peak": peak}
