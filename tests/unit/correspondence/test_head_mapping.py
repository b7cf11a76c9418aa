"""Head similarity against dense ``(d, d)`` matrices, and the matching against every assignment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasuite.bases import ATTENTION, Checkpoint, CommonTokens
from lorasuite.correspondence import (
    TransferMatrix,
    fit_transfer_matrix,
    head_similarity,
    index_heads,
    map_heads,
    match_heads,
)
from tests import models
from tests.unit import oracle

Spec = tuple[str, dict[str, Any]]


def fitted(old: Path, new: Path) -> TransferMatrix:
    ids = torch.arange(96)
    return fit_transfer_matrix(Checkpoint(old), Checkpoint(new), CommonTokens(ids, ids, True, 96, 96))


PAIRS: dict[str, tuple[Spec, Spec]] = {
    "same numbers": (("llama", {}), ("llama", {})),
    "MHA to GQA": (("llama", {"heads": 4}), ("llama", {"heads": 4, "kv_heads": 2})),
    "GQA to MHA": (("llama", {"heads": 4, "kv_heads": 2}), ("llama", {"heads": 4})),
    "GQA to MQA": (("llama", {"heads": 4, "kv_heads": 2}), ("qwen2", {"heads": 4, "kv_heads": 1})),
    "more heads, other size": (("llama", {"heads": 2}), ("llama", {"heads": 8, "kv_heads": 4})),
    "fewer heads": (("llama", {"heads": 8, "kv_heads": 4}), ("llama", {"heads": 4, "kv_heads": 2})),
    "hidden size": (("llama", {"hidden": 24}), ("llama", {"hidden": 40})),
    "hidden size shrinks, GQA": (("qwen2", {"hidden": 40}), ("llama", {"hidden": 24, "kv_heads": 2})),
    "head size not d/H": (("llama", {"head_dim": 4}), ("llama", {"head_dim": 12, "kv_heads": 2})),
    "fused to fused": (("gpt_neox", {"heads": 4}), ("bloom", {"hidden": 40, "heads": 5})),
    "fused to plain GQA": (("bloom", {"heads": 4}), ("llama", {"heads": 8, "kv_heads": 2})),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_it_is_the_cosine_of_the_dense_matrices(pair: tuple[Spec, Spec], base: Callable[..., Path]) -> None:
    (f_o, n_o), (f_n, n_n) = pair
    old_path, new_path = base(f_o, **n_o), base(f_n, seed=1, **n_n)
    old, new = Checkpoint(old_path), Checkpoint(new_path)
    found = map_heads(old, new, {0: 1, 2: 0}, fitted(old_path, new_path))
    dense_o, dense_n = oracle.read(old_path), oracle.read(new_path)
    W = oracle.hidden_map(dense_o, dense_n)
    assert list(found) == [0, 2]
    for o, n in ((0, 1), (2, 0)):
        expected = oracle.head_similarity(dense_o.layers[o], dense_n.layers[n], dense_o, dense_n, W)
        table = found[o].similarity
        assert table.dtype == torch.float64 and table.shape == expected.shape
        assert float((table - expected).abs().max()) < 1e-4 * float(expected.abs().max())
        if max(expected.shape) <= 5:
            total, every = oracle.best_heads(expected)
            assert frozenset(found[o].heads.items()) in every
            assert sum(float(expected[a, b]) for a, b in found[o].heads.items()) == pytest.approx(total)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**16))
def test_the_matching_is_the_best_of_all(rows: int, columns: int, seed: int) -> None:
    S = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    ours = match_heads(S)
    assert len(ours) == len(set(ours.values())) == min(rows, columns)
    total, every = oracle.best_heads(S)
    assert sum(float(S[a, b]) for a, b in ours.items()) == pytest.approx(total)
    assert frozenset(ours.items()) in every


def permute(path: Path, target: Path, queries: list[int], groups: list[int]) -> Path:
    """A Llama whose new query head ``n`` is old head ``queries[n]`` and new key/value head ``g`` is ``groups[g]``."""
    model = models.load(path)
    H, K = model.config.num_attention_heads, model.config.num_key_value_heads

    def rows(weight: torch.Tensor, count: int, order: list[int]) -> torch.Tensor:
        return weight.reshape(count, -1, weight.shape[1])[order].reshape(weight.shape)

    with torch.no_grad():
        for layer in model.model.layers:
            a = layer.self_attn
            a.q_proj.weight.copy_(rows(a.q_proj.weight, H, queries))
            a.k_proj.weight.copy_(rows(a.k_proj.weight, K, groups))
            a.v_proj.weight.copy_(rows(a.v_proj.weight, K, groups))
            a.o_proj.weight.copy_(rows(a.o_proj.weight.T.contiguous(), H, queries).T)
    model.save_pretrained(target)
    models.build_tokenizer(target, models.words(96))
    return target


@pytest.mark.parametrize(
    ("kv_heads", "queries", "groups"),
    [(4, [2, 0, 3, 1], [2, 0, 3, 1]), (2, [3, 2, 0, 1], [1, 0]), (1, [1, 3, 0, 2], [0])],
)
def test_permuted_heads_are_recovered(
    kv_heads: int, queries: list[int], groups: list[int], base: Callable[..., Path], tmp_path: Path
) -> None:
    old = base("llama", heads=4, kv_heads=kv_heads)
    new = permute(old, tmp_path / "permuted", queries, groups)
    ids = torch.tensor([[5, 9, 33, 71]])
    with torch.no_grad():  # the permuted model computes the same function
        torch.testing.assert_close(models.load(new)(ids).logits, models.load(old)(ids).logits, rtol=1e-4, atol=1e-4)
    found = map_heads(Checkpoint(old), Checkpoint(new), {n: n for n in range(3)}, TransferMatrix())
    for match in found.values():
        assert match.heads == {a: queries.index(a) for a in range(4)}
        for a, b in match.heads.items():
            assert float(match.similarity[a, b]) == pytest.approx(1, abs=1e-5)


def test_the_same_model_matches_itself(base: Callable[..., Path]) -> None:
    checkpoint = Checkpoint(base("gpt_neox"))
    weights = checkpoint.layer(0, ATTENTION)
    table = head_similarity(weights, weights, checkpoint.dims, checkpoint.dims, TransferMatrix())
    torch.testing.assert_close(table.diagonal(), torch.ones(4, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(table, table.T, rtol=1e-5, atol=1e-6)
    assert match_heads(table) == {n: n for n in range(4)}


def test_scale_does_not_matter_and_a_dead_head_is_no_nan(base: Callable[..., Path]) -> None:
    old, new = Checkpoint(base("llama")), Checkpoint(base("llama", seed=1))
    a, b = old.layer(0, ATTENTION), new.layer(0, ATTENTION)
    table = head_similarity(a, b, old.dims, new.dims, TransferMatrix())
    larger = {role: weight * 30 for role, weight in b.items()}
    scaled = head_similarity(a, larger, old.dims, new.dims, TransferMatrix())
    torch.testing.assert_close(scaled, table, rtol=1e-4, atol=1e-6)
    dead = {role: weight.clone() for role, weight in b.items()}
    dead["q"][:8] = 0
    dead["v"][:8] = 0
    again = head_similarity(a, dead, old.dims, new.dims, TransferMatrix())
    assert torch.equal(again[:, 0], torch.zeros(4, dtype=torch.float64)) and bool(torch.isfinite(again).all())


def test_matching_switched_off(base: Callable[..., Path]) -> None:
    old, new = Checkpoint(base("llama", heads=2)), Checkpoint(base("llama", heads=8, kv_heads=4))
    assert index_heads(old.dims, new.dims) == index_heads(new.dims, old.dims) == {0: 0, 1: 1}
    found = map_heads(old, new, {0: 0}, TransferMatrix(), matching=False)
    assert found[0].heads == {0: 0, 1: 1} and found[0].similarity.shape == (2, 8)


def test_progress_is_told(base: Callable[..., Path]) -> None:
    seen: list[tuple[int, int]] = []
    checkpoint = Checkpoint(base("llama"))
    map_heads(checkpoint, checkpoint, {0: 0, 1: 1}, TransferMatrix(), progress=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 2), (2, 2)]
