"""The stages that are run for each adapter: transform, fine-tune, evaluate.

Names of paths: ``old_base``, ``new_base``, ``adapter``, ``base`` (the model evaluated), and the data files
``train_data``, ``eval_data``, ``eval_dir`` and ``include_path``. Locations never enter a key: rows and task files do,
by their fingerprint.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from lorasuite.adapters import CONFIG, Adapter, LowRank, attached, fresh_config, write_adapter
from lorasuite.bases import METER, ROLES, Checkpoint, load_model, load_tokenizer
from lorasuite.correspondence import StateMap
from lorasuite.data import Row, RowSplit, draw, read_prompts, read_rows, rows_to_jsonl, split_rows, whole_text
from lorasuite.evaluation import EvaluationSettings, compare_merged, evaluate, evaluate_tasks, write_task_samples
from lorasuite.teacher import TeacherSettings, TextLoss, judge_teacher, text_losses, write_rows
from lorasuite.training import (
    NOTHING,
    FinetuneSettings,
    SoftLabels,
    choose,
    finetune_swept,
    screen,
    soft_labels,
    write_scaled,
)
from lorasuite.transforms import Migrated, ModelTransform, initialise, migrate
from lorasuite.transforms import transform as transform_named
from tasks.pair_stages import (
    factor_reader,
    head_maps,
    layer_map,
    moments_reader,
    shared_tokens,
    side,
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

#: Files of a teacher artifact: its rows, and the losses of the old base on them with and without the adapter.
ROWS, LOSSES = "rows.jsonl", "losses.json"
#: Rows read at once where losses or distributions are taken.
BATCH = 16

#: The old base that several adapters' teachers share, while :func:`shared_old_base` lasts.
_shared: dict[str, Any] = {}
_sharing: list[bool] = []


@contextmanager
def shared_old_base() -> Iterator[None]:
    """Keep the old base loaded from one teacher stage of this process to the next; let it go at the end."""
    _sharing.append(True)
    try:
        yield
    finally:
        _sharing.pop()
        if not _sharing:
            _shared.clear()


@contextmanager
def _model(side: str, where: Where) -> Iterator[Any]:
    """A base, loaded for this stage or, of old bases, for the ones that share it."""
    name = f"{where.path(side)} {where.device}"
    if name in _shared:
        yield _shared[name]
        return
    _shared.clear()  # one at a time
    model = load_model(where.path(side), where.device, trust_remote_code=trusted(where))
    if side == "old_base" and _sharing:
        _shared[name] = model
    yield model


@stage("teacher")
def teaching(inputs: Inputs, settings: Settings, where: Where) -> StageOutput:
    """The rows that the old base with the adapter writes, and what both make of them. Knows nothing of the new base."""
    wanted = TeacherSettings.model_validate(settings["teacher"])
    size = int(str(where.options.get("teacher_batch", wanted.batch_size)))
    wanted = wanted.model_copy(update={"batch_size": halved(size, where.halvings)})
    tokenizer = load_tokenizer(where.path("old_base"), trusted(where))
    prompts = read_prompts(where.path("prompts")) if "prompts" in inputs else None
    with _model("old_base", where) as model:
        with attached(model, where.path("adapter"), where.device) as teacher:
            written = write_rows(
                teacher,
                tokenizer,
                prompts,
                settings["samples"],
                wanted,
                seed=settings["seed"],
                progress=Progress("teacher's rows").step,
            )
            own = text_losses(teacher, tokenizer, written.rows, batch_size=wanted.batch_size)
        bare = text_losses(model, tokenizer, written.rows, batch_size=wanted.batch_size)
    losses = {"teacher": _dumped(own), "old": _dumped(bare)}
    files: dict[str, Path | bytes] = {ROWS: rows_to_jsonl(written.rows), LOSSES: json.dumps(losses).encode()}
    return StageOutput(info=written.info(), files=files)


@stage("teacher_worth")
def teacher_worth(inputs: Inputs, settings: Settings, where: Where) -> StageOutput:
    """Whether the teacher is worth copying: on the training rows, or without any on what it wrote."""
    new_tokenizer = load_tokenizer(where.path("new_base"), trusted(where))
    labelled, size = "train_data" in inputs, halved(BATCH, where.halvings)
    if labelled:
        rows = draw(read_rows(where.path("train_data")), settings["samples"], settings["seed"])
        tokenizer = load_tokenizer(where.path("old_base"), trusted(where))
        with _model("old_base", where) as model:
            old = text_losses(model, tokenizer, rows, batch_size=size)
            with attached(model, where.path("adapter"), where.device) as wrapped:
                own = text_losses(wrapped, tokenizer, rows, batch_size=size)
    else:
        rows = read_rows(inputs["teacher"].file(ROWS))
        kept = json.loads(inputs["teacher"].file(LOSSES).read_text())
        old, own = ([loss and TextLoss.model_validate(loss) for loss in kept[name]] for name in ("old", "teacher"))
    with _model("new_base", where) as model:
        new = text_losses(model, new_tokenizer, rows, batch_size=size)
    return StageOutput(info=judge_teacher(old, own, new, labelled).model_dump(mode="json"))


@stage("soft_labels")
def soft_labelling(inputs: Inputs, settings: Settings, where: Where) -> StageOutput:
    """The teacher's distribution at every token of the training rows that both tokenizers cut alike."""
    common = shared_tokens(inputs["vocabulary"])
    with (
        _model("old_base", where) as model,
        attached(model, where.path("adapter"), where.device) as teacher,
    ):
        found = soft_labels(
            teacher,
            load_tokenizer(where.path("old_base"), trusted(where)),
            [*chain(*_training_rows(inputs, settings, where))],
            (common.old, common.new),
            cutoff=settings["cutoff"],
            temperature=settings["temperature"],
            batch_size=halved(BATCH, where.halvings),
        )
    return StageOutput(tensors=found.tensors(), info={"rows": len(found.lengths), "tokens": len(found.tokens)})


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
    files = _written(adapter, new, moved.updates, moved.rank, settings, extra=moved.fresh, extras=moved.extras)
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


