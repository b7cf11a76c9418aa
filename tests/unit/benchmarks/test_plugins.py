"""Transforms of the benchmarks: the controls' promises, and that nothing proposes what is not offered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorasuite.adapters import Adapter
from lorasuite.bases import ActivationRecorder, Checkpoint, text_batches
from lorasuite.correspondence import Moments
from lorasuite.planning import MigrationConfig, build
from lorasuite.transforms import names, transform
from tests import models
from tests.unit.correspondence.test_alignment import loaded, move, texts
from tests.unit.transforms.test_transform_lorasuite import run

SETTINGS = {"adapter": "a", "old_base": "o", "new_base": "n", "output": "x", "calibration": "c"}

pytestmark = pytest.mark.usefixtures("plugins")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build(tmp_path_factory.mktemp("bases") / "old", "llama", intermediate=40)


def test_controls_are_only_there_if_asked_for() -> None:
    controls = set(names(controls=True)) - set(names())
    assert controls == {"random", "target-mean"} and all(transform(name).control for name in controls)
    assert not transform("logits").starts_finetune and transform("functional-ridge").starts_finetune
    for name in controls:
        assert build(MigrationConfig, {**SETTINGS, "method": name}).method == name


def test_random_keeps_rank_and_norm_and_nothing_else(old: Path, tmp_path: Path) -> None:
    new = models.build(tmp_path / "new", "gpt_neox", seed=4, hidden=48, heads=6)
    adapter = models.build_adapter(tmp_path / "a", old)
    moved = move("random", adapter, old, new, texts(8))
    opened = Adapter.open(adapter)
    attention = ("q", "k", "v")
    for layer in range(Checkpoint(old).dims.layers):
        modules = opened.by_layer(Checkpoint(old))[layer]
        size = sum(opened.update(p).norm() ** 2 for p, m in modules.items() if m.roles[0] in attention) ** 0.5
        got = next(u for p, u in moved.updates.items() if f".{layer}." in p and "query_key_value" in p)
        # three roles with an A of their own each are cut to the adapter's rank when they are fused
        assert got.rank == opened.rank and 0.5 * size < got.norm() <= size * (1 + 1e-6)
    again, other = (
        move("random", path, old, new, texts(8))
        for path in (adapter, models.build_adapter(tmp_path / "b", old, seed=9))
    )
    for path, update in moved.updates.items():
        assert torch.equal(update.dense(), again.updates[path].dense())
        assert not torch.allclose(update.dense(), other.updates[path].dense())
    same = move("random", adapter, old, old, texts(8))
    for path in opened.modules:
        want, drawn = opened.update(path), same.updates[path]
        assert drawn.norm() == pytest.approx(want.norm(), rel=1e-6)
        assert abs(drawn.inner(want)) < 0.5 * want.norm() ** 2


def test_target_mean_shifts_outputs_by_the_mean_change_only(old: Path, tmp_path: Path) -> None:
    """On the same base, its mean effect is the adapter's own projected on what one direction can say."""
    adapter = models.build_adapter(tmp_path / "a", old)
    opened = Adapter.open(adapter)
    read = texts(16)
    base = loaded(old)
    moments = Moments.empty(base.dims.columns("o"), base.dims.columns("o"))
    with ActivationRecorder(base).module(0, base.architecture.module("o"), by_role=True) as recorder:
        for batch in text_batches(read, base, base, 256):
            rows = recorder.read(batch.old, batch.old_rows)[0, "o", "in"]
            moments.add(rows, rows)
    moved = move("target-mean", adapter, old, old, read)
    path = next(p for p in opened.modules if ".0." in p and p.endswith("o_proj"))
    update, want = moved.updates[path].dense(), opened.update(path).dense()
    assert torch.linalg.matrix_rank(update) == 1
    mean = moments.x / moments.rows
    change, shift = want @ mean, update @ mean
    cosine = change @ shift / (change.norm() * shift.norm())
    assert float(cosine) == pytest.approx(1, abs=1e-6)

    # no other multiple of it is nearer to the constant shift
    def error(factor: float) -> float:
        written = factor * update
        spread = float((written @ moments.yy @ written.T).trace())
        return spread - 2 * float(change @ (written @ moments.y)) + moments.rows * float(change @ change)

    assert error(1.0) < min(error(0.9), error(1.1))


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "bloom"])
def test_ridge_outputs_in_other_architectures_and_shapes(family: str, old: Path, tmp_path: Path) -> None:
    new = models.build(tmp_path / "new", family, seed=4, hidden=48, heads=6)
    moved = move("functional-ridge", models.build_adapter(tmp_path / "a", old), old, new, texts(16))
    dims = Checkpoint(new).dims
    for update in moved.updates.values():
        assert update.norm() > 0 and update.rank == 3
        assert update.shape[1] in (dims.hidden_size, dims.intermediate_size)


def test_equation_3_in_the_old_size_keeps_its_direction(old: Path, tmp_path: Path) -> None:
    new, adapter = models.build(tmp_path / "new", "llama", seed=4, hidden=48, heads=6), tmp_path / "a"
    a, b = Checkpoint(old), Checkpoint(new)
    opened = Adapter.open(models.build_adapter(adapter, old))
    layers = {n: n for n in range(a.dims.layers)}
    heads = {n: {h: h for h in range(a.dims.heads)} for n in layers}
    plain = run(adapter, old, new, layers, heads)
    scaled = run(adapter, old, new, layers, heads, method="lorasuite-relative")
    assert set(scaled.updates) == set(plain.updates)
    for layer in layers:
        for module, before in zip(b.modules(layer), a.modules(layer), strict=True):
            path, old_path = b.architecture.path(layer, module), a.architecture.path(layer, before)
            if path not in scaled.updates:
                continue
            update = scaled.updates[path]
            ratio = opened.update(old_path).norm() / float(a.weight(layer, before).norm())
            assert update.norm() / float(b.weight(layer, module).norm()) == pytest.approx(ratio, rel=1e-4)
            assert update.inner(plain.updates[path]) == pytest.approx(update.norm() * plain.updates[path].norm())
