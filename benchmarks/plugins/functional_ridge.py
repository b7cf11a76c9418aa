"""``functional`` with outputs mapped by ridge regression, which shrinks what the new base cannot predict."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorasuite.correspondence import FUNCTIONAL, End, MapKind, Moments, ridge
from lorasuite.transforms.functional import Functional


def _ridge_outputs(sums: Moments) -> Tensor:
    """The ridge regression ``(a, b)`` of the new centred rows on the old ones."""
    xx = sums.xx - sums.x.outer(sums.x) / max(sums.rows, 1)
    return ridge(xx, sums.centred(), width=sums.widths[0])


#: How ``functional-ridge`` maps what projections write.
RIDGE_OUTPUTS = MapKind("ridge-outputs", _ridge_outputs, frozenset({"xx"}))


class FunctionalRidge(Functional):
    """Inputs as ``functional`` maps them, outputs by ridge regression."""

    name = "functional-ridge"
    maps: Mapping[End, MapKind] = {"in": FUNCTIONAL, "out": RIDGE_OUTPUTS}
