"""Transforms on the miniature pairs: without fine-tuning, and as the start of a fine-tune, learning rate swept for all.

    python benchmarks/transfer/run.py --output benchmarks/transfer/results

For each pair and task every transform is run once through the ordinary flow, without labels (`sequential` reads what
the old base + adapter writes to 320 prompts). Then each start, and a fresh LoRA, is fine-tuned on the same few rows
(12 epochs, batch 16) at every learning rate; the rate is chosen for each arm by loss on 100 validation rows and
reported as exact match on 500 test rows. *Gap recovered* is ``(arm − bare) / (retrain − bare)``, where *retrain* is the
committed LoRA trained on 10,000 rows of the new base. The pair ``further`` is an implicit upgrade: llama's old base
trained 300 steps more on the language it knows. Cells are kept as they come: run again, only missing ones are computed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from peft import get_peft_model

from lorasuite import zoo
from lorasuite.adapter import fresh_config, fresh_lora
from lorasuite.checkpoint import Checkpoint
from lorasuite.errors import LoRASuiteError
from lorasuite.finetune import attach_adapter
from lorasuite.zoo import train as trained

METHODS = ("copy", "lorasuite", "procrustes", "functional", "functional-ridge", "sequential")
STARTS = ("scratch", "lorasuite", "procrustes", "functional", "sequential")
RATES = (1e-3, 3e-3, 1e-2)
EPOCHS = 12
BATCH = 16
PROMPTS, VALIDATION, TEST = 320, 100, 500
FURTHER = "further"
FURTHER_STEPS = 300


def scores(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> dict[str, float]:
    return {
        "exact_match": sum(trained.correct(model, tokenizer, rows)) / len(rows),
        "loss": trained.validation_loss(model, tokenizer, rows),
    }


def further_base(folder: Path) -> Path:
    """Llama's old base, trained further."""
    if not (folder / "config.json").exists():
        torch.manual_seed(7)
        model, tokenizer = trained.load(zoo.pair("llama").old, "cpu")
        trained.train(
            model, trained.base_batches(tokenizer, set(), 77, False), FURTHER_STEPS, 1e-3, tokenizer.pad_token_id, print
        )
        model.save_pretrained(folder)
        trained._save_tokenizer(tokenizer, folder)
    return folder


def migrated(old: Path, new: Path, adapter: Path, method: str, output: Path, data: Path) -> Path | None:
    """The adapter on the new base without fine-tuning; None where the method does not apply."""
    from flows.migrate_adapter import migrate_adapter

    if output.exists():
        return output
    try:
        migrate_adapter(
            {
                "adapter": str(adapter), "old_base": str(old), "new_base": str(new), "output": str(output),
                "calibration": str(data / "texts.jsonl"), "prompts": str(data / "prompts.jsonl"), "method": method,
                "pair": {"calibration_samples": 512}, "teacher": {"max_new_tokens": 16},
            }
        )  # fmt: skip
    except LoRASuiteError as error:
        print(f"{method}: {error}", file=sys.stderr)
        return None
    return output


def tuned(new: Path, start: Path, fresh: bool, rows: list[dict[str, str]], rate: float, seed: int) -> tuple[Any, Any]:
    """The new base with an adapter fine-tuned from a start, or from a fresh LoRA of the same modules and size."""
    model, tokenizer = trained.load(new, "cpu")
    torch.manual_seed(seed)
    if fresh:
        wrapped = get_peft_model(model, fresh_config(fresh_lora(start, Checkpoint(new).architecture)))
    else:
        wrapped = attach_adapter(model, start, trainable=True)

    def batches() -> Iterator[Any]:
        generator = random.Random(seed)
        while True:
            order = generator.sample(rows, len(rows))
            for first in range(0, len(order), BATCH):
                yield trained.encode(tokenizer, order[first : first + BATCH])

    trained.train(wrapped, batches(), EPOCHS * math.ceil(len(rows) / BATCH), rate, None, lambda _: None)
    return wrapped, tokenizer


def run_task(name: str, task: str, budgets: list[int], seeds: list[int], output: Path, cells: dict[str, Any]) -> None:
    """Every cell of one task that is not there yet."""
    words = "llama" if name == FURTHER else name
    pair = zoo.pair(words)
    new = further_base(output / "work" / "further-base") if name == FURTHER else pair.new
    data = output / "work" / f"{name}-{task}"
    data.mkdir(parents=True, exist_ok=True)
    zoo.write_rows([{"text": text} for text in zoo.texts(words, 512)], data / "texts.jsonl")
    zoo.write_rows(zoo.rows(words, task, "train", PROMPTS), data / "prompts.jsonl")
    validation, test = zoo.rows(words, task, "validation", VALIDATION), zoo.rows(words, task, "test", TEST)

    def cell(key: str, compute: Any) -> None:
        key = f"{name}/{task}/{key}"
        if key not in cells:
            cells[key] = compute()
            part = output / "cells.json.partial"
            part.write_text(json.dumps(cells, indent=1, sort_keys=True))
            part.rename(output / "cells.json")
            print(key, cells[key], file=sys.stderr, flush=True)

    def measure(adapter: Path | None, base: Path = new) -> dict[str, float]:
        model, tokenizer = trained.load(base, "cpu")
        return scores(model if adapter is None else attach_adapter(model, adapter), tokenizer, test)

    cell("bare", lambda: measure(None))
    cell("old+adapter", lambda: measure(pair.adapter(task), pair.old))
    if name != FURTHER:
        cell("retrain", lambda: measure(pair.retrained(task)))
    starts = {}
    for method in METHODS:
        found = migrated(pair.old, new, pair.adapter(task), method, data / method, data)
        if found is not None:
            starts[method] = found
            cell(f"{method}/0", lambda found=found: measure(found))
    for budget in budgets:
        for seed in seeds:
            rows = zoo.rows(words, task, "train", budget, seed=100 + seed)
            for arm in STARTS:

                def compute(arm: str = arm, rows: Any = rows, seed: int = seed) -> dict[str, Any]:
                    tried = []
                    for rate in RATES:
                        start = starts["lorasuite" if arm == "scratch" else arm]
                        model, tokenizer = tuned(new, start, arm == "scratch", rows, rate, seed)
                        held = trained.validation_loss(model, tokenizer, validation)
                        tried.append({"rate": rate, "validation": held, **scores(model, tokenizer, test)})
                    return min(tried, key=lambda t: t["validation"] if math.isfinite(t["validation"]) else math.inf)

                cell(f"{arm}/{budget}/{seed}", compute)


