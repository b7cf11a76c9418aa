"""What a migration would need here, stage by stage: seconds, RAM, GPU memory and disk, beside what this machine has.

Operations and bytes are counted (:mod:`lorasuite.planning._cost`) and divided by what a short measurement found
(:class:`Throughput`). An estimate, meant to be within a factor of two on real models when nothing else runs
(``benchmarks/estimate.py`` compares); models of a few million weights take longer, for what a call costs then counts.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from lorasuite.adapters import Adapter, weight_shape
from lorasuite.bases import ROLES, Checkpoint, Role, known_dtype
from lorasuite.data import DEFAULT_TEMPLATE, IGNORED, Row, encode_rows, known_templates
from lorasuite.errors import LoRASuiteError, Problem
from lorasuite.evaluation import BEYOND_LONGEST
from lorasuite.planning._candidates import usable
from lorasuite.planning._config import AUTO, MigrationConfig
from lorasuite.planning._cost import HALF, Cost, Shape, Work
from lorasuite.planning._cost_adapter import NEW_STAGES, adapter_costs, kept_loaded
from lorasuite.planning._cost_pair import pair_costs
from lorasuite.planning._machine import Machine, Throughput
from lorasuite.planning._policy import RowPlan
from lorasuite.teacher import ROWS as TEMPLATE_ROWS
from lorasuite.training import EXTENTS, MOST_COMPARED, base_dtype, texts_beside

#: Texts or rows that are tokenized to learn how long they are.
SAMPLED = 64
#: Tokens of an answer that the teacher has yet to write.
ANSWER_TOKENS = 32
#: What is over this share of all there is of a resource cannot fit, whatever is freed.
MARGIN = 1.25
#: Arms measured on the old base (bare, and with its adapter), and on the new one without a fine-tune.
OLD_ARMS, NEW_ARMS = 2, 2


@dataclass
class Data:
    """What is known of a run's data: texts and rows that were read, with the tokenizer of the new base, or nothing."""

    texts: Sequence[str] = ()
    train: Sequence[Row] = ()
    evaluation: Sequence[Row] = ()
    tokenizer: Any = None
    #: Rows without answers, which the old base with its adapter answers.
    prompts: Sequence[Row] = ()
    #: Texts that adapters' costs of general ability are measured on.
    general: Sequence[str] = ()
    #: What had to be assumed.
    assumed: list[str] = field(default_factory=list)


