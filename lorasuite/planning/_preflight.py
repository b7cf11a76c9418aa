"""A checked migration: everything that would stop it, found at once before any heavy work."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorasuite.correspondence import SMALLEST_BATCH
from lorasuite.data import (
    DEFAULT_TEMPLATE,
    Row,
    Template,
    accepted,
    calibration_texts,
    draw,
    encode_rows,
    endless,
    read_prompts,
    read_rows,
    read_template,
    rows_to_jsonl,
    templated,
    unread_keys,
)
from lorasuite.errors import Problem
from lorasuite.evaluation import check_gguf, check_tasks, llama_cpp_missing
from lorasuite.planning._asked import adapter_card, check_sources, teacher_prompts, usable_rows
from lorasuite.planning._config import AUTO, NO_CANDIDATES, MigrationConfig, torch_device
from lorasuite.planning._counting import count
from lorasuite.planning._estimate import Data, unfit
from lorasuite.planning._general import GeneralTexts, general_texts
from lorasuite.planning._inspection import Inspection, inspect
from lorasuite.planning._outlook import outlook
from lorasuite.planning._policy import RowCounts, RowPlan, plan_rows, too_few_to_sweep, untaught
from lorasuite.planning._thresholds import LFT_SAMPLES, MIN_SWEEP_ROWS
from lorasuite.teacher import parsed_card
from lorasuite.training import FinetuneSettings, plan_device, start_problems
from lorasuite.transforms import transform


@dataclass
class Plan:
    """A checked migration: the texts, training rows and held-out rows it will use."""

    inspection: Inspection
    texts: list[str]
    train: list[Row]
    evaluation: list[Row]
    #: What is done with the rows, and the counts that decide it.
    rows: RowPlan
    counts: RowCounts
    #: How instruction rows became prompts.
    template: Template
    #: What the teacher answers; None: it writes from nothing, or there is none.
    prompts: list[Row] | None = None
    #: The adapter's card and training settings, as text.
    card: tuple[str, str] = ("", "")
    #: Answered rows that a template renders, not yet rendered: to see which template the adapter was trained with.
    rendered: list[Row] = field(default_factory=list)
    #: What adapters' costs of general ability are measured on.
    general: GeneralTexts = field(default_factory=GeneralTexts)


def check(config: MigrationConfig, home: Path | None = None, timed: bool = False) -> Plan:
    """Find everything that can be known to be wrong with a migration before it runs; nothing is written.

    Args:
        home: where artifacts go, whose disk they must fit on; None does not look at any disk.
        timed: also estimate seconds, which takes about one to measure this machine.

    Raises:
        PreflightError: with every problem; among them every stage that needs more memory or disk than there is.
    """
    result = _inspected(config)
    template: Template = result.attempt(lambda: read_template(config.template)) or read_template(DEFAULT_TEMPLATE)
    wanted = plan_rows(config, RowCounts())
    every_text = _calibration(result, config, template, wanted)
    texts = every_text[: config.pair.calibration_samples]
    given, measured = _drawn(result, config, wanted), _read_held_out(result, config)
    train = _training_rows(result, config, wanted, _templated(result, given, template))
    held_out = _held_out_rows(result, config, _templated(result, measured, template))
    prompts = teacher_prompts(result, config, wanted, template) if wanted.teacher_rows else None
    if not template.default and not any(row.kind == "instruction" for row in (*given, *measured)) and not prompts:
        result.notices.append(f"template {template.name}: there are no instruction rows to train on or to measure by")
    if not template.default and config.eval_tasks:
        result.notices.append(f"template {template.name}: tasks by name have prompts of their own, and do not use it")
    card = adapter_card(result, config)
    said = parsed_card(*card)
    counts = RowCounts.of(train, prompts, held_out, config.teacher.text_prefix, bool(said))
    rows = plan_rows(config, counts)
    result.notices += rows.notices
    check_sources(result, config, rows, counts, said)
    _start(result, config, rows)
    result.problems += untaught(config, rows)
    general = general_texts(result, config, template, every_text, rows.teacher_rows, [*train, *(prompts or ())])
    if config.method == AUTO and not config.tried(rows.fine_tunes) and not rows.fine_tunes:
        what = "is none, and there are no rows to train a fresh LoRA on"
        result.problems.append(Problem("candidates", what, "Give --train-data, --prompts or --teacher-samples."))
    if config.include_path is not None and not Path(config.include_path).is_dir():
        result.problems.append(Problem(config.include_path, "is not a directory", "Give one with lm-eval task files."))
    elif config.every_task:
        result.attempt(lambda: check_tasks(config.every_task, *config.task_folders, config.trust_remote_code))
    _served(result, config.serving_gguf)
    _readable(result, [*train, *held_out, *(prompts or ())])
    _output(result, Path(config.output))
    if not result.problems:
        count(
            result,
            config,
            rows,
            Data(texts, train, held_out, result.new_tokenizer, prompts or (), general=general.texts),
            home,
            adapter=True,
            timed=timed,
        )
        result.problems += unfit(result.cost)
    rendered = [row for row in given or measured if row.kind in ("instruction", "messages")]
    readers = [result.old_reader] if result.old_reader is not None else []
    result.problems += [problem for problem in endless(rendered, readers) if problem not in result.problems]
    result.raise_problems()
    rendered = accepted(rendered, readers)[0]
    return Plan(result, texts, train, held_out, rows, counts, template, prompts, card, rendered, general)


def survey(
    config: MigrationConfig, home: Path, adapter: bool = True, pair_only: bool = False, timed: bool = True
) -> Inspection:
    """What ``lorasuite inspect`` shows: two bases compared, and what every stage that these settings run would need.

    Data that no setting names is no problem here: its size is assumed, which ``cost["assumed"]`` says. Where there
    would be nothing to train on, and nobody said so, that is 100 training rows.

    Args:
        home: where artifacts go.
        adapter: whether the settings name one; without it, the stages of any adapter of rank 16 are counted.
        pair_only: count only the stages that all adapters of the pair share.
        timed: also estimate seconds, which takes about one to measure this machine.
    """
    untold = config.train_data is None and config.finetune_samples is None and config.teacher_samples is None
    if not adapter:  # the stages of any adapter are counted: none is asked for prompts
        config = config.model_copy(update={"teacher_samples": config.teacher_samples or 0})
    if untold and not pair_only and not plan_rows(config, RowCounts()).fine_tunes:
        config = config.model_copy(update={"finetune_samples": LFT_SAMPLES})
    result = _inspected(config, adapter)
    source, train, held_out = config.calibration_data, config.train_data, config.eval_data
    data = Data(tokenizer=result.new_tokenizer)
    every_text: list[str] = []
    template: Template = result.attempt(lambda: read_template(config.template)) or read_template(DEFAULT_TEMPLATE)
    if source is not None:
        reading = (source, result.new_tokenizer, config.renamed_columns)
        every_text = result.attempt(lambda: calibration_texts(*reading, template=template)) or []
        data.texts = every_text[: config.pair.calibration_samples]
        result.outlook = outlook()
    wanted = plan_rows(config, RowCounts())
    if train is not None:
        read = result.attempt(lambda: read_rows(train, config.renamed_columns)) or []
        data.train = _templated(result, draw(read, wanted.requested_rows, config.seed), template)
    prompts = config.prompt_data if wanted.teacher_rows else config.prompts
    if prompts is not None:
        data.prompts = result.attempt(lambda: read_prompts(prompts, config.renamed_columns, template)) or []
    if held_out is not None:
        data.evaluation = _templated(result, _read_held_out(result, config), template)
    if not pair_only and (config.general_texts is not None or len(every_text) > len(data.texts)):
        read = [*data.train, *data.prompts]
        data.general = general_texts(result, config, template, every_text, wanted.teacher_rows, read).texts
    if not result.problems:
        card, words = parsed_card(*adapter_card(result, config)), config.teacher.text_prefix
        counts = RowCounts.of(data.train, data.prompts or None, data.evaluation, words, bool(card))
        rows = plan_rows(config, counts if train is not None else replace(counts, own=None))
        if adapter:
            check_sources(result, config, rows, counts, card)
            result.problems += untaught(config, rows)
        count(result, config, rows, data, home, not pair_only, timed)
    return result


def fits(config: MigrationConfig, home: Path) -> None:
    """Find what of the stages that a pair is prepared by cannot fit on this machine.

    Raises:
        PreflightError: with every stage that needs more memory or disk than there is, and every other problem.
    """
    if config.method == AUTO:
        config = config.model_copy(update={"candidates": tuple(config.prepared) or NO_CANDIDATES})
    result = survey(config, home, adapter=False, pair_only=True, timed=False)
    if not result.problems:
        result.problems += unfit(result.cost)
    result.raise_problems()


def _inspected(config: MigrationConfig, adapter: bool = True) -> Inspection:
    trains = plan_rows(config, RowCounts()).fine_tunes
    result = inspect(
        config.old_base,
        config.new_base,
        config.adapter if adapter else None,
        config.method,
        config.trust_remote_code,
        config.allow_pickle,
        config.output_type,
        architectures=config.architectures,
        trains=trains,
        texts=config.calibration_data is not None,
        candidates=config.tried(trains),
        mapped=config.maps_layers,
    )
    device = result.attempt(lambda: torch_device(config.device))
    if device is not None:
        result.attempt(lambda: config.loading.check(device))
        if config.loading.device_map == "auto" and device == "cpu":
            result.notices.append("device_map auto not used: the device is cpu, and a base is loaded whole into RAM")
        if trains:
            result.attempt(lambda: plan_device(config.finetune, device))
    return result


def _calibration(result: Inspection, config: MigrationConfig, template: Template, wanted: RowPlan) -> list[str]:
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
        apart = depths[0] != depths[1] and not config.maps_layers
        if apart and _goes_without(config, wanted):
            told = "a fresh LoRA is trained, no transform that moves layers is tried, the record pairs them by place"
            result.notices.append(f"no calibration texts, and {depths[0]} and {depths[1]} layers: {told}")
        elif apart:
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
    texts: list[str] = (
        result.attempt(
            lambda: calibration_texts(
                source, result.new_tokenizer, config.renamed_columns, config.skip_refused_rows, template
            )
        )
        or []
    )
    if texts and len(texts) < SMALLEST_BATCH:
        result.problems.append(
            Problem(source, f"has {len(texts)} texts", f"Layers are compared on at least {SMALLEST_BATCH}: add some.")
        )
    return texts


def _goes_without(config: MigrationConfig, wanted: RowPlan) -> bool:
    """Whether ``auto`` has rows to train a fresh LoRA on, and nobody named a transform to compare it with."""
    return config.method == AUTO and wanted.fine_tunes and config.candidates in ((), NO_CANDIDATES)


def _unread(result: Inspection, subject: str, rows: list[Row]) -> None:
    """A notice of keys that nothing reads."""
    keys = ", ".join(f"{key!r} (in {count})" for key, count in unread_keys(rows).items())
    if keys:
        result.notices.append(f"{subject}: not read: {keys}")


def _templated(result: Inspection, rows: list[Row], template: Template) -> list[Row]:
    return result.attempt(lambda: templated(rows, template)) or []


def _drawn(result: Inspection, config: MigrationConfig, wanted: RowPlan) -> list[Row]:
    """The training rows as they are in their file."""
    source, samples = config.train_data, wanted.requested_rows
    if source is None:
        if samples:
            result.problems.append(
                Problem(
                    "finetune_samples",
                    f"is {samples}, and there is no training data",
                    "Give --train-data, or --finetune-samples 0.",
                )
            )
        return []
    if not samples:
        return []
    return draw(result.attempt(lambda: read_rows(source, config.renamed_columns)) or [], samples, config.seed)


def _training_rows(result: Inspection, config: MigrationConfig, wanted: RowPlan, rows: list[Row]) -> list[Row]:
    """The training rows as they are used, checked."""
    if not rows:
        return []
    _unread(result, "training rows", rows)
    rows = usable_rows(result, config, "training rows", rows, [result.new_tokenizer])
    if len(config.learning_rates) > 1 and len(rows) + wanted.synthetic_train_rows < MIN_SWEEP_ROWS:
        result.problems.append(too_few_to_sweep(len(rows), "learning_rates"))
    tokenizer = result.new_tokenizer
    if tokenizer is not None and rows:
        result.attempt(lambda: encode_rows(rows, tokenizer, config.finetune.cutoff))
    return rows


def _start(result: Inspection, config: MigrationConfig, rows: RowPlan) -> None:
    """Whether a fresh LoRA can start as it is told to, and whether one is trained."""
    init = config.finetune.init
    if init == FinetuneSettings.model_fields["init"].default:
        return
    if not rows.fine_tunes or not (rows.trains_control or config.method == AUTO):
        result.notices.append(f"finetune.init: no fresh LoRA is trained here, which alone could start from {init}")
        return
    result.problems += start_problems(
        init,
        dora=result.opened is not None and bool(result.opened.config.get("use_dora")),
        quantized=bool(config.loading.quantized),
        transposed=result.new is not None and any(m.transposed for m in result.new.architecture.modules),
    )


def _served(result: Inspection, gguf: str | None) -> None:
    """Whether the published adapter can be run in llama.cpp, where that is asked for."""
    if gguf is None:
        return
    result.attempt(lambda: check_gguf(Path(gguf)))
    why = llama_cpp_missing()
    if why is not None:
        result.notices.append(f"serving_gguf: the adapter is not run in llama.cpp, whose rules are read: {why}")


def _read_held_out(result: Inspection, config: MigrationConfig) -> list[Row]:
    """The held-out rows as they are in their file."""
    source = config.eval_data
    if source is None:
        return []
    return result.attempt(lambda: read_rows(source, config.renamed_columns)) or []


def _held_out_rows(result: Inspection, config: MigrationConfig, rows: list[Row]) -> list[Row]:
    """The held-out rows as they are used, checked."""
    _unread(result, "held-out rows", rows)
    return usable_rows(result, config, "held-out rows", rows, [result.old_reader, result.new_tokenizer])


def _readable(result: Inspection, rows: list[Row]) -> None:
    """Rows that spell out tokens of the adapter's own tokenizer that the old base has no embedding for."""
    if result.own_tokenizer is None or result.old is None:
        return
    beyond = result.own_tokenizer.beyond(result.old.dims.vocab_size)
    texts = [rows_to_jsonl([row]).decode() for row in rows] if beyond else []
    for token in beyond:
        if holding := sum(token in text for text in texts):
            what = f"{holding} rows hold {token!r}, which the old base has no embedding for"
            result.problems.append(Problem(str(result.own_tokenizer.folder), what, "Leave it out of the rows."))


def _output(result: Inspection, output: Path) -> None:
    try:
        output.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # too long, a loop of links, or a zero byte
        why = getattr(error, "strerror", None) or str(error)
        result.problems.append(Problem(str(output), f"is no place for a directory ({why})", "Give another output."))
        return
    else:
        result.problems.append(Problem(str(output), "exists already", "Give a new directory: nothing is overwritten."))
    parent = next((p for p in output.absolute().parents if p.exists()), None)
    if parent is not None and parent.is_file():
        result.problems.append(Problem(str(parent), "is a file, not a directory", "Give another output."))
    elif parent is not None and shutil.disk_usage(parent).free < 64 * 2**20:
        result.problems.append(Problem(str(parent), "has less than 64 MiB free", "Free some space."))
