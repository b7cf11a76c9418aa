"""``benchmarks/gpu_check.sh``: it runs whole on miniature shapes, and without a GPU says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.sh"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    shell = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, env=shell, timeout=400)


@pytest.mark.slow
def test_every_stage_on_miniature_shapes(prefect_server: str, tmp_path: Path) -> None:
    done = run("--cpu-tiny", "--json", str(tmp_path / "rows.json"), PREFECT_API_URL=prefect_server)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    first = [row["stage"].partition(" ")[0] for row in rows if row["run"] == "first adapter"]
    second = [row["stage"].partition(" ")[0] for row in rows if row["run"] == "second adapter"]
    pair = {"vocabulary", "transfer_matrices", "mlp_factors", "activations", "similarity", "head_mapping"}
    own = {"transform", "select", "finetune", "evaluate", "serving"}
    assert pair | own | {"alignment", "teacher"} <= set(first)
    assert own <= set(second) and not pair & set(second)
    assert all(row["seconds"] >= 0 for row in rows)
    assert "finetune" in done.stdout and "s in all" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_nothing_is_measured() -> None:
    done = run()
    assert done.returncode == 0 and "no GPU here" in done.stdout
