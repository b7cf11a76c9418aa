"""The rows that the light fine-tune reads: the user's, those the old base with the adapter wrote, or both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from prefect.logging.loggers import get_run_logger

from flows.arms import Source
from flows.context import Context, fetch, migration_context
from flows.pair import Pair, pair_name
from flows.prompts import asked_prompts, teacher_inputs
from lorasuite.adapters import Adapter, OwnTokenizer, sources
from lorasuite.bases import Checkpoint
from lorasuite.data import draw
from lorasuite.errors import DataError
from lorasuite.planning import MigrationConfig, Plan, RowCounts, RowPlan, check, plan_rows
from lorasuite.teacher import ROWS as TEMPLATE_ROWS
from lorasuite.teacher import TemplateFits, candidates
from lorasuite.training import FinetuneSettings
from tasks.distillation_stages import soft_labelling, token_weighting
from tasks.fingerprints import fingerprint_adapter
from tasks.stage import Ref
from tasks.teacher_stages import teacher_worth, teaching, template_fit
from tasks.training_stages import split


@dataclass(frozen=True)
class Rows:
    """What a migration trains on, fits on and chooses by.

    ``plan`` is what was decided, once it was known whether the teacher can be used. ``all`` is the split of every row
    there is (None: there are none), ``own`` that of the user's rows without those the teacher wrote to train on, and
    ``taught`` what the teacher says of the tokens of all, by the names of a fine-tune's inputs.
    """

    plan: RowPlan
    all: Ref | None = None
    own: Ref | None = None
    taught: Mapping[str, Ref] = field(default_factory=dict)
    #: What ``migration.json`` says of the teacher.
    teacher: dict[str, Any] | None = None


def gather_rows(context: Context, settings: MigrationConfig, plan: Plan, pair: Pair, source: Source) -> Rows:
    """The training rows, split; the teacher's only if it is worth copying."""
    own = context.keep_rows(plan.train) if plan.rows.own_rows else None
    if not plan.rows.teacher_rows:
        return Rows(plan.rows, *_splits(context, settings, {"own": own}))
    try:
        asked = asked_prompts(context, settings, plan, source)
        written = teacher_rows(context, settings, plan.rows.teacher_rows, asked, source)
    except DataError as error:
        if settings.teacher_samples is not None or own is None:
            raise
        # nobody asked for these rows, and there are others
        get_run_logger().warning("the teacher's rows are not used: %s", error)
        said = {"worth": False, "reason": str(error), "samples": plan.rows.synthetic_train_rows, "distilled": False}
        unusable = plan_rows(settings, replace(plan.counts, teacher_usable=False))
        return Rows(unusable, *_splits(context, settings, {"own": own}), teacher=said)
    if own is None and not plan.rows.synthetic_train_rows:
        return Rows(plan.rows, *_splits(context, settings, {"selection": written}))
    discovered = None
    if plan.rows.prompt_sources and asked is not None:
        discovered = context.open(asked).info
        plan.inspection.notices.append(discovered["said"])
        (get_run_logger().info if discovered["clear"] else get_run_logger().warning)("%s", discovered["said"])
    info = context.open(written).info
    if info["rows"] < plan.rows.teacher_rows:
        left_out = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in info["dropped"].items())
        told = f"the old base with its adapter wrote {info['rows']} of {plan.rows.teacher_rows} rows"
        plan.inspection.notices.append(f"{told}: the others were left out ({left_out})" if left_out else told)
    worth = _worth(context, source, written, own)
    teacher = {
        **info,
        **worth,
        "discovered": discovered,
        "samples": plan.rows.synthetic_train_rows,
        "distilled": False,
    }
    if not worth["worth"]:
        get_run_logger().warning("the teacher's rows are not used: %s", worth["reason"])
        unusable = plan_rows(settings, replace(plan.counts, teacher_usable=False))
        parts = {"own": own} if own is not None else {"selection": written}
        return Rows(unusable, *_splits(context, settings, parts), teacher=teacher)
    if not plan.rows.synthetic_train_rows:
        return Rows(plan.rows, *_splits(context, settings, {"own": own, "selection": written}), teacher=teacher)
    every, alone = _splits(context, settings, {"own": own, "synthetic": written})
    taught = {} if every is None else said_of_tokens(context, settings.finetune, source, every, pair)
    if "soft_labels" in taught:
        teacher["distilled"] = context.open(taught["soft_labels"]).info
    return Rows(plan.rows, every, alone, taught, teacher)


