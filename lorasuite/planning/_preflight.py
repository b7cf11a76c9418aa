"""A checked migration: everything that would stop it, found at once before any heavy work."""

from __future__ import annotations

import contextlib
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from lorasuite.bases import Checkpoint
from lorasuite.correspondence import SMALLEST_BATCH
from lorasuite.data import Row, calibration_texts, draw, encode_rows, read_prompts, read_rows, unanswered
from lorasuite.errors import LoRASuiteError, Problem
from lorasuite.evaluation import check_tasks
from lorasuite.planning._config import AUTO, MigrationConfig, torch_device
from lorasuite.planning._inspection import FLOAT, Inspection, _attempt, inspect
from lorasuite.teacher import prompt_frame
from lorasuite.training import MIN_SWEEP_ROWS
from lorasuite.transforms import transform

#: Training rows below which the teacher's were measured to help everywhere (docs/transfer.md).
FEW = 100


@dataclass
class Plan:
    """A checked migration: the texts, training rows and held-out rows it will use."""

    inspection: Inspection
    texts: list[str]
    train: list[Row]
    evaluation: list[Row]
    #: What the teacher answers; None: it writes from nothing, or there is none.
    prompts: list[Row] | None = None


def check(config: MigrationConfig) -> Plan:
    """Everything that can be known to be wrong with a migration, found at once, with nothing written.

    Raises:
        PreflightError: with every problem.
    """
    result = inspect(
        config.old_base,
        config.new_base,
        config.adapter,
        config.method,
        config.trust_remote_code,
        config.allow_pickle,
        config.output_type,
    )
    _attempt(result, lambda: torch_device(config.device))
    texts = _calibration(result, config)
    train = _training_rows(result, config)
    held_out = _held_out_rows(result, config)
    prompts = _teacher(result, config) if config.rows_written else None
    if config.include_path is not None and not Path(config.include_path).is_dir():
        result.problems.append(Problem(config.include_path, "is not a directory", "Give one with lm-eval task files."))
    elif config.eval_tasks:
        _attempt(result, lambda: check_tasks(config.eval_tasks, *config.task_folders))
    _output(result, Path(config.output))
    result.raise_problems()
    return Plan(result, texts, train, held_out, prompts)


def _calibration(result: Inspection, config: MigrationConfig) -> list[str]:
    source = config.calibration_data
    if source is None and config.method != AUTO and transform(config.method).reads_texts:
        result.problems.append(
            Problem(
                "calibration", f"{config.method} compares activations, and there are no texts", "Give --calibration."
            )
        )
        return []
    depths = next(((row["old"], row["new"]) for row in result.factors if row["name"] == "layers"), (0, 0))
    if source is None:
        if depths[0] != depths[1] and config.pair.layer_strategy == "dp":
            result.problems.append(
                Problem(
                    "calibration",
                    f"the depths differ ({depths[0]} and {depths[1]}) and there are no texts to compare layers with",
                    "Give --calibration (any text both models should read), or --layer-strategy first|middle|last.",
                )
            )
        elif depths[0] == depths[1]:
            result.notices.append("no calibration texts: layers are mapped one to one, without similarities")
        return []
    texts: list[str] = _attempt(result, lambda: calibration_texts(source, result.new_tokenizer)) or []
    if texts and len(texts) < SMALLEST_BATCH:
        result.problems.append(
            Problem(source, f"has {len(texts)} texts", f"Layers are compared on at least {SMALLEST_BATCH}: add some.")
        )
    return texts[: config.pair.calibration_samples]


