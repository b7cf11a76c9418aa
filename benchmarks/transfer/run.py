"""Quality against budget on the miniature pairs: every method and the fresh LoRA, learning rates swept for each.

    python benchmarks/transfer/run.py --output benchmarks/transfer/results

Each cell is a migration through the ordinary flow, kept in the artifact store: run again, only missing cells are
computed. The fraction of the gap recovered is ``(arm − bare) / (retrain − bare)`` in exact match, where *retrain* is
the committed LoRA trained on 10,000 rows on the new base. Rows are drawn and weights initialised by the seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from flows.migrate_adapter import migrate_adapter
from lorasuite import zoo
from lorasuite.checkpoint import load_tokenizer
from lorasuite.data import read_rows
from lorasuite.evaluation import EvaluationSettings, evaluate

METHODS = ("lorasuite", "procrustes", "functional", "functional-ridge")
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
HELD_OUT = 300


def retrained(pair: zoo.Pair, task: str, test: Path) -> dict[str, float]:
    """Exact match of the bare new base and of the LoRA retrained on 10,000 rows."""
    results = evaluate(
        str(pair.new),
        load_tokenizer(pair.new),
        read_rows(test),
        EvaluationSettings(),
        adapters={"bare": None, "retrain": pair.retrained(task)},
    )
    return {arm: float(result.exact_match or 0) for arm, result in results.items()}


def cell(pair: zoo.Pair, task: str, method: str, samples: int, seed: int, data: Path) -> dict[str, Any]:
    """One migration; exact match of every arm and the learning rates chosen."""
    train = data / f"{pair.name}-{task}-train.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        record = migrate_adapter(
            {
                "adapter": str(pair.adapter(task)),
                "old_base": str(pair.old),
                "new_base": str(pair.new),
                "output": str(Path(folder) / "out"),
                "calibration": str(data / f"{pair.name}-texts.jsonl"),
                "train_data": str(train) if samples else None,
                "eval_data": str(data / f"{pair.name}-{task}-test.jsonl"),
                "finetune_samples": samples,
                "learning_rates": RATES if samples else (),
                "method": method,
                "seed": seed,
            }
        )
    found = {arm: result["exact_match"] for arm, result in record["evaluation"].items()}
    rates = {name: record[name]["learning_rate"] for name in ("finetune", "control") if record[name]}
    return {"exact_match": found, "learning_rates": rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pairs", nargs="+", default=list(zoo.PAIRS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--samples", nargs="+", type=int, default=[0, 10, 30, 100, 300])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    output: Path = arguments.output
    data = output / "data"
    data.mkdir(parents=True, exist_ok=True)
    cells: list[dict[str, Any]] = []
    for name in arguments.pairs:
        pair = zoo.pair(name)
        texts = [{"text": text} for text in zoo.texts(name, 256)]
        zoo.write_rows(texts, data / f"{name}-texts.jsonl")
        for task in pair.tasks:
            zoo.write_rows(zoo.rows(name, task, "train", max(arguments.samples)), data / f"{name}-{task}-train.jsonl")
            test = data / f"{name}-{task}-test.jsonl"
            zoo.write_rows(zoo.rows(name, task, "test", HELD_OUT), test)
            reference = retrained(pair, task, test)
            for samples in arguments.samples:
                for seed in arguments.seeds if samples else arguments.seeds[:1]:
                    for method in arguments.methods:
                        begun = time.perf_counter()
                        found = cell(pair, task, method, samples, seed, data)
                        row = {"pair": name, "task": task, "method": method, "samples": samples, "seed": seed}
                        cells.append({**row, **found, "reference": reference})
                        shown = {a: f"{v:.3f}" for a, v in found["exact_match"].items()}
                        print(f"{row} {shown} {time.perf_counter() - begun:.1f} s", file=sys.stderr)
                        (output / "cells.json").write_text(json.dumps(cells, indent=1))
    write(cells, output)


def arms(cells: list[dict[str, Any]]) -> dict[tuple[str, str, int], dict[str, list[float]]]:
    """``{(pair, task, samples): {arm: exact match by seed}}``; the control counts once a seed."""
    table: dict[tuple[str, str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    seen = set()
    for row in cells:
        key = (row["pair"], row["task"], row["samples"])
        scores = row["exact_match"]
        arm = "migrated+lft" if row["samples"] else "migrated"
        table[key][row["method"]].append(scores[arm])
        if row["samples"] and (key, row["seed"]) not in seen:
            seen.add((key, row["seed"]))
            table[key]["scratch"].append(scores["scratch"])
        table[key]["bare"] = [row["reference"]["bare"]]
        table[key]["retrain (10k)"] = [row["reference"]["retrain"]]
    return table


def write(cells: list[dict[str, Any]], output: Path) -> None:
    """The table in Markdown and a figure a pair, from the cells."""
    table = arms(cells)
    names = sorted({name for row in table.values() for name in row} - {"bare", "retrain (10k)", "scratch"})
    columns = ["bare", "scratch", *names, "retrain (10k)"]
    lines = ["| pair | task | samples | " + " | ".join(columns) + " |", "|---" * (len(columns) + 3) + "|"]
    for (pair, task, samples), row in table.items():
        cells_ = []
        for column in columns:
            values = row.get(column, [])
            if not values:
                cells_.append("–")
            else:
                spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells_.append(f"{100 * statistics.mean(values):.1f}{spread}")
        lines.append(f"| {pair} | {task} | {samples} | " + " | ".join(cells_) + " |")
    (output / "table.md").write_text("\n".join(lines) + "\n")
    for pair in {key[0] for key in table}:
        tasks = sorted({key[1] for key in table if key[0] == pair})
        figure = Figure(figsize=(4 * len(tasks), 3.4), layout="constrained", dpi=110)
        for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
            budgets = sorted(key[2] for key in table if key[:2] == (pair, task))
            for name in ["scratch", *names]:
                points = [(s, table[pair, task, s][name]) for s in budgets if table[pair, task, s].get(name)]
                xs = [max(s, 1) for s, _ in points]
                means = [statistics.mean(v) for _, v in points]
                axes.plot(xs, means, "o-", label=name)
                axes.fill_between(xs, [min(v) for _, v in points], [max(v) for _, v in points], alpha=0.15)
            axes.axhline(table[pair, task, budgets[0]]["retrain (10k)"][0], color="grey", linestyle=":")
            axes.set(title=task, xlabel="samples (0 drawn at 1)", xscale="log", ylim=(-0.02, 1.02))
        figure.axes[0].set_ylabel("exact match")
        figure.axes[0].legend(fontsize=8)
        figure.savefig(output / f"{pair}.png")


if __name__ == "__main__":
    main()
