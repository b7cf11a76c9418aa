"""The new base's modules fitted in order, so that it passes through the states the old base + adapter passes through.

Every other transform moves one module's update at a time and hopes that the modules still work together. This one
looks at the adapted model as a whole. Two steps, both closed-form, without labels and without gradients:

1. On general texts a ridge regression learns what state of the *new base* goes with a state of the *old base*, at
   positions of both that have read the same text. The features of an old state are what all old layers hold there:
   residual streams, mixed attention values and MLP activations, so no layer map and no head map is needed.
2. On task texts the old base **with its adapter** gives the states to reach. The new base's modules are then fitted
   in the order they run, each by reduced-rank ridge regression from what it reads now, with all modules before it
   already fitted, to what the map says it should write. Modules that write to the residual stream are fitted to the
   stream, and so also mend what the modules before them left.

The targets are absolute: the map of the adapted state, not of its change. Bare bases have often never met the task,
so their states there are arbitrary, while the adapted one is back in familiar territory, which the map knows.
In METHOD section 8's terms: sequential functional fitting with residual targets and upstream change, all old layers
feeding every new one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorasuite.architectures import Dimensions, Role
from lorasuite.blocks import Batch, Side, Stream, Watch, linear_modules, put_weights, text_batches
from lorasuite.errors import ConfigError, DataError, Problem
from lorasuite.lowrank import LowRank
from lorasuite.transforms.base import LayerPair, Progress, register

#: Ridge of the state map, relative to the mean variance of its features.
MAP_RIDGE = 1e-3
#: Ridge of each module's fit, relative to the mean square of what it reads.
FIT_RIDGE = 1e-2
#: Features of an old state at most: above it, each space is projected at random onto its share of them.
FEATURES = 2048
#: The order modules are fitted in within a block.
ORDER: tuple[tuple[Role, ...], ...] = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


@register
class Sequential:
    """Fits all modules in order by :func:`fit`; it looks at whole models, so :meth:`layer` does not apply."""

    name = "sequential"
    aligned = False
    joint = True
    control = False

    def fits(self, old: Dimensions, new: Dimensions, updated: tuple[Role, ...]) -> bool:
        return True

    def roles(self, updated: tuple[Role, ...]) -> tuple[Role, ...]:
        return ()

    def layer(self, pair: LayerPair, updates: Mapping[Role, LowRank]) -> dict[Role, LowRank]:
        """
        Raises:
            ConfigError: always; call :func:`fit`.
        """
        raise ConfigError(Problem("method", f"{self.name} fits whole models, not one layer", f"Use {self.name}.fit."))


class _Features:
    """An old model's state at each position: all layers' streams, attention mixes and MLP activations, standardised."""

    def __init__(self, old: Side, seed: int) -> None:
        self.old, self.seed = old, seed
        self.sketches: dict[tuple[Any, ...], Tensor] = {}
        self.mean = self.scale = torch.zeros(0)

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watch]:
        watch = Watch(self.old)
        for layer in range(self.old.dims.layers):
            watch.block(layer)
            for module, linear in linear_modules(self.old, layer).values():
                if set(module.roles) & {"o", "down"}:
                    watch.module(layer, module, linear)
        with watch.on():
            yield watch

    def raw(self, watch: Watch, batch: Batch) -> Tensor:
        """``(positions, features)`` float64."""
        seen = watch.read(batch.old, batch.old_rows)
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

    def _sketch(self, key: tuple[Any, ...], width: int, share: int) -> Tensor:
        if key not in self.sketches:
            generator = torch.Generator().manual_seed(self.seed + len(self.sketches))
            self.sketches[key] = torch.randn(width, share, generator=generator, dtype=torch.float64) / share**0.5
        return self.sketches[key]

    def of(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Each batch's features."""
        with self.watching() as watch:
            return [self.raw(watch, batch) for batch in batches]

    def standardise(self, rows: Sequence[Tensor]) -> list[Tensor]:
        return [(row - self.mean) / self.scale for row in rows]

    def learn(self, rows: Sequence[Tensor]) -> None:
        whole = torch.cat(list(rows))
        self.mean, self.scale = whole.mean(0), whole.std(0) + 1e-6


@dataclass
class Fitted:
    """Updates by module path, and for each the share of its target's distance that the fit left."""

    updates: dict[str, LowRank]
    residual: dict[str, float]
    map_error: dict[str, float]


def fit(
    old: Side,
    new: Side,
    adapted: Callable[[], contextlib.AbstractContextManager[Any]],
    roles: Sequence[Role],
    *,
    calibration: Sequence[str],
    texts: Sequence[str],
    rank: int,
    cutoff: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
) -> Fitted:
    """Fit the new base's modules of these roles to follow the old base + adapter on the task texts.

    Memory: the features ``(positions, ≤ 2,048)`` and one hidden state of all texts, and for one block at a time the
    second moments of what its modules read. Time: the new base passes twice over the calibration texts and up to six
    times over the task texts, the old one once over each.

    Args:
        adapted: a context in which ``old.model`` computes with its adapter.
        roles: projections that the old adapter updates.
        calibration: general texts, which both bases know: the state map is learned on them.
        texts: task texts (prompts with answers), read but never used as labels.
        rank: of each module's update.

    Raises:
        DataError: if no two positions of the two tokenizations pair.
    """
    known, task = (text_batches(part, old, new, cutoff) for part in (calibration, texts))
    if not known or not task:
        raise DataError(
            Problem("calibration", "no position of the two tokenizations pairs", "Give texts of several words.")
        )
    features = _Features(old, seed)
    raw = features.of(known)
    features.learn(raw)
    inputs = features.standardise(raw)
    del raw
    with adapted():
        wanted = features.standardise(features.of(task))
    gram = sum((z.T @ z for z in inputs), torch.zeros(inputs[0].shape[1], inputs[0].shape[1], dtype=torch.float64))
    gram += MAP_RIDGE * gram.diagonal().mean() * torch.eye(gram.shape[0], dtype=gram.dtype)
    solver = torch.linalg.cholesky(gram)
    general, special = (_Reading(part, Stream(new, [batch.new for batch in part])) for part in (known, task))
    result = Fitted({}, {}, {})
    original: dict[str, Tensor] = {}
    try:
        for layer in range(new.dims.layers):
            _fit_block(new, layer, roles, (general, inputs, solver), (special, wanted), rank, original, result)
            if progress is not None:
                progress(layer + 1, new.dims.layers)
    finally:
        put_weights(new, original)
    return result


def _fit_block(
    new: Side,
    layer: int,
    roles: Sequence[Role],
    known: tuple[_Reading, list[Tensor], Tensor],
    task: tuple[_Reading, list[Tensor]],
    rank: int,
    original: dict[str, Tensor],
    result: Fitted,
) -> None:
    modules = linear_modules(new, layer)
    chosen = {name for name, (module, _) in modules.items() if set(module.roles) & set(roles)}
    if not chosen:
        for reading in (known[0], task[0]):
            reading.stream.advance()
        return
    ends = [(layer, "block", "in"), (layer, "block", "out"), *((layer, name, "out") for name in sorted(chosen))]
    maps, additive = _maps(new, layer, ends, known)
    known[0].stream.advance()  # as the bare base does: this block is not fitted yet
    for group in ORDER:
        names = sorted(name for name in chosen if modules[name][0].roles[0] in group)
        if not names:
            continue
        stats: dict[str, list[Tensor]] = {}
        with _watching(new, layer) as watch:
            for z, at in zip(task[1], task[0].all(watch), strict=True):
                for name in names:
                    x, y = at[layer, name, "in"], at[layer, name, "out"]
                    if additive and group == ("down",):
                        gap = maps[layer, "block", "out"](z) - at[layer, "block", "out"]
                    else:
                        gap = maps[layer, name, "out"](z) - y
                    if additive and group == ("o",):  # mend the stream's own error with what is added to it
                        gap = gap + maps[layer, "block", "in"](z) - at[layer, "block", "in"]
                    parts = (x.T @ x, x.T @ gap, (gap * gap).sum())
                    stats[name] = (
                        [a + b for a, b in zip(stats[name], parts, strict=True)] if name in stats else [*parts]
                    )
        for name in names:
            module, linear = modules[name]
            path = new.architecture.path(layer, module)
            update, left = reduced_rank(*stats[name], rank=rank)
            original.setdefault(path, linear.weight.detach().clone())
            with torch.no_grad():
                change = update.dense().T if module.transposed else update.dense()
                linear.weight += change.to(linear.weight)
            result.updates[path], result.residual[path] = update, left
    task[0].stream.advance(again=True)
    result.map_error[f"{new.architecture.layers}.{layer}"] = maps[layer, "block", "out"].error