def planned_work(
    config: MigrationConfig,
    old: Checkpoint,
    new: Checkpoint,
    adapter: Adapter | None,
    device: str,
    rows: RowPlan,
    data: Data,
    nothing_moves: bool = False,
) -> Work:
    """What the settings would run, as counts; what is not known is assumed at its default, and said in
    ``data.assumed``.

    Args:
        nothing_moves: whether nothing of the adapter has a counterpart in the new base: no transform is tried.
    """
    roles: tuple[Role, ...] = ROLES if adapter is None else tuple(adapter.roles(old.architecture))
    if adapter is None:
        data.assumed.append("an adapter of every linear module, rank 16")
    gpu = device != "cpu"
    item, run_item, training_item = weight_items(config, device, rows.fine_tunes, (old, new))
    text_tokens, texts = float(config.pair.calibration_cutoff), len(data.texts)
    if data.texts and data.tokenizer is not None:
        text_tokens = _mean_tokens(data.tokenizer, data.texts, config.pair.calibration_cutoff)
    elif not data.texts and config.calibration_data is None:
        texts = config.pair.calibration_samples
        data.assumed.append(f"{texts} calibration texts of {config.pair.calibration_cutoff} tokens")
    methods = [config.method]
    if config.method == AUTO:
        plain, trains = adapter is None or adapter.plain(old.architecture), rows.fine_tunes
        wanted = [] if nothing_moves else config.tried(trains)
        methods = usable(
            wanted, old, new, roles, plain=plain, texts=texts > 0, trains=trains, mapped=config.maps_layers
        )
    row_tokens, label_tokens = _row_tokens(config, data)
    trained = rows.own_rows + rows.synthetic_train_rows
    if rows.own_rows and not data.train:
        data.assumed.append(f"{rows.own_rows} training rows of {row_tokens:.0f} tokens")
    tuning = rows.tuned(config).finetune
    epochs = tuning.passes if tuning.max_steps is None else tuning.max_steps * tuning.batch_size / max(trained, 1)
    searched = screened = 0.0
    control = rows.trains_control and bool(methods)  # where no transform is tried, the run that is published is it
    if rows.searches:
        compared = min(MOST_COMPARED / max(trained, 1), 1.0)
        searched, fine_tunes = 1 + (EXTENTS[config.effort].budget - 1) * compared, float(control)
    else:
        starts = 1 + control + (config.starts - 1 if rows.compares_starts else 0)
        fine_tunes = float(starts * max(len(rows.rates), 1))
        if rows.compares_starts and len(methods) > config.starts:
            screened = len(methods) / 4
    return Work(
        roles=roles,
        methods=tuple(methods),
        experts=adapter is not None and bool(adapter.experts(old.architecture)),
        rank=config.rank or (16 if adapter is None else adapter.rank),
        dense=() if adapter is None or adapter.stored else tuple(_dense(old, adapter)),
        gpu=gpu,
        item=item,
        run_item=run_item,
        training_item=training_item,
        texts=texts,
        text_tokens=text_tokens,
        map_positions=config.pair.map_positions,
        cka_batch=config.pair.cka_batch,
        rows=trained,
        row_tokens=row_tokens,
        label_tokens=label_tokens,
        epochs=epochs,
        batch=tuning.batch_size,
        micro_batch=tuning.micro_batch_size if isinstance(tuning.micro_batch_size, int) else None,
        checkpointing=None if tuning.gradient_checkpointing == "auto" else tuning.gradient_checkpointing,
        fine_tunes=fine_tunes,
        screened=screened,
        searched=searched,
        rehearsal=texts_beside(config.rehearsal, trained),
        chosen_by=max(rows.selection_rows, trained // 5) if config.method == AUTO else 0,
        fitted_rows=_fitted(config, data),
        teacher_rows=rows.teacher_rows,
        teacher_tokens=min(label_tokens, config.teacher.max_new_tokens),
        teacher_batch=config.teacher.batch_size,
        synthetic_rows=rows.synthetic_train_rows,
        prompt_sources=len(rows.prompt_sources),
        examples="examples" in rows.prompt_sources,
        soft_labels=tuning.distillation > 0,
        token_weights=tuning.token_weights != "none",
        second_step=config.second_step,
        second_step_epochs=config.second_step_epochs,
        evaluation_rows=min(len(data.evaluation), config.evaluation.limit or len(data.evaluation)),
        evaluation_new_tokens=_new_tokens(config, data) if config.evaluation.generate else 0,
        evaluation_batch=config.evaluation.batch_size,
        general_texts=len(data.general),
        general_tokens=_mean_tokens(data.tokenizer, data.general, sys.maxsize)
        if data.general and data.tokenizer is not None
        else 0.0,
        old_arms=OLD_ARMS,
        new_arms=NEW_ARMS + rows.fine_tunes + rows.trains_control,
    )


def weight_items(
    config: MigrationConfig, device: str, trains: bool, bases: Sequence[Checkpoint]
) -> tuple[float, float, float]:
    """Bytes of a weight where a pair's texts are read, where models are run, and where they are fine-tuned: of the
    wider base.

    Args:
        trains: whether there are rows to fine-tune on; without, no setting of the fine-tune is looked at.
    """
    dtypes = [known_dtype(base.path, torch.device(device)) for base in bases]
    item = max(HALF if dtype is None else float(dtype.itemsize) for dtype in dtypes)
    if config.loading.quantized:
        named = 0.6 if config.loading.load_in_4bit else 1.0
        return item, named, named
    asked = config.loading.torch_dtype
    if asked is not None:
        return item, asked.itemsize, asked.itemsize
    trained = base_dtype(config.finetune, device) if trains else None
    return item, item, item if trained is None else trained.itemsize


def _dense(old: Checkpoint, adapter: Adapter) -> Iterator[tuple[int, int]]:
    for path in adapter.modules:
        if old.architecture.locate(path):
            a, b = weight_shape(old, path)
            yield a, b


def _mean_tokens(tokenizer: Any, texts: Sequence[str], cutoff: int) -> float:
    sample = texts[:: max(len(texts) // SAMPLED, 1)]
    return sum(min(len(ids), cutoff) for ids in tokenizer(list(sample))["input_ids"]) / len(sample)


def _fitted(config: MigrationConfig, data: Data) -> int:
    """Rows that templates are tried on, once for each template: of instruction rows all that are known."""
    rows = data.train or data.evaluation
    kinds = {row.kind for row in rows}
    instructions = "instruction" in kinds or ("completion" in kinds and config.template != DEFAULT_TEMPLATE)
    tried = len(known_templates()) if instructions else int("messages" in kinds)
    return tried * min(len(rows), TEMPLATE_ROWS)


def _row_tokens(config: MigrationConfig, data: Data) -> tuple[float, float]:
    """Mean tokens of a training row, and those of them that are labels; the cut-off where nothing is known."""
    for rows in (data.train, data.evaluation):
        sample = list(rows[:: max(len(rows) // SAMPLED, 1)])
        if sample and data.tokenizer is not None:
            try:
                found = encode_rows(sample, data.tokenizer, config.finetune.cutoff).examples
            except LoRASuiteError:  # said where the rows are checked
                continue
            labels = sum(label != IGNORED for one in found for label in one["labels"])
            return sum(len(one["input_ids"]) for one in found) / len(found), labels / len(found)
    asked = [row for row in data.prompts[:: max(len(data.prompts) // SAMPLED, 1)] if row.kind != "text"]
    if asked and data.tokenizer is not None:
        with contextlib.suppress(LoRASuiteError):
            prompts = [row.target(data.tokenizer)[0] for row in asked]
            answer = min(config.teacher.max_new_tokens, ANSWER_TOKENS)
            tokens = _mean_tokens(data.tokenizer, prompts, config.finetune.cutoff)
            data.assumed.append(f"written answers of {answer} tokens")
            return tokens + answer, float(answer)
    return float(config.finetune.cutoff), config.finetune.cutoff / 2


def _new_tokens(config: MigrationConfig, data: Data) -> int:
    """Tokens of an answer to a held-out row at most."""
    if config.evaluation.max_new_tokens != "auto":
        return config.evaluation.max_new_tokens
    longest = max((row.completion for row in data.evaluation), key=len, default="")
    found = len(data.tokenizer(longest)["input_ids"]) if longest and data.tokenizer is not None else ANSWER_TOKENS
    return found + BEYOND_LONGEST


def estimate(
    old: Shape,
    new: Shape,
    work: Work,
    machine: Machine,
    speed: Throughput | None = None,
    adapter: bool = True,
    running: Mapping[float, Throughput] = MappingProxyType({}),
) -> dict[str, Any]:
    """Every stage's seconds and bytes, their totals, and what this machine has. JSON-able.

    Args:
        speed: what it does in a second; None leaves seconds out.
        adapter: also the stages that run for an adapter, beside the pair's.
        running: the same where models run at another number of bytes a weight, by that number.
    """
    room = machine.gpu if work.gpu else machine.ram
    own = kept_loaded(adapter_costs(old, new, work), old, new, work, room or 0) if adapter else []
    costs = pair_costs(old, new, work) + own
    stages: list[dict[str, Any]] = [
        {
            "stage": name,
            "seconds": None
            if speed is None
            else sum(running.get(_item(name, work), speed).seconds(one.ops) for one in group),
            "ram_bytes": int(max(one.ram for one in group)),
            "gpu_bytes": int(max(one.gpu for one in group)),
            "disk_bytes": int(sum(one.disk for one in group)),
            "spare_bytes": int(min(one.spare for one in group)),
        }
        for name, group in _grouped(costs).items()
    ]
    return {
        "stages": stages,
        "total": {
            "seconds": None if speed is None else sum(row["seconds"] for row in stages),
            "ram_bytes": max(row["ram_bytes"] for row in stages),
            "gpu_bytes": max(row["gpu_bytes"] for row in stages),
            "disk_bytes": sum(row["disk_bytes"] for row in stages),
        },
        "machine": asdict(machine),
        "measured": None if speed is None else asdict(speed),
    }


def _item(stage: str, work: Work) -> float:
    """Bytes of a weight where a stage runs models."""
    if stage in TUNED:
        return work.training_item
    return work.run_item if stage in LOADED else work.item


def _grouped(costs: Sequence[Cost]) -> dict[str, list[Cost]]:
    """Costs by stage, in the order of each one's first."""
    found: dict[str, list[Cost]] = {}
    for one in costs:
        found.setdefault(one.stage, []).append(one)
    return found


#: The flags that make a stage need less RAM or GPU memory, in the order they help; others are those of every model.
SMALLER = {
    **dict.fromkeys(
        ("screen", "search", "finetune"), "--finetune-micro-batch-size 1, --finetune-gradient-checkpointing"
    ),
    "teacher": "--teacher-batch-size 1, --teacher-samples 0",
    "rehearsal": "--rehearsal 0",
    "teacher_worth": "--teacher-samples 0",
    "prompt_drafts": "--teacher-batch-size 1, --teacher-samples 0",
    "prompts": "--teacher-batch-size 1, --teacher-samples 0",
    "soft_labels": "--finetune-distillation 0",
    "token_weights": "--finetune-token-weights none",
    "second_step": "--second-step none, --finetune-micro-batch-size 1, --finetune-gradient-checkpointing",
    "evaluate": "--evaluation-batch-size 1",
    "general_text": "--evaluation-batch-size 1",
    "select": "--method procrustes",
    "model_fit": "--method procrustes",
    "alignment": "--calibration-samples 64, --method lorasuite",
    "expert_maps": "--calibration-samples 64",
    "state_map": "--method procrustes",
    "activations": "--calibration-samples 64",
    "mlp_factors": "--method procrustes",
}
#: Stages that load a model whole, as the settings of loading say.
LOADED = (*NEW_STAGES, "template_fit", "teacher", "prompt_drafts", "prompts", "soft_labels", "token_weights")
#: Those of them that train.
TUNED = ("screen", "search", "finetune", "second_step")
#: The flags that make artifacts smaller.
DISK = "LORASUITE_HOME on a larger disk, or --method procrustes (no state map), --method lorasuite (no maps)"


def shortages(found: dict[str, Any], free: bool = True) -> list[dict[str, Any]]:
    """Stages that need more than there is, each with ``what``, ``need``, ``have`` (bytes) and the flag that helps.

    Args:
        free: set against what is free now; else only what is clearly above all that this machine has is named. Of the
            disk that is its free space and what the store holds already, which may be these very artifacts.
    """
    machine, result = found["machine"], []
    margin = 1.0 if free else MARGIN
    for row in found["stages"]:
        for what, have in (("RAM", "ram"), ("GPU memory", "gpu")):
            limit = machine[f"{have}_free" if free else have]
            runs_here = (what == "GPU memory") == (machine["gpu"] is not None)
            need = row[f"{have}_bytes"] - (row["spare_bytes"] if runs_here else 0)
            if have == "gpu" and machine["spread"] is not None and row["stage"] in LOADED:
                what, limit = "GPU memory and RAM", machine["spread_free" if free else "spread"]
                need += row["ram_bytes"]
            if limit is not None and need > margin * limit:
                result.append(
                    {"stage": row["stage"], "what": what, "need": need, "have": limit, "remedy": _remedy(row, what)}
                )
    disk = machine["disk_free"]
    if disk is not None and not free:
        disk += machine["disk_stored"]
    if disk is not None and found["total"]["disk_bytes"] > margin * disk:
        largest = max(found["stages"], key=lambda row: row["disk_bytes"])
        need = {"what": "disk", "need": found["total"]["disk_bytes"], "have": disk, "remedy": DISK}
        result.append({"stage": largest["stage"], **need})
    return result


def _remedy(row: dict[str, Any], what: str) -> str:
    own = SMALLER.get(row["stage"], "")
    if row["stage"] not in LOADED:
        return own
    known = {"GPU memory": "--load-in-4bit, --device-map auto", "GPU memory and RAM": "--load-in-4bit"}
    models = known.get(what, "--dtype bfloat16")
    return f"{own}, {models}" if own else models


def unfit(found: dict[str, Any]) -> list[Problem]:
    """What cannot fit on this machine, whatever is freed: why a run is refused before it begins."""
    return [
        Problem(
            one["stage"],
            f"needs {gib(one['need'])} of {one['what']}, and there are {gib(one['have'])}",
            f"Try {one['remedy']}." if one["remedy"] else "",
        )
        for one in shortages(found, free=False)
    ]


def gib(size: float) -> str:
    """Bytes as people read them: ``1.2 GiB``."""
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"
