"""Which new expert continues which old one, and maps between what matched experts read and write.

Experts have no order of their own: two bases that were trained apart number them differently. What tells them apart is
which tokens they are routed. At positions where both bases have read the same text, each expert has a column of routing
weights (0 where it is not routed the token); old and new experts of a mapped layer pair are matched so that the sum of
the cosines of their columns is largest. Where there are more on one side, or no text is routed to an expert, some have
no partner.

A matched pair is then a pair of MLPs. They read and write the layer's hidden spaces, of which there is one map each for
all experts; between their intermediate spaces there is a map for each pair, fitted on the positions that are routed to
both, and, where those are too few to span the space, on others.

Cost for two bases of Qwen3-30B-A3B's shape (48 layers, 128 experts of 768, N = 16,384 positions): the forward passes of
both, and for each pair of experts ``6·d·i`` operations a position for each base, with ``2·i`` positions 30 GFLOP, 180
TFLOP in all; 7 GB of maps, an eighth of such a base. In memory beside the layers: ``4·N·d`` bytes for each base.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from lorasuite.bases import Batch, LayerStream, LoadedBase, Role, text_batches
from lorasuite.correspondence._alignment import Space, SpaceMap, mapped_pairs, read_map
from lorasuite.correspondence._moments import MapKind
from lorasuite.correspondence._options import POSITIONS, End
from lorasuite.errors import ConfigError, Problem
from lorasuite.progress import Progress
from lorasuite.stored import Stored


@dataclass(frozen=True)
class Routed:
    """What the experts of one layer saw at paired positions.

    ``read`` and ``written``: hidden rows ``(N, d)``; ``weights``: each position's routing weights, ``(N, experts)``.
    """

    read: Float[Tensor, "N d"]
    written: Float[Tensor, "N d"]
    weights: Float[Tensor, "N E"]


def match_experts(old: Float[Tensor, "N E_o"], new: Float[Tensor, "N E_n"]) -> tuple[dict[int, int], Tensor]:
    """Old → new expert with the largest sum of cosines of routing weights, and all cosines ``(E_o, E_n)``.

    Experts that no position is routed to, and pairs that share none, are not matched.
    """
    from scipy.optimize import linear_sum_assignment  # half a second that only matching needs

    a, b = (torch.nn.functional.normalize(side.double(), dim=0) for side in (old, new))
    overlap: Float64[Tensor, "E_o E_n"] = a.T @ b
    rows, columns = linear_sum_assignment(overlap.numpy(), maximize=True)
    matched = {int(o): int(n) for o, n in zip(rows, columns, strict=True) if float(overlap[o, n]) > 0}
    return matched, overlap


def align_experts(
    old: LoadedBase,
    new: LoadedBase,
    layers: Mapping[int, int],
    texts: Sequence[str],
    kinds: Mapping[End, Sequence[MapKind]],
    *,
    positions: int = POSITIONS,
    cutoff: int = 256,
    progress: Progress | None = None,
) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]:
    """The matched experts of every mapped layer pair, and their maps, as named tensors to be stored.

    Args:
        layers: old → new layer, both increasing; pairs of which one has no experts are passed over.
        kinds: of the maps of what projections read, and of what they write.
        positions: paired positions that are sampled for wide spaces.
        cutoff: tokens of a text read at most, in each base.

    Returns:
        the tensors, and JSON data that is complete when they have been read: ``experts``, by old layer the matched
        numbers; ``kinds``, the names of the kinds.

    Raises:
        DataError: if no two positions pair.
    """
    batches = text_batches(texts, old, new, cutoff)
    info: dict[str, Any] = {"experts": {}, "kinds": sorted({kind.name for of in kinds.values() for kind in of})}
    return _pairs((old, new), layers, batches, kinds, positions, info, progress), info


def _pairs(
    bases: tuple[LoadedBase, LoadedBase],
    layers: Mapping[int, int],
    batches: Sequence[Batch],
    kinds: Mapping[End, Sequence[MapKind]],
    positions: int,
    info: dict[str, Any],
    progress: Progress | None,
) -> Iterator[tuple[str, Tensor]]:
    both = list({kind.name: kind for of in kinds.values() for kind in of}.values())
    for o, n, old, new in mapped_pairs(bases, layers, batches, progress):
        first, second = experts_of(bases[0], o), experts_of(bases[1], n)
        if first is None or second is None:
            continue
        x = _routed(old, first, [batch.old_rows for batch in batches])
        y = _routed(new, second, [batch.new_rows for batch in batches])
        matched, overlap = match_experts(x.weights, y.weights)
        info["experts"][str(o)] = {str(a): b for a, b in matched.items()}
        yield f"{o}.overlap", overlap.float()
        yield from _named(f"{o}.hidden.in", kinds["in"], x.read, y.read, positions)
        yield from _named(f"{o}.hidden.out", kinds["out"], x.written, y.written, positions)
        for a, b in matched.items():
            at = _rows(x.weights[:, a], y.weights[:, b], positions, (first, second))
            mine, theirs = intermediate(first, a, x.read[at]), intermediate(second, b, y.read[at])
            yield from _named(f"{o}.{a}.inside", both, mine, theirs, positions)


def experts_of(base: LoadedBase, layer: int) -> Any | None:
    """The module of a layer's experts, which has the 3-D parameters; None where the layer has none."""
    known = base.architecture.experts
    if known is None:
        return None
    with contextlib.suppress(AttributeError):
        return base.model.get_submodule(f"{base.architecture.layers}.{layer}.{known.path}")
    return None


