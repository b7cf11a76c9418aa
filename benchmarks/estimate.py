"""What `lorasuite inspect` says of a run against what the run then took: seconds and memory by stage.

    python benchmarks/estimate.py --record migration.json [--pair prepare.json]
    python benchmarks/estimate.py --sizes small medium large

``--record`` compares with a finished migration: its settings are estimated anew on this machine, and its timings are
those of the stages when they were computed. ``--pair``: timings of the pair's stages from ``prepare --json``, where the
migration found them in the store.

``--sizes`` runs random Llama pairs: all modules, rank 8, method ``lorasuite``, texts and rows of full length. Seconds
there are CPU seconds of one thread, on both sides: what else runs on the machine then hardly counts.
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

os.environ.update(HF_HUB_OFFLINE="1", PREFECT_LOGGING_LEVEL="WARNING")
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


def compare(title: str, cost: dict[str, Any], timings: list[dict[str, Any]], extra: dict[str, float]) -> None:
    """Print every stage's estimate beside its measurement."""
    from benchmarks.scale_table import spent

    took, memory = spent(timings)
    measured = {**took, **extra}
    print(f"\n{title}")
    print("| stage | seconds, estimated | measured | ratio | MiB, estimated | measured | ratio |")
    print("|---|---|---|---|---|---|---|")
    rows = [row for row in cost["stages"] if row["stage"] in measured]
    for row in rows:
        seconds, size = measured[row["stage"]], memory.get(row["stage"], 0) / 2**20
        held = max(row["ram_bytes"], row["gpu_bytes"]) / 2**20
        share = f"{size:.0f} | {size / held:.2f}" if size else "– | –"
        cells = (
            f"{row['seconds']:.2f} | {seconds:.2f} | {seconds / max(row['seconds'], 1e-9):.2f} | {held:.0f} | {share}"
        )
        print(f"| {row['stage']} | {cells} |")
    total = sum(row["seconds"] for row in rows), sum(measured[row["stage"]] for row in rows)
    print(f"| all | {total[0]:.2f} | {total[1]:.2f} | {total[1] / total[0]:.2f} | | | |", flush=True)


def of_record(record: Path, pair: Path | None) -> None:
    """A finished migration, and what would be said of its settings now."""
    from lorasuite.planning import MigrationConfig, survey

    known = json.loads(record.read_text())
    settings = MigrationConfig.model_validate(known["settings"])
    found = survey(settings, record.parent)
    assert not found.problems, found.problems
    cached = {row["stage"] for row in json.loads(pair.read_text())["timings"]} if pair else set()
    timings = [row for row in known["timings"] if row["stage"] not in cached]
    if pair:
        timings += json.loads(pair.read_text())["timings"]
    compare(f"{settings.old_base} → {settings.new_base}, --method {settings.method}", found.cost, timings, {})


def of_random_pair(root: Path, name: str) -> None:
    """A random pair of a size, estimated and then migrated."""
    import torch

    from flows.migrate_adapter import migrate_adapter
    from lorasuite.planning import MigrationConfig, survey
    from tasks.fingerprints import fingerprint_bases
    from tests import models

    torch.set_num_threads(1)
    time.perf_counter = time.process_time  # what the stages and the estimate are timed with
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
    config = {
        "adapter": str(adapter), "old_base": str(old), "new_base": str(new), "output": str(root / "out"),
        "calibration": str(root / "texts.jsonl"), "train_data": str(root / "train.jsonl"), "method": "lorasuite",
        "finetune_samples": ROWS, "finetune": {"epochs": 1, "batch_size": ROWS}, "pair": {"cka_batch": 4},
    }  # fmt: skip
    found = survey(MigrationConfig.model_validate(config), root / "home")
    assert not found.problems, found.problems

    os.environ["LORASUITE_HOME"] = str(root / "home")
    mark = time.process_time()
    fingerprint_bases.fn(root / "elsewhere", old, new)
    spent = {"fingerprint": time.process_time() - mark}
    record: dict[str, Any] = migrate_adapter(config)
    weights = [sum(p.numel() for p in models.load(path).parameters()) / 1e6 for path in (old, new)]
    compare(f"{name}: {weights[0]:.0f} to {weights[1]:.0f} million weights", found.cost, record["timings"], spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--pair", type=Path)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=[])
    given = parser.parse_args()
    if given.record:
        of_record(given.record, given.pair)
    for name in given.sizes:
        with tempfile.TemporaryDirectory() as folder:
            of_random_pair(Path(folder), name)


if __name__ == "__main__":
    main()
