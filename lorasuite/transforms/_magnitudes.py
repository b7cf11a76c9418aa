"""DoRA magnitudes and trained biases, carried over by the rows that correspond (docs/adapters.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lorasuite.adapters import Adapter, base_weight
from lorasuite.bases import Checkpoint, Dimensions, Module, Role

Rows = Literal["ratio", "shift"]


def move_rows(
    values: Float[Tensor, " rows_o"],
    role: Role,
    old: Dimensions,
    new: Dimensions,
    heads: Mapping[int, int],
    kind: Rows,
) -> Float[Tensor, " rows_n"] | None:
    """Per-output values of one role for the new base's rows.

    Rows of q, k and v go with their heads, place by place within a head; key/value heads are repeated to the query
    heads, mapped, and averaged back, a new head without a partner counting as unchanged. Rows of the others go place
    by place. Where sizes differ, places mean nothing: a ``ratio`` is then averaged over the head or the module, a
    ``shift`` has no counterpart (None).
    """
    neutral = 1.0 if kind == "ratio" else 0.0
    if role not in ("q", "k", "v"):
        if old.rows(role) == new.rows(role):
            return values.clone()
        return None if kind == "shift" else values.mean().expand(new.rows(role)).clone()
    if old.head_dim != new.head_dim and kind == "shift":
        return None
    count_o, count_n = (old.heads, new.heads) if role == "q" else (old.kv_heads, new.kv_heads)
    by_head = values.reshape(count_o, old.head_dim)
    if old.head_dim != new.head_dim:
        by_head = by_head.mean(1, keepdim=True).expand(count_o, new.head_dim)
    result = torch.full((new.heads, new.head_dim), neutral, dtype=values.dtype)
    for a, b in heads.items():
        result[b] = by_head[a * count_o // old.heads]
    return result.reshape(count_n, new.heads // count_n, new.head_dim).mean(1).reshape(-1)


def relative_magnitudes(
    adapter: Adapter, modules: Mapping[str, Module], old: Checkpoint, dims: Dimensions
) -> dict[Role, Float64[Tensor, " _"]]:
    """How DoRA training changed the norm of each row, ``m / ‖W_o‖``, by role of one old layer."""
    found: dict[Role, Tensor] = {}
    for path, module in modules.items():
        norms = base_weight(old, path).double().norm(dim=1)
        ratio = adapter.extra(adapter.contents.magnitudes[path]).reshape(-1) / norms.clamp(min=1e-12)
        found.update(module.split(ratio, dims))
    return found


def bias_changes(
    adapter: Adapter, modules: Mapping[str, Module], old: Checkpoint, dims: Dimensions
) -> dict[Role, Float64[Tensor, " _"]]:
    """What training added to each bias, by role of one old layer."""
    found: dict[Role, Tensor] = {}
    for path, module in modules.items():
        read = adapter.contents.biases.get(path)
        change = None if read is None else read(old)
        if change is not None:
            found.update(module.split(change, dims))
    return found


def new_magnitudes(
    ratios: Mapping[Role, Float64[Tensor, " _"]],
    module: Module,
    weight: Float[Tensor, "rows_n in_n"],
    old: Dimensions,
    new: Dimensions,
    heads: Mapping[int, int],
) -> Float64[Tensor, " rows_n"]:
    """``‖W_n‖`` of each row times the moved relative change; rows of roles the adapter did not train keep ``‖W_n‖``."""
    moved: dict[Role, Tensor] = {}
    for role in module.roles:
        ratio = move_rows(ratios[role], role, old, new, heads, "ratio") if role in ratios else None
        moved[role] = torch.ones(new.rows(role), dtype=torch.float64) if ratio is None else ratio
    norms: Tensor = weight.double().norm(dim=1)
    return norms * module.fuse(moved, new)


def own_biases(paths: Iterable[str], new: Checkpoint) -> dict[str, Float[Tensor, " _"]]:
    """The new base's own biases of those modules that have one."""
    return {path: new.tensor(f"{path}.bias") for path in paths if new.find(f"{path}.bias") is not None}
