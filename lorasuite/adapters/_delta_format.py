"""Adapters whose update PEFT itself computes, read as the singular value decomposition of ``ΔW``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lorasuite.adapters._base_modules import base_bias, base_weight, weight_shape
from lorasuite.adapters._contents import BiasChange, Contents, Read, Update
from lorasuite.adapters._files import PREFIX, Tensors
from lorasuite.adapters._kinds import BIASED, DEFAULT_RANK, ORDERED, OTHER_R, kind_of, needs_weights
from lorasuite.adapters._peft_delta import DeltaReader
from lorasuite.bases import Checkpoint, module_order
from lorasuite.errors import AdapterError, Problem


def read_delta(folder: Path, config: Mapping[str, Any], weights: Tensors) -> Read:
    """Read any kind of :data:`~lorasuite.adapters._kinds.DELTA`: ΔW as PEFT computes it, one module at a time."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    kind = kind_of(config)
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[PeftType[kind]]
    pattern = re.compile(re.escape(PREFIX) + rf"(?P<module>.+?)\.{re.escape(prefix)}\w+(\..+)?")
    matches = {name: pattern.fullmatch(name) for name in weights.shapes}
    modules = sorted({match["module"] for match in matches.values() if match})
    # Tensors that all modules share lie beside the model: base_model.vera_A.
    strange = [name for name, match in matches.items() if not match and name.startswith(PREFIX)]
    problems = []
    if strange:
        what = f"holds {len(strange)} tensors that are not {kind} weights, such as {strange[0]}"
        problems.append(Problem(str(weights.file), what, "Only updates of linear modules are migrated."))
    if not modules:
        problems.append(Problem(str(weights.file), f"holds no {kind} weights", "There is nothing to migrate."))
    if problems:
        return Contents(), problems
    reader = DeltaReader(
        config, () if kind in ORDERED else modules, list(weights.shapes), weights.tensor, str(weights.file)
    )
    weighted, biased = needs_weights(config), kind in BIASED
    rank = int((kind not in OTHER_R and config.get("r")) or DEFAULT_RANK)

    def update(module: str) -> Update:
        def read(base: Checkpoint | None) -> tuple[Tensor, Tensor]:
            if base is None:
                what = f"what a {kind} adapter adds to it is only known with the old base's shapes"
                raise AdapterError(Problem(module, what, "Give the old base."))
            weight = base_weight(base, module) if weighted else None
            bias = base_bias(base, module) if biased else None
            if kind in ORDERED and not reader.modules:
                place = module_order(base)
                reader.modules = tuple(sorted(modules, key=lambda path: place.get(path, 0)))
            found = reader.read(module, lambda path: weight_shape(base, path), weight, bias)
            return found.B, found.A

        return Update(rank, 1.0, None, read, stored=False)

    def bias_change(module: str) -> BiasChange:
        def read(base: Checkpoint) -> Tensor | None:
            bias = base_bias(base, module)
            return None if bias is None else reader.bias_change(module, base_weight(base, module), bias)

        return read

    biases = {module: bias_change(module) for module in modules} if biased else {}
    return Contents({module: update(module) for module in modules}, biases=biases), []
