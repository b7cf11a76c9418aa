"""Maps between what two bases read and write at the same text, space by space: what transforms with activations read.

Rows are token positions at which both bases have read the same text. A *space* is what some projections read or write:
q, k and v read one, gate and up read another, and what gate and up write is told apart by what ``down`` reads, since
their own outputs span only as many directions as the hidden size has. So a layer pair has eight spaces.

A map of a space ``(a, b)`` is kept dense, or for wide spaces by its factors: with ``N`` sampled positions, whose rows
``X (N, a)`` and ``Y (N, b)`` span ``P`` and ``Q`` (thin QR, ``X = R_xᵀPᵀ``), ``XᵀY = P·(R_x R_yᵀ)·Qᵀ``; every kind of
map then is ``P·(a core of N × N)·Qᵀ``, the same formula of the rows' coordinates. Nothing of ``a × a`` is made then.
Whichever takes less room is chosen, so no decomposition is of more than about ``2N`` rows.

Cost for Llama-2-7B → Llama-3-8B (32 layer pairs, N = 512 positions, two kinds for what is read and one for what is
written): ``2·[N(a + b)·8 spaces + N²·kinds]`` bytes, 100 MB a layer pair and 3.2 GB in all, where moments took 465 GiB.
Operations: a thin QR is ``4·N²·(a + b)``, 0.1 TFLOP a layer pair for all spaces, and the cores ``O(N³)``; a forward
pass over 16,384 tokens takes 14 TFLOP a layer pair. In memory beside the two layers: one batch's activations, and rows
``4·N·(a + b)`` bytes or float32 sums ``4·(a·b + b²)`` for each space, 0.2 GB in all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from lorasuite.bases import ActivationRecorder, Batch, LayerStream, LoadedBase, Role, text_batches
from lorasuite.correspondence._moments import ORTHOGONAL, MapKind, Moments
from lorasuite.correspondence._options import POSITIONS, End
from lorasuite.errors import ConfigError, Problem
from lorasuite.progress import Progress
from lorasuite.stored import Stored

#: Roles that read what another one reads.
_READS: Mapping[Role, Role] = {"k": "q", "v": "q", "gate": "up"}


def space_name(role: Role, end: End, roles: Iterable[Role]) -> str:
    """The name of the space that a role reads or writes, where maps are of these roles."""
    if end == "out" and role in ("gate", "up") and "down" in roles:
        return "down.in"
    shared = _READS.get(role, role) if end == "in" else role
    return f"{shared if shared in roles else role}.{end}"


def sums_dtype(device: torch.device) -> torch.dtype:
    """What sums over rows are kept in: float32 on a device, where float64 may take 32 times as long, and float64 on the
    CPU, where it takes twice.

    Float32 changes a map by 1e-4 where a space has any variance to speak of. It is felt in directions whose
    covariance is a hundred-millionth of the strongest one's (some of what q and o write): those are rounding errors
    of the model's own arithmetic in either.
    """
    return torch.float64 if device.type == "cpu" else torch.float32


@dataclass(frozen=True, eq=False)
class SpaceMap:
    """A linear map ``(a, b)`` of rows of the old space to rows of the new one: ``scale·left·core·rightᵀ``.

    Attributes:
        core: ``(p, q)``; the map itself where there are no bases.
        left, right: orthonormal bases of the part of each side that is mapped, or None.
        scale: of the core, which is kept in half precision.
    """

    core: Float[Tensor, "p q"]
    left: Float[Tensor, "a p"] | None = None
    right: Float[Tensor, "b q"] | None = None
    scale: float = 1.0

    def rows(self, x: Float64[Tensor, "r a"]) -> Float64[Tensor, "r b"]:
        """``x·M``, as for the ``A`` of an update: ``2·r·(a·p + p·q + q·b)`` operations."""
        x = x.to(self._working)
        inner = (x if self.left is None else x @ self._own(self.left)) @ self._own(self.core)
        return self._given(inner if self.right is None else inner @ self._own(self.right).T)

    def columns(self, x: Float64[Tensor, "a r"]) -> Float64[Tensor, "b r"]:
        """``Mᵀ·x``, as for the ``B`` of an update: as many operations."""
        x = x.to(self._working)
        inner = self._own(self.core).T @ (x if self.left is None else self._own(self.left).T @ x)
        return self._given(inner if self.right is None else self._own(self.right) @ inner)

    @property
    def _working(self) -> torch.dtype:
        return torch.promote_types(self.core.dtype, torch.float32)

    def _own(self, factor: Tensor) -> Tensor:
        return factor.to(self._working)

    def _given(self, found: Tensor) -> Tensor:
        return found.double() * self.scale


@dataclass
class Space:
    """One space of a layer pair on the way through the texts: sums, or the rows of the sampled positions."""

    kinds: Sequence[MapKind]
    positions: int
    sums: Moments | None = None
    sampled: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, x: Float[Tensor, "n a"], y: Float[Tensor, "n b"], sample: Int64[Tensor, " m"]) -> None:
        """Take in rows of the same positions; ``sample``: those of them that count in a wide space."""
        a, b = x.shape[1], y.shape[1]
        count = len(self.kinds)
        if count * a * b <= self.positions * (a + b) + count * min(self.positions, a) * min(self.positions, b):
            if self.sums is None:
                self.sums = Moments.empty(a, b, self._squares, dtype=sums_dtype(x.device), device=x.device)
            self.sums.add(x, y)
        else:
            at = sample.to(x.device)
            self.sampled.append((x[at].to(sums_dtype(at.device)), y[at].to(sums_dtype(at.device))))

    @property
    def _squares(self) -> set[Any]:
        return {name for kind in self.kinds for name in kind.squares}

    def finished(self) -> tuple[dict[str, Tensor], Moments]:
        """The maps' factors in half precision by name, and the sums that they were computed from."""
        found: dict[str, Tensor] = {}
        sums = self.sums
        if sums is None:
            x, y = (torch.cat(rows) for rows in zip(*self.sampled, strict=True))
            (p, rx), (q, ry) = torch.linalg.qr(x.T), torch.linalg.qr(y.T)
            found |= {"left": p.half().cpu(), "right": q.half().cpu()}
            sums = Moments.empty(len(rx), len(ry), self._squares, widths=(x.shape[1], y.shape[1]), device=x.device)
            sums.add(rx.T, ry.T)
        sums = sums.double()
        for kind in self.kinds:
            core = kind.compute(sums)
            scale = core.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
            found |= {kind.name: (core / scale).half().cpu(), f"{kind.name}.scale": scale.float().cpu()}
        return found, sums


