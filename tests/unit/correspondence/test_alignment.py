"""Activation-aligned transforms: paired positions, streamed sums, and the invariants they promise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasuite import zoo
from lorasuite.adapters import Adapter, split_update
from lorasuite.bases import ROLES, ActivationRecorder, Checkpoint, LoadedBase, paired_positions, text_batches
from lorasuite.correspondence import (
    FUNCTIONAL,
    ORTHOGONAL,
    AlignedMaps,
    End,
    MapKind,
    Moments,
    TransferMatrix,
    align,
    polar,
    ridge,
    space_name,
)
from lorasuite.errors import ConfigError, DataError
from lorasuite.transforms import AlignedTransform, Input, Migrated, migrate, transform
from tests import models

ALIGNED = ("procrustes", "functional")


def texts(count: int, length: int = 24) -> list[str]:
    g = torch.Generator().manual_seed(5)
    return [" ".join(f"w{int(n)}" for n in torch.randint(0, 90, (length,), generator=g)) for _ in range(count)]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.lists(st.integers(1, 4), min_size=1, max_size=12))
def test_paired_positions_have_read_the_same_text(old: list[int], new: list[int]) -> None:
    def offsets(widths: list[int]) -> list[tuple[int, int]]:
        ends = torch.tensor(widths).cumsum(0).tolist()
        return [(0, 0), *zip([0, *ends[:-1]], ends, strict=True)]  # a special token first

    a, b = offsets(old), offsets(new)
    pairs = paired_positions(a, b)
    assert all(a[i][1] == b[j][1] and i > 0 and j > 0 for i, j in pairs)
    assert {a[i][1] for i, _ in pairs} == {e for _, e in a[1:]} & {e for _, e in b[1:]}


def test_moments_are_the_covariances_of_all_rows() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 3, generator=g) + 2, torch.randn(40, 5, generator=g)
    moments = Moments.empty(3, 5)
    for rows in torch.arange(40).split(7):
        moments.add(x[rows], y[rows])
    full = torch.cov(torch.cat([x, y], 1).T.double(), correction=0)
    torch.testing.assert_close(moments.centred() / 40, full[:3, 3:])
    torch.testing.assert_close(moments.xx, x.double().T @ x.double())
    torch.testing.assert_close(moments.yy, y.double().T @ y.double())
    # what the best scaled orthogonal map leaves
    a, b = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    fitted = a @ moments.orthogonal
    fitted *= (fitted * b).sum() / fitted.square().sum()
    assert moments.unexplained() == pytest.approx(float((b - fitted).square().sum() / b.square().sum()))
    fewer = Moments.empty(3, 5, ())
    fewer.add(x, y)
    assert torch.equal(fewer.xy, Moments.empty(3, 5).xy + x.T.double() @ y.double()) and not fewer.xx.numel()


def test_polar_drops_what_does_not_correlate() -> None:
    cross = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    assert torch.allclose(polar(cross), torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)))


def loaded(path: Path) -> LoadedBase:
    return LoadedBase.of(models.load(path), models.tokenizer_of(path), Checkpoint(path))


class Held(dict[str, torch.Tensor]):
    """Tensors in memory, as an artifact."""

    info: dict[str, Any]

    def tensor(self, name: str) -> torch.Tensor:
        return self[name]


def maps_of(method: str, old: Path, new: Path, layers: dict[int, int], read: Sequence[str], **sizes: int) -> Held:
    """What a transform reads of a pair of bases."""
    a, b = Checkpoint(old), Checkpoint(new)
    shared = [role for role in ROLES if role in a.architecture.roles and role in b.architecture.roles]
    chosen = transform(method)
    declared = chosen.maps if isinstance(chosen, AlignedTransform) else {}  # copy and the controls read none
    kinds: dict[End, list[MapKind]] = {end: [kind] for end, kind in declared.items()}
    tensors, info = align(loaded(old), loaded(new), layers, shared, read, kinds, **sizes)
    held = Held(tensors)
    held.info = info
    return held


def move(method: str, adapter: Path, old: Path, new: Path, read: Sequence[str], **sizes: int) -> Migrated:
    """The adapter through an activation-aligned transform, layer by layer."""
    a, b = Checkpoint(old), Checkpoint(new)
    layers = {n: n for n in range(a.dims.layers)}
    found = maps_of(method, old, new, layers, read, **sizes)
    opened = Adapter.open(adapter)
    return migrate(
        opened,
        a,
        b,
        method=method,
        layers=layers,
        heads={n: {} for n in layers},
        transfer=TransferMatrix(),
        mlp_factor=lambda *_: torch.empty(0),
        alignment=AlignedMaps([found]),
        rank=opened.rank,
    )


def twin(old: Path, path: Path, seed: int = 3) -> Path:
    """The same function in other coordinates: hidden space rotated, heads and MLP units permuted."""
    import shutil

    shutil.copytree(old, path)
    model = models.load(old)
    d, i, heads = model.config.hidden_size, model.config.intermediate_size, model.config.num_attention_heads
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0]
    rows = torch.arange(d).reshape(heads, -1)[torch.randperm(heads, generator=g)].reshape(-1)
    units = torch.randperm(i, generator=g)
    with torch.no_grad():

        def put(weight: torch.nn.Parameter, value: torch.Tensor) -> None:
            weight.copy_(value.float())

        put(model.model.embed_tokens.weight, model.model.embed_tokens.weight.double() @ q)
        if not model.config.tie_word_embeddings:
            put(model.lm_head.weight, model.lm_head.weight.double() @ q)
        for layer in model.model.layers:
            a, m = layer.self_attn, layer.mlp
            for linear in (a.q_proj, a.k_proj, a.v_proj):
                put(linear.weight, (linear.weight.double() @ q)[rows])
            put(a.o_proj.weight, (q.T @ a.o_proj.weight.double())[:, rows])
            for linear in (m.gate_proj, m.up_proj):
                put(linear.weight, (linear.weight.double() @ q)[units])
            put(m.down_proj.weight, (q.T @ m.down_proj.weight.double())[:, units])
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose norm gains are 1, so that a rotation of the hidden space is the same function."""
    path = models.build(tmp_path_factory.mktemp("twin") / "old", "llama", intermediate=40)
    model = models.load(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
    model.save_pretrained(path)
    return path


def logits(base: Path, moved: Migrated | None, adapter: Path | None = None) -> torch.Tensor:
    """Of a base with an adapter's or a migration's updates merged in."""
    model = models.load(base)
    opened = Adapter.open(adapter) if adapter else None
    updates = moved.updates if moved else {m: opened.update(m) for m in opened.modules} if opened else {}
    with torch.no_grad():
        for path, update in updates.items():
            model.get_submodule(path).weight += update.dense().float()
        ids = torch.arange(4, 60).reshape(4, -1)
        result: torch.Tensor = model(ids).logits
    return result


@pytest.mark.parametrize("method", ["copy", "procrustes", "functional"])
def test_same_base_gives_the_same_adapter(method: str, old: Path, tmp_path: Path) -> None:
    adapter = models.build_adapter(tmp_path / "a", old)
    moved = move(method, adapter, old, old, texts(16))
    opened = Adapter.open(adapter)
    for path in opened.modules:
        want, got = opened.update(path).dense(), moved.updates[path].dense()
        assert (got - want).norm() <= 1e-3 * want.norm()


@pytest.mark.parametrize("method", ["procrustes", "functional"])
def test_a_twin_in_other_coordinates_is_recovered(method: str, old: Path, tmp_path: Path) -> None:
    new = twin(old, tmp_path / "twin")
    assert torch.allclose(logits(old, None), logits(new, None), atol=1e-3)
    adapter = models.build_adapter(tmp_path / "a", old, std=0.1)
    want = logits(old, None, adapter)
    assert (want - logits(old, None)).abs().max() > 0.5  # the adapter matters
    got = logits(new, move(method, adapter, old, new, texts(16)))
    error = (got - want).abs().max() / (want - logits(old, None)).abs().max()
    assert error < 1e-3


@pytest.mark.parametrize("method", ALIGNED)
@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "bloom"])
def test_other_architectures_and_shapes(method: str, family: str, old: Path, tmp_path: Path) -> None:
    """A module needs only its role's counterpart: no head map, no equal sizes."""
    new = models.build(tmp_path / "new", family, seed=4, hidden=48, heads=6)
    adapter = models.build_adapter(tmp_path / "a", old)
    moved = move(method, adapter, old, new, texts(16))
    dims = Checkpoint(new).dims
    for update in moved.updates.values():
        assert update.norm() > 0 and update.rank == 3
        assert update.shape[1] in (dims.hidden_size, dims.intermediate_size)
    assert {d["why"] for d in moved.dropped} <= {"the new base has no gate projection"}


