"""What every stage costs at real sizes: two real pairs measured, the nine pairs of the paper, 8B and 70B by count.

    python benchmarks/scale.py pairs [--only OLD:NEW …] [--limit 150]   # one real-sized layer of each pair
    python benchmarks/scale.py again [--only OLD:NEW …]                 # in the cells that are there, equation 3 alone
    python benchmarks/scale.py real NAME migration.json [prepare.json]  # a finished migration of a real pair
    python benchmarks/scale.py table                                    # benchmarks/scale/table.md and growth.png

``pairs`` makes both bases of a pair with random weights, at their published widths but one layer deep and with a cut
vocabulary, migrates a random rank-16 LoRA of every linear module, and keeps each stage's seconds and memory beside what
the cost model (:mod:`lorasuite.planning`) says of that same run. The pair at its full depth and vocabulary is the cost
model's count, times how much slower the stage was than counted. Pairs whose single layer would take longer than
``--limit`` seconds are counted with the factors of the widest pair that was measured. Cells are JSON files under
``benchmarks/scale/``; those that are there are not run again. ``again`` measures what only equation 3 reads and does
(:data:`EQUATION_3`) once more, for when that has changed, and puts it in the place of what their cells have of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", PREFECT_LOGGING_LEVEL="WARNING", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.scale_table import CELLS, counted, write_table
from benchmarks.shapes import PAIRS, cut, published, write_base, write_data, write_lora

#: Of the single layer that is measured: words of the vocabulary, texts and rows, their tokens, and the rank.
WORDS, TEXTS, ROWS, TOKENS, RANK = 4096, 16, 10, 64, 16
#: The stages that are measured again.
EQUATION_3 = ("head_mapping", "mlp_factors", "transform")


def measured(old: str, new: str, limit: float, moving: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """One layer of a pair, migrated with every transform; None where it would take longer than ``limit`` seconds.

    Args:
        moving: settings in place of those, and of the fine-tune.
    """
    from flows.migrate_adapter import migrate_adapter
    from lorasuite.planning import MigrationConfig, survey
    from tasks.fingerprints import fingerprint_bases

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if counted(old, new, layers=1, words=WORDS, texts=TEXTS, rows=ROWS)["total"]["seconds"] > limit:
            return None
        bases = [
            write_base(folder / side, cut(published(model), 1, WORDS), seed)
            for seed, (side, model) in enumerate((("old", old), ("new", new)))
        ]
        adapter = write_lora(folder / "adapter", bases[0], RANK)
        texts, rows = write_data(folder, WORDS, TEXTS, ROWS, TOKENS)
        config = {
            "adapter": str(adapter), "old_base": str(bases[0]), "new_base": str(bases[1]),
            "output": str(folder / "out"), "calibration": str(texts), "controls": False, "teacher_samples": 0,
            "pair": {"cka_batch": 8},
        }  # fmt: skip
        tuned = {"train_data": str(rows), "candidates": ["all"], "learning_rates": [1e-4]}
        tuned["finetune"] = {"epochs": 1, "batch_size": 16}
        config |= tuned if moving is None else moving
        found = survey(MigrationConfig.model_validate(config), folder)
        assert not found.problems, found.problems
        os.environ["LORASUITE_HOME"] = str(folder / "home")
        mark = time.perf_counter()
        fingerprint_bases.fn(folder / "elsewhere", *bases)
        read = {"stage": "fingerprint", "computed_seconds": time.perf_counter() - mark, "peak_memory_bytes": 0}
        record = migrate_adapter(config)
        disk = sum(file.stat().st_size for file in (folder / "home" / "objects").rglob("*") if file.is_file())
        return {"cost": found.cost, "timings": [read, *record["timings"]], "disk_bytes": disk}


def again(old: str, new: str) -> dict[str, Any]:
    """The pair's cell with equation 3 measured again."""
    cell: dict[str, Any] = json.loads((CELLS / f"{old}--{new}.json").read_text())
    fresh = measured(old, new, math.inf, {"method": "lorasuite"})
    assert fresh is not None
    for rows, found in ((cell["timings"], fresh["timings"]), (cell["cost"]["stages"], fresh["cost"]["stages"])):
        rows[:] = [row for row in rows if row["stage"] not in EQUATION_3]
        rows += [row for row in found if row["stage"] in EQUATION_3]
    return cell


def real(record: Path, pair: Path | None) -> dict[str, Any]:
    """A finished migration of a real pair: what it took, and what its settings would be said to take here."""
    from lorasuite.planning import MigrationConfig, survey

    known = json.loads(record.read_text())
    found = survey(MigrationConfig.model_validate(known["settings"]), record.parent)
    assert not found.problems, found.problems
    first = json.loads(pair.read_text())["timings"] if pair else []
    done = {row["stage"] for row in first}
    return {"cost": found.cost, "timings": [*first, *(row for row in known["timings"] if row["stage"] not in done)]}


def keep(name: str, cell: dict[str, Any]) -> None:
    """Write a cell."""
    CELLS.mkdir(exist_ok=True)
    for row in cell["timings"]:
        row.pop("key", None)
    (CELLS / f"{name}.json").write_text(json.dumps(cell, indent=1, sort_keys=True) + "\n")
    print(f"{name}: kept", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pairs = commands.add_parser("pairs")
    pairs.add_argument("--only", nargs="+", default=[])
    pairs.add_argument("--limit", type=float, default=150)
    one = commands.add_parser("real")
    one.add_argument("name")
    one.add_argument("record", type=Path)
    one.add_argument("pair", type=Path, nargs="?")
    once_more = commands.add_parser("again")
    once_more.add_argument("--only", nargs="+", default=[])
    commands.add_parser("table")
    given = parser.parse_args()
    if given.command == "real":
        keep(f"real-{given.name}", real(given.record, given.pair))
    elif given.command in ("pairs", "again"):
        for old, new in PAIRS:
            name = f"{old}--{new}"
            kept = (CELLS / f"{name}.json").exists()
            if (given.only and f"{old}:{new}" not in given.only) or kept != (given.command == "again"):
                continue
            cell = again(old, new) if kept else measured(old, new, given.limit)
            keep(name, cell) if cell else print(f"{name}: over {given.limit:g} s, by count alone", flush=True)
    else:
        write_table()


if __name__ == "__main__":
    main()
