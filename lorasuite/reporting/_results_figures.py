"""The figures of an experiment's tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasuite.planning import ExperimentTable
from lorasuite.reporting._results_tables import (
    GIB,
    SHARES,
    Cells,
    Measurement,
    average,
    levels_of,
    peak_memory,
    seconds_per_adapter,
)
from lorasuite.stored import replacing


def draw(spec: ExperimentTable, found: Cells, path: Path) -> Path | None:
    """A table's figure as PNG: lines over one numeric factor, bars otherwise; None where there is nothing to draw."""
    from matplotlib.figure import Figure

    if spec.figure == "none" or not any(m.scores or m.cost for m in found):
        return None
    tasks = list(dict.fromkeys(m.task for m in found))
    wide = 2 if spec.kind == "cost" else len(tasks)
    figure = Figure(figsize=(max(6.0, 4.6 * wide), 3.8), layout="constrained", dpi=110)
    panels = list(figure.subplots(1, wide, squeeze=False)[0])
    if spec.kind == "cost":
        _draw_cost(spec, found, panels)
    for panel, task in zip(panels if spec.kind == "scores" else [], tasks, strict=False):
        members = [m for m in found if m.task == task]
        xs = _numbers(members) if len(spec.factors) == 1 else None
        if xs is not None:
            _draw_lines(spec, members, xs, panel)
        else:
            _draw_bars(spec, members, panel)
        panel.set_title(task)
        panel.spines[["top", "right"]].set_visible(False)
    if spec.kind == "scores" and spec.factors:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png")
    return path


def _value(spec: ExperimentTable, cell: Measurement) -> float | None:
    """What a figure shows of a cell: a loss, or a score, in percent where it is a share."""
    if spec.figure == "loss":
        return cell.loss
    if cell.score is None:
        return None
    return cell.score * (100 if set(cell.metric.split(", ")) <= SHARES else 1)


def _axis(spec: ExperimentTable, found: Cells) -> str:
    if spec.figure == "loss":
        return "loss (nats per token)"
    metric = next((m.metric for m in found if m.metric), "score")
    return f"{metric.replace('_', ' ')} (%)" if set(metric.split(", ")) <= SHARES else metric.replace("_", " ")


def _numbers(found: Cells) -> dict[tuple[str, ...], float] | None:
    """The levels of the one factor as numbers, if they are more than one and all are."""
    levels = levels_of(found)
    try:
        values = {level: float(level[0]) for level in levels}
    except ValueError:
        return None
    return values if len(values) > 1 else None


def _draw_lines(spec: ExperimentTable, found: Cells, xs: Mapping[tuple[str, ...], float], panel: Any) -> None:
    """Means over seeds with a band from the least to the most."""
    for arm in spec.arms:
        points = []
        for level, x in sorted(xs.items(), key=lambda item: item[1]):
            cells = [m for m in found if m.arm == arm and tuple(m.level.values()) == level]
            values = [v for m in cells if (v := _value(spec, m)) is not None]
            if values:
                points.append((x, statistics.mean(values), min(values), max(values)))
        if points:
            places, means, least, most = (list(column) for column in zip(*points, strict=True))
            panel.plot(places, means, "o-", label=arm.paper_label)
            panel.fill_between(places, least, most, alpha=0.15)
    if min(xs.values()) > 0 and max(xs.values()) >= 8 * min(xs.values()):
        panel.set_xscale("log")
        panel.set_xticks(sorted(xs.values()), [f"{x:g}" for x in sorted(xs.values())])
        panel.minorticks_off()
    panel.set(xlabel=next(iter(spec.factors)), ylabel=_axis(spec, found))


def _draw_bars(spec: ExperimentTable, found: Cells, panel: Any) -> None:
    """A group of bars a level, a bar an arm; without factors, a bar an arm. Whiskers: one standard error over rows."""
    levels = levels_of(found)
    groups = [" / ".join(level) for level in levels] if spec.factors else [""]
    width = 0.8 / len(spec.arms)
    for n, arm in enumerate(spec.arms):
        heights, errors = [], []
        for level in levels:
            cells = [m for m in found if m.arm == arm and tuple(m.level.values()) == level]
            heights.append(average(_value(spec, m) for m in cells) or 0.0)
            known = [m.stderr for m in cells if m.stderr is not None and spec.figure == "score"]
            scale = 100 if cells and set(cells[0].metric.split(", ")) <= SHARES else 1
            errors.append(scale * math.sqrt(statistics.mean(e**2 for e in known)) if known else 0.0)
        places = [k + (n + 0.5) * width - 0.4 for k in range(len(groups))]
        panel.bar(places, heights, width * 0.92, yerr=errors, capsize=2, label=arm.paper_label)
    panel.set_ylabel(_axis(spec, found))
    panel.margins(y=0.12)
    if spec.factors:
        panel.set_xticks(range(len(groups)), groups, fontsize=8)
        panel.set_xlabel(" / ".join(spec.factors))
    else:
        places = [(n + 0.5) * width - 0.4 for n in range(len(spec.arms))]
        panel.set_xticks(places, [arm.paper_label for arm in spec.arms], rotation=30, ha="right", fontsize=8)


def _draw_cost(spec: ExperimentTable, found: Cells, panels: Sequence[Any]) -> None:
    """Time and memory by arm."""
    arms = [arm for arm in spec.arms if any(m.arm == arm and m.cost for m in found)]
    labels = [arm.paper_label.replace(", ", ",\n") for arm in arms]
    for panel, title in zip(panels, ("seconds per adapter", "peak memory (GiB)"), strict=True):
        values = []
        for arm in arms:
            cells = [m for m in found if m.arm == arm]
            values.append(
                (seconds_per_adapter(cells) or 0.0) if panel is panels[0] else (peak_memory(cells) or 0.0) / GIB
            )
        bars = panel.barh(labels, values)
        panel.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.set_title(title)
        panel.spines[["top", "right"]].set_visible(False)
