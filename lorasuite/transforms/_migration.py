"""A whole adapter through a transform, layer by layer: never more than two layers' weights in memory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from lorasuite.adapters import Adapter, Extras, LowRank, fuse_updates, split_update
from lorasuite.bases import ATTENTION, MLP, Checkpoint, CommonTokens, Dimensions, Module, Role
from lorasuite.correspondence import End, ExpertMaps, MapKind, SpaceMap, TransferMatrix, index_heads
from lorasuite.errors import AdapterError, ConfigError, Problem
from lorasuite.progress import Progress
from lorasuite.transforms._embeddings import move_embeddings
from lorasuite.transforms._experts import MovedExperts, not_moved
from lorasuite.transforms._magnitudes import bias_changes, move_rows, new_magnitudes, own_biases, relative_magnitudes
from lorasuite.transforms._options import Unmapped
from lorasuite.transforms._protocol import Input, LayerPair, LayerTransform, can_move, takes_stored
from lorasuite.transforms._registry import transform


@dataclass(eq=False)
class Migrated:
    """The new base's updates by module path, and what happened on the way.

    ``retained`` is the share of each update's energy ``‖ΔW‖²`` kept by the cut to the output rank; ``dropped`` names
    each old module or role that has no place in the new base, and why; ``fresh`` holds ``(B, A)`` of modules that start
    from a fresh initialisation; ``extras`` what lies beside the updates; ``carried`` how many rows of each embedding
    found their token; ``rank`` the rank they are all written with.
    """

    updates: dict[str, LowRank] = field(default_factory=dict)
    retained: dict[str, float] = field(default_factory=dict)
    dropped: list[dict[str, str]] = field(default_factory=list)
    fresh: dict[str, tuple[Float32[Tensor, "out r"], Float32[Tensor, "r in"]]] = field(default_factory=dict)
    extras: Extras = field(default_factory=Extras)
    carried: list[dict[str, object]] = field(default_factory=list)
    rank: int = 0

    def info(self) -> dict[str, Any]:
        """What happened on the way, as JSON data."""
        return {
            "norms": self.norms(),
            "retained_energy": self.energies(),
            "dropped": self.dropped,
            "fresh": sorted(self.fresh),
            "carried": self.carried,
            "rank": self.rank,
        }

    def norms(self) -> dict[str, float]:
        """‖ΔW‖ of each new module; of experts, of the 3-D parameter as a whole."""
        found: dict[str, float] = {}
        for path, update in self.updates.items():
            whole = _of_all_experts(path)
            found[whole] = math.hypot(found.get(whole, 0.0), update.norm())
        return found

    def energies(self) -> dict[str, float]:
        """The retained share of each new module; of experts, the least of any."""
        found: dict[str, float] = {}
        for path, share in self.retained.items():
            whole = _of_all_experts(path)
            found[whole] = min(found.get(whole, 1.0), share)
        return found


def _of_all_experts(path: str) -> str:
    """The path of an expert's update without the expert's number; any other as it is."""
    return re.sub(r"\.experts\.\d+\.(\w+)$", r".experts.\1", path)


def migrate(
    adapter: Adapter,
    old: Checkpoint,
    new: Checkpoint,
    *,
    method: str,
    layers: Mapping[int, int],
    heads: Mapping[int, Mapping[int, int]],
    transfer: TransferMatrix,
    mlp_factor: Callable[[int, Role], Float[Tensor, "s s"]],
    alignment: Callable[[int, Role, End, MapKind], SpaceMap] | None = None,
    experts: ExpertMaps | None = None,
    rank: int,
    energy: float | None = None,
    unmapped: Unmapped = "freeze",
    seed: int = 42,
    common: CommonTokens | None = None,
    progress: Progress | None = None,
) -> Migrated:
    """Move every update of an adapter to the new base.

    Args:
        layers: old → new layer.
        heads: for each old layer, old → new query head; none for a pair of layers that do not both have attention.
        mlp_factor: gives :func:`lorasuite.correspondence.mlp_factor` of an old layer and role.
        alignment: gives a map of an old layer's role and end, for transforms that look at activations.
        experts: matched experts and their maps; without them updates of experts are dropped.
        rank: output rank of every module.
        energy: instead of ``rank``, the smallest rank at which every module keeps this share of its ``‖ΔW‖²``.
        unmapped: what becomes of new layers without a partner: ``freeze`` leaves them out of the adapter (the paper's
            zeroed and frozen layers), ``train`` gives them a fresh LoRA (``B = 0``), and the MLPs of a base without
            experts one in the place of experts.
        common: the shared tokens, for an adapter that changes embeddings.

    Raises:
        AdapterError: if the adapter does not fit the old base, or nothing of it can be moved.
        ConfigError: if ``method`` is unknown, or no layer transform.
    """
    chosen = transform(method)
    if not isinstance(chosen, LayerTransform):
        raise ConfigError(Problem("method", f"{method} fits whole models, not one layer", "Use its `fit`."))
    result = Migrated()
    by_layer = adapter.by_layer(old)
    result.dropped += not_moved(adapter, old, "")
    covered: set[Role] = set()

    def keep(path: str, update: LowRank, parts: int = 1) -> None:
        cut = update.compress(rank * parts) if energy is None else update.compress(energy=energy)
        result.updates[path], result.retained[path] = cut

    for done, (o, modules) in enumerate(by_layer.items(), 1):
        if o not in layers:
            why = f"old layer {o} has no partner in the new base"
            result.dropped += [{"module": path, "why": why} for path in modules]
            continue
        n = layers[o]
        old_dims, new_dims = old.layer_dims(o), new.layer_dims(n)
        updates: dict[Role, LowRank] = {}
        for path, module in modules.items():
            updates.update(split_update(adapter.update(path, old), module, old_dims))
        for role in list(updates):
            if why := _no_place(chosen, old, new, (o, n), role, o in heads):
                result.dropped.append({"module": old.architecture.path(o, _holder(old, o, role)), "why": why})
                del updates[role]
        needed = tuple(chosen.weights(tuple(updates)))
        factors = {}
        if Input.MLP_FACTORS in chosen.inputs:
            factors = {role: mlp_factor(o, role) for role in needed if role in MLP}
        maps = None if alignment is None else partial(alignment, o)
        stored = takes_stored(chosen)
        pair = LayerPair(
            old.layer(o, needed, stored), new.layer(n, needed, stored), old_dims, new_dims, heads.get(o, {}), transfer,
            factors, maps,
        )  # fmt: skip
        moved = chosen.move(pair, updates)
        del pair  # its weights go before the next layers come
        for module in new.modules(n):
            parts = {role: moved[role] for role in module.roles if role in moved}
            if parts:
                path = new.architecture.path(n, module)
                covered.update(module.roles)
                keep(path, fuse_updates(parts, module, new_dims))
        rows = index_heads(old_dims, new_dims) if chosen.keeps_places else heads.get(o, {})
        _move_rows_of_layer(adapter, result, modules, (old, o, old_dims), (new, n, new_dims), rows)
        if progress is not None:
            progress(done, len(by_layer))
    moved_experts = MovedExperts(adapter, (old, new), chosen, transfer, experts)
    for path, update, apart in moved_experts.move(layers):
        keep(path, update, apart)
    result.dropped += moved_experts.dropped
    embeddings = move_embeddings(adapter, old, new, common, transfer)
    for path, update in embeddings.updates.items():
        keep(path, update)
    result.extras.saved, result.extras.tokens = embeddings.extras.saved, embeddings.extras.tokens
    result.carried = embeddings.carried
    result.dropped += embeddings.dropped
    if not any(update.norm() > 0 for update in result.updates.values()):
        raise AdapterError(
            Problem(
                str(adapter.path),
                "nothing of it can be moved to the new base (every update is zero or dropped)",
                "; ".join(sorted({d["why"] for d in result.dropped})) or "Was the adapter trained at all?",
            )
        )
    result.rank = rank if energy is None else max(1, *(update.rank for update in result.updates.values()))
    if unmapped == "train":
        initialise(result, new, set(layers.values()), covered, result.rank, seed)
        if moved_experts.dropped and not new.has_experts:
            initialise(result, new, (), MLP, result.rank, seed)  # in the experts' place
    if adapter.contents.magnitudes:
        for path in result.fresh:
            layer, module = _located(new, path)
            result.extras.magnitudes[path] = new.weight(layer, module).norm(dim=1)
    if result.extras.biases:  # PEFT wants those of every module it trains
        result.extras.biases = own_biases([*result.updates, *result.fresh], new) | result.extras.biases
    return result


Place = tuple[Checkpoint, int, Dimensions]


def _move_rows_of_layer(
    adapter: Adapter,
    result: Migrated,
    modules: Mapping[str, Module],
    old: Place,
    new: Place,
    heads: Mapping[int, int],
) -> None:
    """Magnitudes and biases of one layer's modules."""
    contents = adapter.contents
    if not contents.magnitudes and not contents.biases:
        return
    (before, _, old_dims), (after, layer, new_dims) = old, new
    ratios = relative_magnitudes(adapter, modules, before, old_dims) if contents.magnitudes else {}
    shifts = bias_changes(adapter, modules, before, old_dims) if contents.biases else {}
    for module in after.modules(layer):
        path = after.architecture.path(layer, module)
        if path not in result.updates:
            continue
        if contents.magnitudes:
            weight = after.weight(layer, module)
            result.extras.magnitudes[path] = new_magnitudes(ratios, module, weight, old_dims, new_dims, heads)
        moved = {
            role: change
            for role in module.roles
            if role in shifts
            and (change := move_rows(shifts[role], role, old_dims, new_dims, heads, "shift")) is not None
        }
        own = own_biases([path], after).get(path)
        for role in module.roles:
            if role in shifts and (own is None or role not in moved):
                why = "the new module has no bias" if own is None else "the old and new outputs have other sizes"
                result.dropped.append({"module": f"{path} ({role} bias)", "why": why})
        if own is not None and moved:
            whole = {
                role: moved.get(role, torch.zeros(new_dims.rows(role), dtype=torch.float64)) for role in module.roles
            }
            result.extras.biases[path] = own.double() + module.fuse(whole, new_dims)


