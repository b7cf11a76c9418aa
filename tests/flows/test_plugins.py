"""Transforms of another package: one module each and an entry point, and `lorasuite migrate` runs them by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.flows.small import Small

MODULE = '''
from lorasuite.adapters import LowRank
from lorasuite.transforms import LAYER_INPUTS, FittedUpdates, Input, LayerTransform, ModelTransform
import torch


class Halved(LayerTransform):
    """Half of what the paper's transform gives for attention's outputs; nothing else moves."""

    name = "halved"
    inputs = LAYER_INPUTS

    def weights(self, updated):
        return ()

    def move(self, pair, updates):
        update = updates["o"]
        width = pair.new_dims.columns("o")
        A = torch.zeros(update.rank, width, dtype=torch.float64)
        A[:, : min(width, update.A.shape[1])] = update.A[:, :width]
        return {"o": LowRank(0.5 * pair.transfer.adjoint(update.B), A)}


class Constant(ModelTransform):
    """One direction added to the first block's output projection, whatever the adapter does."""

    name = "constant"
    inputs = frozenset()

    def fit(self, old, new, adapted, roles, *, states, texts, rank, cutoff=256, progress=None):
        assert texts and states is None and "o" in roles
        path = new.architecture.path(0, new.architecture.module("o"))
        width = new.dims.hidden_size
        update = LowRank(torch.ones(width, rank, dtype=torch.float64), torch.ones(rank, width, dtype=torch.float64))
        return FittedUpdates({path: update}, {path: 1.0})
'''
ENTRIES = "[lorasuite.transforms]\nhalved = movers:Halved\nconstant = movers:Constant\n"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where Python finds the package ``movers``, as if it were installed."""
    site = tmp_path_factory.mktemp("site")
    (site / "movers.py").write_text(MODULE)
    info = site / "movers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: movers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    root = Path(__file__).parents[2]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(site), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.parametrize(("method", "modules"), [("halved", 3), ("constant", 1)])
def test_migrate_with_a_transform_of_another_package(
    method: str, modules: int, environment: dict[str, str], prefect_server: str, small: Small, tmp_path: Path
) -> None:
    record = migrate(method, environment | {"PREFECT_API_URL": prefect_server}, small, tmp_path)
    assert record["method"] == method and len(record["updates"]) == modules
    assert all(norm > 0 for norm in record["updates"].values())
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def migrate(method: str, environment: dict[str, str], small: Small, tmp_path: Path) -> dict[str, Any]:
    """The record of a migration by the command line, in a process of its own."""
    arguments = [
        "migrate", "--json", "--adapter", str(small.root / "adapters" / "one"), "--old-base", str(small.old),
        "--new-base", str(small.new), "--output", str(tmp_path / "out"), "--method", method,
        "--calibration", str(small.root / "texts.jsonl"), "--train-data", str(small.root / "train.jsonl"),
        "--finetune-max-steps", "1",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "from flows.command_line import main; main()", *arguments],
        capture_output=True,
        text=True,
        env=environment | {"LORASUITE_HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
