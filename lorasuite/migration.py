"""A whole adapter through a transform, layer by layer: never more than two layers' weights in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lorasuite.adapter import Adapter, fuse_updates, split_update
from lorasuite.alignment import Moments
from lorasuite.architectures import ATTENTION, Module, Role
from lorasuite.checkpoint import Checkpoint
from lorasuite.errors import AdapterError, Problem
from lorasuite.head_mapping import head_similarity, index_heads, match_heads
from lorasuite.lowrank import LowRank
from lorasuite.transfer_matrix import TransferMatrix
from lorasuite.transforms import LayerPair, transform

Unmapped = Literal["freeze", "train"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class HeadMatch:
    """Mapped heads of one layer pair and their similarity ``(H_o, H_n)``."""

    heads: dict[int, int]
    similarity: Tensor


@dataclass(eq=False)
class Migrated:
    """The new base's updates by module path, and what happened on the way.

    ``retained`` is the share of each update's energy ``‖ΔW‖²`` kept by the cut to the output rank; ``dropped`` names
    each old module or role that has no place in the new base, and why; ``fresh`` holds ``(B, A)`` of modules that start
    from a fresh initialisation.
    """

    updates: dict[str, LowRank] = field(default_factory=dict)
    retained: dict[str, float] = field(default_factory=dict)
    dropped: list[dict[str, str]] = field(default_factory=list)
    fresh: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def norms(self) -> dict[str, float]:
        """‖ΔW‖ of each new module."""
        return {path: update.norm() for path, update in self.updates.items()}


def map_heads(
    old: Checkpoint,
    new: Checkpoint,
    layers: Mapping[int, int],
    transfer: TransferMatrix,
    matching: bool = True,
    progress: Progress | None = None,
) -> dict[int, HeadMatch]:
    """Match the heads of every mapped layer pair, two layers' attention weights at a time: ``{old layer: match}``.

    Args:
        matching: False maps head ``a`` to head ``a`` (the paper's ablation).
    """
    found: dict[int, HeadMatch] = {}
    for done, (o, n) in enumerate(layers.items(), 1):
        table = head_similarity(old.layer(o, ATTENTION), new.layer(n, ATTENTION), old.dims, new.dims, transfer)
        found[o] = HeadMatch(match_heads(table) if matching else index_heads(old.dims, new.dims), table)
        if progress is not None:
            progress(done, len(layers))
    return found


def migrate(
    adapter: Adapter,
    old: Checkpoint,
    new: Checkpoint,
    *,
    method: str,
    layers: Mapping[int, int],
    heads: Mapping[int, Mapping[int, int]],
    transfer: TransferMatrix,
    mlp_factor: Callable[[int, Role], Tensor],
    alignment: Callable[[int, Role, str], Moments] | None = None,
    rank: int,
    unmapped: Unmapped = "freeze",
    seed: int = 42,
    progress: Progress | None = None,
) -> Migrated:
    """Move every update of an adapter to the new base.

    Args:
        layers: old → new layer.
        heads: for each old layer, old → new query head.
        mlp_factor: gives :func:`lorasuite.transfer_matrix.mlp_factor` of an old layer and role.
        alignment: gives the moments of an old layer's role and end, for transforms that look at activations.
        rank: output rank of every module.
        unmapped: what becomes of new layers without a partner: ``freeze`` leaves them out of the adapter (the paper's
            zeroed and frozen layers), ``train`` gives them a fresh LoRA (``B = 0``).

    Raises:
        AdapterError: if the adapter does not fit the old base, or nothing of it can be moved.
    """
    chosen = transform(method)
    result = Migrated()
    by_layer = adapter.by_layer(old)
    covered: set[str] = set()
    for done, (o, modules) in enumerate(by_layer.items(), 1):
        if o not in layers:
            why = f"old layer {o} has no partner in the new base"
            result.dropped += [{"module": path, "why": why} for path in modules]
            continue
        n = layers[o]
        updates: dict[Role, LowRank] = {}
        for path, module in modules.items():
            updates.update(split_update(adapter.update(path), module, old.dims))
        for role in [role for role in updates if role not in new.architecture.roles]:
            result.dropped.append(
                {
                    "module": old.architecture.path(o, _holder(old, role)),
                    "why": f"the new base has no {role} projection",
                }
            )
            del updates[role]
        needed = chosen.roles(tuple(updates))
        factors = {role: mlp_factor(o, role) for role in needed if role not in ATTENTION}
        moments = None if alignment is None else partial(alignment, o)
        pair = LayerPair(
            old.layer(o, needed), new.layer(n, needed), old.dims, new.dims, heads[o], transfer, factors, moments
        )
        moved = chosen.layer(pair, updates)
        del pair  # its weights go before the next layers come
        for module in new.architecture.modules:
            parts = {role: moved[role] for role in module.roles if role in moved}
            if parts:
                path = new.architecture.path(n, module)
                covered.add(module.name)
                result.updates[path], result.retained[path] = fuse_updates(parts, module, new.dims).compress(rank)
        if progress is not None:
            progress(done, len(by_layer))
    if not any(update.norm() > 0 for update in result.updates.values()):
        raise AdapterError(
            Problem(
                str(adapter.path),
                "nothing of it can be moved to the new base (every update is zero or dropped)",
                "; ".join(sorted({d["why"] for d in result.dropped})) or "Was the adapter trained at all?",
            )
        )
    if unmapped == "train":
        _initialise(result, new, set(layers.values()), covered, rank, seed)
    return result


def _holder(checkpoint: Checkpoint, role: Role) -> Module:
    module = checkpoint.architecture.module(role)
    assert module is not None
    return module


def _initialise(result: Migrated, new: Checkpoint, mapped: set[int], covered: set[str], rank: int, seed: int) -> None:
    """PEFT's own initialisation (Kaiming-uniform ``A``, zero ``B``) for the new layers without a partner."""
    generator = torch.Generator().manual_seed(seed)
    for layer in range(new.dims.layers):
        if layer in mapped:
            continue
        for module in new.architecture.modules:
            if module.name in covered:
                rows = sum(new.dims.rows(role) for role in module.roles)
                A = torch.empty(rank, new.dims.columns(module.roles[0]))
                torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
                result.fresh[new.architecture.path(layer, module)] = (torch.zeros(rows, rank), A)
