"""The prompts that the old base with the adapter answers: given ones, or from sources of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flows.arms import Source
from flows.context import Context
from lorasuite.data import Row, draw, unanswered
from lorasuite.planning import MigrationConfig, Plan, RowCounts, RowPlan, plan_rows
from lorasuite.teacher import DRAFTS, card_texts, parsed_card
from tasks.prompt_stages import prompt_drafts, resemblance
from tasks.prompt_stages import prompts as prompt_choice
from tasks.stage import Ref


@dataclass(frozen=True)
class Asking:
    """What prompts are made from: the sources by name, and what is given to them."""

    sources: tuple[str, ...]
    #: The user's prompts, all of which are used.
    prompts: Sequence[Row] | None = None
    #: The adapter's card and its training settings, as text.
    card: tuple[str, str] = ("", "")
    #: General texts to compare with; the old base writes some if there are none.
    general: Sequence[str] = ()
    #: Whether prompts may be conversations: both bases have chat templates.
    chat: bool = False


def asked_prompts(context: Context, settings: MigrationConfig, plan: Plan, source: Source) -> Ref | None:
    """The prompts that a migration's teacher answers; None: it writes from nothing."""
    chat = conversations(plan.inspection.old_reader, plan.inspection.new_tokenizer)
    general = plan.texts if settings.calibration is not None else ()
    asking = Asking(plan.rows.prompt_sources, plan.prompts, plan.card, general, chat)
    return answered_prompts(context, settings, plan.rows.teacher_rows, asking, source)


def conversations(*readers: Any) -> bool:
    """Whether prompts may be conversations: both bases' tokenizers have chat templates."""
    return all(getattr(reader, "chat_template", None) for reader in readers)


def asked_of_rows(
    settings: MigrationConfig, rows: Sequence[Row], count: int | None, source: Source
) -> tuple[MigrationConfig, RowPlan, Asking]:
    """What a teacher is asked of whose task there are rows, as in an experiment: all their prompts, or some of them.

    Args:
        rows: of the task.
        count: how many of their prompts are given, drawn by the seed; None: all.

    Returns:
        the settings of one who has no more than that, what is done with rows under them, and what prompts come from.
    """
    given = list(rows) if count is None else draw(rows, count, settings.seed)
    if count is not None:
        told = {"train_data": None, "finetune_samples": None, "prompts": settings.train_data if count else None}
        settings = settings.model_copy(update=told)
    card = ("", "") if source.path is None else card_texts(source.path)
    counts = RowCounts.of((), given or None, (), settings.teacher.text_prefix, bool(parsed_card(*card)))
    plan = plan_rows(settings, counts)
    return plan.tuned(settings), plan, Asking(plan.prompt_sources, given or None, card)


def answered_prompts(
    context: Context, settings: MigrationConfig, count: int, asking: Asking, source: Source
) -> Ref | None:
    """The prompts that a teacher answers: those given, or with sources so many; None: it writes from nothing."""
    if not asking.sources:
        return kept_prompts(context, asking.prompts)
    return discovered_prompts(context, settings, count, asking, source)


def kept_prompts(context: Context, prompts: Sequence[Row] | None) -> Ref | None:
    """Prompts as an artifact, without their answers: those are not read, so they must not make another key."""
    if prompts is None:
        return None
    return context.keep_rows([row if row.kind == "text" else unanswered(row) for row in prompts])


def discovered_prompts(context: Context, settings: MigrationConfig, count: int, asking: Asking, source: Source) -> Ref:
    """So many prompts from sources of prompts: drafts of each source, and the choice among all of them."""
    given = kept_prompts(context, asking.prompts)
    examples = {} if given is None else {"examples": given}
    general = {"general": context.keep_texts(asking.general)} if asking.general else {}
    told = {"seed": settings.seed, "teacher": settings.teacher.computed()}
    drafts = {}
    for name in asking.sources:
        inputs = {**teacher_inputs(context, source), **general}
        if asking.chat:
            inputs["new_tokenizer"] = context.reader("new")
        values: dict[str, Any] = {**told, "source": name, "count": DRAFTS * count}
        if name not in ("card", "adapter"):  # what a source does not read is none of its key
            inputs |= examples
            if "description" in asking.sources:
                values["description"] = " ".join((settings.describe or "").split())
        if name == "card":
            inputs["card"] = context.keep_texts(asking.card)
        drafts[name] = context.run(prompt_drafts, inputs, values, label=name, paths=source.paths)
    inputs = {**teacher_inputs(context, source), **examples, **general, "drafts": drafts}
    return context.run(prompt_choice, inputs, {**told, "count": count}, paths=source.paths)


def compare_prompts(
    context: Context, settings: MigrationConfig, prompts: Ref, rows: Sequence[Row], source: Source
) -> Ref:
    """How many of the prompts that were found resemble those of real rows; nothing is chosen by it."""
    inputs = {**teacher_inputs(context, source), "prompts": prompts, "real": kept_prompts(context, rows)}
    teacher = settings.teacher.computed()
    told = {"count": len(rows), "seed": settings.seed, "teacher": teacher}
    return context.run(resemblance, inputs, told, paths=source.paths)


def teacher_inputs(context: Context, source: Source) -> dict[str, Any]:
    """The old base and the adapter, as the inputs of a stage."""
    model, tokenizer = context.as_loaded("old_model"), context.reader("old", source.own_tokenizer)
    return {"old_model": model, "old_tokenizer": tokenizer, "adapter": source.adapter}
