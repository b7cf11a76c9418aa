"""Which new attention head continues which old one (LoRASuite, arXiv 2505.13515, head mapping)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lorasuite.bases import ATTENTION, Checkpoint, Dimensions, Role
from lorasuite.correspondence._transfer_matrix import TransferMatrix
from lorasuite.progress import Progress
from lorasuite.stored import Stored

#: One layer's weights ``(out, in)`` by role.
Weights = Mapping[Role, Float[Tensor, "_ _"]]


def heads(weight: Float[Tensor, " rows *rest"], count: int) -> Float[Tensor, "{count} e *rest"]:
    """``(count·e, …)`` → ``(count, e, …)``, a view."""
    return weight.reshape(count, -1, *weight.shape[1:])


def head_similarity(
    old: Weights, new: Weights, old_dims: Dimensions, new_dims: Dimensions, transfer: TransferMatrix
) -> Float64[Tensor, "H_o H_n"]:
    """Cosine of ``[vec QK ; vec VO]`` for every pair of query heads.

    ``QK = QᵀK`` and ``VO = VᵀOᵀ`` are ``(d, d)``, the old ones brought to the new hidden size as ``W_hᵀ·(…)·W_h``. No
    such matrix is formed: ``⟨XᵀY, ZᵀT⟩ = ⟨XZᵀ, YTᵀ⟩``, so a whole layer costs four products of the stacked heads, and a
    norm needs only ``e×e`` Grams. Key/value heads count once for each query head that reads them.

    Args:
        old, new: the weights of roles q, k, v, o, ``(out, in)``.
    """
    # All as (heads·e, d_n): for O the transpose, whose rows are the head's write directions.
    a = {role: transfer.forward(_rows(old, role)) for role in ATTENTION}
    b = {role: _rows(new, role) for role in ATTENTION}

    def product(role: Role, count_o: int, count_n: int) -> Float[Tensor, "{count_o} e_o {count_n} e_n"]:
        """Inner products of every row pair."""
        return (a[role] @ b[role].T).reshape(count_o, old_dims.head_dim, count_n, new_dims.head_dim)

    def expand(x: Float[Tensor, "K_o e_o K_n e_n"]) -> Float[Tensor, "H_o e_o H_n e_n"]:
        return x.repeat_interleave(old_dims.group, 0).repeat_interleave(new_dims.group, 2)

    q = product("q", old_dims.heads, new_dims.heads)
    k = expand(product("k", old_dims.kv_heads, new_dims.kv_heads))
    dots = (q * k).sum((1, 3), dtype=torch.float64)
    v = expand(product("v", old_dims.kv_heads, new_dims.kv_heads))
    o = product("o", old_dims.heads, new_dims.heads)
    dots += (v * o).sum((1, 3), dtype=torch.float64)
    norms = torch.outer(_norms(a, old_dims), _norms(b, new_dims))
    return torch.where(norms > 0, dots / norms, torch.zeros_like(dots))


def _rows(weights: Weights, role: Role) -> Float[Tensor, "rows d"]:
    return weights["o"].T if role == "o" else weights[role]


def _norms(weights: Weights, dims: Dimensions) -> Float64[Tensor, " H"]:
    """``√(‖QK‖² + ‖VO‖²)`` of each head, by ``‖XᵀY‖² = ⟨XXᵀ, YYᵀ⟩``."""

    def gram(role: Role, count: int) -> Float64[Tensor, "H e e"]:
        x = heads(weights[role], count).double()
        g = x @ x.transpose(1, 2)
        return g if count == dims.heads else g.repeat_interleave(dims.group, 0)

    qk = (gram("q", dims.heads) * gram("k", dims.kv_heads)).sum((1, 2))
    vo = (gram("v", dims.kv_heads) * gram("o", dims.heads)).sum((1, 2))
    return (qk + vo).clamp(min=0).sqrt()


def match_heads(similarity: Float[Tensor, "H_o H_n"]) -> dict[int, int]:
    """The assignment of old to new heads with the largest total similarity (Hungarian, rectangular both ways)."""
    from scipy.optimize import linear_sum_assignment  # half a second that only this function needs

    rows, columns = linear_sum_assignment(similarity.numpy(), maximize=True)
    return {int(a): int(b) for a, b in zip(rows, columns, strict=True)}


def index_heads(old_dims: Dimensions, new_dims: Dimensions) -> dict[int, int]:
    """Head ``a`` to head ``a`` as far as both go: head mapping switched off (the paper's ablation)."""
    return {a: a for a in range(min(old_dims.heads, new_dims.heads))}


@dataclass(frozen=True)
class HeadMatch:
    """Mapped query heads of one layer pair, old → new, and the similarity of all of them."""

    heads: dict[int, int]
    similarity: Float64[Tensor, "H_o H_n"]


def _on(device: str | torch.device, base: Checkpoint, layer: int) -> Weights:
    """A layer's attention weights on a device."""
    return {role: weight.to(device) for role, weight in base.layer(layer, ATTENTION).items()}


def map_heads(
    old: Checkpoint,
    new: Checkpoint,
    layers: Mapping[int, int],
    transfer: TransferMatrix,
    matching: bool = True,
    progress: Progress | None = None,
    device: str | torch.device = "cpu",
) -> dict[int, HeadMatch]:
    """Match the heads of every mapped layer pair, two layers' attention weights at a time: ``{old layer: match}``.

    Layer pairs of which one lacks any of q, k, v and o (linear attention, or none) have no heads to match.

    A layer pair costs ``2·d·(H_o·e_o)·(H_n·e_n)`` FLOP for q and o each, and the same of key/value heads for k and v:
    0.34 TFLOP at Llama-2-7B to Llama-3-8B, 11 TFLOP for the bases; another ``2·d_o·d_n`` a row of the old weights where
    ``W_h`` is no identity.

    Args:
        matching: False maps head ``a`` to head ``a`` (the paper's ablation).
        device: where the products are taken, in float32, and summed, in float64.
    """
    found: dict[int, HeadMatch] = {}
    device = device if torch.device(device).type == "cuda" else "cpu"
    for done, (o, n) in enumerate(layers.items(), 1):
        if set(ATTENTION) <= {*old.roles(o)} & {*new.roles(n)}:
            dims = old.layer_dims(o), new.layer_dims(n)
            table = head_similarity(_on(device, old, o), _on(device, new, n), *dims, transfer).cpu()
            found[o] = HeadMatch(match_heads(table) if matching else index_heads(*dims), table)
        if progress is not None:
            progress(done, len(layers))
    return found


@dataclass(frozen=True)
class HeadMaps:
    """Matched heads of every mapped layer pair, by old layer."""

    heads: dict[int, dict[int, int]]
    similarity: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def matched(cls, matches: Mapping[int, HeadMatch]) -> HeadMaps:
        """Of what :func:`map_heads` gives."""
        return cls({o: m.heads for o, m in matches.items()}, {o: m.similarity for o, m in matches.items()})

    def tensors(self) -> dict[str, Tensor]:
        """The similarities ``(H_o, H_n)`` by old layer, to be stored."""
        return {str(o): table for o, table in self.similarity.items()}

    def info(self) -> dict[str, Any]:
        """The maps as JSON data."""
        return {"heads": {str(o): {str(a): b for a, b in heads.items()} for o, heads in self.heads.items()}}

    @classmethod
    def read(cls, stored: Stored) -> HeadMaps:
        """What :meth:`tensors` and :meth:`info` gave."""
        heads = {int(o): {int(a): b for a, b in heads.items()} for o, heads in stored.info["heads"].items()}
        return cls(heads, {o: stored.tensor(str(o)) for o in heads})

    def mean_similarity(self) -> dict[str, float]:
        """Mean similarity of the matched heads, by old layer, to four digits."""
        means = {}
        for layer, heads in self.heads.items():
            table = self.similarity[layer]
            total = sum(float(table[a, b]) for a, b in heads.items())
            means[str(layer)] = round(total / max(1, len(heads)), 4)
        return means
