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
#: Runs commands until one fails.
COMMANDS = """
import json, sys
from flows.command_line import main
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""


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


def test_migrate_with_transforms_of_another_package(
    environment: dict[str, str], prefect_server: str, small: Small, tmp_path: Path
) -> None:
    modules = {"halved": 3, "constant": 1}
    records = migrate(list(modules), environment | {"PREFECT_API_URL": prefect_server}, small, tmp_path)
    for (method, count), record in zip(modules.items(), records, strict=True):
        assert record["method"] == method and len(record["updates"]) == count
        assert all(norm > 0 for norm in record["updates"].values())
        assert (tmp_path / method / "adapter_model.safetensors").is_file()


def migrate(methods: list[str], environment: dict[str, str], small: Small, tmp_path: Path) -> list[dict[str, Any]]:
    """The records of migrations by the command line, one after the other in a process of their own."""
    arguments = [
        "migrate", "--json", "--adapter", str(small.root / "adapters" / "one"), "--old-base", str(small.old),
        "--new-base", str(small.new), "--calibration", str(small.root / "texts.jsonl"),
        "--train-data", str(small.root / "train.jsonl"), "--finetune-max-steps", "1",
    ]  # fmt: skip
    asked = [[*arguments, "--method", method, "--output", str(tmp_path / method)] for method in methods]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(asked)],
        capture_output=True,
        text=True,
        env=environment | {"LORASUITE_HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
