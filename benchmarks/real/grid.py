"""A grid on a pair and a task: its experiment file, and the cells that are done, each as a file of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from flows.lab import Lab
from lorasuite.bases import load_tokenizer
from lorasuite.data import encode_rows
from lorasuite.evaluation import Arm, read_samples
from lorasuite.planning import Cell, ExperimentTable, read_experiment
from lorasuite.reporting import Measurement
from lorasuite.training import FinetuneSettings
from tasks.data import stored_split
from tasks.evaluation_stages import SAMPLES
from tasks.prompt_stages import prompts, resemblance
from tasks.training_stages import finetune, split

#: Of a sample, what comparisons read. Prompts are those of the task's rows.
KEPT = ("index", "target", "output", "exact_match", "loglikelihood", "tokens", "bytes")
#: Arms that are fine-tuned on a few rows.
TUNED = (Arm.SCRATCH, Arm.MIGRATED_LFT, Arm.REFRESHED)
#: Settings of a table's cells that have a field of their own in a record.
TOLD = (
    "method", "finetune_samples", "teacher_samples", "finetune.learning_rate", "prompt_sources", "given.prompts",
    "describe",
)  # fmt: skip
#: Settings that do not change what a fine-tune on a few rows is.
ELSEWHERE = ("evaluation", "retrain")
#: Arms that are trained on many rows, unless they came ready.
TRAINED = (Arm.OLD_ADAPTER, Arm.RETRAINED)
#: Arms that a transform makes.
MOVED = (Arm.MIGRATED, Arm.MIGRATED_LFT)


def experiment_file(
    grid: Path,
    work: Path,
    bases: tuple[str, str],
    task: str,
    data: Mapping[str, str | None],
    settings: Mapping[str, Any],
    seeds: Sequence[int] | None = None,
) -> Path:
    """Write the experiment file of a grid on a pair and a task into ``work``, and return it.

    Args:
        bases: old and new; directories or Hub ids.
        data: fields of the task; files and directories from the current directory, or Hub ids; None: unset.
        settings: of the task's cells, by dotted name; None: the grid's.
        seeds: the grid's if None.
    """
    old, new = map(_here, bases)
    content = yaml.safe_load(grid.read_text(encoding="utf-8"))
    given = {name: _here(source) for name, source in data.items() if source is not None}
    told = {name: value for name, value in settings.items() if value is not None}
    content |= {"pair": {"old_base": old, "new_base": new}, "tasks": {task: {**given, "set": told}}}
    content |= {"seeds": list(seeds)} if seeds else {}
    work.mkdir(parents=True, exist_ok=True)
    file = work / f"{short(old)}--{short(new)}--{task}--{grid.stem}.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file


def _here(source: str) -> str:
    """A file or directory from wherever the experiment file lies; anything else is a Hub id."""
    return str(Path(source).absolute()) if Path(source).exists() else source


def short(base: str) -> str:
    """A base's name without the directory or owner it is in."""
    return Path(base.partition("@")[0]).name


def collect(file: Path, cells: Path) -> int:
    """Write every cell of an experiment that is in the store to a file of its own, and return how many there are.

    Computes nothing, and takes the device of a run here for the one that cells were computed on. Cells that are the
    same measurement (a fresh LoRA in the table of each transform) are one file.
    """
    experiment = read_experiment(file)
    lab = Lab(experiment, file.with_suffix("") / "data", dry=True)
    pair = experiment.config.pair
    names = (short(str(pair.old_base)), short(str(pair.new_base)))
    found: dict[str, Any] = {}
    for cell in experiment.cells:
        measured = lab.measure(cell)
        if not measured.cached:
            continue
        record = _record(lab, cell, measured) | {
            "grid": experiment.config.name,
            "old_base": names[0],
            "new_base": names[1],
        }
        if differs := differences(experiment.config.tables[cell.table], cell):
            record["settings"] = differs
        found.setdefault(_name(record), record)
    for name, record in found.items():
        target = cells / f"{names[0]}--{names[1]}" / f"{name}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(found)


