"""Parts *round* and *sequential*: old -> new -> old by every transform, and variants of the state map."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.transfer.lab import RANK, TASK, Lab, Row, Task, Updates, Variant
from benchmarks.transfer.pairs import scores
from lorasuite.bases import ActivationRecorder, Role
from lorasuite.correspondence import _state_map as state_map
from lorasuite.transforms import Input, ModelTransform, transform


def fit_jointly(
    method: str, lab: Lab, adapted: Callable[[], Any], rows: Sequence[Row], roles: Sequence[Role]
) -> Updates:
    states = None
    chosen: Any = transform(method)
    if Input.STATE_MAP in chosen.inputs:
        states = state_map.StateMap.learned(lab.old.loaded, lab.new.loaded, roles, lab.general.texts)
    found: Updates = chosen.fit(
        lab.old.loaded, lab.new.loaded, adapted, roles, states=states,
        texts=[row["prompt"] + row["completion"] for row in rows], rank=RANK,
    ).updates  # fmt: skip
    return found


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


class Fourier(state_map.Features):
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


def neighbours(count: int = 8, kept: int = 128) -> Any:
    """A patch of the state maps: the ridge's own error at the nearest general positions is added back."""
    original = state_map._maps
    cache: dict[Any, Any] = {}

    class Near(state_map.Map):
        errors: Tensor
        of: Callable[[Tensor], Tensor]

        def __call__(self, z: Tensor) -> Tensor:
            return super().__call__(z) + self.errors[self.of(z)].mean(1)

    def maps(new: Any, layer: int, ends: Any, known: Any) -> Any:
        reading, inputs, _ = known
        if "basis" not in cache:
            whole = torch.cat(inputs)
            cache["basis"] = torch.linalg.eigh(whole.T @ whole)[1][:, -kept:]
            cache["rows"] = whole @ cache["basis"]

        def of(z: Tensor) -> Tensor:
            if id(z) not in cache:
                cache[id(z)] = torch.cdist(z @ cache["basis"], cache["rows"]).topk(count, largest=False).indices
            found: Tensor = cache[id(z)]
            return found

        found, additive = original(new, layer, ends, known)
        with ActivationRecorder(new).block_and_modules(layer) as recorder:
            seen = list(reading.all(recorder))
        for key, linear in list(found.items()):
            near = Near(linear.matrix, linear.mean, linear.error)
            errors = torch.cat([at[key] - linear(z) for at, z in zip(seen, inputs, strict=True)])
            object.__setattr__(near, "errors", errors)
            object.__setattr__(near, "of", of)
            found[key] = near
        return found, additive

    return mock.patch.object(state_map, "_maps", maps)


def sequentials(task: Task, more: bool) -> Iterator[Variant]:
    lab = task.lab
    every = lab.new.architecture.roles

    def run(count: int, roles: Sequence[Role], patch: Callable[[], Any] = contextlib.nullcontext) -> Updates:
        with patch():
            return fit_jointly("sequential", lab, task.adapted, task.written(count), roles)

    yield "sequential", "bare", lambda: run(TASK, task.roles)
    yield "sequential, all projections", "sequential", lambda: run(TASK, every)
    fourier = partial(mock.patch.object, state_map, "Features", Fourier)
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