def test_texts_of_which_nothing_pairs_are_an_error_that_names_them(old: Path) -> None:
    base = loaded(old)
    assert len(text_batches([*texts(2), ""], base, base, 256)) == 1  # one of them is left out
    for read, subject in ((["", ""], "calibration"), ([], "texts")):
        with pytest.raises(DataError, match=f"{subject}.*pairs") as refused:
            text_batches(read, base, base, 256, subject=subject)
        assert refused.value.problems[0].where == subject


def reference(method: str, adapter: Path, old: Path, new: Path, layers: dict[int, int], read: Sequence[str]) -> Any:
    """Each moved ΔW by layer and role, dense, by the formulas of docs/method.md in float64 on all rows."""
    sides = loaded(old), loaded(new)
    batches = text_batches(read, *sides, 256)
    rows: list[dict[Any, torch.Tensor]] = []
    for base, ids, at in (
        (sides[0], [b.old for b in batches], [b.old_rows for b in batches]),
        (sides[1], [b.new for b in batches], [b.new_rows for b in batches]),
    ):
        recorder = ActivationRecorder(base)
        for layer in range(base.dims.layers):
            for module in base.architecture.modules:
                recorder.module(layer, module, by_role=True)
        with recorder:
            seen = [recorder.read(one, where) for one, where in zip(ids, at, strict=True)]
        rows.append({place: torch.cat([part[place] for part in seen]) for place in seen[0]})
    opened, checkpoint = Adapter.open(adapter), Checkpoint(old)
    moved = {}
    for o, modules in opened.by_layer(checkpoint).items():
        for path, module in modules.items():
            for role, update in split_update(opened.update(path), module, checkpoint.dims).items():
                if o not in layers or (layers[o], role, "in") not in rows[1]:
                    continue
                x, y = rows[0][o, role, "in"], rows[1][layers[o], role, "in"]
                to = ("down", "in") if role in ("gate", "up") else (role, "out")
                u, v = rows[0][(o, *to)], rows[1][(layers[o], *to)]
                written = polar((u - u.mean(0)).T @ (v - v.mean(0)))
                inward = polar((x - x.mean(0)).T @ (y - y.mean(0)))
                if method == "functional":
                    size = 1e-3 * (y.T @ y).diagonal().mean()
                    square = y.T @ y + size * torch.eye(y.shape[1], dtype=y.dtype)
                    inward = torch.linalg.solve(square, (x.T @ y + size * inward).T).T
                moved[layers[o], role] = written.T @ update.dense() @ inward
    return moved


