"""Maps from the old hidden space to the new one, by least squares (LoRASuite, arXiv 2505.13515).

``W_h (d_o, d_n)`` maps row vectors: ``h_n ≈ h_o · W_h``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lorasuite.bases import Checkpoint, CommonTokens, Role
from lorasuite.correspondence._options import MlpRole, When
from lorasuite.correspondence._regression import RegressionSums, least_squares
from lorasuite.errors import ConfigError, NumericalError, Problem
from lorasuite.stored import Stored

#: Embedding rows brought to float64 at a time.
CHUNK = 8192


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
        return x if self.matrix is None else x @ self.matrix.to(x.dtype)

    def adjoint(self, x: Float[Tensor, "d_o columns"]) -> Float[Tensor, "d_n columns"]:
        """``W_hᵀ · x``: columns to the new hidden space."""
        return x if self.matrix is None else self.matrix.to(x.dtype).T @ x

    def backward(self, x: Float[Tensor, "d_o columns"]) -> Float[Tensor, "d_n columns"]:
        """``pinv(W_h) · x``: columns to the new hidden space, by the pseudo-inverse."""
        return x if self.inverse is None else self.inverse.to(x.dtype) @ x


def fit_transfer_matrix(old: Checkpoint, new: Checkpoint, common: CommonTokens, when: When = "auto") -> TransferMatrix:
    """``W_h = pinv(E_o[common]) · E_n[common]``; the identity where the hidden sizes agree (``when="auto"``).

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
    E_o, E_n = old.embedding(), new.embedding()
    sums = RegressionSums.empty(d_o, d_n)
    for ids_o, ids_n in zip(common.old.split(CHUNK), common.new.split(CHUNK), strict=True):
        sums.add(E_o[ids_o].double(), E_n[ids_n].double())
    matrix, left = sums.least_squares()
    return TransferMatrix(matrix, torch.linalg.pinv(matrix), left**0.5, len(common))


def mlp_factor(old: Checkpoint, layer: int, role: MlpRole) -> Float64[Tensor, "d_o d_o"]:
    """The pseudo-inverse of one MLP weight's small Gram matrix.

    ``pinv(U_o) = (U_oᵀU_o)⁺·U_oᵀ`` and ``pinv(D_o) = D_oᵀ·(D_oD_oᵀ)⁺``: with this factor kept, an adapter needs only
    ``r`` right-hand sides, and no ``(i, d)`` pseudo-inverse is ever formed.
    """
    weight = old.layer(layer, (role,))[role].double()
    gram = weight @ weight.T if role == "down" else weight.T @ weight
    return least_squares(gram)


@dataclass(frozen=True)
class MlpFactors:
    """:func:`mlp_factor` of every layer, by role: read from artifacts one at a time."""

    parts: Mapping[str, Stored]

    def __call__(self, layer: int, role: Role) -> Tensor:
        """The factor of an old layer's weight, ``(d_o, d_o)`` float64."""
        return self.parts[role].tensor(str(layer))

    @staticmethod
    def tensors(old: Checkpoint, role: MlpRole) -> Iterator[tuple[str, Tensor]]:
        """The factors of every layer that has the role, computed one at a time, to be stored."""
        for layer in range(old.dims.layers):
            if role in old.roles(layer):
                yield str(layer), mlp_factor(old, layer, role)
