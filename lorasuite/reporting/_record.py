"""The record of a migration, ``migration.json``: what it was made of, what was done, and what was measured.

A record of an earlier version is brought to the present form when it is read. Its fields that are unknown today are
ignored, and what it does not have yet takes the value that says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorasuite.bases import file_digest, read_json
from lorasuite.errors import AdapterError, CheckpointError, Problem
from lorasuite.evaluation import (
    Arm,
    Comparison,
    EvaluationSummary,
    Gate,
    General,
    Judgement,
    Served,
    TaskSummary,
    as_served,
    judge,
)
from lorasuite.reporting._published import NEW_START, OWN_ROWS_START, Published
from lorasuite.teacher import Discovered, TemplateFits, Worth
from lorasuite.training import NOTHING, FinetuneResult, Search, SecondStepResult

#: Version of the form of ``migration.json``; 0 of records that do not name one.
SCHEMA_VERSION: Final = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseRecord(_Part):
    """A base model; ``fingerprint`` is the digest of its weights and configuration."""

    id: str = Field(description="as it is loaded: a Hub id, or a directory")
    name: str
    revision: str | None
    fingerprint: str


class AdapterRecord(_Part):
    """The adapter that was migrated."""

    id: str
    name: str
    kind: str = Field("LORA", description="PEFT's peft_type")
    fingerprint: str
    rank: int
    modules: int = Field(description="modules it has an update of")


class TransferMatrixRecord(_Part):
    """The map between the hidden sizes."""

    identity: bool
    residual: float | None = Field(None, description="relative residual of the fit; None for the identity")
    tokens: int | None = Field(None, description="common tokens it was fitted on")


class AlignmentRecord(_Part):
    """What the orthogonal maps from the old modules leave of the new ones, at their best scale."""

    rows: int = Field(description="aligned token positions")
    residual: dict[str, dict[str, float]] = Field(description="old layer → role and end → share of the variance")


class PairRecord(_Part):
    """The two bases, and what of the one matches what of the other."""

    old_base: BaseRecord
    new_base: BaseRecord
    layer_map: dict[str, int] = Field(description="old layer → new layer")
    layer_similarity: dict[str, float] = Field({}, description="by old layer; empty without calibration texts")
    head_map: dict[str, dict[str, int]] = Field(description='"old->new" layers → old head → new head')
    transfer_matrix: TransferMatrixRecord
    head_similarity: dict[str, float] = Field({}, description="mean over matched heads, by old layer")
    alignment: AlignmentRecord | None = None

    @property
    def layers(self) -> dict[int, int]:
        """The layer map by number."""
        return {int(old): new for old, new in self.layer_map.items()}


class Candidate(_Part):
    """A transform at a scale, or the bare new base, and its held-out loss."""

    method: str
    scale: float
    loss: float | None = Field(description="nats per label token; None where it was not finite")


class SweptRate(_Part):
    """A learning rate that was tried."""

    learning_rate: float
    validation_loss: float | None = Field(description="the least, nats per label token; None where it diverged")
    epochs: int | None = Field(None, description="after which it was least; None of a short or paused run")
    start_loss: float | None = Field(None, description="before training")


class TrainingRecord(FinetuneResult):
    """A fine-tune and the learning rates tried for it."""

    sweep: list[SweptRate] = Field([])


class PublishedTraining(TrainingRecord):
    """The fine-tune that was published, and what it was chosen from."""

    start: str = Field(description="transform it began from, or that it began from a new LoRA")
    starts: dict[str, float | None] = Field({}, description="start → least held-out loss of its best fine-tune")
    screened: dict[str, float | None] = Field({}, description="transform → held-out loss after a short fine-tune")
    search: Search | None = Field(
        None,
        exclude_if=lambda search: search is None,
        description="of start and learning rate together; not there where nothing was searched",
    )
    second_step: SecondStepResult | None = Field(
        None,
        exclude_if=lambda result: result is None,
        description="what a second step came to; not there where none was made",
    )


class SoftLabelRecord(_Part):
    """How many rows and tokens the teacher's distributions are known of."""

    rows: int
    tokens: int


class UnusedTeacher(_Part):
    """Why the old adapter wrote no rows."""

    worth: Literal[False]
    reason: str
    samples: int = Field(description="rows it was to write for training")
    distilled: Literal[False]