def write(cells: dict[str, Any], output: Path) -> None:
    """Tables in Markdown and a figure a pair."""
    table: dict[tuple[str, str], dict[tuple[str, int], list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for key, value in cells.items():
        name, task, arm, *rest = key.split("/")
        table[name, task][arm, int(rest[0]) if rest else 0].append(value)
    shown = list(METHODS)
    lines = [
        "Without fine-tuning and without labels: exact match in % (loss in nats a token).", "",
        "| pair | task | bare | " + " | ".join(shown) + " | old + adapter | retrain (10k) |",
        "|---" * (len(shown) + 5) + "|",
    ]  # fmt: skip

    def single(row: Any, arm: str) -> str:
        found = row.get((arm, 0))
        return f"{100 * found[0]['exact_match']:.1f} ({found[0]['loss']:.2f})" if found else "–"

    for (name, task), row in table.items():
        values = [single(row, arm) for arm in ("bare", *shown, "old+adapter", "retrain")]
        lines.append(f"| {name} | {task} | " + " | ".join(values) + " |")
    lines += [
        "", f"After fine-tuning, {EPOCHS} epochs, best of {len(RATES)} learning rates: exact match in %, mean ± "
        "standard deviation over seeds.", "",
        "| pair | task | rows | " + " | ".join(STARTS) + " |", "|---" * (len(STARTS) + 3) + "|",
    ]  # fmt: skip
    for (name, task), row in table.items():
        for budget in sorted({n for _, n in row if n}):
            values = []
            for arm in STARTS:
                found_ = [100 * v["exact_match"] for v in row.get((arm, budget), [])]
                spread = f" ± {statistics.stdev(found_):.1f}" if len(found_) > 1 else ""
                values.append(f"{statistics.mean(found_):.1f}{spread}" if found_ else "–")
            lines.append(f"| {name} | {task} | {budget} | " + " | ".join(values) + " |")
    lines += [
        "", "Regret: the start with the least loss on the validation rows, against the best start in hindsight.", "",
        "| pair | task | rows | chosen (by seed) | exact match | best start | regret |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for (name, task), row in table.items():
        for budget in sorted({n for _, n in row if n}):
            runs = list(zip(*(row[arm, budget] for arm in STARTS), strict=False))
            if not runs:
                continue
            chosen = [min(zip(STARTS, run, strict=True), key=lambda pair: pair[1]["validation"]) for run in runs]
            got = statistics.mean(100 * found["exact_match"] for _, found in chosen)
            best = max(statistics.mean(100 * run[k]["exact_match"] for run in runs) for k in range(len(STARTS)))
            names = ", ".join(arm for arm, _ in chosen)
            lines.append(f"| {name} | {task} | {budget} | {names} | {got:.1f} | {best:.1f} | {best - got:.1f} |")
    (output / "table.md").write_text("\n".join(lines) + "\n")
    for pair in dict.fromkeys(name for name, _ in table):
        tasks = [task for name, task in table if name == pair]
        figure = Figure(figsize=(4 * len(tasks), 3.4), layout="constrained", dpi=110)
        for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
            row = table[pair, task]
            for arm in STARTS:
                budgets = sorted(n for a, n in row if a == arm)
                points = [(n or 1, [100 * v["exact_match"] for v in row[arm, n]]) for n in budgets if row[arm, n]]
                if points:
                    axes.plot([n for n, _ in points], [statistics.mean(v) for _, v in points], "o-", label=arm)
                    low, high = [min(v) for _, v in points], [max(v) for _, v in points]
                    axes.fill_between([n for n, _ in points], low, high, alpha=0.15)
            axes.set(title=task, xlabel="labelled rows (none drawn at 1)", xscale="log", ylim=(-2, 102))
        figure.axes[0].set_ylabel("exact match, %")
        figure.axes[0].legend(fontsize=8)
        figure.savefig(output / f"{pair}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pairs", nargs="+", default=["llama", "neox", FURTHER])
    parser.add_argument("--tasks", nargs="+", default=["mirror", "drift", "blend"])
    parser.add_argument("--samples", nargs="*", type=int, default=[10, 30, 100])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    kept = output / "cells.json"
    cells: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    with tempfile.TemporaryDirectory() as home:
        os.environ.setdefault("LORASUITE_HOME", home)
        for seeds in ([seed] for seed in arguments.seeds):  # a first seed of everything, then the others
            for name in arguments.pairs:
                for task in arguments.tasks:
                    run_task(name, task, arguments.samples if name != FURTHER else [], seeds, output, cells)
                    write(cells, output)


if __name__ == "__main__":
    main()
