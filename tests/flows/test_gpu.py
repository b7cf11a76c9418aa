"""A miniature pair on a GPU: what a CPU computes, to rounding, and no memory kept afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flows.migrate_adapter import migrate_adapter
from lorasuite import zoo
from lorasuite.bases import release_models

pytestmark = pytest.mark.gpu

#: What cuBLAS keeps for itself on an H100.
WORKSPACE = 64 << 20


def in_float32(base: Path, target: Path) -> Path:
    """A copy of a base in float32: a GPU computes in the dtype that the configuration names, a CPU in float32."""
    shutil.copytree(base, target)
    config = json.loads((base / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    weights = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def migrated(folder: Path, device: str, **changes: Any) -> dict[str, Any]:
    """Migrate an adapter of the zoo into ``folder/adapter`` and return its record."""
    pair = zoo.pair("llama")
    task = pair.tasks[0]
    folder.mkdir()
    zoo.write_rows(zoo.rows("llama", task, "train", 32), folder / "train.jsonl")
    zoo.write_rows(zoo.rows("llama", task, "test", 24), folder / "test.jsonl")
    zoo.write_rows([{"text": text} for text in zoo.texts("llama", 64)], folder / "texts.jsonl")
    return migrate_adapter(
        {
            "adapter": str(pair.adapter(task)),
            "old_base": str(in_float32(pair.old, folder / "old")),
            "new_base": str(in_float32(pair.new, folder / "new")),
            "output": str(folder / "adapter"),
            "calibration": str(folder / "texts.jsonl"),
            "eval_data": str(folder / "test.jsonl"),
            "device": device,
            **changes,
        }
    )


def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same migration on the CPU and on the GPU, each in a store of its own."""
    found = []
    for device in ("cpu", "cuda"):
        monkeypatch.setenv("LORASUITE_HOME", str(tmp_path / f"home-{device}"))
        found.append(migrated(tmp_path / device, device, **changes))
    return found[0], found[1]


@pytest.mark.parametrize("method", ["lorasuite", "procrustes", "functional"])
def test_a_transform_is_the_cpus(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = both(tmp_path, monkeypatch, method=method)
    ours, theirs = (load_file(tmp_path / device / "adapter/adapter_model.safetensors") for device in ("cuda", "cpu"))
    assert ours.keys() == theirs.keys()
    modules = {name.rsplit(".lora_", 1)[0] for name in theirs}
    for module in modules:
        a, b = (
            tensors[f"{module}.lora_B.weight"].float() @ tensors[f"{module}.lora_A.weight"].float()
            for tensors in (ours, theirs)
        )
        assert (a - b).norm() <= 2e-2 * b.norm(), module  # maps are kept in half precision
    for arm, scores in cpu["evaluation"].items():
        assert gpu["evaluation"][arm]["loss"] == pytest.approx(scores["loss"], rel=1e-2), arm


def test_a_fine_tune_learns_what_the_cpus_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = str(tmp_path / "cpu" / "train.jsonl")
    settings = {"train_data": rows, "finetune_samples": 32, "method": "procrustes", "finetune": {"epochs": 4}}
    cpu, gpu = both(tmp_path, monkeypatch, **settings)
    for arm, scores in cpu["evaluation"].items():
        assert gpu["evaluation"][arm]["loss"] == pytest.approx(scores["loss"], rel=5e-2), arm  # bfloat16 on the GPU
    release_models()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= WORKSPACE + (1 << 20), "what the run held on the GPU"
