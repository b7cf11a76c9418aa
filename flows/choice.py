"""Which adapter a migration publishes: its arms, and the choice among transforms, learning rates and starts.

With ``--method auto`` every candidate is scored untrained on rows that are held out; then fine-tunes from a fresh LoRA
and from the candidates compete on the same rows: start and learning rate are searched together, or where rates are
named, a fresh LoRA and the best candidates are swept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flows.arms import Source, Tuning, migrated, rehearsal, tuned
from flows.context import Context
from flows.pair import Pair
from flows.teach import Rows
from lorasuite.adapters import fresh_lora
from lorasuite.errors import AdapterError, Problem
from lorasuite.evaluation import Arm
from lorasuite.planning import AUTO, MigrationConfig
from lorasuite.reporting import NEW_START, OWN_ROWS_START
from lorasuite.training import NOTHING, Search, loss_order
from tasks.folders import adapter_folder
from tasks.stage import WORK, Ref
from tasks.training_stages import screening, searching, selection
from tasks.transform_stages import unmoved


@dataclass
class Chosen:
    """What came of the choice.

    ``method`` is the transform whose update was chosen, or ``none``; ``moved`` its artifact as the transform made it
    and ``untrained`` the same at the scale that was chosen. ``candidates`` are all that was scored.
    """

    method: str
    moved: Ref
    untrained: Ref
    candidates: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Tuned:
    """What came of the fine-tunes: the published one, what it began from, the control, and held-out losses by start.

    ``screened`` are held-out losses of candidates after a short fine-tune, where there were more than are swept.
    ``arms`` are those to measure beside the published one. The fine-tune ``final`` began from the adapter ``begun``, or
    from a fresh LoRA of ``fresh``; where a ``second`` step followed it, that one's artifact is what is published.
    """

    final: Ref
    start: str
    control: Ref | None = None
    starts: dict[str, float | None] = field(default_factory=dict)
    screened: dict[str, float | None] = field(default_factory=dict)
    arms: dict[Arm, Ref] = field(default_factory=dict)
    begun: Ref | None = None
    fresh: Mapping[str, Any] = field(default_factory=dict)
    second: Ref | None = None

    @property
    def published(self) -> Ref:
        """The adapter that is published."""
        return self.second or self.final


def choose_update(
    context: Context, settings: MigrationConfig, pair: Pair, source: Source, methods: list[str], rows: Rows
) -> tuple[Chosen, dict[str, Ref]]:
    """Every candidate's update on the new base, and with ``auto`` the best of them at its best scale.

    Returns:
        the choice, and every candidate by its method.
    """
    if not methods:
        return _nothing_moved(context, settings, source, rows), {}
    several = len(methods) > 1
    candidates = {
        method: migrated(context, pair, source, method, settings, rows=rows.all, label=method if several else None)
        for method in methods
    }
    first = candidates[methods[0]]
    if settings.method != AUTO:
        return Chosen(methods[0], first, first), candidates
    inputs = {**context.base("new"), "rows": rows.all, "transforms": candidates}
    untrained = context.run(selection, inputs, {"cutoff": settings.finetune.cutoff}, paths=context.base_path("new"))
    info = context.open(untrained).info
    best = next(entry["method"] for entry in info["candidates"] if entry["method"] != NOTHING)
    return Chosen(info["method"], candidates[best], untrained, info["candidates"]), candidates


def _nothing_moved(context: Context, settings: MigrationConfig, source: Source, rows: Rows) -> Chosen:
    """A fresh LoRA, into which the rows are trained: no transform can move any of the adapter.

    Raises:
        AdapterError: if there are no rows to train on.
    """
    if not rows.plan.fine_tunes:
        why = rows.teacher["reason"] if rows.teacher is not None and rows.teacher.get("reason") else "there are none"
        what = f"nothing of it can be moved to the new base, and there are no rows to train on ({why})"
        raise AdapterError(Problem(settings.adapter, what, "Give --train-data, or prompts that the adapter knows."))
    inputs = {"adapter": source.adapter, **{n: context.fingerprints[n] for n in ("old_model", "new_model")}}
    made = context.run(unmoved, inputs, {"rank": source.lora["rank"], "seed": settings.seed}, paths=source.paths)
    given = {**context.base("new"), "rows": rows.all, "transforms": {}, "unmoved": made}
    cutoff = {"cutoff": settings.finetune.cutoff}
    untrained = context.run(selection, given, cutoff, paths=context.base_path("new"))
    return Chosen(NOTHING, made, untrained, context.open(untrained).info["candidates"])


def fine_tunes(
    context: Context, settings: MigrationConfig, chosen: Chosen, candidates: Mapping[str, Ref], rows: Rows
) -> Tuned | None:
    """Fine-tune from the chosen start, or with ``auto`` and rows to compare by from several, and go on with the best.

    What does best untrained is not always the best start. Where no rate is named all starts are searched; in a sweep of
    named rates those that do best in a short fine-tune are, and a fresh LoRA, all chosen by the same rows.

    Returns:
        None where there are no rows to train on.
    """
    plan = rows.plan
    if not plan.fine_tunes or rows.all is None:
        return None
    tuning = Tuning(settings.finetune, plan.rates, settings.rehearsal)
    architecture = context.architecture("new")
    fresh = fresh_lora(adapter_folder(context.open(chosen.moved)), architecture)

    def from_scratch(split: Ref, label: str, taught: Mapping[str, Ref]) -> Ref:
        return tuned(context, "new", split, tuning, fresh=fresh, taught=taught, label=label)

    def from_adapter(start: Ref, label: str) -> Ref:
        return tuned(context, "new", rows.all, tuning, start=start, taught=rows.taught, label=label)  # type: ignore[arg-type]

    if plan.searches:
        return _searched(context, settings, chosen, candidates, rows, fresh)
    result = Tuned(chosen.untrained, NEW_START if chosen.method == NOTHING else chosen.method, fresh=fresh)
    origins: dict[str, Ref] = {}
    begun: dict[str, Ref] = {}
    if plan.trains_control or result.start == NEW_START:
        begun[NEW_START] = from_scratch(rows.all, "scratch", rows.taught)
    if plan.trains_control:
        result.control = result.arms[Arm.SCRATCH] = begun[NEW_START]
    if plan.compares_starts:
        scaled = {chosen.method: chosen.untrained} if chosen.method != NOTHING else {}
        tried = _screened(context, settings, {**candidates, **scaled}, rows, result)
        begun |= {method: from_adapter(ref, method) for method, ref in tried.items()}
        origins = tried
    elif result.start != NEW_START:
        begun[result.start] = from_adapter(chosen.untrained, "migrated")
        origins = {result.start: chosen.untrained}
    if plan.trains_own_alone and rows.own is not None:
        alone = from_scratch(rows.own, "alone", {})
        if plan.own_alone_competes:
            begun[OWN_ROWS_START] = alone
        if plan.measures_controls:
            result.arms[Arm.SCRATCH_OWN] = alone
    if plan.sweeps:
        losses = {start: best_validation(context.open(ref).info) for start, ref in begun.items()}
        result.starts = {start: loss if math.isfinite(loss) else None for start, loss in losses.items()}
        if plan.compares_starts:
            result.start = min(losses, key=lambda start: losses[start])
    result.final, result.begun = begun[result.start], origins.get(result.start)
    return result


def _searched(
    context: Context,
    settings: MigrationConfig,
    chosen: Chosen,
    candidates: Mapping[str, Ref],
    rows: Rows,
    fresh: Mapping[str, Any],
) -> Tuned:
    """What the search publishes; where controls are measured, fresh LoRAs at the best rates that it found for them."""
    plan, own = rows.plan, rows.own
    texts, told = rehearsal(context, "new", settings.rehearsal, settings.finetune.seed)
    inputs = {
        **context.base("new"),
        "rows": rows.all,
        "transforms": dict(candidates),
        "chosen": chosen.untrained,
        "own": own if plan.own_alone_competes else None,
        **rows.taught,
        **texts,
    }
    inputs = {name: value for name, value in inputs.items() if value is not None}
    values = {
        "fresh": dict(fresh),
        "finetune": settings.finetune.computed(),
        "effort": settings.effort,
        **told,
    }
    work = context.where.home / WORK / searching.key(inputs, values)[:32]
    final = context.run(searching, inputs, values, paths={**context.base_path("new"), WORK: work})
    found = Search.model_validate(context.open(final).info["search"])
    start = chosen.method if found.start not in (*candidates, NEW_START, OWN_ROWS_START) else found.start  # at a scale
    result = Tuned(final, start, starts={arm.start: arm.best for arm in reversed(found.arms)}, fresh=fresh)
    if start not in (NEW_START, OWN_ROWS_START):
        result.begun = candidates.get(found.start, chosen.untrained)
    if plan.trains_control:
        result.control = result.arms[Arm.SCRATCH] = _control(context, settings, found, result, NEW_START, rows, fresh)
    if plan.measures_controls and plan.trains_own_alone and own is not None:
        result.arms[Arm.SCRATCH_OWN] = _control(context, settings, found, result, OWN_ROWS_START, rows, fresh)
    return result


def _control(
    context: Context,
    settings: MigrationConfig,
    found: Search,
    result: Tuned,
    start: str,
    rows: Rows,
    fresh: Mapping[str, Any],
) -> Ref:
    """A fresh LoRA's fine-tune on all rows or on the user's alone; the published one if it began so."""
    if found.start == start:
        return result.final
    alone = start == OWN_ROWS_START
    split, taught, label = (rows.own, {}, "alone") if alone else (rows.all, rows.taught, "scratch")
    rate = next((arm.learning_rate for arm in found.arms if arm.start in (start, NEW_START)), None)
    tuning = Tuning(settings.finetune, () if rate is None else (rate,), settings.rehearsal)
    return tuned(context, "new", split, tuning, fresh=fresh, taught=taught, label=label)  # type: ignore[arg-type]


def best_validation(info: Mapping[str, Any]) -> float:
    """The least held-out loss of a sweep's whole runs; infinite where every rate diverged."""
    whole = (e["validation_loss"] for e in info["sweep"] if e["epochs"] is not None)
    return min((loss for loss in whole if loss is not None), default=math.inf)


def _screened(
    context: Context, settings: MigrationConfig, tried: Mapping[str, Ref], rows: Rows, result: Tuned
) -> dict[str, Ref]:
    """The ``starts`` best candidates to start from, by a short fine-tune of each."""
    if len(tried) <= settings.starts:
        return dict(tried)
    rates = sorted(settings.learning_rates)
    values = {"finetune": settings.finetune.computed(), "learning_rate": rates[len(rates) // 2]}
    inputs = {**context.base("new"), "rows": rows.all, "transforms": dict(tried)}
    found = context.open(context.run(screening, inputs, values, paths=context.base_path("new")))
    result.screened = found.info["losses"]
    best = sorted(tried, key=lambda method: loss_order(result.screened[method]))
    return {method: tried[method] for method in best[: settings.starts]}