class TeacherRecord(Worth):
    """The rows that the old base with its adapter wrote, and whether they were worth training on."""

    rows: int = Field(description="rows kept")
    written: int = Field(description="attempts made")
    dropped: dict[str, int] = Field(description="attempts left out, by reason")
    tokens: int = Field(description="tokens generated, those of dropped attempts included")
    seconds: float | None = Field(None, description="of generation, without loading the old base")
    engine: str = Field("transformers", description="what generated: transformers or vllm")
    temperature: float = Field(description="of the sampling; beside other prompts, running text has its own")
    prompts: int = Field(description="distinct prompts there were; 0: it wrote from nothing")
    imitated: int = Field(description="prompts that the old base wrote itself")
    mean_log_prob: float | None = Field(description="of the rows' tokens, nats")
    discovered: Discovered | None = Field(
        None,
        exclude_if=lambda found: found is None,
        description="prompts that were not given: which source gave what share, and how sure it is",
    )
    samples: int = Field(description="rows it was to write for training; 0: they were only chosen by")
    distilled: SoftLabelRecord | Literal[False] = False

    @property
    def trained_on(self) -> bool:
        """Whether fine-tunes read its rows."""
        return self.worth and self.samples > 0


class Reader(_Part):
    """Whose tokenizer and chat template make the prompts of one side."""

    tokenizer: Literal["base", "adapter"] = "base"
    chat_template: Literal["base", "adapter"] | None = Field("base", description="None: there is none")
    differences: tuple[str, ...] = Field((), description="of the adapter's from the base's")


class Prompts(_Part):
    """How prompts are made."""

    old: Reader = Field(Reader(), description="on the old base, with and without the adapter: the teacher's rows, too")
    new: Reader = Field(Reader(), description="on the new base: what the new adapter was fine-tuned and measured with")
    template: str = Field("question", description="of instruction rows, on both sides")
    template_text: str = ""
    fit: TemplateFits | None = Field(None, description="of templates to the adapter; None where no row is rendered")


class DroppedModule(_Part):
    """A module of the old adapter that has no place in the new base."""

    module: str
    why: str


class CarriedRows(_Part):
    """Rows of a vocabulary-sized module that were moved."""

    module: str
    what: str
    rows: int
    of: int


class StageTiming(_Part):
    """A stage of this run, and what its computation took whenever it was made."""

    stage: str
    label: str | None
    cached: bool
    seconds: float = Field(description="wall time in this run")
    computed_seconds: float = Field(description="wall time of the computation")
    peak_memory_bytes: int
    key: str


class ArmResults(_Part):
    """What was measured, by arm."""

    evaluation: dict[Arm, EvaluationSummary] = Field(description="on the held-out rows")
    tasks: dict[Arm, dict[str, TaskSummary]] = Field({}, description="by lm-eval task or group")
    comparisons: list[Comparison] = Field([], description="of the published arm with others, sample by sample")
    weights: dict[Arm, str] = Field({}, description="sha256 of the weight file of the adapter that was measured")
    general: General | None = Field(
        None, description="what adapters cost of general ability; None in records of earlier versions"
    )

    def judge(self, gate: Gate) -> Judgement:
        """The gate's verdict."""
        return judge(self.evaluation, self.tasks, gate, self.comparisons, self.general)


