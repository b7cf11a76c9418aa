"""METHOD sections 2-5 written straight from the formulas: dense, float64, explicit loops, nothing of the library.

Slow and memory-hungry on purpose. A disagreement with the library is a fault of one of the two.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

QKV = ("q", "k", "v")


LLAMA = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
DENSE_MLP = {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}


def under(parent: str) -> dict[str, str]:
    return {role: f"{parent}.{role}_proj" for role in ("gate", "up", "down")}


#: Model type → the module that holds each role (two roles joined by a space: their rows one after the other; "qkv":
#: head by head), as the transformers source has them. Several entries: layers differ, and the tensors say which.
BLOCKS: dict[str, list[dict[str, str]]] = {
    "gpt_neox": [{"qkv": "attention.query_key_value", "o": "attention.dense", **DENSE_MLP}],
    "bloom": [{"qkv": "self_attention.query_key_value", "o": "self_attention.dense", **DENSE_MLP}],
    **{family: [{role: LLAMA[role] for role in "qkvo"}] for family in ("mixtral", "qwen3_moe")},
    "qwen2_moe": [LLAMA, {**LLAMA, **under("mlp.shared_expert")}],
    "llama4_text": [{**LLAMA, **under("feed_forward")}, {**LLAMA, **under("feed_forward.shared_expert")}],
    "phi": [{**{r: LLAMA[r] for r in "qkv"}, "o": "self_attn.dense", "up": "mlp.fc1", "down": "mlp.fc2"}],
    "phi3": [
        {"q k v": "self_attn.qkv_proj", "o": "self_attn.o_proj", "gate up": "mlp.gate_up_proj", "down": "mlp.down_proj"}
    ],
    "gpt2": [{"q k v": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}],
    "opt": [{**{r: LLAMA[r] for r in "qkv"}, "o": "self_attn.out_proj", "up": "fc1", "down": "fc2"}],
}
LINEAR = {
    "linear_qkvz": "linear_attn.in_proj_qkvz",
    "linear_ba": "linear_attn.in_proj_ba",
    "linear_o": "linear_attn.out_proj",
}
BLOCKS["lfm2"] = [
    {**{r: LLAMA[r] for r in "qkv"}, "o": "self_attn.out_proj"},
    {"conv_in": "conv.in_proj", "conv_out": "conv.out_proj"},
    {"gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2"},
]
BLOCKS["qwen3_next"] = [
    {"q/attention_gate": LLAMA["q"], **{r: LLAMA[r] for r in "kvo"}},
    LINEAR,
]
STATE = {"mamba_in": "mamba.in_proj", "mamba_out": "mamba.out_proj"}
GATED = {"q/attention_gate": LLAMA["q"], **{r: LLAMA[r] for r in "kvo"}}
DELTA = {f"linear_{name}": f"linear_attn.in_proj_{name}" for name in ("qkv", "z", "b", "a")}
DELTA["linear_o"] = "linear_attn.out_proj"
SWIGLU = {"gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2"}
LAYER_INPUT = {"per_layer_gate": "per_layer_input_gate", "per_layer_out": "per_layer_projection"}
LAUREL = {"laurel_in": "laurel.linear_left", "laurel_out": "laurel.linear_right"}
MLA = {f"mla_{name}": f"self_attn.{name}_proj" for name in ("q", "q_a", "q_b", "kv_b", "o")}
MLA["mla_kv_a"] = "self_attn.kv_a_proj_with_mqa"
BLOCKS |= {
    "lfm2_moe": BLOCKS["lfm2"],
    **{key: [GATED, DELTA, {r: LLAMA[r] for r in ("gate", "up", "down")}] for key in ("qwen3_5", "qwen3_5_text")},
    **{key: [GATED, DELTA, under("mlp.shared_expert")] for key in ("qwen3_5_moe", "qwen3_5_moe_text")},
    **{
        key: [{r: LLAMA[r] for r in "qkvo"}]
        for key in ("gpt_oss", "glm4_moe", "ernie4_5_moe", "exaone_moe", "hunyuan_v1_moe", "olmoe")
    },
    **{
        key: [{**{r: LLAMA[r] for r in "qkvo"}, "gate up": "mlp.gate_up_proj", "down": "mlp.down_proj"}]
        for key in ("glm", "glm4")
    },
    "gemma3n_text": [{**LLAMA, **LAYER_INPUT, **LAUREL}],
    **{key: [{**LLAMA, **LAYER_INPUT}] for key in ("gemma4", "gemma4_text")},
    "granitemoehybrid": [
        {r: LLAMA[r] for r in "qkvo"},
        STATE,
        {"gate up": "shared_mlp.input_linear", "down": "shared_mlp.output_linear"},
    ],
    "falcon_h1": [{**LLAMA, **under("feed_forward"), "mamba_in": "mamba.in_proj"}],
    **{key: [MLA] for key in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")},
}
BLOCKS["llama4"] = BLOCKS["llama4_text"]
#: Model type → where PEFT finds the blocks, and where they and the embedding are on disk; the others are as Llama.
PLACES: dict[str, tuple[str, str, str]] = {
    "gpt_neox": ("gpt_neox.layers", "gpt_neox.layers", "gpt_neox.embed_in"),
    "bloom": ("transformer.h", "transformer.h", "transformer.word_embeddings"),
    "gpt2": ("transformer.h", "transformer.h", "transformer.wte"),
    "opt": ("model.decoder.layers", "model.decoder.layers", "model.decoder.embed_tokens"),
    **dict.fromkeys(
        ("gemma3", "mistral3"),
        ("model.language_model.layers", "language_model.model.layers", "language_model.model.embed_tokens"),
    ),
    **dict.fromkeys(
        ("qwen3_vl", "gemma4", "gemma4_unified"),
        ("model.language_model.layers", "model.language_model.layers", "model.language_model.embed_tokens"),
    ),
}
#: What the embedding's rows are multiplied with before the first block.
SCALES = {
    **dict.fromkeys(
        (
            "gemma",
            "gemma2",
            "gemma3_text",
            "gemma3",
            "gemma3n_text",
            "gemma4",
            "gemma4_text",
            "gemma4_unified",
            "gemma4_unified_text",
        ),
        lambda c: math.sqrt(c["hidden_size"]),
    ),
    **dict.fromkeys(("granite", "granitemoehybrid", "falcon_h1"), lambda c: c["embedding_multiplier"]),
    "minicpm": lambda c: c["scale_emb"],
}


@dataclass
class Dense:
    """A whole model in memory: every block's weights by role, float64, fused ones taken apart."""

    family: str
    d: int
    H: int
    K: int
    e: int
    E: Tensor
    layers: list[dict[str, Tensor]]
    names: list[dict[str, str]]

    def path(self, layer: int, name: str) -> str:
        return f"{PLACES.get(self.family, ('model.layers',))[0]}.{layer}.{name}"

    def cut(self, group: str, rows: Tensor) -> dict[str, Tensor]:
        """A module's rows as one matrix a role."""
        if group == "qkv":
            return cut_fused(rows, self.H, self.e)
        if "/" in group:
            return cut_fused(rows, self.H, self.e, group.split("/"))
        roles = group.split()
        width = {"q": self.H * self.e, "k": self.K * self.e, "v": self.K * self.e}
        found, start = {}, 0
        for role in roles:
            size = width.get(role, len(rows) // len(roles)) if len(roles) > 1 else len(rows)
            found[role] = rows[start : start + size]
            start += size
        assert start == len(rows)
        return found


def cut_fused(rows: Tensor, H: int, e: int, roles: Sequence[str] = QKV) -> dict[str, Tensor]:
    """GPTNeoX and Bloom: for each head its q, then its k, then its v rows."""
    parts: dict[str, list[Tensor]] = {role: [] for role in roles}
    for a in range(H):
        for n, role in enumerate(roles):
            start = (len(roles) * a + n) * e
            parts[role].append(rows[start : start + e])
    return {role: torch.cat(blocks) for role, blocks in parts.items()}


def join_fused(parts: dict[str, Tensor], H: int, e: int, roles: Sequence[str] = QKV) -> Tensor:
    return torch.cat([parts[role][a * e : (a + 1) * e] for a in range(H) for role in roles])


def first(config: dict[str, Any], *keys: str) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), None)


