"""Prompts for an adapter of whose task the user has none: drafts, a stage for each source, and the choice among them.

Paths: as the stages of the teacher (:mod:`tasks.teacher_stages`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lorasuite.adapters import attached
from lorasuite.errors import DataError, Problem
from lorasuite.teacher import (
    Given,
    Probe,
    Pull,
    TeacherSettings,
    choose_prompts,
    general_level,
    parsed_card,
    prompt_source,
    resembling,
)
from tasks.bases import running, tokenizer
from tasks.data import rows_files, stored_prompts, stored_texts
from tasks.folders import adapter_path
from tasks.progress import Progress
from tasks.retries import halved
from tasks.stage import Artifact, StageOutput, StageSettings, Where, stage
from tasks.teacher_stages import TeacherInputs

#: File of an artifact of drafts: the adapter's signal on each row and its answer.
SIGNALS = "signals.json"


@dataclass(frozen=True, kw_only=True)
class DraftInputs(TeacherInputs):
    """The old base with the adapter, and what is given: examples, the card's text, beginnings of general texts.

    Where prompts may be conversations, the new base's tokenizer is given, too: both chat templates must render them.
    """

    new_tokenizer: str | None = None
    examples: Artifact | None = None
    card: Artifact | None = None
    general: Artifact | None = None


class ProbeSettings(StageSettings):
    """How many prompts are wanted, and how the old base is asked."""

    count: int
    seed: int
    teacher: TeacherSettings


class DraftSettings(ProbeSettings):
    """The source, and what it is told."""

    source: str
    description: str = ""


@stage("prompt_drafts", version=2)
def prompt_drafts(inputs: DraftInputs, settings: DraftSettings, where: Where) -> StageOutput:
    """Drafts of prompts from one source, and how much the adapter changes the answer to each."""
    given = Given(
        examples=() if inputs.examples is None else tuple(stored_prompts(inputs.examples)),
        description=settings.description,
        card=parsed_card(*(("",) if inputs.card is None else stored_texts(inputs.card))),
        chat=inputs.new_tokenizer is not None,
        general=_general(inputs.general),
        prefix=settings.teacher.prefix,
        suffix=settings.teacher.suffix,
    )
    source = prompt_source(settings.source)
    if not source.can(given):
        what = f"{source.name} needs {source.needs}"
        raise DataError(Problem("prompt_sources", what, "Give that, or leave this source out."))
    new = None if inputs.new_tokenizer is None else tokenizer(where, "new_base")
    with _probe(inputs, settings, where, new) as probe:
        pulls = source.drafts(probe, given, settings.count)
    signals = json.dumps([[pull.answer, pull.nats, pull.loss] for pull in pulls]).encode()
    return StageOutput(
        info={"source": settings.source, "drafts": len(pulls), "left_out": probe.left_out},
        files={**rows_files([pull.row for pull in pulls]), SIGNALS: signals},
    )


@dataclass(frozen=True, kw_only=True)
class ChoiceInputs(TeacherInputs):
    """The old base with the adapter, drafts by source, and the user's prompts, which are all used."""

    drafts: dict[str, Artifact]
    examples: Artifact | None = None
    general: Artifact | None = None


@stage("prompts", version=2)
def prompts(inputs: ChoiceInputs, settings: ProbeSettings, where: Where) -> StageOutput:
    """The prompts that the teacher answers: the user's, and of the drafts those the adapter's signal chooses."""
    drafts = {name: stored_drafts(artifact) for name, artifact in inputs.drafts.items()}
    given = [] if inputs.examples is None else list(dict.fromkeys(stored_prompts(inputs.examples)))
    drawn = [name for name in drafts if prompt_source(name).control]
    with _probe(inputs, settings, where) as probe:
        level = general_level(probe, _general(inputs.general))
        left_out = {name: artifact.info["left_out"] for name, artifact in inputs.drafts.items()}
        rows, found = choose_prompts(probe, drafts, given, level, settings.count, drawn, left_out)
    return StageOutput(info=found.model_dump(mode="json"), files=rows_files(rows))


@dataclass(frozen=True, kw_only=True)
class ResemblanceInputs(TeacherInputs):
    """The old base with the adapter, prompts that were found, and real ones."""

    prompts: Artifact
    real: Artifact


@stage("resemblance")
def resemblance(inputs: ResemblanceInputs, settings: ProbeSettings, where: Where) -> StageOutput:
    """The share of prompts that resemble real ones. Nothing is chosen by it."""
    found, real = stored_prompts(inputs.prompts), stored_prompts(inputs.real)
    others = [row for row in found if row not in set(real)]
    with _probe(inputs, settings, where) as probe:
        share = resembling(probe, others, real) if others and len(real) > 1 else None
    return StageOutput(info={"share": share, "prompts": len(others), "real": len(real)})


def stored_drafts(artifact: Artifact) -> list[Pull]:
    """The drafts of an artifact that :data:`prompt_drafts` made."""
    if not artifact.info["drafts"]:
        return []
    signals = json.loads(artifact.file(SIGNALS).read_text(encoding="utf-8"))
    rows = stored_prompts(artifact)
    return [Pull(row, *signal) for row, signal in zip(rows, signals, strict=True)]


def _general(artifact: Artifact | None) -> tuple[str, ...]:
    return () if artifact is None else tuple(stored_texts(artifact))


@contextmanager
def _probe(inputs: TeacherInputs, settings: ProbeSettings, where: Where, new: Any = None) -> Iterator[Probe]:
    size = int(str(where.options.get("teacher_batch", settings.teacher.batch_size)))
    told = settings.teacher.model_copy(update={"batch_size": halved(size, where.halvings)})
    with (
        running(where, "old_base", own_tokenizer=True) as old,
        attached(old.model, adapter_path(inputs.adapter, where), where.device) as model,
    ):
        yield Probe(model, old.tokenizer, told, settings.seed, Progress().step, new)
