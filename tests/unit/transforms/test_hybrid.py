"""Bases of which only some layers have attention, and roles that a family names itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorasuite.adapters import Adapter, write_adapter
from lorasuite.bases import ROLES, Architecture, Checkpoint, LoadedBase, load_model
from lorasuite.correspondence import FUNCTIONAL, ORTHOGONAL, AlignedMaps, HeadMaps, TransferMatrix, align, map_heads
from lorasuite.planning import inspect
from lorasuite.transforms import can_move, migrate, transform
from tests import models

Base = Callable[..., Path]
LAYERS = {0: 0, 1: 1, 2: 2}
SOME_HYBRID = ("lfm2", "qwen3_next", "granitemoehybrid")
SOME_OWN = (*SOME_HYBRID, "qwen3_5", "falcon_h1", "gemma3n_text", "gemma4_text", "deepseek_v3")


class Kept:
    """Tensors and info as an artifact keeps them."""

    def __init__(self, tensors: dict[str, torch.Tensor], info: dict[str, object]) -> None:
        self._tensors, self.info = tensors, info

    def keys(self) -> list[str]:
        return list(self._tensors)

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def loaded(path: Path) -> LoadedBase:
    return LoadedBase.of(load_model(path), models.tokenizer_of(path), Checkpoint(path))


@pytest.mark.parametrize("family", SOME_HYBRID)
def test_heads_are_matched_where_both_layers_have_attention(family: str, base: Base, lora: Base) -> None:
    old, new = Checkpoint(base("llama")), Checkpoint(base(family))
    matches = map_heads(old, new, LAYERS, TransferMatrix())
    assert set(matches) == {1} and sorted(matches[1].heads) == [0, 1, 2, 3]
    maps = HeadMaps.matched(matches)
    read = HeadMaps.read(Kept(maps.tensors(), maps.info()))
    assert read.heads == maps.heads and set(read.mean_similarity()) == {"1"}
    assert map_heads(new, old, LAYERS, TransferMatrix()).keys() == {1}


@pytest.mark.parametrize("family", SOME_HYBRID)
def test_attention_is_dropped_with_the_reason_where_one_layer_has_none(family: str, base: Base, lora: Base) -> None:
    old, new = Checkpoint(base("llama")), Checkpoint(base(family, seed=1))
    adapter = Adapter.open(lora(old.path, targets=models.LLAMA_TARGETS[:4]))
    heads = {o: match.heads for o, match in map_heads(old, new, LAYERS, TransferMatrix()).items()}
    result = migrate(
        adapter, old, new, method="lorasuite", layers=LAYERS, heads=heads, transfer=TransferMatrix(),
        mlp_factor=lambda *_: torch.eye(32), rank=3,
    )  # fmt: skip
    assert {path.split(".")[2] for path in result.updates} == {"1"} and len(result.updates) == 4
    assert len(result.dropped) == 8
    for row in result.dropped:
        layer = row["module"].split(".")[2]
        assert layer in "02" and row["why"].startswith(f"layer {layer} of the new base has no ")
    notices = [n for n in inspect(str(old.path), str(new.path), str(adapter.path)).notices if "layers of the new" in n]
    assert notices and notices[0].startswith("q, k, v, o: in 1 of 3 layers of the new base")


def test_a_transform_that_reads_heads_drops_attention_whose_layers_are_not_matched(base: Base, lora: Base) -> None:
    old, new = Checkpoint(base("llama")), Checkpoint(base("llama", seed=1))
    adapter = Adapter.open(lora(old.path, targets=["q_proj", "down_proj"]))
    result = migrate(
        adapter, old, new, method="lorasuite", layers={0: 0}, heads={}, transfer=TransferMatrix(),
        mlp_factor=lambda *_: torch.eye(32, dtype=torch.float64), rank=3,
    )  # fmt: skip
    assert list(result.updates) == ["model.layers.0.mlp.down_proj"]
    assert any("no heads are matched" in row["why"] for row in result.dropped)


@pytest.mark.parametrize("family", SOME_OWN)
def test_roles_of_a_family_s_own_move_by_maps_of_what_they_read_and_write(
    family: str, base: Base, lora: Base, tmp_path: Path
) -> None:
    """Between two bases of the family; the paper's rules are for softmax attention and the MLP, and say so."""
    paths = base(family), base(family, seed=1)
    old, new = map(Checkpoint, paths)
    adapter = Adapter.open(lora(paths[0]))
    roles = adapter.roles(old.architecture)
    own = {role for role in roles if role not in ROLES}
    assert own == {role for role in old.every_role if role not in ROLES} and own
    texts = [" ".join(f"w{(7 * n + k) % 90}" for k in range(12)) for n in range(12)]
    kinds = {"in": [FUNCTIONAL, ORTHOGONAL], "out": [ORTHOGONAL]}
    found, info = align(loaded(paths[0]), loaded(paths[1]), LAYERS, roles, texts, kinds)
    maps = AlignedMaps([Kept(dict(found), info)])
    for method in ("procrustes", "functional"):
        result = migrate(
            adapter, old, new, method=method, layers=LAYERS, heads={}, transfer=TransferMatrix(),
            mlp_factor=lambda *_: torch.eye(32), alignment=maps, rank=9,
        )  # fmt: skip
        assert not result.dropped and set(result.updates) == set(adapter.modules)
        assert all(update.norm() > 0 for update in result.updates.values())
    output = write_adapter(
        tmp_path / "new", result.updates, architecture=new.architecture, dims=new.dims, base=str(paths[1]), rank=9,
        alpha=9,
    )  # fmt: skip
    assert models.load_tuned(output, paths[1])(torch.tensor([[5, 6, 7]])).logits.isfinite().all()

    table = inspect(*map(str, paths), str(adapter.path), method="lorasuite").modules
    assert {row["role"] for row in table if not row["moves"]} == own
    assert can_move(transform("procrustes"), "conv_in") and not can_move(transform("lorasuite"), "conv_in")
    if family in models.LATENT:
        return
    heads = {n: {n: n for n in range(4)} for n in range(3)}
    moved = migrate(
        adapter, old, new, method="lorasuite", layers=LAYERS, heads=heads, transfer=TransferMatrix(),
        mlp_factor=lambda *_: torch.eye(32, dtype=torch.float64), rank=3,
    )  # fmt: skip
    said = {row["why"] for row in moved.dropped}
    assert said == {f"lorasuite has no rule for {role} projections" for role in own}


