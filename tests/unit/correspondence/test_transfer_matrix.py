"""``W_h`` against dense pseudo-inverses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasuite.bases import Checkpoint, CommonTokens, common_tokens
from lorasuite.correspondence import TransferMatrix, fit_transfer_matrix, least_squares, pseudo_inverse
from lorasuite.errors import ConfigError, NumericalError
from tests import models
from tests.unit import oracle


def every(rows: int) -> CommonTokens:
    ids = torch.arange(rows)
    return CommonTokens(ids, ids, True, rows, rows)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-8) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert float((ours - theirs).norm() / theirs.norm()) < tolerance


@pytest.mark.parametrize(("d_o", "d_n"), [(24, 40), (40, 24), (32, 32)])
def test_it_is_pinv_of_the_old_times_the_new_embedding(d_o: int, d_n: int, base: Callable[..., Path]) -> None:
    old, new = base("llama", hidden=d_o), base("gpt_neox", hidden=d_n, seed=1)
    W = fit_transfer_matrix(Checkpoint(old), Checkpoint(new), every(96), when="always")
    E_o, E_n = oracle.read(old).E, oracle.read(new).E
    expected = oracle.transfer(E_o, E_n, [(n, n) for n in range(96)])
    assert W.matrix is not None and W.inverse is not None and not W.identity and W.tokens == 96
    close(W.matrix, expected)
    close(W.inverse, torch.linalg.pinv(expected))
    assert W.residual == pytest.approx(float((E_o @ expected - E_n).norm() / E_n.norm()), rel=1e-9)
    assert 0.3 < W.residual < 1  # two random embeddings


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**16))
def test_common_sets_too_small_for_a_full_rank_give_the_minimum_norm_map(
    base: Callable[..., Path], count: int, seed: int
) -> None:
    old, new = base("llama", hidden=24), base("llama", hidden=40, seed=1)
    g = torch.Generator().manual_seed(seed)
    ids_o, ids_n = torch.randperm(96, generator=g)[:count], torch.randperm(96, generator=g)[:count]
    W = fit_transfer_matrix(Checkpoint(old), Checkpoint(new), CommonTokens(ids_o, ids_n, False, 96, 96))
    pairs = list(zip(ids_o.tolist(), ids_n.tolist(), strict=True))
    expected = oracle.transfer(oracle.read(old).E, oracle.read(new).E, pairs)
    assert W.matrix is not None and W.inverse is not None and W.residual is not None
    close(W.matrix, expected, 1e-6)
    # numpy's and torch's default cut-off is at rounding level, where a rank-deficient product has its noise
    close(W.inverse, torch.linalg.pinv(expected, rtol=1e-8), 1e-5)
    if count <= 24:
        assert W.residual < 1e-6
    else:
        assert W.residual > 0.01


def test_duplicated_rows_are_no_extra_rank(tmp_path: Path, base: Callable[..., Path]) -> None:
    old, new = base("llama", hidden=24), base("llama", hidden=40, seed=1)
    ids = torch.arange(10).repeat(5)
    W = fit_transfer_matrix(Checkpoint(old), Checkpoint(new), CommonTokens(ids, ids, False, 96, 96))
    expected = oracle.transfer(oracle.read(old).E, oracle.read(new).E, [(n % 10, n % 10) for n in range(50)])
    assert W.matrix is not None
    close(W.matrix, expected, 1e-6)


def test_the_result_does_not_depend_on_the_chunks(base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = Checkpoint(base("llama", hidden=24)), Checkpoint(base("llama", hidden=40, seed=1))
    whole = fit_transfer_matrix(old, new, every(96))
    monkeypatch.setattr("lorasuite.correspondence._transfer_matrix.CHUNK", 7)
    parts = fit_transfer_matrix(old, new, every(96))
    assert whole.matrix is not None and parts.matrix is not None
    close(parts.matrix, whole.matrix, 1e-10)
    assert parts.residual == pytest.approx(whole.residual)


def test_a_permuted_and_extended_vocabulary_gives_the_same_matrix(tmp_path: Path, base: Callable[..., Path]) -> None:
    old, new = base("llama", hidden=24), base("llama", hidden=40, seed=1)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(2))
    model = models.load(new)
    model.resize_token_embeddings(101)
    with torch.no_grad():
        rows = torch.cat([models.load(new).get_input_embeddings().weight[order], torch.randn(5, 40)])
        model.get_input_embeddings().weight.copy_(rows)
    model.save_pretrained(tmp_path / "shuffled")
    tokens = [models.words(96)[n] for n in order.tolist()] + [f"new{n}" for n in range(5)]
    shuffled = models.build_tokenizer(tmp_path / "shuffled", tokens)
    original = models.build_tokenizer(tmp_path / "original", models.words(96))
    common = common_tokens(original, shuffled, 96, 101)
    W = fit_transfer_matrix(Checkpoint(old), Checkpoint(tmp_path / "shuffled"), common)
    plain = fit_transfer_matrix(Checkpoint(old), Checkpoint(new), every(96))
    assert W.matrix is not None and plain.matrix is not None
    close(W.matrix, plain.matrix)


def test_a_linear_twin_is_recovered_exactly(tmp_path: Path, base: Callable[..., Path]) -> None:
    old = base("llama", hidden=24)
    model = models.load(base("llama", hidden=40, seed=1))
    true = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(models.load(old).get_input_embeddings().weight @ true)
    model.save_pretrained(tmp_path / "twin")
    W = fit_transfer_matrix(Checkpoint(old), Checkpoint(tmp_path / "twin"), every(96))
    assert W.matrix is not None and W.residual is not None
    close(W.matrix, true.double(), 1e-6)
    assert W.residual < 1e-6


def test_equal_hidden_sizes_give_the_identity(base: Callable[..., Path]) -> None:
    old, new = Checkpoint(base("llama")), Checkpoint(base("llama", seed=1))
    for when in ("auto", "never"):
        W = fit_transfer_matrix(old, new, every(96), when=when)  # type: ignore[arg-type]
        assert W.identity and W.residual is None
        x = torch.randn(3, 32)
        assert W.forward(x) is x and W.adjoint(x) is x and W.backward(x) is x


def test_what_cannot_be_fitted(base: Callable[..., Path]) -> None:
    old, new = Checkpoint(base("llama", hidden=24)), Checkpoint(base("llama", hidden=40, seed=1))
    with pytest.raises(ConfigError, match="24 and 40"):
        fit_transfer_matrix(old, new, every(96), when="never")
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(NumericalError, match="share no token"):
        fit_transfer_matrix(old, new, CommonTokens(none, none, False, 96, 96))


def test_the_three_products() -> None:
    matrix = torch.randn(4, 6, dtype=torch.float64)
    W = TransferMatrix(matrix, torch.linalg.pinv(matrix))
    rows, columns = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(W.forward(rows), rows @ matrix)
    torch.testing.assert_close(W.adjoint(columns), matrix.T @ columns)
    torch.testing.assert_close(W.backward(columns), torch.linalg.pinv(matrix) @ columns)
    assert W.forward(rows.float()).dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**16))
def test_least_squares_is_the_pseudo_inverse(rows: int, columns: int, rank: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    E = torch.randn(rows, rank, generator=g).double() @ torch.randn(rank, columns, generator=g).double()
    F = torch.randn(rows, 3, generator=g).double()
    s = torch.linalg.svdvals(E)
    true = s[: min(rank, len(s))]
    if float(true[-1] / true[0]) < 1e-4:  # a Gram matrix squares the condition number
        return
    expected = torch.linalg.pinv(E, rtol=1e-8) @ F
    torch.testing.assert_close(least_squares(E.T @ E, E.T @ F), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 9), st.integers(0, 2**16))
def test_pseudo_inverses_of_any_shape_and_condition(rows: int, columns: int, digits: float, seed: int) -> None:
    """By Cholesky where the condition number is small, by SVD where it is not."""
    g = torch.Generator().manual_seed(seed)
    u, _, vh = torch.linalg.svd(torch.randn(rows, columns, generator=g, dtype=torch.float64), full_matrices=False)
    matrix = (u * torch.logspace(0, -digits, min(rows, columns), dtype=torch.float64)) @ vh
    expected = (vh.T * torch.logspace(0, digits, min(rows, columns), dtype=torch.float64)) @ u.T
    close(pseudo_inverse(matrix), expected, 1e-6)


def test_the_pseudo_inverse_of_a_matrix_without_full_rank() -> None:
    matrix = torch.randn(8, 3, dtype=torch.float64) @ torch.randn(3, 6, dtype=torch.float64)
    close(pseudo_inverse(matrix), torch.linalg.pinv(matrix), 1e-6)
