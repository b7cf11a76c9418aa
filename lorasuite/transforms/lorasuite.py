"""The paper's transform (LoRASuite, arXiv 2505.13515, equation 3 and the MLP rules), in factored form.

Every head's update shares ``A·W_h`` (or ``W_hᵀ·B`` for O), so the new update has the old one's rank and no dense
``(out, in)`` delta or ``(d, d)`` product ever exists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from lorasuite.adapters import LowRank
from lorasuite.bases import ROLES, Role
from lorasuite.correspondence import heads
from lorasuite.transforms._protocol import LAYER_INPUTS, Input, LayerPair, LayerTransform
from lorasuite.transforms._registry import register


@register
class LoRASuite(LayerTransform):
    """Equation 3: weights carry the update from head to head, ``W_h`` from hidden size to hidden size."""

    name = "lorasuite"
    inputs = LAYER_INPUTS | {Input.MLP_FACTORS}
    roles = frozenset(ROLES)

    def weights(self, updated: Sequence[Role]) -> Sequence[Role]:
        """All that are updated: weights carry the update across."""
        return updated

    def move(self, pair: LayerPair, updates: Mapping[Role, LowRank]) -> dict[Role, LowRank]:
        """Equation 3 for the attention's projections, pseudo-inverses for the MLP's."""
        moved: dict[Role, LowRank] = {}
        inputs: dict[int, Tensor] = {}  # projections of one fused module share A, and go on sharing A·W_h
        for role, update in updates.items():
            if role not in pair.new:
                continue
            if role in ("q", "k", "v", "gate", "up") and id(update.A) not in inputs:
                inputs[id(update.A)] = pair.transfer.forward(update.A)
            if role in ("q", "k", "v"):
                moved[role] = LowRank(_head_rows(pair, role, update.B), inputs[id(update.A)])
            elif role == "o":
                moved[role] = LowRank(pair.transfer.adjoint(update.B), _head_columns(pair, update.A))
            elif role == "down":
                moved[role] = LowRank(pair.transfer.backward(update.B), _mlp_columns(pair, update.A))
            else:
                moved[role] = LowRank(_mlp_rows(pair, role, update.B), inputs[id(update.A)])
        return moved


def _head_rows(pair: LayerPair, role: Role, B: Float64[Tensor, "out_o r"]) -> Float64[Tensor, "out_n r"]:
    """``P_n[b]·W_hᵀ·P_o[a]ᵀ·B[a]`` for each mapped pair of query heads.

    Key/value heads are repeated to the query-head count, mapped, and averaged back over the new model's groups; a new
    head without a partner counts as zero.
    """
    o, n = pair.old_dims, pair.new_dims
    count_o, count_n = (o.heads, n.heads) if role == "q" else (o.kv_heads, n.kv_heads)
    old = heads(pair.old[role].double(), count_o)  # (·, e_o, d_o)
    new = heads(pair.new[role].double(), count_n)  # (·, e_n, d_n)
    back = torch.einsum("hed,her->hdr", old, heads(B, count_o))  # P_oᵀ·B of each stored head
    # W_hᵀ of all heads at once: (d_o, h·r) → (d_n, h·r)
    flat = pair.transfer.adjoint(back.permute(1, 0, 2).reshape(o.hidden_size, -1))
    back = flat.reshape(n.hidden_size, count_o, -1).permute(1, 0, 2)
    result = B.new_zeros(n.heads, n.head_dim, B.shape[1])
    for a, b in pair.heads.items():
        result[b] = new[b * count_n // n.heads] @ back[a * count_o // o.heads]
    return result.reshape(count_n, n.heads // count_n, n.head_dim, -1).mean(1).reshape(count_n * n.head_dim, -1)


def _head_columns(pair: LayerPair, A: Float64[Tensor, "r in_o"]) -> Float64[Tensor, "r in_n"]:
    """``A[:, a]·O_o[:, a]ᵀ·W_h·O_n[:, b]`` for each mapped pair of query heads."""
    o, n = pair.old_dims, pair.new_dims
    old = heads(pair.old["o"].double().T, o.heads)  # (H_o, e_o, d_o)
    new = heads(pair.new["o"].double().T, n.heads)  # (H_n, e_n, d_n)
    through = pair.transfer.forward(torch.einsum("rhe,hed->hrd", A.reshape(A.shape[0], o.heads, -1), old))
    result = A.new_zeros(n.heads, n.head_dim, A.shape[0])
    for a, b in pair.heads.items():
        result[b] = new[b] @ through[a].T
    return result.reshape(n.heads * n.head_dim, -1).T


def _mlp_rows(pair: LayerPair, role: Role, B: Float64[Tensor, "i_o r"]) -> Float64[Tensor, "i_n r"]:
    """``U_n·pinv(W_h)·pinv(U_o)·B``."""
    hidden = pair.mlp_factors[role] @ (pair.old[role].double().T @ B)
    return pair.new[role].double() @ pair.transfer.backward(hidden)


def _mlp_columns(pair: LayerPair, A: Float64[Tensor, "r i_o"]) -> Float64[Tensor, "r i_n"]:
    """``A·pinv(D_o)·W_h·D_n``."""
    hidden = (A @ pair.old["down"].double().T) @ pair.mlp_factors["down"]
    return pair.transfer.forward(hidden) @ pair.new["down"].double()
