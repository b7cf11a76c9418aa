"""One adapter from an old base to a new one."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.logging.loggers import get_run_logger
from prefect.runtime import flow_run
from torch import Tensor

from artifacts import Artifact
from flows.context import Context, base_record, check_stages, fetch, fit_settings, migration_context, tag_run
from flows.dashboard import show_migration, show_pair
from flows.measure import Measured
from flows.prepare_pair import PairRefs, pair_name, pair_record, pair_stages, timings
from flows.teach import NEW, training
from lorasuite import ALGORITHM_VERSION
from lorasuite.adapters import Adapter, fresh_lora, split_sources
from lorasuite.bases import Checkpoint, resolve
from lorasuite.evaluation import BOTH
from lorasuite.evaluation import check as check_serving
from lorasuite.planning import AUTO, MigrationConfig, Plan, build, check
from lorasuite.reporting import ArmResults, MigrationRecord, publish
from lorasuite.training import NOTHING, loss_order
from lorasuite.transforms import LAYER_INPUTS, Input, ModelTransform, names, transform
from tasks.adapter_stages import adapter_folder, finetune, screening, selection, sequential_fit, serving
from tasks.adapter_stages import transform as transform_stage
from tasks.fingerprints import (
    fingerprint_migration,
    fingerprint_texts,
)
from tasks.stage import Recorder, Ref

#: The start of a fine-tune that no adapter was migrated for.
FRESH = "fresh"
#: The same, fine-tuned on the user's rows alone where the teacher wrote others: what the teacher has to beat.
ALONE = "fresh, without the teacher's rows"
#: Arms the published adapter is compared with, sample by sample.
COMPARED = (*BOTH, "scratch", "scratch-own")


def run_name(parameters: Mapping[str, Any] | None = None) -> str:
    """``adapter: old → new``; of this flow run, where no parameters are given."""
    config = (flow_run.parameters if parameters is None else parameters).get("config", {})
    names = [Path(str(config.get(name, "?"))).name for name in ("adapter", "old_base", "new_base")]
    return f"{names[0]}: {names[1]} → {names[2]}"


@flow(name="migrate-adapter", flow_run_name=run_name, validate_parameters=False)
def migrate_adapter(config: dict[str, Any], refresh: tuple[str, ...] = ()) -> dict[str, Any]:
    """Check everything, run the stages, publish the output directory.

    Args:
        config: the fields of :class:`lorasuite.config.MigrationConfig`.
        refresh: names of stages to compute again.

    Returns:
        the content of ``migration.json``, with ``output``.
    """
    settings: MigrationConfig = build(MigrationConfig, config)
    refreshed = check_stages(tuple(refresh))
    tag_run(pair=pair_name(settings.old_base, settings.new_base), adapter=Path(settings.adapter).name)
    fetch(settings.old_base, settings.new_base, settings.adapter)
    plan = check(settings)
    context = migration_context(settings, pair_name(settings.old_base, settings.new_base), refreshed)
    paths, prints = context.where.paths, context.prints
    with Recorder() as recorder:
        adapter = Adapter.open(paths["adapter"], settings.allow_pickle)
        old, new = Checkpoint(paths["old_base"]), Checkpoint(paths["new_base"])
        texts = fingerprint_texts(plan.texts) if plan.texts else None
        roles = adapter.roles(old.architecture)
        moved = tuple(role for role in roles if role in new.architecture.roles)
        methods = [settings.method]
        if settings.method == AUTO:
            plain = adapter.plain(old.architecture)
            tuned = plan.rows.fine_tunes
            methods = [
                name
                for name, it in ((name, transform(name)) for name in names())
                if (texts or not it.reads_texts)
                and (plain or not isinstance(it, ModelTransform))
                and (it.starts_finetune or not tuned)
                and not it.problems(old.dims, new.dims, moved)
            ]
        pair = pair_stages(context, settings.pair, texts, roles, methods)
        arms = _Arms(context, settings, plan, pair, adapter, methods)
        final = arms.run()
        served = context.run(
            serving, {"new_model": "new_model", "new_tokenizer": "new_tokenizer", "adapter": final}, {}
        )
    measured = arms.record()
    results = ArmResults.model_validate({name: measured[name] for name in ArmResults.model_fields})
    content = {
        "old_base": base_record(settings.old_base, prints["old_model"]),
        "new_base": base_record(settings.new_base, prints["new_model"]),
        "adapter": {
            "id": settings.adapter,
            "name": "+".join(resolve(source).resolve().name for source, _ in split_sources(settings.adapter)),
            "kind": adapter.kind,
            "fingerprint": prints["adapter"],
            "rank": adapter.rank,
            "modules": len(adapter.modules),
        },
        **pair_record(context, pair),
        **measured,
        "verdict": results.judge(settings.gate).model_dump(mode="json"),
        "serving": {
            **context.open(served).info,
            **{
                loader: found.model_dump(mode="json")
                for loader, found in check_serving(adapter_folder(context.open(final)), paths["new_base"]).items()
            },
        },
        "timings": timings(recorder),
        "peak_memory_bytes": {row["stage"]: row["peak_memory_bytes"] for row in sorted(timings(recorder), key=_memory)},
        "notices": plan.inspection.notices,
        "seed": settings.seed,
        "versions": context.store.manifest(arms.transformed.key).libraries,
        "algorithm_version": ALGORITHM_VERSION,
        "settings": settings.model_dump(mode="json"),
        "key": fingerprint_migration(settings, prints),
        "command": "lorasuite " + shlex.join(sys.argv[1:]) if Path(sys.argv[0]).name == "lorasuite" else "",
    }
    record = MigrationRecord.model_validate(content)
    output = Path(settings.output)
    publish(
        output,
        adapter_folder(context.open(final)),
        record,
        new_base=paths["new_base"],
        figures=_figures(context, pair),
        samples=arms.measured.samples(),
        trust_remote_code=settings.trust_remote_code,
    )
    show_pair(context, record, pair.similarity)
    show_migration(record, output)
    get_run_logger().info("%s: %s", record.verdict.verdict, record.reason())
    return {**record.to_json(), "output": str(output)}


def best_validation(info: Mapping[str, Any]) -> float:
    """The least held-out loss of a sweep's whole runs; infinite where every rate diverged."""
    whole = (e["validation_loss"] for e in info["sweep"] if e["epochs"] is not None)
    return min((loss for loss in whole if loss is not None), default=math.inf)


