"""Results of an experiment: its tables in Markdown, CSV and JSON, and its figures."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from lorasuite.checkpoint import digest_json, read_json
from lorasuite.experiment import Arm, Experiment, ExperimentTable
from lorasuite.gate import TASK_METRICS

RESULTS = "results.json"
TABLES = "results.md"
CELLS = "results.csv"

#: What the arms are called: "small" is the rows of the light fine-tune (LFT), "full" all of them.
NAMES: dict[Arm, str] = {
    "old": "old base",
    "old+adapter": "old base + LoRA (full)",
    "new": "new base",
    "migrated": "migrated, w/o LFT",
    "scratch": "LoRA (small)",
    "migrated+lft": "migrated, w LFT",
    "retrained": "LoRA (full)",
    "refreshed": "refreshed (no labels)",
}
#: Metrics that are shares, shown in percent.
SHARES = {*TASK_METRICS}
GIB = 2**30


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Score(_Frozen):
    """One task's score; ``stderr`` over its ``n`` rows."""

    value: float
    stderr: float | None
    n: int | None


class Measurement(_Frozen):
    """One cell, measured. ``cached`` is None where it is not known."""

    table: str
    arm: Arm
    task: str
    seed: int
    level: dict[str, str] = {}
    keys: tuple[str, ...] = Field((), description="of its evaluations in the artifact store")
    cached: bool | None = False
    failed: str = Field("", description="why there is no score")
    metric: str = ""
    scores: dict[str, Score] = Field({}, description="of the task, or of each lm-eval task it is made of")
    loss: float | None = Field(None, description="nats per token of the completions")
    cost: dict[str, float] = Field({}, description="seconds: pair (once), transform or written rows, finetune")
    peak_memory_bytes: int | None = Field(None, description="largest of those stages")
    learning_rate: float | None = None

    @property
    def score(self) -> float | None:
        """Mean over its lm-eval tasks."""
        return statistics.mean(s.value for s in self.scores.values()) if self.scores else None

    @property
    def stderr(self) -> float | None:
        """Of :attr:`score`, over rows."""
        errors = [s.stderr for s in self.scores.values()]
        if not errors or None in errors:
            return None
        return math.sqrt(sum(e**2 for e in errors if e is not None)) / len(errors)

    def identity(self) -> dict[str, Any]:
        """Which cell it is."""
        return self.model_dump(include={"table", "arm", "task", "seed", "level"})

    def name(self) -> str:
        """For people."""
        level = [f"{factor}={value}" for factor, value in self.level.items()]
        return "/".join([self.table, *level, self.task, self.arm, f"seed {self.seed}"])

    def state(self) -> str:
        """Where its number is."""
        if self.failed:
            return f"failed: {self.failed}"
        return (
            "not known" if self.cached is None else "cached" if self.cached else "computed" if self.scores else "to do"
        )


