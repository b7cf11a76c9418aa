"""Turns a plain function into a cached Prefect task whose cache key is the address of its artifact.

    from tasks.stage import Artifact, Recorder, StageOutput, Where, stage

    @dataclass(frozen=True)
    class Compared:                                          # the inputs: Artifact, str (a fingerprint), or a group
        activations: Artifact                                # of artifacts by name, dict[str, Artifact]
        layers: Artifact | None = None

    class Comparison(BaseModel):                             # the settings, checked before anything runs
        model_config = ConfigDict(extra="forbid")
        metric: str = "cka"

    @stage("similarity", version=1)
    def similarity(inputs: Compared, settings: Comparison, where: Where) -> StageOutput:
        grams = inputs.activations.tensors()                 # a Ref arrives as an opened Artifact
        model = where.path("old_base")                       # locations never enter the key
        matrix = ...                                         # one library call
        return StageOutput(tensors={"cka": matrix}, info={"metric": settings.metric})

    @flow
    def prepare(...):
        where = Where(paths={"old_base": "/models/old"}, device="cuda")
        with Recorder() as timings:
            first = activations.run(inputs={"old": fingerprint}, settings={...}, where=where)
            ref = similarity.run(inputs={"activations": first}, settings={"metric": "cka"}, where=where)
        where.store().open(ref.key).tensor("cka")
        timings.runs                                         # [StageRun(stage=..., cached=..., seconds=...)]

The key hashes the stage's name and version, the settings, and the fingerprints or keys of the inputs. The
store has the last word: a result record of Prefect without a sound object is recomputed, a sound object
without a record is used. Two flows that need the same stage at once compute it once. A function whose inputs or
settings are annotated otherwise gets them as a mapping, unchecked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from prefect import Task
from prefect.cache_policies import NO_CACHE, CachePolicy
from prefect.context import TaskRunContext
from prefect.states import Completed
from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from artifacts import (
    Artifact,
    ArtifactDamaged,
    ArtifactMissing,
    Manifest,
    Store,
    default_home,
    default_remote,
    open_store,
    stage_key,
)
from tasks import at_work
from tasks.inputs import Input, Models, Ref, StageSettings, input_fingerprints
from tasks.locks import FileLockManager
from tasks.rebuilding import MADE_BY, made_by
from tasks.recording import Measure, Recorder, StageRun, current_recorder, run_log
from tasks.results import drop_foreign_record
from tasks.retries import DELAYS, halvings, note_out_of_memory, retry_stage
from tasks.unchanged import check_unchanged, folder_stamp

__all__ = ["WORK", "Artifact", "Recorder", "Ref", "Stage", "StageOutput", "StageRun", "StageSettings", "Where", "stage"]

#: A stage's function: resolved inputs, settings, locations in; results out.
StageFunction = Callable[[Any, Any, "Where"], "StageOutput | Mapping[str, Any]"]


#: Name of the path that a stage writes to while it runs.
WORK = "work"


class Where(BaseModel):
    """Where a stage runs: everything that may differ between two machines with the same result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Of the artifact store, the result records and the locks.
    home: Path = Field(default_factory=default_home)
    #: Shared store that the one under ``home`` mirrors, if any.
    remote: str | None = Field(default_factory=default_remote)
    device: str = "cpu"
    #: Name to local path: checkpoints, adapters, data files.
    paths: dict[str, Path] = Field(default_factory=dict)
    #: Of every directory among the paths, what it looks like from outside: taken before its content is fingerprinted.
    stamps: dict[str, str] = Field(default_factory=dict)
    #: Anything else that must not change the result: batch sizes, worker counts.
    options: dict[str, JsonValue] = Field(default_factory=dict)
    #: How often an earlier attempt ran out of memory: halve the micro-batch so often.
    halvings: int = 0

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @model_validator(mode="after")
    def _stamped(self) -> Where:
        for path in self._read():
            if str(path) not in self.stamps:
                self.stamps[str(path)] = folder_stamp(path)
        return self

    def _read(self) -> set[Path]:
        """The paths but the stage's own work directory."""
        return {path for name, path in self.paths.items() if name != WORK}

    def check_unchanged(self) -> None:
        """Compare the directories that are read with their stamps. Raises ``InputChanged``."""
        check_unchanged({path: self.stamps.get(str(path), "") for path in self._read()})

    def path(self, name: str) -> Path:
        """The path given for ``name``. Raises ``KeyError`` naming those given."""
        if name not in self.paths:
            raise KeyError(f"no path {name!r} was given; there are {', '.join(sorted(self.paths)) or 'none'}")
        return self.paths[name]

    def store(self) -> Store:
        """The artifact store under ``home``, which mirrors ``remote`` where there is one."""
        return open_store(self.home, self.remote)


