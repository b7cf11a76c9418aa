"""AdaLoRA as PEFT stores it, read as factored updates."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lorasuite.adapters._contents import Contents, Read, Update
from lorasuite.adapters._files import PREFIX, Tensors
from lorasuite.bases import Checkpoint
from lorasuite.errors import Problem

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[ABE])")


def read_adalora(folder: Path, config: Mapping[str, Any], weights: Tensors) -> Read:
    """Read AdaLoRA: ``ΔW = α/(r₀ + 10⁻⁵)·B·(E∘A)``, ``r₀`` the rank that training began with, whatever was pruned."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    strange = []
    for full in weights.shapes:
        match = _FACTOR.fullmatch(full.removeprefix(PREFIX)) if full.startswith(PREFIX) else None
        if match:
            found[match["module"]][match["side"]] = full
        elif not full.endswith(".ranknum"):
            strange.append(full)
    problems = [
        Problem(str(weights.file), f"{module} lacks one of lora_A, lora_B and lora_E", "The file is damaged.")
        for module, names in found.items()
        if len(names) < 3
    ]
    if strange:
        what = f"holds {len(strange)} tensors that are not AdaLoRA factors, such as {strange[0]}"
        problems.append(Problem(str(weights.file), what, "Only updates of linear modules are migrated."))
    if not found and not problems:
        problems.append(Problem(str(weights.file), "holds no AdaLoRA factors", "There is nothing to migrate."))
    if problems:
        return Contents(), problems
    alpha = float(config["lora_alpha"]) or float(config["init_r"])
    factor = alpha / (float(config["init_r"]) + 1e-5)

    def update(names: Mapping[str, str]) -> Update:
        (rows, rank), columns = weights.shapes[names["B"]], weights.shapes[names["A"]][1]

        def read(base: Checkpoint | None) -> tuple[Tensor, Tensor]:
            A, B, E = (weights.tensor(names[side]) for side in "ABE")
            if not rank:  # every direction was pruned: one of zeros, so that no transform has to know of rank 0
                return B.new_zeros(rows, 1), A.new_zeros(1, columns)
            return B, A * E

        return Update(max(rank, 1), factor, (rows, columns), read)

    return Contents({module: update(names) for module, names in sorted(found.items())}), []
