"""A first draft of an architecture file for a family nobody described yet, from its config and tensor shapes."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

Shape = tuple[int, ...]

STANDARD = ("q", "k", "v", "o", "gate", "up", "down")

#: Config keys each number is found under in known families.
KEYS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size", "padded_vocab_size", "n_vocab"),
    "hidden_size": ("hidden_size", "n_embd", "n_embed", "d_model", "model_dim", "dim"),
    "intermediate_size": ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "kv_heads": ("num_key_value_heads", "multi_query_group_num", "num_kv_heads", "n_kv_heads", "n_head_kv"),
    "head_dim": ("head_dim", "kv_channels", "head_size"),
}

#: The last part of a module's name → the roles it usually has. Which of them it has here, shapes decide.
NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"query_key_value|qkv(_proj)?|w_?qkv|c_attn|in_proj|qkv_lin", ("q", "k", "v")),
    (r"gate_up(_proj)?|gate_and_up_proj|w_?12|fc1_gate|up_gate_proj|input_linear", ("gate", "up")),
    (r"q(_proj|_lin)?|query(_proj)?|wq|to_q", ("q",)),
    (r"k(_proj|_lin)?|key(_proj)?|wk|to_k", ("k",)),
    (r"v(_proj|_lin)?|value(_proj)?|wv|to_v", ("v",)),
    (r"gate(_proj)?|w1|wi_0|w_gate", ("gate",)),
    (r"up(_proj)?|w3|wi_1|w_up|fc1|fc_in|c_fc|dense_h_to_4h|linear_1", ("up",)),
    (r"down(_proj)?|w2|wo_mlp|w_down|fc2|fc_out|dense_4h_to_h|linear_2|output_linear", ("down",)),
)
ATTENTION = re.compile(r"att|^mixer\.|temporal_block")
#: Parents of the projections of linear attention, state spaces and convolutions, which are no attention's.
RECURRENT = re.compile(r"(^|\.)(linear_att\w*|\w*mamba\w*|conv|short_conv|ssm|\w*delta\w*|rwkv\w*|\w*recurrent\w*)\.")
#: The projections of multi-head latent attention, by the beginning of their names.
LATENT = re.compile(r".*\.((?:q|kv)_[ab]|q|o)_proj")
OUTPUT = re.compile(r"(o|out|c|output|wo|out_lin|dense|proj)(_proj)?")
EXPERTS, ROUTER = "experts", "router"  # of REASONS in the module of architectures


@dataclass(frozen=True)
class Proposal:
    """A draft of an architecture file, and what its author has to answer before trusting it."""

    data: dict[str, Any]
    questions: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The draft as YAML, questions as comments at the top."""
        lines = ["# Proposed from the checkpoint's names and shapes. Answer before use:"] if self.questions else []
        lines += [f"#  - {question}" for question in self.questions]
        body = yaml.safe_dump(self.data, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
        return "\n".join([*lines, body])


def propose(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Proposal:
    """Draft an architecture file for an unknown family.

    Args:
        config: the model's ``config.json``.
        shapes: tensor name → shape, of every tensor of the checkpoint.

    Returns:
        a draft with every field that names and shapes give away, and open questions in plain words. What cannot be
        told is left out or guessed, and asked; the draft need not be valid.
    """
    questions: list[str] = []
    nested = next(
        (k for k, v in config.items() if "text" in k and isinstance(v, Mapping) and _key(v, "hidden_size")), ""
    )
    settings: dict[str, Any] = {**config, **(config[nested] if nested else {})}
    weights = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") or len(shape) == 3  # experts of a layer in one parameter
    }
    data: dict[str, Any] = {
        "family": re.sub(r"\W", "_", str(config.get("model_type") or "new_family")),
        "model_types": [str(config.get("model_type") or "new_family")],
    }
    if not config.get("model_type"):
        questions.append("The config has no model_type: which one is it?")
    numbers = _numbers(settings)
    data["config"] = {}
    for name, keys in KEYS.items():
        found = [key for key in keys if key in settings]
        if name == "kv_heads" and numbers.get("heads"):
            found += [key for key in KEYS["heads"] if key in settings]  # absent means one for every query head
        if not found and name not in ("intermediate_size", "head_dim"):
            questions.append(f"Which config key holds {name}? None of {', '.join(keys)} is there.")
        data["config"][name] = found or [keys[0]]
    if nested:
        data["text_config"] = nested
        questions.append("Names are those on disk: does the model that transformers builds have the same ones?")

    stack, layers = _layers(weights)
    if not stack:
        questions.append("No stack of numbered layers was found: what is the prefix of the blocks?")
    outside = {n: s for n, s in weights.items() if len(s) == 2 and not (stack and n.startswith(stack + "."))}
    embedding, unembedding = _embeddings(outside, numbers.get("vocab_size"), questions)
    if embedding and "hidden_size" not in numbers:
        numbers["hidden_size"] = outside[embedding][1]
    if embedding and not unembedding:
        data["defaults"] = {"tie_word_embeddings": True}
    data["embedding"] = embedding or "model.embed_tokens"
    multiplier = next((k for k in settings if re.search(r"emb.*(multiplier|scale)|scale_emb", k)), None)
    if multiplier:
        data["embedding_scale"] = [multiplier]
        questions.append(f"Are the embedding's rows multiplied with {multiplier} before the first block?")
    data["unembedding"] = unembedding or "lm_head"
    data["layers"] = stack or "model.layers"
    modules, refused = _modules(layers, numbers, questions)
    _own_widths(modules, layers, numbers, settings, questions)
    if own := [role for entry in modules for role in entry["roles"] if role not in STANDARD]:
        data["own_roles"] = dict.fromkeys(own, "?")
    data["modules"] = modules
    if refused:
        data["refused"] = refused
    if "intermediate_size" not in numbers:
        _ask_width(data, layers, numbers, questions)
    if "head_dim" not in numbers and numbers.get("hidden_size") and numbers.get("heads"):
        questions.append("The config gives no head_dim: is it hidden size / heads?")
    return Proposal(data, questions)


def _key(settings: Mapping[str, Any], name: str) -> str | None:
    return next((key for key in KEYS[name] if isinstance(settings.get(key), int)), None)


def _numbers(settings: Mapping[str, Any]) -> dict[str, int]:
    """The numbers the config gives under a known key."""
    return {name: settings[key] for name in KEYS if (key := _key(settings, name)) is not None and settings[key] > 0}


def _layers(weights: Mapping[str, Shape]) -> tuple[str, dict[str, dict[int, Shape]]]:
    """The prefix of the heaviest numbered stack, and of it ``{name below the layer: {layer: shape}}``."""
    size: Counter[str] = Counter()
    stacks: dict[str, dict[str, dict[int, Shape]]] = defaultdict(lambda: defaultdict(dict))
    for name, shape in weights.items():
        match = re.match(r"(.+?)\.(\d+)\.(.+)", name)
        if match and len(shape) in (2, 3):
            volume = 1
            for side in shape:
                volume *= side
            size[match[1]] += volume
            stacks[match[1]][match[3]][int(match[2])] = shape
    # a vision tower may be the heavier one in a small model: names go before weight
    ranked = sorted(size, key=lambda p: (bool(re.search(r"vision|visual|image|audio|encoder", p)), -size[p]))
    return (ranked[0], dict(stacks[ranked[0]])) if ranked else ("", {})


def _embeddings(outside: Mapping[str, Shape], vocab: int | None, questions: list[str]) -> tuple[str, str]:
    """Module names of the input and the output embedding; empty where none was found."""
    tables = [
        n for n, s in outside.items() if (s[0] == vocab if vocab else s[0] == max(x[0] for x in outside.values()))
    ]
    outputs = [n for n in tables if re.search(r"(^|\.)(lm_head|embed_out|output|output_layer|head|unembed)$", n)]
    inputs = [n for n in tables if n not in outputs]
    if not inputs:
        questions.append("Which tensor is the input embedding? None has as many rows as the vocabulary.")
    if len(inputs) > 1:
        questions.append(f"Which of {', '.join(sorted(inputs))} is the input embedding? The first is taken.")
    if inputs and not outputs:
        questions.append("No output embedding is stored: is it tied to the input embedding, and called lm_head?")
    return (sorted(inputs)[0] if inputs else "", outputs[0] if outputs else "")


def _roles(name: str) -> tuple[str, ...]:
    leaf = name.rsplit(".", 1)[-1].lower()
    attention = bool(ATTENTION.search(name.lower()))
    for pattern, roles in NAMES:
        if re.fullmatch(pattern, leaf) and (attention or roles[0] not in ("q", "k", "v")):
            return roles
    if attention and OUTPUT.fullmatch(leaf):
        return ("o",)
    return ("down",) if leaf in ("c_proj", "proj", "wo", "output", "dense") else ()


def _modules(
    layers: Mapping[str, Mapping[int, Shape]], numbers: Mapping[str, int], questions: list[str]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One entry a recognised module, in the usual order, and what is refused."""
    modules: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    depth = len({layer for where in layers.values() for layer in where})
    compressed = {name.rpartition(".")[0] for name in layers if re.search(r"\.kv_a_proj", name)}
    for name, where in layers.items():
        shape = next(iter(where.values()))
        expert = re.match(r"(.*?\bexperts?)\b", name)
        if expert and "shared" not in expert[1]:
            refused[expert[1]] = EXPERTS
            continue
        if re.search(r"(^|\.)(router|gate)$", name) and shape[0] < numbers.get("hidden_size", 0) // 8:
            refused[name] = ROUTER
            continue
        latent = LATENT.match(name) if name.rpartition(".")[0] in compressed else None
        if len(shape) == 2 and min(shape) > 1 and (latent or RECURRENT.search(name)):
            own = f"mla_{latent[1]}" if latent else name.replace(".", "_")
            modules.append({"name": name, "roles": [own], **({"optional": True} if len(where) < depth else {})})
            questions.append(f"{name} is no standard projection: is {own}, a role of its own, that of another family?")
            continue
        roles = _roles(name)
        if len(shape) != 2 or not roles:
            questions.append(f"What is {name} {list(shape)}? It is left out.")
            continue
        entry: dict[str, Any] = {"name": name, "roles": list(roles)}
        rows, columns = _expected(roles, numbers)
        if rows and columns and shape != (rows, columns):
            if shape == (columns, rows):
                entry["transposed"] = True
            elif roles[0] not in ("gate", "up", "down"):
                questions.append(f"{name} is {list(shape)}, the config implies {[rows, columns]}: what is it?")
        if len(roles) > 1:
            entry["layout"] = "stacked"
            questions.append(_about_layout(name, roles, numbers))
        if len(where) < depth:
            entry["optional"] = True
        modules.append(entry)
    if any(entry.get("transposed") for entry in modules):
        # a square weight does not show it, but no family stores only some of its weights the other way round
        for entry in modules:
            if layers[entry["name"]] and len(set(next(iter(layers[entry["name"]].values())))) == 1:
                entry["transposed"] = True
        questions.append("Some weights are stored (in, out): are square ones, too?")
    held = Counter(role for entry in modules for role in entry["roles"])
    for entry in modules:
        if any(held[role] > 1 for role in entry["roles"]):
            entry["optional"] = True
    missing = [role for role in ("q", "k", "v", "o", "up", "down") if not held[role]]
    if missing:
        questions.append(f"No module was recognised for {', '.join(missing)}.")
    place = {role: n for n, role in enumerate(STANDARD)}
    return sorted(modules, key=lambda e: (place.get(e["roles"][0], len(STANDARD)), e["name"])), refused


def _own_widths(
    modules: Sequence[dict[str, Any]],
    layers: Mapping[str, Mapping[int, Shape]],
    numbers: Mapping[str, int],
    settings: Mapping[str, Any],
    questions: list[str],
) -> None:
    """Give MLP modules of another width than the family's the config key of that width, and ask."""
    hidden, width = numbers.get("hidden_size"), numbers.get("intermediate_size")
    for entry in modules:
        if entry["roles"][0] not in ("gate", "up", "down") or not hidden or not width:
            continue
        shape = next(iter(layers[entry["name"]].values()))
        down = entry["roles"] == ["down"]
        own = shape[int(down != bool(entry.get("transposed")))] // len(entry["roles"])
        if own == width:
            continue
        keys = [k for k, v in settings.items() if v == own and re.search(r"inter|ffn|inner|mlp", k)]
        if keys:
            entry["intermediate_size"] = keys[:1]
        questions.append(f"{entry['name']} is {own} wide, the config says {width}: is its width {keys or 'in no key'}?")


def _expected(roles: Sequence[str], numbers: Mapping[str, int]) -> tuple[int, int]:
    """``(out, in)`` by the config; 0 where it does not say."""
    d, i, heads = (numbers.get(name, 0) for name in ("hidden_size", "intermediate_size", "heads"))
    e = numbers.get("head_dim") or (d // heads if heads else 0)
    kv = numbers.get("kv_heads") or heads
    out = {"q": heads * e, "k": kv * e, "v": kv * e, "o": d, "gate": i, "up": i, "down": d}
    return sum(out[role] for role in roles), {"o": heads * e, "down": i}.get(roles[0], d)


def _about_layout(name: str, roles: Sequence[str], numbers: Mapping[str, int]) -> str:
    parts = ", ".join(roles)
    heads, kv = numbers.get("heads"), numbers.get("kv_heads") or numbers.get("heads")
    if len(roles) == 3 and heads == kv:
        return f"{name} holds {parts}: role after role (stacked, as proposed) or head by head (interleaved)?"
    return f"{name} holds {parts}: are they stacked in this order?"


def _ask_width(
    data: dict[str, Any],
    layers: Mapping[str, Mapping[int, Shape]],
    numbers: Mapping[str, int],
    questions: list[str],
) -> None:
    """The MLP width as a multiple of the hidden size, where the config has no key for it."""
    hidden = numbers.get("hidden_size")
    down = next((e for e in data["modules"] if e["roles"] == ["down"]), None)
    if not hidden or down is None:
        questions.append("What is the intermediate size?")
        return
    shape = next(iter(layers[down["name"]].values()))
    width = shape[0] if down.get("transposed") else shape[1]
    key = next((k for k in KEYS["hidden_size"] if k in data["config"]["hidden_size"]), "hidden_size")
    asked = [k for k in data["config"]["intermediate_size"] if k != KEYS["intermediate_size"][0]]
    data["config"]["intermediate_size"] = [*asked, {"of": key, "times": width / hidden}]
    questions.append(f"The config has no MLP width: is it always {width / hidden:g} times the hidden size?")
