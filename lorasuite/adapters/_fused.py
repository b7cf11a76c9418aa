"""Updates of fused modules, split by role and put together again."""

from __future__ import annotations

from collections.abc import Mapping

from lorasuite.adapters._lowrank import LowRank
from lorasuite.bases import Dimensions, Module, Role


def split_update(update: LowRank, module: Module, dims: Dimensions) -> dict[Role, LowRank]:
    """A module's update as one update a role; roles of a fused module share the very same ``A``."""
    return {role: LowRank(B, update.A) for role, B in module.split(update.B, dims).items()}


def fuse_updates(parts: Mapping[Role, LowRank], module: Module, dims: Dimensions) -> LowRank:
    """The inverse of :func:`split_update`; roles without an update count as zero."""
    if module.layout == "plain":
        return parts[module.roles[0]]
    filled = [parts.get(role) or LowRank.zeros(dims.rows(role), dims.columns(role)) for role in module.roles]
    stacked = LowRank.stack_rows(filled)
    rows = dict(zip(module.roles, stacked.B.split([p.shape[0] for p in filled]), strict=True))
    return LowRank(module.fuse(rows, dims), stacked.A)
