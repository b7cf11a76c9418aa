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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorasuite.adapters import LowRank
from lorasuite.bases import (
    Batch,
    Role,
    Side,
    Stream,
    Watch,
    common_tokens,
    linear_modules,
    put_weights,
    text_batches,
    unpaired,
)
from lorasuite.correspondence import RIDGE, StateMap, reduced_rank
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
        old: Side,
        new: Side,
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
        batches = text_batches(texts, old, new, cutoff)
        if not batches:
            raise unpaired("texts")
        wanted, before = _targets(old, new, adapted, batches)
        layer = new.dims.layers - 1
        modules = linear_modules(new, layer)
        names = [name for role in ("o", "down") for name, (m, _) in modules.items() if m.roles[0] == role]
        stream = Stream(new, [batch.new for batch in batches])
        while stream.layer < layer:
            stream.advance()
        result = FittedUpdates()
        original: dict[str, Tensor] = {}
        try:
            for done, name in enumerate(names, 1):
                module, linear = modules[name]
                path = new.architecture.path(layer, module)
                watch = Watch(new)
                watch.block(layer)
                watch.module(layer, module, linear)
                sums: list[Tensor] = []
                with watch.on():
                    for number, (batch, target, start) in enumerate(zip(batches, wanted, before, strict=True)):
                        at = stream.read(watch, number, batch.new_rows)
                        x, gap = at[layer, name, "in"], target - (at[layer, "block", "out"] - start)
                        parts = (x.T @ x, x.T @ gap, (gap * gap).sum())
                        sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else [*parts]
                update, left = reduced_rank(*sums, rank=rank)
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
    old: Side, new: Side, adapted: Callable[[], Any], batches: Sequence[Batch]
) -> tuple[list[Tensor], list[Tensor]]:
    """For each batch, the change of the last hidden state that is wanted, and the state itself, ``(positions, d)``."""
    head = new.model.get_output_embeddings().weight.detach().float()
    shared = common_tokens(old.tokenizer, new.tokenizer, old.dims.vocab_size, head.shape[0])
    gram = (head.T @ head).double()
    gram += RIDGE * gram.diagonal().mean() * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    solver = torch.linalg.cholesky(gram)
    states, inputs, changes = [], [], []
    scale: float | None = None
    with adapted():
        for batch in batches:
            with torch.inference_mode():
                said = old.model(input_ids=batch.old.to(old.device), use_cache=False).logits.cpu()[batch.old_rows]
            seen, logits = _last(new, batch)
            if scale is None:  # some architectures scale what the head gives
                plain = seen["head"] @ head.T.to(seen["head"])
                scale = float((plain * logits).sum() / (plain * plain).sum().clamp(min=1e-30))
            states.append(seen["state"].double())
            inputs.append(seen["head"].double())
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


def _last(side: Side, batch: Batch) -> tuple[Mapping[str, Tensor], Tensor]:
    """The last hidden state, what the head reads and the logits at a batch's paired positions, float32."""
    seen: dict[str, Tensor] = {}

    def block(_module: Any, _args: Any, output: Any) -> None:
        seen["state"] = output[0] if isinstance(output, tuple) else output

    def head(_module: Any, args: Any) -> None:
        seen["head"] = args[0]

    with _hooks(
        side.blocks[-1].register_forward_hook(block),
        side.model.get_output_embeddings().register_forward_pre_hook(head),
    ), torch.inference_mode():  # fmt: skip
        logits = side.model(input_ids=batch.new.to(side.device), use_cache=False).logits
    rows = batch.new_rows
    found = {name: value.view(*batch.new.shape, -1).cpu()[rows].float() for name, value in seen.items()}
    return found, logits.cpu()[rows].float()


@contextlib.contextmanager
def _hooks(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
