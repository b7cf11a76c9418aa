"""What the flows share: locations, fingerprints, and running a stage with its progress said."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.logging.loggers import get_run_logger
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL

from artifacts import (
    Artifact,
    ArtifactDamaged,
    ArtifactMissing,
    Store,
    default_home,
    default_remote,
    open_store,
    stage_key,
)
from lorasuite.adapters import OwnTokenizer, is_ready, open_adapters, write_ready
from lorasuite.bases import Architecture, Checkpoint, LoadSettings, digest_json, resolve
from lorasuite.data import Row, fingerprint_rows
from lorasuite.errors import ConfigError, InputChanged, LoRASuiteError, Problem, did_you_mean
from lorasuite.planning import MigrationConfig, torch_device
from tasks.data import rows_files, texts_files
from tasks.distillation_stages import second_stepping, soft_labelling, token_weighting
from tasks.evaluation_stages import evaluation, general_text, llama_cpp, serving, task_evaluation
from tasks.fingerprints import fingerprint_bases
from tasks.folders import ANY_BASE, adapter_folder, folder_files
from tasks.pair_stages import PAIR_STAGES
from tasks.progress import tell
from tasks.prompt_stages import prompt_drafts, prompts, resemblance
from tasks.retries import DELAYS, retry_download
from tasks.stage import Recorder, Ref, Stage, Where
from tasks.teacher_stages import teacher_worth, teaching, template_fit
from tasks.training_stages import finetune, rehearsing, screening, searching, selection, split
from tasks.transform_stages import model_fit, transform, unmoved
from tasks.unchanged import folder_stamp

if not PREFECT_API_URL.value():  # the first thing that asks for a server will start one
    from flows import temporary_server

    temporary_server.watch()

#: Every cached stage by name, in the order they run.
STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        *PAIR_STAGES,
        transform,
        unmoved,
        template_fit,
        prompt_drafts,
        prompts,
        resemblance,
        teaching,
        teacher_worth,
        split,
        soft_labelling,
        token_weighting,
        model_fit,
        selection,
        rehearsing,
        screening,
        searching,
        finetune,
        second_stepping,
        evaluation,
        task_evaluation,
        general_text,
        serving,
        llama_cpp,
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
    """One flow run's store, locations and fingerprints.

    ``fingerprints``: of ``old_model``, ``new_model``, ``old_tokenizer`` and ``new_tokenizer``. With ``dry``, data that
    is kept is only named, and nothing is written.
    """

    where: Where
    fingerprints: Mapping[str, str]
    refresh: frozenset[str] = frozenset()
    pair: str = ""
    dry: bool = False
    #: Stages already recomputed in this run: a stage is refreshed once, not for every label that shares a key.
    done: set[str] = field(default_factory=set)

    @property
    def store(self) -> Store:
        """The artifact store of this run."""
        return self.where.store()

    def base(self, side: str, own: OwnTokenizer | None = None) -> dict[str, Any]:
        """One base, ``old`` or ``new``, as the inputs ``model`` and ``tokenizer`` of a stage that runs it."""
        return {"model": self.as_loaded(f"{side}_model"), "tokenizer": self.reader(side, own)}

    def reader(self, side: str, own: OwnTokenizer | None = None) -> str:
        """The fingerprint of the tokenizer of one base, ``old`` or ``new``, or of an adapter's own in its place."""
        base = self.fingerprints[f"{side}_tokenizer"]
        return base if own is None else digest_json([base, own.fingerprint])

    def as_loaded(self, name: str) -> str:
        """The fingerprint of a model, ``old_model`` or ``new_model``, as it is loaded to be run.

        Precision and quantization change what it computes; where nothing is asked for, it is that of its files.
        """
        loading = LoadSettings.model_validate(self.where.options.get("loading", {})).key()
        return digest_json([self.fingerprints[name], loading]) if loading else self.fingerprints[name]

    def base_path(self, side: str) -> dict[str, Path]:
        """Where one base, ``old`` or ``new``, lies, as the path ``base`` of a stage."""
        return {"base": self.where.path(f"{side}_base")}

    def both_bases(self) -> dict[str, Any]:
        """Both bases as the inputs ``old_model``, ``new_model``, ``old_tokenizer`` and ``new_tokenizer`` of a stage."""
        return dict(self.fingerprints)

    def ready_adapter(self, side: str, source: str, allow_pickle: bool) -> Path:
        """Where an adapter of one base, ``old`` or ``new``, lies as PEFT finds its modules: :func:`ready_adapter`."""
        base = Checkpoint(self.where.path(f"{side}_base"))
        return ready_adapter(source, base, self.fingerprints[f"{side}_model"], allow_pickle)

    def architecture(self, side: str) -> Architecture:
        """The family of one base, ``old`` or ``new``."""
        return Checkpoint(self.where.path(f"{side}_base")).architecture

    def keep_rows(self, rows: Sequence[Row]) -> Ref:
        """Rows as they are, in their order, as an artifact: what stages read, wherever the rows came from."""
        return self._keep("rows", fingerprint_rows(rows), rows_files(rows))

    def keep_texts(self, texts: Sequence[str]) -> Ref:
        """Texts as they are, in their order, as an artifact."""
        return self._keep("texts", digest_json(list(texts)), texts_files(texts))

    def _keep(self, kind: str, content: str, files: Mapping[str, bytes]) -> Ref:
        key = stage_key(kind, 1, {}, {"content": content})
        if not self.dry:
            self.store.put(key, stage=kind, version=1, inputs={"content": content}, settings={}, files=files)
        return Ref(stage=kind, key=key)

    def run(
        self,
        stage: Stage,
        inputs: Mapping[str, Any],
        settings: Mapping[str, Any],
        label: str | None = None,
        paths: Mapping[str, Path] | None = None,
    ) -> Ref:
        """Run one stage, or find what it made.

        Args:
            inputs: fingerprints and references by the names that the stage gives them.
            label: tells runs of one stage apart.
            paths: locations beside those of the run.
        """
        where = self.where.model_copy(update={"paths": {**self.where.paths, **(paths or {})}})
        key = stage.key(inputs, settings)
        refresh = stage.name in self.refresh and key not in self.done
        self.done.add(key)
        log, name = get_run_logger(), f"{stage.name} ({label})" if label else stage.name
        log.info("%s …", name)
        tell(name)
        begun = time.perf_counter()
        ref = stage.run(inputs=inputs, settings=settings, where=where, refresh=refresh, label=label)
        log.info("%s: %.2f s", name, time.perf_counter() - begun)
        return ref

    def open(self, ref: Ref) -> Artifact:
        """The artifact of a reference, checked."""
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


