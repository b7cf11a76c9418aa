"""Transforms on the miniature pairs: without fine-tuning, and as the start of a fine-tune, learning rate swept for all.

    python -m benchmarks.transfer.run --output benchmarks/transfer/results

For each pair and task every transform is run once through the ordinary flow, without labels (`sequential` reads what
the old base + adapter writes to 320 prompts). Then every arm is fine-tuned on the same few rows, batch 16, for 1, 3 and
12 epochs:

* `scratch`: a fresh LoRA of the same modules and size; `eva`, `lora-ga`, `pissa`: the same with PEFT's initialisations
  that look at the data, its gradients, or the weights;
* `scratch-long` and the like: as many steps on the rows alone as `refresh` takes, so that no lead is one of steps;
* a transform's name: from the adapter that it gives;
* `refresh`: a fresh LoRA on the rows **and** 300 more that the old base + adapter wrote: prompts imitated by the old
  base from the few rows' beginnings and ends (without any row: from the task's name), answers by the adapter.
  `refresh-1000` and `refresh-10000`: so many more; `sequential+refresh` and the like: from that transform's adapter;
* `auto`, `auto+refresh`, `default`: what `lorasuite migrate --method auto` publishes, which compares starts by itself
  on a part of its rows and knows no validation rows. The first has the 320 prompts that `sequential` has, and reads and
  chooses by what the old base + adapter answers; the second has none, and 300 written rows. `default` has the prompts
  and the rows, and no other flag but the epochs: it has 300 rows written and finds a learning rate by itself.

The learning rate is chosen for each arm by loss on 100 validation rows among 1e-3, 3e-3, 1e-2, and further on by a
factor of three where the best is an end of the grid; the result is exact match on 500 test rows. *Gap recovered* is
``(arm − bare) / (retrain − bare)``, where *retrain* is the committed LoRA trained on 10,000 rows of the new base. The
pair ``further`` is an implicit upgrade: llama's old base trained 300 steps more on the language it knows. Cells are
kept as they come, a file a pair and task: run again, or several at once with other ``--pairs`` or ``--tasks``; only
missing ones are computed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model, initialize_lora_eva_weights, preprocess_loraga

from benchmarks.plugins import register_plugins
from benchmarks.transfer.arms import (
    ARMS,
    AUTOMATIC,
    BATCH,
    EPOCHS,
    HIGHEST,
    LONG,
    LOWEST,
    METHODS,
    PROMPTS,
    RATES,
    START,
    TEST,
    TRANSFORMED,
    VALIDATION,
    WRITTEN,
)
from benchmarks.transfer.pairs import FURTHER, further_base, scores
from benchmarks.transfer.tables import finite, write
from benchmarks.zoo import train as trained
from lorasuite import zoo
from lorasuite.adapters import attach_adapter, attached, fresh_config, fresh_lora
from lorasuite.bases import Checkpoint, load_model, load_tokenizer
from lorasuite.data import Row as DataRow
from lorasuite.errors import LoRASuiteError
from lorasuite.stored import replace_text
from lorasuite.teacher import TeacherSettings, write_rows


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
                "pair": {"calibration_samples": 512}, "teacher": {"max_new_tokens": 16}, "teacher_samples": 0,
            }
        )  # fmt: skip
    except LoRASuiteError as error:
        print(f"{method}: {error}", file=sys.stderr)
        return None
    return output


def initialised(model: Any, config: LoraConfig, arm: str, batches: list[Any]) -> Any:
    """A fresh LoRA by one of PEFT's initialisations, with the first rows as its data."""
    if arm == "pissa":
        config.init_lora_weights = "pissa"
    elif arm == "eva":
        config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=1.0)
        wrapped = get_peft_model(model, config)
        read = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids, _ in batches]
        with contextlib.redirect_stdout(sys.stderr):
            initialize_lora_eva_weights(wrapped, read, show_progress_bar=False)
        return wrapped
    elif arm == "lora-ga":
        config.init_lora_weights, config.lora_ga_config = "lora_ga", LoraGAConfig()

        def step() -> None:
            for ids, labels in batches:
                model(input_ids=ids, labels=labels).loss.backward()

        preprocess_loraga(model, config, step)
    return get_peft_model(model, config)


