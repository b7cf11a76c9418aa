"""The fleet's record and page, beside its outputs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasuite.bases import read_json
from lorasuite.reporting._files import FLEET_RECORD
from lorasuite.reporting._report import write_report


def write_fleet(folder: Path, result: Mapping[str, Any], fleet: str | None = None) -> Path:
    """``fleet.json`` and the report of a fleet, beside its outputs; rows of adapters not in ``result`` stay.

    Returns:
        the report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FLEET_RECORD
    before = read_json(path)["adapters"] if path.is_file() else []
    rows = {(row["name"], row["pair"]): row for row in before}
    rows |= {(row["name"], row["pair"]): row for row in fleet_rows(result["adapters"], folder)}
    record = {"fleet": fleet, "adapters": list(rows.values())}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return write_report(folder)


def fleet_rows(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Rows of a fleet with their report's address relative to the fleet's own page."""
    return [
        {**row, "report": None if row["report"] is None else Path(os.path.relpath(row["report"], folder)).as_posix()}
        for row in rows
    ]
