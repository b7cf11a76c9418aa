"""Whole runs of ``lorasuite migrate``: what is kept of a run's record, and the table of docs/evidence.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.real import pages
from lorasuite.evaluation import Arm
from tasks.pair_stages import PAIR_STAGES

HERE = Path(__file__).parent / "default"
BEGIN, END = "<!-- default -->", "<!-- /default -->"
#: Stages of a pair, which every adapter of it shares.
PAIR = frozenset(stage.name for stage in PAIR_STAGES)
#: Stages whose seconds are told apart from those of the others.
EVALUATING, TUNING = ("evaluate", "general_text"), ("search", "finetune")
#: Of the settings, those that name a source, and so a path of the machine.
SOURCES = (
    "adapter", "old_base", "new_base", "output", "calibration", "train_data", "prompts", "eval_data", "general_texts",
)  # fmt: skip

Run = Mapping[str, Any]


def keep(output: Path, task: str, folder: Path = HERE) -> Path:
    """Write what is kept of a run's ``migration.json`` into ``folder``: no path, no answer and no loss curve.

    Args:
        output: the directory that ``lorasuite migrate`` wrote.
        task: what its held-out rows are of.

    Returns:
        the file.
    """
    record = json.loads((output / "migration.json").read_text(encoding="utf-8"))
    search = record["finetune"].get("search") or {}
    scores = ("exact_match", "loss", "bits_per_byte", "n")
    kept = {
        "task": task,
        "old_base": record["old_base"]["name"],
        "new_base": record["new_base"]["name"],
        "rank": record["adapter"]["rank"],
        "written": (record["teacher"] or {}).get("written", 0),
        "rows": record["finetune"]["samples"],
        "steps": {"search": search.get("steps", 0), "final": record["finetune"]["steps"]},
        "learning_rate": record["finetune"]["learning_rate"],
        "evaluation": {arm: {name: found[name] for name in scores} for arm, found in record["evaluation"].items()},
        "verdict": {name: record["verdict"][name] for name in ("verdict", "kept", "kept_interval", "reason")},
        "seconds": [[one["stage"], one["label"], round(one["computed_seconds"], 1)] for one in record["timings"]],
        "peak_memory_bytes": max(record["peak_memory_bytes"].values()),
        "general": record["general"]["costs"],
        "versions": record["versions"],
        "settings": {name: value for name, value in record["settings"].items() if name not in SOURCES},
    }
    name = f"{kept['old_base']}--{kept['new_base']}--{task}--{kept['rows']}rows--seed{record['seed']}.json"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(kept, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return folder / name


def read(folder: Path = HERE) -> list[Run]:
    """Every run that is kept, in a fixed order."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def table(runs: list[Run]) -> str:
    """The Markdown table: what each run wrote, came to, and cost."""
    heads = [
        "", "rows", "old base + adapter", "published", "of the lead kept [95 %]", "steps, search + final, of rows",
        "seconds: pair + teacher + fine-tunes + evaluation", "GiB",
    ]  # fmt: skip
    rows = [heads, ["---"] * len(heads)]
    for run in sorted(runs, key=lambda one: (one["old_base"] != "smollm2-135m", one["old_base"], one["rows"])):
        within = run["verdict"]["kept_interval"]
        rows.append(
            [
                f"{run['old_base']} → {run['new_base']}, {run['task']}",
                f"{run['rows']:,} {'written' if run['written'] else 'labelled'}",
                _shown(run["evaluation"][Arm.OLD_ADAPTER]),
                _shown(run["evaluation"][Arm.MIGRATED_LFT]),
                f"{run['verdict']['kept']:.0%}" + (f" [{within[0]:.0%}, {within[1]:.0%}]" if within else ""),
                f"{run['steps']['search']} + {run['steps']['final']} of {run['settings']['finetune']['batch_size']}",
                " + ".join(f"{seconds:,.0f}" for seconds in spent(run)),
                f"{run['peak_memory_bytes'] / 2**30:.1f}",
            ]
        )
    return pages.table(rows)


def spent(run: Run) -> tuple[float, float, float, float]:
    """Seconds of the pair's stages, of the others before the fine-tunes, of these, and of the evaluation."""
    found = dict.fromkeys(("pair", "teacher", "tuning", "evaluation"), 0.0)
    seen = set()
    for stage, _, seconds in run["seconds"]:
        if stage in EVALUATING and (stage, seconds) in seen:  # one adapter under two names is evaluated once
            continue
        seen.add((stage, seconds))
        told = "pair" if stage in PAIR else "tuning" if stage in TUNING else "teacher"
        found["evaluation" if stage in EVALUATING else told] += seconds
    return found["pair"], found["teacher"], found["tuning"], found["evaluation"]


def _shown(arm: Mapping[str, Any]) -> str:
    return f"{arm['exact_match']:.0%}, {arm['loss']:.2f} nats"