@stage("sequential", version=4)
def sequential_fit(inputs: Inputs, settings: Settings, where: Where) -> StageOutput:
    """Whole models fitted to follow the old base + adapter, by a model transform."""
    chosen = transform_named(settings["method"])
    assert isinstance(chosen, ModelTransform)
    adapter = Adapter.open(where.path("adapter"), bool(where.options.get("allow_pickle")))
    new = Checkpoint(where.path("new_base"))
    # A fifth of the rows is what `auto` and sweeps choose by: it is not read here.
    rows = _split(inputs, settings, where).to_fit
    with _model("old_base", where) as old, _model("new_base", where) as fresh:
        sides = side(where, "old_base", old), side(where, "new_base", fresh)
        roles = adapter.roles(sides[0].architecture)
        learned = inputs.get("state_map")
        fitted = chosen.fit(
            sides[0],
            sides[1],
            lambda: attached(old, where.path("adapter"), where.device),
            roles,
            states=None if learned is None else StateMap.read(sides[0], learned.tensor, learned.info),
            texts=[whole_text(row, sides[1].tokenizer) for row in rows],
            rank=settings["rank"],
            cutoff=settings["cutoff"],
            progress=Progress("sequential fit").step,
        )
    moved = Migrated(updates=fitted.updates)
    # A fit may leave modules of the adapter out; a fine-tune is to have them all.
    initialise(moved, new, (), roles, settings["rank"], settings["seed"])
    files = _written(adapter, new, moved.updates, settings["rank"], settings, extra=moved.fresh)
    info = {
        "norms": {name: update.norm() for name, update in fitted.updates.items()},
        "retained_energy": dict.fromkeys(fitted.updates, 1.0),
        "fit_residual": fitted.residual,
        "map_error": fitted.map_error,
        "dropped": [],
        "fresh": sorted(moved.fresh),
        "rank": settings["rank"],
        "loaded_bytes_peak": 0,
    }
    return StageOutput(info=info, files=files)


@stage("select")
def selection(inputs: Inputs, settings: Settings, where: Where) -> StageOutput:
    """The candidate and scale with the least loss on a held-out fifth of the training rows, or none of them."""
    rows = _split(inputs, settings, where).to_choose_by
    candidates = {method: adapter_folder(inputs[f"transform_{method}"]) for method in settings["methods"]}
    tried = choose(
        load_model(where.path("new_base"), where.device, trust_remote_code=trusted(where)),
        load_tokenizer(where.path("new_base"), trusted(where)),
        candidates,
        rows,
        cutoff=settings["cutoff"],
        device=where.device,
    )
    best = tried[0]
    source = candidates[next(candidate.method for candidate in tried if candidate.method != NOTHING)]
    with tempfile.TemporaryDirectory() as folder:
        files = _contents(write_scaled(source, Path(folder), best.scale))
    dumped = [candidate.model_dump(mode="json") for candidate in tried]
    return StageOutput(info={"candidates": dumped, "method": best.method, "scale": best.scale}, files=files)


