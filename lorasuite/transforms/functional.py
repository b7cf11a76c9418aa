"""The new update that does to the new activations what the old one did to the old (METHOD section 8, *functional*).

What the adapter adds on the calibration rows, ``D = X_o ΔW_oᵀ``, is mapped to the new output space by ``T_out`` and
fitted from the new inputs: ``min ‖X_n ΔW_nᵀ − D T_out‖² + λ‖ΔW_n‖²``. Its solution
``ΔW_n = T_outᵀ ΔW_o (X_oᵀX_n)(X_nᵀX_n + λI)⁻¹`` has the old rank, and needs only the sums kept by
:mod:`lorasuite.alignment`. Second moments are not centred on the input side: a LoRA has no bias to fit a mean with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorasuite.architectures import Role
from lorasuite.transforms.base import LayerPair, register
from lorasuite.transforms.procrustes import Procrustes, written

#: λ relative to the mean variance of the new inputs, ``tr(X_nᵀX_n)/d``.
RIDGE = 1e-3


def ridge(xx: Tensor, xy: Tensor, strength: float = RIDGE) -> Tensor:
    """``(xx + λI)⁻¹·xy`` with λ relative to the mean of the diagonal of ``xx``."""
    size = xx.shape[0]
    penalty = strength * xx.diagonal().mean().clamp(min=torch.finfo(xx.dtype).tiny)
    solution: Tensor = torch.linalg.solve(xx + penalty * torch.eye(size, dtype=xx.dtype), xy)
    return solution


@register
class Functional(Procrustes):
    """Ridge regression of the adapter's effect; outputs mapped by an orthogonal map, as Procrustes does."""

    name = "functional"

    def input_map(self, pair: LayerPair, role: Role) -> Tensor:
        reads = pair.moments(role, "in")
        return ridge(reads.yy, reads.xy.T).T


@register
class FunctionalRidge(Functional):
    """The same with outputs mapped by ridge regression, which shrinks what the new base cannot predict."""

    name = "functional-ridge"

    def output_map(self, pair: LayerPair, role: Role) -> Tensor:
        xx, xy, _ = written(pair, role).centred()
        return ridge(xx, xy)
