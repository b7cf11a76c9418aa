"""The sequential fit: its regression against a dense solution, and what it does on the zoo and across families."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from lorasuite import zoo
from lorasuite.adapters import Adapter, attached
from lorasuite.bases import Checkpoint, LoadedBase, load_model, load_tokenizer, text_batches
from lorasuite.correspondence import (
    FIT_RIDGE,
    StateMap,
    learn_state_map,
    reduced_rank,
    reduced_rank_of_rows,
    state_map_tensors,
)
from lorasuite.correspondence import _state_map as state_map
from lorasuite.data import Row
from lorasuite.errors import DataError
from lorasuite.training import validation_loss
from lorasuite.transforms import FittedUpdates, ModelTransform, transform
from tests import models


def side(base: Path) -> LoadedBase:
    return LoadedBase.of(load_model(base, "cpu"), load_tokenizer(base), Checkpoint(base))


def fit(old: LoadedBase, new: LoadedBase, adapter: Path, rank: int, **texts: Any) -> FittedUpdates:
    roles = Adapter.open(adapter).roles(old.architecture)
    states = StateMap.learned(old, new, roles, texts.pop("calibration"))
    chosen = transform("sequential")
    assert isinstance(chosen, ModelTransform)
    return chosen.fit(old, new, partial(attached, old.model, adapter), roles, states=states, rank=rank, **texts)


@contextmanager
def with_updates(model: Any, fitted: FittedUpdates) -> Iterator[Any]:
    kept = {path: model.get_submodule(path).weight.detach().clone() for path in fitted.updates}
    with torch.no_grad():
        for path, update in fitted.updates.items():
            model.get_submodule(path).weight += update.dense().float()
        yield model
        for path, weight in kept.items():
            model.get_submodule(path).weight.copy_(weight)


@pytest.mark.parametrize("rank", [2, 5])
def test_regression_is_the_penalised_optimum(rank: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, r = (torch.randn(40, n, generator=g, dtype=torch.float64) for n in (7, 5))
    update, left = reduced_rank(x.T @ x, x.T @ r, (r * r).sum(), rank=rank)
    penalty = FIT_RIDGE * float((x.T @ x).diagonal().mean())

    def loss(w: torch.Tensor) -> float:
        return float(((x @ w.T - r) ** 2).sum() + penalty * (w**2).sum())

    found = update.dense()
    assert torch.linalg.matrix_rank(found) == rank
    assert left == pytest.approx(float(((x @ found.T - r) ** 2).sum() / (r * r).sum()))
    if rank == 5:
        dense = torch.linalg.solve(x.T @ x + penalty * torch.eye(7, dtype=x.dtype), x.T @ r).T
        assert torch.allclose(found, dense, atol=1e-9)
    for _ in range(50):  # no neighbour of the same rank does better
        near = (update.B + 1e-3 * torch.randn(update.B.shape, generator=g, dtype=x.dtype)) @ update.A
        assert loss(near) > loss(found)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(6, 40, 9), (12, 13, 30), (3, 2100, 5)])
def test_a_fit_of_few_rows_is_that_of_their_sums(rows: int, inputs: int, outputs: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, r = (torch.randn(rows, n, generator=g, dtype=torch.float64) for n in (inputs, outputs))
    for rank in (1, 2, outputs):
        update, left = reduced_rank_of_rows(x, r, rank=rank)
        same, expected = reduced_rank(x.T @ x, x.T @ r, (r * r).sum(), rank=rank)
        assert torch.allclose(update.dense(), same.dense(), atol=1e-8) and left == pytest.approx(expected, abs=1e-8)
        assert update.B.norm() == pytest.approx(float(same.B.norm()))
    assert float(reduced_rank_of_rows(x, torch.zeros_like(r), rank=2)[1]) == 0.0


def test_moves_a_task_without_labels_or_gradients() -> None:
    """On the zoo: the loss on held-out rows falls by more than half, and the new base is given back as it was."""
    pair = zoo.pair("llama")
    old, new = side(pair.old), side(pair.new)
    before = {name: value.clone() for name, value in new.model.state_dict().items()}
    rows = [row["prompt"] + row["completion"] for row in zoo.rows("llama", "mirror", "train", 96)]
    fitted = fit(old, new, pair.adapter("mirror"), 8, calibration=zoo.texts("llama", 192), texts=rows)
    assert all(torch.equal(value, before[name]) for name, value in new.model.state_dict().items())
    assert set(fitted.updates) == {path for path in fitted.updates if path.split(".")[-1][0] in "qkvo"}
    assert len(fitted.updates) == 4 * new.dims.layers and max(u.rank for u in fitted.updates.values()) == 8
    held_out = [Row(kind="completion", **row) for row in zoo.rows("llama", "mirror", "test", 60)]
    bare = validation_loss(new.model, new.tokenizer, held_out, 256, 32)
    with with_updates(new.model, fitted):
        moved = validation_loss(new.model, new.tokenizer, held_out, 256, 32)
    assert moved < bare / 2


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "bloom", "gpt2", "gemma3_text"])
def test_other_architectures(family: str, tmp_path: Path) -> None:
    """Other blocks, fused and transposed modules, norms behind projections: the updates fit and are not zero."""
    old = side(models.build(tmp_path / "old", "llama", seed=1))
    new = side(models.build(tmp_path / "new", family, seed=2, hidden=48, heads=6))
    adapter = models.build_adapter(tmp_path / "a", tmp_path / "old")
    sentences = [" ".join(f"w{(n * 7 + k * k) % 90}" for k in range(8)) for n in range(24)]
    fitted = fit(old, new, adapter, 3, calibration=sentences, texts=sentences[:12])
    for path, update in fitted.updates.items():
        module = (new.architecture.locate(path) or (0, None))[1]
        assert module is not None
        dims = new.dims
        rows = sum(dims.rows(role) for role in module.roles)
        assert update.shape == (rows, dims.columns(module.roles[0])) and update.norm() > 0
        assert 0 <= fitted.residual[path] <= 1


def test_texts_that_do_not_pair(tmp_path: Path) -> None:
    old = side(models.build(tmp_path / "old", "llama", seed=1))
    adapter = models.build_adapter(tmp_path / "a", tmp_path / "old")
    for texts in ({"calibration": [""], "texts": ["w1 w2"]}, {"calibration": ["w1 w2"], "texts": [""]}):
        with pytest.raises(DataError, match="no position"):
            fit(old, old, adapter, 3, **texts)


def test_a_map_is_read_as_it_was_learned(tmp_path: Path) -> None:
    """Of more roles than an adapter has, and with features wide enough to be projected: the same states everywhere."""
    old, new = (side(models.build(tmp_path / name, family, seed=2)) for name, family in (("o", "llama"), ("n", "phi3")))
    sentences = [" ".join(f"w{(n * 7 + k * k) % 90}" for k in range(8)) for n in range(24)]
    with patch.object(state_map, "FEATURES", 64):
        learned = StateMap.learned(old, new, ("q", "v", "up"), sentences)
        info: dict[str, Any] = {}
        kept = dict(state_map_tensors(*learn_state_map(old, new, ("q", "v", "up"), sentences), info))
        found = StateMap.read(old, kept.__getitem__, json.loads(json.dumps(info)))
        batches = text_batches(sentences[:4], old, new, 256)
        states = [of.features.states(batches) for of in (learned, found)]
    assert states[0][0].shape[1] <= 64 and all(map(torch.equal, *states))
    for number in range(new.dims.layers):
        one, other = learned.layer(number), found.layer(number)
        assert one.maps.keys() == other.maps.keys() and len(one.maps) == 4 and one.additive == other.additive
        for key, known in one.maps.items():
            assert torch.equal(known(states[0][0]), other.maps[key](states[1][0])) and 0 <= known.error <= 1


def test_on_the_same_base_a_state_is_itself() -> None:
    base = side(zoo.pair("llama").old)
    states = StateMap.learned(base, base, ("q",), zoo.texts("llama", 192))
    errors = [m.error for n in range(base.dims.layers) for m in states.layer(n).maps.values()]
    assert max(errors) < 0.15 and sorted(errors)[len(errors) // 2] < 0.03  # what the ridge takes
