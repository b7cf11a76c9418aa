"""Every mistake a user makes: which error, what it names, what it advises, and that nothing was written.

Each case breaks one good migration. ``says`` must all be in the message: the file or field, and the remedy.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from flows.context import check_stages
from lorasuite.bases import check_finite
from lorasuite.errors import ConfigError, LoRASuiteError, PreflightError
from lorasuite.planning import MigrationConfig, build, check, read_config
from tests import models

ROW = {"prompt": "w1 w2", "completion": " w3"}


@dataclass
class World:
    """A good migration, copied for one case to break."""

    root: Path
    settings: dict[str, Any]

    @property
    def old(self) -> Path:
        return Path(self.settings["old_base"])

    @property
    def new(self) -> Path:
        return Path(self.settings["new_base"])

    @property
    def adapter(self) -> Path:
        return Path(self.settings["adapter"])

    def set(self, **changes: Any) -> None:
        self.settings.update(changes)

    def write(self, name: str, content: str | bytes) -> str:
        path = self.root / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def rows(self, name: str, rows: list[Any]) -> str:
        return self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    def tensors(self, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        """Edit a safetensors file."""
        file = next(folder.glob("*.safetensors"))
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    models.build(root / "old", "llama", seed=1)
    models.build(root / "new", "llama", seed=2, hidden=48, heads=6, kv_heads=2, layers=4)
    models.build(root / "sharded", "llama", seed=1, shard="20KB")
    models.build_adapter(root / "adapter", root / "old")
    return root


@pytest.fixture
def world(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("LORASUITE_HOME", str(tmp_path / "home"))
    world = World(tmp_path, {})
    world.set(
        adapter=str(tmp_path / "adapter"),
        old_base=str(tmp_path / "old"),
        new_base=str(tmp_path / "new"),
        output=str(tmp_path / "out"),
        calibration=world.rows("texts.jsonl", [{"text": f"w{n} w{n + 1}"} for n in range(8)]),
        train_data=world.rows("train.jsonl", [ROW] * 20),
        eval_data=world.rows("test.jsonl", [ROW] * 4),
    )
    return world


def run(world: World) -> None:
    """What ``lorasuite migrate`` does before any heavy work."""
    settings = build(MigrationConfig, world.settings)
    check(settings)
    for base in (settings.old_base, settings.new_base):
        check_finite(base)


Break = Callable[[World], Any]


def config_edit(folder: str, **changes: Any) -> Break:
    def edit(world: World) -> None:
        models.edit_json(world.root / folder / "config.json", **changes)

    return edit


def adapter_edit(**changes: Any) -> Break:
    def edit(world: World) -> None:
        models.edit_json(world.adapter / "adapter_config.json", **changes)

    return edit


def drop(*keys: str) -> Break:
    def edit(world: World) -> None:
        for key in keys:
            world.settings.pop(key)

    return edit


def setting(**changes: Any) -> Break:
    return lambda world: world.set(**changes)


def index(world: World) -> dict[str, Any]:
    world.set(old_base=str(world.root / "sharded"))
    found: dict[str, Any] = json.loads((world.old / "model.safetensors.index.json").read_text())
    return found


def both(*parts: Break) -> Break:
    def edit(world: World) -> None:
        for part in parts:
            part(world)

    return edit


#: name → (what is broken, error class, what the message must say)
CASES: dict[str, tuple[Break, type[LoRASuiteError], tuple[str, ...]]] = {
    # settings
    "unknown setting": (setting(finetune_sample=3), ConfigError, ("finetune_sample", "Did you mean 'finetune_samples'")),
    "unknown nested setting": (setting(pair={"poling": "mean"}), ConfigError, ("pair.poling", "Did you mean 'pooling'")),
    "settings left out": (drop("output", "old_base"), ConfigError, ("--output", "--old-base", "is required")),
    "unknown method": (setting(method="lorasuit"), ConfigError, ("method", "Did you mean 'lorasuite'")),
    "negative samples": (setting(finetune_samples=-1), ConfigError, ("finetune_samples", "greater than or equal")),
    "rank zero": (setting(rank=0), ConfigError, ("rank", "greater than or equal to 1")),
    "learning rate zero": (setting(learning_rates=[0.0, 1e-3]), ConfigError, ("learning_rates", "positive")),
    "uneven micro-batch": (
        setting(finetune={"batch_size": 16, "micro_batch_size": 5}), ConfigError, ("finetune", "not a multiple"),
    ),
    "unknown strategy": (setting(pair={"layer_strategy": "dyn"}), ConfigError, ("layer_strategy", "'dp'")),
    "unknown metric": (setting(pair={"similarity": "cka2"}), ConfigError, ("similarity", "'cka'")),
    "unknown device": (setting(device="tpu"), PreflightError, ("tpu", "cpu, cuda, cuda:N or auto")),
    "absent GPU": (setting(device="cuda:63"), PreflightError, ("cuda:63", "Use cpu or auto")),
    # bases
    "no such base": (setting(old_base="./nowhere"), PreflightError, ("./nowhere", "hub-id[/subfolder][@revision]")),
    "unreachable Hub id": (setting(new_base="nobody/nothing"), PreflightError, ("nobody/nothing", "Check the path or")),
    "base is a file": (
        lambda w: w.set(old_base=str(w.old / "model.safetensors")), PreflightError, ("is a file", "Give its directory"),
    ),
    "no config": (lambda w: (w.old / "config.json").unlink(), PreflightError, ("config.json", "save_pretrained")),
    "broken config": (
        lambda w: (w.new / "config.json").write_text("{"), PreflightError, ("config.json", "not valid JSON"),
    ),
    "unknown architecture": (config_edit("new", model_type="llamma"), PreflightError, ("llamma", "Did you mean 'llama'")),
    "config without a number": (config_edit("new", hidden_size=None), PreflightError, ("hidden_size", "config.json")),
    "uneven groups": (config_edit("new", num_key_value_heads=4), PreflightError, ("do not divide", "num_key_value_heads")),
    "config of another model": (
        config_edit("old", intermediate_size=99), PreflightError, ("mlp.up_proj.weight", "does not belong"),
    ),
    "tensor missing": (
        lambda w: w.tensors(w.new, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        PreflightError, ("model.layers.1.mlp.up_proj.weight is missing", "download it again"),
    ),
    "shard missing": (
        lambda w: (w.root / "sharded" / sorted(set(index(w)["weight_map"].values()))[1]).unlink(),
        PreflightError, ("shard named by the index is missing", "Download it again"),
    ),
    "no weights": (
        lambda w: (w.new / "model.safetensors").unlink(), PreflightError, ("no safetensors weights", "model.safetensors"),
    ),
    "pickle weights": (
        lambda w: (w.new / "model.safetensors").rename(w.new / "pytorch_model.bin"),
        PreflightError, ("pytorch_model.bin", "save_pretrained"),
    ),
    "truncated weights": (
        lambda w: (w.old / "model.safetensors").write_bytes((w.old / "model.safetensors").read_bytes()[:200]),
        PreflightError, ("model.safetensors", "not a readable safetensors file"),
    ),
    "NaN in a base": (
        lambda w: w.tensors(w.new, lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(float("nan"))),
        LoRASuiteError, ("model.layers.0.mlp.up_proj.weight holds NaN", "download it again"),
    ),
    "no tokenizer": (
        lambda w: [f.unlink() for f in w.new.glob("*token*")], PreflightError, ("tokenizer", "beside the model"),
    ),
    "no common token": (
        lambda w: (
            models.build_tokenizer(w.new, [f"x{n}" for n in range(96)]),
            w.set(train_data=None, eval_data=None),  # such a tokenizer cannot read them either
        ),
        PreflightError, ("share no token", "hidden map"),
    ),
    # adapter
    "no such adapter": (setting(adapter="./gone"), PreflightError, ("./gone", "no such directory")),
    "adapter without a config": (
        lambda w: (w.adapter / "adapter_config.json").unlink(), PreflightError, ("adapter_config.json", "is missing"),
    ),
    "adapter without weights": (
        lambda w: (w.adapter / "adapter_model.safetensors").unlink(),
        PreflightError, ("adapter_model.safetensors", "save_pretrained"),
    ),
    "prompt tuning": (adapter_edit(peft_type="PROMPT_TUNING"), PreflightError, ("peft_type", "PROMPT_TUNING")),
    "unknown adapter field": (adapter_edit(use_magic=True), PreflightError, ("use_magic", "not understood")),
    "adapter rank zero": (adapter_edit(r=0), PreflightError, ("adapter_config.json: r", "positive")),
    "half a pair of factors": (
        lambda w: w.tensors(
            w.adapter, lambda t: t.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight")
        ),
        PreflightError, ("model.layers.0.self_attn.q_proj", "lora_A"),
    ),
    "NaN in the adapter": (
        lambda w: w.tensors(w.adapter, lambda t: next(iter(t.values())).fill_(float("nan"))),
        PreflightError, ("holds NaN or Inf", "train it again"),
    ),
    "untrained adapter": (
        lambda w: w.tensors(w.adapter, lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k]),
        PreflightError, ("every update is zero", "never trained"),
    ),
    "adapter of a wider base": (
        lambda w: models.build_adapter(w.root / "wide", w.new, targets=["q_proj"]) and w.set(adapter=str(w.root / "wide")),
        PreflightError, ("model.layers.0.self_attn.q_proj", "--old-base"),
    ),
    "adapter of a deeper base": (
        lambda w: (
            models.build(w.root / "deep", "llama", layers=5),
            models.build_adapter(w.root / "deeper", w.root / "deep", targets=["q_proj"]),
            w.set(adapter=str(w.root / "deeper")),
        ),
        PreflightError, ("model.layers.4.self_attn.q_proj", "3 layers", "--old-base"),
    ),
    # data
    "no such data": (setting(train_data="./rows.jsonl"), PreflightError, ("rows.jsonl",)),
    "empty data": (lambda w: w.set(eval_data=w.write("e.jsonl", "")), PreflightError, ("e.jsonl", "empty")),
    "broken line": (
        lambda w: w.set(train_data=w.write("b.jsonl", json.dumps(ROW) + "\n{oops\n" + json.dumps(ROW) + "\n")),
        PreflightError, ("b.jsonl, line 2",),
    ),
    "rows without an answer": (
        lambda w: w.set(train_data=w.rows("a.jsonl", [ROW, {"prompt": "w1"}, ROW, {"prompt": "w2"}])),
        PreflightError, ("a.jsonl, line 2", "line 4", "completion"),
    ),
    "not UTF-8": (lambda w: w.set(calibration=w.write("l.jsonl", b'{"text": "caf\xe9"}')), PreflightError, ("l.jsonl", "UTF-8")),
    "chat rows without a template": (
        lambda w: w.set(
            eval_data=w.rows("c.jsonl", [{"messages": [{"role": "user", "content": "w1"},
                                                       {"role": "assistant", "content": "w2"}]}])
        ),
        PreflightError, ("chat template",),
    ),
    "fine-tuning without rows": (
        both(drop("train_data"), setting(finetune_samples=50)), PreflightError, ("finetune_samples", "--train-data"),
    ),
    "other depth, no texts": (
        both(drop("calibration", "train_data"), setting(method="lorasuite")), PreflightError,
        ("3 and 4", "--calibration", "--layer-strategy"),
    ),
    "too few texts": (
        lambda w: w.set(calibration=w.rows("f.jsonl", [{"text": "w1 w2"}] * 3)), PreflightError, ("f.jsonl", "at least 4"),
    ),
    "too few rows to sweep": (
        setting(learning_rates=[1e-3, 1e-2], finetune_samples=5), PreflightError, ("learning_rates", "at least 10"),
    ),
    "rows longer than the cut-off": (
        lambda w: w.set(
            train_data=w.rows("long.jsonl", [{"prompt": "w1 " * 60, "completion": " w2"}] * 3), finetune={"cutoff": 8}
        ),
        PreflightError, ("cut",),
    ),
    "a start that no LoRA has": (setting(finetune={"init": "pisa"}), ConfigError, ("finetune.init", "pissa")),
    "a field that no row has": (setting(columns=["promt=text"]), ConfigError, ("columns", "Did you mean 'prompt'")),
    "a column that is not there": (
        lambda w: w.set(columns=["prompt=text", "completion=label"], train_data=w.rows("c.jsonl", [{"text": "w1"}] * 9)),
        PreflightError, ("c.jsonl, line 1", "has no column 'label'", "8 more", "--columns"),
    ),
    # output
    "output exists": (lambda w: (w.root / "out").mkdir(), PreflightError, ("out", "exists already", "new directory")),
    "output below a file": (
        lambda w: w.set(output=str(w.root / "train.jsonl" / "out")), PreflightError, ("train.jsonl", "is a file"),
    ),
    "copy to another shape": (setting(method="copy"), PreflightError, ("copy", "--method lorasuite")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_mistake(name: str, world: World) -> None:
    broken, error, says = CASES[name]
    broken(world)
    existing = {p: p.stat().st_mtime_ns for p in world.root.rglob("*")}
    with pytest.raises(error) as caught:
        run(world)
    message = str(caught.value)
    for text in says:
        assert text in message, message
    assert caught.value.problems and all(p.where and p.what and p.remedy for p in caught.value.problems)
    assert {p: p.stat().st_mtime_ns for p in world.root.rglob("*")} == existing, "something was written"


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 40


def test_the_good_migration_is_good(world: World) -> None:
    run(world)


def test_no_space_left(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(world.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(PreflightError, match="MiB free"):
        run(world)


def test_many_mistakes_at_once(world: World) -> None:
    """A new base that lacks a tensor, an untrained adapter, two bad data files and an output that exists."""
    for name in ("tensor missing", "untrained adapter", "broken line", "empty data", "output exists", "unknown device"):
        CASES[name][0](world)
    with pytest.raises(PreflightError) as caught:
        run(world)
    message = str(caught.value)
    for text in ("up_proj", "every update is zero", "b.jsonl, line 2", "e.jsonl", "exists already", "tpu"):
        assert text in message
    assert len(caught.value.problems) == 6


def test_settings_files(tmp_path: Path) -> None:
    for content, says in ((None, "no such file"), ("a: [", "not valid YAML"), ("- 1", "not a mapping")):
        path = tmp_path / "c.yaml"
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigError, match=says):
            read_config(path)
    path.write_text(yaml.safe_dump({"rank": 4}))
    assert read_config(path) == {"rank": 4}


def test_unknown_stages() -> None:
    with pytest.raises(ConfigError) as caught:
        check_stages(("similarty", "transform", "nonsense"))
    assert "Did you mean 'similarity'" in str(caught.value) and "nonsense" in str(caught.value)
