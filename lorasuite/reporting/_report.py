"""The HTML reports of a migration and of a fleet: self-contained pages made from the records and files beside them.

Every section says in a sentence when there is nothing to show, and what would be needed: a reader who has to decide
must not have to guess whether something is missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from lorasuite.bases import read_json
from lorasuite.errors import CheckpointError, Problem
from lorasuite.reporting._files import FIGURE_DATA, FLEET_RECORD, RECORD, REPORT
from lorasuite.reporting._names import LOADERS, VERDICT_WORDS
from lorasuite.reporting._page import render_template
from lorasuite.reporting._record import MigrationRecord
from lorasuite.reporting._sections import (
    candidates,
    cost_section,
    decision,
    energy_section,
    flips,
    head_section,
    layer_section,
    training,
)
from lorasuite.reporting._tables import GENERAL_COLUMNS, general_costs, metric_tables, task_tables


def write_report(folder: Path) -> Path:
    """Build ``report.html`` of a migration's directory from its ``migration.json``, or of a fleet's.

    Raises:
        CheckpointError: if the directory holds neither, or one that cannot be read.
    """
    path = folder / REPORT
    if (folder / RECORD).is_file():
        data = load_file(folder / FIGURE_DATA) if (folder / FIGURE_DATA).is_file() else {}
        page = render(MigrationRecord.read(folder / RECORD), data)
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


def render(record: MigrationRecord, tensors: Mapping[str, Tensor]) -> str:
    """A migration's page as HTML.

    Args:
        tensors: ``similarity`` ``(L_o, L_n)`` for the heat map, if it was measured.
    """
    word, tone = VERDICT_WORDS[record.verdict.verdict]
    return render_template(
        "report.html.j2",
        m=record,
        published=record.published,
        reason=record.reason(),
        word=word,
        tone=tone,
        decision=decision(record),
        metrics=metric_tables(record.evaluation, record.verdict.metric, record.label),
        tasks=task_tables(record.tasks, record.label),
        general={"columns": GENERAL_COLUMNS, "rows": general_costs(record.general)},
        flips=flips(record),
        candidates=candidates(record),
        training=training(record),
        layers=layer_section(record, tensors),
        heads=head_section(record),
        energy=energy_section(record),
        serving={LOADERS.get(name, name): served for name, served in record.serving.items()},
        cost=cost_section(record),
        settings=json.dumps(record.settings, indent=2, ensure_ascii=False, sort_keys=True),
    )


def render_fleet(fleet: Mapping[str, Any]) -> str:
    """A fleet's page as HTML: a row an adapter, sortable where scripts run."""
    words = {verdict: {"word": w, "tone": t} for verdict, (w, t) in VERDICT_WORDS.items()}
    order = {verdict: number for number, verdict in enumerate(VERDICT_WORDS)}
    rows = sorted(fleet["adapters"], key=lambda row: (order.get(row["verdict"], 99), row["name"]))
    counts = [(words[v], sum(row["verdict"] == v for row in rows)) for v in VERDICT_WORDS]
    return render_template(
        "fleet.html.j2", f=fleet, rows=rows, words=words, order=order, counts=[(w, n) for w, n in counts if n]
    )
