"""What the old base with the adapter says of rows token by token, for the new base to be trained by.

Paths: ``old_base``, ``new_base``, ``adapter`` where it is given by its fingerprint, ``own_tokenizer`` where the
adapter's own is used, and ``work`` (checkpoints of a run in progress).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasuite.adapters import attached, fresh_config
from lorasuite.bases import CommonTokens
from lorasuite.data import Row
from lorasuite.teacher import Distilling, TeacherSettings, second_step
from lorasuite.training import (
    FinetuneSettings,
    RowAligner,
    SecondStep,
    SoftLabels,
    TokenWeights,
    base_dtype,
    excess_weights,
    finetune,
    label_losses,
    rehearsed,
    soft_labels,
)
from tasks.bases import running, tokenizer
from tasks.data import stored_rows, stored_split
from tasks.folders import adapter_folder, adapter_path, folder_files
from tasks.progress import Progress
from tasks.retries import halved
from tasks.stage import WORK, Artifact, StageOutput, StageSettings, Where, stage
from tasks.teacher_stages import BATCH, TeacherInputs


def fitting(tuning: FinetuneSettings, where: Where) -> FinetuneSettings:
    """Hyperparameters with the micro-batch of a retry after memory ran out; ``auto`` halves by itself."""
    if not where.halvings or tuning.micro_batch_size == "auto":
        return tuning
    smaller = halved(tuning.micro_batch_size, where.halvings)
    return tuning.model_copy(update={"micro_batch_size": smaller})


def stored_rehearsal(texts: Artifact | None, share: float, rows: int) -> list[Row]:
    """The texts of the stage ``rehearsal`` that a fine-tune reads beside so many rows."""
    return [] if texts is None else rehearsed(stored_rows(texts), share, rows)


def stored_taught(soft_labels: Artifact | None, token_weights: Artifact | None) -> dict[str, Any]:
    """What the teacher says of the tokens, as a fine-tune takes it: of artifacts of the stages of those names."""
    return {
        "soft_labels": None if soft_labels is None else SoftLabels.from_tensors(soft_labels.tensors()),
        "token_weights": None if token_weights is None else TokenWeights.from_tensors(token_weights.tensors()),
    }


@dataclass(frozen=True, kw_only=True)
class JudgedInputs(TeacherInputs):
    """The teacher, the tokenizer that is trained with, and the rows."""

    new_tokenizer: str
    rows: Artifact


class CutoffSettings(StageSettings):
    """The tokens read of a row."""

    cutoff: int


def _aligner(where: Where, cutoff: int) -> RowAligner:
    return RowAligner(tokenizer(where, "old_base", own=True), tokenizer(where, "new_base"), cutoff)


@contextmanager
def _teaching(where: Where, adapter: Artifact | str) -> Iterator[Any]:
    """The old base with the adapter on it."""
    with (
        running(where, "old_base", own_tokenizer=True) as old,
        attached(old.model, adapter_path(adapter, where), where.device) as teacher,
    ):
        yield teacher


@dataclass(frozen=True, kw_only=True)
class SoftLabelInputs(JudgedInputs):
    """The teacher, the rows it is asked about, and the tokens both bases share."""

    vocabulary: Artifact


class SoftLabelSettings(CutoffSettings):
    """The tokens read of a row, and the temperature of the distributions."""

    temperature: float


@stage("soft_labels", version=3)
def soft_labelling(inputs: SoftLabelInputs, settings: SoftLabelSettings, where: Where) -> StageOutput:
    """The teacher's distribution wherever a unit of both tokenizations of the training rows begins."""
    common = CommonTokens.read(inputs.vocabulary)
    with _teaching(where, inputs.adapter) as teacher:
        found = soft_labels(
            teacher,
            _aligner(where, settings.cutoff),
            stored_split(inputs.rows).trained,
            (common.old, common.new),
            temperature=settings.temperature,
            batch_size=halved(BATCH, where.halvings),
        )
    return StageOutput(tensors=found.tensors(), info={"rows": len(found.lengths), "tokens": int(found.judged.sum())})


