"""The cells of an experiment: a file that names a pair, tasks and tables, checked and spread out.

A cell is one number of a table: an arm (a bare base, or one with an adapter) on a task, with one seed, under one
combination of the table's factors. What a cell costs and gives is the flow's business; this module only says which
cells there are and with which settings, and finds everything wrong with the file at once.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasuite import zoo
from lorasuite.errors import ConfigError, Problem, did_you_mean
from lorasuite.evaluation import Arm
from lorasuite.planning._config import AUTO, MigrationConfig
from lorasuite.planning._experiment_file import (
    ExperimentConfig,
    ExperimentPair,
    ExperimentTable,
    ExperimentTask,
    Given,
    Lora,
    Training,
)
from lorasuite.planning._policy import RowCounts, plan_rows, too_few_to_sweep
from lorasuite.planning._reading import build, located, located_data, read_config
from lorasuite.planning._thresholds import LFT_SAMPLES, MIN_SWEEP_ROWS
from lorasuite.transforms import ModelTransform, names, transform

#: Arms that the seed changes: rows are drawn for them, and weights initialised.
SEEDED = (Arm.SCRATCH, Arm.MIGRATED_LFT, Arm.REFRESHED)
#: Settings of a migration that the pair, the tasks, the seeds and the arms decide, or that no arm has.
DECIDED = (
    "adapter", "old_base", "new_base", "output", "calibration", "train_data", "eval_data", "eval_tasks", "eval_dir",
    "include_path", "seed", "gate", "controls", "energy", "prompts", "columns", "general_texts",
    "general_task", "general", "serving_gguf",
)  # fmt: skip
#: Settings that decide what adapter there is to migrate, and what it is to retrain it.
TRAINED = ("lora", "retrain")
#: Settings beside those of a migration.
BESIDE = (*TRAINED, "given")


@dataclass(frozen=True)
class CellSettings:
    """Everything that decides a cell's number, beside the pair, the task's data and the arm."""

    migration: MigrationConfig
    lora: Lora
    retrain: Training
    given: Given

    @property
    def rank(self) -> int:
        """Of what is trained on the new base, and of what is migrated unless that came with its own."""
        return self.migration.rank or self.lora.rank


def seeded(arm: Arm, settings: CellSettings) -> bool:
    """Whether another seed gives an arm another number: a model transform reads the rows that the seed draws."""
    return arm in SEEDED or (arm == Arm.MIGRATED and isinstance(transform(settings.migration.method), ModelTransform))


@dataclass(frozen=True)
class Cell:
    """One arm of a table on one task, with one seed, at one level of each factor."""

    table: str
    arm: Arm
    task: str
    seed: int
    level: tuple[tuple[str, str], ...]
    settings: CellSettings

    def __str__(self) -> str:
        parts = [self.table, *(f"{name}={value}" for name, value in self.level), self.task, self.arm]
        return "/".join(parts) + (f"/seed {self.seed}" if seeded(self.arm, self.settings) else "")


@dataclass(frozen=True)
class Experiment:
    """A checked experiment file; paths are absolute."""

    config: ExperimentConfig
    cells: tuple[Cell, ...]

    def tables(self, only: Sequence[str] = ()) -> dict[str, ExperimentTable]:
        """The tables named, or all.

        Raises:
            ConfigError: naming every table that does not exist.
        """
        known = self.config.tables
        missing = [name for name in only if name not in known]
        wrong = [Problem("--only", f"no table {name!r}", did_you_mean(name, list(known))) for name in missing]
        if wrong:
            raise ConfigError(wrong)
        return {name: table for name, table in known.items() if not only or name in only}

    @property
    def pair_name(self) -> str:
        """For people."""
        pair = self.config.pair
        return f"zoo {pair.zoo}" if pair.zoo else f"{pair.old_base} → {pair.new_base}"


def read_experiment(path: Path) -> Experiment:
    """Read an experiment file. Paths in it start from its directory; Hub ids are looked up only when it is run.

    Raises:
        ConfigError: with everything wrong with it.
    """
    config: ExperimentConfig = build(ExperimentConfig, read_config(path), str(path))
    folder = path.absolute().parent
    problems = [*_pair_problems(config, str(path)), *_table_problems(config, str(path))]
    cells: list[Cell] = []
    if not problems:
        pair = _located_pair(config.pair, folder)
        tasks = {name: _located_task(task, pair, folder) for name, task in config.tasks.items()}
        config = config.model_copy(update={"pair": pair, "tasks": tasks})
        cells = list(_cells(config, str(path), problems))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return Experiment(config, tuple(cells))


def _pair_problems(config: ExperimentConfig, where: str) -> Iterator[Problem]:
    pair = config.pair
    if pair.zoo is not None:
        if pair.old_base or pair.new_base:
            yield Problem(f"{where}: pair", "names a miniature pair and bases", "Give one or the other.")
        if pair.zoo not in zoo.PAIRS:
            yield Problem(f"{where}: pair.zoo", f"no pair {pair.zoo!r}", did_you_mean(pair.zoo, zoo.PAIRS))
    elif not (pair.old_base and pair.new_base):
        yield Problem(f"{where}: pair", "needs old_base and new_base, or zoo", "Name the two bases.")
    for name, task in config.tasks.items():
        place = f"{where}: tasks.{name}"
        if task.zoo is not None:
            if pair.zoo is None:
                yield Problem(place, "is a miniature task, and the pair is none", "Give train_data and eval_data.")
            elif pair.zoo in zoo.PAIRS and task.zoo not in zoo.pair(pair.zoo).tasks:
                yield Problem(place, f"no task {task.zoo!r}", did_you_mean(task.zoo, zoo.pair(pair.zoo).tasks))
            if task.train_data or task.eval_data or task.eval_tasks or task.adapter or task.retrained:
                yield Problem(place, "is a miniature task with data or adapters of its own", "Leave out one of them.")
            continue
        if task.ready:
            yield Problem(f"{place}.ready", "is for miniature tasks", "Give adapter and retrained.")
        if not task.train_data:
            yield Problem(f"{place}.train_data", "is required", "Name the rows to train on.")
        if not (task.eval_data or task.eval_tasks):
            yield Problem(place, "has nothing to measure by", "Give eval_data or eval_tasks.")
        if task.eval_data and task.eval_tasks:
            yield Problem(place, "has eval_data and eval_tasks", "Give one of them, or make it two tasks.")


def _table_problems(config: ExperimentConfig, where: str) -> Iterator[Problem]:
    for key, table in config.tables.items():
        place = f"{where}: tables.{key}"
        for name in table.tasks:
            if name not in config.tasks:
                yield Problem(f"{place}.tasks", f"no task {name!r}", did_you_mean(name, list(config.tasks)))
        for name, levels in table.factors.items():
            if not levels:
                yield Problem(f"{place}.factors.{name}", "has no levels", "Give at least one.")
        used = {name: t for name in table.tasks or config.tasks if (t := config.tasks.get(name))}
        ready = [name for name, task in used.items() if not task.trains]
        for kind in TRAINED:
            varied = [name for name in (*table.set, *table.factors) if name.split(".")[0] == kind]
            # a retraining may vary beside a ready adapter to migrate: it is of the new base
            fixed = [name for name in ready if kind == "lora" or used[name].ready or used[name].retrained]
            if varied and fixed:
                what = f"sets {', '.join(varied)}, and the adapters of {', '.join(fixed)} are not trained here"
                yield Problem(place, what, "Name tasks without ready adapters.")
        if table.kind == "cost" and table.factors:
            yield Problem(f"{place}.factors", "are not for a table of costs", "Leave them out.")
        if table.kind == "cost" and ready:
            what = f"compares costs, and those of {', '.join(ready)} were paid elsewhere"
            yield Problem(place, what, "Name tasks without ready adapters.")


def _located_pair(pair: ExperimentPair, folder: Path) -> ExperimentPair:
    if pair.zoo is not None:
        found = zoo.pair(pair.zoo)
        return pair.model_copy(update={"old_base": str(found.old), "new_base": str(found.new)})
    bases = {name: located(str(getattr(pair, name)), folder) for name in ("old_base", "new_base")}
    return pair.model_copy(update=bases)


def _located_task(task: ExperimentTask, pair: ExperimentPair, folder: Path) -> ExperimentTask:
    changes: dict[str, Any] = {}
    if task.zoo is not None and task.ready and pair.zoo is not None:
        shipped = zoo.pair(pair.zoo)
        changes = {"adapter": str(shipped.adapter(task.zoo)), "retrained": str(shipped.retrained(task.zoo))}
    for name in ("adapter", "retrained"):
        if (source := getattr(task, name)) is not None:
            changes[name] = located(source, folder)
    for name in ("train_data", "calibration", "eval_data", "eval_dir", "include_path"):
        if (source := getattr(task, name)) is not None:
            changes[name] = located_data(source, folder)
    return task.model_copy(update=changes)


def _cells(config: ExperimentConfig, where: str, problems: list[Problem]) -> Iterator[Cell]:
    """Every cell, table by table; what is wrong with their settings is added to ``problems``."""
    base = {"settings": config.settings, "lora": config.lora, "retrain": config.retrain, "given": config.given}
    if _settings(base, config, next(iter(config.tasks)), config.seeds[0], where, problems) is None:
        return  # every cell would repeat it
    for key, table in config.tables.items():
        varied, levels = list(table.factors), list(table.factors.values())
        for combination in itertools.product(*levels):
            level = tuple((name, _shown(value)) for name, value in zip(varied, combination, strict=True))
            chosen = dict(zip(varied, combination, strict=True))
            for task in table.tasks or tuple(config.tasks):
                values = base
                for name, value in {**config.tasks[task].set, **table.set, **chosen}.items():
                    values = _assigned(values, name, value)
                place = f"{where}: tables.{key}" + "".join(f", {n}={v}" for n, v in level) + f", task {task}"
                for n, seed in enumerate(table.seeds or config.seeds):
                    settings = _settings(values, config, task, seed, place, problems)
                    if settings is None:
                        break
                    problems += _training_problems(settings, table, place)
                    # The others are the same with every seed.
                    arms = [arm for arm in table.arms if n == 0 or seeded(arm, settings)]
                    yield from (Cell(key, arm, task, seed, level, settings) for arm in arms)


def _training_problems(settings: CellSettings, table: ExperimentTable, where: str) -> Iterator[Problem]:
    migration, kind = settings.migration, settings.lora.kind
    fits_models = isinstance(transform(migration.method), ModelTransform) and {Arm.MIGRATED, Arm.MIGRATED_LFT} & set(
        table.arms
    )
    counts, planned = {}, plan_rows(migration, RowCounts())
    if {Arm.SCRATCH, Arm.MIGRATED_LFT} & set(table.arms) or fits_models:
        counts["finetune_samples"] = planned.requested_rows
    if Arm.REFRESHED in table.arms:
        counts["teacher_samples"] = planned.synthetic_train_rows
    for name, rows in counts.items():
        if not rows:
            yield Problem(f"{where}: {name}", "is 0, and there are arms that read them", "Leave out those arms.")
        elif len(migration.learning_rates) > 1 and rows < MIN_SWEEP_ROWS:
            yield too_few_to_sweep(rows, f"{where}: learning_rates")
    if fits_models and kind == "dora":
        what = f"{migration.method} moves updates of blocks only, and a DoRA has magnitudes"
        yield Problem(f"{where}: method", what, "Name another one, or another lora.kind.")
    if Arm.REFRESHED in table.arms and kind == "adalora":
        what = "an AdaLoRA must know its steps, and how many rows the teacher keeps is not known before"
        yield Problem(f"{where}: lora.kind", what, "Leave out the arm refreshed, or use another kind.")
    asked = {
        "finetune.distillation": migration.finetune.distillation,
        "finetune.token_weights": migration.finetune.token_weights != "none",
        "second_step": migration.second_step != "none",
    }
    for name in (name for name, told in asked.items() if told and Arm.REFRESHED not in table.arms):
        yield Problem(f"{where}: {name}", "no arm reads rows that the teacher wrote", "Leave it out, or add refreshed.")
    if migration.second_step != "none" and len(migration.learning_rates) > 1:
        what = "follows a fine-tune at one rate, and there are several"
        yield Problem(f"{where}: second_step", what, "Give one learning rate.")


def _assigned(values: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A copy of nested settings with one set by its dotted name; those of a migration need no prefix."""
    first, *rest = name.split(".")
    path = [first, *rest] if first in BESIDE and rest else ["settings", first, *rest]

    def put(inner: Any, keys: Sequence[str]) -> Any:
        if not keys:
            return value
        held = dict(inner) if isinstance(inner, Mapping) else {}
        return {**held, keys[0]: put(held.get(keys[0]), keys[1:])}

    result: dict[str, Any] = put(values, path)
    return result