class MigrationRecord(PairRecord, ArmResults):
    """The content of ``migration.json``."""

    schema_version: Literal[1] = SCHEMA_VERSION
    adapter: AdapterRecord
    prompts: Prompts | None = Field(None, description="None in records of earlier versions")
    method: str = Field(description='the best transform as it comes, of auto\'s; "none" where the bare base is better')
    candidates: list[Candidate] = Field([], description="what auto compared without fine-tuning, best first")
    teacher: TeacherRecord | UnusedTeacher | None = None
    updates: dict[str, float] = Field(description="new module → Frobenius norm of its update")
    retained_energy: dict[str, float] = Field(description="new module → share of the update's energy kept")
    dropped: list[DroppedModule]
    fresh: list[str] = Field(description="new modules with newly initialised factors")
    carried: list[CarriedRows] = []
    rank: int
    loaded_bytes_peak: int = Field(description="most bytes of weights held at once by the transform")
    finetune: PublishedTraining | None
    fit_residual: dict[str, float] = Field({}, description="new module → relative residual of a joint fit")
    control: TrainingRecord | None = Field(description="the fine-tune of a new LoRA on the same rows")
    verdict: Judgement
    weights_sha256: str | None = Field(None, description="of the adapter's weight file beside this record")
    serving: dict[str, Served] = Field({}, description="by loader")
    timings: list[StageTiming]
    peak_memory_bytes: dict[str, int] = Field(description="by stage")
    notices: list[str] = Field(description="of the check before the run")
    seed: int
    versions: dict[str, str] = Field(description="of lorasuite and the libraries")
    algorithm_version: int
    settings: dict[str, Any] = Field(description="a MigrationConfig as JSON, by the version that made the record")
    key: str | None = Field(None, description="digest of inputs by content, settings and algorithm")
    command: str = Field(description="empty where it was made by a program")

    def judge(self, gate: Gate) -> Judgement:
        """The gate's verdict on the figures, if they are those of what a server computes with the adapter."""
        return as_served(super().judge(gate), self.serving)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record that a file holds, of this version or an earlier one.

        Raises:
            CheckpointError: if it cannot be read, is no record, or was made by a later version.
        """
        content = read_json(path)
        version = content.get("schema_version", 0)
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            what = f"has the schema version {version}, and this lorasuite reads up to {SCHEMA_VERSION}"
            raise CheckpointError(Problem(str(path), what, "Upgrade lorasuite."))
        try:
            if version == SCHEMA_VERSION:
                return cls.model_validate(content)
            return cls.model_validate(_upgraded(content), extra="ignore")
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            what = f"is no record of a migration ({where + ': ' if where else ''}{first['msg']})"
            raise CheckpointError(Problem(str(path), what, "Migrate again.")) from None

    def to_json(self) -> dict[str, Any]:
        """JSON-able values, as ``migration.json`` keeps them."""
        return {"schema_version": self.schema_version, **self.model_dump(mode="json")}

    def write(self, path: Path) -> None:
        """Write ``migration.json``."""
        path.write_text(json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def check_weights(self, file: Path) -> None:
        """Compare a weight file with what this record is of, and with what was measured.

        Raises:
            AdapterError: if it is another; a record of an earlier version does not say, and nothing is compared.
        """
        measured = None if self.published.arm is None else self.weights.get(self.published.arm)
        wanted = {digest for digest in (self.weights_sha256, measured) if digest is not None}
        if wanted and wanted != {file_digest(file)}:
            what = "is not the adapter that was measured: its sha256 is not the one in the record"
            raise AdapterError(Problem(str(file), what, "Migrate again, into a new directory."))

    @property
    def gate(self) -> Gate:
        """The gate that the verdict was given by."""
        known = self.settings.get("gate") or {}
        return Gate.model_validate({name: known[name] for name in Gate.model_fields if name in known})

    @property
    def published(self) -> Published:
        """What was published."""
        tuned = self.finetune
        if tuned is None:
            moved = self.method != NOTHING
            return Published(kind="moved" if moved else "empty", transform=self.method if moved else None)
        is_new = tuned.start in (NEW_START, OWN_ROWS_START)
        taught = isinstance(self.teacher, TeacherRecord) and self.teacher.trained_on
        rejected = taught and tuned.start == OWN_ROWS_START
        synthetic: int | None = 0
        if isinstance(self.teacher, TeacherRecord) and taught and not rejected:
            # with rows beyond the cut-off it is not known which of both kinds they were
            known = not tuned.dropped or tuned.samples <= self.teacher.rows
            synthetic = min(self.teacher.rows, tuned.samples) if known else None
        return Published(
            kind="new" if is_new else "tuned",
            transform=None if is_new else tuned.start,
            samples=tuned.samples,
            synthetic=synthetic,
            rehearsed=tuned.rehearsed,
            steps=tuned.steps,
            learning_rate=tuned.learning_rate,
            synthetic_rejected=rejected,
            tried=not self.candidates or any(one.method != NOTHING for one in self.candidates),
        )

    def label(self, arm: str) -> str:
        """An arm's name in tables: the published one's says what it is."""
        return self.published.label if arm == self.published.arm else Arm(arm).label

    def reason(self, judgement: Judgement | None = None) -> str:
        """Why the verdict, or another on the same adapter, is as it is; begins with what a new LoRA is judged as."""
        given, headline = (judgement or self.verdict).reason, self.published.headline
        if self.published.transform is not None:
            return given
        return f"{headline[0].lower()}{headline[1:]}; {given}"


def _upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """A record without a schema version in the present form."""
    upgraded = {**content, "schema_version": SCHEMA_VERSION}
    for run in ("finetune", "control"):
        if content.get(run):
            upgraded[run] = {"distilled": 0, **content[run]}
    if content.get("finetune"):
        # before starts were compared, the chosen transform was the start, and a new LoRA where none was chosen
        began = NEW_START if content.get("method") == NOTHING else content.get("method")
        upgraded["finetune"].setdefault("start", began)
    if content.get("teacher"):
        # before rows could be written to choose by alone, all were trained on
        upgraded["teacher"] = {"samples": content["teacher"].get("rows", 0), "distilled": False, **content["teacher"]}
    missing = {"verdict": "unmeasured", "reason": "the version that made this record gave no verdict"}
    upgraded.setdefault("verdict", missing)
    upgraded.setdefault("rank", (content.get("adapter") or {}).get("rank"))
    return upgraded
