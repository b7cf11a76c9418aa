"""Regression from running sums: minimum-norm least squares, ridge and reduced rank, all in float64.

Rows are added a part at a time and never kept, so memory does not grow with their number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from lorasuite.adapters import LowRank

#: λ of :func:`ridge` relative to the mean variance of the inputs, ``tr(XᵀX)/d``.
RIDGE = 1e-3
#: Ridge of :func:`reduced_rank`, relative to the mean square of its inputs.
FIT_RIDGE = 1e-2


@dataclass
class TargetSums:
    """Sums over rows of inputs ``x (n, a)`` and one target ``y (n, b)``: ``xᵀy``, ``Σy`` and ``Σ‖y‖²``.

    Enough to fit the target where the inputs' own ``xᵀx`` is known, as where several targets share their inputs.
    """

    rows: int
    xy: Float64[Tensor, "a b"]
    y: Float64[Tensor, " b"]
    square: Float64[Tensor, ""]

    @classmethod
    def empty(cls, a: int, b: int) -> TargetSums:
        """Of no row yet."""
        return cls(0, zeros(a, b), zeros(b), zeros())

    def add(self, x: Float64[Tensor, "n a"], y: Float64[Tensor, "n b"]) -> None:
        """Add rows."""
        self.rows += x.shape[0]
        self.xy += x.T @ y
        self.y += y.sum(0)
        self.square += (y * y).sum()


@dataclass
class RegressionSums(TargetSums):
    """The same with the inputs' ``xᵀx``: all that a least-squares fit of ``y`` needs, and how well it does."""

    xx: Float64[Tensor, "a a"]

    @classmethod
    def empty(cls, a: int, b: int, device: str | torch.device = "cpu") -> RegressionSums:
        """Of no row yet; on the device where its rows will be."""
        xy, y, square, xx = (zeros(*shape).to(device) for shape in ((a, b), (b,), (), (a, a)))
        return cls(0, xy, y, square, xx)

    def add(self, x: Float64[Tensor, "n a"], y: Float64[Tensor, "n b"]) -> None:
        """Add rows."""
        super().add(x, y)
        self.xx += x.T @ x

    def least_squares(self) -> tuple[Float64[Tensor, "a b"], float]:
        """The minimum-norm map ``(a, b)``, and the share of ``Σ‖y‖²`` that it leaves, at least 0."""
        matrix = least_squares(self.xx, self.xy)
        # ‖XW − Y‖² = ‖Y‖² − 2⟨W, XᵀY⟩ + ⟨W, XᵀX W⟩
        total = float(self.square)
        error = total - 2 * float((matrix * self.xy).sum()) + float((matrix * (self.xx @ matrix)).sum())
        return matrix, max(error, 0.0) / total

    def reduced_rank(self, rank: int) -> tuple[LowRank, float]:
        """:func:`reduced_rank` of these sums."""
        return reduced_rank(self.xx, self.xy, self.square, rank=rank)


def zeros(*shape: int) -> Tensor:
    """A float64 sum of nothing yet, on the CPU."""
    return torch.zeros(shape, dtype=torch.float64)


def penalty(xx: Float64[Tensor, "a a"], strength: float, width: int | None = None) -> Float64[Tensor, ""]:
    """λ of a ridge regression ``()``: ``strength`` times the mean of the diagonal of ``xx (a, a)``.

    Args:
        width: columns that the diagonal's sum is spread over, where ``xx`` is of fewer coordinates than the space has.
    """
    mean = xx.diagonal().sum() / (width or xx.shape[0])
    return strength * mean.clamp(min=torch.finfo(xx.dtype).tiny)


def ridge_factor(xx: Float64[Tensor, "a a"], strength: float) -> Float64[Tensor, "a a"]:
    """The lower Cholesky factor ``(a, a)`` of ``xx + λI``, for any number of right-hand sides."""
    factor: Tensor = torch.linalg.cholesky(xx + penalty(xx, strength) * _identity(xx))
    return factor


def _identity(xx: Float64[Tensor, "a a"]) -> Float64[Tensor, "a a"]:
    return torch.eye(xx.shape[0], dtype=xx.dtype, device=xx.device)


def least_squares(gram: Float64[Tensor, "a a"], cross: Float64[Tensor, "a b"] | None = None) -> Float64[Tensor, "a c"]:
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


def ridge(
    xx: Float64[Tensor, "a a"],
    xy: Float64[Tensor, "a b"],
    strength: float = RIDGE,
    prior: Float64[Tensor, "a b"] | None = None,
    width: int | None = None,
) -> Float64[Tensor, "a b"]:
    """The minimum of ``‖XM − Y‖² + λ‖M − prior‖²``, that is ``(xx + λI)⁻¹·(xy + λ·prior)``, from second moments.

    λ is relative to the mean of the diagonal of ``xx`` (over ``width`` columns, see :func:`penalty`). Without a prior
    it is zero. Cost: ``a³/3 + 2a²b`` operations.
    """
    size = penalty(xx, strength, width)
    wanted = xy if prior is None else xy + size * prior
    return torch.cholesky_solve(wanted, torch.linalg.cholesky(xx + size * _identity(xx)))


def reduced_rank(
    xx: Float64[Tensor, "in in"], xr: Float64[Tensor, "in out"], square: Float64[Tensor, ""], *, rank: int
) -> tuple[LowRank, float]:
    """``ΔW (out, in)`` of at most ``rank`` that minimises ``‖XΔWᵀ − R‖² + λ‖ΔW‖²``, from second moments.

    Args:
        xx: ``XᵀX (in, in)``; xr: ``XᵀR (in, out)``; square: ``‖R‖²``.

    Returns:
        the update (``B (out, rank)``, ``A (rank, in)``, float64), and the share of ``‖R‖²`` that it leaves.
    """
    lower = ridge_factor(xx, FIT_RIDGE)
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
