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
from lorasuite.stored import replace_text


def write_fleet(folder: Path, result: Mapping[str, Any], fleet: str | None = None) -> Path:
    """``fleet.json`` and the report of a fleet, beside its outputs; rows of adapters not in ``result`` stay.

    Returns:
        the report.
    """
    path = folder / FLEET_RECORD
    before = read_json(path)["adapters"] if path.is_file() else []
    rows = {(row["name"], row["pair"]): row for row in before}
    rows |= {(row["name"], row["pair"]): row for row in fleet_rows(result["adapters"], folder)}
    record = {"fleet": fleet, "adapters": list(rows.values())}
    replace_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return write_report(folder)


def fleet_rows(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Rows of a fleet with their report's address relative to the fleet's own page."""
    return [
        {**row, "report": None if row["report"] is None else Path(os.path.relpath(row["report"], folder)).as_posix()}
        for row in rows
    ]
