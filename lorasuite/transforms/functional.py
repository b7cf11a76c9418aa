"""The new update that does to the new activations what the old one did to the old (METHOD section 8, *functional*).

What the adapter adds on the calibration rows, ``D = X_o ΔW_oᵀ``, is mapped to the new output space by ``T_out`` and
fitted from the new inputs, near what Procrustes gives: ``min ‖X_n ΔW_nᵀ − D T_out‖² + λ‖ΔW_n − T_outᵀ ΔW_o T_in‖²``.
Its solution ``ΔW_n = T_outᵀ ΔW_o (X_oᵀX_n + λT_in)(X_nᵀX_n + λI)⁻¹`` has the old rank, and needs only the sums kept by
:mod:`lorasuite.alignment`. Directions that the texts hardly use so come as Procrustes moves them and not shrunk, which
makes the same update come back on the same base. Second moments are not centred on the input side: a LoRA has no bias
to fit a mean with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorasuite.architectures import Role
from lorasuite.transforms.base import LayerPair, register
from lorasuite.transforms.procrustes import Procrustes, written

#: λ relative to the mean variance of the new inputs, ``tr(X_nᵀX_n)/d``.
RIDGE = 1e-3


def ridge(xx: Tensor, xy: Tensor, strength: float = RIDGE, prior: Tensor | None = None) -> Tensor:
    """The minimum of ``‖XM − Y‖² + λ‖M − prior‖²``, that is ``(xx + λI)⁻¹·(xy + λ·prior)``, from second moments.

    λ is relative to the mean of the diagonal of ``xx``. Without a prior it is zero.
    """
    size = xx.shape[0]
    penalty = strength * xx.diagonal().mean().clamp(min=torch.finfo(xx.dtype).tiny)
    wanted = xy if prior is None else xy + penalty * prior
    solution: Tensor = torch.linalg.solve(xx + penalty * torch.eye(size, dtype=xx.dtype), wanted)
    return solution


@register
class Functional(Procrustes):
    """Ridge regression of the adapter's effect; outputs mapped by an orthogonal map, as Procrustes does."""

    name = "functional"

    def input_map(self, pair: LayerPair, role: Role) -> Tensor:
        reads = pair.moments(role, "in")
        return ridge(reads.yy, reads.xy.T, prior=super().input_map(pair, role).T).T


@register
class FunctionalRidge(Functional):
    """The same with outputs mapped by ridge regression, which shrinks what the new base cannot predict."""

    name = "functional-ridge"

    def output_map(self, pair: LayerPair, role: Role) -> Tensor:
        xx, xy, _ = written(pair, role).centred()
        return ridge(xx, xy)
