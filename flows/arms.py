"""The arms of a migration and of an experiment, made of stages: the one place that wires transform and fine-tune.

Every function runs stages, or finds their artifacts, and returns references. Which arms there are, and which of them is
published, is for the flows to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flows.context import Context
from flows.pair import Pair
from lorasuite.adapters import Adapter, OwnTokenizer
from lorasuite.bases import Architecture, Role
from lorasuite.planning import MigrationConfig
from lorasuite.training import FinetuneSettings
from lorasuite.transforms import LAYER_INPUTS, ModelTransform, transform
from tasks.bases import OWN_TOKENIZER
from tasks.stage import WORK, Ref
from tasks.training_stages import finetune, rehearsing
from tasks.transform_stages import model_fit
from tasks.transform_stages import transform as transform_stage


@dataclass(frozen=True)
class Source:
    """An adapter to migrate.

    ``adapter`` is its fingerprint, and it lies at ``path``; or it is an artifact. ``roles`` are what it updates, and
    ``lora`` the arguments of :func:`lorasuite.adapters.write_adapter` that the new one is written with.
    """

    adapter: str | Ref
    roles: tuple[Role, ...]
    lora: Mapping[str, Any]
    changes_embeddings: bool = False
    #: Whether it holds updates of blocks only, which a model transform can move.
    plain: bool = True
    #: Whether it has updates of experts.
    experts: bool = False
    path: Path | None = None
    #: Its own tokenizer, where it has one that is not the old base's.
    own_tokenizer: OwnTokenizer | None = None

    @property
    def paths(self) -> dict[str, Path]:
        """Where it lies, as paths of a stage."""
        found = {} if self.path is None else {"adapter": self.path}
        return found if self.own_tokenizer is None else {**found, OWN_TOKENIZER: self.own_tokenizer.folder}

    @classmethod
    def opened(
        cls,
        adapter: Adapter,
        fingerprint: str,
        old: Architecture,
        settings: MigrationConfig,
        own_tokenizer: OwnTokenizer | None = None,
    ) -> Source:
        """A ready adapter, written again with the scaling α/r (or α/√r) that it was trained with."""
        lora = adapter.lora_settings(settings.rank or adapter.rank)
        return cls(
            fingerprint,
            adapter.roles(old),
            with_output(lora, settings),
            bool(adapter.vocabulary_modules(old)),
            adapter.plain(old),
            bool(adapter.experts(old)),
            adapter.path,
            own_tokenizer,
        )


def with_output(lora: Mapping[str, Any], settings: MigrationConfig) -> dict[str, Any]:
    """LoRA settings with what a migration says of the output, where it is not the default."""
    found = dict(lora)
    if settings.energy is not None:
        found["energy"] = settings.energy
    if settings.output_type != "lora":
        found["output_type"] = settings.output_type
    return found


def migrated(
    context: Context,
    pair: Pair,
    source: Source,
    method: str,
    settings: MigrationConfig,
    *,
    rows: Ref | None = None,
    seed: int | None = None,
    label: str | None = None,
) -> Ref:
    """The adapter on the new base, not yet fine-tuned.

    Args:
        rows: the split whose rows a model transform reads.
        seed: of what is drawn: fresh LoRAs of modules that get no update; the migration's if None.
    """
    chosen = transform(method)
    drawn = settings.seed if seed is None else seed
    if isinstance(chosen, ModelTransform):
        inputs = {**context.both_bases(), "adapter": source.adapter, "rows": rows, **pair.inputs(method)}
        told = {
            "method": method,
            "rank": source.lora["rank"],
            "output_type": source.lora.get("output_type", "lora"),
            "cutoff": settings.pair.calibration_cutoff,
            "seed": drawn,
        }
        return context.run(model_fit, inputs, told, label=label, paths=source.paths)
    inputs = {
        "old_model": context.fingerprints["old_model"],
        "new_model": context.fingerprints["new_model"],
        "adapter": source.adapter,
        **pair.inputs(method, LAYER_INPUTS),
    }
    if source.changes_embeddings:
        inputs["vocabulary"] = pair.vocabulary
    if source.experts and pair.expert_maps is not None:
        inputs["expert_maps"] = pair.expert_maps
    # Only fresh layers are drawn: where there are none, another seed gives the same adapter.
    told = {"method": method, "unmapped": settings.unmapped, "seed": drawn if settings.unmapped == "train" else 0}
    return context.run(transform_stage, inputs, {**told, **source.lora}, label=label, paths=source.paths)


@dataclass(frozen=True)
class Tuning:
    """How a fine-tune goes: hyperparameters, learning rates to choose from, and texts of the base's own by row."""

    finetune: FinetuneSettings
    rates: tuple[float, ...] = ()
    rehearsal: float = 0.0


def rehearsal(context: Context, side: str, share: float, seed: int) -> tuple[dict[str, Ref], dict[str, float]]:
    """Texts of a base's own as input of a fine-tune's stage, and the stage's setting of them; both empty without."""
    if not share:
        return {}, {}
    texts = context.run(rehearsing, context.base(side), {"seed": seed}, paths=context.base_path(side))
    return {"rehearsal": texts}, {"rehearsal": share}


def tuned(
    context: Context,
    side: str,
    rows: Ref,
    tuning: Tuning,
    *,
    start: Ref | None = None,
    fresh: Mapping[str, Any] | None = None,
    taught: Mapping[str, Ref] = MappingProxyType({}),
    label: str | None = None,
) -> Ref:
    """An adapter of one base fine-tuned on the rows of a split.

    Args:
        side: ``old`` or ``new``.
        start: the artifact of the adapter to start from; or
        fresh: settings of an untrained one (:func:`lorasuite.adapters.fresh_config`).
        taught: what the teacher says of the rows' tokens, by the names of the stage's inputs.
    """
    texts, told = rehearsal(context, side, tuning.rehearsal, tuning.finetune.seed)
    inputs: dict[str, Any] = {**context.base(side), "rows": rows, **taught, **texts}
    if start is not None:
        inputs["transform"] = start
    values = {
        "fresh": None if fresh is None else dict(fresh),
        "finetune": tuning.finetune.computed(),
        "learning_rates": list(tuning.rates),
        **told,
    }
    work = context.where.home / WORK / finetune.key(inputs, values)[:32]
    return context.run(finetune, inputs, values, label, {**context.base_path(side), WORK: work})
