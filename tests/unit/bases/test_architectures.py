"""Architecture files: layouts against transformers' own attention code, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasuite.bases import BUILT_IN, Checkpoint, Dimensions, Module, architecture_for, architectures, load
from lorasuite.errors import ArchitectureError, LoRASuiteError
from tests import models

LAYOUTS = [
    Module(name="q_proj", roles=("q",)),
    Module(name="qkv", roles=("q", "k", "v"), layout="interleaved"),
    Module(name="qkv_proj", roles=("q", "k", "v"), layout="stacked"),
    Module(name="gate_up_proj", roles=("gate", "up"), layout="stacked"),
]


def dims(heads: int, kv_heads: int, head_dim: int) -> Dimensions:
    return Dimensions(50, heads * head_dim, 7, 2, heads, kv_heads, head_dim)


@pytest.mark.parametrize("module", LAYOUTS, ids=lambda m: f"{m.name}-{m.layout}")
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.sampled_from([1, 2, 3]), st.integers(1, 5), st.sampled_from([(), (3,), (2, 3)]))
def test_split_and_fuse_are_inverse(
    module: Module, kv_heads: int, group: int, head_dim: int, tail: tuple[int, ...]
) -> None:
    if module.layout == "interleaved":
        group = 1
    d = dims(kv_heads * group, kv_heads, head_dim)
    total = sum(d.rows(role) for role in module.roles)
    rows = torch.randn(total, *tail)
    parts = module.split(rows, d)
    assert tuple(parts) == module.roles
    assert [len(parts[role]) for role in module.roles] == [d.rows(role) for role in module.roles]
    assert torch.equal(module.fuse(parts, d), rows)
    again = module.split(module.fuse(parts, d), d)
    assert all(torch.equal(again[role], parts[role]) for role in parts)


def test_stacked_gives_role_after_role() -> None:
    d = dims(4, 2, 3)
    rows = torch.arange(12 + 6 + 6).float()
    parts = Module(name="x", roles=("q", "k", "v"), layout="stacked").split(rows, d)
    assert torch.equal(parts["q"], rows[:12]) and torch.equal(parts["k"], rows[12:18])
    assert torch.equal(parts["v"], rows[18:])


def first_attention(model: Any, family: str) -> Any:
    return model.gpt_neox.layers[0].attention if family == "gpt_neox" else model.transformer.h[0].self_attention


@pytest.mark.parametrize("family", ["gpt_neox", "bloom"])
def test_the_fused_layout_is_the_one_of_the_transformers_module(
    family: str, base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The q, k, v that transformers hands to attention are those of the split weight and bias."""
    path = base(family, hidden=24, heads=3, layers=1)
    checkpoint, model = Checkpoint(path), models.load(path)
    attention = first_attention(model, family)
    x = torch.randn(2, 5, 24)
    module = checkpoint.architecture.module("q")
    assert module is not None
    weights = module.split(checkpoint.weight(0, module), checkpoint.dims)
    biases = module.split(attention.query_key_value.bias.detach(), checkpoint.dims)
    # (batch, heads, tokens, head size) of each role
    ours = {r: (x @ weights[r].T + biases[r]).reshape(2, 5, 3, 8).transpose(1, 2) for r in ("q", "k", "v")}

    seen: dict[str, torch.Tensor] = {}
    if family == "bloom":
        q, k, v = attention._reshape(attention.query_key_value(x))
        seen = {"q": q, "k": k, "v": v}
    else:
        import transformers.models.gpt_neox.modeling_gpt_neox as source

        def caught(_self: Any, query: Any, key: Any, value: Any, *_args: Any, **_kw: Any) -> Any:
            seen.update(q=query, k=key, v=value)
            return query.transpose(1, 2).contiguous(), None

        monkeypatch.setattr(source, "eager_attention_forward", caught)
        monkeypatch.setattr(source, "apply_rotary_pos_emb", lambda q, k, *_: (q, k))
        model.config._attn_implementation = "eager"
        nothing = (torch.ones(2, 5, 2), torch.zeros(2, 5, 2))
        attention(x, None, position_embeddings=nothing)
    for role, tensor in ours.items():
        torch.testing.assert_close(seen[role].detach(), tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "numbers"),
    [
        ("llama", {"heads": 4, "kv_heads": 2}),
        ("llama", {"heads": 4, "kv_heads": 1, "head_dim": 16}),
        ("qwen2", {"heads": 4, "kv_heads": 2}),
        ("gpt_neox", {}),
        ("bloom", {}),
    ],
)
def test_every_linear_module_of_a_block_is_described_with_its_shape(
    family: str, numbers: dict[str, int], base: Callable[..., Path]
) -> None:
    path = base(family, **numbers)
    checkpoint, model = Checkpoint(path), models.load(path)
    a, d = checkpoint.architecture, checkpoint.dims
    described = {
        a.path(layer, m): (sum(d.rows(r) for r in m.roles), d.columns(m.roles[0]))
        for layer in range(d.layers)
        for m in a.modules
    }
    real = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(a.layers + ".")
    }
    assert described == real
    assert model.get_input_embeddings() is model.get_submodule(a.embedding)
    assert d.vocab_size == 96 and d.layers == 3


