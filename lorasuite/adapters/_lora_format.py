"""LoRA and DoRA as PEFT stores them, read as factored updates."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasuite.adapters._base_modules import base_weight
from lorasuite.adapters._contents import BiasChange, Contents, Read, Update
from lorasuite.adapters._files import CONFIG, PREFIX, WEIGHTS, Tensors, initial_adapter
from lorasuite.adapters._kinds import changes_base
from lorasuite.adapters._stacked import Parameter, parameter_of, split
from lorasuite.bases import Checkpoint, read_json
from lorasuite.errors import Problem

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_EMBEDDING_FACTOR = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.weight)?")
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
_EMBEDDING_COPY = re.compile(r"(?P<module>.+)\.base_layer\.weight")
_BIAS = re.compile(r"(?P<module>.+?)(\.base_layer)?\.bias")
_FROZEN = re.compile(r"(?P<module>.+)\.original_module\.(weight|bias)")
_SAVED = re.compile(r"(?P<module>.+?)(\.modules_to_save)?\.weight")


def read_lora(folder: Path, config: Mapping[str, Any], weights: Tensors) -> Read:
    """Read LoRA and DoRA: factors as stored; an initialisation that changed the base is undone by a second pair."""
    where, problems = str(weights.file), list[Problem]()
    linear: dict[str, dict[str, str]] = defaultdict(dict)
    embedded: dict[str, dict[str, str]] = defaultdict(dict)
    magnitudes: dict[str, str] = {}
    biases: dict[str, BiasChange] = {}
    saved: dict[str, str] = {}
    tokens: dict[str, tuple[str, tuple[int, ...]]] = {}
    copies: dict[str, str] = {}
    frozen: list[str] = []
    strange: list[str] = []
    for full in weights.shapes:
        name = full.removeprefix(PREFIX) if full.startswith(PREFIX) else ""
        if match := _FACTOR.fullmatch(name):
            linear[match["module"]][match["side"]] = full
        elif match := _EMBEDDING_FACTOR.fullmatch(name):
            embedded[match["module"]][match["side"]] = full
        elif (match := _MAGNITUDE.fullmatch(name)) and config.get("use_dora"):
            magnitudes[match["module"]] = full
        elif match := _TOKENS.fullmatch(name):
            ids = _token_ids(config.get("trainable_token_indices"), match["module"])
            tokens[match["module"]] = full, ids
            if len(ids) != weights.shapes[full][0]:
                what = f"{match['module']} trains {weights.shapes[full][0]} tokens, the config names {len(ids)}"
                problems.append(Problem(f"{folder / CONFIG}: trainable_token_indices", what, "The two do not belong."))
        elif _EMBEDDING_COPY.fullmatch(name):
            continue  # the frozen base weight of an embedding, which PEFT stores beside its LoRA
        elif match := _FROZEN.fullmatch(name):
            frozen.append(match["module"])
        elif (match := _BIAS.fullmatch(name)) and config.get("bias") == "lora_only":
            biases[match["module"]] = _trained_bias(match["module"], full, weights)
        elif (match := _SAVED.fullmatch(name)) and _is_saved(match["module"], config):
            saved[match["module"]] = full
        elif (match := _SAVED.fullmatch(name)) and ".lora_" not in name:
            copies[match["module"]] = full
        else:
            strange.append(full)
    if strange:
        what = f"holds {len(strange)} tensors that are not LoRA factors, such as {strange[0]}"
        problems.append(Problem(where, what, "Only LoRA updates of linear modules and embeddings are migrated."))
    updates: dict[str, Update] = {}
    targets = [str(name) for name in config.get("target_parameters") or ()]
    for module, names in sorted([*linear.items(), *embedded.items()]):
        parameter = parameter_of(module, targets) if targets and module in linear else None
        if parameter is not None and len(names) == 2:
            experts = _experts(parameter, names, config, weights)
            if isinstance(experts, Problem):
                problems.append(experts)
            else:
                updates |= experts
            continue
        found = _update(module, names, module in embedded, config, weights)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            updates[module] = found
    if config.get("use_dora"):
        problems += _dora_problems(str(folder / CONFIG), updates, embedded, magnitudes)
    if not updates and not problems:
        problems.append(Problem(where, "holds no LoRA factors", "There is nothing to migrate."))
    if not problems and changes_base(config):
        undone = _undo_initialisation(folder, str(config["init_lora_weights"]).lower(), updates)
        updates, problems = ({}, undone) if isinstance(undone, list) else (undone, [])
    return Contents(updates, magnitudes, biases, saved, tokens, copies, tuple(dict.fromkeys(frozen))), problems


def _trained_bias(module: str, name: str, weights: Tensors) -> BiasChange:
    """What training added to a bias that is stored as a whole."""

    def read(base: Checkpoint) -> Tensor:
        return weights.tensor(name).double() - base.tensor(f"{module}.bias").double()

    return read


def _update(
    module: str, names: Mapping[str, str], embedding: bool, config: Mapping[str, Any], weights: Tensors
) -> Update | Problem:
    """A module's update from the names of its two factors, or why they are none."""
    where, shapes = str(weights.file), weights.shapes
    if len(names) == 1:
        return Problem(where, f"{module} has only lora_{next(iter(names))}", "The file is damaged.")
    if any(len(shapes[name]) != 2 or 0 in shapes[name] for name in names.values()):
        both = " and ".join(str(shapes[names[side]]) for side in "BA")
        return Problem(where, f"{module} has factors of sizes {both}", "The file is damaged, or was never trained.")
    ranks = shapes[names["B"]][1], shapes[names["A"]][0]
    if ranks[0] != ranks[1]:
        what = f"{module} has lora_B of rank {ranks[0]} and lora_A of rank {ranks[1]}"
        return Problem(where, what, "The file is damaged.")

    def read(base: Checkpoint | None) -> tuple[Tensor, Tensor]:
        B, A = weights.tensor(names["B"]), weights.tensor(names["A"])
        # An embedding's weight is (V, d) = (in, out): PEFT adds the transpose of B·A to it.
        return (A.T, B.T) if embedding else (B, A)

    sizes = shapes[names["B"]][0], shapes[names["A"]][1]
    shape = (sizes[1], sizes[0]) if embedding else sizes
    return Update(ranks[0], scaling(config, module, ranks[0]), shape, read)