@contextlib.contextmanager
def _watching(side: Side, layer: int) -> Iterator[Watch]:
    watch = Watch(side)
    watch.block(layer)
    for module, linear in linear_modules(side, layer).values():
        watch.module(layer, module, linear)
    with watch.on():
        yield watch


@dataclass(frozen=True)
class _Reading:
    """Batches of texts on their way through the new base."""

    batches: list[Batch]
    stream: Stream

    def all(self, watch: Watch) -> Iterator[dict[tuple[Any, ...], Tensor]]:
        """What the next block reads and writes at the paired positions of each batch."""
        for number, batch in enumerate(self.batches):
            yield self.stream.read(watch, number, batch.new_rows)


@dataclass(frozen=True)
class _Map:
    """An affine map of standardised features, and the share of variance it does not explain."""

    matrix: Tensor
    mean: Tensor
    error: float

    def __call__(self, z: Tensor) -> Tensor:
        return z @ self.matrix + self.mean


def _maps(
    new: Side,
    layer: int,
    ends: Sequence[tuple[Any, ...]],
    known: tuple[_Reading, list[Tensor], Tensor],
) -> tuple[dict[tuple[Any, ...], _Map], bool]:
    """Ridge maps from old features to one new block's spaces in the bare base, and whether the block adds exactly what
    its output projections write (not so where a norm follows them)."""
    reading, inputs, solver = known
    sums: dict[tuple[Any, ...], list[Tensor]] = {}
    rows, additive = 0, True
    writers = [name for name, (module, _) in linear_modules(new, layer).items() if module.roles[0] in ("o", "down")]
    with _watching(new, layer) as watch:
        for z, seen in zip(inputs, reading.all(watch), strict=True):
            rows += z.shape[0]
            for key in ends:
                y = seen[key]
                parts = (z.T @ y, y.sum(0), (y * y).sum())
                sums[key] = [a + b for a, b in zip(sums[key], parts, strict=True)] if key in sums else [*parts]
            written = [seen[layer, name, "out"] for name in writers]
            added = seen[layer, "block", "out"] - seen[layer, "block", "in"]
            if len(written) != 2 or not torch.allclose(added, sum(written, 0 * added), atol=1e-3, rtol=1e-3):
                additive = False
    maps = {}
    for key, (cross, total, square) in sums.items():
        mean = total / rows
        matrix = torch.cholesky_solve(cross, solver)  # the features are centred, so the mean needs no correction
        variance = float(square - rows * (mean * mean).sum())
        explained = float((matrix * cross).sum())
        maps[key] = _Map(matrix, mean, max(0.0, 1 - explained / variance) if variance > 0 else 0.0)
    return maps, additive


def reduced_rank(xx: Tensor, xr: Tensor, square: Tensor, *, rank: int) -> tuple[LowRank, float]:
    """``ΔW (out, in)`` of at most ``rank`` that minimises ``‖XΔWᵀ − R‖² + λ‖ΔW‖²``, from second moments.

    Args:
        xx: ``XᵀX (in, in)``; xr: ``XᵀR (in, out)``; square: ``‖R‖²``.

    Returns:
        the update (``B (out, rank)``, ``A (rank, in)``, float64), and the share of ``‖R‖²`` that it leaves.
    """
    size = xx.shape[0]
    penalty = FIT_RIDGE * xx.diagonal().mean().clamp(min=torch.finfo(xx.dtype).tiny)
    gram = xx + penalty * torch.eye(size, dtype=xx.dtype)
    lower = torch.linalg.cholesky(gram)
    # With G = LLᵀ the penalised loss is ‖Lᵀ(W − W*)‖²: the best W of low rank is an SVD cut of LᵀW* = L⁻¹XᵀR.
    whitened = torch.linalg.solve_triangular(lower, xr, upper=False)
    u, s, vh = torch.linalg.svd(whitened, full_matrices=False)
    keep = min(rank, s.numel())
    root = s[:keep].sqrt()
    A = (torch.linalg.solve_triangular(lower.T, u[:, :keep], upper=True) * root).T
    update = LowRank((vh[:keep] * root[:, None]).T.contiguous(), A.contiguous())
    moved = update.A @ xr  # (rank, out)
    inner = float((moved * update.B.T).sum())
    energy = float(((update.A @ xx @ update.A.T) * (update.B.T @ update.B)).sum())
    left = (float(square) - 2 * inner + energy) / float(square) if float(square) > 0 else 0.0
    return update, max(left, 0.0)
