"""Which transforms can move an adapter between two bases, of those that are asked for by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lorasuite.bases import Checkpoint, Role
from lorasuite.transforms import LayerTransform, ModelTransform, can_move, transform


def usable(
    names: Iterable[str],
    old: Checkpoint,
    new: Checkpoint,
    roles: Sequence[Role],
    *,
    plain: bool,
    texts: bool,
    trains: bool,
    mapped: bool,
) -> list[str]:
    """Those that ``auto`` tries, in the order of their names here.

    Args:
        names: of the transforms that are asked for.
        roles: what the adapter updates.
        plain: whether it holds updates of blocks only, which a model transform can move.
        texts: whether there are calibration texts.
        trains: whether a fine-tune follows.
        mapped: whether layers are mapped where the depths differ, too: by texts, or by their places.
    """
    paired = mapped or old.dims.layers == new.dims.layers
    moved = tuple(role for role in roles if role in new.every_role)
    found = []
    for name in names:
        one = transform(name)
        fits = not one.problems(old.sizes, new.sizes, moved)
        moves = any(can_move(one, role) for role in moved) or not moved
        read = texts or not one.reads_texts
        fitted = (plain and bool(moved)) or not isinstance(one, ModelTransform)
        laid = paired or not isinstance(one, LayerTransform)
        if fits and moves and read and fitted and laid and (one.starts_finetune or not trains):
            found.append(name)
    return found