@dataclass(frozen=True)
class StageOutput:
    """What a stage made. ``tensors`` may be an iterator of pairs; ``info`` and ``files`` are read after it."""

    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]] = ()
    #: Results that are JSON data: maps, losses, counts.
    info: Mapping[str, Any] = field(default_factory=dict)
    #: Plain files: names to bytes, or to a file or directory to copy.
    files: Mapping[str, Path | bytes] = field(default_factory=dict)


@dataclass
class StoreKey(CachePolicy):
    """Prefect's cache key is the artifact's key."""

    stage: str = ""
    version: int = 0

    def compute_key(
        self,
        task_ctx: TaskRunContext,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],
        **kwargs: Any,
    ) -> str:
        """The key of the artifact that the task run makes; the arguments are Prefect's."""
        return stage_key(self.stage, self.version, inputs["settings"], input_fingerprints(inputs["inputs"]))


class Stage:
    """A stage of the migration: a function, its name, and its algorithm's version. Made by :func:`stage`."""

    def __init__(
        self,
        fn: StageFunction,
        name: str,
        version: int,
        retry_delays: Sequence[float],
    ) -> None:
        self.fn = fn
        self.name = name
        self.version = version
        self.models = Models.of(fn)
        self.__doc__ = fn.__doc__

        def body(
            inputs: dict[str, Any],
            settings: dict[str, Any],
            where: dict[str, Any],
            refresh: bool = False,
        ) -> Any:
            return self._compute(inputs, settings, Where.model_validate(where), refresh)

        body.__name__ = body.__qualname__ = name
        body.__module__ = fn.__module__
        self.task: Task[..., Any] = Task(
            body,
            name=name,
            description=fn.__doc__,
            version=str(version),
            retries=len(retry_delays),
            retry_delay_seconds=list(retry_delays),
            retry_condition_fn=retry_stage,
            persist_result=True,
            result_serializer="json",
            cache_result_in_memory=False,
            cache_policy=StoreKey(stage=name, version=version),
        )

    def __repr__(self) -> str:
        return f"Stage({self.name!r}, version={self.version})"

    def key(self, inputs: Mapping[str, Input], settings: Mapping[str, Any] | BaseModel) -> str:
        """The key of the artifact that :meth:`run` would return a reference to.

        Raises:
            TypeError, ValueError: for inputs or settings that the stage does not take, or that make no key.
        """
        plain = self.models.plain_inputs(self.name, inputs)
        return stage_key(self.name, self.version, self.models.plain_settings(settings), input_fingerprints(plain))

    def run(
        self,
        *,
        inputs: Mapping[str, Input],
        settings: Mapping[str, Any] | BaseModel = {},  # noqa: B006 - never changed
        where: Where | None = None,
        refresh: bool = False,
        label: str | None = None,
        tags: Iterable[str] = (),
    ) -> Ref:
        """Run the stage as a Prefect task, or take its result from the store. Call it from a flow.

        Args:
            inputs: fingerprints, references to the artifacts of earlier stages, or groups of these by name.
            refresh: compute again.
            label: tells task runs of one stage apart.
            tags: of the task run. They cost time: for each set of them Prefect opens a connection to its concurrency
                limits, a tenth of a second to two; the task's name says the stage.

        Raises:
            TypeError, ValueError: before anything runs, for inputs or settings that the stage does not take, or that
                make no key; otherwise what the function raises.
        """
        where = where or Where()
        # the key is made here because Prefect only logs an error in a cache policy, and then does not cache
        key = self.key(inputs, settings)
        store = where.store()
        results = where.home / "results"
        problem = _problem(store, key)
        # an artifact that is missing is news only when it was there before
        if isinstance(problem, ArtifactDamaged) or (problem is not None and (results / key).exists()):
            run_log().warning("%s: computing it again, for %s", self.name, problem)
        if drop_foreign_record(results / key, {"stage": self.name, "key": key}):
            run_log().warning("%s: its record in %s is none of a stage, and is removed", self.name, results)
        name = f"{self.name} {label}" if label else self.name
        task = self.task.with_options(
            task_run_name=lambda: name,
            tags=set(tags),
            **self._kept(where, results, refresh or problem is not None),
        )
        begun = time.perf_counter()
        at_work.asked(name)
        state: Any = task(
            inputs=self.models.plain_inputs(self.name, inputs),
            settings=self.models.plain_settings(settings),
            where=where.model_dump(mode="json"),
            refresh=refresh,
            return_state=True,
        )
        state.result(_sync=True)  # raises what the function raised
        at_work.done(name, computed=state.name != "Cached")
        recorder = current_recorder()
        if recorder is not None:
            recorder.runs.append(
                StageRun(
                    stage=self.name,
                    label=label,
                    key=key,
                    cached=state.name == "Cached",
                    seconds=time.perf_counter() - begun,
                    computed=store.manifest(key).run,
                )
            )
        return Ref(stage=self.name, key=key)

    def _kept(self, where: Where, results: Path, refresh: bool) -> dict[str, Any]:
        """Options of the task: how Prefect finds its result again, and who computes it where several need it."""
        if not _writable(where.home):  # then neither records nor locks; what is in the store is used all the same
            return {"cache_policy": NO_CACHE, "persist_result": False}
        locks = FileLockManager(where.home / "locks")
        policy = self.task.cache_policy.configure(isolation_level="SERIALIZABLE", lock_manager=locks)
        return {"result_storage": results, "refresh_cache": refresh, "cache_policy": policy}

    def _compute(self, inputs: dict[str, Any], settings: dict[str, Any], where: Where, refresh: bool) -> Any:
        """The body of the Prefect task. Runs under the lock of its key."""
        fingerprints = input_fingerprints(inputs)
        key = stage_key(self.name, self.version, settings, fingerprints)
        ref = {"stage": self.name, "key": key}
        store = where.store()
        if not refresh and _problem(store, key) is None:
            # another run made it while this one waited for the lock, or Prefect's record of it is gone
            return Completed(name="Cached", message="The artifact is in the store.", data=ref)
        where = where.model_copy(update={"halvings": halvings(key)})
        if WORK in where.paths:
            store.use(f"{WORK}/{where.paths[WORK].name}")
        try:
            with at_work.computing():
                self.make(inputs, settings, where, store, store, replace=refresh)
        except torch.OutOfMemoryError as error:
            note_out_of_memory(key, error)
            raise
        return ref

    def make(
        self,
        inputs: dict[str, Any],
        settings: dict[str, Any],
        where: Where,
        store: Store,
        into: Store,
        replace: bool = False,
    ) -> Manifest:
        """Compute the artifact, whether it is there or not, and put it into a store.

        Args:
            inputs: as JSON data.
            settings: as JSON data.
            store: has the artifacts among the inputs.
            replace: put it in the place of one that is there.
        """
        fingerprints = input_fingerprints(inputs)
        resolved, parsed = self.models.resolve(store, inputs), self.models.parse(settings)
        measure = Measure()
        measure.results[MADE_BY] = made_by(inputs, where)
        where.check_unchanged()
        made = self.fn(resolved, parsed, where)
        output = made if isinstance(made, StageOutput) else StageOutput(info=made)
        return into.put(
            stage_key(self.name, self.version, settings, fingerprints),
            stage=self.name,
            version=self.version,
            inputs=fingerprints,
            settings=settings,
            tensors=measure.through(output.tensors),
            info=output.info,
            files=output.files,
            run=measure.results,
            replace=replace,
            before_it_counts=where.check_unchanged,
        )


