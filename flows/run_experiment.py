"""Experiments: every cell of the tables of an experiment file, through the same cached stages as a migration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.logging.loggers import get_run_logger
from prefect.runtime import flow_run

from artifacts import default_home
from flows.context import Context, check_stages, fetch, fit_settings, tag_run
from flows.dashboard import slug
from flows.measure import TASK_SETTINGS
from flows.prepare_pair import pair_stages, state_map_stage
from flows.teach import teacher_rows
from lorasuite import zoo
from lorasuite.adapters import Adapter, untrained
from lorasuite.bases import Checkpoint, Role, load_tokenizer, resolve
from lorasuite.data import HELD_OUT, Row, calibration_texts, read_rows
from lorasuite.errors import AdapterError, LoRASuiteError, NumericalError, OutputError, PreflightError, Problem
from lorasuite.evaluation import TASK_METRICS, check_tasks
from lorasuite.evaluation.eval_tasks import expand
from lorasuite.planning import (
    Cell,
    Experiment,
    ExperimentTask,
    RowCounts,
    inspect,
    plan_rows,
    read_experiment,
    torch_device,
)
from lorasuite.reporting import RESULTS, Measurement, Score, kept, read_results, write_results
from lorasuite.training import FinetuneSettings
from lorasuite.transforms import LAYER_INPUTS, Input, ModelTransform, transform
from tasks.adapter_stages import adapter_folder, evaluation, finetune, sequential_fit, task_evaluation, teaching
from tasks.adapter_stages import transform as transform_stage
from tasks.fingerprints import (
    fingerprint_adapter,
    fingerprint_bases,
    fingerprint_data,
    fingerprint_task,
    fingerprint_texts,
)
from tasks.stage import Recorder, Ref, Stage, Where

#: Calibration texts and training rows of a miniature pair; every experiment draws from the same ones.
ZOO_TEXTS, ZOO_ROWS = 256, 10_000

#: Stages by what their cost is counted as; those not named are the pair's, and evaluations are not counted.
PARTS: dict[str, str | None] = {
    transform_stage.name: "transform",
    sequential_fit.name: "transform",
    teaching.name: "transform",
    finetune.name: "finetune",
    evaluation.name: None,
    task_evaluation.name: None,
}
#: Label of the training of an adapter to migrate.
OLD = "old, all rows"


@dataclass(frozen=True)
class Step:
    """One stage that a cell needs; ``cached``: it was, or would be, taken from the store."""

    stage: str
    label: str | None
    key: str
    cached: bool


@dataclass
class Steps(Context):
    """A context that says which stages it ran, runs none twice, and with ``dry`` runs none at all."""

    dry: bool = False
    made: dict[str, Step] = field(default_factory=dict)
    #: of the cell at hand, by key
    used: dict[str, Step] = field(default_factory=dict)

    def run(
        self,
        stage: Stage,
        inputs: Mapping[str, str | Ref],
        settings: Mapping[str, Any],
        label: str | None = None,
        **paths: Path,
    ) -> Ref:
        values = self.fingerprinted(inputs)
        key = stage.key(values, settings)
        if key in self.made:
            self.used.setdefault(key, self.made[key])
            return Ref(stage=stage.name, key=key)
        if self.dry:
            cached = self.store.has(key) and stage.name not in self.refresh
        else:
            with Recorder() as recorder:
                super().run(stage, inputs, settings, label, **paths)
            cached = recorder.runs[-1].cached
        self.made[key] = Step(stage.name, label, key, cached)
        self.used[key] = self.made[key]
        return Ref(stage=stage.name, key=key)


class Lab:
    """The pair of an experiment, and what every arm of a cell is made of."""

    def __init__(self, experiment: Experiment, data: Path, *, dry: bool, refresh: frozenset[str] = frozenset()) -> None:
        """
        Args:
            data: directory for the rows of miniature tasks.
            dry: name every artifact, compute none.
        """
        pair = experiment.config.pair
        first = experiment.cells[0].settings.migration
        self.dry, self.data = dry, data
        self.experiment = experiment
        self.old, self.new = Checkpoint(str(pair.old_base)), Checkpoint(str(pair.new_base))
        home = default_home()
        bases = (self.old.path, self.new.path)
        prints = fingerprint_bases.fn(home, *bases) if dry else fingerprint_bases(home, *bases)
        where = Where(
            home=home,
            device=torch_device(first.device),
            paths={"old_base": self.old.path, "new_base": self.new.path},
            options={
                "trust_remote_code": first.trust_remote_code,
                "allow_pickle": first.allow_pickle,
                "teacher_batch": first.teacher.batch_size,
            },
            # a look must not lock: only a run takes turns with other hosts
            **({"remote": None} if dry else {}),
        )
        self.steps = Steps(where, prints, refresh, pair=experiment.pair_name, dry=dry)
        self.trust = first.trust_remote_code
        self.tasks: dict[str, TaskData] = {}

    def task(self, name: str) -> TaskData:
        """The data of a task, written and read once."""
        if name not in self.tasks:
            config = self.experiment.config
            task = _miniature(config.pair.zoo, config.tasks[name], self.data / name)
            self.tasks[name] = TaskData(task, self.new.path, self.trust)
        return self.tasks[name]

    # ---------------------------------------------------------------------------------------------------- stages

    def evaluate(self, cell: Cell) -> list[Ref]:
        """The evaluations of a cell's arm."""
        side = "old" if cell.arm.startswith("old") else "new"
        adapter, paths = self.adapter(cell)
        inputs: dict[str, str | Ref] = {"model": f"{side}_model", "tokenizer": f"{side}_tokenizer"}
        if adapter is not None:
            inputs["adapter"] = adapter
        task, options = self.task(cell.task), cell.settings.migration.evaluation
        paths["base"] = self.steps.where.path(f"{side}_base")
        paths |= task.folders
        if task.config.eval_data is not None:
            inputs["eval_data"] = task.eval_print
            return [self.steps.run(evaluation, inputs, options.model_dump(mode="json"), cell.arm, **paths)]
        values = options.model_dump(mode="json", include=TASK_SETTINGS) | {"lm_eval": version("lm_eval")}
        return [
            self.steps.run(
                task_evaluation, {**inputs, "task": found}, {**values, "task": name}, f"{cell.arm}, {name}", **paths
            )
            for name, found in task.task_prints.items()
        ]

    def adapter(self, cell: Cell) -> tuple[Ref | str | None, dict[str, Path]]:
        """What an arm puts on its base: an artifact, or the fingerprint of a ready adapter and its place."""
        task = self.task(cell.task).config
        match cell.arm:
            case "old" | "new":
                return None, {}
            case "old+adapter" | "retrained":
                ready = task.adapter if cell.arm == "old+adapter" else task.retrained
                if ready is not None:
                    path = resolve(ready)
                    return fingerprint_adapter(path, cell.settings.migration.allow_pickle), {"adapter": path}
                return self.trained(cell, "old" if cell.arm == "old+adapter" else "new"), {}
            case "migrated":
                return self.migrated(cell), {}
            case "scratch":
                return self.tuned(cell, None), {}
            case "migrated+lft":
                return self.tuned(cell, self.migrated(cell)), {}
            case _:  # refreshed
                return self.refreshed(cell), {}

    def trained(self, cell: Cell, side: str) -> Ref:
        """A LoRA trained on all the rows, on either base."""
        training = cell.settings.retrain
        rows = min(training.rows, self.task(cell.task).rows)
        return self._finetune(
            cell,
            side,
            self._untrained(cell, side, rows, training.finetune),
            samples=training.rows,
            seed=training.finetune.seed,
            tuning=training.finetune,
            rates=training.learning_rates,
            label=OLD if side == "old" else "new, all rows",
        )

    def tuned(self, cell: Cell, start: Ref | None) -> Ref:
        """A few steps on a few rows, from a migrated adapter or, as the control, from a fresh one."""
        settings = cell.settings.migration
        planned = plan_rows(settings, RowCounts(own=self.task(cell.task).rows))
        rows = planned.own_rows
        if len(settings.learning_rates) > 1:
            rows -= max(1, round(HELD_OUT * rows))  # the shorter run of a sweep: AdaLoRA must be done pruning in it
        fresh = self._untrained(cell, "new", rows, settings.finetune) if start is None else None
        return self._finetune(
            cell,
            "new",
            fresh,
            samples=planned.requested_rows,
            seed=settings.seed,
            tuning=settings.finetune,
            rates=settings.learning_rates,
            label="scratch" if start is None else "migrated",
            start=start,
        )

    def refreshed(self, cell: Cell) -> Ref:
        """A fresh LoRA fine-tuned on what the old base with the adapter wrote, whether or not it is worth copying."""
        settings, task = cell.settings.migration, self.task(cell.task)
        source, paths = self._source(cell)
        steps = self._with(**paths, prompts=Path(str(task.config.train_data)))
        planned = plan_rows(settings, RowCounts())
        written = teacher_rows(steps, settings, task.train, planned.teacher_rows, source)
        return self._finetune(
            cell,
            "new",
            self._untrained(cell, "new", planned.synthetic_train_rows, settings.finetune),
            samples=0,
            seed=settings.seed,
            tuning=settings.finetune,
            rates=settings.learning_rates,
            label="refreshed",
            rows={"teacher": written},
        )

    def _untrained(self, cell: Cell, side: str, rows: int, tuning: FinetuneSettings) -> dict[str, Any]:
        lora = cell.settings.lora
        return untrained(
            lora.targets,
            (self.old if side == "old" else self.new).architecture,
            kind=lora.kind,
            rank=lora.rank if side == "old" else cell.settings.rank,
            scaling=lora.scaling,
            steps=tuning.max_steps or math.ceil(math.ceil(rows / tuning.batch_size) * tuning.epochs),
        )

    def _finetune(
        self,
        cell: Cell,
        side: str,
        fresh: dict[str, Any] | None,
        *,
        samples: int,
        seed: int,
        tuning: FinetuneSettings,
        rates: tuple[float, ...],
        label: str,
        start: Ref | None = None,
        rows: Mapping[str, Ref] | None = None,
    ) -> Ref:
        task, steps = self.task(cell.task), self.steps
        inputs: dict[str, str | Ref] = {
            # the stage calls the base it trains on the new one
            "new_model": f"{side}_model",
            "new_tokenizer": f"{side}_tokenizer",
            **(rows or {"train_data": task.train_print}),
        }
        if start is not None:
            inputs["transform"] = start
        values = {
            "fresh": fresh,
            "samples": samples,
            "seed": seed,
            "finetune": tuning.model_dump(mode="json"),
            "learning_rates": list(rates),
        }
        prints = steps.fingerprinted(inputs)
        return steps.run(
            finetune,
            inputs,
            values,
            label,
            new_base=steps.where.path(f"{side}_base"),
            train_data=Path(str(task.config.train_data)),
            work=steps.where.home / "work" / finetune.key(prints, values)[:32],
        )

    def migrated(self, cell: Cell) -> Ref:
        """The adapter on the new base, not yet fine-tuned."""
        settings, task = cell.settings.migration, self.task(cell.task)
        chosen = transform(settings.method)
        source, paths = self._source(cell)
        if isinstance(source, Ref):
            lora = cell.settings.lora
            alpha = cell.settings.rank * lora.scaling
            kept: dict[str, Any] = {"rank": cell.settings.rank, "alpha": alpha, "use_rslora": False}
            held = {role for m in self.old.architecture.modules if set(m.roles) & set(lora.targets) for role in m.roles}
            vocabulary = False
        else:
            adapter = Adapter.open(paths["adapter"], settings.allow_pickle)
            kept = adapter.lora_settings(settings.rank or adapter.rank)
            held = set(adapter.roles(self.old.architecture))
            vocabulary = bool(adapter.vocabulary_modules(self.old.architecture))
            if isinstance(chosen, ModelTransform) and not adapter.plain(self.old.architecture):
                what = f"{settings.method} moves updates of blocks only, and the adapter has more"
                raise AdapterError(Problem("method", what, "Name another one."))
        if settings.output_type != "lora":
            kept["output_type"] = settings.output_type
        roles: list[Role] = [role for role in self.old.architecture.roles if role in held]
        paths["calibration"] = Path(str(task.config.calibration or task.config.train_data))
        steps = self._with(**paths)
        texts = task.calibration_print(settings.pair.calibration_samples)
        if isinstance(chosen, ModelTransform):
            models = {name: name for name in ("old_model", "new_model", "old_tokenizer", "new_tokenizer")}
            inputs: dict[str, str | Ref] = {
                **models,
                "adapter": source,
                "train_data": task.train_print,
            }
            if Input.STATE_MAP in chosen.inputs:
                inputs["state_map"] = state_map_stage(steps, settings.pair, texts, roles)
            rows = Path(str(task.config.train_data))
            told = fit_settings(settings, kept, settings.method)
            return steps.run(sequential_fit, inputs, told, settings.method, train_data=rows)
        pair = pair_stages(steps, settings.pair, texts, roles, [settings.method]).named()
        groups = (*LAYER_INPUTS | chosen.inputs, *(["vocabulary"] if vocabulary else []))
        return steps.run(
            transform_stage,
            {
                "adapter": source,
                "old_model": "old_model",
                "new_model": "new_model",
                **{name: ref for name, ref in pair.items() if name.startswith(groups)},
            },
            {
                "method": settings.method,
                "unmapped": settings.unmapped,
                # only fresh layers are drawn: one seed, so that other seeds start from the same adapter
                "seed": cell.settings.retrain.finetune.seed,
                **kept,
            },
            label=settings.method,
        )

    def _source(self, cell: Cell) -> tuple[Ref | str, dict[str, Path]]:
        """The adapter to migrate, and where it lies."""
        task = self.task(cell.task).config
        if task.adapter is not None:
            path = resolve(task.adapter)
            return fingerprint_adapter(path, cell.settings.migration.allow_pickle), {"adapter": path}
        ref = self.trained(cell, "old")
        return ref, {} if self.dry else {"adapter": adapter_folder(self.steps.open(ref))}

    def _with(self, **paths: Path) -> Steps:
        """The context with more paths; what it runs counts for the same cell."""
        steps = self.steps
        where = steps.where.model_copy(update={"paths": {**steps.where.paths, **paths}})
        return Steps(
            where, steps.prints, steps.refresh, steps.pair, steps.done, dry=steps.dry, made=steps.made, used=steps.used
        )

    # --------------------------------------------------------------------------------------------------- measuring

    def measure(self, cell: Cell) -> Measurement:
        """Run a cell, or with ``dry`` only name its stages. A training that diverges is a result, too."""
        self.steps.used.clear()
        failed = ""
        keys: tuple[str, ...] = ()
        try:
            keys = tuple(ref.key for ref in self.evaluate(cell))
        except NumericalError as error:
            failed = str(error)
        steps = tuple(self.steps.used.values())
        made = Measurement(
            table=cell.table,
            arm=cell.arm,
            task=cell.task,
            seed=cell.seed,
            level=dict(cell.level),
            keys=keys,
            cached=not failed and all(step.cached for step in steps),
            failed=failed,
        )
        if self.dry or not keys:
            return made
        return made.model_copy(update=self._measured(cell, keys, steps))

    def _measured(self, cell: Cell, keys: tuple[str, ...], steps: tuple[Step, ...]) -> dict[str, Any]:
        """What the artifacts of a cell say: its scores, and what its adapter cost."""
        store = self.steps.store
        cost: dict[str, float] = {}
        memory = [0]
        rate = None
        for step in steps:
            part = PARTS.get(step.stage, "pair")
            # the adapter to migrate was there before anybody asked what migrating it costs
            if part is None or (step.label == OLD and cell.arm != "old+adapter"):
                continue
            manifest = store.manifest(step.key)
            cost[part] = round(cost.get(part, 0.0) + manifest.run.get("seconds", 0.0), 3)
            memory.append(manifest.run.get("max_cuda_bytes") or manifest.run.get("max_rss_bytes", 0))
            if part == "finetune":
                rate = manifest.info["learning_rate"]
        found = _scores(cell, [store.manifest(key).info for key in keys])
        return {**found, "cost": cost, "peak_memory_bytes": max(memory) or None, "learning_rate": rate}


