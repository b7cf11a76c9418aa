"""The label-free refresh: how much of the gap rows written by the old base + adapter recover, against real rows.

    python benchmarks/teacher.py --output benchmarks/teacher_results
    python benchmarks/teacher.py --output benchmarks/teacher_results --tasks sherlock \\
        --models DIR --text FILE.txt

Tasks ``mirror`` and ``blend`` are the miniature Llama pair's; their prompts are the task's, without answers.
``sherlock`` is the pair of really pretrained tiny models of ``real_pair.py`` (``--models``, ``--text``); there the
teacher is given the first words of passages, or nothing. Every cell fine-tunes from a fresh LoRA, or from ``--start``
adapters, at the learning rate that does best on a fifth of its own rows; prompts are those of as many real rows.
``recovered`` is ``(x − bare) / (retrain − bare)``, in exact match or in bits per byte. Results are kept in
``cells.json``: run again, only missing cells are computed, and of cells with the same rows (a filter that drops
nothing) only one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from benchmarks.real_pair import passages, train
from benchmarks.zoo.train import correct
from lorasuite import zoo
from lorasuite.adapters import attached
from lorasuite.bases import common_tokens, load_model, load_tokenizer
from lorasuite.data import Row, draw, fingerprint_rows, read_rows, split_rows
from lorasuite.teacher import TeacherSettings, text_losses, total, write_rows
from lorasuite.training import FinetuneSettings, RowAligner, finetune_swept, soft_labels

RATES = (1e-3, 3e-3, 1e-2)
#: For the pretrained pair, where 1e-2, the end of the other grid, had won every cell. It grows while its end is best.
WIDER = (*RATES, 3e-2)
NEXT = {3e-2: 1e-1, 1e-1: 3e-1}
HELD_OUT = 500


@dataclass
class Task:
    """One adapter, its two bases, and the rows."""

    name: str
    old: Path
    new: Path
    adapter: Path
    retrained: Path
    train: list[Row]
    score: Callable[[Any, Any], float]
    tokens: int
    cutoff: int
    prefix: str


def lora_of(adapter: Path) -> LoraConfig:
    """A fresh LoRA of an adapter's size and modules."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    targets = config["target_modules"]
    return LoraConfig(r=config["r"], lora_alpha=config["lora_alpha"], task_type="CAUSAL_LM", target_modules=targets)


def zoo_task(name: str) -> Task:
    pair = zoo.pair("llama")
    test = zoo.rows("llama", name, "test", HELD_OUT)

    def exact(model: Any, tokenizer: Any) -> float:
        with torch.no_grad():
            return statistics.mean(correct(model, tokenizer, test))

    rows = [Row(kind="completion", **row) for row in zoo.rows("llama", name, "train", 10_000)]
    places = pair.adapter(name), pair.retrained(name)
    return Task(name, pair.old, pair.new, *places, rows, exact, 16, 64, f"{name} :")


def real_task(models: Path, text: Path, output: Path) -> Task:
    old, new = models / "stories260K", models / "TinyStories-656K"
    found = passages(text.read_text(encoding="utf-8"))
    cut = len(found) * 9 // 10
    files = {"train": found[:cut], "test": found[cut : cut + 100]}
    for name, rows in files.items():
        zoo.write_rows(rows, output / f"{name}.jsonl")
    if not (output / "adapter").exists():
        train(old, output / "train.jsonl", output / "adapter", 3, 3e-3)
    if not (output / "reference").exists():  # its rate is swept as every cell's is
        tried = grown(
            WIDER, str(new), load_tokenizer(new), read_rows(output / "train.jsonl"),
            FinetuneSettings(epochs=3, batch_size=16, cutoff=384), output / "reference",
            adapter=None, lora=lora_of(output / "adapter"),
        )  # fmt: skip
        print("reference:", tried, file=sys.stderr)
    test = read_rows(output / "test.jsonl")

    def negative_bits(model: Any, tokenizer: Any) -> float:
        return -total(text_losses(model, tokenizer, test)).bits_per_byte

    rows = read_rows(output / "train.jsonl")
    return Task("sherlock", old, new, output / "adapter", output / "reference", rows, negative_bits, 384, 384, "")


def grown(
    rates: Sequence[float],
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    settings: FinetuneSettings,
    output: Path,
    **arguments: Any,
) -> dict[str, Any]:
    """Fine-tune at the best of a grid that grows while its highest rate is the best one, if :data:`NEXT` has more."""
    losses: dict[str, float | None] = {}
    while True:
        with tempfile.TemporaryDirectory() as folder:
            result, sweep = finetune_swept(
                model, tokenizer, split_rows(rows, seed=settings.seed), settings, rates,
                output=Path(folder) / "adapter", work_dir=Path(folder) / "work", **arguments,
            )  # fmt: skip
            losses |= {f"{entry.learning_rate:g}": entry.validation_loss for entry in sweep}
            best = result.learning_rate
            if best != max(rates) or best not in NEXT:
                shutil.copytree(Path(folder) / "adapter", output)
                return {"learning_rate": best, "losses": losses, "steps": result.steps, "distilled": result.distilled}
        rates = (best, NEXT[best])


