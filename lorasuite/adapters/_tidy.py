"""An adapter as PEFT saves it for the model that transformers builds: its own names, and nothing that is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lorasuite.adapters._files import CONFIG, PREFIX, WEIGHTS
from lorasuite.adapters._kinds import kind_of
from lorasuite.adapters._left_out import left_out
from lorasuite.adapters._reader import Adapter
from lorasuite.bases import Checkpoint

#: Fields of a config that choose modules, which ``target_modules`` does alone where it names each by its path.
_CHOOSING = ("exclude_modules", "layers_to_transform", "layers_pattern")
#: Fields whose keys begin with paths of modules.
_KEYED = ("rank_pattern", "alpha_pattern")


def kept_tensors(adapter: Adapter, base: Checkpoint) -> dict[str, str]:
    """The tensors that are no part of what is left out: the name each has in the base's own model → its name here."""
    idle = left_out(adapter, base)
    gone = {adapter.contents.copies[module] for module, _ in idle.rows if module in adapter.contents.copies}
    frozen = tuple(f"{PREFIX}{module}.original_module." for module in adapter.contents.frozen)
    found: dict[str, str] = {}
    for name in adapter.tensors.shapes:
        path = name.removeprefix(PREFIX)
        module = next((path[:at] for at in _ends(path) if path[:at] in idle.modules), None)
        if module is None and name not in gone and not name.startswith(frozen):
            inside = name.startswith(PREFIX)
            found[PREFIX + base.architecture.own_name(path) if inside else name] = name
    if adapter.contents.frozen:  # beside which PEFT stores the trained module twice
        found = {name: own for name, own in found.items() if name.replace(".modules_to_save.", ".") not in found} | {
            name: own for name, own in found.items() if ".modules_to_save." not in name
        }
    return found


def _ends(path: str) -> list[int]:
    return [at for at, letter in enumerate(path) if letter == "."]


def is_tidy(adapter: Adapter, base: Checkpoint) -> bool:
    """Whether PEFT finds exactly the tensors of its file in the base's model."""
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
    save_file(_apart(tensors), output / WEIGHTS, metadata={"format": "pt"})
    config: dict[str, Any] = {**adapter.config, "base_model_name_or_path": base_name}
    idle = left_out(adapter, base).modules
    if kind_of(config) in ("LORA", "ADALORA"):
        config |= dict.fromkeys(name for name in _CHOOSING if name in config)
        embedded = {path for path in adapter.contents.updates if path in adapter.contents.saved}
        config["target_modules"] = sorted(own(path) for path in {*adapter.contents.updates} - idle - embedded)
    else:
        targets = config.get("target_modules")
        config["target_modules"] = sorted(map(own, adapter.modules)) if targets is not None else None
    for name in _KEYED:
        if isinstance(config.get(name), dict):
            config[name] = {own(key): value for key, value in config[name].items()}
    (output / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return output


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of which no two share memory, as safetensors wants them."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors
