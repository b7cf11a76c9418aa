"""The new base's last block fitted so that it says what the old base + adapter says.

The *proxy* of docs/transfer.md with another target: the old base + adapter's own logits over the shared tokens, not the
new base's plus the adapter's change of the old ones. As in :mod:`lorasuite.transforms.sequential`, targets are
absolute: on a new task the bare bases' own logits are noise.

Closed form. The change of the head's input that gives the wanted logits is a least-squares solution; undoing the final
norm, with its scale at each position held fixed, makes it a change of the last hidden state; and the last block's
output projections are fitted to it by reduced-rank ridge regression, the first one first. No layer map, no head map
and no general texts; and only what the new base's last block already knows can be used: it moves what the task's
answers look like, not how they are computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorasuite.adapters import LowRank
from lorasuite.bases import (
    ActivationRecorder,
    Batch,
    LayerStream,
    LoadedBase,
    Role,
    common_tokens,
    linear_modules,
    put_weights,
    text_batches,
)
from lorasuite.correspondence import RIDGE, RegressionSums, StateMap, ridge_factor
from lorasuite.progress import Progress
from lorasuite.transforms import FittedUpdates, Input, ModelTransform

#: Positions whose logits are looked at at once.
CHUNK = 1024


@dataclass(frozen=True)
class _Norm:
    """What lies between the last block and the head, as a fixed gain after a normalisation; found from what it does."""

    gain: Tensor
    centre: bool

    @classmethod
    def of(cls, states: Tensor, inputs: Tensor) -> _Norm:
        """From last hidden states and what the head reads of them, ``(n, d)`` float64."""
        found = []
        for centre in (False, True):
            kept = states - states.mean(1, keepdim=True) if centre else states
            unit = kept / cls._size(states, centre)
            x, y = unit - unit.mean(0), inputs - inputs.mean(0)
            gain = (x * y).sum(0) / (x * x).sum(0).clamp(min=1e-30)
            found.append((float((y - gain * x).square().sum()), cls(gain, centre)))
        return min(found, key=lambda pair: pair[0])[1]

    @staticmethod
    def _size(states: Tensor, centre: bool) -> Tensor:
        kept = states - states.mean(1, keepdim=True) if centre else states
        return kept.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)

    def undo(self, change: Tensor, states: Tensor) -> Tensor:
        """The change of states that changes the head's inputs so."""
        floor = 1e-3 * self.gain.abs().mean()
        gain = torch.where(self.gain.abs() < floor, torch.full_like(self.gain, torch.inf), self.gain)
        return change / gain * self._size(states, self.centre)


class Logits(ModelTransform):
    """The last block's output projections, fitted so that the head gives the old base + adapter's logits."""

    name = "logits"
    inputs: frozenset[Input] = frozenset()
    reads_texts = True
    starts_finetune = False  # low in loss untrained, not measured as a start

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
        """Fit the last block's output projections, whatever the adapter updates; ``roles`` and ``states`` are unused.

        Memory: four vectors of the hidden size a position of the texts. Time: three passes of the new base over them,
        two more of its last block, and one of the old base.

        Raises:
            DataError: if no two positions of the two tokenizations pair.
        """
        batches = text_batches(texts, old, new, cutoff, subject="texts")
        wanted, before = _targets(old, new, adapted, batches)
        layer = new.dims.layers - 1
        modules = linear_modules(new, layer)
        names = [name for role in ("o", "down") for name, (m, _) in modules.items() if m.roles[0] == role]
        stream = LayerStream(new, [batch.new for batch in batches])
        while stream.layer < layer:
            stream.advance()
        result = FittedUpdates()
        original: dict[str, Tensor] = {}
        try:
            for done, name in enumerate(names, 1):
                module, linear = modules[name]
                path = new.architecture.path(layer, module)
                sums = RegressionSums.empty(linear.weight.numel() // new.dims.hidden_size, new.dims.hidden_size)
                with ActivationRecorder(new).block(layer).module(layer, module) as recorder:
                    for number, (batch, target, start) in enumerate(zip(batches, wanted, before, strict=True)):
                        at = stream.read(recorder, number, batch.new_rows)
                        x, gap = at[layer, name, "in"], target - (at[layer, "block", "out"] - start)
                        sums.add(x, gap)
                update, left = sums.reduced_rank(rank)
                original[path] = linear.weight.detach().clone()
                _add(linear, update, module.transposed)
                result.updates[path], result.residual[path] = update, left
                if progress is not None:
                    progress(done, len(names))
        finally:
            put_weights(new, original)
        return result


def _add(linear: Any, update: LowRank, transposed: bool) -> None:
    with torch.no_grad():
        linear.weight += (update.dense().T if transposed else update.dense()).to(linear.weight)


def _targets(
    old: LoadedBase, new: LoadedBase, adapted: Callable[[], Any], batches: Sequence[Batch]
) -> tuple[list[Tensor], list[Tensor]]:
    """For each batch, the change of the last hidden state that is wanted, and the state itself, ``(positions, d)``."""
    head = new.model.get_output_embeddings().weight.detach().float()
    shared = common_tokens(old.tokenizer, new.tokenizer, old.dims.vocab_size, head.shape[0])
    solver = ridge_factor((head.T @ head).double(), RIDGE)
    last = new.dims.layers - 1
    states, inputs, changes = [], [], []
    scale: float | None = None
    with adapted(), ActivationRecorder(new).block(last).head() as recorder:
        for batch in batches:
            said = ActivationRecorder(old).run(batch.old).logits.cpu()[batch.old_rows]
            logits = recorder.run(batch.new).logits.cpu()[batch.new_rows].float()
            seen = recorder.at(batch.new, batch.new_rows)
            state, read = seen[last, "block", "out"], seen[last + 1, "head", "in"]
            if scale is None:  # some architectures scale what the head gives
                plain = read.float() @ head.T.cpu()
                scale = float((plain * logits).sum() / (plain * plain).sum().clamp(min=1e-30))
            states.append(state)
            inputs.append(read)
            moved = []
            for start in range(0, said.shape[0], CHUNK):
                teacher, own = said[start : start + CHUNK].float(), logits[start : start + CHUNK]
                # what the old vocabulary lacks is as unlikely as the least likely token it has
                target = teacher.min(1, keepdim=True).values.expand_as(own).clone()
                target[:, shared.new] = teacher[:, shared.old]
                change = target - own
                change -= change.mean(1, keepdim=True)
                moved.append((change.to(head.device) @ head / scale).double())
            changes.append(torch.cholesky_solve(torch.cat(moved).T, solver).T.cpu())
    norm = _Norm.of(torch.cat(states), torch.cat(inputs))
    return [norm.undo(change, state) for change, state in zip(changes, states, strict=True)], states
