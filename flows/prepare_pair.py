"""The pair's artifacts: everything about two base models that no adapter changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists
from prefect.runtime import flow_run

from artifacts import Artifact, default_home
from flows.context import Context, base_record, check_stages, fetch, tag_run
from flows.dashboard import show_pair
from lorasuite.bases import ATTENTION, Checkpoint, Role, digest_json, load_tokenizer, resolve
from lorasuite.data import calibration_texts
from lorasuite.planning import AUTO, PairSettings, inspect, torch_device
from lorasuite.reporting import PairRecord
from lorasuite.transforms import Input, names, transform
from tasks.fingerprints import fingerprint_bases, fingerprint_texts
from tasks.pair_stages import (
    activations,
    alignment,
    alignment_fit,
    head_mapping,
    layer_mapping,
    mlp_factors,
    similarity,
    state_map,
    transfer_matrices,
    vocabulary,
)
from tasks.stage import Recorder, Ref, Where

#: A host that dies while it computes a pair's artifacts holds the others up for so long.
LEASE_SECONDS = 60


@dataclass(frozen=True)
class PairRefs:
    """References to a pair's artifacts; ``similarity`` is None where there were no calibration texts."""

    vocabulary: Ref
    transfer_matrices: Ref
    similarity: Ref | None
    layer_mapping: Ref
    head_mapping: Ref
    mlp_factors: dict[Role, Ref]
    alignment: dict[str, Ref]
    alignment_fit: Ref | None
    state_map: Ref | None

    def named(self) -> dict[str, Ref]:
        """Every reference by the name stages take it under."""
        refs = {
            "vocabulary": self.vocabulary,
            "transfer_matrices": self.transfer_matrices,
            "layer_mapping": self.layer_mapping,
            "head_mapping": self.head_mapping,
        }
        if self.similarity is not None:
            refs["similarity"] = self.similarity
        if self.state_map is not None:
            refs["state_map"] = self.state_map
        refs |= {f"mlp_factors_{role}": ref for role, ref in self.mlp_factors.items()}
        return refs | {f"alignment_{group}": ref for group, ref in self.alignment.items()}


#: Roles aligned together: their moments are one artifact, and adapters of attention alone do not pay for the MLP's.
GROUPS: dict[str, tuple[Role, ...]] = {"attention": ATTENTION, "mlp": ("gate", "up", "down")}


def pair_stages(
    context: Context, settings: PairSettings, calibration: str | None, roles: Sequence[Role], methods: Sequence[str]
) -> PairRefs:
    """Run the pair's stages, those that need it for the adapter's roles and by the methods that read them.

    On one host, locks see to it that each is computed once; hosts that share a store take turns at a pair.
    """
    with one_host_at_a_time(context):
        return _pair_stages(context, settings, calibration, roles, methods)


@contextlib.contextmanager
def one_host_at_a_time(context: Context) -> Iterator[None]:
    """Hold the pair's global concurrency limit, where artifacts are shared between hosts."""
    if context.where.remote is None:
        yield
        return
    name = "lorasuite-pair-" + digest_json([context.prints["old_model"], context.prints["new_model"]])[:16]
    with get_client(sync_client=True) as client, contextlib.suppress(ObjectAlreadyExists):
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
    # Strict: without it a limit that does not exist would be ignored. The lease of a killed host runs out; one that
    # could not be renewed stops nothing, for computing a stage twice gives the same object twice.
    with concurrency(name, strict=True, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False):
        yield