def tuned(
    new: Path, arm: str, start: Path, rows: list[dict[str, str]], epochs: int, rate: float, seed: int
) -> tuple[Any, Any]:
    """The new base with an adapter fine-tuned from a transform's, or from a fresh LoRA of the same modules and size."""
    model, tokenizer = trained.load(new, "cpu")
    torch.manual_seed(seed)

    def batches() -> Iterator[Any]:
        generator = random.Random(seed)
        while True:
            order = generator.sample(rows, len(rows))
            for first in range(0, len(order), BATCH):
                yield trained.encode(tokenizer, order[first : first + BATCH])

    steps = math.ceil((len(rows) + (WRITTEN["refresh"] if arm in LONG else 0)) / BATCH)
    arm = START.get(arm, arm)
    if arm in TRANSFORMED:
        wrapped = attach_adapter(model, start, trainable=True)
    else:
        config = fresh_config(fresh_lora(start, Checkpoint(new).architecture))
        wrapped = initialised(model, config, arm, list(islice(batches(), math.ceil(len(rows) / BATCH))))
    trained.train(wrapped, batches(), epochs * steps, rate, None, lambda _: None)
    return wrapped, tokenizer


def swept(
    attempt: Callable[[float], tuple[float, Any]], finish: Callable[[Any], dict[str, float]], known: dict[str, Any]
) -> dict[str, Any]:
    """The attempt with the least validation loss, finished; the grid grows by a factor of three while its end is best.

    Args:
        attempt: from a learning rate to a validation loss and what was trained.
        known: an earlier cell of the same arm, whose rate was the best of the first grid; empty without one.
    """
    losses: dict[float, float] = {}
    kept: Any = None

    def run(rate: float) -> None:
        nonlocal kept
        loss, model = attempt(rate)
        losses[rate] = finite(loss)
        if losses[rate] == min(losses.values()):
            kept = model

    if known:
        losses[known["rate"]] = finite(known["validation"])
    else:
        for rate in RATES:
            run(rate)
    while True:
        best = min(losses, key=losses.__getitem__)
        grid = sorted({*RATES, *losses})
        further = {grid[0]: best / 3, grid[-1]: best * 3}.get(best)
        if further is None or not LOWEST < further < HIGHEST:
            break
        run(float(f"{further:.0e}"))
    scored = known if kept is None else finish(kept)
    return {**scored, "rate": best, "validation": losses[best], "rates": sorted(losses)}


def written_rows(pair: zoo.Pair, task: str, rows: list[dict[str, str]], count: int, seed: int) -> list[dict[str, str]]:
    """Rows by the old base + adapter; never one whose prompt is among the test rows."""
    given = [DataRow(kind="completion", **row) for row in rows]
    frame = {} if given else {"prefix": f"{task} :", "suffix": " ="}
    settings = TeacherSettings(max_new_tokens=24, batch_size=64, imitate=True, **frame)
    tokenizer = load_tokenizer(pair.old)
    with attached(load_model(pair.old), pair.adapter(task)) as teacher:
        found = write_rows(teacher, tokenizer, given, len(given) + count, settings, seed=seed).rows
    known = {row["prompt"] for row in [*rows, *zoo.rows(pair.name, task, "test", TEST)]}
    return [
        {"prompt": row.prompt, "completion": row.completion}
        for row in found
        if row.prompt and row.completion and row.prompt not in known
    ][:count]


