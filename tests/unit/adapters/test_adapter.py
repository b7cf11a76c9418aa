"""Adapters read as PEFT reads them and written as PEFT loads them."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from lorasuite.adapters import CONFIG, PREFIX, WEIGHTS, Adapter, LowRank, check_loads, target_modules, write_adapter
from lorasuite.bases import Checkpoint
from lorasuite.errors import AdapterError, CheckpointError
from tests import models

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank 1, alpha not a multiple": {"rank": 1, "alpha": 2.5},
    "rank-stabilised": {"rslora": True, "rank": 4, "alpha": 3},
    "rank pattern": {"rank_pattern": {"q_proj": 2, r"model\.layers\.1\.mlp\.up_proj": 5, "dense": 1}},
    "alpha pattern": {"alpha_pattern": {"v_proj": 1, r".*\.2\..*": 11, "query_key_value": 2}},
    "all patterns, rank-stabilised": {
        "rslora": True,
        "rank_pattern": {r"layers\.0\..*_proj": 2, r"layers\.1\..*": 4},
        "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 9, "down_proj": 1, "dense_4h_to_h": 3},
    },
    "pattern anchored at the start": {"alpha_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 20}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_every_update_is_the_one_of_peft(
    family: str, settings: dict[str, Any], base: Callable[..., Path], lora: Callable[..., Path]
) -> None:
    model = base(family)
    path = lora(model, **settings)
    adapter, theirs = Adapter.open(path), models.peft_deltas(path, model)
    assert adapter.modules == tuple(sorted(theirs)) and adapter.check(Checkpoint(model)) == []
    for module, delta in theirs.items():
        ours = adapter.update(module)
        assert ours.B.dtype == torch.float64
        torch.testing.assert_close(ours.dense(), delta, rtol=1e-5, atol=1e-5)
        assert float(delta.norm()) > 0.1


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_update_is_what_merging_adds(family: str, base: Callable[..., Path], lora: Callable[..., Path]) -> None:
    model = base(family)
    path = lora(model, rslora=True)
    adapter = Adapter.open(path)
    plain = models.load(model)
    before = plain.state_dict()
    after = models.load_tuned(path, model).merge_and_unload().state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{module}.weight" for module in adapter.modules}
    for name in changed:
        difference = (after[name] - before[name]).double()
        module = plain.get_submodule(name.removesuffix(".weight"))
        ours = models.out_in(module, adapter.update(name.removesuffix(".weight")).dense())
        torch.testing.assert_close(ours, difference, rtol=1e-5, atol=1e-5)


def random_updates(paths: Mapping[str, tuple[int, int]], rank: int, seed: int = 0) -> dict[str, LowRank]:
    g = torch.Generator().manual_seed(seed)
    return {
        path: LowRank(
            0.2 * torch.randn(out, rank, generator=g, dtype=torch.float64),
            0.2 * torch.randn(rank, inner, generator=g, dtype=torch.float64),
        )
        for path, (out, inner) in paths.items()
    }


def shapes_of(
    model: Path, layers: list[int] | None = None, leaves: set[str] | None = None
) -> dict[str, tuple[int, int]]:
    checkpoint = Checkpoint(model)
    a, d = checkpoint.architecture, checkpoint.dims
    return {
        a.path(layer, m): (sum(d.rows(r) for r in m.roles), d.columns(m.roles[0]))
        for layer in (range(d.layers) if layers is None else layers)
        for m in a.modules
        if leaves is None or m.name.rsplit(".", 1)[-1] in leaves
    }


def write(output: Path, model: Path, updates: Mapping[str, LowRank], **settings: Any) -> Path:
    checkpoint = Checkpoint(model)
    settings = {"rank": 3, "alpha": 6, **settings}
    return write_adapter(
        output, updates, architecture=checkpoint.architecture, dims=checkpoint.dims, base=str(model), **settings
    )


def check_peft_finds_every_tensor(adapter: Path, model: Path) -> PeftModel:
    """Load twice: by ``from_pretrained`` with warnings as errors, and by the load result of ``load_adapter``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        tuned = PeftModel.from_pretrained(models.load(model), str(adapter))
    result = tuned.load_adapter(str(adapter), "again")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "again" in key]
    stored = load_file(adapter / WEIGHTS)
    live = {
        name.replace(".default", ""): tensor
        for name, tensor in tuned.state_dict().items()
        if "lora_" in name and ".default" in name
    }
    assert set(live) == set(stored)
    assert all(torch.equal(live[name], stored[name]) for name in stored)
    return tuned


