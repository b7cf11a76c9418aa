"""One adapter from an old base to a new one."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.logging.loggers import get_run_logger
from prefect.runtime import flow_run
from torch import Tensor

from artifacts import default_home
from flows.allowed import Allowed, deployed
from flows.arms import Source
from flows.choice import Chosen, Tuned, choose_update, fine_tunes
from flows.context import Context, base_record, check_stages, fetch, migration_context, tag_run, timings
from flows.dashboard import show_migration, show_pair
from flows.finished import finished
from flows.general import general_ability
from flows.loaders import served
from flows.measure import Asked, Measured
from flows.pair import Pair, pair_name
from flows.second_step import distilled_further
from flows.teach import Rows, fitting_template, gather_rows, opened_source
from lorasuite import ALGORITHM_VERSION
from lorasuite.adapters import Adapter, sources, sources_name
from lorasuite.bases import resolve
from lorasuite.evaluation import BOTH, Arm, General, Served, as_served
from lorasuite.planning import AUTO, MigrationConfig, Plan, RowPlan, build, check, usable
from lorasuite.reporting import ArmResults, MigrationRecord, publish
from lorasuite.teacher import TemplateFits
from lorasuite.training import NOTHING
from tasks.fingerprints import fingerprint_migration
from tasks.folders import adapter_folder, weights_digest
from tasks.stage import Recorder, Ref

#: Arms the published adapter is compared with, sample by sample.
COMPARED = (*BOTH, Arm.SCRATCH, Arm.SCRATCH_OWN)


def run_name(parameters: Mapping[str, Any] | None = None) -> str:
    """``adapter: old → new``; of this flow run, where no parameters are given."""
    config = (flow_run.parameters if parameters is None else parameters).get("config", {})
    old, new = (Path(str(config.get(name, "?"))).name for name in ("old_base", "new_base"))
    return f"{sources_name(str(config.get('adapter', '?')))}: {old} → {new}"


@flow(name="migrate-adapter", flow_run_name=run_name, validate_parameters=False)
def migrate_adapter(config: dict[str, Any], refresh: tuple[str, ...] = ()) -> dict[str, Any]:
    """Check everything, run the stages, publish the output directory.

    Args:
        config: the fields of :class:`lorasuite.planning.MigrationConfig`.
        refresh: names of stages to compute again.

    Returns:
        the content of ``migration.json``, with ``output``; and with ``done_before`` where the output was there already,
        of the same inputs and settings.
    """
    settings: MigrationConfig = build(MigrationConfig, config)
    if deployed():
        Allowed.here().check([settings])
    refreshed = check_stages(tuple(refresh))
    name = pair_name(settings.old_base, settings.new_base)
    tag_run(pair=name, adapter=sources_name(settings.adapter))
    fetch(settings.old_base, settings.new_base, *sources(settings.adapter))
    done = None if refreshed else finished(settings)
    if done is not None:
        get_run_logger().info("%s was done before: it is the output of these inputs and settings", settings.output)
        return done
    plan = check(settings, default_home())
    for notice in plan.inspection.notices:
        get_run_logger().info("note: %s", notice)
    context = migration_context(settings, name, refreshed)
    with Recorder() as recorder:
        source = opened_source(context, settings, plan.inspection.own_tokenizer)
        fit = fitting_template(context, settings, plan, source)
        if fit is not None and fit.warning is not None:
            get_run_logger().warning("%s", fit.warning)
            plan.inspection.notices.append(fit.warning)
        pair = Pair(context, settings.pair, context.keep_texts(plan.texts) if plan.texts else None, source.roles)
        pair.prepare(candidates(settings, plan, plan.rows, pair, source))
        rows = gather_rows(context, settings, plan, pair, source)
        tuning = rows.plan.tuned(settings)
        methods = candidates(settings, plan, rows.plan, pair, source)  # of rows not worth training on, others
        pair.prepare(methods)
        chosen, updates = choose_update(context, tuning, pair, source, methods, rows)
        tuned = fine_tunes(context, tuning, chosen, updates, rows)
        told = distilled_further(context, tuning, source, pair, rows, tuned)
        plan.inspection.notices += [told] if told else []
        final = chosen.untrained if tuned is None else tuned.published
        measured = _measured(context, settings, plan, source, chosen, tuned)
        published = Arm.MIGRATED if tuned is None else Arm.MIGRATED_LFT
        adapters = {Arm.OLD_ADAPTER: source.adapter, published: final}
        general = general_ability(context, settings, plan.general, adapters, source.own_tokenizer)
        loaders = served(context, settings, final, measured.asked.rows)
    record = _record(
        context, settings, plan, pair, source, fit, rows, chosen, tuned, measured, general, loaders, recorder
    )
    output = Path(settings.output)
    context.where.check_unchanged()
    publish(
        output,
        adapter_folder(context.open(final)),
        record,
        new_base=context.where.path("new_base"),
        figures=_figures(context, pair),
        samples=measured.samples(),
        trust_remote_code=settings.trust_remote_code,
    )
    try:
        show_pair(context, record, pair.similarity)
        show_migration(record, output)
    except Exception as error:  # the output is whole, whatever the server says
        get_run_logger().warning("the dashboard shows nothing of this run (%s: %s)", type(error).__name__, error)
    get_run_logger().info("%s: %s", record.verdict.verdict, record.reason())
    return {**record.to_json(), "output": str(output)}


def candidates(settings: MigrationConfig, plan: Plan, rows: RowPlan, pair: Pair, source: Source) -> list[str]:
    """The transform that is named, or of those that ``auto`` tries each that can move this adapter."""
    if settings.method != AUTO:
        return [settings.method]
    if plan.inspection.nothing_moves:
        return []
    names, trains, texts = settings.tried(rows.fine_tunes), rows.fine_tunes, pair.texts is not None
    given = {"plain": source.plain, "texts": texts, "trains": trains, "mapped": settings.maps_layers}
    return usable(names, pair.old, pair.new, source.roles, **given)


def _measured(
    context: Context, settings: MigrationConfig, plan: Plan, source: Source, chosen: Chosen, tuned: Tuned | None
) -> Measured:
    """Every arm on the held-out rows and the tasks there are."""
    arms: dict[Arm, Ref | str | None] = {Arm.OLD: None, Arm.OLD_ADAPTER: source.adapter, Arm.NEW: None}
    if chosen.method != NOTHING:
        arms[Arm.MIGRATED] = chosen.untrained
    if tuned is not None:
        arms |= {**tuned.arms, Arm.MIGRATED_LFT: tuned.published}
    asked = Asked.of(context, settings.evaluation, plan.evaluation, settings.eval_tasks, *settings.task_folders)
    measured = Measured(context, asked)
    for arm, adapter in arms.items():
        old = arm.on_old_base
        own = source.own_tokenizer if old else None
        measured.measure(arm, "old" if old else "new", adapter, own_tokenizer=own)
    return measured


def _figures(context: Context, pair: Pair) -> dict[str, Tensor]:
    if pair.similarity is None:
        return {}
    return {"similarity": context.open(pair.similarity).tensor("similarity")}


def _prompts(plan: Plan, source: Source, fit: TemplateFits | None) -> dict[str, Any]:
    """Whose tokenizer and chat template each side reads by, and how instruction rows were rendered."""
    own, new = source.own_tokenizer, plan.inspection.new_tokenizer
    by_base = "base" if plan.inspection.old_reader.chat_template is not None else None
    old: dict[str, Any] = {"tokenizer": "base", "chat_template": by_base}
    if own is not None:
        old = {
            "tokenizer": "adapter" if own.whole else "base",
            "chat_template": "adapter" if own.has_template else by_base,
            "differences": own.differences,
        }
    return {
        "old": old,
        "new": {"tokenizer": "base", "chat_template": "base" if new.chat_template else None},
        "template": plan.template.label,
        "template_text": plan.template.text,
        "fit": None if fit is None else fit.model_dump(mode="json"),
    }


def _record(
    context: Context,
    settings: MigrationConfig,
    plan: Plan,
    pair: Pair,
    source: Source,
    fit: TemplateFits | None,
    rows: Rows,
    chosen: Chosen,
    tuned: Tuned | None,
    measured: Measured,
    general: General,
    loaders: Mapping[str, Served],
    recorder: Recorder,
) -> MigrationRecord:
    """What ``migration.json`` says of a migration."""
    fingerprints = {**context.fingerprints, "adapter": str(source.adapter)}
    adapter = Adapter.open(context.where.path("adapter"), settings.allow_pickle)
    moved = context.open(chosen.moved).info
    final = chosen.untrained if tuned is None else tuned.published
    published = Arm.MIGRATED if tuned is None else Arm.MIGRATED_LFT
    results = ArmResults.model_validate(
        {
            "evaluation": measured.evaluation,
            "tasks": measured.scores,
            "comparisons": measured.comparisons([(arm, published) for arm in COMPARED]),
            "weights": measured.weights,
            "general": general,
        }
    )
    spent = timings(recorder)
    finetune = None
    if tuned is not None:
        began = {"start": tuned.start, "starts": tuned.starts, "screened": tuned.screened}
        finetune = {**context.open(tuned.final).info, **began}
        if tuned.second is not None:
            finetune["second_step"] = context.open(tuned.second).info
    return MigrationRecord.model_validate(
        {
            "old_base": base_record(settings.old_base, fingerprints["old_model"]),
            "new_base": base_record(settings.new_base, fingerprints["new_model"]),
            "adapter": {
                "id": settings.adapter,
                "name": "+".join(resolve(part).resolve().name for part in sources(settings.adapter)),
                "kind": adapter.kind,
                "fingerprint": fingerprints["adapter"],
                "rank": adapter.rank,
                "modules": len(adapter.modules),
            },
            **pair.record(),
            "prompts": _prompts(plan, source, fit),
            "method": chosen.method,
            "candidates": chosen.candidates,
            "teacher": rows.teacher,
            "updates": moved["norms"],
            **{name: moved[name] for name in ("retained_energy", "dropped", "fresh", "loaded_bytes_peak")},
            "carried": moved["carried"],
            "rank": moved["rank"],
            "fit_residual": moved.get("fit_residual", {}),
            "finetune": finetune,
            "control": None if tuned is None or tuned.control is None else _control(context.open(tuned.control).info),
            **results.model_dump(mode="json"),
            "verdict": as_served(results.judge(settings.gate), loaders).model_dump(mode="json"),
            "weights_sha256": weights_digest(context.open(final)),
            "serving": {loader: found.model_dump(mode="json") for loader, found in loaders.items()},
            "timings": spent,
            "peak_memory_bytes": {
                row["stage"]: row["peak_memory_bytes"]
                for row in sorted(spent, key=lambda row: row["peak_memory_bytes"])
            },
            "notices": plan.inspection.notices,
            "seed": settings.seed,
            "versions": context.store.manifest(chosen.untrained.key).libraries,
            "algorithm_version": ALGORITHM_VERSION,
            "settings": settings.model_dump(mode="json"),
            "key": fingerprint_migration(settings, fingerprints),
            "command": "lorasuite " + shlex.join(sys.argv[1:]) if Path(sys.argv[0]).name == "lorasuite" else "",
        }
    )


def _control(info: Mapping[str, Any]) -> dict[str, Any]:
    """What the record keeps of the control: not the search, which it has where it is the published fine-tune, too."""
    return {name: value for name, value in info.items() if name != "search"}