@stage("screen", version=2)
def screening(inputs: Inputs, settings: Settings, where: Where) -> StageOutput:
    """Which candidates are worth a whole sweep: their held-out loss after a short fine-tune."""
    losses = screen(
        str(where.path("new_base")),
        load_tokenizer(where.path("new_base"), trusted(where)),
        _split(inputs, settings, where),
        FinetuneSettings.model_validate(settings["finetune"]),
        settings["learning_rate"],
        {method: adapter_folder(inputs[f"transform_{method}"]) for method in settings["methods"]},
        device=where.device,
        trust_remote_code=trusted(where),
    )
    return StageOutput(info={"losses": losses})


@stage("finetune", version=2)
def finetune(inputs: Inputs, settings: Settings, where: Where) -> StageOutput:
    """The light fine-tune of a migrated adapter, or of a fresh LoRA on the same rows."""
    fresh = settings["fresh"]  # None: start from the migrated adapter
    tuning = FinetuneSettings.model_validate(settings["finetune"])
    if where.halvings:
        smaller = halved(tuning.micro_batch_size or tuning.batch_size, where.halvings)
        tuning = tuning.model_copy(update={"micro_batch_size": smaller})
    with tempfile.TemporaryDirectory() as folder:
        result, sweep = finetune_swept(
            str(where.path("new_base")),
            load_tokenizer(where.path("new_base"), trusted(where)),
            _split(inputs, settings, where),
            tuning,
            settings["learning_rates"],
            briefly=settings.get("briefly", False),
            adapter=adapter_folder(inputs["transform"]) if fresh is None else None,
            lora=None if fresh is None else fresh_config(fresh),
            output=Path(folder) / "adapter",
            work_dir=where.path("work"),
            progress=Progress(f"fine-tuning ({'scratch' if fresh else 'migrated'})").training,
            device=where.device,
            trust_remote_code=trusted(where),
            soft_labels=SoftLabels.from_tensors(inputs["soft_labels"].tensors()) if "soft_labels" in inputs else None,
        )
        files = _contents(Path(folder) / "adapter")
    info = {
        **result.model_dump(),
        "sweep": [rate.model_dump(mode="json") for rate in sweep],
        "micro_batch_size": tuning.micro_batch_size or tuning.batch_size,
    }
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


def _training_rows(inputs: Inputs, settings: Settings, where: Where) -> tuple[list[Row], list[Row]]:
    """The user's rows, drawn by the seed, and the teacher's."""
    own: list[Row] = []
    if "train_data" in inputs:
        own = draw(read_rows(where.path("train_data")), settings["samples"], settings["seed"])
    return own, read_rows(inputs["teacher"].file(ROWS)) if "teacher" in inputs else []


def _split(inputs: Inputs, settings: Settings, where: Where) -> RowSplit:
    """The rows of one migration, split by its seed: the same rows are held out in every stage of it."""
    selection = read_rows(inputs["looked_at"].file(ROWS)) if "looked_at" in inputs else []
    return split_rows(*_training_rows(inputs, settings, where), selection, seed=settings["seed"])


def _dumped(losses: Sequence[TextLoss | None]) -> list[dict[str, Any] | None]:
    return [None if loss is None else loss.model_dump(mode="json") for loss in losses]


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


def _written(
    adapter: Adapter, new: Checkpoint, updates: Mapping[str, LowRank], rank: int, settings: Settings, **beside: Any
) -> dict[str, Path | bytes]:
    """The files of a PEFT adapter of these updates, of the scaling the old one was trained with."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_adapter(
            Path(folder),
            updates,
            architecture=new.architecture,
            dims=new.dims,
            base=ANY_BASE,
            output_type=settings.get("output_type", "lora"),
            **beside,
            **adapter.lora_settings(rank),
        )
        return _contents(path)


def _contents(folder: Path) -> dict[str, Path | bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
