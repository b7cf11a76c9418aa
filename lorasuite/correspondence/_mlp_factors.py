"""Pseudo-inverses of a base's MLP weights as factors, and products of weights, as they are stored, with few columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lorasuite.bases import Checkpoint, Role
from lorasuite.correspondence._options import MlpRole
from lorasuite.correspondence._regression import gram_cutoff
from lorasuite.stored import Stored

#: Numbers of a weight that are brought to another dtype at a time: 2 MB of float32, which stay in a core's cache.
PART = 2**19
#: Rows of a Gram matrix that are computed at a time.
GRAM_ROWS = 256
#: Bounds of a Gram matrix's condition number (the product of its and its inverse's Frobenius norms) up to which each
#: dtype does: rounding then changes the pseudo-inverse by 1e-4 at most.
CONDITION = {torch.float32: 1e5, torch.float64: 1e10}


def times(
    weight: Float[Tensor, "m n"], right: Float[Tensor, "n c"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "m c"]:
    """``weight · right``, for few columns: computed in ``dtype``, given back in that of ``right``.

    The weight may be in any dtype. It is converted a part at a time, which takes a quarter of the time that converting
    it whole and multiplying does: a CPU then reads each number once, and writes none of them to memory.
    """
    columns = right.to(dtype)
    if weight.dtype == dtype:
        return (weight @ columns).to(right.dtype)
    rows, width = weight.shape
    if weight.stride(1) <= weight.stride(0):
        parts = weight.split(max(PART // width, 1))
        return torch.cat([part.to(dtype) @ columns for part in parts]).to(right.dtype)
    found = columns.new_zeros(rows, columns.shape[1])
    count = max(PART // rows, 1)
    for part, of in zip(weight.split(count, 1), columns.split(count), strict=True):  # whose columns lie together
        found.addmm_(part.to(dtype), of)
    return found.to(right.dtype)


def gram_factor(weight: Float[Tensor, "m n"]) -> Float[Tensor, "s s"]:
    """The lower Cholesky factor of a weight's smaller Gram matrix, ``s = min(m, n)``, which :func:`pinv_times` reads.

    In float32, unless the condition number could be more than :data:`CONDITION`: weights of a trained MLP are well
    conditioned (up to 34 in SmolLM2-135M, 48 in six layers of Qwen2.5-Coder-0.5B, where :func:`pinv_times` is then
    within 2e-5 of float64), random square ones need not be. Where it is too large for float64, too, or the weight lacks
    full rank, directions below the cut of :func:`lorasuite.correspondence.least_squares` are given the
    largest eigenvalue: the pseudo-inverse sends nothing there and takes nothing from there, so any number but 0 does.

    Costs ``s²·max(m, n) + s³/3`` FLOP: half of the Gram matrix, and its factor.
    """
    rows = weight.T if weight.shape[0] > weight.shape[1] else weight
    for dtype in CONDITION:
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(_lower_gram(rows.to(dtype)))
        if not int(failed) and _condition(lower) < CONDITION[dtype]:
            return lower
    values, vectors = torch.linalg.eigh(_lower_gram(rows.double()))
    largest = values[-1].clamp(min=torch.finfo(values.dtype).tiny)
    values = torch.where(values > gram_cutoff(values), values, largest)
    lower = torch.linalg.cholesky((vectors * values) @ vectors.T)
    return lower


def _lower_gram(rows: Float[Tensor, "s l"]) -> Float[Tensor, "s s"]:
    """``rows · rowsᵀ`` on and below the diagonal, with blocks of zeros above it."""
    gram = rows.new_zeros(len(rows), len(rows))
    for start in range(0, len(rows), GRAM_ROWS):
        end = start + GRAM_ROWS
        torch.mm(rows[start:end], rows[:end].T, out=gram[start:end, :end])
    return gram


def _condition(lower: Float[Tensor, "s s"]) -> float:
    """``‖G‖·‖G⁻¹‖`` of ``G = L·Lᵀ`` in the Frobenius norm, from 16 random columns.

    The mean of ``‖G·x‖²`` over random columns is ``‖G‖²``; less than half of a norm is seen once in a thousand times at
    most, which is where a single direction makes all of it.
    """
    probes = torch.randn(len(lower), 16, generator=torch.Generator().manual_seed(0)).to(lower)
    there, back = lower @ (lower.T @ probes), torch.cholesky_solve(probes, lower)
    return float(there.norm()) * float(back.norm()) / probes.shape[1]


def pinv_times(
    weight: Float[Tensor, "m n"], factor: Float[Tensor, "s s"], right: Float[Tensor, "m c"]
) -> Float[Tensor, "n c"]:
    """``pinv(weight) · right`` for few columns, with the weight's :func:`gram_factor`, in the dtype of that.

    ``pinv(U) = (UᵀU)⁻¹·Uᵀ`` of a tall weight and ``Uᵀ·(UUᵀ)⁻¹`` of a wide one: neither is ever formed.
    """
    dtype, columns = factor.dtype, right.to(factor.dtype)
    if weight.shape[0] > weight.shape[1]:
        return torch.cholesky_solve(times(weight.T, columns, dtype), factor).to(right.dtype)
    return times(weight.T, torch.cholesky_solve(columns, factor), dtype).to(right.dtype)


def mlp_factor(old: Checkpoint, layer: int, role: MlpRole, device: str | torch.device = "cpu") -> Float[Tensor, "s s"]:
    """:func:`gram_factor` of one MLP weight, on the CPU.

    0.21 TFLOP at 8B (i = 11,008, d = 4,096), 20 TFLOP for the three roles of 32 layers.
    """
    return gram_factor(old.layer(layer, (role,))[role].to(device)).cpu()


def pack(lower: Float[Tensor, "s s"]) -> Tensor:
    """A lower triangular matrix without its half of zeros: ``(s/2, s + 1)`` for even ``s``.

    Of the quarters ``[[P, 0], [Q, R]]`` it holds ``Q``, and ``P`` beside the transpose of ``R`` (as LAPACK's
    rectangular full packed format does). An odd matrix gets a row and a column of zeros first.
    """
    lower = torch.nn.functional.pad(lower, 2 * (0, lower.shape[0] % 2))
    half = lower.shape[0] // 2
    both = lower.new_zeros(half, half + 1)
    both[:, :half] = lower[:half, :half]
    both[:, 1:] += lower[half:, half:].T
    return torch.cat([lower[half:, :half], both], 1)


def unpack(packed: Tensor, size: int) -> Float[Tensor, "{size} {size}"]:
    """What :func:`pack` was given."""
    half = packed.shape[0]
    lower = packed.new_zeros(2 * half, 2 * half)
    lower[half:, :half] = packed[:, :half]
    lower[:half, :half] = packed[:, half:-1].tril()
    lower[half:, half:] = packed[:, half + 1 :].triu().T
    return lower[:size, :size]


@dataclass(frozen=True)
class MlpFactors:
    """:func:`mlp_factor` of every layer, by role: read from artifacts one at a time.

    They are stored without their half of zeros, as a rule in float32: ``2·d²`` bytes a layer and role, 3.2 GB at 8B (32
    layers, three roles, d = 4,096), a fifth of such a base in bfloat16. To factor again for each adapter would take no
    disk, but 20 TFLOP for each at 8B, minutes of a CPU.
    """

    parts: Mapping[str, Stored]

    def __call__(self, layer: int, role: Role) -> Tensor:
        """The factor of an old layer's weight, ``(s, s)``."""
        stored = self.parts[role]
        return unpack(stored.tensor(str(layer)), stored.info["sizes"][str(layer)])

    @staticmethod
    def tensors(old: Checkpoint, role: MlpRole, device: str | torch.device = "cpu") -> Iterator[tuple[str, Tensor]]:
        """The factors of every layer that has the role, computed one at a time, to be stored."""
        for layer in range(old.dims.layers):
            if role in old.roles(layer):
                yield str(layer), pack(mlp_factor(old, layer, role, device))

    @staticmethod
    def info(old: Checkpoint) -> dict[str, Any]:
        """What reading them needs beside the tensors: the size of each layer's."""
        dims = {str(layer): old.layer_dims(layer) for layer in range(old.dims.layers)}
        return {"sizes": {layer: min(d.hidden_size, d.intermediate_size) for layer, d in dims.items()}}
