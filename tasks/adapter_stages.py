"""The stages that are run for each adapter: transform, fine-tune, evaluate.

Names of paths: ``old_base``, ``new_base``, ``adapter``, ``base`` (the model evaluated), and the data files
``train_data``, ``eval_data``, ``eval_dir`` and ``include_path``. Locations never enter a key: rows and task files do,
by their fingerprint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasuite.adapter import CONFIG, Adapter, fresh_config, write_adapter
from lorasuite.architectures import ROLES
from lorasuite.checkpoint import METER, Checkpoint, load_model, load_tokenizer
from lorasuite.data import draw, read_rows
from lorasuite.evaluation import EvaluationSettings, evaluate
from lorasuite.finetune import FinetuneSettings
from lorasuite.migration import migrate
from lorasuite.selection import NOTHING, choose, write_scaled
from lorasuite.serving import compare_merged
from lorasuite.sweep import finetune_swept, split
from lorasuite.task_evaluation import evaluate_tasks, write_task_samples
from tasks.pair_stages import (
    factor_reader,
    head_maps,
    layer_map,
    moments_reader,
    shared_tokens,
    transfer,
    trusted,
)
from tasks.progress import Progress
from tasks.retries import halved
from tasks.stage import Artifact, StageOutput, Where, stage

Inputs = Mapping[str, Any]
Settings = Mapping[str, Any]

#: Written into stored adapters, which must not depend on where the base lies; publishing puts the real name.
ANY_BASE = "base"


@stage("transform")
def transform(inputs: Inputs, settings: Settings, where: Where) -> StageOutput:
    """The adapter on the new base, without fine-tuning."""
    METER.reset()
    adapter = Adapter.open(where.path("adapter"), bool(where.options.get("allow_pickle")))
    old, new = Checkpoint(where.path("old_base")), Checkpoint(where.path("new_base"))
    factors = {role: inputs[f"mlp_factors_{role}"] for role in ROLES if f"mlp_factors_{role}" in inputs}
    aligned = [artifact for name, artifact in inputs.items() if name.startswith("alignment_")]
    moved = migrate(
        adapter,
        old,
        new,
        method=settings["method"],
        layers=layer_map(inputs["layer_mapping"]),
        heads=head_maps(inputs["head_mapping"]),
        transfer=transfer(inputs["transfer_matrices"]),
        mlp_factor=factor_reader(factors),
        alignment=moments_reader(aligned) if aligned else None,
        rank=settings["rank"],
        energy=settings.get("energy"),
        unmapped=settings["unmapped"],
        seed=settings["seed"],
        common=shared_tokens(inputs["vocabulary"]) if "vocabulary" in inputs else None,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = write_adapter(
            Path(folder),
            moved.updates,
            architecture=new.architecture,
            dims=new.dims,
            base=ANY_BASE,
            extra=moved.fresh,
            extras=moved.extras,
            output_type=settings.get("output_type", "lora"),
            **adapter.lora_settings(moved.rank),
        )
        files = _contents(path)
    info = {
        "norms": moved.norms(),
        "retained_energy": moved.retained,
        "dropped": moved.dropped,
        "fresh": sorted(moved.fresh),
        "carried": moved.carried,
        "rank": moved.rank,
        "loaded_bytes_peak": METER.peak,
    }
    return StageOutput(info=info, files=files)


@stage("select")
def selection(inputs: Inputs, settings: Settings, where: Where) -> StageOutput:
    """The candidate and scale with the least loss on a held-out fifth of the training rows, or none of them."""
    rows = draw(read_rows(where.path("train_data")), settings["samples"], settings["seed"])
    candidates = {method: adapter_folder(inputs[f"transform_{method}"]) for method in settings["methods"]}
    tried = choose(
        load_model(where.path("new_base"), where.device, trust_remote_code=trusted(where)),
        load_tokenizer(where.path("new_base"), trusted(where)),
        candidates,
        split(rows, settings["seed"])[1],
        cutoff=settings["cutoff"],
        device=where.device,
    )
    best = tried[0]
    source = candidates[next(e["method"] for e in tried if e["method"] != NOTHING)]
    with tempfile.TemporaryDirectory() as folder:
        files = _contents(write_scaled(source, Path(folder), best["scale"]))
    return StageOutput(info={"candidates": tried, "method": best["method"], "scale": best["scale"]}, files=files)


@stage("finetune")
def finetune(inputs: Inputs, settings: Settings, where: Where) -> StageOutput:
    """The light fine-tune of a migrated adapter, or of a fresh LoRA on the same rows."""
    rows = draw(read_rows(where.path("train_data")), settings["samples"], settings["seed"])
    fresh = settings["fresh"]  # None: start from the migrated adapter
    tuning = FinetuneSettings.model_validate(settings["finetune"])
    if where.halvings:
        smaller = halved(tuning.micro_batch_size or tuning.batch_size, where.halvings)
        tuning = tuning.model_copy(update={"micro_batch_size": smaller})
    with tempfile.TemporaryDirectory() as folder:
        result, sweep = finetune_swept(
            str(where.path("new_base")),
            load_tokenizer(where.path("new_base"), trusted(where)),
            rows,
            tuning,
            settings["learning_rates"],
            adapter=adapter_folder(inputs["transform"]) if fresh is None else None,
            lora=None if fresh is None else fresh_config(fresh),
            output=Path(folder) / "adapter",
            work_dir=where.path("work"),
            progress=Progress(f"fine-tuning ({'scratch' if fresh else 'migrated'})").training,
            device=where.device,
            trust_remote_code=trusted(where),
        )
        files = _contents(Path(folder) / "adapter")
    info = {**result.model_dump(), "sweep": sweep, "micro_batch_size": tuning.micro_batch_size or tuning.batch_size}
    return StageOutput(info=info, files=files)


@stage("evaluate")
def evaluation(inputs: Inputs, settings: Settings, where: Where) -> StageOutput:
    """One base, bare or with one adapter, on the held-out rows."""
    results = evaluate(
        str(where.path("base")),
        load_tokenizer(where.path("base"), trusted(where)),
        read_rows(where.path("eval_data")),
        _smaller(EvaluationSettings.model_validate(settings), where),
        adapters={"it": _evaluated(inputs, where)},
        progress=Progress("evaluation").evaluation,
        device=where.device,
        trust_remote_code=trusted(where),
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "samples.jsonl"
        results["it"].write_samples(file)
        return StageOutput(info=results["it"].summary(), files={file.name: file.read_bytes()})


@stage("evaluate_tasks", version=2)
def task_evaluation(inputs: Inputs, settings: Settings, where: Where) -> StageOutput:
    """One base, bare or with one adapter, on an lm-eval task (or group, or tag) by name."""
    options = {name: value for name, value in settings.items() if name not in ("task", "lm_eval")}
    scores = evaluate_tasks(
        str(where.path("base")),
        load_tokenizer(where.path("base"), trusted(where)),
        [settings["task"]],
        _smaller(EvaluationSettings.model_validate(options), where),
        adapters={"it": _evaluated(inputs, where)},
        eval_dir=where.paths.get("eval_dir"),
        include_path=where.paths.get("include_path"),
        progress=Progress(f"evaluation ({settings['task']})").evaluation,
        device=where.device,
        trust_remote_code=trusted(where),
    )["it"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "samples.jsonl"
        write_task_samples(scores, file)
        info = {task: score.summary() for task, score in scores.items()}
        return StageOutput(info=info, files={file.name: file.read_bytes()})


@stage("serving")
def serving(inputs: Inputs, settings: Settings, where: Where) -> StageOutput:
    """The published adapter in PEFT, and merged into a plain model: the same logits of one text."""
    found = compare_merged(
        where.path("new_base"),
        adapter_folder(inputs["adapter"]),
        device=where.device,
        trust_remote_code=trusted(where),
    )
    return StageOutput(info={loader: served.model_dump(mode="json") for loader, served in found.items()})


def _smaller(settings: EvaluationSettings, where: Where) -> EvaluationSettings:
    """Fewer rows at once after running out of memory; results say how many it were."""
    if not where.halvings:
        return settings
    return settings.model_copy(update={"batch_size": halved(settings.batch_size, where.halvings)})


def _evaluated(inputs: Inputs, where: Where) -> Path | None:
    """The adapter under evaluation: a stored one, the user's own, or none."""
    made: Artifact | str | None = inputs.get("adapter")
    if isinstance(made, Artifact):
        return adapter_folder(made)
    return where.path("adapter") if made else None


def adapter_folder(artifact: Artifact) -> Path:
    """The PEFT directory kept in a transform or finetune artifact."""
    return artifact.file(CONFIG).parent


def _contents(folder: Path) -> dict[str, Path | bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
