"""Rows split, starts chosen and screened, and adapters fine-tuned.

Paths: ``base`` (the model that is trained), ``work`` (checkpoints of a run in progress).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasuite.adapters import fresh_config
from lorasuite.data import split_rows
from lorasuite.reporting import NEW_START, OWN_ROWS_START
from lorasuite.teacher import own_texts
from lorasuite.training import (
    EXTENTS,
    NOTHING,
    OWN_TEXTS,
    OWN_TOKENS,
    Effort,
    FinetuneSettings,
    Start,
    TriedRate,
    base_dtype,
    choose,
    finetune_swept,
    screen,
    search,
    write_scaled,
)
from tasks.bases import running
from tasks.data import rows_files, stored_rows, stored_split
from tasks.distillation_stages import fitting, stored_rehearsal, stored_taught
from tasks.folders import adapter_folder, folder_files
from tasks.progress import Progress
from tasks.retries import halved
from tasks.stage import WORK, Artifact, StageOutput, StageSettings, Where, stage


@dataclass(frozen=True, kw_only=True)
class RowInputs:
    """The user's rows, and the teacher's: to train on, or only to be read and chosen by."""

    own: Artifact | None = None
    synthetic: Artifact | None = None
    selection: Artifact | None = None


class SeedSettings(StageSettings):
    """The seed of the split."""

    seed: int


@stage("split")
def split(inputs: RowInputs, settings: SeedSettings, where: Where) -> StageOutput:
    """Training rows, and which of them are held out: drawn once for everything that trains, fits or chooses."""
    parts = [[] if part is None else stored_rows(part) for part in (inputs.own, inputs.synthetic, inputs.selection)]
    found = split_rows(*parts, seed=settings.seed)
    info = {"trained": len(found.trained), "to_train": len(found.to_train), "to_choose_by": len(found.to_choose_by)}
    return StageOutput(info=info, files=found.files())


@dataclass(frozen=True, kw_only=True)
class BaseInputs:
    """The base that is trained."""

    model: str
    tokenizer: str


@stage("rehearsal")
def rehearsing(inputs: BaseInputs, settings: SeedSettings, where: Where) -> StageOutput:
    """Texts that the bare base writes itself, for every fine-tune of it to read beside its rows."""
    with running(where, "base") as base:
        texts = own_texts(
            base.model,
            base.tokenizer,
            OWN_TEXTS,
            OWN_TOKENS,
            seed=settings.seed,
            batch_size=halved(OWN_TEXTS, where.halvings),
            progress=Progress().step,
        )
    return StageOutput(info={"texts": len(texts)}, files=rows_files(texts))


@dataclass(frozen=True, kw_only=True)
class StartInputs:
    """The base that is trained, the rows, and candidates to start from, by name."""

    model: str
    tokenizer: str
    rows: Artifact
    transforms: dict[str, Artifact]
    #: A fresh LoRA, where there is no candidate.
    unmoved: Artifact | None = None


class SelectionSettings(StageSettings):
    """The tokens read of a row."""

    cutoff: int


@stage("select", version=2)
def selection(inputs: StartInputs, settings: SelectionSettings, where: Where) -> StageOutput:
    """The candidate and scale with the least loss on the rows held out, or none of them."""
    candidates = {method: adapter_folder(artifact) for method, artifact in inputs.transforms.items()}
    with running(where, "base") as base:
        tried = choose(
            base.model,
            base.tokenizer,
            candidates,
            stored_split(inputs.rows).to_choose_by,
            cutoff=settings.cutoff,
            device=where.device,
        )
    best = tried[0]
    shown = [one.model_dump(mode="json") for one in tried]
    if not candidates:
        assert inputs.unmoved is not None
        files = folder_files(adapter_folder(inputs.unmoved))
        return StageOutput(info={"candidates": shown, "method": NOTHING, "scale": 0.0}, files=files)
    source = candidates[next(one.method for one in tried if one.method != NOTHING)]
    with tempfile.TemporaryDirectory() as folder:
        files = folder_files(write_scaled(source, Path(folder), best.scale))
    return StageOutput(info={"candidates": shown, "method": best.method, "scale": best.scale}, files=files)


class ScreeningSettings(StageSettings):
    """Hyperparameters of the short fine-tunes, and their learning rate."""

    finetune: FinetuneSettings
    learning_rate: float


@stage("screen", version=3)
def screening(inputs: StartInputs, settings: ScreeningSettings, where: Where) -> StageOutput:
    """Which candidates are worth a whole sweep: their held-out loss after a short fine-tune."""
    with running(where, "base", base_dtype(settings.finetune, where.device)) as base:
        losses = screen(
            base.model,
            base.tokenizer,
            stored_split(inputs.rows),
            settings.finetune,
            settings.learning_rate,
            {method: adapter_folder(artifact) for method, artifact in inputs.transforms.items()},
            device=where.device,
        )
    return StageOutput(info={"losses": losses})


@dataclass(frozen=True, kw_only=True)
class SearchInputs:
    """The base that is trained, the rows, and what a fine-tune may start from.

    ``transforms`` are candidates by name, ``chosen`` what ``select`` made of the best of them; ``own`` is the split of
    the user's rows alone, where a fresh LoRA on these competes with the teacher's rows beside them.
    """

    model: str
    tokenizer: str
    rows: Artifact
    transforms: dict[str, Artifact]
    chosen: Artifact
    own: Artifact | None = None
    soft_labels: Artifact | None = None
    token_weights: Artifact | None = None
    rehearsal: Artifact | None = None


class SearchSettings(StageSettings):
    """Hyperparameters, settings of a fresh LoRA, how much is tried, and texts by row that are read beside the rows."""

    fresh: dict[str, Any]
    finetune: FinetuneSettings
    effort: Effort
    rehearsal: float = 0.0


@contextmanager
def _training(where: Where, tuning: FinetuneSettings) -> Iterator[tuple[Any, Path]]:
    """The base as it is trained, and where the adapter is written, which is gone afterwards."""
    with (
        tempfile.TemporaryDirectory() as folder,
        running(where, "base", base_dtype(tuning, where.device)) as base,
    ):
        yield base, Path(folder) / "adapter"


@stage("search", version=2)
def searching(inputs: SearchInputs, settings: SearchSettings, where: Where) -> StageOutput:
    """The fine-tune from the start and at the rate that do best on rows held out, found by successive halving."""
    tuning, taught = fitting(settings.finetune, where), stored_taught(inputs.soft_labels, inputs.token_weights)
    rows, chosen = stored_split(inputs.rows), inputs.chosen.info
    untrained = {(one["method"], one["scale"]): one["loss"] for one in chosen["candidates"]}
    bare, lora = untrained[NOTHING, 0.0], fresh_config(settings.fresh)
    starts = {NEW_START: Start(rows, bare, lora=lora, **taught)}
    for method, artifact in inputs.transforms.items():
        starts[method] = Start(rows, untrained[method, 1.0], adapter=adapter_folder(artifact), **taught)
    scaled = (chosen["method"], chosen["scale"])
    if scaled[0] != NOTHING and scaled[1] != 1:
        made = adapter_folder(inputs.chosen)
        starts["{} x{:g}".format(*scaled)] = Start(rows, untrained[scaled], adapter=made, **taught)
    if inputs.own is not None:
        starts[OWN_ROWS_START] = Start(stored_split(inputs.own), bare, lora=lora)
    with _training(where, tuning) as (base, output):
        result, found = search(
            base.model,
            base.tokenizer,
            starts,
            tuning,
            EXTENTS[settings.effort],
            bare=bare,
            output=output,
            work_dir=where.path(WORK),
            rehearsal=stored_rehearsal(inputs.rehearsal, settings.rehearsal, len(rows.trained)),
            progress=Progress().training,
            device=where.device,
        )
        files = folder_files(output)
    sweep = [
        TriedRate(learning_rate=arm.learning_rate, validation_loss=arm.best, epochs=None, start_loss=arm.losses.get(0))
        for arm in sorted(found.arms, key=lambda arm: arm.learning_rate)
        if arm.start == found.start
    ]
    shown = [one.model_dump(mode="json") for one in sweep]
    info = {**result.model_dump(), "sweep": shown, "search": found.model_dump(mode="json")}
    return StageOutput(info=info, files=files)


@dataclass(frozen=True, kw_only=True)
class FinetuneInputs:
    """The base that is trained, the rows, an adapter to start from, the teacher's distributions and token weights, and
    texts of the base's own."""

    model: str
    tokenizer: str
    rows: Artifact
    transform: Artifact | None = None
    soft_labels: Artifact | None = None
    token_weights: Artifact | None = None
    rehearsal: Artifact | None = None