@stage("token_weights")
def token_weighting(inputs: JudgedInputs, settings: CutoffSettings, where: Where) -> StageOutput:
    """How much each token of the rows that the teacher wrote counts, by what the adapter changed of its probability."""
    aligned = _aligner(where, settings.cutoff)(stored_split(inputs.rows).synthetic)
    examples, size = [row.old for row in aligned], halved(BATCH, where.halvings)
    with running(where, "old_base", own_tokenizer=True) as old:
        bare = label_losses(old.model, examples, size)
        with attached(old.model, adapter_path(inputs.adapter, where), where.device) as teacher:
            tuned = label_losses(teacher, examples, size)
    found = excess_weights(aligned, bare, tuned)
    return StageOutput(tensors=found.tensors(), info={"rows": len(aligned)})


@dataclass(frozen=True, kw_only=True)
class SecondStepInputs(TeacherInputs):
    """The teacher, the new base, the rows of the first step and its adapter, and what that began from.

    ``transform`` is the adapter that the first step began from, where it did not begin from a fresh LoRA.
    """

    new_model: str
    new_tokenizer: str
    rows: Artifact
    vocabulary: Artifact
    first: Artifact
    transform: Artifact | None = None
    soft_labels: Artifact | None = None
    token_weights: Artifact | None = None
    rehearsal: Artifact | None = None


class SecondStepSettings(StageSettings):
    """Which second step, and its hyperparameters.

    To make the first step again without the rows held out: ``first`` are its hyperparameters, ``first_epochs`` is after
    how many epochs it ended early, ``rehearsal`` the texts by row that it read beside them, and ``fresh`` the settings
    of a fresh LoRA that it began from. Without ``compares`` nothing is held out, and the second step is kept.
    """

    kind: SecondStep
    finetune: FinetuneSettings
    teacher: TeacherSettings
    compares: bool
    first: FinetuneSettings | None = None
    first_epochs: int | None = None
    fresh: dict[str, Any] | None = None
    rehearsal: float = 0.0


@stage("second_step")
def second_stepping(inputs: SecondStepInputs, settings: SecondStepSettings, where: Where) -> StageOutput:
    """The first step's adapter distilled further, if held-out rows say that this is better."""
    common = CommonTokens.read(inputs.vocabulary)
    first, start = settings.first, inputs.transform
    told = Progress().training
    with (
        tempfile.TemporaryDirectory() as folder,
        _teaching(where, inputs.adapter) as teacher,
        running(where, "new_base", base_dtype(settings.finetune, where.device)) as new,
    ):
        arguments = {"device": where.device, "progress": told}
        distilling = Distilling(
            teacher=teacher,
            base=new.model,
            aligner=_aligner(where, settings.finetune.cutoff),
            common=(common.old, common.new),
            kind=settings.kind,
            settings=fitting(settings.finetune, where),
            writing=settings.teacher.model_copy(update={"batch_size": halved(BATCH, where.halvings)}),
            arguments=arguments,
        )
        split = stored_split(inputs.rows)

        def without_held_out(output: Path, work_dir: Path) -> None:
            assert first is not None
            finetune(
                new.model,
                new.tokenizer,
                split.to_train,
                fitting(first, where),
                adapter=None if start is None else adapter_folder(start),
                lora=fresh_config(settings.fresh) if start is None and settings.fresh is not None else None,
                output=output,
                work_dir=work_dir,
                stop_after=settings.first_epochs,
                rehearsal=stored_rehearsal(inputs.rehearsal, settings.rehearsal, len(split.to_train)),
                **stored_taught(inputs.soft_labels, inputs.token_weights),
                **arguments,  # type: ignore[arg-type]
            )

        result = second_step(
            distilling,
            split,
            adapter_folder(inputs.first),
            output=Path(folder) / "adapter",
            work_dir=where.path(WORK),
            without_held_out=without_held_out if settings.compares else None,
        )
        files = folder_files(Path(folder) / "adapter")
    return StageOutput(info=result.model_dump(mode="json"), files=files)
