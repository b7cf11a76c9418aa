"""Updates of the experts of a mixture, moved as those of a dense MLP from each expert to the one that continues it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial

from lorasuite.adapters import Adapter, LowRank, fuse_updates, split_update
from lorasuite.bases import ATTENTION, DOWN, GATE_UP, MLP, Checkpoint, Dimensions, Module, Role
from lorasuite.correspondence import ExpertMaps, TransferMatrix, gram_factor
from lorasuite.errors import examples
from lorasuite.transforms._protocol import AlignedTransform, Input, LayerPair, LayerTransform, can_move, takes_stored

#: What becomes of experts that cannot be moved is said with this.
WRITTEN_ROWS = "rows that the old base writes with the adapter (--teacher-samples) hold what they do"


class MovedExperts:
    """Moves the expert updates of an adapter, layer by layer, and keeps what has no place in the new base."""

    def __init__(
        self,
        adapter: Adapter,
        bases: tuple[Checkpoint, Checkpoint],
        chosen: LayerTransform,
        transfer: TransferMatrix,
        maps: ExpertMaps | None,
    ) -> None:
        self.adapter, (self.old, self.new) = adapter, bases
        self.chosen, self.transfer, self.maps = chosen, transfer, maps
        #: One entry a layer and reason, with the number of updates.
        self.dropped: list[dict[str, str]] = []

    def move(self, layers: Mapping[int, int]) -> Iterator[tuple[str, LowRank, int]]:
        """``(path, update, parts)`` of each new expert's part of a parameter, ``…experts.3.gate_up_proj``.

        ``parts``: of how many updates with inputs of their own it is made, which is what its rank may grow by.
        """
        left = self.adapter.left_out(self.old)
        idle = {module for module, _ in left}
        for o, experts in self.adapter.experts(self.old.architecture).items():
            kept = {
                number: {path: module for path, module in modules.items() if path not in idle}
                for number, modules in experts.items()
            }
            lost: dict[str, list[int]] = defaultdict(list)
            why = self._no_place(o, layers.get(o))
            matched = {} if why or self.maps is None else self.maps.matched(o)
            for number, modules in kept.items():
                if modules and not why and number in matched:
                    yield from self._expert((o, layers[o]), (number, matched[number]), modules)
                elif modules:
                    lost[why or "no expert of the new layer is routed the same tokens"].append(number)
            for reason, numbers in lost.items():
                self.dropped.append(_counted(self.old, o, {n: kept[n] for n in numbers}, reason))

    def _no_place(self, o: int, n: int | None) -> str:
        """Why no expert of an old layer has a place in the new base; empty if some may."""
        if n is None:
            return f"old layer {o} has no partner in the new base"
        before, after = self.old.experts(o), self.new.experts(n)
        assert before is not None
        if after is None:
            return f"the new base has no experts there: {WRITTEN_ROWS}"
        if self.maps is None:
            return (
                f"experts are matched by the calibration texts that they are routed, and there are none: {WRITTEN_ROWS}"
            )
        if not all(can_move(self.chosen, role) for role in MLP):
            return f"{self.chosen.name} has no rule for MLPs: {WRITTEN_ROWS}"
        if isinstance(self.chosen, AlignedTransform) and not self.maps.has(self.chosen.maps.values()):
            return f"there are no maps of experts of the kinds that {self.chosen.name} reads: {WRITTEN_ROWS}"
        found = self.chosen.problems(before, after, MLP)
        return f"{found[0].what}: {WRITTEN_ROWS}" if found else ""

    def _expert(
        self, layers: tuple[int, int], numbers: tuple[int, int], modules: Mapping[str, Module]
    ) -> Iterator[tuple[str, LowRank, int]]:
        (o, n), after = layers, numbers[1]
        old_dims, new_dims = self.old.experts(o), self.new.experts(n)
        assert old_dims is not None and new_dims is not None and self.maps is not None
        updates: dict[Role, LowRank] = {}
        for path, module in modules.items():
            for role, part in split_update(self.adapter.update(path, self.old), module, old_dims).items():
                updates[role] = LowRank.sum([updates[role], part]) if role in updates else part
        pair = self._pair(layers, numbers, tuple(updates), (old_dims, new_dims))
        moved = self.chosen.move(pair, updates)
        for whole in (GATE_UP, DOWN):
            parts = {role: moved[role] for role in whole.roles if role in moved}
            if parts:
                apart = len({id(part.A) for part in parts.values()})
                yield self.new.architecture.expert_path(n, after, whole), fuse_updates(parts, whole, new_dims), apart

    def _pair(
        self,
        layers: tuple[int, int],
        numbers: tuple[int, int],
        updated: tuple[Role, ...],
        dims: tuple[Dimensions, Dimensions],
    ) -> LayerPair:
        """Two matched experts, as a pair of layers that have nothing but an MLP."""
        assert self.maps is not None
        needed = tuple(role for role in self.chosen.weights(updated) if role not in ATTENTION)
        stored = takes_stored(self.chosen)
        old = self.old.expert(layers[0], numbers[0], needed, stored)
        factors = {}
        if Input.MLP_FACTORS in self.chosen.inputs:
            factors = {role: gram_factor(weight) for role, weight in old.items()}
        new = self.new.expert(layers[1], numbers[1], needed, stored)
        maps = partial(self.maps, layers[0], numbers[0])
        return LayerPair(old, new, *dims, {}, self.transfer, factors, maps)


def _counted(old: Checkpoint, layer: int, experts: Mapping[int, Mapping[str, Module]], why: str) -> dict[str, str]:
    """Experts of a layer that are not moved, as one entry of ``dropped``."""
    place = old.architecture.expert_path(layer, 0, DOWN).rsplit(".", 2)[0]
    updates = sum(map(len, experts.values()))
    what = f"{place}: {updates} updates of {len(experts)} experts ({examples(list(map(str, experts)))})"
    return {"module": what, "why": why}


def not_moved(adapter: Adapter, old: Checkpoint, why: str) -> list[dict[str, str]]:
    """What no transform moves of an adapter, and its experts, which are not moved either, as entries of ``dropped``.

    Args:
        why: the experts are not moved.
    """
    left = dict(adapter.left_out(old))
    found = [{"module": module, "why": reason} for module, reason in left.items()]
    refused = adapter.refused(old.architecture)
    found += grouped_modules({path: reason for path, reason in refused.items() if path not in left})
    for layer, experts in adapter.experts(old.architecture).items():
        kept = {n: {p: m for p, m in modules.items() if p not in left} for n, modules in experts.items()}
        if any(kept.values()) and why:
            found.append(_counted(old, layer, kept, why))
    return found


def grouped_modules(refused: Mapping[str, str]) -> list[dict[str, str]]:
    """Modules that no transform moves as entries of ``dropped``, one a reason: there may be thousands."""
    found: dict[str, list[str]] = {}
    for path, why in refused.items():
        found.setdefault(why, []).append(path)
    return [
        {"module": paths[0] if len(paths) == 1 else f"{len(paths)} modules ({examples(paths)})", "why": why}
        for why, paths in found.items()
    ]
