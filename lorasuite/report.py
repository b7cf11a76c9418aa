"""The HTML report of a migration: one self-contained page made from ``migration.json`` and the files beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from lorasuite.checkpoint import read_json
from lorasuite.errors import CheckpointError, Problem

REPORT = "report.html"
RECORD = "migration.json"
FIGURE_DATA = "figures.safetensors"

#: Arms of an evaluation in the order they are read, and what they are called.
ARMS = {
    "old": "old base",
    "old+adapter": "old base + adapter",
    "new": "new base",
    "migrated": "migrated, no LFT",
    "scratch": "LoRA from scratch, same samples",
    "migrated+lft": "migrated + LFT",
}
METRICS = {"exact_match": "exact match", "loss": "loss (nats/token)", "bits_per_byte": "bits per byte"}


def write_report(folder: Path) -> Path:
    """Build ``report.html`` of a migration directory from its ``migration.json``.

    Raises:
        CheckpointError: if the directory holds no migration.
    """
    if not (folder / RECORD).is_file():
        raise CheckpointError(Problem(str(folder), f"has no {RECORD}", "Give the output directory of a migration."))
    record = read_json(folder / RECORD)
    data = load_file(folder / FIGURE_DATA) if (folder / FIGURE_DATA).is_file() else {}
    path = folder / REPORT
    path.write_text(render(record, data), encoding="utf-8")
    return path


def render(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The page as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lorasuite"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    columns, rows = comparison(record.get("evaluation", {}))
    page: str = environment.get_template("report.html.j2").render(
        m=record,
        columns=columns,
        rows=rows,
        tasks=task_comparison(record.get("tasks", {})),
        figures=list(figures(record, tensors)),
    )
    return page


def comparison(evaluation: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """The before/after table: column titles, and a row an arm with ``value ± standard error`` cells."""
    metrics = [m for m in METRICS if any(arm.get(m) is not None for arm in evaluation.values())]
    rows = []
    for arm in [*[a for a in ARMS if a in evaluation], *[a for a in evaluation if a not in ARMS]]:
        result = evaluation[arm]
        cells = [_cell(metric, result) for metric in metrics]
        rows.append({"name": ARMS.get(arm, arm), "arm": arm, "cells": cells, "n": result["n"]})
    return [METRICS[m] for m in metrics], rows


def task_comparison(tasks: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """lm-eval scores: a column for each task and metric, a row an arm, ``value ± standard error`` cells."""
    arms = [*[a for a in ARMS if a in tasks], *[a for a in tasks if a not in ARMS]]
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


def figures(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """Title, alternative text and PNG of each figure there is data for."""
    layers = {int(o): int(n) for o, n in record["layer_map"].items()}
    if "similarity" in tensors:
        yield {
            "title": "Layer similarity",
            "alt": f"CKA of each old layer with each new one; the chosen path maps {record['layer_map']}",
            "png": heat_map(tensors["similarity"], layers),
        }
    if record.get("finetune"):
        curves = {"migrated + LFT": record["finetune"]["losses"]}
        if record.get("control"):
            curves["from scratch"] = record["control"]["losses"]
        yield {
            "title": "Training loss",
            "alt": "Training loss by step: " + ", ".join(f"{k} ends at {v[-1]['loss']:.3f}" for k, v in curves.items()),
            "png": loss_curves(curves),
        }


def heat_map(similarity: Tensor, layers: Mapping[int, int]) -> str:
    """CKA ``(L_o, L_n)`` with the chosen path, as base64 PNG."""
    figure, axes = _figure(2.5 + 0.28 * similarity.shape[1], 2 + 0.24 * similarity.shape[0])
    image = axes.imshow(similarity.float().numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.plot(list(layers.values()), list(layers), "o-", color="white", markeredgecolor="black", linewidth=1.5)
    axes.set_xlabel("new layer")
    axes.set_ylabel("old layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes, label="CKA")
    return _png(figure)


def loss_curves(curves: Mapping[str, list[Mapping[str, Any]]]) -> str:
    """Training losses by step, as base64 PNG."""
    figure, axes = _figure(6, 3.2)
    for name, losses in curves.items():
        axes.plot([point["step"] for point in losses], [point["loss"] for point in losses], label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats/token)")
    axes.legend()
    return _png(figure)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    return figure, figure.subplots()


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
