"""The paper's transform (LoRASuite, arXiv 2505.13515, equation 3 and the MLP rules), in factored form.

Every head's update shares ``A·W_h`` (or ``W_hᵀ·B`` for O), so the new update has the old one's rank and no dense
``(out, in)`` delta or ``(d, d)`` product ever exists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lorasuite.adapters import LowRank
from lorasuite.bases import ROLES, Role
from lorasuite.correspondence import heads, pinv_times, times
from lorasuite.transforms._protocol import LAYER_INPUTS, Input, LayerPair, LayerTransform
from lorasuite.transforms._registry import register


@register
class LoRASuite(LayerTransform):
    """Equation 3: weights carry the update from head to head, ``W_h`` from hidden size to hidden size."""

    name = "lorasuite"
    inputs = LAYER_INPUTS | {Input.MLP_FACTORS}
    roles = frozenset(ROLES)
    as_stored = True

    def weights(self, updated: Sequence[Role]) -> Sequence[Role]:
        """All that are updated: weights carry the update across."""
        return updated

    def move(self, pair: LayerPair, updates: Mapping[Role, LowRank]) -> dict[Role, LowRank]:
        """Equation 3 for the attention's projections, pseudo-inverses for the MLP's."""
        moved: dict[Role, LowRank] = {}
        inputs: dict[int, Tensor] = {}  # projections of one fused module share A, and go on sharing A·W_h
        through, to = pair.transfer, pair.new
        for role, update in updates.items():
            if role not in to:
                continue
            if role in ("q", "k", "v", "gate", "up") and id(update.A) not in inputs:
                inputs[id(update.A)] = through.forward(update.A)
            if role in ("q", "k", "v"):
                moved[role] = LowRank(_heads(pair, role, pair.old[role], to[role], update.B), inputs[id(update.A)])
            elif role == "o":  # ΔO[:, a]·O_o[:, a]ᵀ·W_h·O_n[:, b], by its transpose
                columns = _heads(pair, "q", pair.old[role].T, to[role].T, update.A.T)
                moved[role] = LowRank(through.adjoint(update.B), columns.T)
            elif role == "down":  # pinv(W_h)·ΔD·pinv(D_o)·W_h·D_n, by the transpose of what stands to the right
                hidden = through.adjoint(pinv_times(pair.old[role].T, pair.mlp_factors[role], update.A.T))
                moved[role] = LowRank(through.backward(update.B), times(to[role].T, hidden).T)
            else:  # U_n·pinv(W_h)·pinv(U_o)·ΔU·W_h
                hidden = through.backward(pinv_times(pair.old[role], pair.mlp_factors[role], update.B))
                moved[role] = LowRank(times(to[role], hidden), inputs[id(update.A)])
        return moved


def _heads(
    pair: LayerPair,
    role: Role,
    old: Float[Tensor, "out_o d_o"],
    new: Float[Tensor, "out_n d_n"],
    B: Float64[Tensor, "out_o r"],
) -> Float64[Tensor, "out_n r"]:
    """``P_n[b]·W_hᵀ·P_o[a]ᵀ·B[a]`` for each mapped pair of query heads.

    Key/value heads are repeated to the query-head count, mapped, and averaged back over the new model's groups; a new
    head without a partner counts as zero. As ``P_n[b]`` is one of a group, what it is multiplied with is averaged.
    """
    o, n = pair.old_dims, pair.new_dims
    count_o, count_n = (o.heads, n.heads) if role == "q" else (o.kv_heads, n.kv_heads)
    back = [times(head.T, part) for head, part in zip(heads(old, count_o), heads(B, count_o), strict=True)]
    mean = B.new_zeros(count_n, o.hidden_size, B.shape[1])
    for a, b in pair.heads.items():
        mean[b * count_n // n.heads] += back[a * count_o // o.heads] * count_n / n.heads
    # W_hᵀ of all heads at once: (d_o, h·r) → (d_n, h·r)
    flat = pair.transfer.adjoint(mean.permute(1, 0, 2).reshape(o.hidden_size, -1))
    there = flat.reshape(n.hidden_size, count_n, -1).unbind(1)
    return torch.cat([times(head, part) for head, part in zip(heads(new, count_n), there, strict=True)])
