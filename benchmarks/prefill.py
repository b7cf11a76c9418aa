"""What reading a batch of prompts costs ``generate`` on a CPU, with the output head's input in one piece and without.

    OMP_NUM_THREADS=1 python benchmarks/prefill.py --base DIR [--dtype bfloat16 float32] [--rows 16] [--tokens 40]

transformers' ``generate`` gives the head the last position of each prompt as a view of all states. With that view's
strides torch makes a batched product of it and copies the head's weight for every row. ``load_model`` has the view
copied instead. A process for each line: seconds to the first token, and the most that was resident.
"""

from __future__ import annotations

import argparse
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from lorasuite.bases import load_model


def measure(base: Path, dtype: str, rows: int, tokens: int, *, as_loaded: bool) -> tuple[float, float, float]:
    """Seconds, GiB before and GiB at most, of the first token after ``rows`` prompts of so many tokens."""
    torch.set_num_threads(1)
    model = load_model(base, "cpu", getattr(torch, dtype))
    if not as_loaded:
        model.get_output_embeddings()._forward_pre_hooks.clear()
    prompts = torch.randint(100, 1000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    before, began = peak(), time.perf_counter()
    model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=1, do_sample=False)
    return time.perf_counter() - began, before, peak()


def peak() -> float:
    """The most that this process had resident, GiB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=40)
    given = parser.parse_args()
    print("| dtype | head reads | seconds | GiB before | GiB at most |\n|---|---|---|---|---|")
    for dtype in given.dtype:
        for whole, name in ((True, "in one piece"), (False, "a view")):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                asked = process.submit(measure, given.base, dtype, given.rows, given.tokens, as_loaded=whole)
                seconds, before, most = asked.result()
            print(f"| {dtype} | {name} | {seconds:.2f} | {before:.2f} | {most:.2f} |", flush=True)


if __name__ == "__main__":
    main()