WRITTEN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "everything": ("llama", {}, {}),
    "GQA": ("qwen2", {"kv_heads": 2}, {"alpha": 1.5}),
    "fused": ("gpt_neox", {}, {"rank": 2}),
    "bloom, rank-stabilised": ("bloom", {}, {"use_rslora": True, "rank": 4}),
}


@pytest.mark.parametrize("case", WRITTEN.values(), ids=WRITTEN)
def test_written_adapters_load_in_peft_and_merge_to_exactly_the_updates(
    case: tuple[str, dict[str, Any], dict[str, Any]], base: Callable[..., Path], tmp_path: Path
) -> None:
    family, numbers, settings = case
    model = base(family, **numbers)
    updates = random_updates(shapes_of(model), settings.get("rank", 3))
    out = write(tmp_path / "adapter", model, updates, **settings)
    check_loads(out, model)
    tuned = check_peft_finds_every_tensor(out, model)
    plain = models.load(model)
    ids = torch.tensor([[5, 9, 33, 71]])
    with torch.no_grad():
        assert float((tuned(ids).logits - plain(ids).logits).abs().max()) > 1e-2
    merged, before = tuned.merge_and_unload().state_dict(), plain.state_dict()
    for name, weight in before.items():
        update = updates.get(name.removesuffix(".weight"))
        expected = weight.double() if update is None else weight.double() + update.dense()
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=1e-6)
    again = Adapter.open(out)
    assert set(again.modules) == set(updates)
    for module, update in updates.items():
        torch.testing.assert_close(again.update(module).dense(), update.dense(), rtol=1e-5, atol=1e-6)


def test_updates_of_another_rank_are_brought_to_the_one_asked_for(base: Callable[..., Path], tmp_path: Path) -> None:
    model = base("llama")
    shapes = shapes_of(model, leaves={"q_proj"})
    lower = random_updates(shapes, 2)
    adapter = Adapter.open(write(tmp_path / "lower", model, lower, rank=5))
    assert adapter.rank == 5
    for module, update in lower.items():
        assert adapter.factors(module)[0].shape[1] == 5
        torch.testing.assert_close(adapter.update(module).dense(), update.dense(), rtol=1e-5, atol=1e-6)


def test_the_written_config(base: Callable[..., Path], tmp_path: Path) -> None:
    model = base("llama")
    updates = random_updates(shapes_of(model, leaves={"v_proj", "q_proj"}), 3)
    config = json.loads((write(tmp_path / "a", model, updates, revision="abc") / CONFIG).read_text())
    expected = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6, "bias": "none", "revision": "abc",
        "base_model_name_or_path": str(model), "target_modules": ["q_proj", "v_proj"], "layers_to_transform": None,
        "lora_dropout": 0.0, "inference_mode": True, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    assert LoraConfig.from_pretrained(str(tmp_path / "a")).r == 3
    first = (tmp_path / "a" / WEIGHTS).read_bytes(), (tmp_path / "a" / CONFIG).read_bytes()
    write(tmp_path / "b", model, updates, revision="abc")
    assert ((tmp_path / "b" / WEIGHTS).read_bytes(), (tmp_path / "b" / CONFIG).read_bytes()) == first


TARGETS: dict[str, tuple[str, list[int] | None, set[str] | None, list[str], list[int] | None]] = {
    "short names": ("llama", None, {"q_proj", "down_proj"}, ["down_proj", "q_proj"], None),
    "some layers": ("llama", [0, 2], {"q_proj"}, ["q_proj"], [0, 2]),
    "one layer": ("bloom", [1], {"dense"}, ["dense"], [1]),
    "dense is not dense_h_to_4h": ("gpt_neox", None, {"dense"}, ["dense"], None),
}


@pytest.mark.parametrize("case", TARGETS.values(), ids=TARGETS)
def test_target_modules_name_exactly_the_modules(
    case: tuple[str, list[int] | None, set[str] | None, list[str], list[int] | None],
    base: Callable[..., Path],
    tmp_path: Path,
) -> None:
    family, layers, leaves, targets, covered = case
    model = base(family)
    updates = random_updates(shapes_of(model, layers, leaves), 3)
    checkpoint = Checkpoint(model)
    assert target_modules(list(updates), checkpoint.architecture, checkpoint.dims) == (targets, covered)
    out = write(tmp_path / "a", model, updates)
    check_loads(out, model)
    check_peft_finds_every_tensor(out, model)


