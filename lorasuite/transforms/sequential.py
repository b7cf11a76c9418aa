"""The new base's modules fitted in order, so that it passes through the states the old base + adapter passes through.

A layer transform moves one module's update at a time, and nothing makes the moved modules work together. This one fits
the adapted model as a whole, all old layers feeding every new one. Two steps, both closed-form, without labels and
without gradients:

1. On general texts a ridge regression learns what state of the *new base* goes with a state of the *old base*
   (:class:`lorasuite.correspondence.StateMap`: once for all adapters of a pair).
2. On task texts the old base **with its adapter** gives the states to reach. The new base's modules are then fitted
   in the order they run, each by reduced-rank ridge regression from what it reads now, with all modules before it
   already fitted, to what the map says it should write. Modules that write to the residual stream are fitted to the
   stream, and so also mend what the modules before them left.

The targets are absolute: the map of the adapted state, not of its change. Bare bases have often never met the task, so
their states there are arbitrary; the adapted one's are like those on general texts, which the map was learned on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lorasuite.adapters import LowRank
from lorasuite.bases import (
    ROLES,
    ActivationRecorder,
    LayerStream,
    LoadedBase,
    Place,
    Role,
    linear_modules,
    put_weights,
    text_batches,
)
from lorasuite.correspondence import (
    LayerMaps,
    Moments,
    Reading,
    RegressionSums,
    StateMap,
    modules_of_roles,
    reader,
    reduced_rank,
    reduced_rank_of_rows,
)
from lorasuite.errors import ConfigError, Problem
from lorasuite.progress import Progress
from lorasuite.transforms._protocol import FittedUpdates, Input, ModelTransform
from lorasuite.transforms._registry import register

#: The order modules are fitted in within a block.
ORDER: tuple[tuple[Role, ...], ...] = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


@register
class Sequential(ModelTransform):
    """Each module of the new base fitted in turn, with all before it already fitted."""

    name = "sequential"
    inputs = frozenset({Input.STATE_MAP})
    roles = frozenset(ROLES)
    reads_texts = True

    def fit(
        self,
        old: LoadedBase,
        new: LoadedBase,
        adapted: Callable[[], contextlib.AbstractContextManager[Any]],
        roles: Sequence[Role],
        *,
        states: StateMap | None,
        texts: Sequence[str],
        rank: int,
        cutoff: int = 256,
        progress: Progress | None = None,
    ) -> FittedUpdates:
        """Fit the new base's modules of these roles to follow the old base + adapter on the task texts.

        Memory: the features ``(positions, ≤ 2,048)`` in float32 and one hidden state of the texts, and for one block at
        a time its maps, its own weights once more, and the second moments of what its modules read. Time: the old base
        passes once over the texts; the new one goes through each block twice, and three times as far as to what the
        modules at hand read. A block's fits are Cholesky factors and eigenvalue problems of its spaces' sizes. For an
        8B base and 12,000 positions that is 3.2 × 168 TFLOP, and sums of 11 TFLOP a block, most for ``down``: its rows
        are kept where positions are fewer than the MLP is wide.

        Raises:
            ConfigError: without a state map.
            DataError: if no two positions of the two tokenizations pair.
        """
        if states is None:
            raise ConfigError(Problem("method", "it needs a state map of the two bases", "Give --calibration texts."))
        batches = text_batches(texts, old, new, cutoff, subject="texts")
        with adapted():
            wanted = states.features.states(batches)
        task = Reading(batches, LayerStream(new, [batch.new for batch in batches]))
        result = FittedUpdates()
        for layer in range(new.dims.layers):
            original: dict[str, Tensor] = {}
            try:
                if names := modules_of_roles(new, layer, roles):
                    _fit_block(new, layer, names, states.layer(layer), (task, wanted), rank, original, result)
                task.stream.advance(again=True)
            finally:  # a block that the texts have passed is not run again
                put_weights(new, original)
            if progress is not None:
                progress(layer + 1, new.dims.layers)
        return result


def _fit_block(
    new: LoadedBase,
    layer: int,
    todo: Sequence[str],
    known: LayerMaps,
    task: tuple[Reading, list[Float[Tensor, "_ k"]]],
    rank: int,
    original: dict[str, Tensor],
    result: FittedUpdates,
) -> None:
    modules = linear_modules(new, layer)
    for group in ORDER:
        names = [name for name in todo if modules[name][0].roles[0] in group]
        if names:
            fitted = _through_reads if group[0] in ("q", "gate") else _to_stream
            for name, (update, left) in fitted(new, layer, names, known, task, rank).items():
                module, linear = modules[name]
                path = new.architecture.path(layer, module)
                original.setdefault(path, linear.weight.detach().clone())
                with torch.no_grad():
                    change = update.dense().T if module.transposed else update.dense()
                    linear.weight += change.to(linear.weight)
                result.updates[path], result.residual[path] = update, left
    result.map_error[f"{new.architecture.layers}.{layer}"] = known.maps[layer, "block", "out"].error


def _through_reads(
    new: LoadedBase,
    layer: int,
    names: Sequence[str],
    known: LayerMaps,
    task: tuple[Reading, list[Float[Tensor, "_ k"]]],
    rank: int,
) -> dict[str, tuple[LowRank, float]]:
    """Fits of modules that read one space, to what their own weights make of what the map says they should read.

    With ``E`` what the map wants less what is read, a module of weight ``W`` lacks ``EWᵀ``: sums of the one space do
    for all its readers.
    """
    sums: dict[str, Moments] = {}
    readers = {name: reader(new, layer, name) or name for name in names}
    with ActivationRecorder(new).only((layer, name, "in") for name in readers.values()) as recorder:
        for z, at in zip(task[1], task[0].all(recorder), strict=True):
            for name in dict.fromkeys(readers.values()):
                x = at[layer, name, "in"]
                lacks = known.maps[layer, name, "in"](z.to(x)) - x
                if name not in sums:
                    sums[name] = Moments.empty(x.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
                sums[name].add(x, lacks)
    whole = {name: of.double() for name, of in sums.items()}
    found = {}
    for name in names:
        module, linear = linear_modules(new, layer)[name]
        of = whole[readers[name]]
        weight = linear.weight.detach().to(of.yy)
        weight = weight.T if module.transposed else weight
        found[name] = reduced_rank(of.xx, of.xy @ weight.T, ((weight @ of.yy) * weight).sum(), rank=rank)
    return found


def _to_stream(
    new: LoadedBase,
    layer: int,
    names: Sequence[str],
    known: LayerMaps,
    task: tuple[Reading, list[Float[Tensor, "_ k"]]],
    rank: int,
) -> dict[str, tuple[LowRank, float]]:
    """Fits of modules that write to the residual stream: to the stream, where nothing stands between.

    Of a module that reads a space wider than there are positions, as ``down`` mostly does, the rows are kept: they are
    less than the sums, ``(in, in)``, would be.
    """
    sums: dict[str, RegressionSums] = {}
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {}
    positions = sum(len(states) for states in task[1])
    # What is fitted, as a sum: what o writes is to mend the stream's own error as well.
    ends: dict[str, list[Place]] = {}
    for name in names:
        down = linear_modules(new, layer)[name][0].roles[0] == "down"
        ends[name] = [(layer, "block", "out") if known.additive and down else (layer, name, "out")]
        ends[name] += [(layer, "block", "in")] if known.additive and not down else []
    places = [(layer, name, "in") for name in names] + [place for fitted in ends.values() for place in fitted]
    with ActivationRecorder(new).only(places) as recorder:
        for states, at in zip(task[1], task[0].all(recorder), strict=True):
            for name in names:
                x = at[layer, name, "in"]
                z = states.to(x)
                gap = torch.stack([known.maps[place](z) - at[place] for place in ends[name]]).sum(0)
                if positions < x.shape[1]:
                    kept.setdefault(name, []).append((x, gap))
                    continue
                if name not in sums:
                    sums[name] = RegressionSums.empty(x.shape[1], gap.shape[1], gap.device, gap.dtype)
                sums[name].add(x, gap)
    found = {name: of.reduced_rank(rank) for name, of in sums.items()}
    for name in list(kept):
        x, gap = (torch.cat(parts) for parts in zip(*kept.pop(name), strict=True))
        found[name] = reduced_rank_of_rows(x, gap, rank=rank)
    return found