def _training_rows(result: Inspection, config: MigrationConfig) -> list[Row]:
    source = config.train_data
    if source is None:
        if config.samples:
            result.problems.append(
                Problem(
                    "finetune_samples",
                    f"is {config.samples}, and there is no training data",
                    "Give --train-data, or --finetune-samples 0.",
                )
            )
        return []
    if not config.samples:
        return []
    rows: list[Row] = draw(_attempt(result, lambda: read_rows(source)) or [], config.samples, config.seed)
    if not rows:
        return []
    if len(rows) < config.samples:
        result.notices.append(f"only {len(rows)} training rows for {config.samples} samples: all are used")
    if len(rows) < FEW and config.method == AUTO and config.teacher_samples is None and not config.written:
        result.notices.append(
            f"{len(rows)} training rows are few: with --prompts or --teacher-imitate the old base with its adapter "
            "writes more"
        )
    if len(config.learning_rates) > 1 and len(rows) + config.written < MIN_SWEEP_ROWS:
        result.problems.append(
            Problem(
                "learning_rates",
                f"a sweep holds out a fifth of the training rows, and there are only {len(rows)}",
                f"Give one learning rate, or at least {MIN_SWEEP_ROWS} rows.",
            )
        )
    tokenizer = result.new_tokenizer
    if tokenizer is not None:
        _attempt(result, lambda: encode_rows(rows, tokenizer, config.finetune.cutoff))
    return rows


def _teacher(result: Inspection, config: MigrationConfig) -> list[Row] | None:
    """What the old base with the adapter is to answer; None where nobody says."""
    with contextlib.suppress(LoRASuiteError):  # what cannot be read has been noted
        old = Checkpoint(config.old_base)
        result.memory["teacher"] = FLOAT * sum(math.prod(shape) for shape in old.shapes().values())
    tokenizer = result.old_tokenizer
    if tokenizer is not None and tokenizer.eos_token_id is None:
        result.problems.append(
            Problem(
                config.old_base, "its tokenizer has no EOS token", "The teacher's rows need one to end with: set it."
            )
        )
    if config.teacher_samples is None and config.written:
        result.notices.append(
            f"the old base with its adapter writes up to {config.written} rows, on which the new base is fine-tuned: "
            "--teacher-samples 0 keeps it from that"
        )
    source = config.prompt_data
    if source is None:
        if not config.teacher.suffix:
            result.notices.append(
                "no prompts for the teacher: it writes from nothing, which suits adapters of running text"
            )
        return None
    rows: list[Row] = _attempt(result, lambda: read_prompts(source)) or []
    words = config.teacher.text_prefix
    distinct = set()
    for number, row in enumerate(rows, start=1):
        prompt = unanswered(row, words)
        if prompt in distinct:
            continue
        distinct.add(prompt)
        if tokenizer is not None and row.kind == "messages" and getattr(tokenizer, "chat_template", None) is None:
            what = f"prompt {number} is a conversation, and the old base's tokenizer has no chat template"
            result.problems.append(Problem(source, what, "Use rows of prompt and completion."))
            break
    fewer = len(distinct) < config.rows_written
    if rows and fewer and config.teacher.imitate and not config.teacher.suffix:
        _attempt(result, lambda: prompt_frame(distinct))
    elif rows and config.teacher.temperature == 0 and len(distinct) < config.written:
        found = f"{len(distinct)} different prompts for {config.written} teacher samples"
        result.notices.append(f"{found}: greedy, there is one answer each")
    return rows or None


def _held_out_rows(result: Inspection, config: MigrationConfig) -> list[Row]:
    source = config.eval_data
    if source is None:
        return []
    rows: list[Row] = _attempt(result, lambda: read_rows(source)) or []
    tokenizers = [t for t in (result.old_tokenizer, result.new_tokenizer) if t is not None]
    _attempt(result, lambda: [row.target(tokenizer) for tokenizer in tokenizers for row in rows])
    return rows


def _output(result: Inspection, output: Path) -> None:
    if output.exists():
        result.problems.append(Problem(str(output), "exists already", "Give a new directory: nothing is overwritten."))
    parent = next((p for p in output.absolute().parents if p.exists()), None)
    if parent is not None and parent.is_file():
        result.problems.append(Problem(str(parent), "is a file, not a directory", "Give another output."))
    elif parent is not None and shutil.disk_usage(parent).free < 64 * 2**20:
        result.problems.append(Problem(str(parent), "has less than 64 MiB free", "Free some space."))
