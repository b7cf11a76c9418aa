"""The second step after a fine-tune on rows that the teacher wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect.logging.loggers import get_run_logger

from flows.arms import Source, rehearsal
from flows.choice import Tuned
from flows.context import Context
from flows.pair import Pair
from flows.prompts import teacher_inputs
from flows.teach import Rows
from lorasuite.planning import MigrationConfig
from lorasuite.reporting import OWN_ROWS_START
from lorasuite.training import SecondStepResult
from tasks.distillation_stages import second_stepping
from tasks.stage import WORK, Ref


def distilled_further(
    context: Context, settings: MigrationConfig, source: Source, pair: Pair, rows: Rows, tuned: Tuned | None
) -> str | None:
    """Give what is published a second step where the settings ask for one, and its adapter learnt from the teacher.

    Returns:
        what came of it, for people; None where none was asked for.
    """
    if settings.second_step == "none":
        return None
    if tuned is None or rows.all is None or not rows.plan.synthetic_train_rows or tuned.start == OWN_ROWS_START:
        told = "no second step: the adapter that is published has not learnt from the teacher's rows"
        get_run_logger().warning("%s", told)
        return told
    info = context.open(tuned.final).info
    tuned.second = second(
        context, settings, source, pair, rows.all, tuned.final,
        rate=info["learning_rate"], taught=rows.taught, epochs=ended_after(info), begun=tuned.begun, fresh=tuned.fresh,
        compares=True,
    )  # fmt: skip
    told = outcome(SecondStepResult.model_validate(context.open(tuned.second).info))
    get_run_logger().info("%s", told)
    return told


def outcome(result: SecondStepResult) -> str:
    """What came of a second step that was compared, in a sentence."""
    if result.measured_on == "nothing":
        return f"second step ({result.kind}): not kept, the rows are too few to hold any out"
    measured_by = "it diverged"
    if result.before is not None and result.after is not None:
        measured_by = f"{result.before:.3f} → {result.after:.3f} nats a label"
    measured = "own" if result.measured_on == "own rows" else "written"
    kept = "kept" if result.kept else "not kept"
    return f"second step ({result.kind}): {kept}, {measured_by} on {result.held_out} {measured} rows held out"


def second(
    context: Context,
    settings: MigrationConfig,
    source: Source,
    pair: Pair,
    rows: Ref,
    first: Ref,
    *,
    rate: float,
    taught: Mapping[str, Ref],
    epochs: int | None = None,
    begun: Ref | None = None,
    fresh: Mapping[str, Any] | None = None,
    compares: bool,
) -> Ref:
    """The second step on a split's rows.

    Args:
        first: the first step's adapter, trained at the learning rate ``rate`` on the rows and on what the teacher
            says of them (``taught``), ended after ``epochs``, begun from the adapter ``begun`` or else a LoRA of
            ``fresh``.
        compares: whether held-out rows decide if it is kept.
    """
    inputs: dict[str, Any] = {
        **teacher_inputs(context, source),
        "new_model": context.as_loaded("new_model"),
        "new_tokenizer": context.reader("new"),
        "rows": rows,
        "vocabulary": pair.vocabulary,
        "first": first,
    }
    tuning = settings.finetune
    further = {
        "learning_rate": rate * settings.second_step_rate,
        "epochs": settings.second_step_epochs,
        "max_steps": None,
    }
    values: dict[str, Any] = {
        "kind": settings.second_step,
        "finetune": tuning.model_copy(update=further).computed(),
        "teacher": settings.teacher.computed(),
        "compares": compares,
    }
    if compares:  # only then is the first step made again
        values |= {"first": tuning.model_copy(update={"learning_rate": rate}).computed(), "first_epochs": epochs}
        texts, told = rehearsal(context, "new", settings.rehearsal, tuning.seed)
        inputs |= {**taught, **texts}
        values |= told
        if begun is None:
            values["fresh"] = dict(fresh or {})
        else:
            inputs["transform"] = begun
    work = context.where.home / WORK / second_stepping.key(inputs, values)[:32]
    return context.run(second_stepping, inputs, values, paths={**source.paths, WORK: work})


def ended_after(info: Mapping[str, Any]) -> int | None:
    """After how many epochs a fine-tune was ended early, as its artifact says."""
    if "search" in info:
        return info["search"]["epochs"]  # type: ignore[no-any-return]
    rates = [one for one in info["sweep"] if one["learning_rate"] == info["learning_rate"]]
    return rates[0]["epochs"] if rates else None
