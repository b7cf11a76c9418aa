"""Settings of a migration: one model, from which command-line flags and ``--config`` files both derive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from lorasuite import transforms
from lorasuite.adapters import OutputType
from lorasuite.bases import LoadSettings
from lorasuite.correspondence import POSITIONS, Metric, Pooling, Strategy, When
from lorasuite.data import DEFAULT_TEMPLATE, known_templates, parse_columns
from lorasuite.errors import ConfigError, Problem, did_you_mean
from lorasuite.evaluation import EvaluationSettings, Gate, GeneralSettings
from lorasuite.planning._reading import Strict
from lorasuite.planning._thresholds import DEFAULT_SYNTHETIC_ROWS, LFT_SAMPLES, MOST_SYNTHETIC_ROWS, SELECTION_ROWS
from lorasuite.teacher import HANDFUL, TeacherSettings
from lorasuite.training import MOST_COMPARED, Effort, FinetuneSettings, SecondStep
from lorasuite.transforms import Unmapped

#: ``--method auto`` measures every transform and takes the best, or none.
AUTO = "auto"
#: ``candidates`` of an ``auto`` that tries no transform, and of one that tries all.
NO_CANDIDATES, ALL_CANDIDATES = ("none",), ("all",)
#: What ``auto`` tries, unless told otherwise, where there are rows to train on: between real models of different
#: families no other was ahead of a fresh LoRA on the same rows (docs/evidence.md).
TRIED = ("copy",)


class PairSettings(Strict):
    """What the pair's artifacts depend on, beside the two bases and the calibration texts."""

    calibration_samples: int = Field(256, ge=4, description="calibration texts read at most")
    calibration_cutoff: int = Field(256, ge=1, description="tokens of a calibration text read at most")
    pooling: Pooling = Field("mean", description="one vector an example: mean over its tokens, or the last one")
    cka_batch: int = Field(64, ge=4, description="examples a CKA minibatch")
    similarity: Metric = Field("cka", description="layer similarity: cka, cca, pwcca or procrustes")
    layer_strategy: Strategy = Field("dp", description="layer map: dp (Algorithm 1), first, middle or last")
    max_offset: int | None = Field(None, ge=0, description="largest shift of a layer; the difference in depth if unset")
    map_positions: int = Field(
        POSITIONS, ge=2, description="aligned positions that wide spaces are mapped by, all if there are fewer"
    )
    head_matching: bool = Field(True, description="match heads by similarity; off maps head a to head a")
    transfer_matrix: When = Field("auto", description="W_h: auto (only where hidden sizes differ), always or never")


