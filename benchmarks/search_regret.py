"""What the search of ``--method auto`` gives away: its run against every start at every rate, on the miniature pairs.

    python benchmarks/search_regret.py run [--pairs llama neox] [--tasks …] [--seeds 0 1 2]    # resumable
    python benchmarks/search_regret.py table

A cell is a pair, a task and a seed: 100 labelled rows, 3 epochs, nothing written. ``auto`` tries all candidates and
every other flag is at its default; beside it every start of ``STARTS`` at every rate of ``RATES``, on the same rows.
Regret is in points of exact match on 200 held-out rows: against the best single start, fixed for all cells, and against
the best start of each cell; each at its best rate of each cell, in hindsight. Results are in ``search_regret.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
sys.path.insert(0, str(Path(__file__).parents[1]))

from lorasuite import zoo

RESULTS = Path(__file__).with_suffix(".json")
STARTS = ("fresh", "procrustes", "functional", "sequential")
RATES = (1e-3, 3e-3, 1e-2)
ROWS, TEXTS, HELD_OUT = 100, 256, 200


def settings(folder: Path, pair: str, task: str, seed: int) -> dict[str, Any]:
    """What every migration of a cell is given; its files are written into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    given = zoo.pair(pair)
    zoo.write_rows([{"text": text} for text in zoo.texts(pair, TEXTS)], folder / "texts.jsonl")
    zoo.write_rows(zoo.rows(pair, task, "train", 4 * ROWS), folder / "train.jsonl")
    zoo.write_rows(zoo.rows(pair, task, "test", HELD_OUT), folder / "test.jsonl")
    return {
        "adapter": str(given.adapter(task)), "old_base": str(given.old), "new_base": str(given.new), "seed": seed,
        "calibration": str(folder / "texts.jsonl"), "train_data": str(folder / "train.jsonl"), "device": "cpu",
        "eval_data": str(folder / "test.jsonl"), "finetune_samples": ROWS, "teacher_samples": 0,
        "finetune": {"batch_size": 16}, "rehearsal": 0,
    }  # fmt: skip


def measure(work: Path, pair: str, task: str, seed: int) -> dict[str, Any]:
    """The cell: exact match and loss of what ``auto`` published, and of each start at each rate."""
    folder = work / pair / task
    given = settings(folder, pair, task, seed)
    with tempfile.TemporaryDirectory(dir=folder) as output:
        return measured(given, Path(output), {"pair": pair, "task": task, "seed": seed})


def measured(given: dict[str, Any], output: Path, cell: dict[str, Any]) -> dict[str, Any]:
    """A cell's migrations, each written into ``output`` under a name of its own."""
    from flows.migrate_adapter import migrate_adapter

    found = migrate_adapter({**given, "candidates": ["all"], "output": str(output / "auto")})
    scores = found["evaluation"]["migrated+lft"]
    cell["cost"] = found["finetune"]["search"]["cost"]
    cell["rate"] = found["finetune"]["learning_rate"]
    cell["auto"] = [scores["exact_match"], scores["loss"]]
    for method in STARTS[1:]:
        for rate in RATES:
            told = {"method": method, "output": str(output / f"{method}-{rate:g}")}
            told["finetune"] = {**given["finetune"], "learning_rate": rate}
            arms = migrate_adapter({**given, **told})["evaluation"]
            for start, arm in ((method, "migrated+lft"), ("fresh", "scratch")):
                cell[f"{start} {rate:g}"] = [arms[arm]["exact_match"], arms[arm]["loss"]]
    return cell


def run(work: Path, pairs: list[str], tasks: list[str] | None, seeds: list[int]) -> None:
    """Measure what is not there yet, a cell after the other."""
    os.environ.setdefault("LORASUITE_HOME", str(work / "home"))
    os.environ.setdefault("PREFECT_HOME", str(work / "prefect"))
    cells = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    there = {(cell["pair"], cell["task"], cell["seed"]) for cell in cells}
    for seed in seeds:
        for pair in pairs:
            for task in tasks or zoo.pair(pair).tasks:
                if (pair, task, seed) not in there:
                    cells.append(measure(work, pair, task, seed))
                    RESULTS.write_text(_lines(cells), encoding="utf-8")
                    print(f"{pair}, {task}, seed {seed}: {cells[-1]['auto'][0]:.3f}", flush=True)


def _lines(cells: list[dict[str, Any]]) -> str:
    return "[\n" + ",\n".join(json.dumps(cell) for cell in cells) + "\n]\n"


def best(cell: dict[str, Any], start: str) -> tuple[float, str]:
    """Exact match of a start at its best rate of a cell, in hindsight, and that rate."""
    return max((cell[f"{start} {rate:g}"][0], f"{rate:g}") for rate in RATES)


def table(cells: list[dict[str, Any]]) -> Iterator[str]:
    """The Markdown lines: a cell a row, then the means and regrets."""
    yield f"| cell | `auto` | cost | {' | '.join(STARTS)} |"
    yield "|---" * (3 + len(STARTS)) + "|"
    for cell in sorted(cells, key=lambda one: (one["pair"], one["task"], one["seed"])):
        found = (best(cell, start) for start in STARTS)
        starts = " | ".join(f"{100 * value:.1f} ({rate})" for value, rate in found)
        yield (
            f"| {cell['pair']}, {cell['task']}, {cell['seed']} | {100 * cell['auto'][0]:.1f} ({cell['rate']:g}) | "
            f"{cell['cost']:.2f} | {starts} |"
        )
    auto = mean(cell["auto"][0] for cell in cells)
    means = {start: mean(best(cell, start)[0] for cell in cells) for start in STARTS}
    yield f"| mean | {100 * auto:.1f} | | {' | '.join(f'{100 * means[start]:.1f}' for start in STARTS)} |"
    top = max(means, key=lambda start: means[start])
    each = mean(max(best(cell, start)[0] for start in STARTS) - cell["auto"][0] for cell in cells)
    yield ""
    yield f"Regret against `{top}`, the best start fixed for all cells: {100 * (means[top] - auto):.1f} points;"
    yield f"against the best start of each cell: {100 * each:.1f}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["run", "table"])
    parser.add_argument("--work", type=Path, default=Path("search-regret"))
    parser.add_argument("--pairs", nargs="+", default=["llama", "neox"])
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = parser.parse_args()
    if given.do == "run":
        run(given.work.absolute(), given.pairs, given.tasks, given.seeds)
    else:
        print("\n".join(table(json.loads(RESULTS.read_text(encoding="utf-8")))))


if __name__ == "__main__":
    main()
