"""The artifacts of a pair of base models: each stage runs when something first asks for what it makes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists

from flows.context import Context
from lorasuite.bases import ATTENTION, MLP, ROLES, Checkpoint, Role, digest_json
from lorasuite.correspondence import FUNCTIONAL, ORTHOGONAL, End, HeadMaps, MapKind
from lorasuite.planning import PairSettings
from lorasuite.transforms import AlignedTransform, Input, transform
from tasks.pair_stages import (
    activations,
    alignment,
    expert_maps,
    head_mapping,
    layer_mapping,
    mlp_factors,
    similarity,
    state_map,
    transfer_matrices,
    vocabulary,
)
from tasks.stage import Ref

#: A host that dies while it computes a pair's artifacts holds the others up for so long.
LEASE_SECONDS = 60
#: Roles aligned together: adapters of attention alone do not pay for the MLP's.
GROUPS: dict[str, tuple[Role, ...]] = {"attention": ATTENTION, "mlp": MLP}
#: The kinds of map that every pair's alignment has, of what projections read and of what they write.
SHARED: dict[End, tuple[MapKind, ...]] = {"in": (FUNCTIONAL, ORTHOGONAL), "out": (ORTHOGONAL,)}


class Pair:
    """References to a pair's artifacts, for adapters of some roles. Reading one runs its stage, or finds its artifact.

    Args:
        texts: the calibration texts; None where there are none, and then there is no ``similarity``.
        roles: what the adapters to move have updates of.
    """

    def __init__(self, context: Context, settings: PairSettings, texts: Ref | None, roles: Sequence[Role]) -> None:
        self.context, self.settings, self.texts, self.roles = context, settings, texts, tuple(roles)
        #: By label; ``maps`` has the shared kinds, others those of one transform alone.
        self.alignments: dict[str, Ref] = {}
        self.old = Checkpoint(context.where.path("old_base"))
        self.new = Checkpoint(context.where.path("new_base"))

    # ------------------------------------------------------------------------------------------------- the artifacts

    @cached_property
    def vocabulary(self) -> Ref:
        """The tokens both vocabularies hold."""
        rows = {"old_rows": self.old.dims.vocab_size, "new_rows": self.new.dims.vocab_size}
        return self.context.run(vocabulary, self._tokenizers, rows)

    @cached_property
    def transfer_matrices(self) -> Ref:
        """``W_h``."""
        inputs = {**self._models, "vocabulary": self.vocabulary}
        return self.context.run(transfer_matrices, inputs, {"when": self.settings.transfer_matrix})

    @cached_property
    def similarity(self) -> Ref | None:
        """How alike every old layer is to every new one; None without texts."""
        if self.texts is None:
            return None
        states = {side: self._activations(side, self.texts) for side in ("old", "new")}
        # The minibatch is CKA's alone: it must not tell apart artifacts of the other metrics.
        batch = self.settings.cka_batch if self.settings.similarity == "cka" else 0
        return self.context.run(similarity, states, {"metric": self.settings.similarity, "batch_size": batch})

    @cached_property
    def layer_mapping(self) -> Ref:
        """Which new layer continues which old one; by place where nothing tells, and then no transform reads it."""
        strategy = self.settings.layer_strategy
        if strategy == "dp" and self.similarity is None and self.old.dims.layers != self.new.dims.layers:
            strategy = "middle"
        return self.context.run(
            layer_mapping,
            {} if self.similarity is None else {"similarity": self.similarity},
            {
                "strategy": strategy,
                "max_offset": self.settings.max_offset,
                "old": self.old.dims.layers,
                "new": self.new.dims.layers,
            },
        )

    @cached_property
    def head_mapping(self) -> Ref:
        """Which new head continues which old one, layer by layer."""
        inputs = {
            **self._models,
            "layer_mapping": self.layer_mapping,
            "transfer_matrices": self.transfer_matrices,
        }
        return self.context.run(head_mapping, inputs, {"matching": self.settings.head_matching})

    @cached_property
    def mlp_factors(self) -> dict[str, Ref]:
        """The old base's MLP factors by role, of the roles both bases have."""
        inputs = {"old_model": self.context.fingerprints["old_model"]}
        roles = [role for role in self.roles if role in self._shared_roles and role in MLP]
        return {role: self.context.run(mlp_factors, inputs, {"role": role}, label=role) for role in roles}

    @cached_property
    def expert_maps(self) -> Ref | None:
        """Which new expert continues which old one, and their maps; None without texts, or experts in both bases."""
        if self.texts is None or not (self.old.has_experts and self.new.has_experts):
            return None
        inputs = {**self._models, **self._tokenizers, "layer_mapping": self.layer_mapping, "texts": self.texts}
        settings = {
            "cutoff": self.settings.calibration_cutoff,
            "read": [kind.name for kind in SHARED["in"]],
            "written": [kind.name for kind in SHARED["out"]],
            "positions": self.settings.map_positions,
        }
        return self.context.run(expert_maps, inputs, settings)

    @cached_property
    def state_map(self) -> Ref | None:
        """Where the new base stands when the old one stands somewhere; None without texts.

        Of all roles of the groups that the adapter's are of: other adapters will want it.
        """
        if self.texts is None:
            return None
        roles = [role for group, members in self._groups.items() for role in members if group in GROUPS]
        inputs = {**self._models, **self._tokenizers, "texts": self.texts}
        return self.context.run(state_map, inputs, {"roles": roles, "cutoff": self.settings.calibration_cutoff})

    # ------------------------------------------------------------------------------------------------------- for flows

    def prepare(self, methods: Iterable[str]) -> None:
        """Everything that transforms of these names read, and what every record of a migration shows.

        On one host, locks see to it that each stage is computed once; hosts that share a store take turns at a pair.
        """
        with self._one_host_at_a_time():
            for name in ("vocabulary", "transfer_matrices", "similarity", "layer_mapping", "head_mapping"):
                getattr(self, name)
            for method in sorted(methods):
                self.inputs(method)

    def inputs(self, method: str, more: Iterable[Input] = ()) -> dict[str, Any]:
        """What a transform reads, and ``more``, as inputs of its stage, those that there are none of left out."""
        chosen = transform(method)
        found = {
            one.value: self._alignment(chosen) if one is Input.ALIGNMENT else getattr(self, one.value)
            for one in Input
            if one in chosen.inputs or one in more
        }
        return {name: ref for name, ref in found.items() if ref}

    def made(self) -> dict[str, Ref]:
        """Every reference that was asked for, by a name of its own."""
        found: dict[str, Ref] = {}
        for name, value in vars(self).items():
            if isinstance(value, Ref) and name != "texts":
                found[name] = value
            elif name == "mlp_factors":
                found |= {f"{name}_{part}": ref for part, ref in value.items()}
        return found | {f"alignment_{part}": ref for part, ref in self.alignments.items()}

    def record(self) -> dict[str, Any]:
        """The pair's maps as ``migration.json`` keeps them."""
        context = self.context
        layers = context.open(self.layer_mapping).info
        heads = context.open(self.head_mapping)
        fitted = context.open(self.transfer_matrices).info
        aligned = self.alignments.get("maps")
        return {
            "layer_map": layers["layers"],
            "layer_similarity": layers["similarity"],
            "head_map": {
                f"{o}->{n}": matched for o, n in layers["layers"].items() if (matched := heads.info["heads"].get(o))
            },
            "transfer_matrix": {name: fitted[name] for name in ("identity", "residual", "tokens")},
            "head_similarity": HeadMaps.read(heads).mean_similarity(),
            "alignment": None if aligned is None else _fit(context.open(aligned).info),
        }

    # -------------------------------------------------------------------------------------------------------- private

    def _alignment(self, chosen: Any) -> dict[str, Ref]:
        """The maps of the spaces that mapped modules read and write, for a transform; nothing without texts."""
        if self.texts is None or not isinstance(chosen, AlignedTransform):
            return {}
        own: dict[End, tuple[MapKind, ...]] = {
            end: tuple(kind for kind in [chosen.maps[end]] if kind not in shared) if end in chosen.maps else ()
            for end, shared in SHARED.items()
        }
        labels = {"maps": SHARED} | ({chosen.name: own} if any(own.values()) else {})
        inputs = {**self._models, **self._tokenizers, "layer_mapping": self.layer_mapping, "texts": self.texts}
        for label, kinds in labels.items():
            if label not in self.alignments:
                settings = {
                    "roles": [role for group in self._groups.values() for role in group],
                    "cutoff": self.settings.calibration_cutoff,
                    "read": [kind.name for kind in kinds["in"]],
                    "written": [kind.name for kind in kinds["out"]],
                    "positions": self.settings.map_positions,
                }
                self.alignments[label] = self.context.run(alignment, inputs, settings, label=label)
        return {label: self.alignments[label] for label in labels}

    @property
    def _models(self) -> dict[str, str]:
        return {name: self.context.fingerprints[name] for name in ("old_model", "new_model")}

    @property
    def _tokenizers(self) -> dict[str, str]:
        return {name: self.context.fingerprints[name] for name in ("old_tokenizer", "new_tokenizer")}

    @property
    def _shared_roles(self) -> list[Role]:
        return [role for role in self.old.every_role if role in self.new.every_role]

    @property
    def _groups(self) -> dict[str, list[Role]]:
        """Roles that both bases have, by group, of those groups that an adapter of these roles has any of."""
        groups = {**GROUPS, "own": tuple(role for role in self._shared_roles if role not in ROLES)}
        both = {group: [role for role in members if role in self._shared_roles] for group, members in groups.items()}
        return {group: kept for group, kept in both.items() if set(kept) & set(self.roles)}

    def _activations(self, side: str, texts: Ref) -> Ref:
        return self.context.run(
            activations,
            # of the files: texts are read in the reader's own precision, however bases that are run are loaded
            {"model": self._models[f"{side}_model"], "tokenizer": self.context.reader(side), "texts": texts},
            {"cutoff": self.settings.calibration_cutoff, "pooling": self.settings.pooling},
            label=side,
            paths=self.context.base_path(side),
        )

    @contextlib.contextmanager
    def _one_host_at_a_time(self) -> Iterator[None]:
        """Hold the pair's global concurrency limit, where artifacts are shared between hosts."""
        if self.context.where.remote is None:
            yield
            return
        name = "lorasuite-pair-" + digest_json(list(self._models.values()))[:16]
        with get_client(sync_client=True) as client, contextlib.suppress(ObjectAlreadyExists):
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
        # Strict: without it a limit that does not exist would be ignored. The lease of a killed host runs out; one that
        # could not be renewed stops nothing, for computing a stage twice gives the same object twice.
        with concurrency(name, strict=True, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False):
            yield


def _fit(info: Mapping[str, Any]) -> dict[str, Any]:
    """What the record of a migration keeps of an alignment."""
    return {name: info[name] for name in ("rows", "residual")}


def pair_name(old_base: str, new_base: str) -> str:
    """Short name of a pair, for tags and run names."""
    return f"{Path(old_base).name}→{Path(new_base).name}"
