"""Regression from second moments: minimum-norm and ridge least squares, and reduced-rank regression."""

from __future__ import annotations

import torch
from torch import Tensor

from lorasuite.adapters import LowRank


def least_squares(gram: Tensor, cross: Tensor | None = None) -> Tensor:
    """The minimum-norm solution of ``gram · X = cross`` in float64, from the eigenvalues of the Gram matrix.

    Without ``cross``, the pseudo-inverse itself.

    With ``gram = EᵀE`` and ``cross = EᵀF`` this is ``pinv(E)·F``: one ``d×d`` problem instead of an SVD of ``(V, d)``.
    """
    values, vectors = torch.linalg.eigh(gram)
    # A Gram matrix squares the condition number: eigenvalues below this are rounding, not directions.
    cutoff = values[-1].clamp(min=0) * gram.shape[0] * torch.finfo(torch.float64).eps
    weights = torch.where(values > cutoff, 1 / values, torch.zeros_like(values))
    solution: Tensor = vectors @ (weights[:, None] * (vectors.T if cross is None else vectors.T @ cross))
    return solution


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


#: Ridge of each module's fit, relative to the mean square of what it reads.
FIT_RIDGE = 1e-2


def reduced_rank(xx: Tensor, xr: Tensor, square: Tensor, *, rank: int) -> tuple[LowRank, float]:
    """``ΔW (out, in)`` of at most ``rank`` that minimises ``‖XΔWᵀ − R‖² + λ‖ΔW‖²``, from second moments.

    Args:
        xx: ``XᵀX (in, in)``; xr: ``XᵀR (in, out)``; square: ``‖R‖²``.

    Returns:
        the update (``B (out, rank)``, ``A (rank, in)``, float64), and the share of ``‖R‖²`` that it leaves.
    """
    size = xx.shape[0]
    penalty = FIT_RIDGE * xx.diagonal().mean().clamp(min=torch.finfo(xx.dtype).tiny)
    gram = xx + penalty * torch.eye(size, dtype=xx.dtype)
    lower = torch.linalg.cholesky(gram)
    # With G = LLᵀ the penalised loss is ‖Lᵀ(W − W*)‖²: the best W of low rank is an SVD cut of LᵀW* = L⁻¹XᵀR.
    whitened = torch.linalg.solve_triangular(lower, xr, upper=False)
    u, s, vh = torch.linalg.svd(whitened, full_matrices=False)
    keep = min(rank, s.numel())
    root = s[:keep].sqrt()
    A = (torch.linalg.solve_triangular(lower.T, u[:, :keep], upper=True) * root).T
    update = LowRank((vh[:keep] * root[:, None]).T.contiguous(), A.contiguous())
    moved = update.A @ xr  # (rank, out)
    inner = float((moved * update.B.T).sum())
    energy = float(((update.A @ xx @ update.A.T) * (update.B.T @ update.B)).sum())
    left = (float(square) - 2 * inner + energy) / float(square) if float(square) > 0 else 0.0
    return update, max(left, 0.0)