def _settings(
    values: Mapping[str, Any], config: ExperimentConfig, task: str, seed: int, where: str, problems: list[Problem]
) -> CellSettings | None:
    given = values["settings"]
    wrong = [
        Problem(f"{where}: {name}", "is no setting of an experiment", "Leave it out.")
        for name in DECIDED
        if name in given
    ]
    if given.get("method") == AUTO:
        what = "auto may take another method in each cell, and a row is to be one"
        wrong.append(Problem(f"{where}: method", what, f"Name one, or compare: {', '.join(names())}."))
    fixed = {
        "adapter": "-", "output": "-", "old_base": config.pair.old_base, "new_base": config.pair.new_base,
        "train_data": config.tasks[task].train_data, "seed": seed,
    }  # fmt: skip
    made: list[Any] = []
    for model, content in (
        # the paper's transform: what a migration does by default, choosing one, is nothing to compare
        (MigrationConfig, {"method": "lorasuite", "finetune_samples": LFT_SAMPLES, **given, **fixed}),
        (Lora, values["lora"]),
        (Training, values["retrain"]),
        (Given, values["given"]),
    ):
        try:
            made.append(build(model, content, where))
        except ConfigError as error:
            wrong += error.problems
    problems += wrong
    return None if wrong else CellSettings(*made)


def _shown(value: Any) -> str:
    """A factor's level, for people."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)
