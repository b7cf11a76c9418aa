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
    such matrix is formed, see :func:`_inner`, and a norm needs only ``e×e`` Grams. Key/value heads count once for each
    query head that reads them.

    Args:
        old, new: the weights of roles q, k, v, o, ``(out, in)``.
    """
    # All as (heads, e, d_n): for O the transpose, whose rows are the head's write directions.
    a, b = _heads(old, old_dims, transfer), _heads(new, new_dims, TransferMatrix())
    dots = _inner(a["q"], a["k"], b["q"], b["k"]) + _inner(a["o"], a["v"], b["o"], b["v"])
    norms = torch.outer(_norms(a), _norms(b))
    return torch.where(norms > 0, dots.double() / norms, torch.zeros_like(norms))


def _heads(weights: Weights, dims: Dimensions, transfer: TransferMatrix) -> dict[Role, Float[Tensor, "heads e d"]]:
    """Each role's rows by head, float32, in the new hidden space."""
    counts = {"q": dims.heads, "k": dims.kv_heads, "v": dims.kv_heads, "o": dims.heads}
    rows = {role: (weights[role].T if role == "o" else weights[role]).float() for role in counts}
    return {role: heads(transfer.forward(rows[role]), count) for role, count in counts.items()}


def _inner(
    q_o: Float[Tensor, "H_o e_o d"],
    k_o: Float[Tensor, "K_o e_o d"],
    q_n: Float[Tensor, "H_n e_n d"],
    k_n: Float[Tensor, "K_n e_n d"],
) -> Float[Tensor, "H_o H_n"]:
    """``⟨QᵀK, Q'ᵀK'⟩`` of every pair of query heads: ``⟨(K'Kᵀ)·Q, Q'⟩``, with no ``d × d`` matrix.

    The product with ``Q`` is the dear one, ``2·e²·d``. It is the same for all new heads that share ``K'``, so there are
    ``H_o·K_n`` of them; or, with the sides changed, ``K_o·H_n``.
    """
    if len(q_o) * len(k_n) > len(k_o) * len(q_n):
        return _inner(q_n, k_n, q_o, k_o).T
    shared = (k_n.flatten(0, 1) @ k_o.flatten(0, 1).T).reshape(*k_n.shape[:2], *k_o.shape[:2])
    shared = shared.transpose(1, 2).repeat_interleave(len(q_o) // len(k_o), 1)  # (K_n, H_o, e_n, e_o)
    carried = q_o.new_empty(len(q_o), k_n.shape[1], q_o.shape[2])
    columns = [
        torch.matmul(through, q_o, out=carried).flatten(1) @ q.flatten(1).T
        for through, q in zip(shared, q_n.chunk(len(k_n)), strict=True)
    ]
    return torch.cat(columns, 1)


def _norms(weights: Mapping[Role, Float[Tensor, "heads e d"]]) -> Float64[Tensor, " H"]:
    """``√(‖QK‖² + ‖VO‖²)`` of each head, by ``‖XᵀY‖² = ⟨XXᵀ, YYᵀ⟩``."""
    gram = {role: x @ x.transpose(1, 2) for role, x in weights.items()}
    group = len(gram["q"]) // len(gram["k"])
    k, v = (gram[role].repeat_interleave(group, 0) for role in ("k", "v"))
    return (gram["q"] * k + gram["o"] * v).sum((1, 2), dtype=torch.float64).clamp(min=0).sqrt()


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
    return {role: weight.to(device) for role, weight in base.layer(layer, ATTENTION, as_stored=True).items()}


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

    A layer pair costs ``2·d·(H_o·e_o)·(K_n·e_n)`` FLOP four times, ``K_n`` the new key/value heads, or of ``K_o`` and
    ``H_n`` if those are fewer: with norms 0.17 TFLOP at Llama-2-7B to Llama-3-8B, 5.3 TFLOP for the bases; another
    ``2·d_o·d_n`` a row of the old weights where ``W_h`` is no identity.

    Args:
        matching: False maps head ``a`` to head ``a`` (the paper's ablation).
        device: where the products are taken, in float32.
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
