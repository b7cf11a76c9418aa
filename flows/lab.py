"""What every cell of an experiment is made of: the pair, the tasks' data and the arms, of the stages of a migration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from artifacts import default_home
from flows.arms import Source, Tuning, migrated, tuned, with_output
from flows.context import Context
from flows.lab_tasks import TaskData, miniature
from flows.measure import evaluated, scores_of
from flows.pair import Pair
from flows.prompts import answered_prompts, asked_of_rows, compare_prompts, conversations
from flows.second_step import second
from flows.teach import said_of_tokens, teacher_rows
from lorasuite.adapters import Adapter, OwnTokenizer, own_tokenizer, untrained
from lorasuite.bases import Checkpoint, Role, load_tokenizer, resolve
from lorasuite.data import HELD_OUT, draw, read_template
from lorasuite.errors import AdapterError, ConfigError, NumericalError, Problem
from lorasuite.evaluation import Arm
from lorasuite.planning import Cell, Experiment, RowCounts, plan_rows, torch_device
from lorasuite.reporting import Measurement
from lorasuite.training import FinetuneSettings
from lorasuite.transforms import ModelTransform, transform
from tasks.distillation_stages import second_stepping, soft_labelling, token_weighting
from tasks.evaluation_stages import evaluation, task_evaluation
from tasks.fingerprints import fingerprint_adapter, fingerprint_bases
from tasks.prompt_stages import prompt_drafts, resemblance
from tasks.prompt_stages import prompts as prompt_choice
from tasks.stage import Recorder, Ref, Stage, Where
from tasks.teacher_stages import teaching
from tasks.training_stages import finetune, split
from tasks.transform_stages import model_fit
from tasks.transform_stages import transform as transform_stage

#: Stages by what their cost is counted as; those not named are the pair's, and evaluations are not counted.
PARTS: dict[str, str | None] = {
    transform_stage.name: "transform",
    model_fit.name: "transform",
    prompt_drafts.name: "transform",
    prompt_choice.name: "transform",
    teaching.name: "transform",
    split.name: None,
    token_weighting.name: "transform",
    soft_labelling.name: "transform",
    resemblance.name: None,
    finetune.name: "finetune",
    second_stepping.name: "finetune",
    evaluation.name: None,
    task_evaluation.name: None,
}
#: Real prompts that those found are compared with.
REAL = 1000
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

    made: dict[str, Step] = field(default_factory=dict)
    #: of the cell at hand, by key
    used: dict[str, Step] = field(default_factory=dict)

    def run(
        self,
        stage: Stage,
        inputs: Mapping[str, Any],
        settings: Mapping[str, Any],
        label: str | None = None,
        paths: Mapping[str, Path] | None = None,
    ) -> Ref:
        """As :meth:`flows.context.Context.run`; a stage that this context ran before is only noted for the cell."""
        key = stage.key(inputs, settings)
        if key in self.made:
            self.used.setdefault(key, self.made[key])
            return Ref(stage=stage.name, key=key)
        if self.dry:
            cached = self.store.has(key) and stage.name not in self.refresh
        else:
            with Recorder() as recorder:
                super().run(stage, inputs, settings, label, paths)
            cached = recorder.runs[-1].cached
        self.made[key] = Step(stage.name, label, key, cached)
        self.used[key] = self.made[key]
        return Ref(stage=stage.name, key=key)


class Lab:
    """The pair of an experiment, and what every arm of a cell is made of.

    Args:
        data: directory for the rows of miniature tasks.
        dry: name every artifact, compute none.

    Raises:
        ConfigError: if cells differ in how bases are loaded.
    """

    def __init__(self, experiment: Experiment, data: Path, *, dry: bool, refresh: frozenset[str] = frozenset()) -> None:
        pair = experiment.config.pair
        first = experiment.cells[0].settings.migration
        for name, way in (("loading", "loads its bases"), ("template", "renders its rows")):
            if len({getattr(cell.settings.migration, name) for cell in experiment.cells}) > 1:
                what = f"differs between cells, and an experiment {way} in one way"
                raise ConfigError(Problem(name, what, "Write an experiment for each."))
        self.dry, self.data = dry, data
        self.experiment = experiment
        self.old, self.new = Checkpoint(str(pair.old_base)), Checkpoint(str(pair.new_base))
        home = default_home()
        bases = (self.old.path, self.new.path)
        where = Where(
            home=home,
            device=torch_device(first.device),
            paths={"old_base": self.old.path, "new_base": self.new.path},
            options={
                "trust_remote_code": first.trust_remote_code,
                "allow_pickle": first.allow_pickle,
                "teacher_batch": first.teacher.batch_size,
                "loading": first.loading.model_dump(mode="json"),
            },
            # a look must not lock: only a run takes turns with other hosts
            **({"remote": None} if dry else {}),
        )
        fingerprints = fingerprint_bases.fn(home, *bases) if dry else fingerprint_bases(home, *bases)
        self.steps = Steps(where, fingerprints, refresh, pair=experiment.pair_name, dry=dry)
        self.trust = first.trust_remote_code
        self.template = read_template(first.template)
        self.tasks: dict[str, TaskData] = {}

    def task(self, name: str) -> TaskData:
        """The data of a task, written and read once."""
        if name not in self.tasks:
            config = self.experiment.config
            task = miniature(config.pair.zoo, config.tasks[name], self.data / name)
            self.tasks[name] = TaskData(task, self.new.path, self.trust, self.template)
        return self.tasks[name]

    # ------------------------------------------------------------------------------------------------------ the arms

    def evaluate(self, cell: Cell) -> list[Ref]:
        """The evaluations of a cell's arm."""
        side = "old" if cell.arm.startswith("old") else "new"
        adapter, paths = self.adapter(cell)
        asked = self.task(cell.task).asked(self.steps, cell)
        own = self.own_tokenizer(cell) if side == "old" else None
        return list(evaluated(self.steps, side, adapter, asked, str(cell.arm), paths, own).values())

    def own_tokenizer(self, cell: Cell) -> OwnTokenizer | None:
        """That of the task's ready adapter, where it is not the old base's."""
        ready = self.task(cell.task).config.adapter
        if ready is None:
            return None
        return own_tokenizer(resolve(ready), load_tokenizer(self.old.path, self.trust), self.trust)

    def adapter(self, cell: Cell) -> tuple[Ref | str | None, dict[str, Path]]:
        """What an arm puts on its base: an artifact, or the fingerprint of a ready adapter and its place."""
        task = self.task(cell.task).config
        match cell.arm:
            case Arm.OLD_ADAPTER | Arm.RETRAINED:
                side, ready = ("old", task.adapter) if cell.arm == Arm.OLD_ADAPTER else ("new", task.retrained)
                if ready is None:
                    return self.trained(cell, side), {}
                path = self.steps.ready_adapter(side, ready, pickle := cell.settings.migration.allow_pickle)
                return fingerprint_adapter(path, pickle), {"adapter": path}
            case Arm.MIGRATED:
                return self.migrated(cell), {}
            case Arm.SCRATCH:
                return self.tuned(cell, None), {}
            case Arm.MIGRATED_LFT:
                return self.tuned(cell, self.migrated(cell)), {}
            case Arm.REFRESHED:
                return self.refreshed(cell), {}
            case _:
                return None, {}

    def trained(self, cell: Cell, side: str) -> Ref:
        """A LoRA trained on all the rows, on either base."""
        training = cell.settings.retrain
        rows = min(training.rows, len(self.task(cell.task).train))
        return tuned(
            self.steps,
            side,
            self.split(cell, training.rows, training.finetune.seed),
            Tuning(training.finetune, training.learning_rates),
            fresh=self._untrained(cell, side, rows, training.finetune),
            label=OLD if side == "old" else "new, all rows",
        )

    def tuned(self, cell: Cell, start: Ref | None) -> Ref:
        """A few steps on a few rows, from a migrated adapter or, as the control, from a fresh one."""
        settings = cell.settings.migration
        own = self.split(cell, *self._drawn(cell))
        rows = min(self._drawn(cell)[0], len(self.task(cell.task).train))
        if len(settings.learning_rates) > 1:
            rows -= held_out_rows(rows)  # the shorter run of a sweep: AdaLoRA must be done pruning in it
        return tuned(
            self.steps,
            "new",
            own,
            Tuning(settings.finetune, settings.learning_rates, settings.rehearsal),
            start=start,
            fresh=self._untrained(cell, "new", rows, settings.finetune) if start is None else None,
            label="scratch" if start is None else "migrated",
        )

    def refreshed(self, cell: Cell) -> Ref:
        """A fresh LoRA fine-tuned on what the old base with the adapter wrote, whether or not it is worth copying, and
        on labelled rows where some are given beside it."""
        settings, task = cell.settings.migration, self.task(cell.task)
        source = self.source(cell)
        settings, plan, asking = asked_of_rows(settings, task.train, cell.settings.given.prompts, source)
        if plan.prompt_sources:
            old, new = (load_tokenizer(base.path, self.trust) for base in (self.old, self.new))
            chat = conversations(old if source.own_tokenizer is None else source.own_tokenizer.tokenizer, new)
            general = task.texts[: settings.pair.calibration_samples] if task.config.calibration else ()
            asking = replace(asking, chat=chat, general=general)
        asked = answered_prompts(self.steps, settings, plan.teacher_rows, asking, source)
        if plan.prompt_sources and asked is not None:
            compare_prompts(self.steps, settings, asked, draw(task.train, REAL, settings.seed), source)
        written = teacher_rows(self.steps, settings, plan.teacher_rows, asked, source)
        labelled = cell.settings.given.labelled
        own = {"own": self.steps.keep_rows(draw(task.train, labelled, settings.seed))} if labelled else {}
        rows = self.steps.run(split, {**own, "synthetic": written}, {"seed": settings.seed})
        pair = self.pair(cell)
        taught = said_of_tokens(self.steps, settings.finetune, source, rows, pair)
        first = tuned(
            self.steps,
            "new",
            rows,
            Tuning(settings.finetune, settings.learning_rates, settings.rehearsal),
            fresh=self._untrained(cell, "new", plan.synthetic_train_rows + labelled, settings.finetune),
            taught=taught,
            label="refreshed",
        )
        if settings.second_step == "none":
            return first
        # measured whether or not a migration would keep it, at the rate that the first step chose
        rate = settings.finetune.learning_rate
        if self.steps.store.has(first.key):
            rate = self.steps.open(first).info["learning_rate"]
        return second(self.steps, settings, source, pair, rows, first, rate=rate, taught=taught, compares=False)

    def migrated(self, cell: Cell) -> Ref:
        """The adapter on the new base, not yet fine-tuned."""
        settings, source, pair = cell.settings.migration, self.source(cell), self.pair(cell)
        reads_rows = isinstance(transform(settings.method), ModelTransform)
        return migrated(
            self.steps,
            pair,
            source,
            settings.method,
            settings,
            rows=self.split(cell, *self._drawn(cell)) if reads_rows else None,
            # of fresh layers only: one seed, so that other seeds start from the same adapter
            seed=None if reads_rows else cell.settings.retrain.finetune.seed,
            label=settings.method,
        )

    def pair(self, cell: Cell) -> Pair:
        """What is known of the two bases."""
        settings = cell.settings.migration
        texts = self.steps.keep_texts(self.task(cell.task).texts[: settings.pair.calibration_samples])
        return Pair(self.steps, settings.pair, texts, self.source(cell).roles)

    def split(self, cell: Cell, samples: int, seed: int) -> Ref:
        """So many of the task's training rows, drawn and split by a seed."""
        own = self.steps.keep_rows(draw(self.task(cell.task).train, samples, seed))
        return self.steps.run(split, {"own": own}, {"seed": seed})

    def source(self, cell: Cell) -> Source:
        """The adapter to migrate."""
        settings, ready = cell.settings.migration, self.task(cell.task).config.adapter
        if ready is not None:
            adapter = Adapter.open(self.steps.ready_adapter("old", ready, settings.allow_pickle), settings.allow_pickle)
            fingerprint = fingerprint_adapter(adapter.path, settings.allow_pickle)
            own = self.own_tokenizer(cell)
            source = Source.opened(adapter, fingerprint, self.old.architecture, settings, own)
            if isinstance(transform(settings.method), ModelTransform) and not source.plain:
                what = f"{settings.method} moves updates of blocks only, and the adapter has more"
                raise AdapterError(Problem("method", what, "Name another one."))
            return source
        lora = cell.settings.lora
        kept = {"rank": cell.settings.rank, "alpha": cell.settings.rank * lora.scaling, "use_rslora": False}
        held = {role for m in self.old.architecture.modules if set(m.roles) & set(lora.targets) for role in m.roles}
        roles: tuple[Role, ...] = tuple(role for role in self.old.architecture.roles if role in held)
        return Source(self.trained(cell, "old"), roles, with_output(kept, settings))

    def _drawn(self, cell: Cell) -> tuple[int, int]:
        """Training rows of the light fine-tune, and the seed they are drawn by."""
        settings = cell.settings.migration
        return plan_rows(settings, RowCounts()).requested_rows, settings.seed

    def _untrained(self, cell: Cell, side: str, rows: int, tuning: FinetuneSettings) -> dict[str, Any]:
        lora = cell.settings.lora
        return untrained(
            lora.targets,
            (self.old if side == "old" else self.new).architecture,
            kind=lora.kind,
            rank=lora.rank if side == "old" else cell.settings.rank,
            scaling=lora.scaling,
            steps=tuning.max_steps or math.ceil(math.ceil(rows / tuning.batch_size) * tuning.passes),
        )

    # ------------------------------------------------------------------------------------------------------ measuring

    def measure(self, cell: Cell) -> Measurement:
        """Run a cell, or with ``dry`` only look for it. A training that diverges is a result, too."""
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
        known = bool(keys) and (made.cached or not self.dry)
        return made.model_copy(update=self._measured(cell, keys, steps)) if known else made

    def _measured(self, cell: Cell, keys: tuple[str, ...], steps: tuple[Step, ...]) -> dict[str, Any]:
        """What the artifacts of a cell say: its scores, and what its adapter cost."""
        store = self.steps.store
        cost: dict[str, float] = {}
        memory = [0]
        rate = None
        for step in steps:
            part = PARTS.get(step.stage, "pair")
            # the adapter to migrate was there before anybody asked what migrating it costs
            if part is None or (step.label == OLD and cell.arm != Arm.OLD_ADAPTER):
                continue
            manifest = store.manifest(step.key)
            cost[part] = round(cost.get(part, 0.0) + manifest.run.get("seconds", 0.0), 3)
            memory.append(manifest.run.get("max_cuda_bytes") or manifest.run.get("max_rss_bytes", 0))
            if step.stage == finetune.name:
                rate = manifest.info["learning_rate"]
        found = scores_of(cell.task, [store.manifest(key).info for key in keys])
        return {**found, "cost": cost, "peak_memory_bytes": max(memory) or None, "learning_rate": rate}


def held_out_rows(rows: int) -> int:
    """How many of so many rows a sweep holds out."""
    return max(1, round(HELD_OUT * rows))