def read(path: Path) -> Dense:
    """A model directory, from its raw tensors."""
    config = json.loads((path / "config.json").read_text())
    state: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        state.update({name: tensor.double() for name, tensor in load_file(file).items()})
    family = config["model_type"]
    config.update(config.get("text_config", {}))
    d, H = first(config, "hidden_size", "n_embd"), first(config, "num_attention_heads", "n_head")
    K = config["num_key_value_heads"] if family not in ("gpt_neox", "bloom", "gpt2", "opt") else H
    _, root, embedding = PLACES.get(family, ("", "model.layers", "model.embed_tokens"))
    E = state[embedding + ".weight"] * SCALES.get(family, lambda _: 1.0)(config)
    model = Dense(family, d, H, K, first(config, "head_dim") or d // H, E, [], [])
    for n in range(first(config, "num_hidden_layers", "n_layer")):
        names: dict[str, str] = {}
        for kind in BLOCKS.get(family, [LLAMA]):
            names.update({group: name for group, name in kind.items() if f"{root}.{n}.{name}.weight" in state})
        block: dict[str, Tensor] = {}
        for group, name in names.items():
            weight = state[f"{root}.{n}.{name}.weight"]
            block.update(model.cut(group, weight.T if family == "gpt2" else weight))
        model.layers.append(block)
        model.names.append(names)
    return model


def take_apart(deltas: dict[str, Tensor], model: Dense) -> dict[int, dict[str, Tensor]]:
    """Module path → ΔW to layer → role → ΔW."""
    found: dict[int, dict[str, Tensor]] = {}
    left = dict(deltas)
    for layer, names in enumerate(model.names):
        for group, name in names.items():
            delta = left.pop(model.path(layer, name), None)
            if delta is not None:
                found.setdefault(layer, {}).update(model.cut(group, delta))
    assert not left, sorted(left)
    return found


def put_together(updates: dict[int, dict[str, Tensor]], model: Dense) -> dict[str, Tensor]:
    """Layer → role → ΔW to module path → ΔW; missing roles of a fused module are zero, roles without a home vanish."""
    found: dict[str, Tensor] = {}
    for layer, deltas in updates.items():
        for group, name in model.names[layer].items():
            roles = QKV if group == "qkv" else group.replace("/", " ").split()
            if not set(roles) & set(deltas):
                continue
            parts = {r: deltas.get(r, torch.zeros_like(model.layers[layer][r])) for r in roles}
            headed = group == "qkv" or "/" in group
            whole = join_fused(parts, model.H, model.e, roles) if headed else torch.cat([parts[r] for r in roles])
            found[model.path(layer, name)] = whole
    return found


def transfer(E_o: Tensor, E_n: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    """``W_h = pinv(E_o[common]) · E_n[common]``."""
    rows_o = torch.stack([E_o[a] for a, _ in pairs])
    rows_n = torch.stack([E_n[b] for _, b in pairs])
    return torch.linalg.pinv(rows_o) @ rows_n


def hidden_map(old: Dense, new: Dense) -> Tensor:
    """``W_h`` of two models of one vocabulary; the identity where the hidden sizes agree."""
    if old.d == new.d:
        return torch.eye(old.d, dtype=torch.float64)
    rows = min(len(old.E), len(new.E))
    return transfer(old.E, new.E, [(n, n) for n in range(rows)])


def repeat(weight: Tensor, stored: int, heads: int) -> list[Tensor]:
    """One ``(e, …)`` block a query head: stored key/value heads repeated as the forward pass does."""
    e = weight.shape[0] // stored
    blocks = [weight[g * e : (g + 1) * e] for g in range(stored)]
    return [blocks[g] for g in range(stored) for _ in range(heads // stored)]


def average(blocks: list[Tensor], stored: int) -> Tensor:
    """The inverse: each group's mean."""
    group = len(blocks) // stored
    means = []
    for g in range(stored):
        total = torch.zeros_like(blocks[0])
        for b in range(g * group, (g + 1) * group):
            total = total + blocks[b]
        means.append(total / group)
    return torch.cat(means)


def head_matrices(w: dict[str, Tensor], m: Dense) -> list[tuple[Tensor, Tensor]]:
    """``QK = QᵀK`` and ``VO = VᵀOᵀ``, ``(d, d)`` each, for every query head."""
    Q, K, V = repeat(w["q"], m.H, m.H), repeat(w["k"], m.K, m.H), repeat(w["v"], m.K, m.H)
    found = []
    for a in range(m.H):
        O = w["o"][:, a * m.e : (a + 1) * m.e]  # noqa: E741 - the paper's letter
        found.append((Q[a].T @ K[a], V[a].T @ O.T))
    return found


def head_similarity(old_w: dict[str, Tensor], new_w: dict[str, Tensor], old: Dense, new: Dense, W: Tensor) -> Tensor:
    """Cosine of ``[vec QK ; vec VO]``."""
    table = torch.zeros(old.H, new.H, dtype=torch.float64)
    theirs = head_matrices(new_w, new)
    for a, (qk, vo) in enumerate(head_matrices(old_w, old)):
        x = torch.cat([(W.T @ qk @ W).flatten(), (W.T @ vo @ W).flatten()])
        for b, (qk_n, vo_n) in enumerate(theirs):
            y = torch.cat([qk_n.flatten(), vo_n.flatten()])
            table[a, b] = x @ y / (x.norm() * y.norm())
    return table


def best_heads(table: Tensor) -> tuple[float, set[frozenset[tuple[int, int]]]]:
    """Brute force over every one-to-one assignment: the best total, and all assignments within rounding of it."""
    H_o, H_n = table.shape
    if H_o > H_n:
        value, found = best_heads(table.T)
        return value, {frozenset((b, a) for a, b in one) for one in found}
    totals = {
        frozenset(enumerate(columns)): sum(float(table[a, b]) for a, b in enumerate(columns))
        for columns in itertools.permutations(range(H_n), H_o)
    }
    best = max(totals.values())
    return best, {pairs for pairs, total in totals.items() if total > best - 1e-9}


def move(
    delta: dict[str, Tensor],
    old_w: dict[str, Tensor],
    new_w: dict[str, Tensor],
    old: Dense,
    new: Dense,
    heads: dict[int, int],
    W: Tensor,
) -> dict[str, Tensor]:
    """Equation 3 and the MLP rules for one layer: role → dense ΔW of the new model."""
    moved: dict[str, Tensor] = {}
    for role in QKV:
        if role not in delta or role not in new_w:
            continue
        stored_o, stored_n = (old.H, new.H) if role == "q" else (old.K, new.K)
        P_o, dP_o = repeat(old_w[role], stored_o, old.H), repeat(delta[role], stored_o, old.H)
        P_n = repeat(new_w[role], stored_n, new.H)
        blocks = [torch.zeros(new.e, new.d, dtype=torch.float64) for _ in range(new.H)]
        for a, b in heads.items():
            blocks[b] = (P_n[b] @ W.T @ P_o[a].T) @ dP_o[a] @ W
        moved[role] = average(blocks, stored_n)
    if "o" in delta and "o" in new_w:
        dO = torch.zeros(new.d, new.H * new.e, dtype=torch.float64)
        for a, b in heads.items():
            at_o, at_n = slice(a * old.e, (a + 1) * old.e), slice(b * new.e, (b + 1) * new.e)
            dO[:, at_n] = W.T @ delta["o"][:, at_o] @ (old_w["o"][:, at_o].T @ W @ new_w["o"][:, at_n])
        moved["o"] = dO
    back = torch.linalg.pinv(W)
    for role in ("gate", "up"):
        if role in delta and role in new_w:
            moved[role] = new_w[role] @ back @ torch.linalg.pinv(old_w[role]) @ delta[role] @ W
    if "down" in delta and "down" in new_w:
        moved["down"] = back @ delta["down"] @ torch.linalg.pinv(old_w["down"]) @ W @ new_w["down"]
    return moved


def cut(delta: Tensor, rank: int) -> Tensor:
    """The dense truncated SVD."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]


def hsic1(X: Tensor, Y: Tensor) -> float:
    """HSIC₁ of features ``(n, d)`` and ``(n, d')`` with linear kernels, from the formula."""
    n = X.shape[0]
    K, L = X.double() @ X.double().T, Y.double() @ Y.double().T
    K, L = K - torch.diag(torch.diag(K)), L - torch.diag(torch.diag(L))
    one = torch.ones(n, 1, dtype=torch.float64)
    first = torch.trace(K @ L)
    second = (one.T @ K @ one) * (one.T @ L @ one) / ((n - 1) * (n - 2))
    third = 2 / (n - 2) * (one.T @ K @ L @ one)
    return float((first + second - third) / (n * (n - 3)))


def cka(old: Tensor, new: Tensor, batches: list[slice]) -> Tensor:
    """``(L_o, N, d_o)`` and ``(L_n, N, d_n)`` to ``(L_o, L_n)``: sums over the batches, one pair at a time."""
    table = torch.zeros(len(old), len(new), dtype=torch.float64)
    for i, x in enumerate(old):
        for j, y in enumerate(new):
            cross = sum(hsic1(x[b], y[b]) for b in batches)
            k, l = sum(hsic1(x[b], x[b]) for b in batches), sum(hsic1(y[b], y[b]) for b in batches)  # noqa: E741
            table[i, j] = cross / (math.sqrt(k) * math.sqrt(l))
    return table


def best_layers(S: Tensor, offset: int | None = None) -> tuple[float, list[dict[int, int]]]:
    """Every increasing map of the shorter side with ``k ≤ j ≤ k + Δ``: the best sum and the maps that reach it."""
    if S.shape[0] > S.shape[1]:
        value, maps = best_layers(S.T, offset)
        return value, [{j: k for k, j in one.items()} for one in maps]
    short, long = S.shape
    slack = long - short if offset is None else offset
    sums = [
        (sum(float(S[k, j]) for k, j in enumerate(path)), dict(enumerate(path)))
        for path in itertools.combinations(range(long), short)
        if all(k <= j <= k + slack for k, j in enumerate(path))
    ]
    best = max(value for value, _ in sums)
    return best, [one for value, one in sums if value > best - 1e-9]
