"""What the flows share: locations, fingerprints, and running a stage with its progress said."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.logging.loggers import get_run_logger
from prefect.runtime import flow_run

from artifacts import Artifact, Store, default_home
from lorasuite.adapters import materialise
from lorasuite.bases import Checkpoint, resolve
from lorasuite.errors import ConfigError, Problem, did_you_mean
from lorasuite.planning import MigrationConfig, RowCounts, plan_rows, torch_device
from tasks.adapter_stages import (
    evaluation,
    finetune,
    screening,
    selection,
    sequential_fit,
    serving,
    soft_labelling,
    task_evaluation,
    teacher_worth,
    teaching,
    transform,
)
from tasks.fingerprints import fingerprint_adapter, fingerprint_bases
from tasks.pair_stages import (
    activations,
    alignment,
    alignment_fit,
    head_mapping,
    layer_mapping,
    mlp_factors,
    similarity,
    state_map,
    transfer_matrices,
    vocabulary,
)
from tasks.retries import DELAYS, retry_download
from tasks.stage import Ref, Stage, Where

#: Every cached stage by name, in the order they run.
STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        vocabulary,
        transfer_matrices,
        mlp_factors,
        activations,
        similarity,
        layer_mapping,
        head_mapping,
        alignment,
        alignment_fit,
        state_map,
        transform,
        teaching,
        teacher_worth,
        soft_labelling,
        sequential_fit,
        selection,
        screening,
        finetune,
        evaluation,
        task_evaluation,
        serving,
    )
}


@task(
    name="download",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=len(DELAYS),
    retry_delay_seconds=list(DELAYS),
    retry_condition_fn=retry_download,
)
def download(source: str) -> None:
    """Get a model or adapter from the Hub into its local cache.

    Raises:
        CheckpointError: if the Hub does not give it.
    """
    resolve(source)


def fetch(*sources: str) -> None:
    """Download what is not a local directory, with retries, before anything looks at it."""
    for source in sources:
        if not Path(source).expanduser().exists():
            download(source)


def tag_run(**tags: str) -> None:
    """Tag this flow run ``name:value``, so that the dashboard finds all runs of a pair or an adapter.

    The flow run and not its tasks: each set of tags on a task costs a connection to Prefect's concurrency limits.
    """
    with get_client(sync_client=True) as client:
        client.update_flow_run(UUID(flow_run.id), tags=[*flow_run.tags, *(f"{k}:{v}" for k, v in tags.items())])


@dataclass
class Context:
    """One flow run's store, locations and fingerprints."""

    where: Where
    prints: Mapping[str, str]
    refresh: frozenset[str] = frozenset()
    pair: str = ""
    #: Stages already recomputed in this run: a stage is refreshed once, not for every label that shares a key.
    done: set[str] = field(default_factory=set)

    @property
    def store(self) -> Store:
        """The store that every stage of this run reads and writes."""
        return self.where.store()

    def run(
        self,
        stage: Stage,
        inputs: Mapping[str, str | Ref],
        settings: Mapping[str, Any],
        label: str | None = None,
        **paths: Path,
    ) -> Ref:
        """Run one stage. Inputs given as the name of a fingerprint stand for it."""
        where = self.where.model_copy(update={"paths": {**self.where.paths, **paths}})
        values = self.fingerprinted(inputs)
        key = stage.key(values, settings)
        refresh = stage.name in self.refresh and key not in self.done
        self.done.add(key)
        log, name = get_run_logger(), f"{stage.name} ({label})" if label else stage.name
        log.info("%s …", name)
        begun = time.perf_counter()
        ref = stage.run(inputs=values, settings=settings, where=where, refresh=refresh, label=label)
        log.info("%s: %.2f s", name, time.perf_counter() - begun)
        return ref

    def fingerprinted(self, inputs: Mapping[str, str | Ref]) -> dict[str, str | Ref]:
        """A stage's inputs with the names of fingerprints replaced by what they stand for."""
        return {name: self.prints.get(v, v) if isinstance(v, str) else v for name, v in inputs.items()}

    def open(self, ref: Ref) -> Artifact:
        """The artifact that a stage made.

        Raises:
            ArtifactMissing, ArtifactDamaged: where it cannot be used.
        """
        return self.store.open(ref.key)


def check_stages(names: tuple[str, ...]) -> frozenset[str]:
    """
    Raises:
        ConfigError: naming every stage that does not exist.
    """
    wrong = [Problem("--refresh", f"no stage {n!r}", did_you_mean(n, list(STAGES))) for n in names if n not in STAGES]
    if wrong:
        raise ConfigError(wrong)
    return frozenset(names)


def fit_settings(settings: MigrationConfig, lora: Mapping[str, Any], method: str) -> dict[str, Any]:
    """What a fit of whole models is told; ``lora``: the ``rank`` and ``output_type`` of the adapter to write."""
    return {
        "method": method,
        "rank": lora["rank"],
        "output_type": lora.get("output_type", "lora"),
        "cutoff": settings.pair.calibration_cutoff,
        "samples": plan_rows(settings, RowCounts()).requested_rows,
        "seed": settings.seed,
    }


def base_record(source: str, fingerprint: str) -> dict[str, Any]:
    """A base model as ``migration.json`` names it."""
    if Path(source).is_dir():
        return {"id": source, "name": Path(source).resolve().name, "revision": None, "fingerprint": fingerprint}
    name, _, revision = source.partition("@")
    return {"id": name, "name": name, "revision": revision or resolve(source).name, "fingerprint": fingerprint}


def migration_context(settings: MigrationConfig, pair: str, refreshed: frozenset[str] = frozenset()) -> Context:
    """Where the stages of one adapter's migration run, with the fingerprints of its inputs."""
    home = default_home()
    paths = {"old_base": resolve(settings.old_base), "new_base": resolve(settings.new_base)}
    paths["adapter"] = materialise(
        settings.adapter, Checkpoint(paths["old_base"]), home / "work" / "combined", settings.allow_pickle
    )
    files = {
        "calibration": settings.calibration_data,
        "train_data": settings.train_data,
        "prompts": settings.prompt_data,
        "eval_data": settings.eval_data,
        "eval_dir": settings.eval_dir,
        "include_path": settings.include_path,
    }
    paths |= {name: Path(file) for name, file in files.items() if file}
    where = Where(
        home=home,
        device=torch_device(settings.device),
        paths=paths,
        options={
            "trust_remote_code": settings.trust_remote_code,
            "allow_pickle": settings.allow_pickle,
            "teacher_batch": settings.teacher.batch_size,
        },
    )
    prints = fingerprint_bases(home, paths["old_base"], paths["new_base"])
    prints["adapter"] = fingerprint_adapter(paths["adapter"], settings.allow_pickle)
    return Context(where, prints, refreshed, pair=pair)
