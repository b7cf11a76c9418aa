"""The paper's transform, whole adapters through files, against the dense formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasuite.adapters import Adapter, LowRank, fuse_updates, split_update
from lorasuite.bases import Checkpoint, CommonTokens, Dimensions, Module
from lorasuite.correspondence import TransferMatrix, fit_transfer_matrix, gram_factor, mlp_factor
from lorasuite.errors import AdapterError, ConfigError
from lorasuite.transforms import Migrated, migrate, names, transform
from tests import models
from tests.unit import oracle
from tests.unit.correspondence.test_head_mapping import permute

Spec = tuple[str, dict[str, Any]]


def spec(family: str, **numbers: Any) -> Spec:
    return family, numbers


def run(
    adapter: Path,
    old: Path,
    new: Path,
    layers: Mapping[int, int],
    heads: Mapping[int, Mapping[int, int]],
    rank: int = 3,
    **settings: Any,
) -> Migrated:
    a, b = Checkpoint(old), Checkpoint(new)
    ids = torch.arange(min(a.dims.vocab_size, b.dims.vocab_size))
    W = fit_transfer_matrix(a, b, CommonTokens(ids, ids, False, 0, 0))
    return migrate(
        Adapter.open(adapter), a, b, method=settings.pop("method", "lorasuite"), layers=layers, heads=heads, transfer=W,
        mlp_factor=lambda layer, role: mlp_factor(a, layer, role), rank=rank, **settings,
    )  # fmt: skip


def some_heads(layers: Mapping[int, int], H_o: int, H_n: int) -> dict[int, dict[int, int]]:
    """Another assignment for every layer, never the identity where there is a choice."""
    found = {}
    for o in layers:
        g = torch.Generator().manual_seed(7 + o)
        count = min(H_o, H_n)
        left, right = torch.randperm(H_o, generator=g)[:count], torch.randperm(H_n, generator=g)[:count]
        found[o] = dict(zip(left.tolist(), right.tolist(), strict=True))
    return found


def expected_updates(
    adapter: Path, old: Path, new: Path, layers: Mapping[int, int], heads: Mapping[int, dict[int, int]]
) -> dict[str, torch.Tensor]:
    a, b = oracle.read(old), oracle.read(new)
    W = oracle.hidden_map(a, b)
    deltas = oracle.take_apart(models.peft_deltas(adapter, old), a)
    moved = {
        n: oracle.move(deltas[o], a.layers[o], b.layers[n], a, b, heads[o], W) for o, n in layers.items() if o in deltas
    }
    return oracle.put_together(moved, b)


def check(updates: Mapping[str, LowRank], expected: Mapping[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert set(updates) == set(expected)
    for path, dense in expected.items():
        assert float(dense.norm()) > 1e-3, path
        error = float((updates[path].B @ updates[path].A - dense).norm() / dense.norm())
        assert error < tolerance, (path, error)


PAIRS: dict[str, tuple[Spec, Spec]] = {
    "same numbers": (spec("llama"), spec("llama")),
    "hidden grows": (spec("llama", hidden=24), spec("llama", hidden=40)),
    "hidden shrinks": (spec("llama", hidden=40), spec("llama", hidden=24)),
    "more heads": (spec("llama", heads=2), spec("llama", heads=8)),
    "fewer heads": (spec("llama", heads=8), spec("llama", heads=2)),
    "head size": (spec("llama", head_dim=4), spec("llama", head_dim=12)),
    "MHA to GQA": (spec("llama"), spec("llama", kv_heads=2)),
    "GQA to MHA": (spec("llama", kv_heads=2), spec("llama")),
    "GQA to MQA, more heads": (spec("llama", kv_heads=2), spec("qwen2", heads=8, kv_heads=1)),
    "GQA to GQA of other group": (spec("qwen2", heads=8, kv_heads=4), spec("qwen2", heads=4, kv_heads=2)),
    "vocabulary and intermediate": (spec("llama", hidden=24), spec("llama", vocab=120, hidden=32, intermediate=80)),
    "MLP narrower than hidden": (spec("llama", intermediate=20), spec("llama", hidden=24, intermediate=16)),
    "every factor": (
        spec("llama", hidden=24, heads=2, intermediate=40),
        spec("llama", vocab=128, hidden=48, heads=6, kv_heads=2, intermediate=64),
    ),
    "neox to larger neox": (spec("gpt_neox", heads=2), spec("gpt_neox", hidden=48, heads=6, intermediate=72)),
    "bloom to larger bloom": (spec("bloom", hidden=24), spec("bloom", hidden=40, heads=5)),
    "neox to bloom": (spec("gpt_neox"), spec("bloom", hidden=40)),
    "fused to unfused GQA": (spec("gpt_neox"), spec("llama", hidden=40, heads=4, kv_heads=2)),
    "unfused GQA to fused": (spec("qwen2", heads=4, kv_heads=2), spec("bloom", hidden=40)),
    "llama to qwen2": (spec("llama"), spec("qwen2", hidden=40, heads=4, kv_heads=2)),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_every_target_equals_the_dense_formulas(
    pair: tuple[Spec, Spec], base: Callable[..., Path], lora: Callable[..., Path]
) -> None:
    (f_o, n_o), (f_n, n_n) = pair
    old, new = base(f_o, **n_o), base(f_n, seed=1, **n_n)
    adapter = lora(old)
    layers = {0: 1, 1: 0, 2: 2}
    heads = some_heads(layers, oracle.read(old).H, oracle.read(new).H)
    # q, k and v of an unfused old model have an A each: fusing them takes three times the rank
    rank = 9 if f_o in ("llama", "qwen2") and f_n in ("gpt_neox", "bloom") else 3
    result = run(adapter, old, new, layers, heads, rank)
    check(result.updates, expected_updates(adapter, old, new, layers, heads))
    assert result.retained == pytest.approx(dict.fromkeys(result.updates, 1.0))
    gates = [d for d in result.dropped if "no gate projection" in d["why"]]
    assert len(gates) == len(result.dropped) == (3 if rank == 9 else 0)
    assert all(update.rank == rank for update in result.updates.values())


@pytest.mark.parametrize(("deep_o", "deep_n"), [(2, 4), (4, 2)])
def test_depth_both_ways(deep_o: int, deep_n: int, base: Callable[..., Path], lora: Callable[..., Path]) -> None:
    old, new = base("llama", layers=deep_o, hidden=24), base("llama", layers=deep_n, seed=1)
    layers = {0: 1, 1: 3} if deep_o < deep_n else {0: 0, 2: 1}
    heads = some_heads(layers, 4, 4)
    result = run(lora(old), old, new, layers, heads)
    check(result.updates, expected_updates(lora(old), old, new, layers, heads))
    assert {path.split(".")[2] for path in result.updates} == {str(n) for n in layers.values()}
    gone = {d["module"] for d in result.dropped}
    assert gone == {p for p in Adapter.open(lora(old)).modules if int(p.split(".")[2]) not in layers}
    assert not result.dropped or "no partner" in result.dropped[0]["why"]


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "v_proj"], ["k_proj"], ["o_proj", "down_proj"], ["gate_proj"], ["up_proj", "q_proj"]],
    ids=" ".join,
)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_subsets_of_targets(
    family: str, targets: list[str], base: Callable[..., Path], lora: Callable[..., Path]
) -> None:
    """Into a fused module too: its other roles get no update at all."""
    old, new = base("llama", kv_heads=2, hidden=24), base(family, seed=1)
    adapter, layers = lora(old, targets=targets), {0: 0, 1: 1, 2: 2}
    heads = some_heads(layers, 4, 4)
    if family == "gpt_neox" and targets == ["gate_proj"]:
        with pytest.raises(AdapterError, match="no gate projection"):
            run(adapter, old, new, layers, heads)
        return
    result = run(adapter, old, new, layers, heads, rank=6)
    check(result.updates, expected_updates(adapter, old, new, layers, heads))
    if family == "gpt_neox" and targets == ["q_proj", "v_proj"]:
        for update in result.updates.values():
            dense = update.dense().reshape(4, 3, 8, 32)
            assert not dense[:, 1].abs().max() > 1e-12 and dense[:, 0].abs().max() > 1e-3


@pytest.mark.parametrize(("source", "target"), [("bloom", "llama"), ("gpt_neox", "gpt_neox")])
def test_fused_targets_alone(source: str, target: str, base: Callable[..., Path], lora: Callable[..., Path]) -> None:
    old, new = base(source), base(target, seed=1, hidden=40)
    adapter, layers = lora(old, targets=["query_key_value"]), {0: 0, 1: 1, 2: 2}
    heads = some_heads(layers, 4, 4)
    result = run(adapter, old, new, layers, heads, rank=3)
    check(result.updates, expected_updates(adapter, old, new, layers, heads))
    assert len(result.updates) == (9 if target == "llama" else 3)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_rank_cut_is_the_dense_truncated_svd(
    rank: int, base: Callable[..., Path], lora: Callable[..., Path]
) -> None:
    old, new = base("qwen2", kv_heads=2), base("bloom", seed=1, hidden=40)
    adapter, layers = lora(old), {0: 0, 1: 1, 2: 2}
    heads = some_heads(layers, 4, 4)
    result = run(adapter, old, new, layers, heads, rank=rank)
    whole = expected_updates(adapter, old, new, layers, heads)
    check(result.updates, {path: oracle.cut(dense, rank) for path, dense in whole.items()}, 1e-5)
    for path, dense in whole.items():
        kept = float((oracle.cut(dense, rank) ** 2).sum() / (dense**2).sum())
        assert result.retained[path] == pytest.approx(kept, abs=1e-6)
        if "query_key_value" in path:
            assert kept < 0.99  # so the cut was a real one


def test_patterns_of_rank_and_alpha_are_in_the_moved_update(
    base: Callable[..., Path], lora: Callable[..., Path]
) -> None:
    old, new = base("llama"), base("llama", seed=1, hidden=40)
    adapter = lora(
        old, rslora=True, rank_pattern={"q_proj": 2, r"layers\.1\..*down_proj": 5}, alpha_pattern={"v_proj": 1}
    )
    layers = {0: 0, 1: 1, 2: 2}
    heads = some_heads(layers, 4, 4)
    check(
        run(adapter, old, new, layers, heads, rank=5).updates,
        expected_updates(adapter, old, new, layers, heads),
    )


def test_heads_without_a_partner_count_as_zero_in_the_group_mean(
    base: Callable[..., Path], lora: Callable[..., Path]
) -> None:
    old, new = base("llama", heads=2), base("llama", seed=1, heads=8, kv_heads=2)
    adapter = lora(old, targets=["k_proj"])
    heads = {0: {0: 1, 1: 2}, 1: {0: 0, 1: 1}, 2: {0: 0, 1: 7}}
    result = run(adapter, old, new, {0: 0, 1: 1, 2: 2}, heads)
    check(result.updates, expected_updates(adapter, old, new, {0: 0, 1: 1, 2: 2}, heads))
    second = [result.updates[f"model.layers.{n}.self_attn.k_proj"].B.reshape(2, 4, -1)[1] for n in (0, 1, 2)]
    assert float(second[0].abs().max()) < 1e-12 and float(second[1].abs().max()) < 1e-12
    assert float(second[2].abs().max()) > 1e-3


def orthonormal_heads(path: Path, target: Path) -> Path:
    """The model with every head's rows of q, k, v (columns of o) made orthonormal."""
    model = models.load(path)
    with torch.no_grad():
        for layer in model.model.layers:
            a = layer.self_attn
            for module in (a.q_proj, a.k_proj, a.v_proj):
                blocks = module.weight.reshape(4, 8, 32)
                module.weight.copy_(torch.linalg.qr(blocks.transpose(1, 2)).Q.transpose(1, 2).reshape(32, 32))
            blocks = a.o_proj.weight.reshape(32, 4, 8).transpose(0, 1)
            a.o_proj.weight.copy_(torch.linalg.qr(blocks).Q.transpose(0, 1).reshape(32, 32))
    model.save_pretrained(target)
    models.build_tokenizer(target, models.words(96))
    return target


