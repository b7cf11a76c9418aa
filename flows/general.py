"""General ability: both bases, bare and with their adapters, on text and a task of no adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from flows.context import Context
from flows.measure import TEXTS, Asked, Measured
from lorasuite.adapters import OwnTokenizer
from lorasuite.evaluation import Arm, General, general_cost, read_samples
from lorasuite.planning import GeneralTexts, MigrationConfig
from tasks.stage import Ref


def general_ability(
    context: Context,
    settings: MigrationConfig,
    texts: GeneralTexts,
    adapters: Mapping[Arm, Ref | str],
    own_tokenizer: OwnTokenizer | None = None,
) -> General:
    """What the old adapter costs the old base, and the new one the new base. Bare bases are measured once for all.

    Args:
        adapters: the old one, and the new one that is published.
        own_tokenizer: of the old adapter, which the old base is measured with.
    """
    missing = [texts.missing] if texts.missing is not None else []
    tasks = [settings.general_task] if settings.general_task else []
    if not texts.texts and not tasks:
        return General(missing=missing)
    options = settings.evaluation.model_copy(update={"limit": settings.general.documents})
    asked = Asked.of(context, options, (), tasks, *settings.task_folders)
    asked = replace(asked, texts=context.keep_texts(texts.texts) if texts.texts else None)
    measured = Measured(context, asked)
    arms: dict[Arm, Ref | str | None] = {Arm.OLD: None, Arm.NEW: None, **adapters}
    for arm, adapter in arms.items():
        own = own_tokenizer if arm.on_old_base else None
        measured.measure(arm, "old" if arm.on_old_base else "new", adapter, own_tokenizer=own)
    files, costs = measured.samples(), []
    for name in [*([TEXTS] if texts.texts else []), *asked.tasks]:
        cost = general_cost(
            None if name == TEXTS else name, {arm: read_samples(files[f"{arm}/{name}"]) for arm in arms}
        )
        if cost is None:
            missing.append(f"{name}: it has no accuracy or exact match, by which costs are counted")
        else:
            costs.append(cost)
    return General.model_validate(
        {
            "source": texts.source,
            "missing": missing,
            "text": measured.text,
            "tasks": measured.scores,
            "costs": [cost.model_dump() for cost in costs],
        }
    )
