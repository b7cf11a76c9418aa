"""Adapters of experts through the flows: moved to another mixture, and by the teacher's rows where nothing moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flows.evaluate_adapters import evaluate_adapters
from flows.migrate_adapter import migrate_adapter
from lorasuite.adapters import Adapter
from lorasuite.bases import Checkpoint
from lorasuite.errors import PreflightError
from tests import models
from tests.experts import experts_one_by_one

pytestmark = pytest.mark.usefixtures("home")

MOE: dict[str, Any] = {"layers": 1, "num_experts": 4, "num_experts_per_tok": 2, "intermediate": 12}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings: a mixture with an adapter of its experts alone, another mixture, and prompts."""
    root = tmp_path_factory.mktemp("mixture")
    old = models.build(root / "old", "olmoe", seed=1, **MOE)
    models.build(root / "new", "olmoe", seed=2, **{**MOE, "hidden": 24, "num_experts": 3})
    models.build(root / "dense", "llama", seed=2, layers=1)
    ending(old)
    experts_one_by_one(old, root / "adapter")
    texts = [" ".join(f"w{(n * 7 + k * k) % 90}" for k in range(9)) for n in range(24)]
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    settings = {"adapter": root / "adapter", "old_base": old, "new_base": root / "new", "root": root}
    settings |= {"calibration": root / "texts.jsonl", "prompts": root / "prompts.jsonl"}
    return {name: str(value) for name, value in settings.items()} | {"controls": False}


def ending(base: Path) -> None:
    """Have a random model end its answers after a few words."""
    file = base / "model.safetensors"
    state = load_file(file)
    state["lm_head.weight"][3] = state["lm_head.weight"][10:20].sum(0) / 2
    save_file(state, file, metadata={"format": "pt"})


def run(given: dict[str, Any], output: Path, **changes: Any) -> dict[str, Any]:
    settings = {name: value for name, value in given.items() if name != "root"}
    return migrate_adapter({**settings, "output": str(output), **changes})


def test_experts_are_moved_to_the_experts_of_another_mixture(mixture: dict[str, Any], tmp_path: Path) -> None:
    record = run(mixture, tmp_path / "out", method="procrustes")
    assert set(record["updates"]) == {f"model.layers.0.mlp.experts.{name}_proj" for name in ("gate_up", "down")}
    assert [row["why"] for row in record["dropped"]] == ["no expert of the new layer is routed the same tokens"]
    assert "expert_maps" in {row["stage"] for row in record["timings"]}
    new = Checkpoint(mixture["new_base"])
    assert Adapter.open(tmp_path / "out").check(new) == []
    with torch.no_grad():
        changed = models.load_tuned(tmp_path / "out", new.path)(torch.tensor([[5, 9, 33]])).logits
        assert (changed - models.load(new.path)(torch.tensor([[5, 9, 33]])).logits).abs().max() > 1e-3


def test_an_adapter_under_other_names_is_evaluated_as_it_was_trained(mixture: dict[str, Any], tmp_path: Path) -> None:
    """Experts that trainers for transformers 4 saved one by one: PEFT finds none of them by their names."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"w{n} w7", "completion": f" w{n + 1}"}) + "\n" for n in range(6)))
    record = evaluate_adapters(
        mixture["old_base"], [mixture["adapter"]], str(rows), settings={"generate": False}, device="cpu"
    )
    losses = [record["results"][arm]["loss"] for arm in ("base", "adapter")]
    assert abs(losses[0] - losses[1]) > 0.01
    assert any("a copy is measured" in notice for notice in record["notices"])


def test_what_a_dense_base_has_no_place_for_goes_by_the_teachers_rows(mixture: dict[str, Any], tmp_path: Path) -> None:
    dense = {"new_base": str(Path(mixture["root"]) / "dense")}
    with pytest.raises(PreflightError, match=r"none of its modules has a counterpart.*--teacher-samples"):
        run(mixture, tmp_path / "no", **dense, method="copy")
    record = run(
        mixture, tmp_path / "out", **dense, method="auto", teacher_samples=16, learning_rates=[1e-3],
        finetune={"epochs": 1, "batch_size": 8}, teacher={"max_new_tokens": 24, "temperature": 0.8},
    )  # fmt: skip
    assert record["method"] == "none" and record["finetune"]["start"] == "fresh" and record["teacher"]["rows"]
    assert record["teacher"]["samples"] and record["finetune"]["samples"] == record["teacher"]["rows"]
    assert any("a fresh LoRA of the new base is trained on the rows instead" in notice for notice in record["notices"])
    assert "8 updates of 4 experts" in record["dropped"][0]["module"]
    modules = {path.rpartition(".")[2] for path in Adapter.open(tmp_path / "out").modules}
    assert modules == set(models.LLAMA_TARGETS)
