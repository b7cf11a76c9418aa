"""An adapter as PEFT saves it for the model that transformers builds: its own names, and nothing that is left out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lorasuite.adapters._files import CONFIG, PREFIX, WEIGHTS
from lorasuite.adapters._kinds import kind_of
from lorasuite.adapters._left_out import left_out
from lorasuite.adapters._lora_format import scaling
from lorasuite.adapters._lowrank import LowRank
from lorasuite.adapters._reader import Adapter
from lorasuite.adapters._stacked import by_parameter, stack, tensor_names
from lorasuite.bases import Checkpoint

#: Fields of a config that choose modules, which ``target_modules`` does alone where it names each by its path.
_CHOOSING = ("exclude_modules", "layers_to_transform", "layers_pattern")
#: Fields whose keys begin with paths of modules.
_KEYED = ("rank_pattern", "alpha_pattern")


def kept_tensors(adapter: Adapter, base: Checkpoint) -> dict[str, str]:
    """The tensors that are no part of what is left out: the name each has in the base's own model → its name here.

    Those of experts that are adapted one by one are not among them: PEFT wants them stacked.
    """
    idle = left_out(adapter, base)
    single = _single_experts(adapter, base)
    gone = {adapter.contents.copies[module] for module, _ in idle.rows if module in adapter.contents.copies}
    frozen = tuple(f"{PREFIX}{module}.original_module." for module in adapter.contents.frozen)
    found: dict[str, str] = {}
    for name in adapter.tensors.shapes:
        path = name.removeprefix(PREFIX)
        module = next((path[:at] for at in _ends(path) if path[:at] in idle.modules), None)
        if module is None and name not in gone and not name.startswith(frozen) and _stem(path) not in single:
            inside = name.startswith(PREFIX)
            found[PREFIX + base.architecture.own_name(path) if inside else name] = name
    if adapter.contents.frozen:  # beside which PEFT stores the trained module twice
        found = {name: own for name, own in found.items() if name.replace(".modules_to_save.", ".") not in found} | {
            name: own for name, own in found.items() if ".modules_to_save." not in name
        }
    return found


def _single_experts(adapter: Adapter, base: Checkpoint) -> set[str]:
    """The modules of experts that have tensors of their own in the file, as trainers for transformers 4 save them."""
    known = base.architecture
    stems = {_stem(name.removeprefix(PREFIX)) for name in adapter.tensors.shapes if ".lora_A." in name}
    return {stem for stem in stems if known.locate_expert(stem) is not None} - left_out(adapter, base).modules


def _stem(path: str) -> str:
    """The module that a factor is of."""
    return path.partition(".lora_")[0]


def _ends(path: str) -> list[int]:
    return [at for at, letter in enumerate(path) if letter == "."]


def is_tidy(adapter: Adapter, base: Checkpoint) -> bool:
    """Whether PEFT finds exactly the tensors of its file in the base's model."""
    named = {str(name).removesuffix(".weight") for name in adapter.config.get("target_parameters") or ()}
    for path in adapter.refused(base.architecture):
        if base.architecture.as_parameter(path) and not any(f".{path}".endswith(f".{name}") for name in named):
            return False  # a linear module for the trainer, a parameter for PEFT
    return kept_tensors(adapter, base) == {name: name for name in adapter.tensors.stored.values()}


def write_tidy(adapter: Adapter, base: Checkpoint, output: Path, base_name: str) -> Path:
    """Write what :func:`kept_tensors` names, with a config that says which modules they belong to.

    Args:
        output: directory to create.
        base_name: what the config names as its base.
    """
    own = base.architecture.own_name
    output.mkdir(parents=True, exist_ok=True)
    tensors = {new: adapter.tensors.raw(name).contiguous() for new, name in kept_tensors(adapter, base).items()}
    config: dict[str, Any] = {**adapter.config, "base_model_name_or_path": base_name}
    idle = left_out(adapter, base).modules
    if kind_of(config) in ("LORA", "ADALORA"):
        config |= dict.fromkeys(name for name in _CHOOSING if name in config)
        embedded = {path for path in adapter.contents.updates if path in adapter.contents.saved}
        kept = {*adapter.contents.updates} - idle - embedded
        parameters = {path for path in adapter.refused(base.architecture) if base.architecture.as_parameter(path)}
        known = base.architecture
        inside = {path for path in kept if known.locate_expert(path) or _of_expert(path, config)}
        config["target_modules"] = sorted(own(path) for path in kept - parameters - inside)
        _parameters(adapter, base, config, tensors, [own(path) for path in sorted(parameters & kept)])
    else:
        targets = config.get("target_modules")
        config["target_modules"] = sorted(map(own, adapter.modules)) if targets is not None else None
    for name in _KEYED:
        if isinstance(config.get(name), dict):
            config[name] = {own(key): value for key, value in config[name].items()}
    save_file(_apart(tensors), output / WEIGHTS, metadata={"format": "pt"})
    (output / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return output


def _of_expert(path: str, config: Mapping[str, Any]) -> bool:
    """Whether an update is that of one expert of a parameter that the config names: ``…experts.3.gate_up_proj``."""
    names = {str(name).rpartition(".")[2] for name in config.get("target_parameters") or ()}
    return re.fullmatch(r".+\.\d+", path.rpartition(".")[0]) is not None and path.rpartition(".")[2] in names


def _parameters(
    adapter: Adapter,
    base: Checkpoint,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    weights: Sequence[str],
) -> None:
    """What PEFT adapts as parameters: the experts that have tensors of their own, stacked, and weights of modules."""
    single = sorted(_single_experts(adapter, base))
    scales = [adapter.contents.updates[path].scaling for path in single]
    updates = {path: adapter.update(path) for path in single}
    stacked = by_parameter(updates, base.architecture)
    ranks = {path: max(part.rank for part in parts.values()) for path, parts in stacked.items()}
    for path, parts in stacked.items():
        # of one scaling, which PEFT multiplies with again
        scaled = {number: LowRank(part.B / scales[0], part.A) for number, part in parts.items()}
        both = stack(scaled, base.expert_count, ranks[path])
        for name, value in zip(tensor_names(list(stacked), path), both, strict=True):
            tensors[PREFIX + name] = value.float().contiguous()
    own = base.architecture.own_name
    named = [*map(own, config.get("target_parameters") or ()), *stacked, *(f"{path}.weight" for path in weights)]
    if len(named) > len(config.get("target_parameters") or ()):
        config["target_parameters"], config["lora_dropout"] = named, 0.0  # PEFT has none of parameters
    for path, rank in ranks.items():
        if rank == config["r"] and scales[0] == scaling(adapter.config, path, rank):
            continue
        alpha = scales[0] * (rank**0.5 if config.get("use_rslora") else rank)
        config["rank_pattern"] = {**(config.get("rank_pattern") or {}), path: rank}
        config["alpha_pattern"] = {**(config.get("alpha_pattern") or {}), path: alpha}


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of which no two share memory, as safetensors wants them."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors
