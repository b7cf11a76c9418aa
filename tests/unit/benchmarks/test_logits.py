"""The fit of the last block to what the old base + adapter says."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.plugins import Logits
from benchmarks.plugins.logits import _Norm
from lorasuite import zoo
from lorasuite.adapters import Adapter, attached
from lorasuite.bases import LoadedBase
from lorasuite.data import Row
from lorasuite.errors import DataError
from lorasuite.training import validation_loss
from lorasuite.transforms import FittedUpdates
from tests import models
from tests.unit.transforms.test_sequential import side, with_updates


@pytest.mark.parametrize("centre", [False, True])
def test_the_final_norm_is_found_from_what_it_does(centre: bool) -> None:
    g = torch.Generator().manual_seed(0)
    states = torch.randn(200, 12, generator=g, dtype=torch.float64) * 3 + 2
    gain, bias = 1 + torch.rand(12, generator=g, dtype=torch.float64), torch.randn(12, generator=g, dtype=torch.float64)

    def norm(x: torch.Tensor) -> torch.Tensor:
        if centre:
            return torch.nn.functional.layer_norm(x, (12,), gain, bias, eps=0)
        return gain * x / x.square().mean(1, keepdim=True).sqrt()

    found = _Norm.of(states, norm(states))
    assert found.centre == centre
    torch.testing.assert_close(found.gain, gain)
    # a small change that leaves the size (and the mean) alone is undone
    change = 1e-4 * torch.randn(200, 12, generator=g, dtype=torch.float64)
    change -= change.mean(1, keepdim=True)
    direction = states - states.mean(1, keepdim=True) if centre else states
    change -= direction * (change * direction).sum(1, keepdim=True) / direction.square().sum(1, keepdim=True)
    torch.testing.assert_close(found.undo(norm(states + change) - norm(states), states), change, atol=1e-7, rtol=1e-2)


def fit(old: LoadedBase, new: LoadedBase, adapter: Path, rank: int, texts: list[str]) -> FittedUpdates:
    roles = Adapter.open(adapter).roles(old.architecture)
    context = partial(attached, old.model, adapter)
    return Logits().fit(old, new, context, roles, states=None, texts=texts, rank=rank)


def test_moves_what_answers_look_like_without_labels_or_gradients() -> None:
    """On the zoo: the loss on held-out rows falls by more than half, and the new base is given back as it was."""
    pair = zoo.pair("llama")
    old, new = side(pair.old), side(pair.new)
    before = {name: value.clone() for name, value in new.model.state_dict().items()}
    rows = [row["prompt"] + row["completion"] for row in zoo.rows("llama", "blend", "train", 96)]
    fitted = fit(old, new, pair.adapter("blend"), 8, rows)
    assert all(torch.equal(value, before[name]) for name, value in new.model.state_dict().items())
    last = f"model.layers.{new.dims.layers - 1}"
    assert list(fitted.updates) == [f"{last}.self_attn.o_proj", f"{last}.mlp.down_proj"]
    assert all(update.rank == 8 and 0 < fitted.residual[path] < 1 for path, update in fitted.updates.items())
    held_out = [Row(kind="completion", **row) for row in zoo.rows("llama", "blend", "test", 60)]
    bare = validation_loss(new.model, new.tokenizer, held_out, 256, 32)
    with with_updates(new.model, fitted):
        assert validation_loss(new.model, new.tokenizer, held_out, 256, 32) < bare / 2


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "bloom", "gpt2", "gemma3_text"])
def test_other_architectures(family: str, tmp_path: Path) -> None:
    old = side(models.build(tmp_path / "old", "llama", seed=1))
    new = side(models.build(tmp_path / "new", family, seed=2, hidden=48, heads=6))
    adapter = models.build_adapter(tmp_path / "a", tmp_path / "old")
    sentences = [" ".join(f"w{(n * 7 + k * k) % 90}" for k in range(8)) for n in range(12)]
    fitted = fit(old, new, adapter, 3, sentences)
    assert len(fitted.updates) == 2
    for path, update in fitted.updates.items():
        layer, module = new.architecture.locate(path) or (0, None)
        assert layer == new.dims.layers - 1 and module is not None
        assert update.shape == (new.dims.rows(module.roles[0]), new.dims.columns(module.roles[0])) and update.norm() > 0


def test_texts_that_do_not_pair(tmp_path: Path) -> None:
    old = side(models.build(tmp_path / "old", "llama", seed=1))
    adapter = models.build_adapter(tmp_path / "a", tmp_path / "old")
    with pytest.raises(DataError, match="no position"):
        fit(old, old, adapter, 3, [""])