@dataclass
class TaskData:
    """A task's files, read when they are needed."""

    config: ExperimentTask
    new_base: Path
    trust: bool

    @cached_property
    def train(self) -> list[Row]:
        """Rows to train on, and those whose prompts the teacher answers."""
        return read_rows(str(self.config.train_data))

    @property
    def rows(self) -> int:
        """Training rows there are."""
        return len(self.train)

    @cached_property
    def train_print(self) -> str:
        return fingerprint_data(self.train)

    @cached_property
    def eval_print(self) -> str:
        return fingerprint_data(read_rows(str(self.config.eval_data)))

    @property
    def folders(self) -> dict[str, Path]:
        """Where the evaluation finds its rows and task files."""
        named = {name: getattr(self.config, name) for name in ("eval_data", "eval_dir", "include_path")}
        return {name: Path(source) for name, source in named.items() if source is not None}

    @cached_property
    def task_prints(self) -> dict[str, str]:
        """lm-eval tasks, groups of ours by their members, and what decides each one's scores."""
        folders = self.folders
        check_tasks(self.config.eval_tasks, folders.get("eval_dir"), folders.get("include_path"))
        return {
            task: fingerprint_task(task, folders.get("eval_dir"), folders.get("include_path"))
            for task in expand(self.config.eval_tasks)
        }

    @cached_property
    def _texts(self) -> list[str]:
        reader = load_tokenizer(self.new_base, self.trust)
        return calibration_texts(str(self.config.calibration or self.config.train_data), reader)

    def calibration_print(self, samples: int) -> str:
        return fingerprint_texts(self._texts[:samples])