@pytest.mark.parametrize("layers", [3, 12])
def test_layers_that_differ_take_full_paths(layers: int, base: Callable[..., Path], tmp_path: Path) -> None:
    """Twelve layers: ``layers.1`` must not match ``layers.11``, and PEFT shortens long lists of targets itself."""
    model = base("llama", layers=layers)
    shapes = shapes_of(model)
    for path in ("model.layers.1.self_attn.q_proj", f"model.layers.{layers - 1}.mlp.up_proj"):
        del shapes[path]
    updates = random_updates(shapes, 2)
    checkpoint = Checkpoint(model)
    assert target_modules(list(updates), checkpoint.architecture, checkpoint.dims) == (sorted(shapes), None)
    out = write(tmp_path / "a", model, updates, rank=2)
    check_loads(out, model)
    check_peft_finds_every_tensor(out, model)


def test_fresh_factors_are_stored_as_they_are(base: Callable[..., Path], tmp_path: Path) -> None:
    model = base("llama")
    updates = random_updates(shapes_of(model, [0, 1], {"q_proj"}), 3)
    A = torch.randn(3, 32)
    out = write(tmp_path / "a", model, updates, extra={"model.layers.2.self_attn.q_proj": (torch.zeros(32, 3), A)})
    check_loads(out, model)
    check_peft_finds_every_tensor(out, model)
    B, stored = Adapter.open(out).factors("model.layers.2.self_attn.q_proj")
    assert torch.equal(stored, A) and not B.any()


def test_an_adapter_that_does_nothing_is_not_written(base: Callable[..., Path], tmp_path: Path) -> None:
    model = base("llama")
    shapes = shapes_of(model, leaves={"q_proj", "v_proj"})
    zeros = {path: LowRank.zeros(*shape) for path, shape in shapes.items()}
    with pytest.raises(AdapterError, match="every migrated update is zero"):
        write(tmp_path / "a", model, zeros)
    broken = random_updates(shapes, 3)
    for path in list(broken)[:2]:
        broken[path].B[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="NaN or Inf") as caught:
        write(tmp_path / "a", model, broken)
    assert [p.where for p in caught.value.problems] == list(broken)[:2]
    assert not (tmp_path / "a").exists()
    one = {**zeros, **dict([next(iter(random_updates(shapes, 3).items()))])}
    check_loads(write(tmp_path / "a", model, one), model)


def test_check_loads_names_what_does_not_match(base: Callable[..., Path], tmp_path: Path) -> None:
    model = base("llama")
    out = write(tmp_path / "a", model, random_updates(shapes_of(model, leaves={"q_proj"}), 3))
    state = load_file(out / WEIGHTS)
    gone = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
    extra = f"{PREFIX}model.layers.0.self_attn.k_proj.lora_A.weight"
    shape = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_A.weight"
    state[extra] = state.pop(gone)
    state[shape] = torch.zeros(3, 7)
    save_file(state, out / WEIGHTS)
    with pytest.raises(AdapterError) as caught:
        check_loads(out, model)
    text = str(caught.value)
    assert len(caught.value.problems) == 3 and f"{gone} is missing" in text
    assert f"{extra} is (3, 32), PEFT expects nothing" in text and f"{shape} is (3, 7)" in text


@pytest.fixture
def private(base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path) -> Path:
    """A private copy of an adapter, to damage."""
    shutil.copytree(lora(base("llama")), tmp_path / "private")
    return tmp_path / "private"


REFUSED: dict[str, Any] = {
    "use_dora": True,
    "bias": "all",
    "init_lora_weights": "pissa_niter_16",
    "lora_bias": True,
    "layer_replication": [[0, 2], [1, 3]],
    "alora_invocation_tokens": [4],
    "use_qalora": True,
    "megatron_config": {"a": 1},
    "something_of_a_later_version": 0.5,
    "r": 0,
    "lora_alpha": None,
    "peft_type": "LILY",
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_not_migrated_are_refused_by_name(name: str, private: Path) -> None:
    models.edit_json(private / CONFIG, **{name: REFUSED[name]})
    with pytest.raises(AdapterError) as caught:
        Adapter.open(private)
    assert [p.where for p in caught.value.problems] == [f"{private / CONFIG}: {name}"]


def test_all_refusals_come_at_once(private: Path) -> None:
    changes = {name: value for name, value in REFUSED.items() if name not in ("peft_type", "use_dora")}
    models.edit_json(private / CONFIG, **changes)
    with pytest.raises(AdapterError) as caught:
        Adapter.open(private)
    assert {p.where.split(": ")[-1] for p in caught.value.problems} == set(changes)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("init", ["corda", "loftq", "PiSSA_niter_4", "lora_ga"])
def test_initialisations_that_change_the_base(init: str, private: Path) -> None:
    models.edit_json(private / CONFIG, init_lora_weights=init)
    with pytest.raises(AdapterError, match="changes the base weights"):
        Adapter.open(private)


@pytest.mark.parametrize("init", ["gaussian", "eva", "orthogonal", False])
def test_other_initialisations_are_fine(init: Any, private: Path) -> None:
    models.edit_json(private / CONFIG, init_lora_weights=init)
    Adapter.open(private)


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(path / WEIGHTS)
    change(state)
    save_file(state, path / WEIGHTS, metadata={"format": "pt"})


Q = f"{PREFIX}model.layers.0.self_attn.q_proj"


def test_damaged_weights(private: Path) -> None:
    edit(private, lambda s: s[f"{Q}.lora_B.weight"].__setitem__((0, 0), math.inf))
    adapter = Adapter.open(private)
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj holds NaN or Inf"):
        adapter.update("model.layers.0.self_attn.q_proj")
    edit(private, lambda s: s.update({f"{Q}.lora_B.weight": torch.zeros(32, 2)}))
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj.*rank 2.*rank 3"):
        Adapter.open(private)
    edit(private, lambda s: s.pop(f"{Q}.lora_B.weight"))
    with pytest.raises(AdapterError, match="has only lora_A"):
        Adapter.open(private)
    (private / WEIGHTS).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="not a readable"):
        Adapter.open(private)


