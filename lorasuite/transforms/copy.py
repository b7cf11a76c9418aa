"""The update as it is, where every shape agrees: the baseline for a base model that was only trained further."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorasuite.adapters import LowRank
from lorasuite.bases import Dimensions, Role
from lorasuite.errors import ConfigError, Problem
from lorasuite.transforms._protocol import Input, LayerPair, LayerTransform
from lorasuite.transforms._registry import register


@register
class Copy(LayerTransform):
    """``ΔW_n = ΔW_o``."""

    name = "copy"
    inputs = frozenset({Input.LAYER_MAPPING})
    keeps_places = True

    def problems(self, old: Dimensions, new: Dimensions, updated: Sequence[Role]) -> list[Problem]:
        """Each updated role whose weight has another shape; a head size that differs where no shape does."""
        remedy = "Use --method lorasuite."
        found = [
            Problem("method", f"copy: {role} is {a} in the old base, {b} in the new one", remedy)
            for role in updated
            if (a := (old.rows(role), old.columns(role))) != (b := (new.rows(role), new.columns(role)))
        ]
        if not found and old.head_dim != new.head_dim:
            what = f"copy: heads have {old.head_dim} rows in the old base, {new.head_dim} in the new one"
            found.append(Problem("method", what, remedy))
        return found

    def move(self, pair: LayerPair, updates: Mapping[Role, LowRank]) -> dict[Role, LowRank]:
        """The updates themselves.

        Raises:
            ConfigError: where a shape differs.
        """
        if wrong := self.problems(pair.old_dims, pair.new_dims, tuple(updates)):
            raise ConfigError(wrong)
        return dict(updates)
