"""Where the new base stands when the old one stands somewhere: a linear map of states that have read the same text.

It depends on the two bases and on general texts alone, so it is learned once for all adapters of a pair
(see :mod:`lorasuite.transforms.sequential`). Features of an old state are what all old layers hold there: residual
streams, mixed attention values and MLP activations, so no layer map and no head map is needed. From them a ridge
regression predicts what each new block, and each module of it, reads or writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float32, Float64
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
    unpaired,
)
from lorasuite.correspondence._regression import TargetSums, ridge_factor, zeros

#: Ridge of the map, relative to the mean variance of its features. It is read far from the texts it was learned on, so
#: it must not follow their every detail: 1e-3 fits those better, and did worse on each of six tasks (docs/transfer.md).
MAP_RIDGE = 0.1
#: Features of an old state at most: above it, each space is projected at random onto its share of them.
FEATURES = 2048


class StateFeatures:
    """An old model's state at each position: all layers' streams, attention mixes and MLP activations, standardised."""

    def __init__(self, old: LoadedBase, seed: int = 0) -> None:
        self.old, self.seed = old, seed
        self.sketches: dict[Place, Float64[Tensor, "width share"]] = {}
        self.mean = self.scale = torch.zeros(0)

    def recorder(self) -> ActivationRecorder:
        """One of the places that the features are taken from."""
        recorder = ActivationRecorder(self.old)
        for layer in range(self.old.dims.layers):
            recorder.block(layer)
            for module, _ in linear_modules(self.old, layer).values():
                if set(module.roles) & {"o", "down"}:
                    recorder.module(layer, module)
        return recorder

    def raw(self, recorder: ActivationRecorder, batch: Batch) -> Float64[Tensor, "positions features"]:
        """A batch's features, not standardised."""
        seen = recorder.read(batch.old, batch.old_rows)
        last = self.old.dims.layers - 1
        keys = [k for k in seen if k[2] == "in" or k == (last, "block", "out")]
        share = max(FEATURES // len(keys), 1)
        total = sum(seen[k].shape[1] for k in keys)
        parts = []
        for key in keys:
            part = seen[key]
            if total > FEATURES and part.shape[1] > share:
                part = part @ self._sketch(key, part.shape[1], share)
            parts.append(part)
        return torch.cat(parts, 1)

    def _sketch(self, key: Place, width: int, share: int) -> Float64[Tensor, "{width} {share}"]:
        if key not in self.sketches:
            generator = torch.Generator().manual_seed(self.seed + len(self.sketches))
            self.sketches[key] = torch.randn(width, share, generator=generator, dtype=torch.float64) / share**0.5
        return self.sketches[key]

    def of(self, batches: Sequence[Batch]) -> list[Float64[Tensor, "_ features"]]:
        """Each batch's features at its paired positions."""
        with self.recorder() as recorder:
            return [self.raw(recorder, batch) for batch in batches]

    def standardise(self, rows: Sequence[Float64[Tensor, "_ features"]]) -> list[Float64[Tensor, "_ features"]]:
        """Features less their mean and over their scale, as learned."""
        return [(row - self.mean) / self.scale for row in rows]

    def learn(self, rows: Sequence[Float64[Tensor, "_ features"]]) -> None:
        """Centre and scale; what varies less than the median feature is scaled as that one.

        An MLP unit that is quiet on general texts may be loud on the task's: divided by its own small deviation it
        would drown all others.
        """
        whole = torch.cat(list(rows))
        spread = whole.std(0)
        self.mean, self.scale = whole.mean(0), spread.clamp(min=max(float(spread.median()), 1e-6))


@dataclass(frozen=True)
class Reading:
    """Batches of texts on their way through the new base."""

    batches: list[Batch]
    stream: LayerStream

    def all(self, recorder: ActivationRecorder) -> Iterator[dict[Place, Tensor]]:
        """What the next block reads and writes at the paired positions of each batch."""
        for number, batch in enumerate(self.batches):
            yield self.stream.read(recorder, number, batch.new_rows)


@dataclass(frozen=True)
class AffineMap:
    """An affine map of standardised features, and the share of variance it does not explain, in 0 … 1."""

    matrix: Float32[Tensor, "features width"]
    mean: Float64[Tensor, " width"]
    error: float

    def __call__(self, z: Float64[Tensor, "n features"]) -> Float64[Tensor, "n width"]:
        """States that go with these features."""
        return (z.float() @ self.matrix).double() + self.mean  # the map is coarser than float32


@dataclass(frozen=True)
class LayerMaps:
    """The maps to one new block's spaces: by ``(layer, module or "block", "in" or "out")``."""

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

        def layer(number: int) -> LayerMaps:
            known = info["layers"][number]
            maps = {
                (number, name, end): AffineMap(tensor(f"{key}.matrix"), tensor(f"{key}.mean"), error)
                for key, error in known["errors"].items()
                for name, end in [key.removeprefix(f"{number}.").rsplit(".", 1)]
            }
            return LayerMaps(maps, known["additive"])

        return cls(features, layer)


def state_map_tensors(
    features: StateFeatures, layers: Iterable[LayerMaps], info: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """The map as named tensors, a layer in memory at a time; ``info`` is filled as they are read."""
    info |= {"seed": features.seed, "layers": []}
    yield from (("mean", features.mean), ("scale", features.scale))
    for found in layers:
        errors = {}
        for key, it in found.maps.items():
            name = ".".join(map(str, key))
            yield from ((f"{name}.matrix", it.matrix), (f"{name}.mean", it.mean))
            errors[name] = it.error
        info["layers"].append({"additive": found.additive, "errors": errors})


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
    """The features, and the maps of one new layer after the other.

    Memory: the features ``(positions, ≤ 2,048)`` in float64, the texts' hidden states, and one layer's maps. Time: one
    pass of the old base over the texts and two of the new one, and a solve of the features' size.

    Args:
        roles: projections whose outputs are mapped to, beside what blocks read and write.
        texts: general texts, which both bases know.
        seed: of the random projections of wide features.
        kind: of features.

    Raises:
        DataError: if no two positions of the two tokenizations pair.
    """
    batches = text_batches(texts, old, new, cutoff)
    if not batches:
        raise unpaired("calibration")
    features = kind(old, seed)
    raw = features.of(batches)
    features.learn(raw)
    inputs = features.standardise(raw)
    del raw
    gram = sum((z.T @ z for z in inputs), zeros(inputs[0].shape[1], inputs[0].shape[1]))
    solver = ridge_factor(gram, MAP_RIDGE)
    known = Reading(batches, LayerStream(new, [batch.new for batch in batches])), inputs, solver
    return features, _layers(new, roles, known)


def modules_of_roles(new: LoadedBase, layer: int, roles: Sequence[Role]) -> list[str]:
    """The linear modules of a block that hold any of the roles, in order of their names."""
    return sorted(n for n, (module, _) in linear_modules(new, layer).items() if set(module.roles) & set(roles))


def _layers(new: LoadedBase, roles: Sequence[Role], known: tuple[Reading, list[Tensor], Tensor]) -> Iterator[LayerMaps]:
    for layer in range(new.dims.layers):
        names = modules_of_roles(new, layer, roles)
        if names:
            ends = [(layer, "block", "in"), (layer, "block", "out"), *((layer, name, "out") for name in names)]
            yield LayerMaps(*_maps(new, layer, ends, known))
        else:
            yield LayerMaps({}, False)
        known[0].stream.advance()


def _maps(
    new: LoadedBase,
    layer: int,
    ends: Sequence[Place],
    known: tuple[Reading, list[Tensor], Tensor],
) -> tuple[dict[Place, AffineMap], bool]:
    """Ridge maps from old features to one new block's spaces in the bare base, and whether the block adds exactly what
    its output projections write (not so where a norm follows them)."""
    reading, inputs, solver = known
    sums: dict[Place, TargetSums] = {}
    additive = True
    writers = [name for name, (module, _) in linear_modules(new, layer).items() if module.roles[0] in ("o", "down")]
    with ActivationRecorder(new).block_and_modules(layer) as recorder:
        for z, seen in zip(inputs, reading.all(recorder), strict=True):
            for key in ends:
                sums.setdefault(key, TargetSums.empty(z.shape[1], seen[key].shape[1])).add(z, seen[key])
            written = [seen[layer, name, "out"] for name in writers]
            added = seen[layer, "block", "out"] - seen[layer, "block", "in"]
            if len(written) != 2 or not torch.allclose(added, sum(written, 0 * added), atol=1e-3, rtol=1e-3):
                additive = False
    maps = {}
    for key, it in sums.items():
        mean = it.y / it.rows
        matrix = torch.cholesky_solve(it.xy, solver)  # the features are centred, so the mean needs no correction
        variance = float(it.square - it.rows * (mean * mean).sum())
        explained = float((matrix * it.xy).sum())
        maps[key] = AffineMap(matrix.float(), mean, max(0.0, 1 - explained / variance) if variance > 0 else 0.0)
    return maps, additive
