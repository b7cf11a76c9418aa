"""What inspect says of an adapter that is not where, or of what, it is said to be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasuite.errors import DataError, Problem, grouped
from lorasuite.planning import MigrationConfig, inspect, survey
from tests import kinds


def test_an_adapter_of_another_base_is_named(
    base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    old = base("llama")
    adapter = Path(shutil.copytree(lora(old), tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())

    def notices(named: str) -> list[str]:
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
        return [notice for notice in inspect(str(old), str(old), str(adapter)).notices if "trained on" in notice]

    assert notices(str(old)) == notices(f"org/{old.name}") == notices("") == []
    (notice,) = notices("org/another")
    assert "org/another" in notice and str(old) in notice


@pytest.mark.parametrize("folder", ["sql_v2", "checkpoint-10"])
def test_an_adapter_in_a_subfolder_is_pointed_to(
    folder: str, base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    old = base("llama")
    shutil.copytree(lora(old), tmp_path / "run" / folder)
    (problem,) = inspect(str(old), str(old), str(tmp_path / "run")).problems
    assert problem.what == "is missing" and f"There is one in {folder}/" in problem.remedy


def test_problems_of_one_kind_are_one_with_a_count() -> None:
    modules = [f"model.layers.{layer}.mlp.{name}" for layer in range(48) for name in ("gate", "up", "down")]
    refused = [Problem("a.safetensors", f"{module} is not a linear module", "Train without it.") for module in modules]
    lines = [Problem(f"rows.jsonl, line {number}", "has no 'output'", "Add it.") for number in (3, 8)]
    other = Problem("rows.jsonl, line 4", "has no 'input'", "Add it.")
    first, second, third = grouped([*refused, *lines, other])
    examples = "model.layers.0.mlp.up, model.layers.0.mlp.down"
    assert first.what == f"{modules[0]} is not a linear module (and 143 more of this kind: {examples}, ...)"
    assert second == Problem("rows.jsonl, line 3", "has no 'output' (and 1 more of this kind: line 8)", "Add it.")
    assert third == other
    message = str(DataError([*refused, *lines, other]))
    assert message.startswith("147 problems found:") and len(message.splitlines()) == 4


def test_what_has_no_partner_is_said_only_where_updates_go_from_layer_to_layer(
    base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    """Layers, roles of some layers, biases and factors that are not stored concern no fresh LoRA and no whole fit."""
    old, equal = Path(base("llama")), base("llama", layers=2, seed=1)
    hybrid, other = base("lfm2", seed=1), base("llama", layers=2, hidden=48, seed=1)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"prompt": f"w{n}", "completion": " w1"}) + "\n" for n in range(12)))

    def notices(new: Path, adapter: Path, **given: Any) -> list[str]:
        settings = MigrationConfig(
            old_base=str(old), new_base=str(new), adapter=str(adapter), output=str(tmp_path / "out"),
            calibration=str(texts), **given,
        )  # fmt: skip
        return survey(settings, tmp_path, timed=False).notices

    dropped, some = "1 of 3 old layers have no partner and are dropped", "layers of the new base"
    adapter, rows = lora(old), {"train_data": str(texts)}
    assert dropped in notices(equal, adapter, **rows)  # copy is tried where shapes agree
    assert dropped not in notices(equal, adapter, **rows, candidates=("none",))
    assert dropped not in notices(other, adapter, **rows)  # where it does not fit, nothing is
    assert dropped in notices(other, adapter, teacher_samples=0)  # without rows to train on all are
    assert dropped in notices(other, adapter, **rows, candidates=("procrustes",))
    assert dropped in notices(other, adapter, method="lorasuite")
    assert dropped not in notices(other, adapter, method="sequential", **rows)  # fits every layer of the new base
    assert dropped in [*inspect(str(old), str(other), str(adapter)).notices]
    attention = lora(old, targets=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert any(some in notice for notice in notices(hybrid, attention, method="lorasuite"))
    assert not any(some in notice for notice in notices(hybrid, attention, **rows, candidates=("none",)))
    decomposed = kinds.build(kinds.MIGRATED["LoHa"], tmp_path / "loha", old)
    for candidates, said in ((("copy",), True), (("none",), False)):
        found = notices(equal, decomposed, **rows, candidates=candidates)
        assert any("ΔW is computed" in notice for notice in found) == said
