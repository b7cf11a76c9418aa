"""Variants of the transforms on the miniature pairs, none of them fine-tuned: what they add to their parents.

    python -m benchmarks.transfer.variants --output benchmarks/transfer/results/variants

Everything is done in memory, two small models at a time. Loss and exact match are of 500 test rows; texts of the task
are prompts of the training split with what the old base + adapter answers (greedily); general texts are the 512 of
``run.py``. Parts (``--parts``): *maps* (how a module's spaces are mapped), *layers* (which old layer feeds which new
one), *scales*, *targets* (what is fitted), *round* (old -> new -> old), *sequential*. Cells are kept as they come.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.plugins import register_plugins
from benchmarks.transfer.lab import GENERAL, Base, Lab, Row, Task, Updates, Variant
from benchmarks.transfer.layers import layers, scales
from benchmarks.transfer.maps import maps
from benchmarks.transfer.pairs import FURTHER, further_base, scores
from benchmarks.transfer.targets import proxy_itself, targets
from benchmarks.transfer.whole_models import sequentials, there_and_back
from benchmarks.zoo import train as trained
from lorasuite import zoo
from lorasuite.stored import replace_text

PARTS = ("maps", "layers", "scales", "targets", "round", "sequential")


def unread(task: Task) -> dict[str, float]:
    """What a guess gets that knows how often each token occurs in the teacher's answers, and reads nothing."""

    def tokens(rows: Sequence[Row]) -> Tensor:
        ids, labels = task.lab.new.rows(rows)
        return ids[labels != trained.IGNORED]

    counts = torch.bincount(tokens(task.rows), minlength=task.lab.new.dims.vocab_size).double() + 0.1
    return {"exact_match": 0.0, "loss": float(-(counts / counts.sum()).log()[tokens(task.test)].mean())}


def run_task(task: Task, name: str, parts: Sequence[str], deep: bool, keep: Callable[[str, str, Any], None]) -> None:
    def cell(variant: str, parent: str, compute: Callable[[], Updates]) -> None:
        keep(variant, parent, lambda: task.score(compute()))

    keep("bare", "", lambda: scores(task.lab.new.model, task.lab.new.tokenizer, task.test))
    if "maps" in parts:
        keep("frequency of answer tokens (reads nothing)", "", lambda: unread(task))
    sources: dict[str, Callable[[Task], Iterator[Variant]]] = {
        "maps": maps,
        "layers": layers,
        "scales": scales,
        "targets": targets,
    }
    for variant in chain.from_iterable(sources[part](task) for part in parts if part in sources):
        cell(*variant)
    if "targets" in parts:
        keep("proxy logits themselves, alpha 1 (no fit)", "bare", lambda: proxy_itself(task, 1.0))
    if "round" in parts and name != FURTHER and task.name in ("mirror", "blend"):
        for method in ("lorasuite", "procrustes", "functional", "functional-ridge", "sequential"):
            keep(f"there and back, {method}", "", lambda method=method: there_and_back(task, method))
    if "sequential" in parts and name != FURTHER:
        for variant in sequentials(task, deep):
            cell(*variant)


def write(cells: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """One table: a variant a row, a task a column, and on how many it beats its parent."""
    seeds = sorted({key.split("/")[3] for key in cells})
    lines = [
        "Exact match in % (loss in nats a token) on 500 test rows, without fine-tuning. *Better*: tasks with a",
        "",
    ]
    lines[0] += " lower loss than the parent's, of those where both were run (without `further`)."
    for seed in seeds:
        found: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
        for key, value in cells.items():
            name, task, variant, own = key.split("/")
            if own == seed:
                found[variant][f"{name} {task}"] = value
        columns = list(dict.fromkeys(column for row in found.values() for column in row))
        lines += ["", f"Seed {seed} (of general texts and of the prompts that the teacher answers).", ""]
        lines += [f"| variant | parent | {' | '.join(columns)} | better |", "|---" * (len(columns) + 3) + "|"]
        for variant, row in found.items():
            if variant.startswith("there"):
                continue
            parent = next(iter(row.values()))["parent"]
            both = [c for c in row if c in found.get(parent, {}) and not c.startswith(FURTHER)]
            won = sum(row[c]["loss"] < found[parent][c]["loss"] - 0.005 for c in both)
            shown = [f"{100 * row[c]['exact_match']:.1f} ({row[c]['loss']:.2f})" if c in row else "–" for c in columns]
            better = f"{won} of {len(both)}" if parent and both else ""
            lines.append(f"| {variant} | {parent} | {' | '.join(shown)} | {better} |")
        back = {variant: row for variant, row in found.items() if variant.startswith("there")}
        if back:
            used = list(dict.fromkeys(column for row in back.values() for column in row))
            lines += ["", "Old -> new -> old: relative error of ΔW, and exact match on the old base.", ""]
            lines += ["| method | " + " | ".join(used) + " |", "|---" * (len(used) + 1) + "|"]
            for variant, row in back.items():
                values = [
                    f"{row[c]['error']:.2f}, {100 * row[c]['exact_match']:.1f}" if c in row else "–" for c in used
                ]
                lines.append(f"| {variant.partition(', ')[2]} | " + " | ".join(values) + " |")
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="cells.json; the table lies beside it as NAME.md")
    parser.add_argument("--pairs", nargs="+", default=["llama", "neox", FURTHER])
    parser.add_argument("--tasks", nargs="+", default=["mirror", "drift", "blend"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--deep", nargs="*", default=["llama/mirror"], help="tasks with 4,000 rows of sequential, too")
    parser.add_argument("--only", nargs="*", default=[], help="variants with one of these in their names")
    parser.add_argument("--further", type=Path, help="folder of the pair further's new base, made where missing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    register_plugins()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    kept = output / "cells.json"
    cells: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for seed in arguments.seeds:
        for name in arguments.pairs:
            words = "llama" if name == FURTHER else name
            pair = zoo.pair(words)
            new = (
                further_base(arguments.further or output.parent / "work/further-base") if name == FURTHER else pair.new
            )
            lab = Lab(Base(pair.old), Base(new), zoo.texts(words, GENERAL, seed))
            for task in arguments.tasks:

                def keep(variant: str, parent: str, compute: Any, name: str = name, task: str = task) -> None:
                    key = f"{name}/{task}/{variant}/{seed}"  # noqa: B023
                    wanted = not arguments.only or any(part in variant for part in arguments.only)
                    if wanted and key not in cells:
                        cells[key] = {"parent": parent, **compute()}
                        replace_text(kept, json.dumps(cells, indent=1))
                        print(key, cells[key], file=sys.stderr, flush=True)

                deep = f"{name}/{task}" in arguments.deep
                run_task(Task(lab, words, task, seed), name, arguments.parts, deep, keep)
                write(cells, output.parent / f"{output.name}.md")


if __name__ == "__main__":
    main()