def _memory(row: dict[str, Any]) -> int:
    return int(row["peak_memory_bytes"])


def _figures(context: Context, pair: PairRefs) -> dict[str, Tensor]:
    if pair.similarity is None:
        return {}
    return {"similarity": context.open(pair.similarity).tensor("similarity")}


class _Arms:
    """The adapter's own stages: transform, fine-tune, the control, and an evaluation of each arm."""

    def __init__(
        self,
        context: Context,
        settings: MigrationConfig,
        plan: Plan,
        pair: PairRefs,
        adapter: Adapter,
        methods: list[str],
    ) -> None:
        self.context, self.settings, self.plan, self.pair = context, settings, plan, pair
        self.methods, self.method = methods, methods[0]
        self.candidates: list[dict[str, Any]] = []
        # The scaling α/r (or α/√r) stays what the adapter was trained with, whatever the rank.
        self.lora = adapter.lora_settings(settings.rank or adapter.rank)
        if settings.energy is not None:
            self.lora["energy"] = settings.energy
        if settings.output_type != "lora":
            self.lora["output_type"] = settings.output_type
        old = Checkpoint(context.where.path("old_base")).architecture
        self.reads_vocabulary = bool(adapter.vocabulary_modules(old))
        self.measured = Measured(
            context,
            settings.evaluation,
            plan.evaluation,
            settings.eval_tasks,
            *settings.task_folders,
        )
        self.comparisons: list[dict[str, Any]] = []
        self.tuned: Artifact | None = None
        #: What the published fine-tune began from.
        self.start: str | None = None
        #: Held-out loss of each start's best fine-tune, where there was a sweep; None where it diverged.
        self.starts: dict[str, float | None] = {}
        #: Held-out loss of each candidate after a short fine-tune, where there were more than are swept.
        self.screened: dict[str, float | None] = {}
        #: Learning rates of the fine-tunes, and whether short ones tell them apart.
        self.rates, self.briefly = list(plan.rows.rates), plan.rows.searches_rates
        self.control: Artifact | None = None

    def run(self) -> Ref:
        """Run every arm; the reference to the adapter that is published."""
        context, settings = self.context, self.settings
        self.training = training(context, settings, self.plan, self.pair.vocabulary)
        candidates = {method: self._transform(method) for method in self.methods}
        self.transformed = self.moved = candidates[self.methods[0]]
        if settings.method == AUTO:
            self._select(candidates)
        final = self.transformed
        arms: dict[str, Ref | str | None] = {"old": None, "old+adapter": "adapter", "new": None}
        if self.method != NOTHING:
            arms["migrated"] = self.transformed
        if self.training.rows:
            final = arms["migrated+lft"] = self._tuned(candidates, arms)
        for arm, adapter in arms.items():
            self._measure(arm, adapter)
        published = "migrated+lft" if "migrated+lft" in arms else "migrated"
        self.comparisons = self.measured.comparisons([(arm, published) for arm in COMPARED])
        return final

    def _tuned(self, candidates: dict[str, Ref], arms: dict[str, Ref | str | None]) -> Ref:
        """Fine-tune from the chosen start, or with ``auto`` and a sweep from several and go on with the best.

        Args:
            candidates: the transforms' adapters; arms: to which those of the controls are added.
        """
        context, training = self.context, self.training
        planned = training.plan
        self.rates, self.briefly = list(planned.rates), planned.searches_rates
        # What does best untrained is not always the best start: those that do best in a short fine-tune are swept,
        # and a fresh LoRA, all chosen by the same rows. The best of them is the one that is published. Without a
        # whole sweep, the chosen one and a fresh LoRA are enough.
        self.start = FRESH if self.method == NOTHING else self.method
        begun: dict[str, Ref] = {}
        if planned.trains_control or self.start == FRESH:
            begun[FRESH] = self._finetune("scratch")
        if planned.trains_control:
            self.control, arms["scratch"] = context.open(begun[FRESH]), begun[FRESH]
        if planned.compares_starts:
            tried = self._chosen() if self.briefly else self._screened(candidates)
            begun |= {method: self._finetune(method, ref) for method, ref in tried.items()}
        elif self.start != FRESH:
            begun[self.start] = self._finetune("migrated")
        if planned.trains_own_alone:
            alone = self._finetune("alone")
            if planned.own_alone_competes:
                begun[ALONE] = alone
            if planned.measures_controls:
                arms["scratch-own"] = alone
        if planned.sweeps:
            losses = {start: best_validation(context.open(ref).info) for start, ref in begun.items()}
            self.starts = {start: loss if math.isfinite(loss) else None for start, loss in losses.items()}
            if planned.compares_starts:
                self.start = min(losses, key=lambda start: losses[start])
        self.tuned = context.open(begun[self.start])
        return begun[self.start]

    def _transform(self, method: str) -> Ref:
        if isinstance(transform(method), ModelTransform):
            return self._fit(method)
        pair = self.pair.named()
        groups = (*LAYER_INPUTS | transform(method).inputs, *(["vocabulary"] if self.reads_vocabulary else []))
        used = {n: r for n, r in pair.items() if n.startswith(groups)}
        return self.context.run(
            transform_stage,
            {"adapter": "adapter", "old_model": "old_model", "new_model": "new_model", **used},
            {
                "method": method,
                "unmapped": self.settings.unmapped,
                "seed": self.settings.seed,
                **self.lora,
            },
            label=method if len(self.methods) > 1 else None,
        )

    def _fit(self, method: str) -> Ref:
        """A fit of whole models, which reads the training rows in both bases."""
        models = {name: name for name in ("old_model", "new_model", "old_tokenizer", "new_tokenizer", "adapter")}
        inputs: dict[str, str | Ref] = {**models, **self.training.looked_at}
        if Input.STATE_MAP in transform(method).inputs and self.pair.state_map is not None:
            inputs["state_map"] = self.pair.state_map
        label = method if len(self.methods) > 1 else None
        return self.context.run(sequential_fit, inputs, fit_settings(self.settings, self.lora, method), label=label)

    def _select(self, candidates: dict[str, Ref]) -> None:
        """Go on with the best candidate at its best scale; with a fresh LoRA where the bare base is better."""
        settings = self.settings
        inputs: dict[str, str | Ref] = {f"transform_{method}": ref for method, ref in candidates.items()}
        inputs |= {**NEW, **self.training.looked_at}
        values = {
            "methods": list(candidates),
            "samples": self.plan.rows.requested_rows,
            "seed": settings.seed,
            "cutoff": settings.finetune.cutoff,
        }
        self.transformed = self.context.run(selection, inputs, values)
        info = self.context.open(self.transformed).info
        self.method, self.candidates = info["method"], info["candidates"]
        best = next(entry["method"] for entry in self.candidates if entry["method"] != NOTHING)
        self.moved = candidates[best]

    def _chosen(self) -> dict[str, Ref]:
        """The transform that did best untrained, at its scale, if one did better than none."""
        return {self.method: self.transformed} if self.method != NOTHING else {}

    def _screened(self, candidates: dict[str, Ref]) -> dict[str, Ref]:
        """The ``starts`` best transforms to start from, by a short fine-tune of each; the chosen one at its scale."""
        settings = self.settings
        tried = {**candidates, **self._chosen()}
        if len(tried) > settings.starts:
            inputs: dict[str, str | Ref] = {f"transform_{method}": ref for method, ref in tried.items()}
            rates = sorted(settings.learning_rates)
            values = {
                "methods": list(tried),
                "samples": self.plan.rows.requested_rows,
                "seed": settings.seed,
                "finetune": settings.finetune.model_dump(mode="json"),
                "learning_rate": rates[len(rates) // 2],
            }
            inputs |= {**NEW, **self.training.rows, **self.training.chosen_by}
            found = self.context.open(self.context.run(screening, inputs, values))
            self.screened = found.info["losses"]
            best = sorted(tried, key=lambda method: loss_order(self.screened[method]))
            tried = {method: tried[method] for method in best[: settings.starts]}
        return tried

    def _fresh(self) -> dict[str, Any]:
        new = Checkpoint(self.context.where.path("new_base"))
        return fresh_lora(adapter_folder(self.context.open(self.moved)), new.architecture)

    def _finetune(self, start: str, begun: Ref | None = None) -> Ref:
        """From a fresh LoRA (``scratch``; ``alone``: on the user's rows only), from what was chosen, or from another
        transform's adapter."""
        settings, context = self.settings, self.context
        fresh = start in ("scratch", "alone")
        rows = self.training.own if start == "alone" else {**self.training.rows, **self.training.soft}
        inputs: dict[str, str | Ref] = {**NEW, **rows}
        if len(self.rates) > 1:
            inputs |= self.training.chosen_by
        if not fresh:
            inputs["transform"] = begun or self.transformed
        values = {
            # A fresh LoRA depends on nothing of the adapter but its size and modules.
            "fresh": self._fresh() if fresh else None,
            "samples": self.plan.rows.requested_rows,
            "seed": settings.seed,
            "finetune": settings.finetune.model_dump(mode="json"),
            "learning_rates": self.rates,
            **({"briefly": True} if self.briefly else {}),
        }
        work = context.where.home / "work" / finetune.key(context.fingerprinted(inputs), values)[:32]
        return context.run(finetune, inputs, values, label=start, work=work)

    def _measure(self, arm: str, adapter: Ref | str | None) -> None:
        """One arm on the held-out rows and the tasks there are."""
        side = "old" if arm.startswith("old") else "new"
        inputs: dict[str, str | Ref] = {"model": f"{side}_model", "tokenizer": f"{side}_tokenizer"}
        if adapter is not None:
            inputs["adapter"] = adapter
        self.measured.measure(arm, inputs, base=self.context.where.path(f"{side}_base"))

    def record(self) -> dict[str, Any]:
        """What ``migration.json`` says of the arms."""
        moved = self.context.open(self.moved).info
        return {
            "method": self.method,
            "candidates": self.candidates,
            "teacher": self.training.teacher,
            "updates": moved["norms"],
            "retained_energy": moved["retained_energy"],
            "dropped": moved["dropped"],
            "fresh": moved["fresh"],
            "carried": moved.get("carried", []),
            "rank": moved.get("rank", self.lora["rank"]),
            "loaded_bytes_peak": moved["loaded_bytes_peak"],
            "finetune": None
            if self.tuned is None
            else {**self.tuned.info, "start": self.start, "starts": self.starts, "screened": self.screened},
            "fit_residual": moved.get("fit_residual", {}),
            "control": None if self.control is None else self.control.info,
            "evaluation": self.measured.evaluation,
            "tasks": self.measured.scores,
            "comparisons": self.comparisons,
        }