def differences(table: ExperimentTable, cell: Cell) -> dict[str, str]:
    """Settings that a table gives a cell and that no field of the record tells, by dotted name."""
    if cell.arm not in TUNED:
        return {}
    given = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in table.set.items()}
    given |= dict(cell.level)
    return {n: given[n] for n in sorted(given) if n not in TOLD and n.partition(".")[0] not in ELSEWHERE}


def _record(lab: Lab, cell: Cell, measured: Measurement) -> dict[str, Any]:
    """What is kept of a cell: which one it is, what it scored, what it cost, and its samples."""
    store = lab.steps.store
    settings = cell.settings.migration
    evaluations = [store.open(key) for key in measured.keys]
    samples = [record for one in evaluations for record in read_samples(one.file(SAMPLES))]
    info = evaluations[0].info
    tuning, rows = settings.finetune, settings.finetune_samples
    if cell.arm == Arm.REFRESHED:
        rows = settings.teacher_samples
    elif cell.arm in TRAINED:
        tuning, rows = cell.settings.retrain.finetune, min(cell.settings.retrain.rows, len(lab.task(cell.task).train))
    tuned = cell.arm in TUNED or (cell.arm in TRAINED and measured.learning_rate is not None)
    return {
        "task": cell.task,
        "arm": cell.arm.value,
        "method": settings.method if cell.arm in MOVED else None,
        "rows": rows if tuned else None,
        "prompts": _prompts(lab) if cell.arm == Arm.REFRESHED else None,
        "learning_rate": measured.learning_rate if tuned else None,
        "epochs": tuning.passes if tuned else None,
        "dtype": settings.loading.dtype,
        "lora": {"rank": cell.settings.rank, "targets": list(cell.settings.lora.targets)},
        "seed": cell.seed,
        "loss": info["loss"],
        "bits_per_byte": info["bits_per_byte"],
        "exact_match": info["exact_match"],
        "n": info["n"],
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "seconds": measured.cost | {"evaluation": round(info["seconds"], 3)},
        "peak_memory_bytes": measured.peak_memory_bytes,
        "tokens_trained_on": _tokens(lab, cell, tuning) if tuned else None,
        "samples": [{name: record[name] for name in KEPT} for record in samples],
    }


def _prompts(lab: Lab) -> dict[str, Any] | None:
    """Where the prompts of the cell just looked at came from; None: they were given, all of them."""
    keys = {step.stage: step.key for step in lab.steps.used.values()}
    if prompts.name not in keys:
        return None
    store = lab.steps.store
    return {**store.open(keys[prompts.name]).info, "resembling": store.open(keys[resemblance.name]).info["share"]}


def prompts_label(record: Mapping[str, Any]) -> str:
    """The sources of a cell's prompts, and how many were given; "" where all were."""
    found = record.get("prompts")
    if not found:
        return ""
    return "-".join([*found["sources"], *([f"{found['given']}given"] if found["given"] else [])])


def _tokens(lab: Lab, cell: Cell, tuning: FinetuneSettings) -> int:
    """Tokens that the training of the cell just looked at reads: those of its rows, prompts too, in every epoch."""
    used = lab.steps.used.values()
    assert any(step.stage == finetune.name for step in used)
    rows = [stored_split(lab.steps.store.open(step.key)).trained for step in used if step.stage == split.name]
    base = lab.old if cell.arm == Arm.OLD_ADAPTER else lab.new
    encoded = encode_rows(rows[-1], _tokenizer(base.path, lab.trust), tuning.cutoff)
    return round(tuning.passes * sum(len(example["input_ids"]) for example in encoded.examples))


@cache
def _tokenizer(base: Path, trust: bool) -> Any:
    """Read once: that of a large vocabulary takes seconds."""
    return load_tokenizer(base, trust)


def _name(record: Mapping[str, Any]) -> str:
    """A cell's file name: whatever tells it from the others of its pair."""
    parts = [record["task"], record["grid"], record["arm"].replace("+", "-"), record["method"]]
    parts += [label] if (label := prompts_label(record)) else []
    parts += [f"{record['rows']}rows", f"{record['learning_rate']:g}"] if record["rows"] else []
    parts += [f"{name}={value}" for name, value in record.get("settings", {}).items()]
    return "--".join(str(part) for part in [*parts, f"seed{record['seed']}"] if part is not None)
