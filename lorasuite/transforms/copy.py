"""The update as it is, where every shape agrees: the baseline for a base model that was only trained further."""

from __future__ import annotations

from collections.abc import Mapping

from lorasuite.adapters import LowRank
from lorasuite.bases import Dimensions, Role
from lorasuite.errors import ConfigError, Problem
from lorasuite.transforms._protocol import LayerPair, register


@register
class Copy:
    """``ΔW_n = ΔW_o``.

    Raises:
        ConfigError: where a shape differs.
    """

    name = "copy"
    aligned = False
    joint = False
    control = False

    def fits(self, old: Dimensions, new: Dimensions, updated: tuple[Role, ...]) -> bool:
        same = all((old.rows(r), old.columns(r)) == (new.rows(r), new.columns(r)) for r in updated)
        return same and old.head_dim == new.head_dim

    def roles(self, updated: tuple[Role, ...]) -> tuple[Role, ...]:
        return ()

    def layer(self, pair: LayerPair, updates: Mapping[Role, LowRank]) -> dict[Role, LowRank]:
        wrong = [
            Problem(role, f"update is {update.shape}, the new weight {wanted}", "Use another method.")
            for role, update in updates.items()
            if update.shape != (wanted := (pair.new_dims.rows(role), pair.new_dims.columns(role)))
        ]
        if wrong or pair.old_dims.head_dim != pair.new_dims.head_dim:
            raise ConfigError(wrong or Problem("head_dim", "the head sizes differ", "Use another method."))
        return dict(updates)
