"""Every family of the architecture files: against transformers' own module, the dense formulas and PEFT."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.models.gpt2.modeling_gpt2 as gpt2_source
import transformers.models.phi3.modeling_phi3 as phi3_source
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from lorasuite.adapters import (
    Adapter,
    attached,
    check_loads,
    fresh_config,
    fresh_lora,
    is_ready,
    write_adapter,
    write_ready,
)
from lorasuite.bases import BUILT_IN, Architecture, Checkpoint, Module, Role, architectures, load, load_model
from lorasuite.errors import AdapterError, CheckpointError
from lorasuite.evaluation import _serving as serving
from lorasuite.planning import inspect
from tests import models
from tests.experts import experts_one_by_one
from tests.unit.transforms.test_transform_lorasuite import check, expected_updates, run, some_heads

LAYERS = {0: 1, 1: 0, 2: 2}
IDS = torch.tensor([[5, 9, 33, 71, 12]])
#: The other side of each pair differs from the fixture in every factor a family can have.
SMALLER: dict[str, Any] = {"hidden": 24, "heads": 2, "intermediate": 40}
LARGER: dict[str, Any] = {"hidden": 40, "heads": 8, "kv_heads": 4, "head_dim": 6, "intermediate": 56, "vocab": 110}


def test_every_model_type_has_a_fixture() -> None:
    without = {"gemma3n"}  # whose vision tower is timm's, which is not installed
    assert set(models.FAMILIES) == set(architectures()) - without


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_linear_module_of_a_block_is_described_or_refused(family: str, base: Callable[..., Path]) -> None:
    path = base(family)
    checkpoint, model = Checkpoint(path), models.load(path)
    assert checkpoint.check() == []
    a = checkpoint.architecture
    described: set[str] = set()
    for layer in range(checkpoint.dims.layers):
        dims = checkpoint.layer_dims(layer)
        for module in checkpoint.modules(layer):
            real = model.get_submodule(a.path(layer, module))
            described.add(a.path(layer, module))
            assert isinstance(real, Conv1D) == module.transposed
            weight = checkpoint.weight(layer, module)
            assert weight.shape == (sum(dims.rows(r) for r in module.roles), dims.columns(module.roles[0]))
            assert torch.equal(weight, models.out_in(real, real.weight))
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and name.startswith(a.layers + ".")
    }
    assert described <= linear and all(a.refusal(name) for name in linear - described)
    assert model.get_input_embeddings() is model.get_submodule(a.embedding)
    assert model.get_output_embeddings() is model.get_submodule(a.unembedding)


@pytest.mark.parametrize(
    "family", sorted(set(models.FAMILIES) - {"bloom", "gpt2", "opt"})
)  # those add a norm, positions
def test_the_embedding_is_what_the_first_block_reads(family: str, base: Callable[..., Path]) -> None:
    checkpoint, model = Checkpoint(base(family)), models.load(base(family))
    seen: list[torch.Tensor] = []
    block = model.get_submodule(checkpoint.architecture.layers)[0]
    block.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(IDS)
    first = seen[0][0] if seen[0].dim() == 4 else seen[0]  # the first of several streams
    torch.testing.assert_close(first, checkpoint.embedding()[IDS], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", sorted(set(models.FAMILIES) - {"minicpm"}))
def test_the_defaults_are_those_of_the_config_class(family: str) -> None:
    config = CONFIG_MAPPING[family]().to_dict()
    architecture = architectures()[family]
    given = architecture.defaults
    inner = config.get(architecture.text_config) or {}
    assert given == {key: config.get(key, inner.get(key)) for key in given}
    if not architecture.text_config or architecture.text_config not in config:
        assert bool(config.get("tie_word_embeddings")) == bool(given.get("tie_word_embeddings"))
        head_dim = config.get("head_dim")
        hidden, heads = config.get("hidden_size", 0), config.get("num_attention_heads", 1)
        # a default that is not hidden size / heads has to be in the file: config.json may leave it out
        read = "head_dim" in architecture.config["head_dim"]
        assert not read or head_dim is None or head_dim * heads == hidden or given["head_dim"] == head_dim


def test_a_stacked_projection_is_what_phi3_and_gpt2_attend_with(
    base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, torch.Tensor] = {}

    def caught(_self: Any, query: Any, key: Any, value: Any, *_args: Any, **_kw: Any) -> Any:
        seen.update(q=query, k=key, v=value)
        return query.transpose(1, 2).contiguous(), None

    x = torch.randn(2, 5, 32)
    for family, kv in (("phi3", 2), ("gpt2", 4)):
        path = base(family, kv_heads=kv)
        checkpoint, model = Checkpoint(path), models.load(path)
        source = phi3_source if family == "phi3" else gpt2_source
        monkeypatch.setattr(source, "eager_attention_forward", caught)
        monkeypatch.setattr(phi3_source, "apply_rotary_pos_emb", lambda q, k, *_: (q, k))
        model.config._attn_implementation = "eager"
        attention: Any
        if family == "phi3":
            attention = model.model.layers[1].self_attn
            nothing = (torch.ones(2, 5, 8), torch.zeros(2, 5, 8))
            attention(x, position_embeddings=nothing, attention_mask=None)
            bias: Mapping[Role, torch.Tensor] = {}
        else:
            attention = model.transformer.h[1].attn
            attention(x)
            module = checkpoint.architecture.module("q")
            assert module is not None
            bias = module.split(attention.c_attn.bias.detach(), checkpoint.dims)
        for role, weight in checkpoint.layer(1, ("q", "k", "v")).items():
            ours = x @ weight.T + bias.get(role, torch.zeros(len(weight)))
            heads = ours.reshape(2, 5, -1, 8).transpose(1, 2)
            torch.testing.assert_close(seen[role].detach(), heads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [f for f in models.FAMILIES if "gate" in architectures()[f].roles])
def test_gate_and_up_are_the_ones_of_the_mlp(family: str, base: Callable[..., Path]) -> None:
    """``down(act(gate·x) * up·x)`` with our weights is what the layer's own (shared or dense) MLP gives."""
    checkpoint, model = Checkpoint(base(family)), models.load(base(family))
    x = torch.randn(2, 5, 32)
    for layer in [n for n in range(3) if "gate" in checkpoint.roles(n)]:
        module = next(m for m in checkpoint.modules(layer) if "gate" in m.roles)
        mlp = model.get_submodule(checkpoint.architecture.path(layer, module).rpartition(".")[0])
        if family == "minicpm":
            mlp._forward_hooks.clear()  # its scale of what a block adds
        act = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None) or torch.nn.functional.silu
        w = checkpoint.layer(layer, ("gate", "up", "down"))
        with torch.no_grad():
            ours = (act(x @ w["gate"].T) * (x @ w["up"].T)) @ w["down"].T
            torch.testing.assert_close(mlp(x), ours, rtol=1e-4, atol=1e-4)


