"""Rows that the old base with the adapter writes, and whether they are worth copying.

Paths: ``old_base``, ``new_base``, ``adapter`` where it is given by its fingerprint, and ``own_tokenizer`` where the
adapter's own is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorasuite.adapters import attached
from lorasuite.errors import DataError, EngineError
from lorasuite.teacher import (
    TeacherRows,
    TeacherSettings,
    TextLoss,
    VLLMTeacher,
    chosen,
    judge_teacher,
    judge_templates,
    judged,
    losses_of_some,
    read_losses,
    rendered,
    text_losses,
    write_losses,
    write_rows,
)
from tasks.bases import loading, running, tokenizer, trusted
from tasks.data import rows_files, stored_prompts, stored_rows
from tasks.folders import adapter_path
from tasks.progress import Progress
from tasks.recording import run_log
from tasks.retries import halved
from tasks.stage import Artifact, StageOutput, StageSettings, Where, stage

#: File of a teacher artifact: the losses of the old base on its rows, with and without the adapter.
LOSSES = "losses.json"
#: Rows read at once where losses or distributions are taken.
BATCH = 16


@dataclass(frozen=True, kw_only=True)
class TeacherInputs:
    """The old base, and the adapter."""

    old_model: str
    old_tokenizer: str
    adapter: Artifact | str


@dataclass(frozen=True, kw_only=True)
class TeachingInputs(TeacherInputs):
    """The teacher, and the prompts it answers; without any it writes from nothing."""

    prompts: Artifact | None = None


class TeachingSettings(StageSettings):
    """How many rows are written, and how. How many at once changes nothing, and is no setting."""

    samples: int
    seed: int
    teacher: TeacherSettings


@stage("teacher", version=5)
def teaching(inputs: TeachingInputs, settings: TeachingSettings, where: Where) -> StageOutput:
    """The rows that the old base with the adapter writes, and what both make of them. Knows nothing of the new base."""
    size = int(str(where.options.get("teacher_batch", settings.teacher.batch_size)))
    wanted = settings.teacher.model_copy(update={"batch_size": halved(size, where.halvings)})
    prompts = None if inputs.prompts is None else stored_prompts(inputs.prompts)
    adapter = adapter_path(inputs.adapter, where)

    def write(teacher: Any) -> TeacherRows:
        told = Progress().step
        reader = tokenizer(where, "old_base", own=True)
        return write_rows(teacher, reader, prompts, settings.samples, wanted, seed=settings.seed, progress=told)

    asked = loading(where)
    written = None
    if chosen(wanted.engine, adapter, asked.quantized):
        base, trust = where.path("old_base"), trusted(where)
        try:
            with VLLMTeacher.started(base, adapter, dtype=asked.dtype, trust_remote_code=trust) as engine:
                written = write(engine)
        except EngineError as error:  # nothing was written
            if wanted.engine == "vllm":
                raise
            run_log().warning("transformers writes the rows: %s", error.problems[0].what)
    with running(where, "old_base", own_tokenizer=True) as old:
        with attached(old.model, adapter, where.device) as teacher:
            written = written or write(teacher)
            size, places = wanted.batch_size, judged(len(written.rows))
            unknown = [n for n in places if written.losses[n] is None]
            read = losses_of_some(teacher, old.tokenizer, written.rows, unknown, batch_size=size)
            own = [loss or later for loss, later in zip(written.losses, read, strict=True)]
        bare = losses_of_some(old.model, old.tokenizer, written.rows, places, batch_size=size)
    files = {**rows_files(written.rows), LOSSES: write_losses({"teacher": own, "old": bare})}
    return StageOutput(info=written.info(), files=files)


@dataclass(frozen=True, kw_only=True)
class TemplateInputs(TeacherInputs):
    """The old base, the adapter, and rows with their answers that a template has not rendered yet."""

    rows: Artifact


class TemplateSettings(StageSettings):
    """The templates that are tried, by name, and the one in use."""

    templates: dict[str, str]
    used: str


@stage("template_fit")
def template_fit(inputs: TemplateInputs, settings: TemplateSettings, where: Where) -> StageOutput:
    """Under which template the old base with the adapter answers the rows better than without, and by how much."""
    size = halved(BATCH, where.halvings)
    rows = stored_rows(inputs.rows)
    tried = {}
    for name, text in settings.templates.items():
        with contextlib.suppress(DataError):  # another one refuses these rows: the one in use was checked before
            tried[name] = rendered(rows, name, text)
    with running(where, "old_base", own_tokenizer=True) as old:
        bare = {name: text_losses(old.model, old.tokenizer, found, batch_size=size) for name, found in tried.items()}
        with attached(old.model, adapter_path(inputs.adapter, where), where.device) as tuned:
            own = {name: text_losses(tuned, old.tokenizer, found, batch_size=size) for name, found in tried.items()}
    found = judge_templates({name: (bare[name], own[name]) for name in tried}, settings.used)
    return StageOutput(info={"fit": None if found is None else found.model_dump(mode="json")})


@dataclass(frozen=True, kw_only=True)
class WorthInputs(TeacherInputs):
    """The teacher and what it wrote, the new base, and the user's training rows where there are any."""

    new_model: str
    new_tokenizer: str
    teacher: Artifact
    rows: Artifact | None = None


@stage("teacher_worth", version=3)
def teacher_worth(inputs: WorthInputs, settings: StageSettings, where: Where) -> StageOutput:
    """Whether the teacher is worth copying: on some of the training rows, or without any on some that it wrote."""
    size = halved(BATCH, where.halvings)
    old: Sequence[TextLoss | None]
    own: Sequence[TextLoss | None]
    rows = stored_rows(inputs.teacher if inputs.rows is None else inputs.rows)
    places = judged(len(rows))
    if inputs.rows is not None:
        with running(where, "old_base", own_tokenizer=True) as base:
            old = losses_of_some(base.model, base.tokenizer, rows, places, batch_size=size)
            with attached(base.model, adapter_path(inputs.adapter, where), where.device) as teacher:
                own = losses_of_some(teacher, base.tokenizer, rows, places, batch_size=size)
    else:
        kept = read_losses(inputs.teacher.file(LOSSES))
        old, own = kept["old"], kept["teacher"]
    with running(where, "new_base") as base:
        new = losses_of_some(base.model, base.tokenizer, rows, places, batch_size=size)
    return StageOutput(info=judge_teacher(old, own, new, inputs.rows is not None).model_dump(mode="json"))