def test_sizes_of_own_roles_are_those_of_the_weights(base: Base) -> None:
    checkpoint = Checkpoint(base("qwen3_next"))
    attention, linear = checkpoint.layer_dims(1), checkpoint.layer_dims(0)
    assert attention.rows("attention_gate") == 48 and attention.columns("attention_gate") == 32
    assert (linear.rows("linear_qkvz"), linear.columns("linear_o")) == (2 * 12 + 2 * 40, 40)
    assert checkpoint.roles(0) == ("linear_qkvz", "linear_ba", "linear_o")
    assert checkpoint.roles(1) == ("q", "k", "v", "o", "attention_gate")
    assert {name for name, *_ in checkpoint.sizes.own} == set(checkpoint.architecture.own_roles)


def test_layers_with_wider_heads_and_with_the_keys_and_values_of_others(base: Base, lora: Base) -> None:
    """Gemma 4's full-attention layers, and its layers that reuse keys and values."""
    path = base("gemma4_text", layers=4, global_head_dim=20, num_kv_shared_layers=2, use_double_wide_mlp=True)
    checkpoint = Checkpoint(path)
    assert checkpoint.check() == []
    assert [checkpoint.layer_dims(n).head_dim for n in range(4)] == [20, 16, 20, 20]
    assert [checkpoint.layer_dims(n).intermediate_size for n in range(4)] == [48, 48, 96, 96]
    assert ["k" in checkpoint.roles(n) for n in range(4)] == [True, True, False, False]
    old = Checkpoint(base("llama", layers=4))
    matches = map_heads(old, checkpoint, {n: n for n in range(4)}, TransferMatrix())
    assert set(matches) == {0, 1}
    result = migrate(
        Adapter.open(lora(old.path)), old, checkpoint, method="lorasuite", layers={n: n for n in range(4)},
        heads={o: match.heads for o, match in matches.items()}, transfer=TransferMatrix(),
        mlp_factor=lambda *_: torch.eye(32, dtype=torch.float64), rank=3,
    )  # fmt: skip
    assert result.updates["model.layers.0.self_attn.q_proj"].shape == (80, 32)
    assert result.updates["model.layers.2.mlp.down_proj"].shape == (32, 96)
    lost = {row["module"].split(".", 2)[2]: row["why"] for row in result.dropped}
    assert "layer 2 of the new base has no k projection" in lost["2.self_attn.k_proj"]
    assert "no heads are matched" in lost["2.self_attn.q_proj"]

    shared = Checkpoint(base("gemma4_text", attention_k_eq_v=True))
    assert shared.check() == [] and "v" not in shared.roles(0) and "v" in shared.roles(1)