def _pair_stages(
    context: Context, settings: PairSettings, calibration: str | None, roles: Sequence[Role], methods: Sequence[str]
) -> PairRefs:
    old, new = Checkpoint(context.where.path("old_base")), Checkpoint(context.where.path("new_base"))
    both = {"old_model": "old_model", "new_model": "new_model"}
    words = context.run(
        vocabulary,
        {"old_tokenizer": "old_tokenizer", "new_tokenizer": "new_tokenizer"},
        {"old_rows": old.dims.vocab_size, "new_rows": new.dims.vocab_size},
    )
    matrices = context.run(transfer_matrices, {**both, "vocabulary": words}, {"when": settings.transfer_matrix})
    table = None
    if calibration is not None:
        reading = {
            "samples": settings.calibration_samples,
            "cutoff": settings.calibration_cutoff,
            "pooling": settings.pooling,
            "batch_size": 16,
        }
        states = {
            side: context.run(
                activations,
                {"model": f"{side}_model", "tokenizer": f"{side}_tokenizer", "calibration": calibration},
                reading,
                label=side,
                base=context.where.path(f"{side}_base"),
            )
            for side in ("old", "new")
        }
        # The minibatch is CKA's alone: it must not tell apart artifacts of the other metrics.
        batch = settings.cka_batch if settings.similarity == "cka" else 0
        table = context.run(similarity, states, {"metric": settings.similarity, "batch_size": batch})
    layers = context.run(
        layer_mapping,
        {} if table is None else {"similarity": table},
        {
            "strategy": settings.layer_strategy,
            "max_offset": settings.max_offset,
            "old": old.dims.layers,
            "new": new.dims.layers,
        },
    )
    heads = context.run(
        head_mapping,
        {**both, "layer_mapping": layers, "transfer_matrices": matrices},
        {"matching": settings.head_matching},
    )
    shared = [role for role in roles if role in old.architecture.roles and role in new.architecture.roles]
    needed = frozenset[Input]().union(*(transform(method).inputs for method in methods))
    factors: dict[Role, Ref] = {}
    moments: dict[str, Ref] = {}
    if calibration is not None and Input.ALIGNMENT in needed:
        reading = {"samples": settings.calibration_samples, "cutoff": settings.calibration_cutoff}
        tokenizers = {"old_tokenizer": "old_tokenizer", "new_tokenizer": "new_tokenizer"}
        for group, kept in _groups(old, new, roles).items():
            moments[group] = context.run(
                alignment,
                {**both, **tokenizers, "layer_mapping": layers, "calibration": calibration},
                {**reading, "roles": kept},
                label=group,
            )
    fit = None
    if moments:
        fit = context.run(alignment_fit, dict(moments), {})
    if Input.MLP_FACTORS in needed:
        factors = {
            role: context.run(mlp_factors, {"old_model": "old_model"}, {"role": role}, label=role)
            for role in shared
            if role not in ATTENTION
        }
    learned: Ref | None = None
    if calibration is not None and Input.STATE_MAP in needed:
        learned = state_map_stage(context, settings, calibration, roles)
    return PairRefs(words, matrices, table, layers, heads, factors, moments, fit, learned)


def _groups(old: Checkpoint, new: Checkpoint, roles: Sequence[Role]) -> dict[str, list[Role]]:
    """Roles that both bases have, by group, of those groups that an adapter of these roles has any of."""
    both = {
        group: [role for role in members if role in old.architecture.roles and role in new.architecture.roles]
        for group, members in GROUPS.items()
    }
    return {group: kept for group, kept in both.items() if set(kept) & set(roles)}


def state_map_stage(context: Context, settings: PairSettings, calibration: str, roles: Sequence[Role]) -> Ref:
    """The state map, of all roles of the groups that the adapter's are of: others will want it."""
    old, new = (Checkpoint(context.where.path(base)) for base in ("old_base", "new_base"))
    names = ("old_model", "new_model", "old_tokenizer", "new_tokenizer")
    return context.run(
        state_map,
        {**{name: name for name in names}, "calibration": calibration},
        {
            "samples": settings.calibration_samples,
            "cutoff": settings.calibration_cutoff,
            "roles": [role for kept in _groups(old, new, roles).values() for role in kept],
        },
    )


def run_name(parameters: Mapping[str, Any] | None = None) -> str:
    """``old→new``; of this flow run, where no parameters are given."""
    given = flow_run.parameters if parameters is None else parameters
    return pair_name(str(given.get("old_base")), str(given.get("new_base")))