@pytest.mark.parametrize("positions", [None, 10**6])
@pytest.mark.parametrize("method", ALIGNED)
def test_the_maps_move_an_adapter_as_the_formulas_do(method: str, positions: int | None) -> None:
    """On the zoo, with an adapter of all projections: half precision costs a thousandth at most,
    and of sampled positions nothing where all are sampled."""
    pair = zoo.pair("llama")
    layers = {0: 0, 1: 2, 2: 3, 3: 5}
    read = zoo.texts("llama", 24 if positions else 64)
    adapter = Adapter.open(pair.adapter("orbit"))
    maps = AlignedMaps([maps_of(method, pair.old, pair.new, layers, read, positions=positions or 512)])
    moved = migrate(
        adapter,
        Checkpoint(pair.old),
        Checkpoint(pair.new),
        method=method,
        layers=layers,
        heads={n: {} for n in layers},
        transfer=TransferMatrix(),
        mlp_factor=lambda *_: torch.empty(0),
        alignment=maps,
        rank=adapter.rank,
    )
    wanted = reference(method, pair.adapter("orbit"), pair.old, pair.new, layers, read)
    assert len(wanted) == 7 * len(layers)
    for (layer, role), delta in wanted.items():
        path = Checkpoint(pair.new).architecture.path(layer, Checkpoint(pair.new).architecture.module(role))
        error = (moved.updates[path].dense() - delta).norm() / delta.norm()
        assert error < 1e-3, (layer, role, float(error))


