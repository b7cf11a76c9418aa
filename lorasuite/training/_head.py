"""Logits of the positions that predict a label, and of no other.

A language-model head costs ``D·V`` multiply-adds a position (``D`` hidden size, ``V`` vocabulary): two thirds of the
forward pass of Gemma 3 270M, and its logits are the largest tensor there is: 16 rows of 256 tokens and 262,144 logits
are 4 GiB in float32, held several times. A prompt's positions predict nothing that is scored. So the model reads the
rows with its head given one position only, and the head then reads the states that predict a label, some at a time
(:data:`CHUNK` logits), each time recomputed in the backward pass where there are several. At 8B (``D`` 4,096,
``V`` 128,256) a chunk is 523 positions: 0.27 GiB in float32, three of them at once in the backward pass, whatever the
batch.

``logits_to_keep`` of transformers is no help: an index tensor picks the same positions of every row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorasuite.data import IGNORED

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

#: Most logits computed at once: 0.25 GiB in float32.
CHUNK = 2**26


class LabelHead:
    """The output head of a model, apart from the rest of it.

    What a family does to the logits afterwards (a soft cap in Gemma 2 and 3, a factor in Granite and Cohere) is done
    here too, and at the first forward pass compared with what the model itself makes of one position. A model that
    does anything else, or has no head of its own, is read with all its logits.

    Args:
        model: with or without an adapter, which may lie on the head as well; on its device.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self._model: Any = model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._head: Any = base.get_output_embeddings()
        self._config = base.config.get_text_config()
        self._known = False

    @property
    def apart(self) -> bool:
        """Whether the head is read apart from the model, and not all logits with it; known after the first batch."""
        return self._head is not None

    def parameters(self) -> Iterator[Tensor]:
        """The model's parameters."""
        return self._model.parameters()  # type: ignore[no-any-return]

    def states(self, batch: dict[str, Tensor]) -> Tensor:
        """What the head reads at every token, ``(batch, tokens, D)``; or all logits, where the head stays in the model.

        Args:
            batch: the model's inputs without labels, rows padded on the right.
        """
        if self._head is None:
            return self._model(**batch, use_cache=False).logits  # type: ignore[no-any-return]
        read: list[Tensor] = []
        made: list[Tensor] = []

        def keep(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            read.append(arguments[0])
            # Not [:1, :1]: with the strides of that, torch makes a batched product of it and copies the head's weight.
            return (arguments[0][0, :1][None], *arguments[1:])

        hooks = [
            self._head.register_forward_pre_hook(keep),
            self._head.register_forward_hook(lambda _, __, output: made.append(output)),
        ]
        try:
            outputs = self._model(**batch, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        if not self._known and not self._same(read, made, outputs.logits, batch["input_ids"]):
            self._head = None
            return self.states(batch)
        self._known = True
        return read[0]

    def logits(self, states: Tensor) -> Tensor:
        """Logits ``(n, V)`` of states ``(n, D)``, in the model's dtype."""
        if self._head is None:
            return states
        return self._finished(self._head(states[None])[0])

    def map(self, states: Tensor, function: Callable[..., Tensor], *aligned: Tensor) -> Tensor:
        """A function of logits and tensors that belong to them, over all states, in chunks of :data:`CHUNK` logits.

        Args:
            states: ``(n, D)``, gathered from :meth:`states`.
            function: of logits ``(m, V)`` and ``m`` entries of each of ``aligned``, to a tensor ``(m, …)``.
            aligned: ``(n, …)``; moved to the logits' device.

        Returns:
            what the function gave, one after the other, ``(n, …)``.
        """
        size = max(1, CHUNK // self._vocabulary())
        parts = list(zip(*(tensor.split(size) for tensor in (states, *aligned)), strict=True))

        def apply(part: Tensor, *rest: Tensor) -> Tensor:
            logits = self.logits(part)
            return function(logits, *(tensor.to(logits.device) for tensor in rest))

        # All logits are there already where the head stays in the model; one chunk is kept for the backward pass.
        if len(parts) == 1 or self._head is None or not torch.is_grad_enabled():
            return torch.cat([apply(*part) for part in parts])
        again = functools.partial(checkpoint, apply, use_reentrant=False)
        return torch.cat([again(*part) for part in parts])

    def chunks(self, states: Tensor, *aligned: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Logits ``(m, V)`` and what belongs to them, in chunks of :data:`CHUNK` logits; without gradients."""
        size = max(1, CHUNK // self._vocabulary())
        with torch.no_grad():
            for part in zip(*(tensor.split(size) for tensor in (states, *aligned)), strict=True):
                yield self.logits(part[0]), *part[1:]

    def _vocabulary(self) -> int:
        return int(self._config.vocab_size)

    def _finished(self, logits: Tensor) -> Tensor:
        """What the family does to what its head gave."""
        cap, divisor = (getattr(self._config, name, None) for name in ("final_logit_softcapping", "logits_scaling"))
        factor = getattr(self._config, "logit_scale", None)
        if divisor is not None:
            logits = logits / divisor
        if factor is not None:
            logits = logits * factor
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _same(self, read: list[Tensor], made: list[Tensor], logits: Tensor, ids: Tensor) -> bool:
        """Whether the head read every token once, and its output finished here is what the model made of it."""
        if len(read) != 1 or read[0].shape[:-1] != ids.shape or logits.shape != made[0].shape:
            return False
        own, found = logits.detach().float(), self._finished(made[0].detach()).float()
        return torch.allclose(found, own, rtol=1e-3, atol=1e-5, equal_nan=True)


def label_rows(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where labels are predicted: example and position, each ``(n,)``, and the labels there, ``(n,)``.

    Args:
        labels: ``(batch, tokens)`` int64; the state at position ``t`` predicts the label at ``t + 1``.
    """
    examples, positions = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return examples, positions, labels[examples, positions + 1]


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target in nats, ``(n,)`` float32, of logits ``(n, V)``."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
