"""Bases, bare or with an adapter, measured; and the published adapter looked at as a server would load it.

Paths: ``base``, the model that is measured; ``adapter`` where it is given by its fingerprint; ``own_tokenizer`` where
the adapter's own is used; ``eval_dir`` and ``include_path`` of tasks by name; ``gguf``, the base as llama.cpp loads it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from lorasuite.evaluation import (
    EvaluationResult,
    EvaluationSettings,
    compare_gguf,
    compare_merged,
    evaluate,
    evaluate_tasks,
    evaluate_text,
    write_task_samples,
)
from tasks.bases import loading, running, trusted
from tasks.data import stored_rows, stored_texts
from tasks.folders import adapter_folder, adapter_path
from tasks.progress import Progress
from tasks.retries import halved
from tasks.stage import Artifact, StageOutput, StageSettings, Where, stage

#: File of an evaluation: one result a line for each sample.
SAMPLES = "samples.jsonl"


@dataclass(frozen=True, kw_only=True)
class ArmInputs:
    """A base, and the adapter on it if there is one."""

    model: str
    tokenizer: str
    adapter: Artifact | str | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationInputs(ArmInputs):
    """An arm, and the rows it is measured on."""

    rows: Artifact


@stage("evaluate", version=2)
def evaluation(inputs: EvaluationInputs, settings: EvaluationSettings, where: Where) -> StageOutput:
    """One base, bare or with one adapter, on the held-out rows."""
    with running(where, "base", own_tokenizer=True) as base:
        result = evaluate(
            base.model,
            base.tokenizer,
            stored_rows(inputs.rows),
            _smaller(settings, where),
            adapters={"it": _folder(inputs, where)},
            progress=Progress().evaluation,
            device=where.device,
        )["it"]
    return _with_samples(result)


@dataclass(frozen=True, kw_only=True)
class TaskInputs(ArmInputs):
    """An arm, and the fingerprint of what the task asks."""

    task: str


class TaskSettings(StageSettings):
    """The task by name, how it is run, and lm-eval's version, whose own tasks may change with it."""

    task: str
    lm_eval: str
    batch_size: int
    limit: int | None
    seed: int


@stage("evaluate_tasks", version=2)
def task_evaluation(inputs: TaskInputs, settings: TaskSettings, where: Where) -> StageOutput:
    """One base, bare or with one adapter, on an lm-eval task (or group, or tag) by name."""
    options = EvaluationSettings.model_validate(settings.model_dump(exclude={"task", "lm_eval"}))
    with running(where, "base", own_tokenizer=True) as base:
        scores = evaluate_tasks(
            base.model,
            base.tokenizer,
            [settings.task],
            _smaller(options, where),
            adapters={"it": _folder(inputs, where)},
            eval_dir=where.paths.get("eval_dir"),
            include_path=where.paths.get("include_path"),
            progress=Progress().evaluation,
            device=where.device,
            trust_remote_code=trusted(where),
        )["it"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / SAMPLES
        write_task_samples(scores, file)
        info = {task: score.summary() for task, score in scores.items()}
        return StageOutput(info=info, files={SAMPLES: file.read_bytes()})


@dataclass(frozen=True, kw_only=True)
class TextInputs(ArmInputs):
    """An arm, and the texts it is measured on, cut as they are read."""

    texts: Artifact


class TextSettings(StageSettings):
    """Texts read at once."""

    batch_size: int


@stage("general_text")
def general_text(inputs: TextInputs, settings: TextSettings, where: Where) -> StageOutput:
    """One base, bare or with one adapter, on general text."""
    with running(where, "base", own_tokenizer=True) as base:
        result = evaluate_text(
            base.model,
            base.tokenizer,
            stored_texts(inputs.texts),
            adapters={"it": _folder(inputs, where)},
            batch_size=halved(settings.batch_size, where.halvings) if where.halvings else settings.batch_size,
            progress=Progress().evaluation,
            device=where.device,
        )["it"]
    return _with_samples(result)


@dataclass(frozen=True, kw_only=True)
class ServingInputs:
    """The base, the adapter that is published, and the rows that arms are measured on, if there are any."""

    model: str
    tokenizer: str
    adapter: Artifact
    rows: Artifact | None = None


@stage("serving", version=3)
def serving(inputs: ServingInputs, settings: StageSettings, where: Where) -> StageOutput:
    """The published adapter in PEFT, and merged into a plain model: the same answers to some of the rows."""
    folder = adapter_folder(inputs.adapter)
    # a weight that is merged in 4 or 8 bits is rounded again, which no server does
    plain = loading(where).model_copy(update={"load_in_4bit": False, "load_in_8bit": False})
    rows = [] if inputs.rows is None else stored_rows(inputs.rows)
    found = compare_merged(
        where.path("base"), folder, rows, device=where.device, trust_remote_code=trusted(where), loading=plain
    )
    return StageOutput(info={loader: served.model_dump(mode="json") for loader, served in found.items()})


@dataclass(frozen=True, kw_only=True)
class LlamaCppInputs(ServingInputs):
    """The same, and the fingerprint of the base's GGUF file."""

    gguf: str


class LlamaCppSettings(StageSettings):
    """The version of llama.cpp's binding, and a digest of its converter."""

    binding: str
    converter: str


@stage("llama_cpp")
def llama_cpp(inputs: LlamaCppInputs, settings: LlamaCppSettings, where: Where) -> StageOutput:
    """The published adapter in llama.cpp: the same answers to some of the rows as in PEFT."""
    rows = [] if inputs.rows is None else stored_rows(inputs.rows)
    with running(where, "base") as base:
        found = compare_gguf(
            base.model,
            base.tokenizer,
            adapter_folder(inputs.adapter),
            where.path("gguf"),
            rows,
            base=where.path("base"),
            device=where.device,
        )
    return StageOutput(info={"llama.cpp": found.model_dump(mode="json")})


def _folder(inputs: ArmInputs, where: Where) -> Path | None:
    """The adapter that is measured: a stored one, the user's own, or none."""
    return None if inputs.adapter is None else adapter_path(inputs.adapter, where)


def _with_samples(result: EvaluationResult) -> StageOutput:
    """The summary, and the samples as a file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / SAMPLES
        result.write_samples(file)
        return StageOutput(info=result.summary(), files={SAMPLES: file.read_bytes()})


def _smaller(settings: EvaluationSettings, where: Where) -> EvaluationSettings:
    """Fewer rows at once after running out of memory; results say how many it were."""
    if not where.halvings:
        return settings
    return settings.model_copy(update={"batch_size": halved(settings.batch_size, where.halvings)})
