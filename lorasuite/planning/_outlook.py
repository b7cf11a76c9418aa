"""What was measured of every way to a new adapter, elsewhere, and whether anything known beforehand predicts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Written by ``python -m benchmarks.real predict`` from the cells of real pairs.
FILE = Path(__file__).with_name("outlook.json")


def outlook() -> dict[str, Any]:
    """What is known, as JSON-able values.

    Returns:
        ``cells`` and ``pairs``: how many real ones were measured; ``predictor``: what predicts a way's result, None
        where nothing measured does; ``ways``: of each the lowest, mean and highest share that it kept of the old
        adapter's lead in loss, on real cells (``real``) and with the miniature ones (``all``).
    """
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found