def test_a_width_that_the_config_does_not_tell_is_read_from_the_weights(base: Base) -> None:
    path = base("lfm2", block_auto_adjust_ff_dim=True, block_multiple_of=8)
    checkpoint = Checkpoint(path)
    assert checkpoint.config["intermediate_size"] == 48 and checkpoint.dims.intermediate_size == 32
    assert checkpoint.check() == []


def test_a_query_and_its_gate_are_told_apart_head_by_head(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers calls the query of each head is our q, and the other half the gate."""
    import transformers.models.qwen3_next.modeling_qwen3_next as source

    checkpoint, model = Checkpoint(base("qwen3_next")), models.load(base("qwen3_next"))
    attention = model.model.layers[1].self_attn
    seen: dict[str, torch.Tensor] = {}

    def caught(_self: object, query: torch.Tensor, *_args: object, **_kw: object) -> tuple[torch.Tensor, None]:
        seen["q"] = query
        return torch.ones_like(query.transpose(1, 2)), None

    monkeypatch.setattr(source, "eager_attention_forward", caught)
    monkeypatch.setattr(source, "apply_rotary_pos_emb", lambda q, k, *_: (q, k))
    monkeypatch.setattr(type(attention.q_norm), "forward", lambda _self, value: value)
    model.config._attn_implementation = "eager"
    attention.o_proj.weight.data = torch.eye(48)[:32].contiguous()
    x = torch.randn(1, 5, 32)
    written = attention(x, position_embeddings=(torch.ones(1, 5, 12), torch.zeros(1, 5, 12)), attention_mask=None)[0]
    weights = checkpoint.layer(1, ("q", "attention_gate"))
    torch.testing.assert_close(seen["q"].transpose(1, 2).reshape(1, 5, 48), x @ weights["q"].T)
    torch.testing.assert_close(written, torch.sigmoid(x @ weights["attention_gate"].T)[..., :32])


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ([{"name": "x", "roles": ["state"]}], "neither q, k, v"),
        ([{"name": "x", "roles": ["query"]}], "own_roles"),
        ([{"name": "x", "roles": ["state", "other"], "layout": "stacked"}], "both no standard roles"),
    ],
)
def test_a_role_that_nothing_names_is_refused(modules: list[dict[str, object]], said: str, base: Base) -> None:
    known = Checkpoint(base("llama")).architecture.model_dump()
    with pytest.raises(ValueError, match=said):
        Architecture.model_validate({**known, "modules": modules})
    named = (
        Architecture.model_validate({**known, "modules": modules[:1], "own_roles": {"state": "?", "query": "?"}})
        if len(modules[0]["roles"]) == 1
        else None
    )  # type: ignore[arg-type]
    assert named is None or named.roles == tuple(modules[0]["roles"])  # type: ignore[arg-type]