def references(task: Task) -> dict[str, float]:
    """Score of the bare new base, the retrained LoRA and the teacher itself."""
    found = {}
    for name, base, adapter in (("bare", task.new, None), ("retrain", task.new, task.retrained),
                                ("teacher", task.old, task.adapter)):  # fmt: skip
        model, tokenizer = load_model(base), load_tokenizer(base)
        if adapter is None:
            found[name] = task.score(model, tokenizer)
        else:
            with attached(model, adapter) as wrapped:
                found[name] = task.score(wrapped, tokenizer)
    return found


def written(task: Task, cell: dict[str, Any]) -> tuple[list[Row], dict[str, Any]]:
    """The rows of a cell: the teacher's, or real ones."""
    if cell["source"] == "real":
        return draw(task.train, cell["samples"], cell["seed"]), {}
    settings = TeacherSettings(
        temperature=cell["temperature"],
        max_new_tokens=task.tokens,
        filter=cell["filter"],
        drop_unsure=cell.get("drop_unsure", 0.0) if cell["filter"] else 0.0,
        truncated="text" if cell["filter"] else "keep",
        text_prefix=cell.get("words", 3),
        prefix=task.prefix,
        batch_size=64,
        min_kept=0.0,
    )
    prompts = (
        None if cell["source"] == "itself" else draw(task.train, cell.get("few_prompts", cell["samples"]), cell["seed"])
    )
    tokenizer = load_tokenizer(task.old)
    with attached(load_model(task.old), task.adapter) as teacher:
        begun = time.perf_counter()
        found = write_rows(teacher, tokenizer, prompts, cell["samples"], settings, seed=cell["seed"])
        seconds = time.perf_counter() - begun
    truth = {row.prompt: row.completion for row in task.train if row.prompt}
    info = {**found.info(), "writing_seconds": seconds}
    if truth and cell["source"] == "prompts":
        info["right"] = statistics.mean(truth.get(row.prompt) == row.completion for row in found.rows)
    if cell["source"] == "mixed":  # beside as many real rows as prompts were given
        return [*(prompts or []), *found.rows], info
    return found.rows, info


def run(task: Task, cell: dict[str, Any], start: Path | None, known: list[dict[str, Any]]) -> dict[str, Any]:
    """Fine-tune on one cell's rows; its score. A known cell with the same rows and settings has it already."""
    rows, info = written(task, cell)
    info["rows_fingerprint"] = fingerprint_rows(rows)
    same = ("task", "seed", "epochs", "start", "distillation", "wider", "rows_fingerprint")
    for other in known:
        if all(other.get(name) == {**cell, **info}.get(name) for name in same):
            return {**other, **cell, **info}
    model, tokenizer = load_model(task.new), load_tokenizer(task.new)
    soft = None
    if weight := cell.get("distillation", 0.0):
        reader = load_tokenizer(task.old)
        common = common_tokens(reader, tokenizer, len(reader), len(tokenizer))
        with attached(load_model(task.old), task.adapter) as teacher:
            aligner = RowAligner(reader, tokenizer, task.cutoff)
            soft = soft_labels(teacher, aligner, rows, (common.old, common.new))
    tuning = FinetuneSettings(
        epochs=cell["epochs"], batch_size=16, cutoff=task.cutoff, seed=cell["seed"], distillation=weight
    )
    begun = time.perf_counter()
    earlier = cell.get("losses", {})  # of a grid whose end was the best one: it is gone on from there
    grid = (RATES, WIDER)["wider" in cell] if not earlier else (cell["learning_rate"], NEXT[cell["learning_rate"]])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "adapter"
        tuned = grown(
            grid, model, tokenizer, rows, tuning, output,
            adapter=start, lora=None if start else lora_of(task.adapter), soft_labels=soft,
        )  # fmt: skip
        seconds = time.perf_counter() - begun
        with attached(model, output) as wrapped:
            score = task.score(wrapped, tokenizer)
    tuned["losses"] = earlier | tuned["losses"]
    return {**cell, **info, **tuned, "tuning_seconds": seconds, "score": score}