def _experts(
    parameter: Parameter, names: Mapping[str, str], config: Mapping[str, Any], weights: Tensors
) -> dict[str, Update] | Problem:
    """The updates of a parameter's experts, one by one; of a matrix the one there is, by its module's name."""
    from peft.utils.other import get_pattern_key

    ranks = config.get("rank_pattern") or {}
    rank = ranks.get(get_pattern_key(list(ranks), parameter.path), config["r"])
    a, b = weights.shapes[names["A"]], weights.shapes[names["B"]]
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0] or a[0] % rank:
        what = f"{parameter.path} has factors of sizes {b} and {a}, and the config says rank {rank}"
        return Problem(str(weights.file), what, "The file is damaged, or is not of its config.")
    count, own = a[0] // rank, scaling(config, parameter.path, rank)
    found = {
        parameter.expert(n): Update(rank, own, (b[0], a[1]), lambda _, n=n: split(weights, names, count, n))  # type: ignore[misc]
        for n in range(count)
    }
    plain = count == 1 and parameter.name == "weight"
    return {parameter.container: found[parameter.expert(0)]} if plain else found


def _dora_problems(
    where: str, updates: Mapping[str, Update], embedded: Mapping[str, Any], magnitudes: Mapping[str, str]
) -> list[Problem]:
    """Modules whose magnitudes are missing, or not migrated."""
    outside = sorted(module for module in updates if module in embedded or module.endswith("lm_head"))
    problems = [
        Problem(
            f"{where}: use_dora", f"{module} is an embedding, whose magnitudes are not migrated", "Train without it."
        )
        for module in outside
    ]
    lacking = sorted(set(updates) - set(magnitudes) - set(outside))
    if lacking:
        what = f"{len(lacking)} modules have no lora_magnitude_vector, such as {lacking[0]}"
        problems.append(Problem(f"{where}: use_dora", what, "The file is damaged."))
    return problems


def _undo_initialisation(folder: Path, init: str, updates: Mapping[str, Update]) -> dict[str, Update] | list[Problem]:
    """``W_changed + s·B·A = W + s·(B·A − B₀·A₀)``: the trained factors beside the negated initial ones."""
    start = initial_adapter(folder)
    first: Contents | None = None
    if start is not None:
        raw = {**read_json(start / CONFIG), "init_lora_weights": True}
        first, problems = read_lora(start, raw, Tensors(start / WEIGHTS))
        alike = {m: (u.shape, u.scaling) for m, u in updates.items()}
        if not problems and {m: (u.shape, u.scaling) for m, u in first.updates.items()} != alike:
            problems = [Problem(str(start), "updates other modules, or with another scaling", "Give the right one.")]
        if problems:
            return problems

    def undone(module: str, update: Update) -> Update:
        def read(base: Checkpoint | None) -> tuple[Tensor, Tensor]:
            B, A = update.read(base)
            if first is not None:
                B0, A0 = first.updates[module].read(base)
            else:
                B0, A0 = _initial(init, module, update, base)
            return torch.cat([B, -B0], 1), torch.cat([A, A0])

        return Update(2 * update.rank, update.scaling, update.shape, read, stored=first is not None)

    return {module: undone(module, update) for module, update in updates.items()}


def _initial(init: str, module: str, update: Update, base: Checkpoint | None) -> tuple[Tensor, Tensor]:
    """What PiSSA or OLoRA took out of the old base's weight, computed again as PEFT does when it loads one."""
    weight = base_weight(base, module)
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        return q[:, : update.rank], r[: update.rank]
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return u[:, : update.rank] * (s[: update.rank] / update.scaling), vh[: update.rank]


def _is_saved(module: str, config: Mapping[str, Any]) -> bool:
    """Whether the config names the module among those trained as a whole, by PEFT's own rule."""
    return any(module.endswith(name) for name in config.get("modules_to_save") or ())


def _token_ids(setting: Any, module: str) -> tuple[int, ...]:
    """The ids of a module's trained tokens, in the order of the stored rows."""
    if isinstance(setting, Mapping):
        setting = next((ids for name, ids in setting.items() if module == name or module.endswith(f".{name}")), ())
    return tuple(int(n) for n in setting or ())


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """``α/r``, or ``α/√r`` for rank-stabilised LoRA, with the module's own α where a pattern names it."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"]))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
