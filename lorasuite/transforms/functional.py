"""The new update that does to the new activations what the old one did to the old.

What the adapter adds on the calibration rows, ``D = X_o ΔW_oᵀ``, is mapped to the new output space by ``T_out`` and
fitted from the new inputs, near what Procrustes gives: ``min ‖X_n ΔW_nᵀ − D T_out‖² + λ‖ΔW_n − T_outᵀ ΔW_o T_in‖²``.
Its solution ``ΔW_n = T_outᵀ ΔW_o (X_oᵀX_n + λT_in)(X_nᵀX_n + λI)⁻¹`` has the old rank, and needs only
:class:`lorasuite.correspondence.Moments`. Directions that the texts hardly use so come as Procrustes moves them and not
shrunk, which makes the same update come back on the same base. Second moments are not centred on the input side: a LoRA
has no bias to fit a mean with.
"""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor

from lorasuite.bases import Role
from lorasuite.correspondence import ridge
from lorasuite.transforms._protocol import LayerPair
from lorasuite.transforms._registry import register
from lorasuite.transforms.procrustes import Procrustes


@register
class Functional(Procrustes):
    """Ridge regression of the adapter's effect; outputs mapped by an orthogonal map, as Procrustes does."""

    name = "functional"

    def input_map(self, pair: LayerPair, role: Role) -> Float64[Tensor, "in_o in_n"]:
        """``T_in`` by ridge regression towards Procrustes' own."""
        reads = pair.moments(role, "in")
        return ridge(reads.yy, reads.xy.T, prior=super().input_map(pair, role).T).T