def intermediate(experts: Any, number: int, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n i"]:
    """What the down projection of one expert reads at some hidden rows, float32, on their device."""
    with torch.inference_mode():
        weight = experts.gate_up_proj[number]
        gate, up = (rows.to(weight) @ weight.T).chunk(2, -1)
        found: Tensor = experts.act_fn(gate) * up
    return found.float().to(rows.device)


def _routed(stream: LayerStream, experts: Any, rows: Sequence[tuple[Tensor, Tensor]]) -> Routed:
    """Run the next block of a base on all texts, and keep what its experts see at some positions, on the CPU."""
    seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def after(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        hidden, chosen, weights = (*args, *kwargs.values())[:3]
        seen.append((hidden, chosen, weights, output))

    handle = experts.register_forward_hook(after, with_kwargs=True)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        for number, (texts, at) in enumerate(rows):
            seen.clear()
            stream.run(number)
            hidden, chosen, weights, output = seen[-1]
            flat = (texts * stream.texts[number].shape[1] + at).to(hidden.device)
            spread = weights.new_zeros(len(weights), experts.gate_up_proj.shape[0])
            spread = spread.scatter_add(1, chosen.to(torch.int64), weights)
            kept = (value.reshape(-1, value.shape[-1])[flat].float().cpu() for value in (hidden, output, spread))
            found.append(tuple(kept))  # type: ignore[arg-type]
    finally:
        handle.remove()
    return Routed(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _rows(
    old: Float[Tensor, " N"], new: Float[Tensor, " N"], positions: int, experts: tuple[Any, Any]
) -> Int64[Tensor, " n"]:
    """The positions that a pair of experts is compared at: first those routed to both, then to one, then others."""
    order = torch.argsort((old > 0).int() + (new > 0).int(), descending=True, stable=True)
    widest = max(module.down_proj.shape[-1] for module in experts)
    return order[: max(positions, 2 * widest, int(((old > 0) & (new > 0)).sum()))]


def _named(
    name: str, kinds: Sequence[MapKind], x: Float[Tensor, "n a"], y: Float[Tensor, "n b"], positions: int
) -> Iterator[tuple[str, Tensor]]:
    """The maps of one space."""
    space = Space(kinds, positions)
    space.add(x, y, torch.arange(min(positions, len(x))))
    for part, value in space.finished()[0].items():
        yield f"{name}.{part}", value


@dataclass(frozen=True)
class ExpertMaps:
    """The matched experts that :func:`align_experts` found, and their maps, read one space at a time."""

    stored: Stored
    #: Names of the tensors.
    names: frozenset[str] = field(default=frozenset())

    @classmethod
    def read(cls, stored: Stored) -> ExpertMaps:
        """What :func:`align_experts` gave."""
        return cls(stored, frozenset(stored.keys()))

    def matched(self, layer: int) -> dict[int, int]:
        """Old → new expert of an old layer; empty where its pair does not both have experts."""
        return {int(a): b for a, b in self.stored.info["experts"].get(str(layer), {}).items()}

    def has(self, kinds: Iterable[MapKind]) -> bool:
        """Whether there are maps of all these kinds."""
        return {kind.name for kind in kinds} <= set(self.stored.info["kinds"])

    def __call__(self, layer: int, expert: int, role: Role, end: End, kind: MapKind) -> SpaceMap:
        """The map of what a projection of an old layer's expert reads or writes.

        Raises:
            ConfigError: if there is none of that kind.
        """
        hidden = (role == "down") == (end == "out")
        space = f"{layer}.hidden.{end}" if hidden else f"{layer}.{expert}.inside"
        if f"{space}.{kind.name}" not in self.names:
            what = f"there is no such map of the {role} of expert {expert} of layer {layer}"
            raise ConfigError(Problem(f"map {kind.name!r}", what, "The transform must declare it among its `maps`."))
        return read_map(self.stored, self.names, space, kind)
