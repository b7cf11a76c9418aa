"""Drafts of architecture files: told that a family is unknown, its names and shapes give most of it away."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from flows.command_line import app
from lorasuite.bases import (
    Architecture,
    Checkpoint,
    Module,
    Weights,
    _architecture_files,
    architectures,
    load,
    propose,
)
from lorasuite.planning import inspect
from tests import models


def standard(module: Module) -> Module:
    """A module without its role that is no standard one, of which names and shapes give away that it is there."""
    left = tuple(role for role in module.roles if role not in module.own_roles)
    return module if left == module.roles else module.model_copy(update={"roles": left, "layout": "plain"})


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_known_family_is_found_again(family: str, base: Callable[..., Path], tmp_path: Path) -> None:
    """Everything but the layout of head-by-head projections, which shapes cannot tell, and is asked."""
    path, known = base(family), architectures()[family]
    weights = Weights(path)
    draft = propose({**weights.config, "model_type": "unseen"}, weights.shapes())
    (tmp_path / "unseen.yaml").write_text(draft.text)
    found = load(tmp_path / "unseen.yaml")
    assert found.model_types == ("unseen",)
    stored = Checkpoint(path).find(known.embedding + ".weight")
    assert found.embedding + ".weight" == stored
    # dense MLPs of some families are refused for a reason that lies in PEFT
    kept = [m for m in found.modules if not known.refusal(known.path(0, m))]
    asked = [m for m in known.modules if m.layout == "interleaved" and not m.own_roles]
    alike = [m.model_copy(update={"layout": "stacked"}) if m in asked else m for m in known.modules]
    checkpoint = Checkpoint(path)
    depth, shared = range(checkpoint.dims.layers), Counter(role for m in known.modules for role in m.roles)
    has = {m.name: [m in checkpoint.modules(n) for n in depth] for m in known.modules}
    for n, m in enumerate(alike):  # what is optional shows where a layer lacks it, or another module has its role
        shown = not all(has[m.name]) or shared[m.roles[0]] > 1
        alike[n] = m.model_copy(update={"optional": m.optional and shown, "apart": False})
    alike = [m for m in alike if any(has[m.name])]
    if known.config["intermediate_size"][0] == "shared_intermediate_size":  # the draft tells each module's width
        kept = [m.model_copy(update={"intermediate_size": ()}) for m in kept]
    assert {m for m in kept if not m.own_roles} == {standard(m) for m in alike if standard(m).roles}
    unnamed = {m.name for m in alike} - {m.name for m in kept}
    assert all(any(f" {name} " in question for question in draft.questions) for name in unnamed)
    assert unnamed <= {m.name for m in alike if m.own_roles} and {m.name for m in kept} <= {m.name for m in alike}
    experts = known.experts
    described = set() if experts is None else {experts.path, *experts.others}  # which a draft refuses
    assert set(found.refused) <= set(known.refused) | described
    fused = [m.name for m in known.modules if m.layout != "plain" and not m.own_roles]
    for name in fused:
        assert any(question.startswith(f"{name} holds") for question in draft.questions)
    config = {**weights.config, "model_type": "unseen"}
    own = known.measured or known.config["head_dim"] != ("head_dim",) or "shared" in str(known.config)
    if not asked and not own:
        assert found.dimensions(config) == known.dimensions(weights.config)
    assert found.tied(config) == known.tied(weights.config)


def test_what_cannot_be_told_is_asked() -> None:
    shapes = {
        "decoder.tok.weight": (50, 16), "decoder.h.0.attn.Wqkv.weight": (48, 16),
        "decoder.h.0.attn.proj.weight": (16, 16),
        "decoder.h.0.ffn.alpha.weight": (40, 16), "decoder.h.0.ffn.wo.weight": (16, 40),
        "decoder.h.0.norm.weight": (16,),
    }  # fmt: skip
    draft = propose({"vocab_size": 50, "dim": 16, "n_heads": 4, "emb_scale": 2.0}, shapes)
    text = " ".join(draft.questions)
    for wanted in (
        "no model_type", "Which config key holds layers", "alpha [40, 16]", "No output embedding", "attn.Wqkv holds",
        "No module was recognised for up", "no MLP width: is it always 2.5", "emb_scale", "hidden size / heads",
    ):  # fmt: skip
        assert wanted in text
    assert draft.text.startswith("# Proposed") and all(f"#  - {q}" in draft.text for q in draft.questions)
    Architecture.model_validate(yaml.safe_load(draft.text))
    nothing = propose({}, {})
    assert any("No stack of numbered layers" in question for question in nothing.questions)


@pytest.fixture
def unknown(base: Callable[..., Path], tmp_path: Path) -> Path:
    path = tmp_path / "unknown"
    shutil.copytree(base("phi3"), path)
    models.edit_json(path / "config.json", model_type="unseen", architectures=None)
    return path


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Directories of architecture files that the test adds are forgotten afterwards."""
    monkeypatch.setattr(_architecture_files, "_added", [])
    architectures.cache_clear()
    yield
    architectures.cache_clear()


def test_inspect_proposes_a_file(unknown: Path, base: Callable[..., Path]) -> None:
    found = inspect(str(unknown), str(base("llama")))
    assert list(found.proposal) == ["old_base"]
    assert "mlp.gate_up_proj" in found.proposal["old_base"]["yaml"] and found.proposal["old_base"]["questions"]
    assert any("unknown architecture" in str(problem) for problem in found.problems)
    assert json.dumps(found.to_dict()["proposal"])
    assert inspect(str(base("llama")), str(base("llama"))).proposal == {}
    command = ["inspect", "--old-base", str(unknown), "--new-base", str(base("llama"))]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 2
    assert "first draft of an architecture file for old base" in shown.output
    assert "mlp.gate_up_proj" in shown.output
    as_json = CliRunner().invoke(app, [*command, "--json"])
    assert json.loads(as_json.stdout)["proposal"]["old_base"]["yaml"].startswith("# Proposed")


def test_files_of_a_users_own_directory_count(
    unknown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    draft = propose(Weights(unknown).config, Weights(unknown).shapes())
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "unseen.yaml").write_text(draft.text)
    monkeypatch.setenv("LORASUITE_ARCHITECTURES", str(tmp_path / "own"))
    checkpoint = Checkpoint(unknown)
    assert checkpoint.architecture.family == "unseen" and checkpoint.check() == []
    fused = checkpoint.tensor("model.layers.0.mlp.gate_up_proj.weight")
    assert torch.equal(checkpoint.layer(0, ("gate",))["gate"], fused[:48])
