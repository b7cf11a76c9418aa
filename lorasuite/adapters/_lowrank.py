"""A weight update kept as its factors: ``ΔW = B·A``, never dense where it need not be.

Shapes: ``B (out, r)``, ``A (r, in)``. The LoRA scaling is already inside the factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """The product ``B (out, r) · A (r, in)``.

    Raises:
        ValueError: if the two factors do not share their inner dimension.
    """

    B: Float[Tensor, "out r"]
    A: Float[Tensor, "_r in"]  # the same r, which is checked below for users, too

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(f"factors do not multiply: B {tuple(self.B.shape)}, A {tuple(self.A.shape)}")

    @classmethod
    def zeros(cls, out_features: int, in_features: int) -> LowRank:
        """The zero update, of rank 0."""
        return cls(
            torch.zeros(out_features, 0, dtype=torch.float64),
            torch.zeros(0, in_features, dtype=torch.float64),
        )

    @classmethod
    def from_dense(cls, delta: Float[Tensor, "out in"]) -> LowRank:
        """A dense update ``(out, in)`` as its SVD, without the directions that are rounding errors only.

        Float64 up to 1,024 rows or columns, float32 above, where an SVD takes seconds to minutes.
        """
        working = torch.float64 if min(delta.shape) <= 1024 else torch.float32
        u, s, vh = torch.linalg.svd(delta.to(working), full_matrices=False)
        # ΔW comes in float32: what is a millionth of its largest direction is not of the adapter's making.
        keep = max(int((s > 1e-6 * s[0]).sum()), 1)  # of zero, one direction of no length
        root = s[:keep].sqrt()
        return cls((u[:, :keep] * root).double(), (root[:, None] * vh[:keep]).double())

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the product."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """Columns of ``B``: an upper bound of the rank of the product."""
        return self.B.shape[1]

    def dense(self) -> Float[Tensor, "out in"]:
        """The product ``(out, in)``. For tests, merging and small layers only."""
        return self.B @ self.A

    def to(self, dtype: torch.dtype) -> LowRank:
        """The same with factors of another dtype."""
        return LowRank(self.B.to(dtype), self.A.to(dtype))

    def scaled(self, factor: float) -> LowRank:
        """``factor·ΔW``, by a scaled ``B`` and the very same ``A``."""
        return LowRank(self.B * factor, self.A)

    def norm(self) -> float:
        """Frobenius norm, from the ``(r, r)`` Grams of the factors."""
        B, A = self.B.double(), self.A.double()
        return float(((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt())

    def inner(self, other: LowRank) -> float:
        """Frobenius inner product of two updates of one shape."""
        left = self.B.double().T @ other.B.double()
        right = self.A.double() @ other.A.double().T
        return float((left * right).sum())

    def svd(self) -> tuple[Float64[Tensor, "out k"], Float64[Tensor, " k"], Float64[Tensor, "k in"]]:
        """Thin SVD ``U (out, k), S (k,), Vh (k, in)`` with ``k ≤ rank``, by QR of the factors and an r×r SVD."""
        qb, rb = torch.linalg.qr(self.B.double())
        qa, ra = torch.linalg.qr(self.A.double().T)
        u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
        return qb @ u, s, vh @ qa.T

    def compress(self, rank: int | None = None, energy: float | None = None) -> tuple[LowRank, float]:
        """The best approximation of at most ``rank``, singular values split evenly, and the energy it keeps.

        Args:
            energy: in place of ``rank``, the smallest one (at least 1) that keeps this share of ``‖ΔW‖²``.

        Returns:
            the update, padded with zero columns when the product has fewer than ``rank`` directions, and the kept
            share of ``‖ΔW‖²`` (1.0 for a zero update).
        """
        u, s, vh = self.svd()
        kept = (s**2).cumsum(0)
        if rank is None:
            share = 1.0 if energy is None else energy
            # rounding must not ask for a direction that adds nothing
            rank = min(int((kept < (share - 1e-12) * kept[-1]).sum()) + 1, s.numel()) if s.numel() else 1
        keep = min(rank, s.numel())
        root = s[:keep].sqrt()
        B = torch.zeros(self.shape[0], rank, dtype=torch.float64)
        A = torch.zeros(rank, self.shape[1], dtype=torch.float64)
        B[:, :keep] = u[:, :keep] * root
        A[:keep] = root[:, None] * vh[:keep]
        total = float(kept[-1]) if s.numel() else 0.0
        return LowRank(B, A), float(kept[keep - 1]) / total if total > 0 else 1.0

    @staticmethod
    def sum(parts: Sequence[LowRank]) -> LowRank:
        """The sum of updates of one shape, as wider factors."""
        return LowRank(torch.cat([p.B for p in parts], 1), torch.cat([p.A for p in parts], 0))

    @staticmethod
    def stack_rows(parts: Sequence[LowRank]) -> LowRank:
        """Updates of one input stacked along the output axis (q, k, v of a fused projection).

        Where every part shares the very same ``A`` the rank does not grow; otherwise the factors are block-wise.
        """
        nonzero = [p for p in parts if p.rank]
        if not nonzero:
            return LowRank.zeros(sum(p.shape[0] for p in parts), parts[0].shape[1])
        if all(p.A is nonzero[0].A for p in nonzero):
            A = nonzero[0].A
            return LowRank(torch.cat([p.B if p.rank else A.new_zeros(p.shape[0], A.shape[0]) for p in parts]), A)
        A = torch.cat([p.A for p in nonzero])
        B = A.new_zeros(sum(p.shape[0] for p in parts), A.shape[0])
        row = column = 0
        for part in parts:
            B[row : row + part.shape[0], column : column + part.rank] = part.B
            row, column = row + part.shape[0], column + part.rank
        return LowRank(B, A)