class MigrationConfig(Strict):
    """One adapter from one base to another."""

    adapter: str = Field(
        description="PEFT adapter: directory or hub-id[@revision], hub-id/folder for one inside; "
        "several, with optional weights, as A:0.7,B:0.3"
    )
    old_base: str = Field(description="base model it was trained on: directory or hub-id[@revision]")
    new_base: str = Field(description="base model to move it to: directory or hub-id[@revision]")
    output: str = Field(description="directory to create")
    calibration: str | None = Field(None, description="texts for the layer map; the training data if unset")
    train_data: str | None = Field(
        None,
        description="rows for the light fine-tune (LFT): a file, a save_to_disk folder, or "
        "hf://org/name[@revision][/config][:split]",
    )
    finetune_samples: int | None = Field(
        None, ge=0, description=f"training rows used; {LFT_SAMPLES} where there is training data, else 0"
    )
    teacher_samples: int | None = Field(
        None,
        ge=0,
        description="rows for LFT that the old base with the adapter writes, without labels, beside the above; if "
        f"unset {DEFAULT_SYNTHETIC_ROWS} with auto where it is told prompts and training rows are fewer than "
        f"{SELECTION_ROWS}, up to {MOST_SYNTHETIC_ROWS} where so many prompts are given, else 0",
    )
    prompts: str | None = Field(
        None,
        description="rows whose prompts the teacher answers, their answers never read; if unset those of the training "
        "data, else beginnings of the calibration texts, else the teacher writes from nothing; with 0 teacher samples "
        "auto and sequential read the answers, and auto chooses by them, where training rows are few",
    )
    describe: str | None = Field(
        None,
        max_length=2000,
        description="a sentence that says what the adapter does, such as: intent of a bank customer's message. The old "
        "base writes prompts for it, and the adapter's effect on their answers chooses among them",
    )
    prompt_sources: tuple[str, ...] = Field(
        (),
        description="where prompts come from that are not given: examples (a few of --prompts), description, card, "
        f"adapter; if unset the best there is something for, where at most {HANDFUL} prompts are given, a task is "
        "described, or auto is given nothing at all",
    )
    template: str = Field(
        DEFAULT_TEMPLATE,
        description="how instruction rows become prompts, of training, teacher and evaluation: "
        f"{', '.join(known_templates())}, or a Jinja file over instruction, input and output",
    )
    eval_data: str | None = Field(None, description="held-out rows for evaluation")
    columns: tuple[str, ...] = Field(
        (),
        description="fields of rows that the data calls otherwise: prompt=text,completion=label. Of all data; texts "
        "for calibration may have them or not",
    )
    skip_refused_rows: bool = Field(
        False, description="leave out conversations that a chat template refuses, with a notice; else they are an error"
    )
    eval_tasks: tuple[str, ...] = Field(
        (), description="lm-eval tasks, by name; the paper's are lorasuite_math and lorasuite_commonsense"
    )
    eval_dir: str | None = Field(
        None, description="rows of the paper's tasks, as <task>/test.json (LLM-Adapters); the Hub if unset"
    )
    include_path: str | None = Field(None, description="directory of lm-eval task files, searched for --eval-tasks")
    general_texts: str | None = Field(
        None,
        description="texts that have nothing to do with the adapter's task, to measure what adapters cost of general "
        "ability on; if unset, calibration texts beyond those that are read where there are enough, else not measured",
    )
    general_task: str | None = Field(
        None, description="an lm-eval task, by name, on which the same is measured; not measured if unset"
    )
    serving_gguf: str | None = Field(
        None,
        description="GGUF file of the new base, as llama.cpp serves it: the new adapter is converted and answers rows "
        "in it, too, where llama.cpp's binding (lorasuite[llamacpp]) and converter (LLAMA_CPP in the environment) are",
    )
    method: str = Field(
        AUTO,
        description="transform to use, or auto: whatever does best of a fresh LoRA and candidates, by held-out rows",
    )
    candidates: tuple[str, ...] = Field(
        (),
        description="with auto: the transforms that are tried beside a fresh LoRA: names, all (that fit), or none; if "
        f"unset {', '.join(TRIED)} where it fits, and all where there are no rows to train on",
    )
    rank: int | None = Field(None, ge=1, description="rank of the new adapter; the old one's if unset")
    energy: float | None = Field(
        None, gt=0, le=1, description="in place of rank: the smallest at which every module keeps this share of ‖ΔW‖²"
    )
    output_type: OutputType = Field(
        "lora", description="what is written: lora (a DoRA stays a DoRA), or adalora, with each module's own rank"
    )
    unmapped: Unmapped = Field("freeze", description="new layers without a partner: left out, or a fresh LoRA")
    controls: bool = Field(True, description="also fine-tune a fresh LoRA on the same rows, as the control")
    learning_rates: tuple[float, ...] = Field(
        (),
        description="sweep these for LFT and control alike, chosen on a held-out fifth of the training rows; one: no "
        "choice; if unset, auto searches start and rate together (effort)",
    )
    effort: Effort = Field(
        "normal",
        description="of auto where no learning rate is named, in fine-tunes on the same rows: quick, one; normal, up "
        f"to two and a half; thorough, up to eight; of more than {MOST_COMPARED} rows only the last of them reads all",
    )
    rehearsal: float = Field(
        0.0625,
        ge=0,
        le=1,
        description="texts that the bare new base writes itself, by training row, read beside the rows so that it "
        "forgets less of what it could before; 0: none",
    )
    second_step: SecondStep = Field(
        "none",
        description="after the fine-tune on rows that the teacher wrote: on-policy (the new base answers, the teacher "
        "judges) or cached (the teacher's distributions on its rows); kept where held-out rows say so",
    )
    second_step_epochs: float = Field(3, gt=0, description="of the second step: passes over the rows or their prompts")
    second_step_rate: float = Field(
        1.0, gt=0, description="of the second step: learning rate, in units of the first one's"
    )
    starts: int = Field(
        2,
        ge=1,
        description="with auto and named learning_rates: transforms swept beside a fresh LoRA, best in a short "
        "fine-tune; the best of all is published",
    )
    seed: int = Field(42, ge=0, lt=2**32, description="of the row draw, fresh initialisations and fine-tuning")
    device: str = Field("auto", description="cpu, cuda, cuda:N, or auto")
    trust_remote_code: bool = Field(False, description="let model repositories run their own code")
    allow_pickle: bool = Field(False, description="read adapter_model.bin, a pickle file, with weights_only")
    architectures: str | None = Field(None, description="directory of architecture files of your own")
    loading: LoadSettings = LoadSettings()
    pair: PairSettings = PairSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    teacher: TeacherSettings = TeacherSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    general: GeneralSettings = GeneralSettings()
    gate: Gate = Gate()

    @model_validator(mode="before")
    @classmethod
    def _one_seed(cls, values: Any) -> Any:
        """The migration's seed is the fine-tune's too, unless that has its own."""
        if not isinstance(values, dict):
            return values
        tuning = values.get("finetune", {})
        if isinstance(tuning, dict) and "seed" not in tuning:
            values = {**values, "finetune": {**tuning, "seed": values.get("seed", cls.model_fields["seed"].default)}}
        return values

    @model_validator(mode="after")
    def _rank_or_energy(self) -> MigrationConfig:
        if self.rank is not None and self.energy is not None:
            raise ValueError("give rank or energy, not both")
        return self

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value == AUTO:
            return value
        known = [AUTO, *transforms.names()]
        if value not in (*known, *transforms.names(controls=True)):
            raise ValueError(f"unknown method {value!r}. {did_you_mean(value, known)}")
        return value

    @field_validator("candidates")
    @classmethod
    def _known_candidates(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value in (NO_CANDIDATES, ALL_CANDIDATES):
            return value
        known = transforms.names()
        for name in value:
            if name not in (*known, *transforms.names(controls=True)):
                words = [*known, *ALL_CANDIDATES, *NO_CANDIDATES]
                raise ValueError(f"unknown transform {name!r}. {did_you_mean(name, words)}")
        return value

    @model_validator(mode="after")
    def _candidates_of_auto(self) -> MigrationConfig:
        if self.candidates and self.method != AUTO:
            raise ValueError(f"candidates are what --method auto tries, and the method is {self.method}")
        return self

    @field_validator("describe")
    @classmethod
    def _says_something(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("says nothing: give a sentence, or leave it out")
        return value

    @field_validator("prompt_sources")
    @classmethod
    def _known_sources(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value:
            from lorasuite.teacher import source_names  # which loads torch

            for name in value:
                if name not in source_names(controls=True):
                    raise ValueError(f"unknown source of prompts {name!r}. {did_you_mean(name, source_names())}")
            if len(set(value)) < len(value):
                raise ValueError("a source is named twice")
        return value

    @field_validator("columns", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        """A mapping is as good as a list of pairs, in a file of settings."""
        return tuple(f"{field}={column}" for field, column in value.items()) if isinstance(value, dict) else value

    @field_validator("columns")
    @classmethod
    def _known_fields(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        parse_columns(value)
        return value

    @field_validator("learning_rates")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not rate > 0 for rate in value):
            raise ValueError("learning rates must be positive")
        return value

    def tried(self, trains: bool) -> list[str]:
        """The transforms that ``auto`` tries, of those that fit the bases and the adapter; plugins among them.

        Args:
            trains: whether there are rows to train a fresh LoRA on.
        """
        if self.candidates == NO_CANDIDATES:
            return []
        if self.candidates == ALL_CANDIDATES or not (self.candidates or trains):
            return transforms.names()
        return list(self.candidates or TRIED)

    @property
    def prepared(self) -> list[str]:
        """The transforms that a pair is prepared for: adapters to come are taken to have rows to train on."""
        return self.tried(True) if self.method == AUTO else [self.method]

    @property
    def every_task(self) -> tuple[str, ...]:
        """Every lm-eval task by name, that of general ability last."""
        return tuple(dict.fromkeys([*self.eval_tasks, *filter(None, [self.general_task])]))

    @property
    def task_folders(self) -> tuple[Path | None, Path | None]:
        """Where tasks find rows and task files: ``eval_dir`` and ``include_path``."""
        return (
            Path(self.eval_dir) if self.eval_dir else None,
            Path(self.include_path) if self.include_path else None,
        )

    @property
    def renamed_columns(self) -> dict[str, str]:
        """The fields of rows that the data calls otherwise, each with its column."""
        return parse_columns(self.columns)

    @property
    def prompt_data(self) -> str | None:
        """Where the teacher's prompts come from."""
        # where the old base writes the prompts, general texts are none
        written = self.teacher.suffix or self.describe or self.prompt_sources or self.says_nothing
        return self.prompts or self.train_data or (None if written else self.calibration)

    @property
    def says_nothing(self) -> bool:
        """Whether ``auto`` is told nothing of the adapter's task, nor how many rows to have written."""
        told = self.prompts or self.train_data or self.describe or self.prompt_sources
        framed = self.teacher.imitate or self.teacher.prefix or self.teacher.suffix
        return self.method == AUTO and self.teacher_samples is None and not (told or framed)

    @property
    def may_read_card(self) -> bool:
        """Whether prompts may come from the adapter's card."""
        return "card" in self.prompt_sources if self.prompt_sources else self.says_nothing

    @property
    def maps_layers(self) -> bool:
        """Whether layers are mapped where the depths differ: by texts, or by place (``layer_strategy``)."""
        return self.calibration_data is not None or self.pair.layer_strategy != "dp"

    @property
    def calibration_data(self) -> str | None:
        """Where calibration texts come from."""
        return self.calibration or self.train_data


def torch_device(name: str) -> str:
    """``auto`` made definite.

    Raises:
        ConfigError: for a device this machine does not have.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (index.isascii() and index.isdigit())):
        raise ConfigError(Problem("device", f"unknown device {name!r}", "Use cpu, cuda, cuda:N or auto."))
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            Problem("device", f"{name!r} is not there ({torch.cuda.device_count()} CUDA devices)", "Use cpu or auto.")
        )
    return name
