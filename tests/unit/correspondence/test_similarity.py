"""Minibatch CKA against HSIC₁ written from the formula, one pair of layers at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasuite.correspondence import cka, grams, hsic, layer_similarity, minibatch_cka
from lorasuite.errors import ConfigError, DataError
from tests.unit import oracle


def features(layers: int, n: int, d: int, seed: int) -> torch.Tensor:
    """Layers that share structure, each with its own noise."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, 3, generator=g)
    mixed = torch.stack([shared @ torch.randn(3, d, generator=g) for _ in range(layers)])
    return mixed + 0.7 * torch.randn(layers, n, d, generator=g)


seeds = st.integers(0, 2**16)


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 20), st.integers(1, 9), st.integers(1, 9), seeds)
def test_hsic_is_the_formula(n: int, d_o: int, d_n: int, seed: int) -> None:
    old, new = features(2, n, d_o, seed), features(3, n, d_n, seed + 1)
    ours = hsic(grams(old), grams(new))
    theirs = torch.tensor([[oracle.hsic1(x, y) for y in new] for x in old], dtype=torch.float64)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(st.integers(8, 24), st.integers(4, 12), st.integers(4, 12), seeds)
def test_one_minibatch_is_the_full_batch(n: int, d_o: int, d_n: int, seed: int) -> None:
    old, new = features(3, n, d_o, seed), features(2, n, d_n, seed)
    torch.testing.assert_close(cka(old, new, n), oracle.cka(old, new, [slice(0, n)]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cka(old, new, 10 * n), cka(old, new, n))


@pytest.mark.parametrize(("n", "size"), [(24, 8), (26, 8), (27, 8), (29, 8), (9, 5)])
def test_several_minibatches_are_the_sums_of_the_formula(n: int, size: int) -> None:
    """A last batch of fewer than four examples has no HSIC₁ and is left out."""
    old, new = features(3, n, 10, 1), features(4, n, 6, 1)
    batches = [slice(k, min(k + size, n)) for k in range(0, n, size)]
    batches = [b for b in batches if b.stop - b.start >= 4]
    torch.testing.assert_close(cka(old, new, size), oracle.cka(old, new, batches), rtol=1e-6, atol=1e-6)


def test_it_differs_from_the_mean_of_the_batches_ckas() -> None:
    """So the test above can tell the sums from a simpler wrong formula."""
    old, new = features(1, 24, 10, 1), features(1, 24, 6, 2)
    mean = torch.stack([cka(old[:, k : k + 8], new[:, k : k + 8], 8) for k in (0, 8, 16)]).mean(0)
    assert abs(float(mean - cka(old, new, 8))) > 1e-3


@settings(max_examples=15, deadline=None)
@given(st.integers(8, 20), st.integers(2, 12), seeds)
def test_a_model_with_itself_has_a_diagonal_of_one(n: int, d: int, seed: int) -> None:
    x = features(4, n, d, seed)
    table = cka(x, x, 7)
    torch.testing.assert_close(table.diagonal(), torch.ones(4, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(table, table.T)
    assert float(table.max()) <= 1 + 1e-9


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 8), st.floats(1e-3, 1e3), st.booleans(), seeds)
def test_a_change_of_orthogonal_basis_and_scale_changes_nothing(d: int, scale: float, shift: bool, seed: int) -> None:
    old, new = features(2, 16, 5, seed).double(), features(3, 16, d, seed).double()
    basis, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    turned = new @ basis * scale
    torch.testing.assert_close(cka(old, turned, 8), cka(old, new, 8), rtol=1e-6, atol=1e-6)
    if shift:  # HSIC₁ centres: a constant added to every example does not count either
        torch.testing.assert_close(cka(old + 0.3, turned, 8), cka(old, new, 8), rtol=1e-6, atol=1e-6)


def test_a_general_linear_map_does_change_it() -> None:
    x = features(1, 16, 6, 0)
    stretched = x * torch.tensor([10.0, 1, 1, 1, 1, 1])
    assert float(cka(x, stretched, 16)) < 0.99


def test_permuting_examples_together_changes_nothing_apart_a_lot() -> None:
    old, new = features(2, 32, 6, 0), features(2, 32, 8, 0)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(cka(old[:, order], new[:, order], 32), cka(old, new, 32))
    assert float((cka(old[:, order], new, 32) - cka(old, new, 32)).abs().max()) > 0.2


def test_unrelated_features_are_near_zero() -> None:
    """The biased estimator would give about 0.5 here."""
    g = torch.Generator().manual_seed(0)
    old, new = torch.randn(1, 64, 64, generator=g), torch.randn(1, 64, 64, generator=g)
    assert abs(float(cka(old, new, 64))) < 0.1


def test_constant_features_give_zero_not_nan() -> None:
    table = cka(torch.ones(2, 8, 3), features(2, 8, 3, 0), 8)
    assert torch.equal(table, torch.zeros(2, 2, dtype=torch.float64))


def test_what_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="at least 4"):
        cka(features(1, 3, 4, 0), features(1, 3, 4, 0))
    with pytest.raises(DataError, match="at least 4"):
        minibatch_cka([])
    with pytest.raises(DataError, match="8 examples in one model, 9 in the other"):
        cka(features(1, 8, 4, 0), features(1, 9, 4, 0))