def unfused(family: str) -> bool:
    return family not in models.FUSED


@pytest.mark.slow
@pytest.mark.parametrize("family", models.FAMILIES)
def test_an_adapter_moves_into_the_family(
    family: str, base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    """From another family, with another hidden size: dense formulas, PEFT load, forward pass, and again once saved."""
    old, new = base("llama", **SMALLER), base(family, seed=1)
    adapter = lora(old)
    heads = some_heads(LAYERS, 2, 4)
    rank = 9 if family in models.FUSED else 3  # unfused projections have an A each
    if family in models.LATENT:
        with pytest.raises(AdapterError, match=r"the new base has no down projection; .* no gate projection"):
            run(adapter, old, new, LAYERS, heads, rank)
        return
    result = run(adapter, old, new, LAYERS, heads, rank)
    check(result.updates, expected_updates(adapter, old, new, LAYERS, heads))
    target = Checkpoint(new)
    lost = {d["module"] for d in result.dropped}
    assert lost == {
        Checkpoint(old).architecture.path(o, m)
        for o, n in LAYERS.items()
        for m in Checkpoint(old).architecture.modules
        if m.roles[0] not in target.roles(n)
    }

    out = write_adapter(
        tmp_path / "new", result.updates, architecture=target.architecture, dims=target.dims, base=str(new),
        rank=rank, alpha=rank,
    )  # fmt: skip
    check_loads(out, new, trust_remote_code=models.needs_code(new))
    plain = models.load(new)
    with torch.no_grad():
        before = plain(IDS).logits
        tuned = PeftModel.from_pretrained(plain, str(out))
        found = {n.removeprefix("base_model.model.").rpartition(".lora_")[0] for n, _ in tuned.named_parameters()}
        assert found - {""} == set(result.updates)
        after = tuned(IDS).logits
        assert float((after - before).abs().max()) > 1e-3
        tuned.create_or_update_model_card = lambda _folder: None  # a template compiled at each save
        tuned.save_pretrained(tmp_path / "again")
        check_loads(tmp_path / "again", new, trust_remote_code=models.needs_code(new))
        again = models.load_tuned(tmp_path / "again", new)
        torch.testing.assert_close(again(IDS).logits, after, rtol=1e-5, atol=1e-5)
    reread = Adapter.open(tmp_path / "again")
    assert reread.check(target) == []
    for path, update in result.updates.items():
        torch.testing.assert_close(reread.update(path).dense(), update.dense(), rtol=1e-4, atol=1e-5)

    # Loaders object to a family's class at most, or to its Conv1D modules: never to how the adapter is written.
    objections = [problem for served in serving.check(out, new).values() for problem in served.problems]
    assert all("no LoRA support" in p or "not convert" in p or "Conv1D" in p for p in objections), objections
    merged = serving.compare_merged(new, out, trust_remote_code=models.needs_code(new))
    assert merged["peft"].ok and merged["transformers"].ok, merged


@pytest.mark.parametrize("family", models.FAMILIES)
def test_an_adapter_moves_out_of_the_family(family: str, base: Callable[..., Path], lora: Callable[..., Path]) -> None:
    """To another family, with another hidden size, head layout and MLP width."""
    old, new = base(family), base("qwen3", seed=1, **LARGER)
    adapter = lora(old)
    assert Adapter.open(adapter).check(Checkpoint(old)) == []
    heads = some_heads(LAYERS, 4, 8)
    if family in models.LATENT:
        with pytest.raises(AdapterError, match=r"the new base has no mla_kv_a projection; "):
            run(adapter, old, new, LAYERS, heads)
        return
    result = run(adapter, old, new, LAYERS, heads)
    check(result.updates, expected_updates(adapter, old, new, LAYERS, heads))
    assert {d["module"] for d in result.dropped} == without_standard_role(Checkpoint(old), LAYERS)
    assert all(d["why"].startswith("the new base has no ") for d in result.dropped)


def without_standard_role(base: Checkpoint, layers: Mapping[int, int]) -> set[str]:
    """Paths of modules with a role that families of softmax attention do not have."""
    return {base.architecture.path(o, m) for o in layers for m in base.modules(o) if m.own_roles}


@pytest.mark.parametrize("family", ["qwen3", "phi3", "gemma3", "llama4", "gpt2", "opt"])
def test_within_a_family(family: str, base: Callable[..., Path], lora: Callable[..., Path]) -> None:
    """Every layer onto one of the same kind, shapes changed."""
    numbers = {key: value for key, value in LARGER.items() if family not in models.NO_KV_HEADS or "_" not in key}
    old, new = base(family), base(family, seed=1, **numbers)
    layers = {0: 0, 1: 1, 2: 2}
    adapter, heads = lora(old), some_heads(layers, 4, 8)
    result = run(adapter, old, new, layers, heads)
    check(result.updates, expected_updates(adapter, old, new, layers, heads))
    assert result.dropped == [] and set(result.updates) == {
        Checkpoint(new).architecture.path(n, m) for n in layers for m in Checkpoint(new).modules(n)
    }


def test_grouped_heads_in_a_stacked_projection(base: Callable[..., Path], lora: Callable[..., Path]) -> None:
    old, new = base("phi3", kv_heads=2), base("phi3", seed=1, heads=4, kv_heads=1, hidden=40)
    adapter, heads = lora(old), some_heads(LAYERS, 4, 4)
    check(run(adapter, old, new, LAYERS, heads).updates, expected_updates(adapter, old, new, LAYERS, heads))


NOT_MOVED = {
    "qwen3_moe": {"mlp.gate": "router", "mlp.gate_proj": "PEFT takes"},
    "qwen2_moe": {"mlp.gate": "router", "mlp.shared_expert_gate": "single output"},
    "mixtral": {"block_sparse_moe.gate": "router"},
    "llama4_text": {"feed_forward.experts": "are not mapped", "feed_forward.router": "router"},
    "falcon_h1": {"mamba.out_proj": "PEFT adapts no output projection"},
}


@pytest.mark.parametrize("family", NOT_MOVED)
def test_modules_that_no_transform_moves_are_dropped_with_the_reason(
    family: str, base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    model = base(family)
    adapter = tmp_path / "adapter"
    shutil.copytree(lora(model, targets=["q_proj"]), adapter)
    state = load_file(adapter / "adapter_model.safetensors")
    for name in NOT_MOVED[family]:
        for side, shape in (("A", (3, 32)), ("B", (8, 3))):
            state[f"base_model.model.model.layers.0.{name}.lora_{side}.weight"] = torch.ones(shape)
    save_file(state, adapter / "adapter_model.safetensors")
    opened = Adapter.open(adapter)
    assert opened.check(Checkpoint(model)) == []
    heads = {n: {h: h for h in range(4)} for n in range(3)}
    said = {row["module"].partition(".0.")[2]: row["why"] for row in run(adapter, model, model, LAYERS, heads).dropped}
    assert said.keys() == NOT_MOVED[family].keys()
    assert all(why in said[name] for name, why in NOT_MOVED[family].items())
    found = inspect(str(model), str(model), str(adapter), "auto")
    assert not found.problems
    assert all(any(why in notice for notice in found.notices) for why in NOT_MOVED[family].values())


def test_factors_below_experts_that_are_none_of_theirs_are_refused(
    base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    """A parameter of experts whose name the config does not say, a projection that experts lack, a wrong size."""
    model = base("mixtral")
    wrong = {"mlp.experts": (8, 3), "mlp.experts.0.w4": (8, 3), "mlp.experts.7.w1": (48, 3), "mlp.experts.0.w1": (8, 3)}
    for number, (name, shape) in enumerate(wrong.items()):
        adapter = tmp_path / str(number)
        shutil.copytree(lora(model, targets=["q_proj"]), adapter)
        state = load_file(adapter / "adapter_model.safetensors")
        stem = f"base_model.model.model.layers.0.{name}"
        save_file(
            {**state, f"{stem}.lora_A.weight": torch.ones(3, 32), f"{stem}.lora_B.weight": torch.ones(shape)},
            adapter / "adapter_model.safetensors",
        )
        (problem,) = Adapter.open(adapter).check(Checkpoint(model))
        assert f"layers.0.{name} " in str(problem)


def test_a_module_of_another_kind_of_layer_is_refused(base: Callable[..., Path], lora: Callable[..., Path]) -> None:
    """Trained where layer 1 is dense, given a base whose layer 1 is a mixture of experts."""
    adapter = Adapter.open(lora(base("qwen2_moe")))
    problems = adapter.check(Checkpoint(base("qwen2_moe", mlp_only_layers=[])))
    assert len(problems) == 3
    assert all("layers.1.mlp" in str(p) and "layer 1 is of another kind" in str(p) for p in problems)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "glm4_moe", "qwen3_5_moe", "lfm2_moe"])
def test_adapters_of_experts_are_read_one_by_one_and_run_on_their_base(
    family: str, base: Callable[..., Path], tmp_path: Path
) -> None:
    """As PEFT stacks them, and as trainers for transformers 4 save them, with a router's: the same as dense weights."""
    model = base(family, layers=2)
    checkpoint = Checkpoint(model)
    a, last = checkpoint.architecture, 0 if family == "qwen3_moe" else 1  # a layer that has experts
    assert a.experts is not None and checkpoint.experts(last) is not None
    inside = f"{a.layers}.{last}.{a.experts.path}"
    single = experts_one_by_one(model, tmp_path / "single", router=family in ("mixtral", "olmoe"))
    opened = Adapter.open(single)
    assert opened.check(checkpoint) == [] and not is_ready(opened, checkpoint)
    ready = write_ready(opened, checkpoint, tmp_path / "ready", str(model))
    dense = models.load(model)
    stacked = dense.get_submodule(inside)
    with torch.no_grad():
        for path in opened.modules:
            located, change = a.locate_expert(path), opened.update(path).dense().float()
            if located is None:
                dense.get_submodule(path.replace("block_sparse_moe", "mlp")).weight += change
                continue
            layer, number, module = located
            own = dense.get_submodule(f"{a.layers}.{layer}.{a.experts.path}")
            gate, up = own.gate_up_proj[number].chunk(2)
            {"gate": gate, "up": up, "down": own.down_proj[number]}[module.roles[0]].add_(change)
        wanted = dense(IDS).logits
    assert (wanted - models.load(model)(IDS).logits).abs().max() > 0.1
    with attached(models.load(model), ready) as tuned:
        torch.testing.assert_close(tuned(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    again = Adapter.open(ready)
    assert again.check(checkpoint) == [] and is_ready(again, checkpoint)
    with attached(models.load(model), ready) as tuned:
        changes = tuned.get_submodule(f"base_model.model.{inside}").get_delta_weight("default")
    for number in range(checkpoint.expert_count):
        update = again.update(f"{inside}.{number}.down_proj").dense().float()
        torch.testing.assert_close(update, changes[number], rtol=1e-4, atol=1e-5)
    assert stacked.down_proj.shape[0] == checkpoint.expert_count


def test_experts_of_a_dora_are_left_out_of_what_the_old_base_runs_with(
    base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    model = base("mixtral")
    adapter = tmp_path / "dora"
    shutil.copytree(lora(model, targets=["q_proj"], use_dora=True), adapter)
    state = load_file(adapter / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.0.block_sparse_moe.experts.1.w2"
    extra = {"lora_A.weight": (3, 48), "lora_B.weight": (32, 3), "lora_magnitude_vector": (32,)}
    state |= {f"{stem}.{name}": torch.ones(shape) for name, shape in extra.items()}
    save_file(state, adapter / "adapter_model.safetensors")
    opened, checkpoint = Adapter.open(adapter), Checkpoint(model)
    assert opened.check(checkpoint) == [] and "DoRA" in opened.left_out(checkpoint)[0][1]
    with attached(models.load(model), write_ready(opened, checkpoint, tmp_path / "ready", str(model))) as tuned:
        assert tuned(IDS).logits.isfinite().all()


def test_layers_of_another_kind(base: Callable[..., Path], lora: Callable[..., Path]) -> None:
    """Dense to mixture of experts: the shared expert has its own width; without one the MLP is dropped."""
    checkpoint = Checkpoint(base("qwen2_moe"))
    assert [checkpoint.layer_dims(n).intermediate_size for n in range(3)] == [20, 48, 20]
    assert [m.name for m in checkpoint.modules(0)][-1] == "mlp.shared_expert.down_proj"
    assert [m.name for m in checkpoint.modules(1)][-1] == "mlp.down_proj"
    llama4 = Checkpoint(base("llama4"))
    assert [llama4.layer_dims(n).intermediate_size for n in range(3)] == [40, 48, 40]
    new = base("mixtral", seed=1)
    result = run(lora(base("qwen2_moe")), base("qwen2_moe"), new, LAYERS, some_heads(LAYERS, 4, 4))
    assert {path.rpartition(".")[2][0] for path in result.updates} == {"q", "k", "v", "o"}
    assert {d["why"] for d in result.dropped} == {f"the new base has no {r} projection" for r in ("gate", "up", "down")}


def test_unmapped_layers_of_another_kind_start_fresh(base: Callable[..., Path], lora: Callable[..., Path]) -> None:
    old, new = base("llama", layers=2), base("qwen2_moe", seed=1)
    result = run(lora(old), old, new, {0: 0, 1: 2}, some_heads({0: 0, 1: 2}, 4, 4), unmapped="train")
    assert {p.split("layers.")[1] for p in result.fresh} == {
        f"1.{m.name}" for m in Checkpoint(new).modules(1)
    }  # fmt: skip
    B, A = result.fresh["model.layers.1.mlp.down_proj"]
    assert B.shape == (32, 3) and A.shape == (3, 48)


@pytest.mark.parametrize("family", models.MULTIMODAL)
def test_only_the_language_model_is_adapted(
    family: str, base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    """A vision tower has modules of the same names; a fresh adapter of the same kind leaves it alone, too."""
    from peft import get_peft_model

    path = base(family)
    fresh = get_peft_model(models.load(path), fresh_config(fresh_lora(lora(path), Checkpoint(path).architecture)))
    names = {n.removeprefix("base_model.model.").rpartition(".lora_")[0] for n, _ in fresh.named_parameters()} - {""}
    assert names == set(Adapter.open(lora(path)).modules)


def renamed(path: Path, target: Path, change: Callable[[str], str]) -> Path:
    shutil.copytree(path, target)
    state = {change(name): tensor for name, tensor in load_file(target / "model.safetensors").items()}
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("family", "start", "other"),
    [
        ("gpt2", "transformer.", ""),
        ("opt", "model.", ""),
        ("gemma3", "language_model.model.", "model.language_model."),
        ("mistral3", "language_model.model.", "model.language_model."),
        ("llama4", "model.", "language_model.model."),
    ],
)
def test_other_names_on_disk_are_found(
    family: str, start: str, other: str, base: Callable[..., Path], tmp_path: Path
) -> None:
    path = base(family)
    moved = renamed(path, tmp_path / "moved", lambda n: other + n.removeprefix(start) if n.startswith(start) else n)
    a, b = Checkpoint(path), Checkpoint(moved)
    assert set(a.shards) != set(b.shards) and b.check() == []
    assert torch.equal(a.embedding(), b.embedding())
    for role, weight in a.layer(1, a.roles(1)).items():
        assert torch.equal(weight, b.layer(1, b.roles(1))[role])


def test_adapters_of_the_full_multimodal_class_are_read(
    base: Callable[..., Path], lora: Callable[..., Path], tmp_path: Path
) -> None:
    """Llama 4's text model and its multimodal class put the same modules under different names."""
    model, adapter = base("llama4"), tmp_path / "adapter"
    shutil.copytree(lora(model), adapter)
    file = adapter / "adapter_model.safetensors"
    state = {n.replace(".model.model.", ".model.language_model.model."): t for n, t in load_file(file).items()}
    save_file(state, file)
    opened, plain = Adapter.open(adapter), Adapter.open(lora(model))
    assert opened.modules[0].startswith("language_model.model.layers.0")
    assert opened.check(Checkpoint(model)) == []
    new = base("llama", seed=1)
    heads = some_heads(LAYERS, 4, 4)
    ours, theirs = (run(a, model, new, LAYERS, heads) for a in (adapter, plain.path))
    check(ours.updates, {path: update.dense() for path, update in theirs.updates.items()})


@pytest.mark.parametrize("family", ["gemma", "smollm3", "cohere", "gpt2"])
def test_a_config_that_says_nothing_of_ties_is_tied_where_its_class_is(
    family: str, base: Callable[..., Path], tmp_path: Path
) -> None:
    a = architectures()[family]
    swap = {a.embedding + ".weight": a.unembedding + ".weight"}
    moved = renamed(base(family), tmp_path / "moved", lambda n: swap.get(n, n))
    models.edit_json(moved / "config.json", tie_word_embeddings=None)
    config = (moved / "config.json").read_text().replace('"tie_word_embeddings": null', '"unused": null')
    (moved / "config.json").write_text(config)
    assert torch.equal(Checkpoint(moved).embedding(), Checkpoint(base(family)).embedding())
    models.edit_json(moved / "config.json", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match="is missing"):
        Checkpoint(moved).embedding()


def test_a_module_missing_beside_its_siblings_is_named(base: Callable[..., Path], tmp_path: Path) -> None:
    path = renamed(
        base("llama4_text"), tmp_path / "damaged", lambda n: n.replace("1.feed_forward.shared_expert.up_proj", "1.gone")
    )
    problems = Checkpoint(path).check()
    assert [p.what for p in problems] == ["tensor model.layers.1.feed_forward.shared_expert.up_proj.weight is missing"]


def test_a_family_with_its_own_code_needs_leave_to_run_it(base: Callable[..., Path], lora: Callable[..., Path]) -> None:
    path, plain = base("minicpm"), base("llama")
    found = inspect(str(path), str(plain), str(lora(path)))
    assert any("trust" in str(problem) for problem in found.problems)
    assert not inspect(str(path), str(plain), str(lora(path)), trust_remote_code=True).problems
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        load_model(path)
    assert load_model(path, trust_remote_code=True).config.scale_emb == 12


def test_a_model_type_left_to_its_own_code_is_read_from_there(base: Callable[..., Path], tmp_path: Path) -> None:
    """The published MiniCPM-2B configs have no model_type, but name their config module."""
    path = tmp_path / "untyped"
    shutil.copytree(base("minicpm"), path)
    models.edit_json(path / "config.json", model_type=None)
    checkpoint = Checkpoint(path)
    assert checkpoint.architecture.family == "minicpm" and checkpoint.check() == []
    assert any("trust" in str(problem) for problem in inspect(str(path), str(base("llama"))).problems)


def test_a_projected_embedding_is_refused(tmp_path: Path) -> None:
    path = models.build(tmp_path / "narrow", "opt", word_embed_proj_dim=16)
    assert ["projected to the hidden size" in str(p) for p in Checkpoint(path).check()] == [True]


def test_attention_is_in_every_layer_or_all_of_it_is_optional() -> None:
    for architecture in architectures().values():
        holders = [module for module in architecture.modules if set(module.roles) & {"q", "o"}]
        assert len({module.optional for module in holders}) == bool(holders)


def test_the_page_on_architectures_is_in_step() -> None:
    page = (Path(__file__).parents[3] / "docs" / "architectures.md").read_text()
    for schema in (Architecture, Module):
        for name in schema.model_fields:
            assert f"\n| `{name}` |" in page, name
    rows = {line.split("|")[1].strip(" `"): line.split("|")[2] for line in page.splitlines() if line.startswith("| `")}
    for file in BUILT_IN.glob("*.yaml"):
        listed = {name.strip(" `") for name in rows[file.stem].split(",")}
        assert listed == set(load(file).model_types), file.stem
    assert {family.family for family in architectures().values()} == {file.stem for file in BUILT_IN.glob("*.yaml")}
