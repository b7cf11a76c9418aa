"""The adapter on the new base without fine-tuning: moved layer by layer, or fitted as whole models.

Paths: ``old_base``, ``new_base``, and ``adapter`` where it is given by its fingerprint.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lorasuite.adapters import OutputType, attached
from lorasuite.bases import METER, Checkpoint, CommonTokens
from lorasuite.correspondence import AlignedMaps, ExpertMaps, HeadMaps, LayerMap, MlpFactors, StateMap, TransferMatrix
from lorasuite.data import whole_text
from lorasuite.transforms import (
    WRITTEN_ROWS,
    Migrated,
    ModelTransform,
    Unmapped,
    can_move,
    initialise,
    migrate,
    not_moved,
)
from lorasuite.transforms import transform as transform_named
from lorasuite.transforms import unmoved as fresh_start
from tasks.bases import checkpoints, loaded
from tasks.data import stored_split
from tasks.folders import adapter_files, adapter_path, open_adapter
from tasks.progress import Progress
from tasks.stage import Artifact, StageOutput, StageSettings, Where, stage


@dataclass(frozen=True, kw_only=True)
class TransformInputs:
    """An adapter, both bases' weights, and what of the one matches what of the other."""

    adapter: Artifact | str
    old_model: str
    new_model: str
    layer_mapping: Artifact
    head_mapping: Artifact
    transfer_matrices: Artifact
    mlp_factors: dict[str, Artifact] = field(default_factory=dict)
    alignment: dict[str, Artifact] = field(default_factory=dict)
    #: For an adapter that changes embeddings.
    vocabulary: Artifact | None = None
    #: For an adapter of experts, where both bases have some.
    expert_maps: Artifact | None = None


class OutputSettings(StageSettings):
    """What is written: the rank, or the share of energy to keep in place of it, and the scaling."""

    rank: int
    alpha: float
    use_rslora: bool
    energy: float | None = None
    output_type: OutputType = "lora"


class TransformSettings(OutputSettings):
    """The transform by name, and what becomes of new layers without a partner."""

    method: str
    unmapped: Unmapped
    seed: int


@stage("transform", version=5)
def transform(inputs: TransformInputs, settings: TransformSettings, where: Where) -> StageOutput:
    """The adapter moved to the new base, layer by layer."""
    METER.reset()
    adapter = open_adapter(inputs.adapter, where)
    old, new = checkpoints(where)
    moved = migrate(
        adapter,
        old,
        new,
        method=settings.method,
        layers=LayerMap.read(inputs.layer_mapping).layers,
        heads=HeadMaps.read(inputs.head_mapping).heads,
        transfer=TransferMatrix.read(inputs.transfer_matrices),
        mlp_factor=MlpFactors(inputs.mlp_factors),
        alignment=AlignedMaps(inputs.alignment.values()) if inputs.alignment else None,
        experts=None if inputs.expert_maps is None else ExpertMaps.read(inputs.expert_maps),
        rank=settings.rank,
        energy=settings.energy,
        unmapped=settings.unmapped,
        seed=settings.seed,
        common=None if inputs.vocabulary is None else CommonTokens.read(inputs.vocabulary),
    )
    kept = {"extra": moved.fresh, "extras": moved.extras}
    files = adapter_files(adapter, new, moved.updates, moved.rank, settings.output_type, **kept)
    return StageOutput(info=moved.info() | {"loaded_bytes_peak": METER.peak}, files=files)


@dataclass(frozen=True, kw_only=True)
class UnmovedInputs:
    """An adapter, and both bases' weights."""

    adapter: Artifact | str
    old_model: str
    new_model: str


class UnmovedSettings(StageSettings):
    """The rank, and what draws the start."""

    rank: int
    seed: int


@stage("unmoved")
def unmoved(inputs: UnmovedInputs, settings: UnmovedSettings, where: Where) -> StageOutput:
    """A fresh LoRA of the new base, for an adapter of which nothing can be moved: rows are trained into it."""
    adapter = open_adapter(inputs.adapter, where)
    old, new = checkpoints(where)
    found = fresh_start(adapter, old, new, settings.rank, settings.seed)
    files = adapter_files(adapter, new, {}, found.rank, "lora", extra=found.fresh)
    return StageOutput(info=found.info() | {"loaded_bytes_peak": 0}, files=files)


@dataclass(frozen=True, kw_only=True)
class ModelFitInputs:
    """An adapter, both bases, the rows that may be read, and the pair's state map for transforms that read one."""

    adapter: Artifact | str
    old_model: str
    new_model: str
    old_tokenizer: str
    new_tokenizer: str
    rows: Artifact
    state_map: Artifact | None = None


class ModelFitSettings(StageSettings):
    """The transform by name, the tokens read of a text, and what is written."""

    method: str
    rank: int
    output_type: OutputType
    cutoff: int
    seed: int


@stage("model_fit")
def model_fit(inputs: ModelFitInputs, settings: ModelFitSettings, where: Where) -> StageOutput:
    """The new base fitted as a whole to follow the old base + adapter, on the rows that nothing is chosen by."""
    adapter = open_adapter(inputs.adapter, where)
    new = Checkpoint(where.path("new_base"))
    chosen = transform_named(settings.method)
    assert isinstance(chosen, ModelTransform)
    with loaded(where, "old_base") as old, loaded(where, "new_base") as fresh:
        roles = adapter.roles(old.architecture)
        states = (
            None if inputs.state_map is None else StateMap.read(old, inputs.state_map.tensor, inputs.state_map.info)
        )
        fitted = chosen.fit(
            old,
            fresh,
            lambda: attached(old.model, adapter_path(inputs.adapter, where), where.device),
            [role for role in roles if can_move(chosen, role)],
            states=states,
            texts=[whole_text(row, fresh.tokenizer) for row in stored_split(inputs.rows).to_fit],
            rank=settings.rank,
            cutoff=settings.cutoff,
            progress=Progress().step,
        )
    reasons = {role: f"the new base has no {role} projection" for role in roles if role not in new.every_role}
    reasons |= {r: f"{chosen.name} has no rule for {r} projections" for r in roles if not can_move(chosen, r)}
    dropped = [{"module": f"every {role} projection", "why": why} for role, why in reasons.items()]
    dropped += not_moved(adapter, Checkpoint(where.path("old_base")), f"{chosen.name} fits no experts: {WRITTEN_ROWS}")
    moved = Migrated(
        updates=fitted.updates, rank=settings.rank, retained=dict.fromkeys(fitted.updates, 1.0), dropped=dropped
    )
    # A fit may leave modules of the adapter out; a fine-tune is to have them all.
    initialise(moved, new, (), roles, settings.rank, settings.seed)
    files = adapter_files(adapter, new, moved.updates, settings.rank, settings.output_type, extra=moved.fresh)
    fit = {"fit_residual": fitted.residual, "map_error": fitted.map_error, "loaded_bytes_peak": 0}
    return StageOutput(info=moved.info() | fit, files=files)