class TestOtherMetrics:
    """CCA, PWCCA and Procrustes of the paper's ablation."""

    @staticmethod
    def features(seed: int, layers: int = 2, n: int = 60, d: int = 7) -> torch.Tensor:
        return torch.randn(layers, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    @pytest.mark.parametrize("metric", ["cca", "pwcca", "procrustes"])
    def test_one_with_itself_and_after_a_rotation(self, metric):
        x = self.features(0)
        rotation = torch.linalg.qr(self.features(1, 1, 7, 7)[0])[0]
        table = layer_similarity(x, 3 * (x @ rotation) + 5, metric)
        assert torch.allclose(table.diagonal(), torch.ones(2, dtype=torch.float64), atol=1e-9)
        assert table[0, 1] < 0.9

    @pytest.mark.parametrize("metric", ["cca", "pwcca"])
    def test_correlations_hardly_feel_an_invertible_map(self, metric):
        x, y = self.features(0), self.features(2)
        skew = self.features(3, 1, 7, 7)[0] + 3 * torch.eye(7)
        # every direction kept, or the skewed features could lose another one to the variance cut
        full = layer_similarity(x, y, metric), layer_similarity(x, y @ skew, metric)
        assert torch.allclose(*full, atol=0.05)

    def test_cca_agrees_with_the_textbook(self):
        x, y = self.features(0, 1)[0], self.features(2, 1)[0]
        a, b = x - x.mean(0), y - y.mean(0)

        def root(m):
            values, vectors = torch.linalg.eigh(m)
            return vectors @ torch.diag(values**-0.5) @ vectors.T

        correlations = torch.linalg.svdvals(root(a.T @ a) @ a.T @ b @ root(b.T @ b))
        assert float(layer_similarity(x[None], y[None], "cca")) == pytest.approx(float(correlations.mean()), abs=1e-9)

    def test_procrustes_is_the_distance_to_the_best_rotation(self):
        x, y = self.features(0, 1)[0], self.features(2, 1)[0]
        a, b = x - x.mean(0), y - y.mean(0)
        a, b = a / a.norm(), b / b.norm()
        u, _, vh = torch.linalg.svd(a.T @ b)
        distance = float((a @ (u @ vh) - b).norm() ** 2)
        similarity = float(layer_similarity(x[None], y[None], "procrustes"))
        assert similarity == pytest.approx(1 - distance / 2, abs=1e-9)

    def test_unknown_metric_and_too_few_texts(self):
        with pytest.raises(ConfigError, match="pwcca"):
            layer_similarity(self.features(0), self.features(1), "pwca")
        with pytest.raises(DataError, match="fewer than 4"):
            layer_similarity(self.features(0, n=3), self.features(1, n=3), "cca")