def align(
    old: LoadedBase,
    new: LoadedBase,
    layers: Mapping[int, int],
    roles: Sequence[Role],
    texts: Sequence[str],
    kinds: Mapping[End, Sequence[MapKind]],
    *,
    positions: int = POSITIONS,
    cutoff: int = 256,
    progress: Progress | None = None,
) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]:
    """The maps of every mapped layer pair, one pair at a time, as named tensors to be stored.

    One pass of each base over the texts as far as the last mapped layer, block by block and without the head.

    Args:
        layers: old → new layer, both increasing.
        roles: those both architectures have.
        kinds: of the maps of what projections read, and of what they write.
        positions: paired positions that are sampled for wide spaces; spaces kept dense read all.
        cutoff: tokens of a text read at most, in each base.

    Returns:
        the tensors, and JSON data that is complete when they have been read: ``roles``; ``rows``, the paired
        positions; and by old layer ``residual``, :meth:`Moments.unexplained` of each space.

    Raises:
        DataError: if no two positions pair.
    """
    batches = text_batches(texts, old, new, cutoff)
    info: dict[str, Any] = {"roles": list(roles), "rows": sum(len(batch.old_rows[0]) for batch in batches)}
    info["residual"] = {}
    return _pairs((old, new), layers, roles, batches, kinds, min(positions, info["rows"]), info, progress), info


def _pairs(
    bases: tuple[LoadedBase, LoadedBase],
    layers: Mapping[int, int],
    roles: Sequence[Role],
    batches: Sequence[Batch],
    kinds: Mapping[End, Sequence[MapKind]],
    positions: int,
    info: dict[str, Any],
    progress: Progress | None,
) -> Iterator[tuple[str, Tensor]]:
    samples = _samples([len(batch.old_rows[0]) for batch in batches], positions)
    wanted = _wanted(roles, kinds)
    for o, n, old, new in mapped_pairs(bases, layers, batches, progress):
        spaces: dict[str, Space] = {}
        with _by_role(bases[0], o) as reads, _by_role(bases[1], n) as also:
            for number, (batch, sample) in enumerate(zip(batches, samples, strict=True)):
                x = _read(old, reads, number, batch.old_rows, wanted)
                y = _read(new, also, number, batch.new_rows, wanted)
                for name in wanted:
                    if name in x and name in y:
                        spaces.setdefault(name, Space(wanted[name], positions)).add(x[name], y[name], sample)
        for name in list(spaces):
            found, sums = spaces.pop(name).finished()
            for part, value in found.items():
                yield f"{o}.{name}.{part}", value
            if ORTHOGONAL.name in found:
                info["residual"].setdefault(str(o), {})[name.replace(".", " ")] = round(sums.unexplained(), 4)


