"""Adding an architecture is adding one data file: bases of it are read, inspected and migrated from and to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flows.command_line import app
from lorasuite.adapters import Adapter, write_adapter
from lorasuite.bases import Checkpoint, _architecture_files, add_architectures, architecture_for, architectures
from lorasuite.errors import ArchitectureError, PreflightError
from lorasuite.planning import MigrationConfig, check
from lorasuite.planning import inspect as compare
from tests import models
from tests.cross import move

Base = Callable[..., Path]

#: A family that no file of the package describes, and that differs from Llama in every name.
NOVEL = """
family: novel
model_types: [novel]
config:
  vocab_size: [n_vocab]
  hidden_size: [width]
  intermediate_size: [n_units]
  layers: [depth]
  heads: [n_head]
  kv_heads: [n_group]
  head_dim: []
embedding: decoder.words
unembedding: decoder.readout
layers: decoder.blocks
modules:
  - {name: attn.wq, roles: [q]}
  - {name: attn.wk, roles: [k]}
  - {name: attn.wv, roles: [v]}
  - {name: attn.wo, roles: [o]}
  - {name: ffn.alpha, roles: [gate]}
  - {name: ffn.beta, roles: [up]}
  - {name: ffn.gamma, roles: [down]}
"""
NAMES = {
    "model.embed_tokens": "decoder.words", "lm_head": "decoder.readout", "model.layers": "decoder.blocks",
    "self_attn.q_proj": "attn.wq", "self_attn.k_proj": "attn.wk", "self_attn.v_proj": "attn.wv",
    "self_attn.o_proj": "attn.wo", "mlp.gate_proj": "ffn.alpha", "mlp.up_proj": "ffn.beta",
    "mlp.down_proj": "ffn.gamma",
}  # fmt: skip
OLD: dict[str, int] = {"hidden": 16, "layers": 2}
NEW: dict[str, int] = {"hidden": 32, "seed": 1}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Directories that a test adds are forgotten afterwards."""
    monkeypatch.setattr(_architecture_files, "_added", [])
    architectures.cache_clear()
    yield
    architectures.cache_clear()


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A directory with the one file."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "novel.yaml").write_text(NOVEL)
    return tmp_path / "own"


def renamed(name: str) -> str:
    for llama, novel in NAMES.items():
        name = name.replace(llama, novel)
    return name


def as_novel(model: Path, to: Path) -> Path:
    """A Llama base under the names of the new family."""
    shutil.copytree(model, to)
    config = json.loads((to / "config.json").read_text())
    values = {
        "model_type": "novel", "n_vocab": config["vocab_size"], "width": config["hidden_size"],
        "n_units": config["intermediate_size"], "depth": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"], "n_group": config["num_key_value_heads"],
    }  # fmt: skip
    (to / "config.json").write_text(json.dumps(values))
    tensors = load_file(to / "model.safetensors")
    save_file({renamed(name): tensor for name, tensor in tensors.items()}, to / "model.safetensors")
    return to


def as_novel_adapter(adapter: Path, to: Path) -> Path:
    """An adapter of a Llama base under the names of the new family."""
    shutil.copytree(adapter, to)
    targets = json.loads((to / "adapter_config.json").read_text())["target_modules"]
    short = {llama.rpartition(".")[2]: novel.rpartition(".")[2] for llama, novel in NAMES.items()}
    models.edit_json(to / "adapter_config.json", target_modules=[short[target] for target in targets])
    tensors = load_file(to / "adapter_model.safetensors")
    save_file({renamed(name): tensor for name, tensor in tensors.items()}, to / "adapter_model.safetensors")
    return to