def cells(task: str, seeds: Sequence[int], largest: int) -> list[dict[str, Any]]:
    """What is tried: everything on the first seed, the main cells on all."""
    found: list[dict[str, Any]] = []
    first = seeds[0]

    def add(seed: int, **cell: Any) -> None:
        entry = {"task": task, "seed": seed, "epochs": 3, "filter": True, "temperature": None, **cell}
        if entry not in found:
            found.append(entry)

    sampled = 0.9
    if task == "sherlock":  # a step is many times dearer: fewer cells
        for seed in seeds:
            add(seed, source="prompts", samples=100, temperature=sampled)
            add(seed, source="real", samples=100)
        for seed in seeds:
            for samples in (100, 300):
                add(seed, source="prompts", samples=samples, temperature=sampled, wider=True)
            add(seed, source="real", samples=100, wider=True)
            add(seed, source="mixed", samples=300, few_prompts=100, temperature=sampled, wider=True)
        for source in ("prompts", "real"):
            add(first, source=source, samples=1000, temperature=sampled if source == "prompts" else None, wider=True)
        for samples in (300, 1000):
            add(first, source="prompts", samples=samples, temperature=sampled)
        add(first, source="itself", samples=300, temperature=sampled)
        for words in (0, 8):
            add(first, source="prompts", samples=300, temperature=sampled, words=words)
        for temperature in (0.9, 0.5, 0.0):
            for kept in (True, False):
                add(first, source="prompts", samples=300, temperature=temperature, filter=kept)
        add(first, source="real", samples=1000)
        add(first, source="prompts", samples=300, temperature=sampled, drop_unsure=0.25)
        return found
    main = 0.0
    for seed in seeds:
        for samples in (100, 300, 1000):
            add(seed, source="prompts", samples=samples, temperature=main)
            add(seed, source="real", samples=samples)
        for source in ("prompts", "real"):
            add(seed, source=source, samples=100, epochs=12, temperature=main if source == "prompts" else None)
    for samples in (100, 300, 1000):
        for temperature in (0.0, 0.5, 0.9):
            for kept in (True, False):
                add(first, source="prompts", samples=samples, temperature=temperature, filter=kept)
    for samples in (300, 1000):
        add(first, source="itself", samples=samples, temperature=sampled)
        add(first, source="itself", samples=samples, temperature=1.0)
    # 30 prompts, several answers of each
    add(first, source="prompts", samples=300, temperature=sampled, few_prompts=30)
    add(first, source="prompts", samples=1000, temperature=main, drop_unsure=0.25)
    for weight in (0.5, 1.0):
        for samples in (100, 300):
            add(first, source="prompts", samples=samples, temperature=0.0, distillation=weight)
    if largest >= 10_000:
        add(first, source="prompts", samples=10_000, temperature=main, epochs=1)
        add(first, source="real", samples=10_000, epochs=1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["mirror", "blend"])
    parser.add_argument("--models", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--start", type=Path, help="directory of transformed adapters, one a task, to start from")
    parser.add_argument("--wider", action="store_true", help="only the cells with the wider grid of rates")
    parser.add_argument("--largest", type=int, default=1000, help="10000 adds the cells of so many rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    file = output / "cells.json"
    kept: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"references": {}, "cells": {}}
    for name in arguments.tasks:
        work = output / "work"
        work.mkdir(exist_ok=True)
        task = real_task(arguments.models, arguments.text, work) if name == "sherlock" else zoo_task(name)
        kept["references"].setdefault(name, references(task))
        for cell in cells(name, arguments.seeds, arguments.largest):
            start = arguments.start / name if arguments.start else None
            if arguments.wider and "wider" not in cell:
                continue
            entry = {**cell, "start": start is not None}
            key = json.dumps(entry, sort_keys=True)
            done = kept["cells"].get(key)
            if done is not None:
                best = done["learning_rate"]
                if "wider" not in cell or best not in NEXT or best != max(map(float, done["losses"])):
                    continue
            if done is not None:
                entry |= {"losses": done["losses"], "learning_rate": done["learning_rate"]}
            kept["cells"][key] = run(task, entry, start, [] if done else list(kept["cells"].values()))
            print(key, f"{recovered(kept, kept['cells'][key]):.3f}", file=sys.stderr, flush=True)
            file.write_text(json.dumps(kept, indent=1))
    (output / "table.md").write_text(table(kept))


def recovered(kept: dict[str, Any], cell: dict[str, Any]) -> float:
    """The share of the gap between the bare and the retrained new base."""
    ends = kept["references"][cell["task"]]
    return float((cell["score"] - ends["bare"]) / (ends["retrain"] - ends["bare"]))


def table(kept: dict[str, Any]) -> str:
    """One line a kind of cell, the mean over its seeds."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for cell in kept["cells"].values():
        extra = {k: cell[k] for k in ("words", "few_prompts", "drop_unsure", "distillation", "wider") if k in cell}
        rows = f"{cell['source']}" + "".join(f", {k} {v}" for k, v in extra.items())
        rows += ", from the transform" if cell["start"] else ""
        temperature = "–" if cell["source"] == "real" else str(cell["temperature"])
        kept_ = "–" if cell["source"] == "real" else ("on" if cell["filter"] else "off")
        groups.setdefault(
            (cell["task"], rows, str(cell["samples"]), temperature, kept_, str(cell["epochs"])), []
        ).append(cell)
    head = "| task | rows | samples | temperature | filter | epochs | rate | score | gap recovered (by seed) |"
    lines = [head, "|---" * 9 + "|"]
    for key, members in sorted(groups.items(), key=lambda item: (item[0][0], int(item[0][2]), item[0])):
        rates = "/".join(f"{cell['learning_rate']:g}" for cell in members)
        score = statistics.mean(cell["score"] for cell in members)
        shares = ", ".join(f"{recovered(kept, cell):.2f}" for cell in members)
        lines.append("| " + " | ".join([*key, rates, f"{score:.3f}", shares]) + " |")
    ends = "; ".join(
        f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in r.items()) for name, r in kept["references"].items()
    )
    return "\n".join([f"References: {ends}", "", *lines]) + "\n"


if __name__ == "__main__":
    main()
