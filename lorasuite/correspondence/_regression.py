"""Regression from running sums: minimum-norm least squares, ridge and reduced rank, all in float64.

Rows are added a part at a time and never kept, so memory does not grow with their number; but where they are fewer than
columns (:func:`reduced_rank_of_rows`), when to keep them is to keep less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lorasuite.adapters import LowRank

#: λ of :func:`ridge` relative to the mean variance of the inputs, ``tr(XᵀX)/d``.
RIDGE = 1e-3
#: Ridge of :func:`reduced_rank`, relative to the mean square of its inputs.
FIT_RIDGE = 1e-2
#: Columns of wide rows that are multiplied in float64 at a time.
COLUMNS = 2048


@dataclass
class TargetSums:
    """Sums over rows of inputs ``x (n, a)`` and one target ``y (n, b)``: ``xᵀy``, ``Σy`` and ``Σ‖y‖²``.

    Enough to fit the target where the inputs' own ``xᵀx`` is known, as where several targets share their inputs.
    """

    rows: int
    xy: Float[Tensor, "a b"]
    y: Float[Tensor, " b"]
    square: Float[Tensor, ""]

    @classmethod
    def empty(
        cls, a: int, b: int, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float64
    ) -> TargetSums:
        """Of no row yet; on the device where its rows will be, in their dtype."""
        xy, y, square = (torch.zeros(shape, dtype=dtype, device=device) for shape in ((a, b), (b,), ()))
        return cls(0, xy, y, square)

    def add(self, x: Float[Tensor, "n a"], y: Float[Tensor, "n b"]) -> None:
        """Add rows, in the sums' dtype and where they are."""
        self.rows += x.shape[0]
        self.xy.addmm_(x.T, y)
        self.y += y.sum(0)
        self.square += y.square().sum()


@dataclass
class RegressionSums(TargetSums):
    """The same with the inputs' ``xᵀx``: all that a least-squares fit of ``y`` needs, and how well it does."""

    xx: Float[Tensor, "a a"]

    @classmethod
    def empty(
        cls, a: int, b: int, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float64
    ) -> RegressionSums:
        """Of no row yet; on the device where its rows will be, in their dtype."""
        of = TargetSums.empty(a, b, device, dtype)
        return cls(0, of.xy, of.y, of.square, torch.zeros(a, a, dtype=dtype, device=device))

    def add(self, x: Float[Tensor, "n a"], y: Float[Tensor, "n b"]) -> None:
        """Add rows, in the sums' dtype and where they are."""
        super().add(x, y)
        self.xx.addmm_(x.T, x)

    def least_squares(self) -> tuple[Float64[Tensor, "a b"], float]:
        """The minimum-norm map ``(a, b)``, and the share of ``Σ‖y‖²`` that it leaves, at least 0."""
        matrix = least_squares(self.xx, self.xy)
        # ‖XW − Y‖² = ‖Y‖² − 2⟨W, XᵀY⟩ + ⟨W, XᵀX W⟩
        total = float(self.square)
        error = total - 2 * float((matrix * self.xy).sum()) + float((matrix * (self.xx @ matrix)).sum())
        return matrix, max(error, 0.0) / total

    def reduced_rank(self, rank: int) -> tuple[LowRank, float]:
        """:func:`reduced_rank` of these sums, in float64 where they are."""
        xx, xy, square = (part.double() for part in (self.xx, self.xy, self.square))
        return reduced_rank(xx, xy, square, rank=rank)


def penalty(xx: Float64[Tensor, "a a"], strength: float, width: int | None = None) -> Float64[Tensor, ""]:
    """λ of a ridge regression ``()``: ``strength`` times the mean of the diagonal of ``xx (a, a)``.

    Args:
        width: columns that the diagonal's sum is spread over, where ``xx`` is of fewer coordinates than the space has.
    """
    mean = xx.diagonal().sum() / (width or xx.shape[0])
    return strength * mean.clamp(min=torch.finfo(xx.dtype).tiny)


def ridge_factor(xx: Float64[Tensor, "a a"], strength: float) -> Float64[Tensor, "a a"]:
    """The lower Cholesky factor ``(a, a)`` of ``xx + λI``, for any number of right-hand sides."""
    return _cholesky(xx, penalty(xx, strength))


def _cholesky(xx: Float64[Tensor, "a a"], size: Float64[Tensor, ""]) -> Float64[Tensor, "a a"]:
    """The lower Cholesky factor of ``xx + size·I``; of wide spaces an identity is not made beside it."""
    shifted = xx.clone()
    shifted.diagonal().add_(size)
    factor: Tensor = torch.linalg.cholesky(shifted)
    return factor


def gram_cutoff(values: Float64[Tensor, " a"]) -> Float64[Tensor, ""]:
    """The eigenvalue of a Gram matrix up to which they are rounding, not directions: it squares the condition number.

    Args:
        values: all of them, the largest one last.
    """
    return values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps


