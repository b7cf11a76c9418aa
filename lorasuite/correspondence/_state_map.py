"""Where the new base stands when the old one stands somewhere: a linear map of states that have read the same text.

It depends on the two bases and on general texts alone, so it is learned once for all adapters of a pair
(see :mod:`lorasuite.transforms.sequential`). Features of an old state are what all old layers hold there: residual
streams, mixed attention values and MLP activations, so no layer map and no head map is needed. From them a ridge
regression predicts what each new block, and each module of it, reads or writes.

Features are kept in coordinates of their strongest principal directions on the general texts. There the ridge is
diagonal, and what is cut off are the directions that it damps most: of a prediction, the part of a direction of
variance ``μ`` is ``μ/(μ + λ)`` of the least-squares one. What q, k, v, gate and up write is not mapped: each is linear
in what it reads, one space for q, k and v and one for gate and up, and the ridge regression of ``XWᵀ`` is that of ``X``
times ``Wᵀ``.

Cost for Llama-2-7B → Llama-3-8B (F = 2,048 features cut to k = 1,200, d = 4,096, 32 blocks): ``2·k·4d`` bytes a block
in half precision (the stream, what is read by q and by up, what o writes), 39 MB a block and 1.3 GB in all; for N
positions ``12·N·F·k`` operations to find the directions, ``2·N·k·4d`` a block (at N = 16,384 0.6 TFLOP a block, where a
forward pass takes 7), and an eigenvalue problem of ``k × k``. In memory: features of ``4·N·F`` bytes, and a block's
maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lorasuite.bases import (
    ActivationRecorder,
    Batch,
    LayerStream,
    LoadedBase,
    Place,
    Role,
    linear_modules,
    text_batches,
)
from lorasuite.correspondence._options import DIRECTIONS, FEATURES
from lorasuite.correspondence._regression import TargetSums

#: Ridge of the map, relative to the mean variance of its features. It is read far from the texts it was learned on, so
#: it must not follow their every detail: 1e-3 fits those better, and did worse on each of six tasks (docs/transfer.md).
MAP_RIDGE = 0.1


class StateFeatures:
    """An old model's state at each position: all layers' streams, attention mixes and MLP activations, standardised."""

    def __init__(self, old: LoadedBase, seed: int = 0) -> None:
        self.old, self.seed = old, seed
        self.mean = self.scale = torch.zeros(0)
        #: Principal directions ``(features, k)``, orthonormal.
        self.basis = torch.zeros(0, 0)

    def places(self, layer: int) -> list[tuple[Place, int]]:
        """Where one layer's features are taken from, and how wide that is."""
        d = self.old.dims.hidden_size
        found: list[tuple[Place, int]] = [((layer, "block", "in"), d)]
        for name, (module, linear) in linear_modules(self.old, layer).items():
            if set(module.roles) & {"o", "down"}:
                found.append(((layer, name, "in"), _inputs(linear)))
        if layer == self.old.dims.layers - 1:
            found.append(((layer, "block", "out"), d))
        return found

    def of(self, batches: Sequence[Batch]) -> list[Float[Tensor, "_ features"]]:
        """Each batch's features at its paired positions, not standardised: one pass of the old base, layer by layer."""
        layers = [self.places(layer) for layer in range(self.old.dims.layers)]
        widths = [width for places in layers for _, width in places]
        share = max(FEATURES // len(widths), 1)
        sketched = sum(widths) > FEATURES
        parts: list[list[Tensor]] = [[] for _ in batches]
        sketches = 0
        with LayerStream(self.old, [batch.old for batch in batches]) as stream:
            for layer, places in enumerate(layers):
                bases: dict[Place, Tensor] = {}
                for place, width in places:
                    if sketched and width > share:
                        bases[place] = self._sketch(sketches, width, share).to(self.old.device)
                        sketches += 1
                with self._recorder(layer) as recorder:
                    for number, batch in enumerate(batches):
                        seen = stream.read(recorder, number, batch.old_rows, dtype=torch.float32, device=None)
                        for place, _ in places:
                            found = seen[place] @ bases[place] if place in bases else seen[place]
                            parts[number].append(found.to(self.old.device))
                if layer < len(layers) - 1:
                    stream.advance()
        return [torch.cat(of, 1) for of in parts]

    def _recorder(self, layer: int) -> ActivationRecorder:
        recorder = ActivationRecorder(self.old).block(layer)
        for module, _ in linear_modules(self.old, layer).values():
            if set(module.roles) & {"o", "down"}:
                recorder.module(layer, module)
        return recorder

    def _sketch(self, number: int, width: int, share: int) -> Float[Tensor, "{width} {share}"]:
        generator = torch.Generator().manual_seed(self.seed + number)
        drawn: Tensor = torch.randn(width, share, generator=generator) / share**0.5
        return drawn

    def standardise(self, rows: Sequence[Float[Tensor, "_ features"]]) -> list[Float[Tensor, "_ features"]]:
        """Features less their mean and over their scale, as learned."""
        return [(row - self.mean.to(row)) / self.scale.to(row) for row in rows]

    def states(self, batches: Sequence[Batch]) -> list[Float[Tensor, "_ k"]]:
        """What maps are applied to: each batch's standardised features along the principal directions."""
        return [row @ self.basis.to(row) for row in self.standardise(self.of(batches))]

    def learn(self, rows: Sequence[Float[Tensor, "_ features"]]) -> None:
        """Centre and scale; what varies less than the median feature is scaled as that one.

        An MLP unit that is quiet on general texts may be loud on the task's: divided by its own small deviation it
        would drown all others.
        """
        whole = torch.cat(list(rows))
        spread = whole.std(0)
        self.mean, self.scale = whole.mean(0).cpu(), spread.clamp(min=max(float(spread.median()), 1e-6)).cpu()

    def reduce(self, rows: Sequence[Float[Tensor, "_ features"]]) -> tuple[list[Tensor], Float64[Tensor, " k"]]:
        """Find the principal directions of standardised rows: the rows along these, and ``XᵀX + λI``, diagonal there.

        More than :data:`DIRECTIONS` of them are found by subspace iteration, in products of ``2·N·F·k`` operations.
        """
        whole = torch.cat(list(rows))
        strength = MAP_RIDGE * whole.square().sum().double().cpu() / whole.shape[1]
        basis = _span(whole, min(DIRECTIONS, len(whole)), self.seed)
        inside = whole @ basis
        values, vectors = (part.cpu() for part in torch.linalg.eigh((inside.T @ inside).double()))
        self.basis = _rounded(basis.cpu() @ vectors.float())
        return [row @ self.basis.to(row) for row in rows], values.clamp(min=0) + strength


def _size(matrix: Float[Tensor, "_ _"]) -> Float[Tensor, ""]:
    """What a matrix is divided by before it is kept in half precision."""
    return matrix.abs().max().clamp(min=torch.finfo(torch.float32).tiny)


def _rounded(matrix: Float[Tensor, "a b"]) -> Float[Tensor, "a b"]:
    """As it will be read again."""
    size = _size(matrix)
    return (matrix / size).half().float() * size


def _span(rows: Float[Tensor, "n features"], rank: int, seed: int) -> Float[Tensor, "features k"]:
    """An orthonormal basis of the rows' strongest directions, all of them where there are no more than ``rank``."""
    if rows.shape[1] <= rank:
        return torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(rows.shape[1], rank, generator=generator).to(rows)
    for _ in range(3):
        found = torch.linalg.qr(rows.T @ (rows @ found))[0]
    return found


def _inputs(linear: Any) -> int:
    """Columns that a linear module reads, whichever way its weight lies."""
    return int(linear.in_features if hasattr(linear, "in_features") else linear.weight.shape[0])


@dataclass(frozen=True)
class Reading:
    """Batches of texts on their way through the new base."""

    batches: list[Batch]
    stream: LayerStream

    def all(self, recorder: ActivationRecorder) -> Iterator[dict[Place, Float[Tensor, "_ _"]]]:
        """What the next block reads and writes at the paired positions of each batch, float32, where it computed it."""
        for number, batch in enumerate(self.batches):
            yield self.stream.read(recorder, number, batch.new_rows, dtype=torch.float32, device=None)


@dataclass(frozen=True)
class AffineMap:
    """An affine map of an old state, and the share of variance it does not explain, in 0 … 1."""

    matrix: Float[Tensor, "k width"]
    mean: Float[Tensor, " width"]
    error: float

    def __call__(self, z: Float[Tensor, "n k"]) -> Float[Tensor, "n width"]:
        """States that go with these old ones."""
        return torch.addmm(self.mean.to(z), z, self.matrix.to(z))


@dataclass(frozen=True)
class LayerMaps:
    """The maps to one new block's spaces: by ``(layer, module or "block", "in" or "out")``.

    Of what is read there are those that :func:`reader` names, of what is written the block's own, o's, and ``down``'s
    where it is needed.
    """

    maps: Mapping[Place, AffineMap]
    #: Whether the block adds exactly what its output projections write (not so where a norm follows them).
    additive: bool


@dataclass(frozen=True)
class StateMap:
    """The features of old states, and each new layer's maps from them."""

    features: StateFeatures
    layer: Callable[[int], LayerMaps]

    @classmethod
    def learned(cls, *arguments: Any, **named: Any) -> StateMap:
        """All of it in memory, with the arguments of :func:`learn_state_map`."""
        features, layers = learn_state_map(*arguments, **named)
        return cls(features, list(layers).__getitem__)

    @classmethod
    def read(cls, old: LoadedBase, tensor: Callable[[str], Tensor], info: Mapping[str, Any]) -> StateMap:
        """What :func:`state_map_tensors` wrote, a layer at a time."""
        features = StateFeatures(old, info["seed"])
        features.mean, features.scale = tensor("mean"), tensor("scale")
        features.basis = tensor("basis").float() * tensor("basis.size")

        def layer(number: int) -> LayerMaps:
            known = info["layers"][number]
            maps = {}
            for key, (name, error) in known["maps"].items():
                module, end = key.rsplit(".", 1)
                size = tensor(f"{name}.size")
                matrix = tensor(f"{name}.matrix").float() * size
                maps[number, module, end] = AffineMap(matrix, tensor(f"{name}.mean"), error)
            return LayerMaps(maps, known["additive"])

        return cls(features, layer)


def state_map_tensors(
    features: StateFeatures, layers: Iterable[LayerMaps], info: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """The map as named tensors in half precision, a layer in memory at a time; ``info`` is filled as they are read.

    What a block reads is what the one before it wrote, and stored once.
    """
    info |= {"seed": features.seed, "layers": []}
    size = _size(features.basis)
    yield from (("mean", features.mean), ("scale", features.scale))
    yield from (("basis", (features.basis / size).half()), ("basis.size", size))
    last: tuple[str, AffineMap | None] = "", None
    for number, found in enumerate(layers):
        known: dict[str, tuple[str, float]] = {}
        written = last
        for (_, module, end), it in found.maps.items():
            name = f"{number}.{module}.{end}"
            if it is last[1]:
                name = last[0]
            else:
                size = _size(it.matrix)
                yield f"{name}.matrix", (it.matrix / size).half()
                yield from ((f"{name}.size", size), (f"{name}.mean", it.mean))
            known[f"{module}.{end}"] = name, it.error
            if (module, end) == ("block", "out"):
                written = name, it
        last = written
        info["layers"].append({"additive": found.additive, "maps": known})


def learn_state_map(
    old: LoadedBase,
    new: LoadedBase,
    roles: Sequence[Role],
    texts: Sequence[str],
    *,
    cutoff: int = 256,
    seed: int = 0,
    kind: type[StateFeatures] = StateFeatures,
) -> tuple[StateFeatures, Iterator[LayerMaps]]:
    """The features, and the maps of one new layer after the other: one pass of each base over the texts.

    Args:
        roles: projections whose outputs are mapped to, beside what blocks read and write.
        texts: general texts, which both bases know.
        seed: of the random projections of wide features.
        kind: of features.

    Raises:
        DataError: if no two positions of the two tokenizations pair.
    """
    batches = text_batches(texts, old, new, cutoff)
    features = kind(old, seed)
    raw = features.of(batches)
    features.learn(raw)
    standard = features.standardise(raw)
    del raw
    states, squares = features.reduce(standard)
    return features, _layers(new, roles, batches, states, squares)


def modules_of_roles(new: LoadedBase, layer: int, roles: Sequence[Role]) -> list[str]:
    """The linear modules of a block that hold any of the roles, in order of their names."""
    return sorted(n for n, (module, _) in linear_modules(new, layer).items() if set(module.roles) & set(roles))


def reader(new: LoadedBase, layer: int, name: str) -> str | None:
    """The module whose input a module's is taken for, where its output is mapped by what it reads: q's for q, k and v,
    up's for gate and up; None for modules that write to the stream, whose outputs are mapped themselves."""
    modules = linear_modules(new, layer)
    role = modules[name][0].roles[0]
    if role in ("o", "down"):
        return None
    shared = "q" if role in ("q", "k", "v") else "up"
    return next((other for other, (module, _) in modules.items() if shared in module.roles), name)


def _layers(
    new: LoadedBase,
    roles: Sequence[Role],
    batches: list[Batch],
    states: list[Tensor],
    squares: Float64[Tensor, " k"],
) -> Iterator[LayerMaps]:
    with LayerStream(new, [batch.new for batch in batches]) as stream:
        reading = Reading(batches, stream)
        stood: AffineMap | None = None
        for layer in range(new.dims.layers):
            found = LayerMaps({}, False)
            if names := modules_of_roles(new, layer, roles):
                found = _maps(new, layer, names, reading, states, squares, stood)
            stood = found.maps.get((layer, "block", "out"))
            yield found
            stream.advance()


def _maps(
    new: LoadedBase,
    layer: int,
    names: Sequence[str],
    reading: Reading,
    states: list[Tensor],
    squares: Float64[Tensor, " k"],
    stood: AffineMap | None,
) -> LayerMaps:
    """Ridge maps from old states to one new block's spaces in the bare base; ``stood``: the one to what it reads, if
    that is known."""
    readers = {name: reader(new, layer, name) for name in names}
    ends: dict[Place, None] = {} if stood is not None else {(layer, "block", "in"): None}
    ends[layer, "block", "out"] = None
    ends |= {(layer, read, "in") if read else (layer, name, "out"): None for name, read in readers.items()}
    writers = [name for name, (module, _) in linear_modules(new, layer).items() if module.roles[0] in ("o", "down")]
    sums: dict[Place, TargetSums] = {}
    additive = True
    with ActivationRecorder(new).block_and_modules(layer) as recorder:
        for z, seen in zip(states, reading.all(recorder), strict=True):
            for key in ends:
                y = seen[key]
                if key not in sums:
                    sums[key] = TargetSums.empty(z.shape[1], y.shape[1], y.device, torch.float32)
                sums[key].add(z.to(y), y)
            written = [seen[layer, name, "out"] for name in writers]
            added = seen[layer, "block", "out"] - seen[layer, "block", "in"]
            if len(written) != 2 or not torch.allclose(added, sum(written, 0 * added), atol=1e-3, rtol=1e-3):
                additive = False
    maps: dict[Place, AffineMap] = {} if stood is None else {(layer, "block", "in"): stood}
    for key, it in sums.items():
        if additive and key[1] in writers and linear_modules(new, layer)[key[1]][0].roles[0] == "down":
            continue  # what it should write is what the stream lacks
        mean, xy = it.y.double().cpu() / it.rows, it.xy.double().cpu()
        matrix = xy / squares[:, None]  # old states are centred, so the mean needs no correction
        variance = float(it.square) - it.rows * float(mean.square().sum())
        left = 1 - float((matrix * xy).sum()) / variance if variance > 0 else 0.0
        maps[key] = AffineMap(_rounded(matrix.float()), mean.float(), min(max(0.0, left), 1.0))
    return LayerMaps(maps, additive)
