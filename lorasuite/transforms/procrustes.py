"""Orthogonal maps between the activation spaces of the two bases (as in Theseus, arXiv 2602.12952).

``ΔW_n = T_outᵀ · ΔW_o · T_in`` with ``T = polar(XᵀX')`` of the centred activations a module reads and writes. The
maps preserve norms, need no head matching, and undo any rotation or permutation of a space exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float64
from torch import Tensor

from lorasuite.adapters import LowRank
from lorasuite.bases import Role
from lorasuite.correspondence import Moments
from lorasuite.transforms._protocol import Input, LayerPair, LayerTransform
from lorasuite.transforms._registry import register


def polar(cross: Float64[Tensor, "a b"]) -> Float64[Tensor, "a b"]:
    """The orthogonal factor ``U·Vᵀ``: the partial isometry nearest to a matrix.

    Directions without any correlation are not turned into noise: singular values below rounding are left out.
    """
    u, s, vh = torch.linalg.svd(cross, full_matrices=False)
    keep = s > s[0] * max(cross.shape) * torch.finfo(cross.dtype).eps
    nearest: Tensor = u[:, keep] @ vh[keep]
    return nearest


def written(pair: LayerPair, role: Role) -> Moments:
    """The space a role writes. Gate and up write MLP units: those are told apart by what they become after the
    activation (what ``down`` reads), since their own outputs only span as many directions as the hidden size has."""
    return pair.moments("down", "in") if role in ("gate", "up") else pair.moments(role, "out")


@register
class Procrustes(LayerTransform):
    """Each module's own pair of orthogonal maps, from activations."""

    name = "procrustes"
    inputs = frozenset({Input.LAYER_MAPPING, Input.ALIGNMENT})
    reads_texts = True

    def move(self, pair: LayerPair, updates: Mapping[Role, LowRank]) -> dict[Role, LowRank]:
        """``T_outᵀ·B`` and ``A·T_in`` of each role."""
        moved = {}
        inputs: dict[int, Tensor] = {}  # projections of one fused module share A, and go on sharing A·T_in
        for role, update in updates.items():
            if id(update.A) not in inputs:
                inputs[id(update.A)] = update.A @ self.input_map(pair, role)
            moved[role] = LowRank(self.output_map(pair, role).T @ update.B, inputs[id(update.A)])
        return moved

    def input_map(self, pair: LayerPair, role: Role) -> Float64[Tensor, "in_o in_n"]:
        """``T_in``, from what the role reads in the old base to what it reads in the new one."""
        return polar(pair.moments(role, "in").centred()[1])

    def output_map(self, pair: LayerPair, role: Role) -> Float64[Tensor, "out_o out_n"]:
        """``T_out``, from what the role writes in the old base to what it writes in the new one."""
        return polar(written(pair, role).centred()[1])
