"""The rows that the light fine-tune reads: the user's, those the old base with the adapter wrote, or both."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prefect.logging.loggers import get_run_logger

from flows.context import Context, fetch, migration_context
from flows.prepare_pair import pair_name
from lorasuite.data import Row, unanswered
from lorasuite.errors import DataError
from lorasuite.planning import MigrationConfig, Plan, RowCounts, RowPlan, check, plan_rows
from tasks.adapter_stages import shared_old_base, soft_labelling, teacher_worth, teaching
from tasks.fingerprints import fingerprint_data
from tasks.stage import Ref

TEACHER: Mapping[str, str] = {"old_model": "old_model", "old_tokenizer": "old_tokenizer", "adapter": "adapter"}
NEW: Mapping[str, str] = {"new_model": "new_model", "new_tokenizer": "new_tokenizer"}


@dataclass(frozen=True)
class Training:
    """Training rows, as the inputs of a stage."""

    #: ``train_data`` and ``teacher``, whichever there is.
    rows: dict[str, str | Ref]
    #: ``soft_labels``, where the teacher is distilled.
    soft: dict[str, str | Ref]
    #: What ``migration.json`` says of the teacher.
    teacher: dict[str, Any] | None
    #: What is done with the rows, now that the teacher's were judged.
    plan: RowPlan
    #: The teacher's rows that are only looked at, by ``auto`` and the sequential fit, where few or none are trained on.
    seen: dict[str, str | Ref] = field(default_factory=dict)

    @property
    def own(self) -> dict[str, str | Ref]:
        """The user's rows alone."""
        return {name: rows for name, rows in self.rows.items() if name == "train_data"}

    @property
    def written(self) -> bool:
        """Whether rows of the teacher's are trained on."""
        return "teacher" in self.rows

    @property
    def looked_at(self) -> dict[str, str | Ref]:
        """The rows that transforms may read and candidates are scored by."""
        return {**self.seen, **self.rows}

    @property
    def chosen_by(self) -> dict[str, str | Ref]:
        """Rows that a fine-tune is chosen by and not trained on, beside a part of those it is trained on."""
        return {"looked_at": self.seen["teacher"]} if self.seen and self.rows else {}


def training(context: Context, settings: MigrationConfig, plan: Plan, vocabulary: Ref) -> Training:
    """Gather the training rows; the teacher's only if it is worth copying."""
    wanted = plan.rows
    rows: dict[str, str | Ref] = {"train_data": fingerprint_data(plan.train)} if wanted.requested_rows else {}
    if not wanted.teacher_rows:
        return Training(rows, {}, None, wanted)
    unused = plan_rows(settings, replace(plan.counts, teacher_usable=False))
    drawn = {"samples": wanted.requested_rows, "seed": settings.seed}
    count = wanted.synthetic_train_rows
    try:
        written = teacher_rows(context, settings, plan.prompts, wanted.teacher_rows)
    except DataError as error:
        if settings.teacher_samples is not None or not rows:
            raise
        # nobody asked for these rows, and there are others
        get_run_logger().warning("the teacher's rows are not used: %s", error)
        reason = {"worth": False, "reason": str(error), "samples": count, "distilled": False}
        return Training(rows, {}, reason, unused)
    if not rows and not count:
        return Training({}, {}, None, wanted, {"teacher": written})
    worth = context.open(context.run(teacher_worth, {**NEW, **TEACHER, **rows, "teacher": written}, drawn)).info
    teacher = {**context.open(written).info, **worth, "samples": count, "distilled": False}
    if not worth["worth"]:
        get_run_logger().warning("the teacher's rows are not used: %s", worth["reason"])
        return Training(rows, {}, teacher, unused, {"teacher": written} if unused.selection_rows else {})
    if not count:
        return Training(rows, {}, teacher, wanted, {"teacher": written})
    rows["teacher"] = written
    soft: dict[str, str | Ref] = {}
    tuning = settings.finetune
    if tuning.distillation and plan.inspection.vocabulary.get("common"):
        values = {**drawn, "cutoff": tuning.cutoff, "temperature": tuning.distillation_temperature}
        labelled = context.run(soft_labelling, {**TEACHER, **rows, "vocabulary": vocabulary}, values)
        soft["soft_labels"] = labelled
        teacher["distilled"] = context.open(labelled).info
    return Training(rows, soft, teacher, wanted)


def teacher_rows(
    context: Context,
    settings: MigrationConfig,
    prompts: Sequence[Row] | None,
    count: int,
    adapter: str | Ref = "adapter",
) -> Ref:
    """``count`` rows that the old base with the adapter writes: found, or written now."""
    inputs: dict[str, str | Ref] = {**TEACHER, "adapter": adapter}
    if prompts is not None:
        # Without their answers: those are not read, so they must not make another key.
        asked = [unanswered(row, settings.teacher.text_prefix) for row in prompts]
        inputs["prompts"] = fingerprint_data(asked)
    values = {
        "samples": count,
        "seed": settings.seed,
        # How many are written at once changes nothing.
        "teacher": settings.teacher.model_dump(mode="json", exclude={"batch_size"}),
    }
    return context.run(teaching, inputs, values)


def write_ahead(configs: Iterable[MigrationConfig], refreshed: Collection[str]) -> None:
    """Write the teacher's rows of many adapters, one after the other, on old bases that are loaded once.

    What fails here fails again in the adapter's own migration, and is reported there.
    """
    if teaching.name in refreshed:  # each migration writes them again
        return
    writing = (config for config in configs if plan_rows(config, RowCounts()).teacher_rows)
    asking = sorted(writing, key=lambda config: config.old_base)
    with shared_old_base():
        for config in asking:
            try:
                fetch(config.old_base, config.new_base, config.adapter)
                pair = pair_name(config.old_base, config.new_base)
                context, plan = migration_context(config, pair), check(config)
                teacher_rows(context, config, plan.prompts, plan.rows.teacher_rows)
            except Exception as error:
                get_run_logger().warning("the teacher's rows of %s: %s", config.adapter, error)
