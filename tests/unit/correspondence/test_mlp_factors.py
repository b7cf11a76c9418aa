"""Pseudo-inverses of MLP weights by factors, and products with weights in the dtype they are stored in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasuite.bases import Checkpoint
from lorasuite.correspondence import MlpFactors, gram_factor, mlp_factor, pack, pinv_times, times, unpack
from tests.unit import oracle


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight_of(rows: int, columns: int, *, smallest: float = 1.0, rank: int | None = None) -> Tensor:
    """A float32 weight with singular values from 1 down to ``smallest``, and zeros behind so many."""
    u, s, vh = torch.linalg.svd(random(rows, columns), full_matrices=False)
    values = torch.logspace(0, float(torch.tensor(smallest).log10()), len(s), dtype=torch.float64)
    values[len(s) if rank is None else rank :] = 0
    return ((u * values) @ vh).float()


def apart(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_products_with_weights_as_they_are_stored(
    dtype: torch.dtype, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part at a time, whichever of the weight's directions lies together in memory."""
    monkeypatch.setattr("lorasuite.correspondence._mlp_factors.PART", 64)
    weight, right = random(23, 17).to(dtype), random(17, 3, seed=1)
    stored = weight.T.contiguous().T if turned else weight
    found = times(stored, right)
    assert found.dtype == torch.float64 and apart(found, weight.double() @ right) < 1e-6
    exact = times(stored, right.float(), torch.float64)
    assert exact.dtype == torch.float32 and torch.equal(exact, (weight.double() @ right.float().double()).float())


@pytest.mark.parametrize(("rows", "columns"), [(300, 40), (40, 300), (30, 30), (1, 7), (7, 1)])
def test_the_factor_is_that_of_the_smaller_gram_matrix(rows: int, columns: int) -> None:
    weight = weight_of(rows, columns, smallest=0.3)
    lower = gram_factor(weight)
    small = weight if rows <= columns else weight.T
    assert lower.dtype == torch.float32 and torch.equal(lower, lower.tril())
    torch.testing.assert_close(lower @ lower.T, small @ small.T, rtol=1e-5, atol=1e-6)
    right = random(rows, 5, seed=2)
    assert apart(pinv_times(weight, lower, right), torch.linalg.pinv(weight.double()) @ right) < 1e-5


@pytest.mark.parametrize(("rows", "columns"), [(48, 32), (32, 48), (32, 32)])
@pytest.mark.parametrize("smallest", [1e-1, 1e-3, 1e-5])
def test_a_badly_conditioned_weight(rows: int, columns: int, smallest: float) -> None:
    """Float32 would be off by the square of the condition number."""
    weight = weight_of(rows, columns, smallest=smallest)
    lower, right = gram_factor(weight), random(rows, 5, seed=2)
    assert apart(pinv_times(weight, lower, right), torch.linalg.pinv(weight.double()) @ right) < 1e-4
    assert (lower.dtype == torch.float32) == (smallest > 1e-2)


@pytest.mark.parametrize(("rows", "columns"), [(48, 32), (32, 48)])
@pytest.mark.parametrize("rank", [1, 20])
def test_a_weight_without_full_rank(rows: int, columns: int, rank: int) -> None:
    """As those of MLPs with zeros for padding; the rounding of float32 is no direction of it here."""
    weight = random(rows, rank) @ random(rank, columns, seed=1)
    lower, right = gram_factor(weight), random(rows, 5, seed=2)
    assert apart(pinv_times(weight, lower, right), torch.linalg.pinv(weight, rtol=1e-7) @ right) < 1e-6


def test_a_weight_of_zeros_has_a_pseudo_inverse_of_zeros() -> None:
    weight = torch.zeros(6, 4)
    assert not pinv_times(weight, gram_factor(weight), random(6, 2)).any()


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("intermediate", [96, 20])
def test_the_pseudo_inverses_of_a_base(family: str, intermediate: int, base: Callable[..., Path]) -> None:
    """Of a weight ``(i, d)`` and of one ``(d, i)``, from the transpose of it."""
    path = base(family, intermediate=intermediate)
    weights, checkpoint = oracle.read(path).layers[1], Checkpoint(path)
    up, down = weights["up"], weights["down"]
    right = random(intermediate, 4)
    stored = checkpoint.layer(1, ("up", "down"), as_stored=True)
    found = pinv_times(stored["up"], mlp_factor(checkpoint, 1, "up"), right)
    assert apart(found, torch.linalg.pinv(up) @ right) < 1e-5
    found = pinv_times(stored["down"].T, mlp_factor(checkpoint, 1, "down"), right).T
    assert apart(found, right.T @ torch.linalg.pinv(down)) < 1e-5


@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_a_triangular_matrix_without_its_zeros_is_all_of_it(size: int) -> None:
    matrix = random(size, size).tril()
    packed = pack(matrix)
    even = size + size % 2
    assert packed.numel() == even * (even + 1) // 2
    assert torch.equal(unpack(packed, size), matrix)


class Kept:
    """An artifact in memory."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], info: Mapping[str, Any]) -> None:
        self.named, self.info = dict(tensors), info

    def keys(self) -> Sequence[str]:
        return list(self.named)

    def tensor(self, name: str) -> Tensor:
        return self.named[name]


@pytest.mark.parametrize("intermediate", [48, 21])
def test_factors_are_read_as_they_were_stored(intermediate: int, base: Callable[..., Path]) -> None:
    old = Checkpoint(base("llama", intermediate=intermediate))
    kept = MlpFactors({"up": Kept(MlpFactors.tensors(old, "up"), MlpFactors.info(old))})
    for layer in range(3):
        assert torch.equal(kept(layer, "up"), mlp_factor(old, layer, "up"))
