"""Parts *round* and *sequential*: old -> new -> old by every transform, and variants of the state map."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.transfer.lab import RANK, TASK, Lab, Row, Task, Updates, Variant
from benchmarks.transfer.pairs import scores
from lorasuite.bases import ActivationRecorder, LayerStream, Role, text_batches
from lorasuite.correspondence import AffineMap, LayerMaps, Reading, StateFeatures, StateMap
from lorasuite.transforms import Input, ModelTransform, transform


def fit_jointly(
    method: str,
    lab: Lab,
    adapted: Callable[[], Any],
    rows: Sequence[Row],
    roles: Sequence[Role],
    states: StateMap | None = None,
) -> Updates:
    """The updates of a model transform; ``states``: in place of the state map it would have."""
    chosen = transform(method)
    assert isinstance(chosen, ModelTransform)
    if states is None and Input.STATE_MAP in chosen.inputs:
        states = state_map(lab, roles)
    texts = [row["prompt"] + row["completion"] for row in rows]
    return chosen.fit(lab.old.loaded, lab.new.loaded, adapted, roles, states=states, texts=texts, rank=RANK).updates


def state_map(lab: Lab, roles: Sequence[Role], kind: type[StateFeatures] = StateFeatures) -> StateMap:
    """The pair's state map of the general texts."""
    return StateMap.learned(lab.old.loaded, lab.new.loaded, roles, lab.general.texts, kind=kind)


def there_and_back(task: Task, method: str) -> dict[str, float]:
    lab = task.lab
    back = lab.reversed()
    if isinstance(transform(method), ModelTransform):
        there = fit_jointly(method, lab, task.adapted, task.rows, task.roles)
        returned = fit_jointly(method, back, lambda: lab.new.changed(there), task.rows, task.roles)
    else:
        there = lab.moved(task.parts, lambda *_: transform(method))
        returned = back.moved(lab.new.parts(there), lambda *_: transform(method))
    error = total = 0.0
    for path, update in task.updates.items():
        size = update.norm() ** 2
        total += size
        got = returned.get(path)
        error += size if got is None else float((got.dense() - update.dense()).square().sum())
    with lab.old.changed(returned):
        return {**scores(lab.old.model, lab.old.tokenizer, task.test), "error": (error / total) ** 0.5}


class Fourier(StateFeatures):
    """With random Fourier features (1,024) beside the linear ones: a map that is not linear in the old state."""

    count = 1024

    def _waves(self, rows: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        width = rows.shape[1]
        w = torch.randn(width, self.count, generator=generator, dtype=rows.dtype) / width**0.5
        return (rows @ w + torch.rand(self.count, generator=generator, dtype=rows.dtype) * 2 * torch.pi).cos()

    def learn(self, rows: Sequence[Tensor]) -> None:
        super().learn(rows)
        waves = torch.cat([self._waves(row) for row in super().standardise(rows)])
        self.wave_mean, self.wave_scale = waves.mean(0), waves.std(0) + 1e-6

    def standardise(self, rows: Sequence[Tensor]) -> list[Tensor]:
        linear = super().standardise(rows)
        return [torch.cat([row, (self._waves(row) - self.wave_mean) / self.wave_scale], 1) for row in linear]


@dataclass(frozen=True)
class Near(AffineMap):
    """A map to which its own mean error ``(n, width)`` at the nearest general positions is added."""

    errors: Tensor
    nearest: Callable[[Tensor], Tensor]

    def __call__(self, z: Tensor) -> Tensor:
        return super().__call__(z) + self.errors[self.nearest(z)].mean(1)


def neighbours(lab: Lab, roles: Sequence[Role], count: int = 8, kept: int = 128) -> StateMap:
    """The state map with the ridge's own error at the nearest general positions added back."""
    known, new = state_map(lab, roles), lab.new.loaded
    batches = text_batches(lab.general.texts, lab.old.loaded, new, 256)
    inputs = known.features.states(batches)
    whole = torch.cat(inputs)
    basis = torch.linalg.eigh(whole.T @ whole)[1][:, -kept:]
    rows = whole @ basis
    found: dict[int, Tensor] = {}

    def nearest(z: Tensor) -> Tensor:
        if id(z) not in found:
            found[id(z)] = torch.cdist(z @ basis, rows).topk(count, largest=False).indices
        return found[id(z)]

    reading = Reading(batches, LayerStream(new, [batch.new for batch in batches]))
    layers = []
    for number in range(new.dims.layers):
        layer, maps = known.layer(number), {}
        with ActivationRecorder(new).block_and_modules(number) as recorder:
            seen = list(reading.all(recorder))
        for place, linear in layer.maps.items():
            errors = torch.cat([at[place] - linear(z) for at, z in zip(seen, inputs, strict=True)])
            maps[place] = Near(linear.matrix, linear.mean, linear.error, errors, nearest)
        layers.append(LayerMaps(maps, layer.additive))
        reading.stream.advance()
    return StateMap(known.features, layers.__getitem__)


def sequentials(task: Task, more: bool) -> Iterator[Variant]:
    lab = task.lab
    every = lab.new.architecture.roles

    def run(
        count: int, roles: Sequence[Role], learned: Callable[[Lab, Sequence[Role]], StateMap] = state_map
    ) -> Updates:
        return fit_jointly("sequential", lab, task.adapted, task.written(count), roles, learned(lab, roles))

    yield "sequential", "bare", lambda: run(TASK, task.roles)
    yield "sequential, all projections", "sequential", lambda: run(TASK, every)
    fourier = partial(state_map, kind=Fourier)
    yield "sequential, Fourier features", "sequential", lambda: run(TASK, task.roles, fourier)
    yield "sequential, nearest neighbours", "sequential", lambda: run(TASK, task.roles, neighbours)
    yield "sequential, 1,500 rows", "sequential", lambda: run(1500, task.roles)
    if more:
        yield "sequential, 4,000 rows", "sequential", lambda: run(4000, task.roles)
    yield "sequential, 1,500 rows, all projections", "sequential", lambda: run(1500, every)
    if more:
        yield "sequential, 4,000 rows, all projections", "sequential", lambda: run(4000, every)
    every_near = "sequential, all projections, nearest neighbours"
    yield every_near, "sequential, all projections", lambda: run(TASK, every, neighbours)
    if more:
        yield "sequential, 1,500 rows, all, nearest", every_near, lambda: run(1500, every, neighbours)
