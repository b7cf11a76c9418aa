"""The time estimate of ``lorasuite inspect`` against what the stages then take, on random Llama pairs of several sizes.

    python benchmarks/estimate.py [--sizes small medium large]

All modules move, rank 8, method ``lorasuite``. Fewer calibration texts and training rows than by default, all of full
length, and the estimate is scaled to them. Seconds are CPU seconds of one thread, on both sides: what else runs on the
machine then hardly counts.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PREFECT_LOGGING_LEVEL="WARNING")
time.perf_counter = time.process_time  # what the stages and the estimate are timed with
sys.path.insert(0, str(Path(__file__).parents[1]))

SIZES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "small": (
        {"vocab": 8000, "hidden": 256, "intermediate": 688, "layers": 6, "heads": 8, "kv_heads": 8},
        {"vocab": 8000, "hidden": 320, "intermediate": 864, "layers": 8, "heads": 10, "kv_heads": 5},
    ),
    "medium": (
        {"vocab": 16000, "hidden": 512, "intermediate": 1376, "layers": 8, "heads": 8, "kv_heads": 8},
        {"vocab": 16000, "hidden": 640, "intermediate": 1728, "layers": 10, "heads": 10, "kv_heads": 5},
    ),
    "large": (
        {"vocab": 32000, "hidden": 1024, "intermediate": 2752, "layers": 12, "heads": 16, "kv_heads": 16},
        {"vocab": 32000, "hidden": 1280, "intermediate": 3456, "layers": 12, "heads": 20, "kv_heads": 5},
    ),
}
TEXTS, ROWS = 8, 4


def compare(root: Path, name: str) -> None:
    import json

    from flows.migrate_adapter import migrate_adapter
    from lorasuite.bases import Checkpoint
    from lorasuite.planning import LFT_SAMPLES, PairSettings, inspect
    from lorasuite.training import FinetuneSettings
    from tasks.fingerprints import fingerprint_bases
    from tests import models

    old, new = (
        models.build(root / side, "llama", seed=seed, max_position_embeddings=512, **numbers)
        for seed, (side, numbers) in enumerate(zip(("old", "new"), SIZES[name], strict=True))
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = models.build_adapter(root / "adapter", old, targets=targets, rank=8, std=0.01)
    words = models.words(SIZES[name][0]["vocab"])[4:]
    for file, count in (("texts", TEXTS), ("train", ROWS)):
        texts = [" ".join(words[(n * 331 + k * 7) % len(words)] for k in range(400)) for n in range(count)]
        (root / f"{file}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    found = inspect(str(old), str(new), str(adapter), timed=True)
    assert not found.problems, found.problems
    expected = dict(found.time["seconds"])
    expected["activations"] *= TEXTS / PairSettings().calibration_samples
    expected["finetune"] *= ROWS / LFT_SAMPLES / FinetuneSettings().epochs

    os.environ["LORASUITE_HOME"] = str(root / "home")
    mark = time.process_time()
    fingerprint_bases.fn(root / "elsewhere", old, new)
    measured: dict[str, float] = defaultdict(float, fingerprint=time.process_time() - mark)
    record: dict[str, Any] = migrate_adapter(
        {
            "adapter": str(adapter), "old_base": str(old), "new_base": str(new), "output": str(root / "out"),
            "calibration": str(root / "texts.jsonl"), "train_data": str(root / "train.jsonl"), "method": "lorasuite",
            "finetune_samples": ROWS, "finetune": {"epochs": 1, "batch_size": ROWS}, "pair": {"cka_batch": 4},
        }
    )  # fmt: skip
    for row in record["timings"]:
        measured[row["stage"]] += row["computed_seconds"]

    weights = [sum(p.numel() for p in models.load(path).parameters()) / 1e6 for path in (old, new)]
    print(f"\n{name}: {weights[0]:.0f} to {weights[1]:.0f} million weights, {Checkpoint(old).dims.hidden_size} wide")
    print(f"{'stage':20s}{'estimated':>12s}{'measured':>12s}{'ratio':>8s}")
    stages = [stage for stage in expected if stage in measured]
    for stage in stages:
        print(f"{stage:20s}{expected[stage]:12.2f}{measured[stage]:12.2f}{measured[stage] / expected[stage]:8.1f}")
    total = sum(expected[stage] for stage in stages), sum(measured[stage] for stage in stages)
    print(f"{'total':20s}{total[0]:12.2f}{total[1]:12.2f}{total[1] / total[0]:8.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    for name in parser.parse_args().sizes:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), name)


if __name__ == "__main__":
    main()