def mapped_pairs(
    bases: tuple[LoadedBase, LoadedBase], layers: Mapping[int, int], batches: Sequence[Batch], progress: Progress | None
) -> Iterator[tuple[int, int, LayerStream, LayerStream]]:
    """Every mapped layer pair, with both bases' texts on their way before its blocks: one pass of each base, as far as
    its last mapped layer.

    Args:
        layers: old → new layer, both increasing.
    """
    with (
        LayerStream(bases[0], [batch.old for batch in batches]) as old,
        LayerStream(bases[1], [batch.new for batch in batches]) as new,
    ):
        for done, (o, n) in enumerate(sorted(layers.items()), 1):
            for stream, layer in ((old, o), (new, n)):
                while stream.layer < layer:
                    stream.advance()
            yield o, n, old, new
            if progress is not None:
                progress(done, len(layers))


def _read(
    stream: LayerStream,
    recorder: ActivationRecorder,
    number: int,
    rows: tuple[Tensor, Tensor],
    names: Iterable[str],
) -> dict[str, Float[Tensor, "n _"]]:
    """Rows of the named spaces in one base, where its next block computed them, float32."""
    recorder.seen = {}
    stream.run(number)
    places = {(stream.layer, *name.split(".")): name for name in names}
    recorder.seen = {place: value for place, value in recorder.seen.items() if place in places}
    found = recorder.at(stream.texts[number], rows, dtype=torch.float32, device=None)
    return {places[place]: value for place, value in found.items()}


def _samples(counts: Sequence[int], size: int) -> list[Int64[Tensor, " _"]]:
    """Which of each batch's paired positions are among ``size`` drawn from all."""
    drawn = torch.zeros(sum(counts), dtype=torch.bool)
    drawn[torch.randperm(len(drawn), generator=torch.Generator().manual_seed(0))[:size]] = True
    return [part.nonzero()[:, 0] for part in drawn.split(list(counts))]


def _wanted(roles: Sequence[Role], kinds: Mapping[End, Sequence[MapKind]]) -> dict[str, list[MapKind]]:
    """The kinds of map of each space, by its name."""
    found: dict[str, dict[str, MapKind]] = {}
    for role in roles:
        for end, of in kinds.items():
            found.setdefault(space_name(role, end, roles), {}).update({kind.name: kind for kind in of})
    return {name: list(of.values()) for name, of in found.items() if of}


def _by_role(base: LoadedBase, layer: int) -> ActivationRecorder:
    """A recorder of all linear modules of a layer, by role."""
    recorder = ActivationRecorder(base)
    for module in base.architecture.modules:
        recorder.module(layer, module, by_role=True)
    return recorder


class AlignedMaps:
    """The maps that :func:`align` found, read from artifacts one space at a time."""

    def __init__(self, stored: Iterable[Stored]) -> None:
        self._parts = [(one, frozenset(one.keys())) for one in stored]

    def __call__(self, layer: int, role: Role, end: End, kind: MapKind) -> SpaceMap:
        """The map of what an old layer's role reads or writes.

        Raises:
            ConfigError: if there is none of that kind.
        """
        for one, names in self._parts:
            space = f"{layer}.{space_name(role, end, one.info['roles'])}"
            if f"{space}.{kind.name}" in names:
                return read_map(one, names, space, kind)
        what = f"there is no such map of what {role} of layer {layer} {'reads' if end == 'in' else 'writes'}"
        raise ConfigError(Problem(f"map {kind.name!r}", what, "The transform must declare it among its `maps`."))


def read_map(stored: Stored, names: Collection[str], space: str, kind: MapKind) -> SpaceMap:
    """A map as :meth:`Space.finished` named its tensors, below the name of the space."""
    left, right = (
        stored.tensor(f"{space}.{side}") if f"{space}.{side}" in names else None for side in ("left", "right")
    )
    scale = float(stored.tensor(f"{space}.{kind.name}.scale"))
    return SpaceMap(stored.tensor(f"{space}.{kind.name}"), left, right, scale)