class FinetuneStageSettings(StageSettings):
    """Hyperparameters, the learning rates to choose from, settings of a fresh LoRA, where it begins from one, and texts
    by row that are read beside the rows."""

    fresh: dict[str, Any] | None
    finetune: FinetuneSettings
    learning_rates: tuple[float, ...]
    rehearsal: float = 0.0


@stage("finetune", version=3)
def finetune(inputs: FinetuneInputs, settings: FinetuneStageSettings, where: Where) -> StageOutput:
    """The light fine-tune of a migrated adapter, or of a fresh LoRA on the same rows."""
    tuning, start, rows = fitting(settings.finetune, where), inputs.transform, stored_split(inputs.rows)
    with _training(where, tuning) as (base, output):
        result, sweep = finetune_swept(
            base.model,
            base.tokenizer,
            rows,
            tuning,
            settings.learning_rates,
            adapter=None if start is None else adapter_folder(start),
            lora=None if settings.fresh is None else fresh_config(settings.fresh),
            output=output,
            work_dir=where.path(WORK),
            rehearsal=stored_rehearsal(inputs.rehearsal, settings.rehearsal, len(rows.trained)),
            progress=Progress().training,
            device=where.device,
            **stored_taught(inputs.soft_labels, inputs.token_weights),
        )
        files = folder_files(output)
    shown = [one.model_dump(mode="json") for one in sweep]
    return StageOutput(info={**result.model_dump(), "sweep": shown}, files=files)