ORDER = [2, 0, 3, 1]


def test_what_equation_3_gives_a_twin_with_permuted_heads(
    base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    """Not the permuted adapter: each head's update is multiplied by that head's own Gram matrix, ``P·Pᵀ·ΔP`` and
    ``ΔO·OᵀO``. This is METHOD's known weakness (not the identity on an unchanged model, not scale-preserving)."""
    old = base("llama")
    new = permute(old, tmp_path / "permuted", ORDER, ORDER)
    adapter = lora(old, targets=["q_proj", "k_proj", "v_proj", "o_proj"])
    match = {a: ORDER.index(a) for a in range(4)}
    result = run(adapter, old, new, {0: 0, 1: 1, 2: 2}, dict.fromkeys(range(3), match))
    weights = oracle.read(old).layers
    for path, delta in models.peft_deltas(adapter, old).items():
        layer, role = int(path.split(".")[2]), path[-6]
        moved, weight = result.updates[path].dense(), weights[layer][role]
        if role == "o":
            moved, weight, delta = moved.T, weight.T, delta.T
        for a, b in match.items():
            at_o, at_n = slice(8 * a, 8 * a + 8), slice(8 * b, 8 * b + 8)
            expected = weight[at_o] @ weight[at_o].T @ delta[at_o]
            torch.testing.assert_close(moved[at_n], expected, rtol=1e-5, atol=1e-5)
            assert float((moved[at_n] - delta[at_o]).norm() / delta[at_o].norm()) > 0.3


def test_equation_3_is_exact_where_every_head_is_orthonormal(
    base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    old = orthonormal_heads(base("llama"), tmp_path / "old")
    new = permute(old, tmp_path / "permuted", ORDER, ORDER)
    adapter = models.build_adapter(tmp_path / "adapter", old, targets=["q_proj", "k_proj", "v_proj", "o_proj"])
    match = {a: ORDER.index(a) for a in range(4)}
    result = run(adapter, old, new, {0: 0, 1: 1, 2: 2}, dict.fromkeys(range(3), match))
    for path, delta in models.peft_deltas(adapter, old).items():
        if path.endswith("o_proj"):
            expected = delta.reshape(32, 4, 8)[:, ORDER].reshape(32, 32)
        else:
            expected = delta.reshape(4, 8, 32)[ORDER].reshape(32, 32)
        torch.testing.assert_close(result.updates[path].dense(), expected, rtol=1e-5, atol=1e-5)


def test_what_the_mlp_rules_give_the_same_model(base: Callable[..., Path], lora: Callable[..., Path]) -> None:
    """The part of the update the base weight can reach: ``U·pinv(U)·ΔU`` and ``ΔD·pinv(D)·D``, projections."""
    old = base("llama")
    adapter = lora(old, targets=["up_proj", "down_proj"])
    layers = {0: 0, 1: 1, 2: 2}
    result = run(adapter, old, old, layers, some_heads(layers, 4, 4))
    for path, delta in models.peft_deltas(adapter, old).items():
        weight = oracle.read(old).layers[int(path.split(".")[2])][path.split(".")[-1].removesuffix("_proj")]
        pinv = torch.linalg.pinv(weight)
        expected = weight @ pinv @ delta if path.endswith("up_proj") else delta @ pinv @ weight
        torch.testing.assert_close(result.updates[path].dense(), expected, rtol=1e-5, atol=1e-5)
        assert 0.3 < float(expected.norm() / delta.norm()) < 0.95


def test_it_is_linear_in_the_adapter(base: Callable[..., Path], lora: Callable[..., Path]) -> None:
    old, new = base("llama"), base("llama", seed=1, hidden=40)
    layers = {0: 0, 1: 1, 2: 2}
    heads = some_heads(layers, 4, 4)
    once, thrice = (run(lora(old, alpha=a), old, new, layers, heads).updates for a in (2, 6))
    for path, update in once.items():
        check({path: thrice[path]}, {path: 3 * update.dense()}, 1e-6)


LAYOUTS = [
    (Module(name="x", roles=("q",)), 4, 2),
    (Module(name="x", roles=("q", "k", "v"), layout="interleaved"), 4, 4),
    (Module(name="x", roles=("q", "k", "v"), layout="stacked"), 4, 2),
    (Module(name="x", roles=("gate", "up"), layout="stacked"), 4, 2),
]


@pytest.mark.parametrize(("module", "heads", "kv_heads"), LAYOUTS)
def test_updates_split_and_fuse_in_every_layout(module: Module, heads: int, kv_heads: int) -> None:
    dims = Dimensions(50, 20, 7, 1, heads, kv_heads, 5)
    rows = sum(dims.rows(role) for role in module.roles)
    update = LowRank(torch.randn(rows, 2, dtype=torch.float64), torch.randn(2, 20, dtype=torch.float64))
    parts = split_update(update, module, dims)
    whole = module.split(update.dense(), dims)
    for role in module.roles:
        torch.testing.assert_close(parts[role].dense(), whole[role])
    fused = fuse_updates(parts, module, dims)
    assert fused.rank == 2
    torch.testing.assert_close(fused.dense(), update.dense())
    if module.layout != "plain":
        last = module.roles[-1]
        alone = fuse_updates({last: parts[last]}, module, dims)
        zeros = {role: torch.zeros_like(rows) for role, rows in whole.items()}
        torch.testing.assert_close(alone.dense(), module.fuse({**zeros, last: whole[last]}, dims))


def test_unmapped_layers_start_fresh_or_stay_out(base: Callable[..., Path], lora: Callable[..., Path]) -> None:
    old, new = base("llama", layers=2), base("llama", layers=4, seed=1)
    adapter, layers = lora(old, layers=[1], targets=["q_proj", "down_proj"]), {0: 0, 1: 2}
    heads = some_heads(layers, 4, 4)
    frozen = run(adapter, old, new, layers, heads)
    assert not frozen.fresh and set(frozen.updates) == {
        "model.layers.2.self_attn.q_proj", "model.layers.2.mlp.down_proj",
    }  # fmt: skip
    one, two, other = (run(adapter, old, new, layers, heads, unmapped="train", seed=s) for s in (1, 1, 2))
    assert {p.split(".")[2] for p in one.fresh} == {"1", "3"} and len(one.fresh) == 4
    for path, (B, A) in one.fresh.items():
        assert B.shape == ((32, 3)) and not B.any()
        assert A.shape == (3, 48 if "down" in path else 32) and A.any()
        assert torch.equal(A, two.fresh[path][1]) and not torch.equal(A, other.fresh[path][1])


def test_the_norms_and_progress_are_reported(base: Callable[..., Path], lora: Callable[..., Path]) -> None:
    old, seen = base("llama"), []
    layers = {0: 0, 1: 1, 2: 2}
    result = run(
        lora(old), old, old, layers, some_heads(layers, 4, 4), progress=lambda done, of: seen.append((done, of))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for path, norm in result.norms().items():
        assert norm == pytest.approx(float(result.updates[path].dense().norm()))


def test_copy_is_the_same_update_and_refuses_other_shapes(base: Callable[..., Path], lora: Callable[..., Path]) -> None:
    old, new = base("llama"), base("llama", seed=1)
    layers = {0: 0, 1: 1, 2: 2}
    result = run(lora(old), old, new, layers, some_heads(layers, 4, 4), method="copy")
    check(result.updates, models.peft_deltas(lora(old), old))
    for other in (base("llama", hidden=40), base("llama", heads=8)):
        with pytest.raises(ConfigError):
            run(lora(old), old, other, layers, some_heads(layers, 4, 4), method="copy")


def test_copy_between_families_fuses(base: Callable[..., Path], lora: Callable[..., Path]) -> None:
    old, new = base("llama"), base("gpt_neox", seed=1)
    adapter, layers = lora(old, targets=["q_proj", "v_proj"]), {0: 0, 1: 1, 2: 2}
    result = run(adapter, old, new, layers, some_heads(layers, 4, 4), method="copy", rank=6)
    a, b = oracle.read(old), oracle.read(new)
    deltas = oracle.take_apart(models.peft_deltas(adapter, old), a)
    check(result.updates, oracle.put_together(deltas, b))


def test_what_cannot_be_moved(base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path) -> None:
    old = base("llama")
    layers = {0: 0, 1: 1, 2: 2}
    heads = some_heads(layers, 4, 4)
    with pytest.raises(ConfigError, match=r"Did you mean 'lorasuite'\?"):
        transform("lorasuit")
    assert {"copy", "lorasuite"} <= set(names())
    with pytest.raises(ConfigError, match="sequential fits whole models"):
        run(lora(old), old, old, layers, heads, method="sequential")
    zero = models.build_adapter(tmp_path / "zero", old, std=0.0)
    with pytest.raises(AdapterError, match="nothing of it can be moved"):
        run(zero, old, old, layers, heads)
    with pytest.raises(AdapterError, match="no partner"):
        run(lora(old, layers=[2]), old, old, {0: 0}, heads)
    with pytest.raises(AdapterError, match="trained on another base"):
        run(lora(base("llama", hidden=40)), old, old, layers, heads)


def test_the_identity_stands_for_a_matrix_of_equal_sizes() -> None:
    """With ``W_h = I`` given as a matrix, the same comes out as with the identity that is left out."""
    from lorasuite.transforms import LayerPair, LayerTransform

    g = torch.Generator().manual_seed(0)
    dims = Dimensions(50, 16, 24, 1, 4, 2, 4)
    rand = {r: torch.randn(dims.rows(r), dims.columns(r), generator=g) for r in ("q", "k", "v", "o", "up", "down")}
    other = {r: torch.randn(dims.rows(r), dims.columns(r), generator=g) for r in rand}
    updates = {
        r: LowRank(
            torch.randn(dims.rows(r), 2, generator=g, dtype=torch.float64),
            torch.randn(2, dims.columns(r), generator=g, dtype=torch.float64),
        )
        for r in rand
    }
    factors = {role: gram_factor(rand[role]) for role in ("up", "down")}
    eye = torch.eye(16, dtype=torch.float64)
    chosen = transform("lorasuite")
    assert isinstance(chosen, LayerTransform)
    results = [
        chosen.move(
            LayerPair(rand, other, dims, dims, {0: 2, 1: 1, 3: 0}, W, factors),
            updates,  # type: ignore[arg-type]
        )
        for W in (TransferMatrix(), TransferMatrix(eye, eye))
    ]
    for role, update in results[0].items():
        torch.testing.assert_close(update.dense(), results[1][role].dense(), rtol=1e-5, atol=1e-5)
