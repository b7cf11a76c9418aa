"""What is said before a run of an adapter's experts, and of modules that no transform moves."""

from __future__ import annotations

from collections import Counter
from typing import Any

from lorasuite.adapters import Adapter
from lorasuite.bases import MLP, Checkpoint, Module
from lorasuite.errors import Problem, examples
from lorasuite.transforms import WRITTEN_ROWS, AnyTransform, LayerTransform, can_move


def expert_rows(
    adapter: Adapter, old: Checkpoint, new: Checkpoint, chosen: AnyTransform | None, texts: bool
) -> list[dict[str, Any]]:
    """A row of the table of modules for each projection of the experts that an adapter updates.

    Args:
        chosen: the transform that is named, if one is.
        texts: whether there are calibration texts.
    """
    counts: Counter[str] = Counter()
    names: dict[str, str] = {}
    for module in _experts(adapter, old).values():
        for role in module.roles:
            counts[role] += 1
            names[role] = module.name
    why = _unplaced(new, texts)
    if not why and chosen is not None:
        moves = isinstance(chosen, LayerTransform) and all(can_move(chosen, role) for role in MLP)
        why = "" if moves else f"{chosen.name} has no rule for it"
    target = new.architecture.experts
    return [
        {
            "role": f"expert {role}",
            "count": counts[role],
            "old": f"{old.architecture.experts.path}.*.{names[role]}" if old.architecture.experts else None,
            "new": f"{target.path}.*" if target is not None and new.has_experts else None,
            "moves": not why,
            "why": why,
        }
        for role in MLP
        if role in counts
    ]


def _experts(adapter: Adapter, old: Checkpoint) -> dict[str, Module]:
    """Its updates of experts that the old base runs with, by path."""
    left = {module for module, _ in adapter.left_out(old)}
    every = (of for layer in adapter.experts(old.architecture).values() for of in layer.values())
    return {path: module for of in every for path, module in of.items() if path not in left}


def _unplaced(new: Checkpoint, texts: bool) -> str:
    """Why experts have no place in the new base; empty if they may."""
    if not new.has_experts:
        return "the new base has no experts that are described"
    return "" if texts else "experts are matched by the calibration texts that they are routed: give --calibration"


def not_moved_notices(adapter: Adapter, old: Checkpoint, new: Checkpoint, texts: bool) -> list[str]:
    """One notice a reason of modules that the old base runs with and that no transform moves, and of experts."""
    left = {module for module, _ in adapter.left_out(old)}
    reasons: dict[str, list[str]] = {}
    for path, why in adapter.refused(old.architecture).items():
        if path not in left:
            reasons.setdefault(why, []).append(path)
    found = [
        f"not moved: {len(paths)} of its modules ({examples(paths)}), {why}; {WRITTEN_ROWS}"
        for why, paths in reasons.items()
    ]
    experts = list(_experts(adapter, old))
    if experts and (why := _unplaced(new, texts)):
        found.append(f"not moved: {len(experts)} updates of experts ({examples(experts)}), {why}; {WRITTEN_ROWS}")
    return found


def nothing_moves(adapter: Adapter, trains: bool) -> Problem | str:
    """What is said where none of an adapter's modules has a counterpart: a notice if there are rows to train on."""
    what = "none of its modules has a counterpart in the new base"
    if trains:
        return f"{what}: a fresh LoRA of the new base is trained on the rows instead"
    remedy = (
        "It cannot be moved. With --method auto and --teacher-samples N a fresh LoRA of the new base is trained on "
        "rows that the old base writes with it; or give --train-data."
    )
    return Problem(str(adapter.path), what, remedy)