def test_dimensions_of_grouped_heads(base: Callable[..., Path]) -> None:
    d = Checkpoint(base("llama", heads=4, kv_heads=2)).dims
    assert (d.attention, d.group, d.head_dim, d.rows("k"), d.columns("o")) == ("GQA", 2, 8, 16, 32)
    assert Checkpoint(base("llama", heads=4, kv_heads=1, head_dim=16)).dims.attention == "MQA"
    assert Checkpoint(base("bloom")).dims.attention == "MHA"
    assert Checkpoint(base("bloom")).dims.intermediate_size == 128


def test_locate_is_the_inverse_of_path() -> None:
    for architecture in architectures().values():
        for module in architecture.modules:
            assert architecture.locate(architecture.path(13, module)) == (13, module)
        assert architecture.locate(f"{architecture.layers}.1.no_such") is None
        assert architecture.locate(f"x{architecture.layers}.1.{module.name}") is None
        assert architecture.locate(f"{architecture.layers}.one.{module.name}") is None


def test_an_unknown_model_type_gets_a_suggestion() -> None:
    with pytest.raises(ArchitectureError, match=r"lama2.*Did you mean 'llama'\?") as caught:
        architecture_for({"model_type": "lama2"})
    assert isinstance(caught.value, LoRASuiteError) and isinstance(caught.value, ValueError)
    with pytest.raises(ArchitectureError, match=r"Choose one of: .*bloom.*gpt_neox.*llama.*qwen2"):
        architecture_for({})


def test_every_missing_number_is_named() -> None:
    config = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": True, "vocab_size": 0}
    with pytest.raises(ArchitectureError) as caught:
        architecture_for(config).dimensions(config)
    text = str(caught.value)
    for name in ("vocab_size", "intermediate_size", "layers", "heads", "kv_heads"):
        assert f"no usable {name}" in text
    assert "no usable hidden_size" not in text


def test_heads_that_do_not_divide_are_refused() -> None:
    config = {
        "model_type": "llama", "hidden_size": 12, "num_attention_heads": 4, "num_key_value_heads": 3,
        "vocab_size": 9, "intermediate_size": 9, "num_hidden_layers": 1,
    }  # fmt: skip
    with pytest.raises(ArchitectureError, match="do not divide"):
        architecture_for(config).dimensions(config)


VALID = yaml.safe_load((BUILT_IN / "llama.yaml").read_text())
VALID["modules"] = [
    {"name": "qkv", "roles": ["q", "k", "v"], "layout": "stacked"},
    {"name": "o", "roles": ["o"]},
]


def written(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({**VALID, **changes}))
    return path


def test_a_valid_file_loads(tmp_path: Path) -> None:
    architecture = load(written(tmp_path / "some.yaml"))
    assert architecture.roles == ("q", "k", "v", "o")
    assert architecture.module("up") is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"surprise": 1}, "surprise"),
        ({"modules": [{"name": "x", "roles": ["q", "k"]}]}, "layout"),
        ({"modules": [{"name": "x", "roles": ["q"], "layout": "stacked"}]}, "layout"),
        ({"modules": [{"name": "x", "roles": ["query"]}]}, "roles"),
        ({"modules": [{"name": "x", "roles": ["q"]}, {"name": "y", "roles": ["q"]}]}, "more than one module"),
        ({"modules": [{"name": "x", "roles": ["q"], "bias": True}]}, "bias"),
        ({"model_types": []}, "model_types"),
        ({"config": {"vocab_size": ["v"]}}, "config"),
        ({"embedding": None}, "embedding"),
    ],
)
def test_an_invalid_file_is_refused_by_field(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match=named) as caught:
        load(written(tmp_path / "some.yaml", **changes))
    assert caught.value.problems and all(p.where == "some.yaml" for p in caught.value.problems)


def test_every_invalid_field_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError) as caught:
        load(written(tmp_path / "some.yaml", surprise=1, model_types=[], embedding=None))
    assert len(caught.value.problems) == 3
