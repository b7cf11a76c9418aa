"""What two bases hold at the same positions, as sums: enough for every map between the two sides of one space."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lorasuite.correspondence._regression import ridge

#: A square sum that a map may need beside ``xᵀy``: of the old side, or of the new one.
Square = Literal["xx", "yy"]


@dataclass
class Moments:
    """Sums over paired rows, ``x (n, a)`` of the old base and ``y (n, b)`` of the new one.

    ``xx`` and ``yy`` are empty unless they were asked for. ``widths`` are the columns that the two sides of the space
    have; ``a`` and ``b`` are fewer where rows are given by their coordinates in an orthonormal basis.

    Cost: ``2·n·a·b`` operations and ``a·b`` numbers, and with the squares ``2·n·a²`` and ``a²``, ``2·n·b²`` and ``b²``.
    """

    rows: int
    x: Float[Tensor, " a"]
    y: Float[Tensor, " b"]
    xy: Float[Tensor, "a b"]
    #: ``Σ‖x‖²`` and ``Σ‖y‖²``.
    sizes: Float[Tensor, 2]
    xx: Float[Tensor, "_ _"]
    yy: Float[Tensor, "_ _"]
    widths: tuple[int, int]

    @classmethod
    def empty(
        cls,
        a: int,
        b: int,
        squares: Collection[Square] = ("xx", "yy"),
        *,
        widths: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> Moments:
        """Of no row yet, on a device. Float32 is enough for rows in the hundred thousands: a test shows it."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        xx, yy = (zeros(n, n) if name in squares else zeros(0, 0) for name, n in (("xx", a), ("yy", b)))
        return cls(0, zeros(a), zeros(b), zeros(a, b), zeros(2), xx, yy, widths or (a, b))

    def add(self, x: Float[Tensor, "n a"], y: Float[Tensor, "n b"]) -> None:
        """Add rows, in the sums' own dtype whatever theirs is."""
        x, y = x.to(self.xy), y.to(self.xy)
        self.rows += x.shape[0]
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.sizes += torch.stack([x.square().sum(), y.square().sum()])
        self.xy.addmm_(x.T, y)
        if len(self.xx):
            self.xx.addmm_(x.T, x)
        if len(self.yy):
            self.yy.addmm_(y.T, y)

    def double(self) -> Moments:
        """The same sums in float64 where they are, for the decompositions of maps: for an SVD of 2,048 columns an H200
        took an eighth of the time of eight cores, and less of it for the others."""
        names = ("x", "y", "xy", "sizes", "xx", "yy")
        return replace(self, **{name: getattr(self, name).double() for name in names})

    def centred(self) -> Float64[Tensor, "a b"]:
        """The covariance of both sides, ``Σ(x − x̄)(y − ȳ)ᵀ``."""
        return self.xy - torch.outer(self.x, self.y) / max(self.rows, 1)

    @cached_property
    def orthogonal(self) -> Float64[Tensor, "a b"]:
        """:func:`polar` of the covariance: the orthogonal map nearest to it."""
        return polar(self.centred())

    def unexplained(self) -> float:
        """Share of the new side's variance that :attr:`orthogonal` leaves at its best scale, in 0 … 1.

        ``min_c ‖Y − c·XT‖²/‖Y‖² = 1 − ‖XᵀY‖²_* / (‖X‖²‖Y‖²)`` of centred rows: the Procrustes distance, which unlike
        ``1 − R²`` of a regression does not vanish where rows are fewer than columns.
        """
        nuclear = (self.centred() * self.orthogonal).sum()
        means = torch.stack([self.x.square().sum(), self.y.square().sum()]) / max(self.rows, 1)
        product = (self.sizes - means).prod().clamp(min=torch.finfo(torch.float64).tiny)
        return float((1 - nuclear.square() / product).clamp(0, 1))


def polar(cross: Float64[Tensor, "a b"]) -> Float64[Tensor, "a b"]:
    """The orthogonal factor ``U·Vᵀ``: the partial isometry nearest to a matrix.

    Directions without any correlation are not turned into noise: singular values below rounding are left out. Float64
    is needed: those of real models' covariances span six orders of magnitude, and of all of them only the direction
    counts here.
    """
    u, s, vh = torch.linalg.svd(cross, full_matrices=False)
    keep = s > s[0] * max(cross.shape) * torch.finfo(cross.dtype).eps
    nearest: Tensor = u[:, keep] @ vh[keep]
    return nearest


@dataclass(frozen=True)
class MapKind:
    """A kind of map ``(a, b)`` from the old side of a space to the new one, by a name that goes with its formula.

    ``compute`` is given float64 sums, in coordinates where the space is wide: a basis of the sampled rows of each side.
    So the formula must be one that commutes with a change to such a basis, as every formula does that is made of the
    sums' own products and inverses; what it adds to a diagonal is to be relative to :attr:`Moments.widths`.
    """

    name: str
    compute: Callable[[Moments], Tensor]
    #: The squares it reads.
    squares: frozenset[Square] = frozenset()


#: ``polar(XᵀY)`` of centred rows, as in Theseus (arXiv 2602.12952).
ORTHOGONAL = MapKind("orthogonal", lambda sums: sums.orthogonal)

#: ``(XᵀY + λT)(YᵀY + λI)⁻¹`` with ``T`` the orthogonal map: what turns an update that reads the old side into the one
#: that does the same to the new side's rows, near what ``T`` makes of it (:mod:`lorasuite.transforms.functional`).
FUNCTIONAL = MapKind(
    "functional",
    lambda sums: ridge(sums.yy, sums.xy.T, prior=sums.orthogonal.T, width=sums.widths[1]).T,
    frozenset({"yy"}),
)
