"""The new update that does to the new activations what the old one did to the old.

What the adapter adds on the calibration rows, ``D = X_o ΔW_oᵀ``, is mapped to the new output space by ``T_out`` and
fitted from the new inputs, near what Procrustes gives: ``min ‖X_n ΔW_nᵀ − D T_out‖² + λ‖ΔW_n − T_outᵀ ΔW_o T_in‖²``.
Its solution ``ΔW_n = T_outᵀ ΔW_o (X_oᵀX_n + λT_in)(X_nᵀX_n + λI)⁻¹`` has the old rank, and what stands behind ``ΔW_o``
is a map of the pair (:data:`lorasuite.correspondence.FUNCTIONAL`). Directions that the texts hardly use so come as
Procrustes moves them and not shrunk, which makes the same update come back on the same base. Second moments are not
centred on the input side: a LoRA has no bias to fit a mean with.
"""

from __future__ import annotations

from collections.abc import Mapping

from lorasuite.correspondence import FUNCTIONAL, ORTHOGONAL, End, MapKind
from lorasuite.transforms._registry import register
from lorasuite.transforms.procrustes import Procrustes


@register
class Functional(Procrustes):
    """Ridge regression of the adapter's effect; outputs mapped by an orthogonal map, as Procrustes does."""

    name = "functional"
    maps: Mapping[End, MapKind] = {"in": FUNCTIONAL, "out": ORTHOGONAL}