def test_its_bases_are_read_and_adapters_move_from_and_to_it(base: Base, lora: Base, own: Path, tmp_path: Path) -> None:
    """As they do between the same weights under Llama's names."""
    old, new = base("llama", **OLD), base("llama", **NEW)
    adapter = lora(old)
    novel_old, novel_new = as_novel(old, tmp_path / "old"), as_novel(new, tmp_path / "new")
    novel_adapter = as_novel_adapter(adapter, tmp_path / "adapter")
    add_architectures(own)
    known = Checkpoint(novel_old)
    assert known.dims == Checkpoint(old).dims and known.check() == []
    assert torch.equal(known.embedding(), Checkpoint(old).embedding())
    opened = Adapter.open(novel_adapter)
    assert opened.check(known) == []
    expected = move(Adapter.open(adapter), old, new).updates
    away = move(opened, novel_old, new).updates
    there = move(Adapter.open(adapter), old, novel_new).updates
    assert set(away) == set(expected) and set(there) == {renamed(path) for path in expected}
    for path, update in expected.items():  # to rounding: products depend on where in a file the weights lie
        for found in (away[path], there[renamed(path)]):
            torch.testing.assert_close(found.dense(), update.dense(), rtol=1e-4, atol=1e-6)
    target = Checkpoint(novel_new)
    out = write_adapter(
        tmp_path / "written", there, architecture=target.architecture, dims=target.dims, base=str(novel_new),
        rank=4, alpha=4,
    )  # fmt: skip
    assert Adapter.open(out).check(target) == []


def test_inspect_takes_its_directory(base: Base, lora: Base, own: Path, tmp_path: Path) -> None:
    old, new = as_novel(base("llama", **OLD), tmp_path / "old"), base("llama", **NEW)
    adapter = as_novel_adapter(lora(base("llama", **OLD)), tmp_path / "adapter")
    command = ["inspect", "--old-base", str(old), "--new-base", str(new), "--adapter", str(adapter), "--json"]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and "unknown architecture model_type='novel'" in refused.output
    done = CliRunner().invoke(app, [*command, "--architectures", str(own)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert not found["problems"] and not found["proposal"]
    assert {row["role"]: (row["old"], row["new"]) for row in found["modules"]}["q"] == ("attn.wq", "self_attn.q_proj")


def test_a_migrations_settings_take_its_directory(base: Base, lora: Base, own: Path, tmp_path: Path) -> None:
    old, new = as_novel(base("llama", **OLD), tmp_path / "old"), base("llama", **NEW)
    adapter = as_novel_adapter(lora(base("llama", **OLD)), tmp_path / "adapter")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"w{n} w{n + 1} w2"}) + "\n" for n in range(8)))
    settings: dict[str, Any] = {
        "adapter": str(adapter), "old_base": str(old), "new_base": str(new), "output": str(tmp_path / "out"),
        "calibration": str(texts), "method": "lorasuite",
    }  # fmt: skip
    with pytest.raises(PreflightError, match="unknown architecture"):
        check(MigrationConfig(**settings))
    with pytest.raises(PreflightError, match="is no directory"):
        check(MigrationConfig(**settings, architectures=str(tmp_path / "absent")))
    assert check(MigrationConfig(**settings, architectures=str(own))).texts
    assert not compare(str(old), str(new)).problems  # known from here on


def test_adding_a_directory_again_reads_what_has_changed(own: Path) -> None:
    add_architectures(own)
    first = architecture_for({"model_type": "novel"})
    add_architectures(str(own))
    assert architecture_for({"model_type": "novel"}) == first
    (own / "novel.yaml").write_text(NOVEL.replace("[novel]", "[novel, novel2]"))
    add_architectures(own)
    assert architecture_for({"model_type": "novel2"}).family == "novel"


def test_a_file_of_one_s_own_goes_before_the_package_s(own: Path) -> None:
    assert architecture_for({"model_type": "llama"}).family == "llama"
    (own / "novel.yaml").write_text(NOVEL.replace("[novel]", "[novel, llama]"))
    add_architectures(own)
    assert architecture_for({"model_type": "llama"}).family == architecture_for({"model_type": "novel"}).family


def test_every_problem_of_a_directory_is_named_and_it_is_not_added(own: Path, tmp_path: Path) -> None:
    (own / "second.yaml").write_text(NOVEL.replace("[novel]", "[llama]") + "surprise: 1\n")
    (own / "third.yaml").write_text(NOVEL.replace("[novel]", "[novel]"))
    with pytest.raises(ArchitectureError) as caught:
        add_architectures(own)
    said = str(caught.value)
    assert "second.yaml" in said and "surprise" in said
    assert "'novel' is already described by" in said
    assert "novel" not in architectures()
    (tmp_path / "empty").mkdir()
    for folder, what in (("empty", "holds no .yaml files"), ("absent", "is no directory")):
        with pytest.raises(ArchitectureError, match=what):
            add_architectures(tmp_path / folder)