def test_tensors_that_are_not_lora_factors(private: Path) -> None:
    edit(private, lambda s: s.update({f"{PREFIX}model.embed_tokens.something": torch.zeros(3, 96)}))
    with pytest.raises(AdapterError, match=r"not LoRA factors, such as .*embed_tokens\.something"):
        Adapter.open(private)
    save_file({}, private / WEIGHTS)
    with pytest.raises(AdapterError, match="holds no LoRA factors"):
        Adapter.open(private)


def test_missing_files(private: Path) -> None:
    (private / WEIGHTS).rename(private / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle weights only"):
        Adapter.open(private)
    (private / "adapter_model.bin").unlink()
    with pytest.raises(AdapterError, match=f"has no {WEIGHTS}"):
        Adapter.open(private)
    (private / CONFIG).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        Adapter.open(private)


@pytest.mark.parametrize(
    ("family", "numbers", "what", "count"),
    [
        ("llama", {"hidden": 40}, r"updates a \(32, 48\) weight, the old base has \(40, 48\)", 21),
        ("llama", {"kv_heads": 2}, r"updates a \(32, 32\) weight, the old base has \(16, 32\)", 6),
        ("llama", {"layers": 2}, "beyond the old base's 2 layers", 7),
        ("gpt_neox", {}, "not a linear module of a gpt_neox block", 21),
    ],
)
def test_an_adapter_of_another_base_is_refused_with_every_reason(
    family: str, numbers: dict[str, int], what: str, count: int, base: Callable[..., Path], lora: Callable[..., Path]
) -> None:
    adapter = Adapter.open(lora(base("llama")))
    other = Checkpoint(base(family, **numbers))
    with pytest.raises(AdapterError, match=what) as caught:
        adapter.by_layer(other)
    assert len(caught.value.problems) == len(adapter.check(other)) == count


def test_modules_by_layer(base: Callable[..., Path], lora: Callable[..., Path]) -> None:
    model = base("llama", layers=12)
    found = Adapter.open(lora(model, targets=["q_proj", "up_proj"])).by_layer(Checkpoint(model))
    assert list(found) == list(range(12))
    assert [m.roles for m in found[11].values()] == [("up",), ("q",)]


def test_target_modules_outside_the_blocks_are_refused(
    base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    model = base("llama")
    shutil.copytree(lora(model, targets=["q_proj"]), tmp_path / "a")
    gate = f"{PREFIX}model.layers.0.mlp.router"
    edit(
        tmp_path / "a",
        lambda s: s.update({f"{gate}.lora_A.weight": torch.ones(3, 32), f"{gate}.lora_B.weight": torch.ones(4, 3)}),
    )
    with pytest.raises(AdapterError, match=r"mlp\.router is not a linear module"):
        Adapter.open(tmp_path / "a").by_layer(Checkpoint(model))


def test_the_fingerprint_is_of_what_the_adapter_computes(private: Path, tmp_path: Path) -> None:
    first = Adapter.open(private).fingerprint()
    shutil.copytree(private, tmp_path / "copy")
    models.edit_json(tmp_path / "copy" / CONFIG, base_model_name_or_path="elsewhere", lora_dropout=0.3)
    assert Adapter.open(tmp_path / "copy").fingerprint() == first
    models.edit_json(tmp_path / "copy" / CONFIG, lora_alpha=7)
    assert Adapter.open(tmp_path / "copy").fingerprint() != first
    edit(private, lambda s: s[f"{Q}.lora_B.weight"].add_(1e-3))
    assert Adapter.open(private).fingerprint() != first
