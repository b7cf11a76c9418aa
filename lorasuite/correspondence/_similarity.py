"""How alike two models' layers are: minibatch CKA with the unbiased HSIC₁ (Nguyen et al. 2021,
Song et al. 2012), and the metrics of the paper's ablation: CCA, PWCCA (Morcos et al. 2018) and Procrustes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lorasuite.correspondence._options import Metric
from lorasuite.errors import ConfigError, DataError, Problem, did_you_mean

#: Share of the variance kept before canonical correlations are taken: with fewer examples than dimensions every
#: direction of noise would correlate perfectly.
VARIANCE = 0.99

#: HSIC₁ divides by n(n−3).
SMALLEST_BATCH = 4


def grams(features: Float[Tensor, "L n d"]) -> Float64[Tensor, "L n n"]:
    """Linear-kernel Grams of features, with the diagonals set to zero.

    In float64, a layer at a time: HSIC₁ is a small difference of large sums. It is cheap all the same: 80 layers of 256
    examples of 8,192 features in minibatches of 64 are 21 GFLOP.
    """
    gram = torch.stack([(x := layer.double()) @ x.T for layer in features])
    gram.diagonal(dim1=1, dim2=2).zero_()
    return gram


def hsic(
    k: Float64[Tensor, "L_o n n"],
    l: Float64[Tensor, "L_n n n"],  # noqa: E741 - the papers' letter
) -> Float64[Tensor, "L_o L_n"]:
    """HSIC₁ of every pair of Grams with zero diagonals.

    ``tr(K̃L̃)`` of all pairs is one ``(L_o, n²)·(n², L_n)`` product; the other terms need only row sums.
    """
    n = k.shape[-1]
    trace = k.flatten(1) @ l.flatten(1).T  # both symmetric
    k_rows, l_rows = k.sum(2), l.sum(2)
    total = torch.outer(k_rows.sum(1), l_rows.sum(1)) / ((n - 1) * (n - 2))
    cross = 2 / (n - 2) * (k_rows @ l_rows.T)
    return (trace + total - cross) / (n * (n - 3))


def _self_hsic(k: Float64[Tensor, "L n n"]) -> Float64[Tensor, " L"]:
    """HSIC₁ of each Gram with itself."""
    n = k.shape[-1]
    rows = k.sum(2)
    terms = (k**2).sum((1, 2)) + rows.sum(1) ** 2 / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows**2).sum(1)
    return terms / (n * (n - 3))


def minibatch_cka(
    batches: Iterable[tuple[Float[Tensor, "L_o _ d_o"], Float[Tensor, "L_n _ d_n"]]],
) -> Float64[Tensor, "L_o L_n"]:
    """CKA accumulated over minibatches of features, of as many examples in both models.

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
            Problem("calibration", f"fewer than {SMALLEST_BATCH} texts", "CKA needs at least 4; give more.")
        )
    scale = torch.outer(k_self.clamp(min=0).sqrt(), l_self.clamp(min=0).sqrt())
    return torch.where(scale > 0, cross / scale, torch.zeros_like(cross))


def cka(
    old: Float[Tensor, "L_o N_o d_o"], new: Float[Tensor, "L_n N_n d_n"], batch_size: int = 64
) -> Float64[Tensor, "L_o L_n"]:
    """Minibatch CKA of stored features with aligned examples.

    Raises:
        DataError: if the examples do not pair up, or are fewer than 4.
    """
    _aligned(old, new)
    return minibatch_cka(zip(old.split(batch_size, 1), new.split(batch_size, 1), strict=True))


def layer_similarity(
    old: Float[Tensor, "L_o N_o d_o"],
    new: Float[Tensor, "L_n N_n d_n"],
    metric: str = "cka",
    batch_size: int = 64,
) -> Float64[Tensor, "L_o L_n"]:
    """Similarity of every old layer's features with every new one's, larger is more alike.

    Args:
        metric: one of :data:`Metric`. ``cka``; or over all examples at once, after centring: ``cca`` the mean canonical
            correlation of the directions that hold 99 % of each variance, ``pwcca`` the same weighted by how much of
            the old layer each direction explains, ``procrustes`` the nuclear norm of the cross-covariance of features
            scaled to unit norm.
        batch_size: examples of a CKA minibatch.

    Raises:
        ConfigError: for an unknown metric.
        DataError: if the examples do not pair up, or are fewer than 4.
    """
    if metric == "cka":
        return cka(old, new, batch_size)
    if metric not in get_args(Metric):
        raise ConfigError(Problem("similarity", f"unknown metric {metric!r}", did_you_mean(metric, get_args(Metric))))
    _aligned(old, new)
    # Thin SVDs once a layer; every pair then needs only products of at most N columns.
    bases_o, bases_n = ([_thin(layer) for layer in features] for features in (old, new))
    compare = {"cca": _cca, "pwcca": _pwcca, "procrustes": _procrustes}[metric]
    return torch.tensor([[compare(x, y) for y in bases_n] for x in bases_o], dtype=torch.float64)


#: Left singular vectors ``(N, k)`` and singular values ``(k,)`` of centred features.
_Thin = tuple[Float64[Tensor, "N _"], Float64[Tensor, " _"]]


def _thin(features: Float[Tensor, "N d"]) -> _Thin:
    x = features.double()
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return u, s


def _reduced(base: _Thin) -> _Thin:
    u, s = base
    share = (s**2).cumsum(0) / (s**2).sum().clamp(min=1e-300)
    keep = int((share < VARIANCE).sum()) + 1
    return u[:, :keep], s[:keep]


def _cca(x: _Thin, y: _Thin) -> float:
    correlations = torch.linalg.svdvals(_reduced(x)[0].T @ _reduced(y)[0])
    return float(correlations.mean())


def _pwcca(x: _Thin, y: _Thin) -> float:
    (u, s), (v, _) = _reduced(x), _reduced(y)
    left, correlations, _ = torch.linalg.svd(u.T @ v, full_matrices=False)
    # Canonical directions are u·left; their weight is how strongly the features project on them.
    weights = (left.T * s).abs().sum(1)
    return float((weights * correlations).sum() / weights.sum())


def _procrustes(x: _Thin, y: _Thin) -> float:
    (u, s), (v, t) = x, y
    scale = s.norm() * t.norm()
    return float(torch.linalg.svdvals(s[:, None] * (u.T @ v) * t).sum() / scale) if scale > 0 else 0.0


def _aligned(old: Float[Tensor, "L_o N_o d_o"], new: Float[Tensor, "L_n N_n d_n"]) -> None:
    if old.shape[1] != new.shape[1]:
        raise DataError(
            Problem(
                "calibration",
                f"{old.shape[1]} examples in one model, {new.shape[1]} in the other",
                "Both models must read the same texts.",
            )
        )
    if old.shape[1] < SMALLEST_BATCH:
        raise DataError(
            Problem(
                "calibration", f"fewer than {SMALLEST_BATCH} texts", "Layers are compared on at least 4; give more."
            )
        )
