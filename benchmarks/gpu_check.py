"""A whole migration on one GPU with random weights at Qwen1.5-1.8B → Qwen2.5-3B shapes: seconds and memory by stage.

    benchmarks/gpu_check.sh [--json FILE]          # one GPU, no network, under eight minutes
    benchmarks/gpu_check.sh --cpu-tiny             # the same script on miniature shapes, without a GPU

Both bases are made on the spot (bfloat16 safetensors, 9.9 GB in a temporary directory, see ``TMPDIR``) with a tokenizer
of made-up words; weights are random, so losses mean nothing and seconds do. Then ``migrate`` runs as for a user, with
``--method auto`` and the transforms of ``CANDIDATES``, a teacher, a fine-tune and an evaluation, and once more for a
second adapter, which finds the pair's stages in the store. Without a GPU it says so and ends with 0.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO")  # a line a stage as it ends, with the time
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.shapes import llama, published, write_base, write_data, write_lora

#: Texts, rows, tokens of each, held-out rows, rows written by the teacher, and rank.
FULL = {"texts": 64, "rows": 64, "tokens": 64, "held_out": 16, "written": 32, "rank": 16}
TINY = {"texts": 8, "rows": 12, "tokens": 12, "held_out": 2, "written": 4, "rank": 2}
#: Transforms that are tried. ``sequential`` takes sums of the MLP's width squared: more minutes than the check has.
CANDIDATES = ["lorasuite", "procrustes", "functional"]


def check(folder: Path, device: str, tiny: bool) -> list[dict[str, Any]]:
    """Run it all, and give one row a stage: ``run``, ``stage``, ``seconds``, ``gpu_bytes`` and ``ram_bytes``."""
    numbers = TINY if tiny else FULL
    if tiny:
        configs = [llama(3, 32, 48, 4, 4, 64), llama(4, 48, 64, 4, 2, 64, tied=True)]
    else:
        configs = [published("qwen-1.5-1.8b"), published("qwen-2.5-3b")]
    began = time.perf_counter()
    old, new = (
        write_base(folder / name, config, seed, device)
        for seed, (name, config) in enumerate(zip(("old", "new"), configs, strict=True))
    )
    texts, rows = write_data(folder, configs[0]["vocab_size"], numbers["texts"], numbers["rows"], numbers["tokens"])
    held_out = folder / "held_out.jsonl"
    held_out.write_text("".join(rows.read_text().splitlines(keepends=True)[: numbers["held_out"]]))
    found = [row("make", "random bases", time.perf_counter() - began)]
    if device != "cpu":
        torch.cuda.empty_cache()

    os.environ["LORASUITE_HOME"] = str(folder / "home")
    from flows.migrate_adapter import migrate_adapter

    for number, name in enumerate(("first adapter", "second adapter")):
        adapter = write_lora(folder / f"adapter{number}", old, numbers["rank"] + number)
        config = {
            "adapter": str(adapter), "old_base": str(old), "new_base": str(new), "output": str(folder / f"out{number}"),
            "calibration": str(texts), "train_data": str(rows), "eval_data": str(held_out), "prompts": str(rows),
            "teacher_samples": numbers["written"] if not number else 0, "finetune_samples": numbers["rows"],
            "device": device, "learning_rates": [1e-4], "finetune": {"epochs": 1, "batch_size": 16},
            "candidates": CANDIDATES[:2] if tiny else CANDIDATES,
            "teacher": {"max_new_tokens": 16, "filter": False, "truncated": "keep"},
            "evaluation": {"max_new_tokens": 8}, "pair": {"cka_batch": 4 if tiny else 64},
        }  # fmt: skip
        record = migrate_adapter(config)
        for run in record["timings"]:
            if not run["cached"]:
                label = run["stage"] + (f" ({run['label']})" if run["label"] else "")
                found.append(row(name, label, run["computed_seconds"], run["peak_memory_bytes"], device))
    return found


def row(run: str, stage: str, seconds: float, peak: int = 0, device: str = "cpu") -> dict[str, Any]:
    """One line of the table. A stage's peak is the GPU's, where one is used, else the process's resident memory."""
    return {
        "run": run,
        "stage": stage,
        "seconds": seconds,
        "peak_bytes": peak,
        "of": "RAM" if device == "cpu" else "GPU",
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table for people, with the seconds of each run."""
    lines = ["", f"{'run':16}{'stage':34}{'seconds':>9}{'peak MiB':>10}  of"]
    for one in rows:
        size = f"{one['peak_bytes'] / 2**20:.0f}" if one["peak_bytes"] else "–"
        lines.append(f"{one['run']:16}{one['stage']:34}{one['seconds']:9.2f}{size:>10}  {one['of']}")
    for run in dict.fromkeys(one["run"] for one in rows):
        lines.append(f"{run:16}{'all':34}{sum(o['seconds'] for o in rows if o['run'] == run):9.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-tiny", action="store_true", help="miniature shapes on the CPU: a test of this script")
    parser.add_argument("--json", type=Path, help="write the rows there")
    given = parser.parse_args()
    if not given.cpu_tiny and not torch.cuda.is_available():
        print("no GPU here: nothing was measured (--cpu-tiny runs the script on miniature shapes)")
        return
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = check(Path(folder), "cpu" if given.cpu_tiny else "cuda", given.cpu_tiny)
    print(table(rows))
    name = "CPU, miniature shapes" if given.cpu_tiny else torch.cuda.get_device_name()
    print(f"{name}: {time.perf_counter() - began:.0f} s in all")
    if given.json:
        given.json.write_text(json.dumps({"device": name, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