def write_results(
    experiment: Experiment, found: Mapping[str, Sequence[Measurement]], folder: Path
) -> dict[str, dict[str, Any]]:
    """Write every table and figure there is.

    Args:
        found: table → its cells.

    Returns:
        by table: ``title``, ``columns``, ``rows``, ``markdown``, and ``figure``, the file's name or None.
    """
    tables: dict[str, dict[str, Any]] = {}
    for key, spec in experiment.config.tables.items():
        if key not in found:
            continue
        columns, rows = tabulate(spec, found[key])
        figure = draw(spec, found[key], folder / "figures" / f"{key}.png")
        tables[key] = {
            "title": spec.title,
            "columns": columns,
            "rows": rows,
            "markdown": markdown(spec, found[key], columns, rows, None if figure is None else f"figures/{key}.png"),
            "figure": None if figure is None else f"figures/{key}.png",
            "digest": _digest(experiment, key),
            "cells": [m.model_dump(mode="json") for m in found[key]],
        }
    heading = f"# {experiment.config.name}\n\n{experiment.pair_name}\n\n"
    _write(folder / TABLES, heading + "\n".join(table["markdown"] for table in tables.values()))
    _write(folder / CELLS, _csv([m for key in tables for m in found[key]]))
    record = {"experiment": experiment.config.name, "pair": experiment.pair_name, "tables": tables}
    _write(folder / RESULTS, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return {name: {k: v for k, v in table.items() if k not in ("digest", "cells")} for name, table in tables.items()}


def read_results(folder: Path) -> tuple[str, dict[str, tuple[str, list[Measurement]]]]:
    """The experiment whose results a directory holds, and by table a digest of what it was made of, and its cells.

    Raises:
        CheckpointError: if they cannot be read.
    """
    record = read_json(folder / RESULTS)
    return record["experiment"], {
        name: (table["digest"], [Measurement.model_validate(cell) for cell in table["cells"]])
        for name, table in record["tables"].items()
    }


def kept(experiment: Experiment, before: Mapping[str, tuple[str, list[Measurement]]]) -> dict[str, list[Measurement]]:
    """Those of earlier results that the experiment file, as it is now, would give again."""
    known = experiment.config.tables
    return {n: cells for n, (digest, cells) in before.items() if n in known and digest == _digest(experiment, n)}


def _digest(experiment: Experiment, table: str) -> str:
    everything = experiment.config.model_dump(mode="json", exclude={"tables"})
    return digest_json([everything, experiment.config.tables[table].model_dump(mode="json")])


def _write(path: Path, text: str) -> None:
    """Replace a file in one step: a killed run leaves no half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(path.suffix + ".partial")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


# ---------------------------------------------------------------------------------------------------------- tables

Cells = Sequence[Measurement]


def tabulate(spec: ExperimentTable, found: Cells) -> tuple[list[str], list[list[str]]]:
    """A table's column names and rows, as text: an arm a row, as in the paper, or a level a row where factors vary."""
    if spec.kind == "cost":
        return _cost_table(spec, found)
    return _factor_table(spec, found) if spec.factors else _arm_table(spec, found)


def _arm_table(spec: ExperimentTable, found: Cells) -> tuple[list[str], list[list[str]]]:
    """An arm a row; a column for each score, their mean, and the losses where there are some."""
    tasks = list(dict.fromkeys(m.task for m in found))
    parts = {task: list(dict.fromkeys(name for m in found if m.task == task for name in m.scores)) for task in tasks}
    losses = [task for task in tasks if any(m.task == task and m.loss is not None for m in found)]
    several = len(tasks) > 1
    columns = ["", *(name for task in tasks for name in parts[task])]
    averaged = [task for task in tasks if len(parts[task]) > 1]
    columns += [f"{task}, mean" for task in averaged] + (["mean"] if several else [])
    columns += [f"{task}, loss" for task in losses] + [f"paper: {paper.label}" for paper in spec.paper]
    rows = []
    for arm in spec.arms:
        cells = {task: [m for m in found if m.arm == arm and m.task == task] for task in tasks}
        row = [_part(cells[task], name) for task in tasks for name in parts[task]]
        row += [_shown(cells[task]) for task in averaged]
        if several:
            means = [_mean(cells[task]) for task in tasks]
            known = [mean for mean in means if mean is not None]
            metric = next((m.metric for m in found if m.metric), "")
            row.append(_number(statistics.mean(known), metric) if known and len(known) == len(means) else "–")
        row += [_loss(cells[task]) for task in losses]
        rows.append([NAMES[arm], *row, *(_published(paper.values.get(arm)) for paper in spec.paper)])
    return columns, rows


def _factor_table(spec: ExperimentTable, found: Cells) -> tuple[list[str], list[list[str]]]:
    """A level (or combination of levels) a row; for each task and arm a score, and a loss where there is one."""
    tasks = list(dict.fromkeys(m.task for m in found))
    pairs = [(task, arm) for task in tasks for arm in spec.arms]
    lossy = {pair for pair in pairs if any((m.task, m.arm) == pair and m.loss is not None for m in found)}
    columns = list(spec.factors)
    for task, arm in pairs:
        name = NAMES[arm] if len(tasks) == 1 else f"{task}: {NAMES[arm]}"
        columns += [name, f"{name}, loss"] if (task, arm) in lossy else [name]
    columns += [f"paper: {paper.label}" for paper in spec.paper]
    rows = []
    for level in _levels(found):
        row = list(level)
        for task, arm in pairs:
            cells = [m for m in found if (m.task, m.arm) == (task, arm) and tuple(m.level.values()) == level]
            row += [_shown(cells), _loss(cells)] if (task, arm) in lossy else [_shown(cells)]
        rows.append(row)
    return columns, rows


def _cost_table(spec: ExperimentTable, found: Cells) -> tuple[list[str], list[list[str]]]:
    """An arm a row: seconds, peak memory, and both against training on all rows."""
    columns = [
        "",
        "for the pair, once (s)",
        "transform / written rows (s)",
        "fine-tune (s)",
        "per adapter (s)",
        "time saved",
    ]
    columns += ["peak memory (GiB)", "memory saved (GiB)"] + [f"paper: {paper.label}" for paper in spec.paper]
    whole = [m for m in found if m.arm == "retrained"]
    reference, memory = _seconds(whole), _memory(whole)
    rows = []
    for arm in spec.arms:
        cells = [m for m in found if m.arm == arm]
        spent, held = _seconds(cells), _memory(cells)
        row = [_plain(_average(m.cost.get(name) for m in cells), 1) for name in ("pair", "transform", "finetune")]
        row.append(_plain(spent, 1))
        row.append(f"{100 * (1 - spent / reference):.1f} %" if spent is not None and reference else "–")
        row.append(_plain(None if held is None else held / GIB, 2))
        row.append(_plain(None if held is None or memory is None else (memory - held) / GIB, 2))
        rows.append([NAMES[arm], *row, *(_published(paper.values.get(arm)) for paper in spec.paper)])
    return columns, rows


def _levels(found: Cells) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(tuple(m.level.values()) for m in found))