def base_record(source: str, fingerprint: str) -> dict[str, Any]:
    """A base model as ``migration.json`` names it."""
    if Path(source).is_dir():
        return {"id": source, "name": Path(source).resolve().name, "revision": None, "fingerprint": fingerprint}
    name, _, revision = source.partition("@")
    snapshot = (resolve(source), *resolve(source).parents)[max(0, name.count("/") - 1)]
    return {"id": name, "name": name, "revision": revision or snapshot.name, "fingerprint": fingerprint}


def ready_adapter(source: str, base: Checkpoint, model: str, allow_pickle: bool = False) -> Path:
    """The directory from which PEFT can put an adapter on its base: its own; of several, that of their sum; of one
    whose modules PEFT would not find by their names, that of a copy under the right ones. Those are kept in the store.

    Args:
        model: fingerprint of the base.

    Raises:
        CheckpointError, AdapterError: if one of them cannot be read, or is no sum of updates.
    """
    adapter = open_adapters(source, allow_pickle)
    if is_ready(adapter, base):
        return adapter.path
    store = open_store(default_home(), default_remote())
    inputs = {"adapters": adapter.fingerprint(), "old_model": model}
    key = stage_key("combined", 2, {}, inputs)
    try:
        return adapter_folder(store.open(key))
    except ArtifactMissing:
        pass
    except ArtifactDamaged as error:
        get_run_logger().warning("%s: it is written again, for %s", source, error)
    with tempfile.TemporaryDirectory() as folder:
        path = write_ready(adapter, base, Path(folder), ANY_BASE)
        if adapter.fingerprint() != inputs["adapters"]:
            raise InputChanged(Problem(source, "changed while it was read", "Run again."))
        store.put(key, stage="combined", version=2, inputs=inputs, settings={}, files=folder_files(path))
    return adapter_folder(store.open(key))


def attachable(source: str, base: Checkpoint, model: str) -> Path:
    """As :func:`ready_adapter`, of any adapter that PEFT may know: where it is of no kind that is read here, or does
    not fit its base, the directory as it is, of which PEFT then says what is wrong."""
    try:
        fits = not open_adapters(source).check(base)
    except LoRASuiteError:
        fits = False
    return ready_adapter(source, base, model) if fits else resolve(source)


def migration_context(settings: MigrationConfig, pair: str, refreshed: frozenset[str] = frozenset()) -> Context:
    """Where the stages of one adapter's migration run, with the fingerprints of its inputs."""
    home = default_home()
    paths = {"old_base": resolve(settings.old_base), "new_base": resolve(settings.new_base)}
    stamps = {str(path): folder_stamp(path) for path in (*paths.values(), *filter(None, settings.task_folders))}
    fingerprints = fingerprint_bases(home, paths["old_base"], paths["new_base"])
    base = Checkpoint(settings.old_base)
    paths["adapter"] = ready_adapter(settings.adapter, base, fingerprints["old_model"], settings.allow_pickle)
    where = Where(
        home=home,
        device=torch_device(settings.device),
        paths=paths,
        stamps=stamps,
        options={
            "trust_remote_code": settings.trust_remote_code,
            "allow_pickle": settings.allow_pickle,
            "teacher_batch": settings.teacher.batch_size,
            "loading": settings.loading.model_dump(mode="json"),
        },
    )
    return Context(where, fingerprints, refreshed, pair=pair)


def timings(recorder: Recorder) -> list[dict[str, Any]]:
    """Seconds, cached or not, and the memory of the computation, for every stage that ran."""
    return [
        {
            "stage": run.stage,
            "label": run.label,
            "cached": run.cached,
            "seconds": round(run.seconds, 3),
            "computed_seconds": run.computed.get("seconds", 0.0),
            "peak_memory_bytes": run.computed.get("max_cuda_bytes") or run.computed.get("max_rss_bytes", 0),
            "key": run.key,
        }
        for run in recorder.runs
    ]
