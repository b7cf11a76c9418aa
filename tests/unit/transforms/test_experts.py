"""Updates of experts moved to the experts that are routed the same tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasuite.adapters import Adapter, attached, check_loads, open_adapters, write_adapter, write_ready
from lorasuite.bases import Checkpoint
from lorasuite.correspondence import FUNCTIONAL, ORTHOGONAL, ExpertMaps, TransferMatrix, align_experts, match_experts
from lorasuite.planning import inspect
from lorasuite.transforms import Migrated, migrate
from tests import models
from tests.experts import experts_one_by_one
from tests.unit.transforms.test_hybrid import Kept, loaded

Base = Callable[..., Path]
KINDS = {"in": [FUNCTIONAL, ORTHOGONAL], "out": [ORTHOGONAL]}
LAYERS = {0: 0, 1: 1}
MOE: dict[str, Any] = {
    "layers": 2, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [],
}  # fmt: skip
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
TEXTS = [" ".join(f"w{(17 * n * n + 7 * k * (n + 1)) % 90}" for k in range(16)) for n in range(30)]
METHODS = ("copy", "lorasuite", "procrustes", "functional")
ORDER = {0: [2, 0, 3, 1], 1: [1, 3, 2, 0]}
IDS = torch.tensor([[5, 9, 33, 71, 8, 40]])


def permuted(base: Path, target: Path) -> Path:
    """The same model, whose expert ``e`` of layer ``n`` has the number ``ORDER[n][e]``."""
    shutil.copytree(base, target)
    file, moved = target / "model.safetensors", {}
    for name, value in load_file(file).items():
        parts = name.split(".")
        if "experts" in parts:
            at = parts.index("experts") + 1
            parts[at] = str(ORDER[int(parts[2])][int(parts[at])])
        elif name.endswith((".mlp.gate.weight", ".block_sparse_moe.gate.weight")):
            value = value[torch.tensor(ORDER[int(parts[2])]).argsort()].contiguous()
        moved[".".join(parts)] = value
    save_file(moved, file, metadata={"format": "pt"})
    return target


def maps_of(old: Path, new: Path) -> ExpertMaps:
    found, info = align_experts(loaded(old), loaded(new), LAYERS, TEXTS, KINDS)
    return ExpertMaps.read(Kept(dict(found), info))


def moved(adapter: Path, old: Path, new: Path, method: str, maps: ExpertMaps | None, **settings: Any) -> Migrated:
    return migrate(
        Adapter.open(adapter), Checkpoint(old), Checkpoint(new), method=method, layers=LAYERS, heads={},
        transfer=TransferMatrix(), mlp_factor=lambda *_: torch.eye(32), experts=maps, **{"rank": 3, **settings},
    )  # fmt: skip


def logits(base: Path, adapter: Path) -> torch.Tensor:
    with torch.no_grad(), attached(models.load(base), adapter) as tuned:
        found: torch.Tensor = tuned(IDS).logits
    return found


def written(result: Migrated, base: Path, output: Path) -> Path:
    new = Checkpoint(base)
    write_adapter(
        output, result.updates, architecture=new.architecture, dims=new.dims, base=str(base), rank=result.rank,
        alpha=result.rank, experts=new.expert_count,
    )  # fmt: skip
    check_loads(output, base)
    return output


def test_experts_are_matched_by_the_tokens_they_are_routed() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(50, 5, generator=generator) * (torch.rand(50, 5, generator=generator) > 0.5)
    order = torch.tensor([3, 0, 4, 1, 2])
    matched, overlap = match_experts(weights, weights[:, order] * 2)
    assert matched == {int(o): n for n, o in enumerate(order)} and overlap.shape == (5, 5)
    weights[:, 2] = 0  # no text is routed to it: it has no partner
    assert set(match_experts(weights, weights)[0]) == {0, 1, 3, 4}
    assert len(match_experts(weights, weights[:, :2])[0]) == 2


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "qwen3_5_moe"])
def test_a_twin_with_its_experts_in_another_order_gets_the_same_adapter(
    family: str, base: Base, lora: Base, tmp_path: Path
) -> None:
    old = base(family, **{**MOE, "hidden": 32, "intermediate": 20})
    new = permuted(old, tmp_path / "twin")
    adapter = lora(old, targets=[], target_parameters=EXPERTS)
    maps = maps_of(old, new)
    assert maps.matched(0) == dict(enumerate(ORDER[0])) and maps.matched(1) == dict(enumerate(ORDER[1]))
    wanted = logits(old, adapter)
    assert (wanted - models.load(old)(IDS).logits).abs().max() > 0.5
    for method in METHODS:
        result = moved(adapter, old, new, method, maps)
        assert result.dropped == [] and len(result.updates) == 16 and len(result.norms()) == 4
        output = written(result, new, tmp_path / method)
        torch.testing.assert_close(logits(new, output), wanted, rtol=0, atol=2e-2 if method == "functional" else 5e-3)
        if method == "copy":
            torch.testing.assert_close(logits(new, output), wanted, rtol=1e-4, atol=1e-4)


def test_experts_of_trainers_for_transformers_4_keep_all_of_gate_and_up(base: Base, tmp_path: Path) -> None:
    """Gate and up have inputs of their own each: their part of the fused parameter has twice the rank."""
    old = base("mixtral", **{**MOE, "intermediate": 20})
    adapter = experts_one_by_one(old, tmp_path / "adapter")
    new = permuted(old, tmp_path / "twin")
    result = moved(adapter, old, new, "copy", maps_of(old, new), rank=2)
    assert {update.rank for update in result.updates.values()} == {2, 4} and set(result.retained.values()) == {1.0}
    output = written(result, new, tmp_path / "new")
    config = json.loads((output / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) == {4} and config["target_modules"] == []
    again = Adapter.open(output)
    for path, update in result.updates.items():
        torch.testing.assert_close(again.update(path).dense(), update.dense(), rtol=1e-5, atol=1e-6)


def test_experts_of_another_number_and_width(base: Base, lora: Base, tmp_path: Path) -> None:
    """The two of six that have no partner are left out, with a count; the others are mapped to the new width."""
    old = base("qwen3_moe", **{**MOE, "num_experts": 6, "num_local_experts": 6})
    new = base("olmoe", seed=1, **{**MOE, "intermediate": 20, "hidden": 40})
    adapter, maps = lora(old, targets=[], target_parameters=EXPERTS), maps_of(old, new)
    for method in ("procrustes", "functional"):
        result = moved(adapter, old, new, method, maps)
        assert len(result.updates) == 16 and all(update.norm() > 0 for update in result.updates.values())
        assert [row["why"] for row in result.dropped] == ["no expert of the new layer is routed the same tokens"] * 2
        assert all(": 4 updates of 2 experts (" in row["module"] for row in result.dropped)
        assert logits(new, written(result, new, tmp_path / method)).isfinite().all()
    fewer = maps_of(new, old)
    assert len(set(fewer.matched(0).values())) == 4  # two new experts have none, and are left as they are


@pytest.mark.parametrize(
    ("family", "method", "why"),
    [
        ("llama", "copy", "the new base has no experts there"),
        ("olmoe", "copy", "copy: gate is (8, 32) in the old base, (48, 32) in the new one"),
        ("qwen3_moe", "copy", "experts are matched by the calibration texts that they are routed, and there are none"),
    ],
)
def test_experts_without_a_place_are_dropped_with_a_count_and_what_to_do(
    family: str, method: str, why: str, base: Base, lora: Base
) -> None:
    numbers = {**MOE, "head_dim": 8} if family == "qwen3_moe" else {"layers": 2}
    old, new = base("qwen3_moe", **{**MOE, "head_dim": 8}), base(family, seed=1, **numbers)
    maps = maps_of(old, new) if family == "olmoe" else None
    result = moved(lora(old, targets=["o_proj"], target_parameters=EXPERTS), old, new, method, maps)
    assert len(result.updates) == 2
    assert [row["why"].partition(": rows that")[0] for row in result.dropped] == [why] * 2
    assert all(
        "8 updates of 4 experts" in row["module"] and "--teacher-samples" in row["why"] for row in result.dropped
    )


def test_mlps_of_a_dense_base_start_fresh_in_the_place_of_experts(base: Base, lora: Base) -> None:
    old, new = base("qwen3_moe", **{**MOE, "head_dim": 8}), base("llama", seed=1, layers=2)
    adapter = lora(old, targets=["o_proj"], target_parameters=EXPERTS)
    result = moved(adapter, old, new, "copy", None, unmapped="train")
    assert len(result.fresh) == 6 and all(".mlp." in path for path in result.fresh)
    assert not moved(adapter, old, new, "copy", None).fresh


def test_sums_of_adapters_of_experts(base: Base, lora: Base, tmp_path: Path) -> None:
    """One by one and stacked together, weighted."""
    old = base("olmoe", **{**MOE, "intermediate": 20})
    stacked = lora(old, targets=["q_proj"], target_parameters=EXPERTS)
    single = experts_one_by_one(old, tmp_path / "single", router=True)
    checkpoint = Checkpoint(old)
    one, other = Adapter.open(stacked), Adapter.open(single)
    stem = "model.layers.1.mlp.experts.2"
    halves = torch.cat([other.update(f"{stem}.{name}_proj").dense() for name in ("gate", "up")])
    wanted = {"gate_up_proj": halves, "down_proj": other.update(f"{stem}.down_proj").dense()}
    both = open_adapters(f"{stacked}:0.5,{single}:2")
    assert both.check(checkpoint) == []
    ready = write_ready(both, checkpoint, tmp_path / "sum", str(old))
    check_loads(ready, old)
    for name, second in wanted.items():
        found = Adapter.open(ready).update(f"{stem}.{name}").dense()
        torch.testing.assert_close(found, 0.5 * one.update(f"{stem}.{name}").dense() + 2 * second, rtol=1e-4, atol=1e-5)


def test_dora_of_experts_which_the_old_base_runs_without_is_not_said_to_move(base: Base, tmp_path: Path) -> None:
    old = base("qwen3_moe", **{**MOE, "head_dim": 8})
    adapter = experts_one_by_one(old, tmp_path / "adapter")
    state = load_file(adapter / "adapter_model.safetensors")
    ups = {
        name.replace("lora_B.weight", "lora_magnitude_vector"): len(up) for name, up in state.items() if "_B." in name
    }
    save_file(state | {name: torch.ones(rows) for name, rows in ups.items()}, adapter / "adapter_model.safetensors")
    models.edit_json(adapter / "adapter_config.json", use_dora=True)
    found = inspect(str(old), str(old), str(adapter))
    assert found.modules == [] and any("cannot with DoRA" in notice for notice in found.notices)
    assert "--teacher-samples" in found.problems[0].remedy and "none of its modules" in found.problems[0].what