def _average(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _mean(cells: Cells) -> float | None:
    """Over seeds."""
    return _average(m.score for m in cells)


def _seconds(cells: Cells) -> float | None:
    """To make one adapter, the pair being prepared."""
    return _average(sum(m.cost.get(name, 0.0) for name in ("transform", "finetune")) for m in cells if m.cost)


def _memory(cells: Cells) -> float | None:
    return max((m.peak_memory_bytes for m in cells if m.peak_memory_bytes), default=None)


def _part(cells: Cells, name: str) -> str:
    return _estimate([m.scores[name].value for m in cells if name in m.scores],
                     [m.scores[name].stderr for m in cells if name in m.scores], cells)  # fmt: skip


def _shown(cells: Cells) -> str:
    return _estimate([m.score for m in cells if m.score is not None], [m.stderr for m in cells if m.scores], cells)


def _estimate(values: Sequence[float], errors: Sequence[float | None], cells: Cells) -> str:
    """Mean over seeds ± the standard error over rows, and the range over seeds where there are several."""
    failed = sum(bool(m.failed) for m in cells)
    if not values:
        return "diverged" if failed else "–"
    metric = next(m.metric for m in cells if m.metric)
    text = _number(statistics.mean(values), metric)
    known = [error for error in errors if error is not None]
    if known:
        text += f" ± {_number(math.sqrt(statistics.mean(e**2 for e in known)), metric)}"
    if len(values) > 1:
        text += f" [{_number(min(values), metric)}, {_number(max(values), metric)}]"
    return text + (f" ({failed} diverged)" if failed else "")


def _loss(cells: Cells) -> str:
    return _plain(_average(m.loss for m in cells), 3)


def _number(value: float, metric: str) -> str:
    return f"{100 * value:.1f}" if set(metric.split(", ")) <= SHARES else f"{value:.3f}"


def _plain(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _published(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def markdown(
    spec: ExperimentTable, found: Cells, columns: Sequence[str], rows: Sequence[Sequence[str]], figure: str | None
) -> str:
    """One table with its title, what its numbers are, and its figure."""
    lines = [f"## {spec.title}\n", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", " ".join(part for part in (_caption(spec, found), spec.note.strip()) if part)]
    if figure is not None:
        lines += ["", f"![{spec.title}]({figure})"]
    return "\n".join(lines) + "\n"


def _caption(spec: ExperimentTable, found: Cells) -> str:
    if spec.kind == "cost":
        return "Seconds of the computation, whenever it was; not of evaluations, nor of training the old adapter."
    metrics = list(dict.fromkeys(m.metric for m in found if m.metric))
    counts = sorted({score.n for m in found for score in m.scores.values() if score.n})
    percent = " in percent" if metrics and set(", ".join(metrics).split(", ")) <= SHARES else ""
    told = f"{', '.join(metrics) or 'nothing measured'}{percent} ± standard error over rows"
    told += f" ({', '.join(map(str, counts))} a task)" if counts else ""
    seeds = len({m.seed for m in found})
    return told + (f", mean [least, most] of {seeds} seeds." if seeds > 1 else ", one seed.")


def _csv(found: Cells) -> str:
    """One row a score, long form."""
    levels = list(dict.fromkeys(name for m in found for name in m.level))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    fields = ["metric", "value", "stderr", "n", "loss", "learning_rate"]
    costs = ["pair_seconds", "transform_seconds", "finetune_seconds", "peak_memory_bytes", "failed", "keys"]
    writer.writerow(["table", "task", "score_of", "arm", *levels, "seed", *fields, *costs])
    for m in found:
        scores: dict[str, Score | None] = {**m.scores} or {"": None}
        for name, score in scores.items():
            values = [None] * 3 if score is None else [score.value, score.stderr, score.n]
            spent = [m.cost.get(part) for part in ("pair", "transform", "finetune")]
            place = [m.table, m.task, name, m.arm, *(m.level.get(level) for level in levels), m.seed]
            writer.writerow(
                [
                    *place,
                    m.metric,
                    *values,
                    m.loss,
                    m.learning_rate,
                    *spent,
                    m.peak_memory_bytes,
                    m.failed,
                    " ".join(m.keys),
                ]
            )
    return file.getvalue()


# --------------------------------------------------------------------------------------------------------- figures


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
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}")
    figure.savefig(scratch, format="png")
    scratch.replace(path)
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
    levels = _levels(found)
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
            panel.plot(places, means, "o-", label=NAMES[arm])
            panel.fill_between(places, least, most, alpha=0.15)
    if min(xs.values()) > 0 and max(xs.values()) >= 8 * min(xs.values()):
        panel.set_xscale("log")
        panel.set_xticks(sorted(xs.values()), [f"{x:g}" for x in sorted(xs.values())])
        panel.minorticks_off()
    panel.set(xlabel=next(iter(spec.factors)), ylabel=_axis(spec, found))


def _draw_bars(spec: ExperimentTable, found: Cells, panel: Any) -> None:
    """A group of bars a level, a bar an arm; without factors, a bar an arm. Whiskers: one standard error over rows."""
    levels = _levels(found)
    groups = [" / ".join(level) for level in levels] if spec.factors else [""]
    width = 0.8 / len(spec.arms)
    for n, arm in enumerate(spec.arms):
        heights, errors = [], []
        for level in levels:
            cells = [m for m in found if m.arm == arm and tuple(m.level.values()) == level]
            heights.append(_average(_value(spec, m) for m in cells) or 0.0)
            known = [m.stderr for m in cells if m.stderr is not None and spec.figure == "score"]
            scale = 100 if cells and set(cells[0].metric.split(", ")) <= SHARES else 1
            errors.append(scale * math.sqrt(statistics.mean(e**2 for e in known)) if known else 0.0)
        places = [k + (n + 0.5) * width - 0.4 for k in range(len(groups))]
        panel.bar(places, heights, width * 0.92, yerr=errors, capsize=2, label=NAMES[arm])
    panel.set_ylabel(_axis(spec, found))
    panel.margins(y=0.12)
    if spec.factors:
        panel.set_xticks(range(len(groups)), groups, fontsize=8)
        panel.set_xlabel(" / ".join(spec.factors))
    else:
        places = [(n + 0.5) * width - 0.4 for n in range(len(spec.arms))]
        panel.set_xticks(places, [NAMES[arm] for arm in spec.arms], rotation=30, ha="right", fontsize=8)


def _draw_cost(spec: ExperimentTable, found: Cells, panels: Sequence[Any]) -> None:
    """Time and memory by arm."""
    arms = [arm for arm in spec.arms if any(m.arm == arm and m.cost for m in found)]
    labels = [NAMES[arm].replace(", ", ",\n") for arm in arms]
    for panel, title in zip(panels, ("seconds per adapter", "peak memory (GiB)"), strict=True):
        values = []
        for arm in arms:
            cells = [m for m in found if m.arm == arm]
            values.append((_seconds(cells) or 0.0) if panel is panels[0] else (_memory(cells) or 0.0) / GIB)
        bars = panel.barh(labels, values)
        panel.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.set_title(title)
        panel.spines[["top", "right"]].set_visible(False)
