"""How alike two models' layers are: minibatch CKA with the unbiased HSIC₁ (METHOD section 3; Nguyen et al. 2021,
Song et al. 2012)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lorasuite.errors import DataError, Problem

#: HSIC₁ divides by n(n−3).
SMALLEST_BATCH = 4


def grams(features: Tensor) -> Tensor:
    """Linear-kernel Grams ``(L, n, n)`` of ``(L, n, d)`` features, with the diagonals set to zero, float64."""
    x = features.double()
    gram = x @ x.transpose(1, 2)
    gram.diagonal(dim1=1, dim2=2).zero_()
    return gram


def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741 - the papers' letter
    """HSIC₁ of every pair: Grams ``(L_o, n, n)`` and ``(L_n, n, n)`` with zero diagonals → ``(L_o, L_n)``.

    ``tr(K̃L̃)`` of all pairs is one ``(L_o, n²)·(n², L_n)`` product; the other terms need only row sums.
    """
    n = k.shape[-1]
    trace = k.flatten(1) @ l.flatten(1).T  # both symmetric
    k_rows, l_rows = k.sum(2), l.sum(2)
    total = torch.outer(k_rows.sum(1), l_rows.sum(1)) / ((n - 1) * (n - 2))
    cross = 2 / (n - 2) * (k_rows @ l_rows.T)
    return (trace + total - cross) / (n * (n - 3))


def _self_hsic(k: Tensor) -> Tensor:
    """HSIC₁ of each Gram with itself, ``(L,)``."""
    n = k.shape[-1]
    rows = k.sum(2)
    terms = (k**2).sum((1, 2)) + rows.sum(1) ** 2 / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows**2).sum(1)
    return terms / (n * (n - 3))


def minibatch_cka(batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """CKA ``(L_o, L_n)`` accumulated over minibatches of features ``(L_o, n, d_o)``, ``(L_n, n, d_n)``.

    Each layer's Gram is formed once a batch. Memory is that of one batch.

    Raises:
        DataError: if no batch has at least 4 examples.
    """
    cross = k_self = l_self = None
    for old, new in batches:
        if old.shape[1] < SMALLEST_BATCH:
            continue  # HSIC₁ is undefined: the last, partial batch
        k, l = grams(old), grams(new)  # noqa: E741
        terms = hsic(k, l), _self_hsic(k), _self_hsic(l)
        if cross is None or k_self is None or l_self is None:
            cross, k_self, l_self = terms
        else:
            cross, k_self, l_self = cross + terms[0], k_self + terms[1], l_self + terms[2]
    if cross is None or k_self is None or l_self is None:
        raise DataError(
            Problem("calibration", f"fewer than {SMALLEST_BATCH} texts", "CKA needs at least 4; give a few dozen.")
        )
    scale = torch.outer(k_self.clamp(min=0).sqrt(), l_self.clamp(min=0).sqrt())
    return torch.where(scale > 0, cross / scale, torch.zeros_like(cross))


def cka(old: Tensor, new: Tensor, batch_size: int = 64) -> Tensor:
    """Minibatch CKA of stored features ``(L_o, N, d_o)`` and ``(L_n, N, d_n)`` with aligned examples."""
    if old.shape[1] != new.shape[1]:
        raise DataError(
            Problem(
                "calibration",
                f"{old.shape[1]} examples in one model, {new.shape[1]} in the other",
                "Both models must read the same texts.",
            )
        )
    return minibatch_cka(zip(old.split(batch_size, 1), new.split(batch_size, 1), strict=True))