def stage(
    name: str,
    version: int = 1,
    *,
    retry_delays: Sequence[float] = DELAYS,
) -> Callable[[StageFunction], Stage]:
    """Make a :class:`Stage` of a function ``fn(inputs, settings, where)``.

    Where ``inputs`` is annotated with a dataclass and ``settings`` with a pydantic model, the function gets these, and
    what callers give is checked against them; otherwise it gets mappings. It returns a :class:`StageOutput`, or a
    mapping of JSON results. Failures that can pass (:func:`tasks.retries.can_pass`) are tried again after each of
    ``retry_delays`` seconds.

    Args:
        version: to be raised when the same settings must give other results.

    Raises:
        TypeError: for a model that cannot be one of a stage.
    """

    def decorate(fn: StageFunction) -> Stage:
        return Stage(fn, name, version, retry_delays)

    return decorate


def _writable(home: Path) -> bool:
    """Whether something can be written below a directory, which need not exist."""
    there = next(path for path in (home, *home.parents) if path.exists())
    return os.access(there, os.W_OK | os.X_OK)


def _problem(store: Store, key: str) -> ArtifactMissing | ArtifactDamaged | None:
    """Why the artifact ``key`` cannot be used; ``None`` when it is there and every byte is right."""
    try:
        store.open(key)
    except (ArtifactMissing, ArtifactDamaged) as error:
        return error
    return None
