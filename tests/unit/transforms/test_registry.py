"""Transforms by name: of this package, and of others by their entry point."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lorasuite.adapters import Adapter
from lorasuite.bases import Checkpoint, LoadedBase
from lorasuite.correspondence import TransferMatrix
from lorasuite.errors import ConfigError
from lorasuite.transforms import Input, LayerTransform, ModelTransform, _registry, migrate, names, register, transform
from tests import models

LAYER = '''
class Doubled:
    """A layer transform that derives from nothing: what it declares makes it one."""

    name = "doubled"
    inputs = frozenset({"layer_mapping"})
    starts_finetune, reads_texts, control, keeps_places = True, False, False, True

    def problems(self, old, new, updated):
        return []

    def weights(self, updated):
        return ()

    def move(self, pair, updates):
        return {role: update.scaled(2.0) for role, update in updates.items()}
'''
MODEL = '''
import torch

from lorasuite.adapters import LowRank
from lorasuite.transforms import FittedUpdates, ModelTransform


class Ones(ModelTransform):
    """Ones in the last block's output projection."""

    name = "ones"
    inputs = frozenset()

    def fit(self, old, new, adapted, roles, *, states, texts, rank, cutoff=256, progress=None):
        path = new.architecture.path(new.dims.layers - 1, new.architecture.module("o"))
        B, A = (torch.ones(shape, dtype=torch.float64) for shape in ((new.dims.hidden_size, rank), (rank, 32)))
        return FittedUpdates({path: LowRank(B, A)}, {path: 1.0})
'''
Install = Callable[[str, str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """``install(package, code, class)``: a package of one module, with its class in the entry-point group."""
    names()  # this package's own, which are imported once in a process
    monkeypatch.setattr(_registry, "_REGISTRY", dict(_registry._REGISTRY))
    monkeypatch.syspath_prepend(str(tmp_path))
    made = []

    def install(package: str, code: str, cls: str) -> None:
        module = package.replace("-", "_")
        made.append(module)
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[lorasuite.transforms]\nit = {module}:{cls}\n")
        importlib.invalidate_caches()
        _registry._load.cache_clear()

    yield install
    _registry._load.cache_clear()
    for module in made:
        sys.modules.pop(module, None)


def test_a_layer_transform_of_another_package(
    install: Install, base: Callable[..., Path], lora: Callable[..., Path]
) -> None:
    install("some-movers", LAYER, "Doubled")
    assert "doubled" in names() and isinstance(transform("doubled"), LayerTransform)
    assert Input.LAYER_MAPPING in transform("doubled").inputs
    path = base("llama")
    adapter, checkpoint = Adapter.open(lora(path)), Checkpoint(path)
    moved = migrate(
        adapter, checkpoint, checkpoint, method="doubled", layers={0: 0, 1: 1, 2: 2}, heads={0: {}, 1: {}, 2: {}},
        transfer=TransferMatrix(), mlp_factor=lambda *_: torch.zeros(0, 0, dtype=torch.float64), rank=adapter.rank,
    )  # fmt: skip
    for module in adapter.modules:
        torch.testing.assert_close(moved.updates[module].dense(), 2 * adapter.update(module).dense())


def test_a_model_transform_of_another_package(install: Install, base: Callable[..., Path]) -> None:
    install("some-fits", MODEL, "Ones")
    chosen = transform("ones")
    assert isinstance(chosen, ModelTransform) and not isinstance(chosen, LayerTransform)
    assert chosen.starts_finetune and not chosen.control and not chosen.reads_texts
    path = base("llama")
    loaded = LoadedBase.of(models.load(path), models.tokenizer_of(path), Checkpoint(path))
    fitted = chosen.fit(loaded, loaded, contextlib.nullcontext, ("o",), states=None, texts=["w1 w2"], rank=2)
    assert list(fitted.updates) == ["model.layers.2.self_attn.o_proj"]
    assert fitted.updates["model.layers.2.self_attn.o_proj"].shape == (32, 32)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise RuntimeError('no such library')", "no such library"),
        ("", "has no attribute"),
        ("class Broken:\n    name = 'broken'", "neither a layer transform nor a model transform"),
        (LAYER.replace("Doubled", "Broken").replace('"doubled"', '"copy"'), "is called 'copy'"),
    ],
)
def test_a_broken_package_is_named(code: str, why: str, install: Install) -> None:
    install("broken-movers", code, "Broken")
    for ask in (names, lambda: transform("copy")):
        with pytest.raises(ConfigError, match="package broken-movers") as caught:
            ask()
        assert why in str(caught.value)


def test_a_transform_registered_by_hand(install: Install) -> None:
    class Third(transform("copy").__class__):  # type: ignore[misc]
        name = "third"
        control = True

    register(Third)
    register(Third)  # harmless
    assert "third" not in names() and "third" in names(controls=True) and transform("third").control


def test_what_this_package_offers(install: Install) -> None:
    assert names() == names(controls=True) == ["copy", "functional", "lorasuite", "procrustes", "sequential"]
    with pytest.raises(ConfigError, match=r"Did you mean 'procrustes'\?"):
        transform("procrutes")
