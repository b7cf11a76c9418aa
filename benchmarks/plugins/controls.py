"""Controls: what a transform must beat to have moved anything. Asked for by name only; ``auto`` never tries them.

A third one, the transform with the layers paired wrongly, is a layer map and not a transform: see
``benchmarks/transfer/variants.py``.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from lorasuite.adapters import LowRank
from lorasuite.bases import Role
from lorasuite.correspondence import ORTHOGONAL, End, MapKind, Moments
from lorasuite.transforms import Input, LayerPair, LayerTransform
from lorasuite.transforms.procrustes import Procrustes


class Random(LayerTransform):
    """A random update of the old one's rank and norm: says what a change of this size does by itself.

    Drawn from the old factors' bytes: the same adapter gives the same updates, each module another one.
    """

    name = "random"
    inputs = frozenset({Input.LAYER_MAPPING})
    control = True

    def move(self, pair: LayerPair, updates: Mapping[Role, LowRank]) -> dict[Role, LowRank]:
        """A normal draw of each update's rank, scaled to its norm."""
        moved = {}
        inputs: dict[int, Tensor] = {}  # projections of one fused module share A, here too
        for role, update in updates.items():
            if id(update.A) not in inputs:
                inputs[id(update.A)] = _normal((update.rank, pair.new_dims.columns(role)), update.A)
            drawn = LowRank(_normal((pair.new_dims.rows(role), update.rank), update.B), inputs[id(update.A)])
            norm = drawn.norm()
            moved[role] = drawn.scaled(update.norm() / norm) if norm else drawn
        return moved


def _normal(shape: tuple[int, int], seed: Tensor) -> Tensor:
    """Standard normal float64, seeded by a tensor's float32 bytes."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.float().contiguous().cpu().numpy().tobytes()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _mean(sums: Moments) -> Tensor:
    """From the mean old row to the multiple of the mean new row that is nearest to 1 on all new rows, ``(a, b)``."""
    rows = max(sums.rows, 1)
    mean = sums.y / rows
    # min over c of Σ(c·mᵀy − 1)²: c = n‖m‖² / mᵀ(Σyyᵀ)m
    square = mean @ sums.yy @ mean
    factor = rows * (mean @ mean) / square if square > 0 else square
    return torch.outer(sums.x / rows, factor * mean)


class TargetMean(Procrustes):
    """Only the mean of what the update adds on the calibration texts, as a function of the mean input.

    ``ΔW_n = t·aᵀ`` where ``t`` is the mean change, mapped as Procrustes maps outputs, and ``a`` the multiple of the
    mean new input that fits it best: says how much of a transform's effect is a shift that reads nothing.
    """

    name = "target-mean"
    control = True
    maps: Mapping[End, MapKind] = {"in": MapKind("mean", _mean, frozenset({"yy"})), "out": ORTHOGONAL}

    def move(self, pair: LayerPair, updates: Mapping[Role, LowRank]) -> dict[Role, LowRank]:
        """One direction a role: the mapped mean change, read by the mean new input."""
        # the maps have rank 1 but for the rounding they are kept with
        return {role: update.compress(1)[0] for role, update in super().move(pair, updates).items()}
