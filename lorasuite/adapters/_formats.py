"""One reader for each kind of PEFT adapter: LoRA, AdaLoRA, and the types whose update PEFT itself computes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lorasuite.adapters._contents import PREFIX, BiasChange, Contents, Read, Tensors, Update, base_bias, base_weight
from lorasuite.adapters._kinds import DEFAULT_RANK, ORDERED, OTHER_R, kind_of
from lorasuite.adapters._lora_format import _lora
from lorasuite.adapters._peft_delta import BIASED, DeltaReader, needs_weights
from lorasuite.bases import Checkpoint, module_order
from lorasuite.errors import AdapterError, Problem


def read_contents(folder: Path, config: Mapping[str, Any], weights: Tensors) -> Read:
    """Read any adapter whose config has no problems."""
    reader = {"LORA": _lora, "ADALORA": _adalora}.get(kind_of(config), _delta)
    return reader(folder, config, weights)


_ADALORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[ABE])")


def _adalora(folder: Path, config: Mapping[str, Any], weights: Tensors) -> Read:
    """``ΔW = α/(r₀ + 10⁻⁵)·B·(E∘A)``: PEFT divides by the rank training began with, whatever was pruned since."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    strange = []
    for full in weights.shapes:
        match = _ADALORA.fullmatch(full.removeprefix(PREFIX)) if full.startswith(PREFIX) else None
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


def _delta(folder: Path, config: Mapping[str, Any], weights: Tensors) -> Read:
    """ΔW as PEFT computes it, module by module, then its SVD."""
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


def weight_shape(base: Checkpoint, module: str) -> tuple[int, int]:
    """``(out, in)`` of a block's module, from the header alone.

    Raises:
        AdapterError: if the base has no such module.
    """
    located = base.architecture.locate(module)
    if located is None:
        raise AdapterError(Problem(module, "is not a linear module of the old base", "Give the right --old-base."))
    rows, columns = base.shape(base.architecture.path(*located) + ".weight")
    return (columns, rows) if located[1].transposed else (rows, columns)