def least_squares(gram: Float64[Tensor, "a a"], cross: Float64[Tensor, "a b"]) -> Float64[Tensor, "a b"]:
    """The minimum-norm solution of ``gram · X = cross`` in float64, from the eigenvalues of the Gram matrix.

    With ``gram = EᵀE`` and ``cross = EᵀF`` this is ``pinv(E)·F``: one ``d×d`` problem instead of an SVD of ``(V, d)``.
    """
    values, vectors = torch.linalg.eigh(gram)
    weights = torch.where(values > gram_cutoff(values), 1 / values, torch.zeros_like(values))
    solution: Tensor = vectors @ (weights[:, None] * (vectors.T @ cross))
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
    return torch.cholesky_solve(wanted, _cholesky(xx, size))


def _halves(values: Float64[Tensor, " a"], rank: int) -> Float64[Tensor, " rank"]:
    """Square roots of the largest singular values, largest first: what each factor of a cut takes of them.

    Args:
        values: their squares, the largest one last.
    """
    return values[-rank:].flip(0).clamp(min=values[-1] * 1e-30 + torch.finfo(values.dtype).tiny).sqrt().sqrt()


def reduced_rank(
    xx: Float64[Tensor, "in in"], xr: Float64[Tensor, "in out"], square: Float64[Tensor, ""], *, rank: int
) -> tuple[LowRank, float]:
    """``ΔW (out, in)`` of at most ``rank`` that minimises ``‖XΔWᵀ − R‖² + λ‖ΔW‖²``, from second moments.

    Args:
        xx: ``XᵀX (in, in)``; xr: ``XᵀR (in, out)``; square: ``‖R‖²``.

    Returns:
        the update (``B (out, rank)``, ``A (rank, in)``, float64, on the CPU), and the share of ``‖R‖²`` that it leaves.
    """
    lower = ridge_factor(xx, FIT_RIDGE)
    # With G = LLᵀ the penalised loss is ‖Lᵀ(W − W*)‖²: the best W of low rank is an SVD cut of LᵀW* = L⁻¹XᵀR, here by
    # the eigenvectors of the smaller Gram matrix.
    whitened = torch.linalg.solve_triangular(lower, xr, upper=False)
    wide = whitened.shape[0] < whitened.shape[1]
    values, vectors = torch.linalg.eigh(whitened @ whitened.T if wide else whitened.T @ whitened)
    kept = vectors[:, -rank:].flip(1)
    root = _halves(values, rank)
    left, right = (kept, whitened.T @ kept) if wide else (whitened @ kept, kept)
    left, right = (left * root, right / root) if wide else (left / root, right * root)
    A = torch.linalg.solve_triangular(lower.T, left, upper=True).T
    update = LowRank(right.contiguous(), A.contiguous())
    moved = update.A @ xr  # (rank, out)
    inner = float((moved * update.B.T).sum())
    energy = float(((update.A @ xx @ update.A.T) * (update.B.T @ update.B)).sum())
    left = (float(square) - 2 * inner + energy) / float(square) if float(square) > 0 else 0.0
    return LowRank(update.B.cpu(), update.A.cpu()), max(left, 0.0)


def reduced_rank_of_rows(x: Float[Tensor, "n in"], r: Float[Tensor, "n out"], *, rank: int) -> tuple[LowRank, float]:
    """:func:`reduced_rank` from the rows themselves, where they are fewer than the inputs are wide.

    With ``K = XXᵀ`` the fit of full rank is ``Xᵀ(K + λI)⁻¹R``, and what it explains of the penalised loss
    ``Rᵀ·K(K + λI)⁻¹·R (out, out)``, whose eigenvectors are the right ones of the cut: nothing is ``in × in``.

    Cost: ``n²·in + n³/3 + n·out·(n + out)`` operations, ``8·n² + 8·out²`` bytes beside the rows.

    Returns:
        as :func:`reduced_rank`.
    """
    gram = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
    for part in x.split(
        COLUMNS, dim=1
    ):  # in float64 a part at a time: a copy of wide rows would be the largest thing here
        wide = part.double()
        gram.addmm_(wide, wide.T)
    targets = r.double()
    lower = _cholesky(gram, penalty(gram, FIT_RIDGE, x.shape[1]))
    solved = torch.cholesky_solve(targets, lower)  # (n, out)
    fitted = gram @ solved
    values, vectors = torch.linalg.eigh(targets.T @ fitted)
    kept = vectors[:, -rank:].flip(1)
    root = _halves(values, rank)
    combined = (solved @ kept / root).T  # (rank, n)
    A = torch.cat([combined @ part.double() for part in x.split(COLUMNS, dim=1)], dim=1)
    B = kept * root
    total = float(targets.square().sum())
    left = float((targets - (fitted @ kept / root) @ B.T).square().sum()) / total if total > 0 else 0.0
    return LowRank(B.cpu().contiguous(), A.cpu().contiguous()), left