def _miniature(pair: str | None, task: ExperimentTask, folder: Path) -> ExperimentTask:
    """A miniature task with its data written to files; any other task as it is."""
    if pair is None or task.zoo is None:
        return task
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.jsonl" for name in ("train_data", "eval_data", "calibration")}
    zoo.write_rows(zoo.rows(pair, task.zoo, "train", ZOO_ROWS), files["train_data"])
    zoo.write_rows(zoo.rows(pair, task.zoo, "test", task.eval_rows), files["eval_data"])
    zoo.write_rows([{"text": text} for text in zoo.texts(pair, ZOO_TEXTS)], files["calibration"])
    return task.model_copy(update={name: str(path) for name, path in files.items()})


def _scores(cell: Cell, infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of a measurement that its evaluations give."""
    info = infos[0]
    if "bits_per_byte" not in info:  # lm-eval tasks by name
        scores: dict[str, Score] = {}
        metrics = set()
        for task, found in (item for part in infos for item in part.items()):
            values = {name.split(",")[0]: name for name in reversed(found["metrics"])}
            metric = next((name for name in TASK_METRICS if name in values), next(iter(values), None))
            if metric is not None:
                metrics.add(metric)
                error = found["stderr"].get(values[metric])
                scores[task] = Score(value=found["metrics"][values[metric]], stderr=error, n=found["n"])
        return {"metric": ", ".join(sorted(metrics)), "scores": scores}
    metric = "bits_per_byte" if info["exact_match"] is None else "exact_match"
    score = Score(value=info[metric], stderr=info[f"{metric}_stderr"], n=info["n"])
    return {"metric": metric, "scores": {cell.task: score}, "loss": info["loss"]}


def plan(
    experiment: Experiment, output: Path, only: tuple[str, ...] = (), refresh: tuple[str, ...] = ()
) -> list[Measurement]:
    """Every cell that a run would have, and whether it is in the store. Computes nothing, downloads nothing.

    Returns:
        the cells; ``cached`` is None where the bases or the data are not on this machine, so that nothing is known.

    Raises:
        ConfigError: for a table or stage that does not exist.
    """
    cells = _chosen(experiment, only)
    refreshed = check_stages(refresh)
    pair = experiment.config.pair
    unknown = [
        Measurement(table=c.table, arm=c.arm, task=c.task, seed=c.seed, level=dict(c.level), cached=None) for c in cells
    ]
    if not all(_is_here(str(base)) for base in (pair.old_base, pair.new_base)):
        return unknown
    lab = Lab(experiment, output / "data", dry=True, refresh=refreshed)
    found = []
    for cell, nothing in zip(cells, unknown, strict=True):
        try:
            found.append(lab.measure(cell))
        except LoRASuiteError:  # no data, or an adapter that is still on the Hub
            found.append(nothing)
    return found


def _is_here(source: str) -> bool:
    """Whether a base is a directory, or in the Hub's local cache."""
    if Path(source).expanduser().is_dir():
        return True
    name, _, revision = source.partition("@")
    try:
        snapshot_download(name, revision=revision or None, local_files_only=True)
    except Exception:  # the Hub client raises many kinds
        return False
    return True


def _chosen(experiment: Experiment, only: tuple[str, ...]) -> list[Cell]:
    tables = experiment.tables(only)
    return [cell for cell in experiment.cells if cell.table in tables]


def _check(experiment: Experiment, cells: list[Cell], lab: Lab) -> None:
    """Everything that can be known to be wrong before the first training.

    Args:
        lab: a dry one.

    Raises:
        PreflightError: with every problem.
    """
    pair, first = experiment.config.pair, cells[0].settings.migration
    problems = inspect(
        str(pair.old_base),
        str(pair.new_base),
        trust_remote_code=first.trust_remote_code,
        architectures=first.architectures,
    ).problems
    for name in dict.fromkeys(cell.task for cell in cells):
        try:
            task = lab.task(name)
            _ = task.rows, task.calibration_print(1), task.eval_print if task.config.eval_data else task.task_prints
            if task.config.include_path is not None and not Path(task.config.include_path).is_dir():
                problems.append(Problem(task.config.include_path, "is not a directory", "Give lm-eval task files."))
            if task.config.adapter is not None:
                problems += Adapter.open(task.config.adapter, first.allow_pickle).check(lab.old)
            if task.config.retrained is not None:
                problems += Adapter.open(task.config.retrained, first.allow_pickle).check(lab.new)
        except LoRASuiteError as error:
            problems += error.problems
    for cell in cells if not problems else []:
        try:
            lab.measure(cell)
        except LoRASuiteError as error:
            problems += [Problem(f"{cell}: {p.where}", p.what, p.remedy) for p in error.problems]
    if problems:
        raise PreflightError(problems)


def _run_name() -> str:
    return Path(str(flow_run.parameters.get("file"))).stem


@flow(name="run-experiment", flow_run_name=_run_name, validate_parameters=False)
def run_experiment(file: str, output: str, only: tuple[str, ...] = (), refresh: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run what is missing of an experiment, and write its tables and figures.

    A run that was stopped goes on where it was: every stage of every cell is an artifact. The tables are written
    after each of them is complete, and cover all tables that were ever run into ``output``.

    Args:
        file: the experiment file.
        output: directory for results; one that holds results of the same experiment is gone on with.
        only: tables to run; all of them if empty.
        refresh: names of stages to compute again.

    Returns:
        ``experiment``, ``pair``, ``output``; how many cells there are, were ``computed`` and ``cached``; the
        ``failed`` ones with the reason; the ``tables`` as in ``results.json``.

    Raises:
        ConfigError, PreflightError, OutputError: for what cannot be run.
    """
    experiment = read_experiment(Path(file))
    refreshed = check_stages(tuple(refresh))
    cells = _chosen(experiment, tuple(only))
    folder = Path(output)
    before = _results_before(experiment, folder)
    pair = experiment.config.pair
    ready = [task.adapter for task in experiment.config.tasks.values()]
    ready += [task.retrained for task in experiment.config.tasks.values()]
    tag_run(experiment=experiment.config.name)
    fetch(str(pair.old_base), str(pair.new_base), *(source for source in ready if source))
    folder.mkdir(parents=True, exist_ok=True)
    look = Lab(experiment, folder / "data", dry=True)
    _check(experiment, cells, look)
    lab = Lab(experiment, folder / "data", dry=False, refresh=refreshed)
    lab.tasks = look.tasks  # read once
    log = get_run_logger()
    found: list[Measurement] = []
    done = kept(experiment, before)
    for name, members in _by_table(cells):
        rows = []
        for cell in members:
            rows.append(lab.measure(cell))
            found.append(rows[-1])
            log.info("%d of %d: %s %s", len(found), len(cells), cell, rows[-1].state())
        done[name] = rows
        tables = write_results(experiment, done, folder)
    shown = {name: table for name, table in tables.items() if name in experiment.tables(only)}
    create_markdown_artifact(
        "\n\n".join(table["markdown"] for table in shown.values()),
        key=slug("experiment", experiment.config.name),
        description=f"Tables of {experiment.config.name}",
    )
    return {
        "experiment": experiment.config.name,
        "pair": experiment.pair_name,
        "output": str(folder),
        "cells": len(found),
        "computed": sum(not m.cached and not m.failed for m in found),
        "cached": sum(bool(m.cached) for m in found),
        "failed": [{"cell": m.name(), "reason": m.failed} for m in found if m.failed],
        "tables": shown,
    }


def _by_table(cells: list[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    for name in dict.fromkeys(cell.table for cell in cells):
        yield name, [cell for cell in cells if cell.table == name]


def _results_before(experiment: Experiment, folder: Path) -> dict[str, tuple[str, list[Measurement]]]:
    """What earlier runs left in the output directory, by table.

    Raises:
        OutputError: if it is another experiment's, or something else.
    """
    if not folder.exists():
        return {}
    if not folder.is_dir() or not ((folder / RESULTS).is_file() or {p.name for p in folder.iterdir()} <= {"data"}):
        raise OutputError(Problem(str(folder), "holds something else", "Give a new --output, or one of an experiment."))
    if not (folder / RESULTS).is_file():
        return {}
    name, rows = read_results(folder)
    if name != experiment.config.name:
        raise OutputError(Problem(str(folder), f"holds the results of {name}", "Give another --output."))
    return rows
