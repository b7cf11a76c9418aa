"""Updates of the experts of a mixture: one by one, and stacked as PEFT keeps those of a 3-D parameter.

PEFT adapts a parameter ``(experts, …)`` by two matrices: ``A`` is ``(experts·r, in)``, expert after expert, and ``B``
``(out, r·experts)``, whose columns are all experts' first directions, then all their second ones. Two parameters of one
module are wrapped one inside the other, in the order the module declares them, and the tensors of the inner one are
named ``…experts.base_layer.lora_A.weight``. Here each expert has an update of its own, of the path
``…experts.3.gate_up_proj``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from lorasuite.adapters._files import Tensors
from lorasuite.adapters._lowrank import LowRank
from lorasuite.bases import DOWN, GATE_UP, Architecture

#: The parameters of experts, in the order transformers' modules declare them.
DECLARED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
_INNER = ".base_layer"


@dataclass(frozen=True)
class Parameter:
    """A parameter that an adapter names in ``target_parameters``: the module that has it, and its name there."""

    container: str
    name: str

    @property
    def path(self) -> str:
        """As PEFT matches it."""
        return f"{self.container}.{self.name}"

    def expert(self, number: int) -> str:
        """What the update of one expert is called."""
        return f"{self.container}.{number}.{self.name}"


def parameter_of(module: str, targets: Sequence[str]) -> Parameter | None:
    """The parameter that factors under a module's name belong to; None where they are a linear module's.

    Args:
        targets: the config's ``target_parameters``.
    """
    container = module
    while container.endswith(_INNER):
        container = container.removesuffix(_INNER)
    depth = (len(module) - len(container)) // len(_INNER)
    parents = {target: target.rpartition(".")[0] for target in targets}
    # PEFT saves bare names where it was asked for linear modules by those: they are parameters of experts.
    bare = container.rpartition(".")[2] == "experts"
    held = [t for t, parent in parents.items() if (f".{container}".endswith(f".{parent}") if parent else bare)]
    names = {target.rpartition(".")[2] for target in held}
    order = sorted(names, key=lambda name: DECLARED.index(name) if name in DECLARED else len(DECLARED))
    return Parameter(container, order[-1 - depth]) if depth < len(order) else None


@lru_cache(maxsize=2)
def _whole(weights: Tensors, a: str, b: str) -> tuple[Tensor, Tensor]:
    """The two factors of a parameter: read once for all of its experts, which are asked for one after the other."""
    return weights.tensor(a), weights.tensor(b)


def split(weights: Tensors, names: Mapping[str, str], count: int, number: int) -> tuple[Tensor, Tensor]:
    """One expert's ``B (out, r)`` and ``A (r, in)`` of stacked ones.

    Args:
        names: of the tensors, by side.
        count: how many experts are stacked.
    """
    a, b = _whole(weights, names["A"], names["B"])
    return b.reshape(b.shape[0], -1, count)[:, :, number], a.reshape(count, -1, a.shape[1])[number]


def stack(parts: Mapping[int, LowRank], count: int, rank: int) -> tuple[Tensor, Tensor]:
    """``A (count·rank, in)`` and ``B (out, rank·count)`` of the updates of some experts; the others' are zero."""
    first = next(iter(parts.values()))
    a = first.A.new_zeros(count, rank, first.shape[1])
    b = first.B.new_zeros(first.shape[0], rank, count)
    for number, update in parts.items():
        a[number, : update.rank], b[:, : update.rank, number] = update.A, update.B
    return a.reshape(count * rank, -1), b.reshape(first.shape[0], -1)


def by_parameter(updates: Mapping[str, LowRank], architecture: Architecture) -> dict[str, dict[int, LowRank]]:
    """The updates of experts among some, by the path of the 3-D parameter that each is a part of, and by expert."""
    found: dict[str, dict[int, dict[str, LowRank]]] = defaultdict(lambda: defaultdict(dict))
    for path, update in updates.items():
        located = architecture.locate_expert(path)
        if located is None:
            continue
        layer, number, module = located
        whole = DOWN if module.roles == DOWN.roles else GATE_UP
        container = architecture.expert_path(layer, number, whole).rsplit(".", 2)[0]
        found[f"{container}.{whole.name}"][number]["+".join(module.roles)] = update
    return {
        path: {number: _fused(parts) for number, parts in sorted(experts.items())} for path, experts in found.items()
    }


def _fused(parts: Mapping[str, LowRank]) -> LowRank:
    """The update of an expert's part of a parameter, of those of the part as a whole and of its projections."""
    halves = {role: update for role, update in parts.items() if role in GATE_UP.roles}
    found = [update for role, update in parts.items() if role not in halves]
    if halves:
        known = next(iter(halves.values()))
        both = [halves.get(role) or LowRank.zeros(*known.shape).to(known.B.dtype) for role in GATE_UP.roles]
        found.append(LowRank.stack_rows(both))
    return found[0] if len(found) == 1 else LowRank.sum(found)


def tensor_names(paths: Sequence[str], path: str) -> tuple[str, str]:
    """The names, without PEFT's prefix, of the ``lora_A`` and ``lora_B`` of a parameter.

    Args:
        paths: all parameters that the adapter updates.
    """
    container, _, name = path.rpartition(".")
    held = [other.rpartition(".")[2] for other in paths if other.rpartition(".")[0] == container]
    inner = sum(DECLARED.index(other) > DECLARED.index(name) for other in held)
    stem = container + _INNER * inner
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def patterns(ranks: Mapping[str, int], rank: int, alpha: float, root: bool) -> dict[str, Any]:
    """``rank_pattern`` and ``alpha_pattern`` of parameters whose rank is another one, so that their scaling is the
    others'.

    Args:
        root: whether that is ``alpha/√rank``.
    """
    others = {path: own for path, own in ranks.items() if own != rank}
    alphas = {path: alpha * ((own / rank) ** 0.5 if root else own / rank) for path, own in others.items()}
    return {"rank_pattern": others, "alpha_pattern": alphas}