def run_task(
    name: str, task: str, budgets: list[int], epochs: list[int], arms: list[str], seeds: list[int], output: Path
) -> None:
    """Every cell of one task that is not there yet."""
    words = "llama" if name == FURTHER else name
    pair = zoo.pair(words)
    new = further_base(output / "work" / "further-base") if name == FURTHER else pair.new
    data = output / "work" / f"{name}-{task}"
    data.mkdir(parents=True, exist_ok=True)
    zoo.write_rows([{"text": text} for text in zoo.texts(words, 512)], data / "texts.jsonl")
    zoo.write_rows(zoo.rows(words, task, "train", PROMPTS), data / "prompts.jsonl")
    validation, test = zoo.rows(words, task, "validation", VALIDATION), zoo.rows(words, task, "test", TEST)
    file = output / "cells" / f"{name}-{task}.json"
    file.parent.mkdir(exist_ok=True)
    cells: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def cell(key: str, compute: Any) -> None:
        if key not in cells:
            cells[key] = compute()
            replace_text(file, json.dumps(cells, indent=1, sort_keys=True))
            print(f"{name}/{task}/{key}", cells[key], file=sys.stderr, flush=True)

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

    def automatic(arm: str, budget: int, count: int, seed: int) -> dict[str, Any]:
        """What the command line publishes with ``--method auto``."""
        from flows.migrate_adapter import migrate_adapter

        rows = zoo.rows(words, task, "train", budget, seed=100 + seed) if budget else []
        config: dict[str, Any] = {
            "adapter": str(pair.adapter(task)), "old_base": str(pair.old), "new_base": str(new),
            "calibration": str(data / "texts.jsonl"), "pair": {"calibration_samples": 512}, "seed": seed,
            "finetune": {"epochs": count, "batch_size": BATCH}, "candidates": ["all"], "rehearsal": 0,
        }  # fmt: skip
        if arm != "default":
            config["learning_rates"] = list(RATES)
        if rows:
            zoo.write_rows(rows, data / f"rows-{budget}-{seed}.jsonl")
            config |= {"train_data": str(data / f"rows-{budget}-{seed}.jsonl"), "finetune_samples": budget}
        if arm != "auto+refresh":
            config |= {"prompts": str(data / "prompts.jsonl"), "teacher": {"max_new_tokens": 16}}
        if arm == "auto":
            config["teacher_samples"] = 0
        elif arm == "auto+refresh":
            frame = {"imitate": True} if rows else {"prefix": f"{task} :", "suffix": " ="}
            config |= {"teacher_samples": 300 + budget, "teacher": {"max_new_tokens": 24, **frame}}
        with tempfile.TemporaryDirectory() as folder:
            record = migrate_adapter({**config, "output": f"{folder}/out"})
            tuning = record["finetune"] or {}
            told = {"method": record["method"], "start": tuning.get("start"), "starts": tuning.get("starts")}
            return {**told, **measure(Path(folder) / "out")}

    for seed, count, budget, arm in product(seeds, epochs, budgets, arms):
        if arm in AUTOMATIC:
            if budget or AUTOMATIC[arm]:
                cell(f"{arm}/{budget}/{count}/{seed}", partial(automatic, arm, budget, count, seed))
            continue
        if arm not in WRITTEN and not budget:
            continue

        def compute(arm: str = arm, budget: int = budget, count: int = count, seed: int = seed) -> dict[str, Any]:
            rows = zoo.rows(words, task, "train", budget, seed=100 + seed) if budget else []
            extra = written_rows(pair, task, rows, WRITTEN[arm], seed) if arm in WRITTEN else []
            kind = START.get(arm, arm)
            start = starts[kind if kind in TRANSFORMED else "lorasuite"]

            def attempt(rate: float) -> tuple[float, Any]:
                model, tokenizer = tuned(new, arm, start, [*rows, *extra], count, rate, seed)
                return trained.validation_loss(model, tokenizer, validation), (model, tokenizer)

            earlier = cells.get(f"{arm}/{budget}/{seed}") if count == 12 else None
            return swept(attempt, lambda kept: scores(*kept, test), earlier or {})

        cell(f"{arm}/{budget}/{count}/{seed}", compute)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pairs", nargs="+", default=["llama", "neox", FURTHER])
    parser.add_argument("--tasks", nargs="+", default=["mirror", "drift", "blend"])
    parser.add_argument("--samples", nargs="*", type=int, default=[0, 10, 30, 100, 300])
    parser.add_argument("--epochs", nargs="+", type=int, default=list(EPOCHS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="only write the tables of the cells that are there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    register_plugins()
    given.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home:
        os.environ.setdefault("LORASUITE_HOME", home)
        for seed, name, task in [] if given.table else product(given.seeds, given.pairs, given.tasks):
            budgets = given.samples if name != FURTHER else []
            run_task(name, task, budgets, given.epochs, given.arms, [seed], given.output)
    write(given.output)


if __name__ == "__main__":
    main()