def _located(checkpoint: Checkpoint, path: str) -> tuple[int, Module]:
    found = checkpoint.architecture.locate(path)
    assert found is not None
    return found


def _holder(checkpoint: Checkpoint, layer: int, role: Role) -> Module:
    return next(module for module in checkpoint.modules(layer) if role in module.roles)


def _no_place(
    chosen: LayerTransform, old: Checkpoint, new: Checkpoint, pair: tuple[int, int], role: Role, matched: bool
) -> str:
    """Why a role's update does not go from one old layer to the new one that continues it; empty if it does.

    Args:
        matched: whether the heads of the two layers are.
    """
    o, n = pair
    if role not in new.every_role:
        return f"the new base has no {role} projection"
    if role not in new.roles(n):
        return f"layer {n} of the new base has no {role} projection{' outside its experts' if role in MLP else ''}"
    if not can_move(chosen, role):
        return f"{chosen.name} has no rule for {role} projections"
    if role in ATTENTION and Input.HEAD_MAPPING in chosen.inputs and not matched:
        return f"old layer {o} and new layer {n} do not both have all of {', '.join(ATTENTION)}: no heads are matched"
    return ""


def unmoved(adapter: Adapter, old: Checkpoint, new: Checkpoint, rank: int, seed: int = 42) -> Migrated:
    """A fresh LoRA of the new base, for an adapter of which nothing can be moved or is to be.

    It is what rows, the user's or those that the old base writes with the adapter, are trained into: of the roles that
    the adapter has and the new base too, or of every linear module where there are none.
    """
    result = Migrated(rank=rank)
    result.dropped = not_moved(adapter, old, "the new base has no place for them")
    roles = adapter.roles(old.architecture)
    shared = [role for role in roles if role in new.every_role]
    for role in roles:
        if role not in shared:
            why = f"the new base has no {role} projection"
            result.dropped.append({"module": f"every {role} projection", "why": why})
    initialise(result, new, (), shared or new.every_role, rank, seed)
    return result


def initialise(
    result: Migrated, new: Checkpoint, mapped: Collection[int], covered: Collection[Role], rank: int, seed: int
) -> None:
    """PEFT's own initialisation (Kaiming-uniform ``A``, zero ``B``) of modules that lack an update: those of the
    ``covered`` roles, in layers that are not ``mapped``."""
    generator = torch.Generator().manual_seed(seed)
    for layer in range(new.dims.layers):
        if layer in mapped:
            continue
        dims = new.layer_dims(layer)
        for module in new.modules(layer):
            if new.architecture.path(layer, module) not in result.updates and set(covered) & set(module.roles):
                rows = sum(dims.rows(role) for role in module.roles)
                A = torch.empty(rank, dims.columns(module.roles[0]))
                torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
                result.fresh[new.architecture.path(layer, module)] = (torch.zeros(rows, rank), A)