def said_of_tokens(context: Context, tuning: FinetuneSettings, source: Source, rows: Ref, pair: Pair) -> dict[str, Ref]:
    """What a fine-tune asks the teacher about the tokens of a split's rows, by the names of its inputs."""
    inputs = {**teacher_inputs(context, source), "new_tokenizer": context.reader("new"), "rows": rows}
    found = {}
    if tuning.distillation:
        values = {"cutoff": tuning.cutoff, "temperature": tuning.distillation_temperature}
        asked = {**inputs, "vocabulary": pair.vocabulary}
        found["soft_labels"] = context.run(soft_labelling, asked, values, paths=source.paths)
    if tuning.token_weights != "none":
        found["token_weights"] = context.run(token_weighting, inputs, {"cutoff": tuning.cutoff}, paths=source.paths)
    return found


def teacher_rows(context: Context, settings: MigrationConfig, count: int, prompts: Ref | None, source: Source) -> Ref:
    """So many rows that the old base with the adapter writes: found, or written now.

    Args:
        prompts: what it answers. None: it writes from nothing.
    """
    inputs = teacher_inputs(context, source)
    if prompts is not None:
        inputs["prompts"] = prompts
    values = {
        "samples": count,
        "seed": settings.seed,
        # How many are written at once changes nothing.
        "teacher": settings.teacher.computed(),
    }
    return context.run(teaching, inputs, values, paths=source.paths)


def fitting_template(context: Context, settings: MigrationConfig, plan: Plan, source: Source) -> TemplateFits | None:
    """Whether the adapter knows its rows under the template in use, and which of the known ones it fits best.

    None where no row is rendered by a template, or too few are.
    """
    kind = next((row.kind for row in plan.rendered), None)
    rows = draw([row for row in plan.rendered if row.kind == kind], TEMPLATE_ROWS, settings.seed)
    if not rows:
        return None
    templates = candidates(rows, plan.template)
    used = plan.template.label if plan.template.label in templates else next(iter(templates))
    inputs = {**teacher_inputs(context, source), "rows": context.keep_rows(rows)}
    values = {"templates": templates, "used": used}
    info = context.open(context.run(template_fit, inputs, values, paths=source.paths)).info
    return None if info["fit"] is None else TemplateFits.model_validate(info["fit"])


def _worth(context: Context, source: Source, written: Ref, own: Ref | None) -> dict[str, Any]:
    """Whether the teacher is worth copying, asked on the user's rows where there are any."""
    new = {"new_model": context.as_loaded("new_model"), "new_tokenizer": context.reader("new")}
    inputs: dict[str, Any] = {**teacher_inputs(context, source), **new, "teacher": written}
    if own is not None:
        inputs["rows"] = own
    return context.open(context.run(teacher_worth, inputs, {}, paths=source.paths)).info


def _splits(
    context: Context, settings: MigrationConfig, parts: Mapping[str, Ref | None]
) -> tuple[Ref | None, Ref | None]:
    """The split of all rows, and that of the user's without the teacher's: one where they are the same."""
    given = {name: ref for name, ref in parts.items() if ref is not None}
    if not given:
        return None, None
    every = context.run(split, given, {"seed": settings.seed})
    if "own" not in given:
        return every, None
    alone = {name: ref for name, ref in given.items() if name != "synthetic"}
    return every, every if alone == given else context.run(split, alone, {"seed": settings.seed}, label="own")


def write_ahead(configs: Iterable[MigrationConfig], refreshed: frozenset[str]) -> None:
    """Write the teacher's rows of many adapters one after the other, on old bases that are loaded once.

    What fails here fails again in the adapter's own migration, and is reported there.
    """
    if teaching.name in refreshed:  # each migration writes them again
        return
    writing = (config for config in configs if plan_rows(config, RowCounts()).teacher_rows)
    for config in sorted(writing, key=lambda config: config.old_base):
        try:
            fetch(config.old_base, config.new_base, *sources(config.adapter))
            plan = check(config)
            context = migration_context(config, pair_name(config.old_base, config.new_base))
            source = opened_source(context, config, plan.inspection.own_tokenizer)
            asked = asked_prompts(context, config, plan, source)
            teacher_rows(context, config, plan.rows.teacher_rows, asked, source)
        except Exception as error:
            get_run_logger().warning("the teacher's rows of %s: %s", config.adapter, error)


def opened_source(context: Context, settings: MigrationConfig, own_tokenizer: OwnTokenizer | None) -> Source:
    """The adapter of a migration, at the place that the context says it lies."""
    path = context.where.path("adapter")
    fingerprint = fingerprint_adapter(path, settings.allow_pickle)
    old = Checkpoint(context.where.path("old_base")).architecture
    return Source.opened(Adapter.open(path, settings.allow_pickle), fingerprint, old, settings, own_tokenizer)