def test_wide_spaces_are_kept_by_their_factors(old: Path) -> None:
    """By whichever takes less room; few positions give maps of their rows alone, which are exact there."""
    held = maps_of("functional", old, old, {0: 0, 1: 1}, texts(16), positions=6)
    assert held.info["rows"] > 6 and held["0.down.in.left"].shape == (40, 6)
    assert held["0.down.in.functional"].shape == (6, 6) and held["0.down.in.functional"].dtype == torch.half
    assert set(held.info["residual"]["0"]) == {
        "q out", "k out", "v out", "o out", "down in", "down out"
    }  # fmt: skip
    maps = AlignedMaps([held])
    found = maps(0, "down", "in", transform("functional").maps["in"])  # type: ignore[union-attr]
    left = held["0.down.in.left"].double()
    inside = left @ torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    back = found.rows(inside.T).T
    assert (back - inside).norm() < 2e-3 * inside.norm()
    assert maps(0, "up", "out", ORTHOGONAL).left is not None
    assert space_name("gate", "out", ["gate", "down"]) == "down.in"
    with pytest.raises(ConfigError, match="declare"):
        maps(0, "q", "in", ORTHOGONAL)


def test_float32_sums_are_enough() -> None:
    """Of rows as uneven as a real model's: some columns a thousand times as large as others, and far from zero."""
    g = torch.Generator().manual_seed(0)
    spread = torch.logspace(-2, 1, 48)
    common = torch.randn(3000, 48, generator=g)
    x = (common @ torch.randn(48, 48, generator=g)) * spread + 3 * spread
    y = (common @ torch.randn(48, 48, generator=g)) * spread.flip(0) - spread
    found = []
    for dtype in (torch.float32, torch.float64):
        sums = Moments.empty(48, 48, dtype=dtype)
        for part in torch.arange(3000).split(100):
            sums.add(x[part], y[part])
        found.append((sums.double().orthogonal, FUNCTIONAL.compute(sums.double())))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < 2e-4 * other.norm()


def test_ridge_near_a_prior_is_the_penalised_optimum() -> None:
    """And with no row to fit, it is the prior."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(30, n, generator=g, dtype=torch.float64) for n in (6, 4))
    prior = torch.randn(6, 4, generator=g, dtype=torch.float64)
    found = ridge(x.T @ x, x.T @ y, 0.5, prior)
    penalty = 0.5 * float((x.T @ x).diagonal().mean())
    gradient = x.T @ (x @ found - y) + penalty * (found - prior)
    assert gradient.abs().max() < 1e-9
    nothing = torch.zeros(6, 6, dtype=torch.float64)
    torch.testing.assert_close(ridge(nothing, nothing[:, :4], 0.5, prior), prior)


def test_every_aligned_method_says_so() -> None:
    assert all(Input.ALIGNMENT in transform(name).inputs and transform(name).reads_texts for name in ALIGNED)
    for name in ("lorasuite", "copy"):
        assert Input.ALIGNMENT not in transform(name).inputs and not transform(name).reads_texts
