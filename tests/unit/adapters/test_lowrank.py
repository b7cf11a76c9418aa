"""Factored updates against their dense products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasuite.adapters import LowRank
from tests.unit import oracle


def random(out: int, inner: int, rank: int, seed: int = 0) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(out, rank, generator=g, dtype=torch.float64),
        torch.randn(rank, inner, generator=g, dtype=torch.float64),
    )


sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 12), st.integers(0, 2**16))


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 14))
def test_compress_is_the_truncated_svd(size: tuple[int, int, int, int], rank: int) -> None:
    update = random(*size)
    dense = update.B @ update.A
    low, kept = update.compress(rank)
    assert low.B.shape == (size[0], rank) and low.A.shape == (rank, size[1])
    torch.testing.assert_close(low.dense(), oracle.cut(dense, rank), rtol=1e-9, atol=1e-9)
    total = float((dense**2).sum())
    expected = float((oracle.cut(dense, rank) ** 2).sum()) / total if total else 1.0
    assert kept == pytest.approx(expected, abs=1e-9)


def test_compress_splits_the_singular_values_evenly() -> None:
    low, _ = random(7, 6, 4).compress(3)
    torch.testing.assert_close((low.B**2).sum(0), (low.A**2).sum(1))
    s = torch.linalg.svdvals(random(7, 6, 4).dense())[:3]
    torch.testing.assert_close((low.B**2).sum(0), s)


@settings(max_examples=40, deadline=None)
@given(sizes)
def test_svd_norm_and_inner_equal_the_dense_ones(size: tuple[int, int, int, int]) -> None:
    update, other = random(*size), random(size[0], size[1], 3, size[3] + 1)
    dense = update.B @ update.A
    u, s, vh = update.svd()
    torch.testing.assert_close(u @ torch.diag(s) @ vh, dense, rtol=1e-9, atol=1e-9)
    top = torch.linalg.svdvals(dense)
    torch.testing.assert_close(s[: len(top)], top[: len(s)], rtol=1e-9, atol=1e-9)
    assert update.norm() == pytest.approx(float(dense.norm()), abs=1e-9)
    assert update.inner(other) == pytest.approx(float((dense * other.dense()).sum()), abs=1e-9)


def test_sum_scale_and_stack_equal_the_dense_ones() -> None:
    a, b = random(5, 4, 2, 1), random(5, 4, 3, 2)
    torch.testing.assert_close(LowRank.sum([a, b]).dense(), a.dense() + b.dense())
    torch.testing.assert_close(a.scaled(-2.5).dense(), -2.5 * a.dense())
    stacked = LowRank.stack_rows([a, LowRank.zeros(3, 4), b])
    torch.testing.assert_close(stacked.dense(), torch.cat([a.dense(), torch.zeros(3, 4).double(), b.dense()]))
    assert stacked.rank == 5
    empty = LowRank.stack_rows([LowRank.zeros(3, 4), LowRank.zeros(2, 4)])
    assert empty.shape == (5, 4) and not empty.dense().any()


def test_stacking_parts_that_share_their_a_keeps_the_rank() -> None:
    a = random(5, 4, 2, 1)
    twin = LowRank(a.B * 2, a.A)
    stacked = LowRank.stack_rows([a, LowRank.zeros(1, 4), twin])
    assert stacked.rank == 2
    torch.testing.assert_close(
        stacked.dense(), torch.cat([a.dense(), torch.zeros(1, 4, dtype=torch.float64), 2 * a.dense()])
    )


def test_factors_that_do_not_multiply_are_refused() -> None:
    with pytest.raises(ValueError, match="do not multiply"):
        LowRank(torch.zeros(3, 2), torch.zeros(3, 4))


def test_the_zero_update() -> None:
    zero = LowRank.zeros(4, 3)
    assert zero.norm() == 0 and zero.rank == 0
    low, kept = zero.compress(2)
    assert kept == 1.0 and low.shape == (4, 3) and low.rank == 2 and not low.dense().any()
