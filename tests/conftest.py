"""Shared by every test: a quiet, offline environment, small fixtures and the ``gpu`` marker."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile

os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Threads cost tiny models more than they give, and on a busy machine far more. Processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
# where transformers copies the code of fixtures that bring their own: not into the user's cache
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="lorasuite-test-code-")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import install_import_hook

#: Shapes and types of these modules' signatures are checked at every call that a test makes.
CHECKED = ["lorasuite.adapters._lowrank", "lorasuite.correspondence", "lorasuite.transforms"]
install_import_hook(CHECKED, "beartype.beartype")

from tests import models  # noqa: E402 - the hook comes before what it checks

atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What the libraries made when they were imported is not looked through again: a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transforms of ``benchmarks.plugins``, for one test."""
    from benchmarks.plugins import register_plugins
    from lorasuite.transforms import _registry

    _registry._load()
    monkeypatch.setattr(_registry, "_REGISTRY", dict(_registry._REGISTRY))
    register_plugins()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``base("llama", hidden=32, …)``: the directory of a tiny random model, built once a session. Read-only."""
    root = tmp_path_factory.mktemp("bases")
    built: dict[str, Path] = {}

    def make(family: str, **numbers: Any) -> Path:
        key = repr((family, sorted(numbers.items())))
        if key not in built:
            built[key] = models.build(root / f"{len(built)}-{family}", family, **numbers)
        return built[key]

    return make


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``lora(base_dir, targets=…, …)``: the directory of a random PEFT adapter, built once a session. Read-only."""
    root = tmp_path_factory.mktemp("adapters")
    built: dict[str, Path] = {}

    def make(model: Path, **settings: Any) -> Path:
        key = repr((str(model), sorted(settings.items())))
        if key not in built:
            built[key] = models.build_adapter(root / str(len(built)), model, **settings)
        return built[key]

    return make
