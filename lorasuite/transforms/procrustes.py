"""Orthogonal maps between the activation spaces of the two bases (as in Theseus, arXiv 2602.12952).

``ΔW_n = T_outᵀ · ΔW_o · T_in`` with ``T = polar(XᵀX')`` of the centred activations a module reads and writes. The
maps preserve norms, need no head matching, and undo any rotation or permutation of a space exactly. They are the
pair's (:func:`lorasuite.correspondence.align`): moving an adapter multiplies its factors with them, for
Llama-2-7B → Llama-3-8B at rank 16 and 512 positions 25 GFLOP and 3.2 GB of maps read.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorasuite.adapters import LowRank
from lorasuite.bases import Role
from lorasuite.correspondence import ORTHOGONAL, End, MapKind, SpaceMap
from lorasuite.transforms._protocol import AlignedTransform, Input, LayerPair
from lorasuite.transforms._registry import register


@register
class Procrustes(AlignedTransform):
    """Each module's own pair of orthogonal maps, from activations."""

    name = "procrustes"
    inputs = frozenset({Input.LAYER_MAPPING, Input.ALIGNMENT})
    reads_texts = True
    maps: Mapping[End, MapKind] = {"in": ORTHOGONAL, "out": ORTHOGONAL}

    def move(self, pair: LayerPair, updates: Mapping[Role, LowRank]) -> dict[Role, LowRank]:
        """``T_outᵀ·B`` and ``A·T_in`` of each role."""
        moved = {}
        inputs: dict[int, Tensor] = {}  # projections of one fused module share A, and go on sharing A·T_in
        for role, update in updates.items():
            if id(update.A) not in inputs:
                inputs[id(update.A)] = self.input_map(pair, role).rows(update.A)
            moved[role] = LowRank(self.output_map(pair, role).columns(update.B), inputs[id(update.A)])
        return moved

    def input_map(self, pair: LayerPair, role: Role) -> SpaceMap:
        """``T_in (in_o, in_n)``, from what the role reads in the old base to what it reads in the new one."""
        return pair.map(role, "in", self.maps["in"])

    def output_map(self, pair: LayerPair, role: Role) -> SpaceMap:
        """``T_out (out_o, out_n)``, from what the role writes in the old base to what it writes in the new one."""
        return pair.map(role, "out", self.maps["out"])
