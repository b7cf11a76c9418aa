"""Maps from the old hidden space to the new one, by least squares (LoRASuite, arXiv 2505.13515).

``W_h (d_o, d_n)`` maps row vectors: ``h_n ≈ h_o · W_h``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lorasuite.bases import Checkpoint, CommonTokens
from lorasuite.correspondence._options import When
from lorasuite.correspondence._regression import RegressionSums
from lorasuite.errors import ConfigError, NumericalError, Problem
from lorasuite.stored import Stored

#: Embedding rows brought to float64 at a time.
CHUNK = 8192
#: A pseudo-inverse by Cholesky whose error could be larger than this, relative to its norm, is computed by SVD instead.
EXACT = 1e-8


@dataclass(frozen=True, eq=False)
class TransferMatrix:
    """``W_h (d_o, d_n)`` and its pseudo-inverse ``(d_n, d_o)``, float64; both None for the identity.

    ``residual`` is ``‖E_o W_h − E_n‖ / ‖E_n‖`` over the common tokens: 0 is a perfect map, 1 no better than zero.
    """

    matrix: Float64[Tensor, "d_o d_n"] | None = None
    inverse: Float64[Tensor, "d_n d_o"] | None = None
    residual: float | None = None
    tokens: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """The matrix and its pseudo-inverse, to be stored; nothing for the identity."""
        if self.matrix is None or self.inverse is None:
            return {}
        return {"matrix": self.matrix, "inverse": self.inverse}

    def info(self) -> dict[str, Any]:
        """What :meth:`read` needs beside the tensors."""
        return {"identity": self.identity, "residual": self.residual, "tokens": self.tokens}

    @classmethod
    def read(cls, stored: Stored) -> TransferMatrix:
        """What :meth:`tensors` and :meth:`info` gave."""
        info = stored.info
        if info["identity"]:
            return cls(tokens=info["tokens"])
        return cls(stored.tensor("matrix"), stored.tensor("inverse"), info["residual"], info["tokens"])

    @property
    def identity(self) -> bool:
        """Whether hidden states are carried over as they are."""
        return self.matrix is None

    def forward(self, x: Float[Tensor, "*rows d_o"]) -> Float[Tensor, "*rows d_n"]:
        """``x · W_h``: rows to the new hidden space."""
        return x if self.matrix is None else x @ self.matrix.to(x)

    def adjoint(self, x: Float[Tensor, "d_o columns"]) -> Float[Tensor, "d_n columns"]:
        """``W_hᵀ · x``: columns to the new hidden space."""
        return x if self.matrix is None else self.matrix.to(x).T @ x

    def backward(self, x: Float[Tensor, "d_o columns"]) -> Float[Tensor, "d_n columns"]:
        """``pinv(W_h) · x``: columns to the new hidden space, by the pseudo-inverse."""
        return x if self.inverse is None else self.inverse.to(x) @ x


def fit_transfer_matrix(
    old: Checkpoint,
    new: Checkpoint,
    common: CommonTokens,
    when: When = "auto",
    device: str | torch.device = "cpu",
) -> TransferMatrix:
    """``W_h = pinv(E_o[common]) · E_n[common]``; the identity where the hidden sizes agree (``when="auto"``).

    Rows of the embeddings are read from the files :data:`CHUNK` at a time and their products summed in float64 on the
    device: a Gram matrix squares the condition number, and embeddings are badly conditioned. For T common tokens that
    takes ``2·T·d_o·(d_o + d_n)`` FLOP and a few ``d_o³``: 8.6 TFLOP for 128,256 tokens at d = 4,096, where the hidden
    sizes differ at all; memory is that of a chunk, 400 MB at that size.

    Raises:
        ConfigError: for ``never`` with different hidden sizes.
        NumericalError: if the two vocabularies share no token.
    """
    d_o, d_n = old.dims.hidden_size, new.dims.hidden_size
    if when == "never" and d_o != d_n:
        raise ConfigError(
            Problem("transfer_matrix", f"'never' needs equal hidden sizes, not {d_o} and {d_n}", "Use 'auto'.")
        )
    if when == "never" or (when == "auto" and d_o == d_n):
        return TransferMatrix(tokens=len(common))
    if not len(common):
        raise NumericalError(
            Problem("vocabulary", "the two tokenizers share no token", "There is nothing to fit a hidden map on.")
        )
    device = device if torch.device(device).type == "cuda" else "cpu"  # others know no float64
    sums = RegressionSums.empty(d_o, d_n, device)
    for ids_o, ids_n in zip(common.old.split(CHUNK), common.new.split(CHUNK), strict=True):
        x, y = (base.embedding(ids).to(device).double() for base, ids in ((old, ids_o), (new, ids_n)))
        sums.add(x, y)
    matrix, left = sums.least_squares()
    return TransferMatrix(matrix.cpu(), pseudo_inverse(matrix).cpu(), left**0.5, len(common))


def pseudo_inverse(matrix: Float64[Tensor, "a b"]) -> Float64[Tensor, "b a"]:
    """``pinv(matrix)``, by the Cholesky factor of its smaller Gram matrix where that is as good, else by SVD.

    With ``E = M·X − I`` for the wide matrix ``M`` and the inverse ``X`` found, ``X = M⁺·(I + E)``: the relative error
    of ``X`` is at most ``‖E‖``, which is looked at. At ``4,096 × 4,096`` that takes 7 d³ = 480 GFLOP, an SVD several
    times as much.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    lower, failed = torch.linalg.cholesky_ex(wide @ wide.T)
    if not int(failed):
        found = wide.T @ torch.cholesky_inverse(lower)
        error = wide @ found
        error.diagonal().sub_(1)
        if float(error.norm()) < EXACT:
            return found if wide is matrix else found.T.contiguous()
    inverse: Tensor = torch.linalg.pinv(matrix)
    return inverse