@flow(name="prepare-pair", flow_run_name=run_name, validate_parameters=False)
def prepare_pair(
    old_base: str,
    new_base: str,
    calibration: str | None = None,
    settings: dict[str, Any] | None = None,
    method: str = "lorasuite",
    device: str = "auto",
    refresh: tuple[str, ...] = (),
    trust_remote_code: bool = False,
    roles: Sequence[Role] | None = None,
    architectures: str | None = None,
) -> dict[str, Any]:
    """Compute, or find, every artifact of a pair of bases.

    Args:
        architectures: a directory of architecture files beside this package's.
        roles: the projections that the adapters to come have updates of; all of the architecture's if None.

    Returns:
        the pair's layer map, transfer matrix, artifact keys and timings, as JSON.
    """
    refreshed = check_stages(tuple(refresh))
    chosen = PairSettings.model_validate(settings or {})
    tag_run(pair=pair_name(old_base, new_base))
    fetch(old_base, new_base)
    inspect(old_base, new_base, trust_remote_code=trust_remote_code, architectures=architectures).raise_problems()
    home = default_home()
    paths = {"old_base": resolve(old_base), "new_base": resolve(new_base)}
    prints = fingerprint_bases(home, paths["old_base"], paths["new_base"])
    texts_print = None
    if calibration is not None:
        reader = load_tokenizer(paths["new_base"], trust_remote_code)
        texts_print = fingerprint_texts(calibration_texts(calibration, reader)[: chosen.calibration_samples])
        paths["calibration"] = Path(calibration)
    where = Where(home=home, device=torch_device(device), paths=paths, options={"trust_remote_code": trust_remote_code})
    context = Context(where, prints, refreshed, pair=pair_name(old_base, new_base))
    with Recorder() as recorder:
        every = Checkpoint(paths["old_base"]).architecture.roles
        methods = names() if method == AUTO else [method]
        refs = pair_stages(context, chosen, texts_print, every if roles is None else roles, methods)
    bases = {
        "old_base": base_record(old_base, prints["old_model"]),
        "new_base": base_record(new_base, prints["new_model"]),
    }
    record = PairRecord.model_validate({**bases, **pair_record(context, refs)})
    show_pair(context, record, refs.similarity)
    return {
        **record.model_dump(mode="json"),
        "artifacts": {name: ref.key for name, ref in refs.named().items()},
        "timings": timings(recorder),
    }


def pair_name(old_base: str, new_base: str) -> str:
    """Short name of a pair, for tags and run names."""
    return f"{Path(old_base).name}→{Path(new_base).name}"


def pair_record(context: Context, refs: PairRefs) -> dict[str, Any]:
    """The pair's maps as ``migration.json`` keeps them."""
    layers = context.open(refs.layer_mapping).info
    heads = context.open(refs.head_mapping).info["heads"]
    fitted = context.open(refs.transfer_matrices).info
    return {
        "layer_map": layers["layers"],
        "layer_similarity": layers["similarity"],
        "head_map": {f"{o}->{n}": heads[o] for o, n in layers["layers"].items()},
        "transfer_matrix": {
            "identity": fitted["identity"],
            "residual": fitted["residual"],
            "tokens": fitted["tokens"],
        },
        "head_similarity": _head_similarity(context.open(refs.head_mapping)),
        "alignment": None if refs.alignment_fit is None else context.open(refs.alignment_fit).info,
    }


def _head_similarity(artifact: Artifact) -> dict[str, float]:
    """Mean similarity of the matched heads, by old layer."""
    means = {}
    for layer, heads in artifact.info["heads"].items():
        table = artifact.tensor(layer)
        means[layer] = round(sum(float(table[int(a), b]) for a, b in heads.items()) / max(1, len(heads)), 4)
    return means


def timings(recorder: Recorder) -> list[dict[str, Any]]:
    """Seconds, cached or not, and the memory of the computation, for every stage that ran."""
    return [
        {
            "stage": run.stage,
            "label": run.label,
            "cached": run.cached,
            "seconds": round(run.seconds, 3),
            "computed_seconds": run.computed.get("seconds", 0.0),
            "peak_memory_bytes": run.computed.get("max_cuda_bytes") or run.computed.get("max_rss_bytes", 0),
            "key": run.key,
        }
        for run in recorder.runs
    ]
