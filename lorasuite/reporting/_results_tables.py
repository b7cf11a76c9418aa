"""The tables of an experiment, from its cells."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from lorasuite.evaluation import TASK_METRICS, Arm
from lorasuite.planning import ExperimentArm, ExperimentTable

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
    arm: ExperimentArm
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
        rows.append([arm.paper_label, *row, *(_published(paper.values.get(arm)) for paper in spec.paper)])
    return columns, rows


def _factor_table(spec: ExperimentTable, found: Cells) -> tuple[list[str], list[list[str]]]:
    """A level (or combination of levels) a row; for each task and arm a score, and a loss where there is one."""
    tasks = list(dict.fromkeys(m.task for m in found))
    pairs = [(task, arm) for task in tasks for arm in spec.arms]
    lossy = {pair for pair in pairs if any((m.task, m.arm) == pair and m.loss is not None for m in found)}
    columns = list(spec.factors)
    for task, arm in pairs:
        name = arm.paper_label if len(tasks) == 1 else f"{task}: {arm.paper_label}"
        columns += [name, f"{name}, loss"] if (task, arm) in lossy else [name]
    columns += [f"paper: {paper.label}" for paper in spec.paper]
    rows = []
    for level in levels_of(found):
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
    whole = [m for m in found if m.arm == Arm.RETRAINED]
    reference, memory = seconds_per_adapter(whole), peak_memory(whole)
    rows = []
    for arm in spec.arms:
        cells = [m for m in found if m.arm == arm]
        spent, held = seconds_per_adapter(cells), peak_memory(cells)
        row = [_plain(average(m.cost.get(name) for m in cells), 1) for name in ("pair", "transform", "finetune")]
        row.append(_plain(spent, 1))
        row.append(f"{100 * (1 - spent / reference):.1f} %" if spent is not None and reference else "–")
        row.append(_plain(None if held is None else held / GIB, 2))
        row.append(_plain(None if held is None or memory is None else (memory - held) / GIB, 2))
        rows.append([arm.paper_label, *row, *(_published(paper.values.get(arm)) for paper in spec.paper)])
    return columns, rows


def levels_of(found: Cells) -> list[tuple[str, ...]]:
    """The combinations of factor levels there are, in their order."""
    return list(dict.fromkeys(tuple(m.level.values()) for m in found))


def average(values: Iterable[float | None]) -> float | None:
    """Mean of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _mean(cells: Cells) -> float | None:
    """Over seeds."""
    return average(m.score for m in cells)


def seconds_per_adapter(cells: Cells) -> float | None:
    """Mean seconds to make one adapter, without the stages of the pair."""
    return average(sum(m.cost.get(name, 0.0) for name in ("transform", "finetune")) for m in cells if m.cost)


def peak_memory(cells: Cells) -> float | None:
    """The largest peak of any stage, in bytes."""
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
    return _plain(average(m.loss for m in cells), 3)


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


def to_csv(found: Cells) -> str:
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
