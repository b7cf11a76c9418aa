"""``functional`` with outputs mapped by ridge regression, which shrinks what the new base cannot predict."""

from __future__ import annotations

from torch import Tensor

from lorasuite.bases import Role
from lorasuite.correspondence import ridge
from lorasuite.transforms import LayerPair
from lorasuite.transforms.functional import Functional
from lorasuite.transforms.procrustes import written


class FunctionalRidge(Functional):
    """Inputs as ``functional`` maps them, outputs by ridge regression."""

    name = "functional-ridge"

    def output_map(self, pair: LayerPair, role: Role) -> Tensor:
        """The ridge regression ``(out_o, out_n)`` of the new centred outputs on the old ones."""
        xx, xy, _ = written(pair, role).centred()
        return ridge(xx, xy)
