"""Results of an experiment: its tables in Markdown, CSV and JSON, and its figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasuite.bases import digest_json, read_json
from lorasuite.planning import Experiment
from lorasuite.reporting._results_figures import draw
from lorasuite.reporting._results_tables import Measurement, markdown, tabulate, to_csv
from lorasuite.stored import replace_text

RESULTS = "results.json"
TABLES = "results.md"
CELLS = "results.csv"


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
    replace_text(folder / TABLES, heading + "\n".join(table["markdown"] for table in tables.values()))
    replace_text(folder / CELLS, to_csv([m for key in tables for m in found[key]]))
    record = {"experiment": experiment.config.name, "pair": experiment.pair_name, "tables": tables}
    replace_text(folder / RESULTS, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
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
